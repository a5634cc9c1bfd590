// What launch.h asks of the CUDA runtime, which here only keeps a record.

#include "launch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <barrier>
#include <map>
#include <thread>
#include <vector>

namespace {

// --- the runtime ---------------------------------------------------------------------------------

struct Launch {
    const void* kernel;
    int device;
    unsigned blocks;
    size_t shared_bytes;
    cudaStream_t stream;
    int argument;
    bool overlaps;
};

struct Runtime {
    std::mutex mutex;
    int driver = 13000;
    int ptx_version = 90, max_threads = 1024;
    size_t static_bytes = 0;
    int shared_optin = 227 * 1024;
    // Errors that the next call of each kind gives.
    cudaError_t get_device = cudaSuccess, get_chip = cudaSuccess, get_attributes = cudaSuccess,
                set_limit = cudaSuccess, get_driver = cudaSuccess;

    // Recorded.
    std::map<std::pair<const void*, int>, std::vector<int>> limits;  // as set, in order
    std::vector<Launch> launches;
    int questions = 0;  // calls but for cudaGetDevice and launches
    int cleared = 0;    // errors taken back, so that nobody else finds them

    // Starts over, with kernels that launch.h hasn't seen.
    void reset() {
        driver = 13000;
        ptx_version = 90, max_threads = 1024;
        static_bytes = 0;
        shared_optin = 227 * 1024;
        get_device = get_chip = get_attributes = set_limit = get_driver = cudaSuccess;
        limits.clear();
        launches.clear();
        questions = cleared = 0;
    }
};

Runtime runtime;
thread_local int current_device = 0;

cudaError_t start(const void* kernel, dim3 grid, void** arguments, size_t shared_bytes,
                  cudaStream_t stream, bool overlaps) {
    const std::lock_guard<std::mutex> lock(runtime.mutex);
    // As the driver does it: what exceeds the limit set last is refused.
    const auto limit = runtime.limits.find({kernel, current_device});
    const size_t allowed = limit == runtime.limits.end() || limit->second.empty()
                               ? 48 * 1024
                               : static_cast<size_t>(limit->second.back());
    if (shared_bytes > allowed) return cudaErrorInvalidValue;
    runtime.launches.push_back({kernel, current_device, grid.x, shared_bytes, stream,
                                *static_cast<const int*>(arguments[0]), overlaps});
    return cudaSuccess;
}

cudaError_t answer(cudaError_t error) {
    ++runtime.questions;
    return error;
}

}  // namespace

cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return runtime.get_device;
}
cudaError_t cudaDriverGetVersion(int* version) {
    const std::lock_guard<std::mutex> lock(runtime.mutex);
    *version = runtime.driver;
    return answer(runtime.get_driver);
}
cudaError_t cudaGetLastError() {
    const std::lock_guard<std::mutex> lock(runtime.mutex);
    ++runtime.cleared;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    const std::lock_guard<std::mutex> lock(runtime.mutex);
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = 132 + device;
            break;
        case cudaDevAttrComputeCapabilityMajor:
            *value = 9;
            break;
        case cudaDevAttrComputeCapabilityMinor:
            *value = 0;
            break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = runtime.shared_optin;
            break;
    }
    return answer(runtime.get_chip);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    const std::lock_guard<std::mutex> lock(runtime.mutex);
    *attributes = {runtime.static_bytes, runtime.ptx_version, 120, runtime.max_threads};
    return answer(runtime.get_attributes);
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
    const std::lock_guard<std::mutex> lock(runtime.mutex);
    if (runtime.set_limit == cudaSuccess) {
        runtime.limits[{kernel, current_device}].push_back(value);
    }
    return answer(runtime.set_limit);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
    return start(kernel, grid, arguments, shared_bytes, stream, false);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
    bool overlaps = false;
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        overlaps |= config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                    config->attrs[i].val.programmaticStreamSerializationAllowed == 1;
    }
    return start(kernel, config->gridDim, arguments, config->dynamicSmemBytes, config->stream,
                 overlaps);
}

namespace tome_test {
namespace {

using tome::device::Chip;
using tome::device::current_chip;
using tome::device::launch;
using tome::device::launch_overlapping;
using tome::device::takes_blocks_of;

struct Params {
    int value;
};
using Kernel = void (*)(Params);

// Kernels that nothing calls: a launch only names them. Each test takes those of a number of its
// own, since what launch.h knows of a kernel it knows for good.
int calls_of_kernels = 0;
template <int kTest, int kNumber = 0>
void kernel(Params p) {
    calls_of_kernels += p.value + 2 * kTest + kNumber;
}

const void* address(Kernel k) { return reinterpret_cast<const void*>(k); }
std::vector<int> limits_of(Kernel k, int device = 0) {
    return runtime.limits[{address(k), device}];
}

class Launches : public ::testing::Test {
  protected:
    void SetUp() override {
        runtime.reset();
        current_device = 0;
    }
};

TEST_F(Launches, PassOnWhatTheyAreGiven) {
    auto* stream = reinterpret_cast<cudaStream_t>(0x40);
    ASSERT_EQ(launch(kernel<0>, dim3(7), dim3(32), 1000, stream, Params{5}), cudaSuccess);
    ASSERT_EQ(launch_overlapping(kernel<0>, dim3(8), dim3(32), 2000, stream, Params{6}),
              cudaSuccess);
    ASSERT_EQ(runtime.launches.size(), 2u);
    EXPECT_EQ(runtime.launches[0].kernel, address(kernel<0>));
    EXPECT_EQ(runtime.launches[0].blocks, 7u);
    EXPECT_EQ(runtime.launches[0].shared_bytes, 1000u);
    EXPECT_EQ(runtime.launches[0].stream, stream);
    EXPECT_EQ(runtime.launches[0].argument, 5);
    EXPECT_FALSE(runtime.launches[0].overlaps);
    EXPECT_EQ(runtime.launches[1].blocks, 8u);
    EXPECT_EQ(runtime.launches[1].shared_bytes, 2000u);
    EXPECT_EQ(runtime.launches[1].argument, 6);
    EXPECT_TRUE(runtime.launches[1].overlaps);
}

TEST_F(Launches, RaiseTheLimitOncePerKernelAndDevice) {
    runtime.static_bytes = 96;
    constexpr int kLimit = 227 * 1024 - 96;
    for (size_t bytes : {200 * 1024, 100 * 1024, 0, 226 * 1024}) {
        ASSERT_EQ(launch(kernel<1>, dim3(1), dim3(32), bytes, nullptr, Params{1}), cudaSuccess);
    }
    EXPECT_EQ(limits_of(kernel<1>), std::vector<int>{kLimit});
    ASSERT_EQ(launch(kernel<1, 1>, dim3(1), dim3(32), 200 * 1024, nullptr, Params{1}), cudaSuccess);
    EXPECT_EQ(limits_of(kernel<1, 1>), std::vector<int>{kLimit}) << "another kernel";

    current_device = 3;
    for (int repeat = 0; repeat < 2; ++repeat) {
        ASSERT_EQ(launch(kernel<1>, dim3(1), dim3(32), 200 * 1024, nullptr, Params{1}),
                  cudaSuccess);
        EXPECT_EQ(limits_of(kernel<1>, 3), std::vector<int>{kLimit}) << "another device";
    }
    EXPECT_EQ(limits_of(kernel<1>).size(), 1u);
}

TEST_F(Launches, AskTheDriverNothingTheSecondTime) {
    Chip chip;
    for (int repeat = 0; repeat < 2; ++repeat) {
        const int before = runtime.questions;
        ASSERT_EQ(current_chip(chip), cudaSuccess);
        ASSERT_EQ(launch(kernel<2>, dim3(1), dim3(32), 100 * 1024, nullptr, Params{1}),
                  cudaSuccess);
        ASSERT_EQ(launch_overlapping(kernel<2>, dim3(1), dim3(32), 60 * 1024, nullptr, Params{1}),
                  cudaSuccess);
        EXPECT_EQ(runtime.questions > before, repeat == 0);
    }
}

TEST_F(Launches, OfTwoThreadsNeverRefuseEachOther) {
    constexpr int kRounds = 2000;
    std::barrier both(2);
    int refused[2] = {};
    const auto run = [&](int which) {
        both.arrive_and_wait();  // so that both may be the first
        for (int round = 0; round < kRounds; ++round) {
            const size_t bytes = which == 0 ? 50 * 1024 : 200 * 1024;
            const Params p{which};
            const cudaError_t error =
                round % 2 == 0
                    ? launch(kernel<3>, dim3(1), dim3(32), bytes, nullptr, p)
                    : launch_overlapping(kernel<3>, dim3(1), dim3(32), bytes, nullptr, p);
            if (error != cudaSuccess) ++refused[which];
        }
    };
    std::thread other(run, 1);
    run(0);
    other.join();
    EXPECT_EQ(refused[0], 0);
    EXPECT_EQ(refused[1], 0);
    EXPECT_EQ(runtime.launches.size(), 2u * kRounds);
    EXPECT_EQ(limits_of(kernel<3>), std::vector<int>{227 * 1024}) << "set once, by one of them";
}

TEST_F(Launches, OverlapWhereTheCodeWaitsAndTheDriverCaptures) {
    const auto overlaps = [](Kernel k) {
        EXPECT_EQ(launch_overlapping(k, dim3(1), dim3(32), 0, nullptr, Params{1}), cudaSuccess);
        EXPECT_EQ(launch(k, dim3(1), dim3(32), 0, nullptr, Params{1}), cudaSuccess);
        EXPECT_FALSE(runtime.launches.back().overlaps) << "not asked for";
        return runtime.launches[runtime.launches.size() - 2].overlaps;
    };
    EXPECT_TRUE(overlaps(kernel<4, 0>));
    runtime.ptx_version = 89;  // on a chip of 12.0: binaryVersion doesn't count
    EXPECT_FALSE(overlaps(kernel<4, 1>));
    runtime.ptx_version = 100;
    EXPECT_TRUE(overlaps(kernel<4, 2>));
    runtime.driver = 12029;
    EXPECT_FALSE(overlaps(kernel<4, 3>));
    runtime.driver = 12030;
    EXPECT_TRUE(overlaps(kernel<4, 4>));
}

TEST_F(Launches, OfAnEmptyGridDoNothing) {
    for (const dim3 grid : {dim3(0), dim3(1, 0), dim3(1, 1, 0)}) {
        EXPECT_EQ(launch(kernel<5>, grid, dim3(32), 0, nullptr, Params{1}), cudaSuccess);
        EXPECT_EQ(launch_overlapping(kernel<5>, grid, dim3(32), 0, nullptr, Params{1}),
                  cudaSuccess);
    }
    EXPECT_TRUE(runtime.launches.empty());
    EXPECT_EQ(runtime.questions, 0);
}

TEST_F(Launches, ReturnErrorsAndTryAgain) {
    const auto go = [] {
        return launch_overlapping(kernel<6>, dim3(1), dim3(32), 100 * 1024, nullptr, Params{1});
    };
    for (cudaError_t* fails : {&runtime.get_device, &runtime.get_chip, &runtime.get_attributes,
                               &runtime.set_limit, &runtime.get_driver}) {
        *fails = cudaErrorNoKernelImageForDevice;
        EXPECT_EQ(go(), cudaErrorNoKernelImageForDevice);
        EXPECT_TRUE(runtime.launches.empty());
        *fails = cudaSuccess;
    }
    EXPECT_EQ(go(), cudaSuccess);
    EXPECT_EQ(runtime.launches.size(), 1u);
    EXPECT_EQ(launch(kernel<6>, dim3(1), dim3(32), 228 * 1024, nullptr, Params{1}),
              cudaErrorInvalidValue)
        << "the launch's own error";
    EXPECT_EQ(go(), cudaSuccess);
}

// A kernel of one chip's instructions has no body elsewhere, and is compiled for fewer threads.
TEST_F(Launches, KnowWhichKernelsTheBuildHas) {
    EXPECT_TRUE(takes_blocks_of(kernel<8>, 128));
    runtime.max_threads = 32;
    EXPECT_FALSE(takes_blocks_of(kernel<8, 1>, 128));
    EXPECT_TRUE(takes_blocks_of(kernel<8, 1>, 32));
    EXPECT_TRUE(takes_blocks_of(kernel<8>, 128)) << "asked once";
    runtime.get_attributes = cudaErrorNoKernelImageForDevice;
    EXPECT_FALSE(takes_blocks_of(kernel<8, 2>, 32));
    EXPECT_EQ(runtime.cleared, 1);
    runtime.get_attributes = cudaSuccess;
    EXPECT_TRUE(takes_blocks_of(kernel<8, 2>, 32)) << "asked again";
    EXPECT_TRUE(runtime.launches.empty());
}

TEST_F(Launches, ChooseByTheCurrentChip) {
    for (int device : {5, 6, 5}) {
        current_device = device;
        runtime.shared_optin = (device == 5 ? 99 : 163) * 1024;
        Chip chip;
        ASSERT_EQ(current_chip(chip), cudaSuccess);
        EXPECT_EQ(chip.multiprocessors, 132 + device);
        EXPECT_EQ(chip.shared_per_block, runtime.shared_optin);
    }
    current_device = 7;
    runtime.get_chip = cudaErrorInsufficientDriver;
    Chip chip;
    EXPECT_EQ(current_chip(chip), cudaErrorInsufficientDriver);
    runtime.get_chip = cudaSuccess;
    EXPECT_EQ(current_chip(chip), cudaSuccess);
}

// The environment is read once, so each value needs a process of its own: that of a death test.
void launch_and_leave() {
    runtime.reset();
    const cudaError_t error =
        launch_overlapping(kernel<7>, dim3(1), dim3(32), 100 * 1024, nullptr, Params{1});
    setenv("TOME_OVERLAP", "0", 1);  // too late
    launch_overlapping(kernel<7, 1>, dim3(1), dim3(32), 0, nullptr, Params{1});
    std::exit(error != cudaSuccess || runtime.launches.size() != 2 ? 2
              : runtime.launches[0].overlaps                       ? 1
                                                                   : 0);
}

TEST(LaunchesDeathTest, OverlapUnlessTheEnvironmentSaysNo) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    unsetenv("TOME_OVERLAP");
    EXPECT_EXIT(launch_and_leave(), ::testing::ExitedWithCode(1), "");
    for (const auto& [value, code] :
         std::vector<std::pair<const char*, int>>{{"0", 0}, {"1", 1}, {"", 1}}) {
        setenv("TOME_OVERLAP", value, 1);
        EXPECT_EXIT(launch_and_leave(), ::testing::ExitedWithCode(code), "") << value;
    }
    unsetenv("TOME_OVERLAP");
}

}  // namespace
}  // namespace tome_test

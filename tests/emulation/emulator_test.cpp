// The emulator itself: what it computes, and that it catches what it promises to.

#include "device.h"
#include "helpers.h"
#include "launch.h"
#include "probes.h"

namespace tome_test {
namespace {

using tome::device::launch;
using tome::device::launch_overlapping;

cudaError_t run(Probe probe, unsigned blocks, unsigned threads, size_t shared,
                std::vector<int>& out) {
    return launch(probe, dim3(blocks), dim3(threads), shared, nullptr, Ints{out.data()});
}

// --- right kernels
// --------------------------------------------------------------------------------

class RightKernels : public ::testing::TestWithParam<uint32_t> {
    const tome_emulation::UseOptions use_{{.seed = GetParam()}};
};

INSTANTIATE_TEST_SUITE_P(Seeds, RightKernels, ::testing::Values(0u, 1u, 2u));

TEST_P(RightKernels, BlocksAndSharedMemory) {
    std::vector<int> out(3 * 70, -1);
    EXPECT_LAUNCHED(run(reverse_block, 3, 70, 70 * sizeof(int), out));
    for (int i = 0; i < 3 * 70; ++i) EXPECT_EQ(out[size_t(i)], 69 - i % 70);
}

TEST_P(RightKernels, WarpOperations) {
    std::vector<int> out(64, -1);
    EXPECT_LAUNCHED(run(warp_operations, 1, 64, 0, out));
    for (int i = 0; i < 64; ++i) EXPECT_EQ(out[size_t(i)], i < 32 ? 496 : 496 + 1024);
}

TEST_P(RightKernels, AtomicsOrderBlocks) {
    std::vector<int> out(12, 0);
    EXPECT_LAUNCHED(run(last_block_sums, 10, 32, 4, out));
    EXPECT_EQ(out[1], 45);
}

TEST_P(RightKernels, AWarpsBarrierOrdersItsMemory) {
    std::vector<int> out(64, -1);
    EXPECT_LAUNCHED(run(warp_exchange, 1, 64, 64 * sizeof(int), out));
    for (int i = 0; i < 64; ++i) EXPECT_EQ(out[size_t(i)], i ^ 1);
}

TEST_P(RightKernels, AsynchronousCopies) {
    std::vector<int> out(4 * 32);
    for (int i = 0; i < 128; ++i) out[size_t(i)] = i;
    EXPECT_LAUNCHED(run(async_copies, 1, 32, 512, out));
    for (int i = 0; i < 128; ++i) EXPECT_EQ(out[size_t(i)], i / 4 == 3 ? 0 : 2 * i);
}

TEST_P(RightKernels, OverlappingTheOneBefore) {
    std::vector<int> out(3 * 64, -1);
    const Ints p{out.data()};
    EXPECT_LAUNCHED(launch_overlapping(waits_first, dim3(3), dim3(64), 256, nullptr, p));
    for (int i = 0; i < 3 * 64; ++i) EXPECT_EQ(out[size_t(i)], i);
    EXPECT_TRUE(tome_emulation::neighbours().overlapping);
    EXPECT_EQ(tome_emulation::neighbours().releasing_blocks, 3u);
    // Without need the wait does no harm.
    EXPECT_LAUNCHED(run(waits_first, 3, 64, 256, out));
    EXPECT_FALSE(tome_emulation::neighbours().overlapping);
}

TEST_P(RightKernels, MatrixInstructions) {
    for (const bool half : {true, false}) {
        const Array a = random_array(half ? DType::kFloat16 : DType::kBFloat16, 256, GetParam());
        const Array b = random_array(a.dtype(), 128, GetParam() + 9);
        std::vector<float> c(128, -1.0f), plain(128, -1.0f);
        const Matrices p{static_cast<const uint16_t*>(a.data()),
                         static_cast<const uint16_t*>(b.data()), c.data(), plain.data()};
        EXPECT_LAUNCHED(
            launch(half ? multiply_half : multiply_bfloat, dim3(1), dim3(32), 768, nullptr, p));
        for (int64_t m = 0; m < 16; ++m) {
            for (int64_t n = 0; n < 8; ++n) {
                double want = 0;  // the kernel adds the product twice
                for (int64_t k = 0; k < 16; ++k) want += 2 * a[m * 16 + k] * b[k * 8 + n];
                EXPECT_NEAR(c[size_t(m * 8 + n)], want, 1e-4);
                EXPECT_NEAR(plain[size_t(m * 8 + n)], want, 1e-4);
            }
        }
    }
}

TEST(Conversions, RoundToNearestEven) {
    // Every 16-bit value comes back, and what lies between two goes where the helpers put it.
    std::mt19937 engine(1);
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const auto u = static_cast<uint16_t>(bits);
        const float half = tome::device::to_float(tome::device::Half{u});
        const float bfloat = tome::device::to_float(tome::device::BFloat{u});
        if (!std::isnan(half)) {
            EXPECT_EQ(half, static_cast<float>(decode16(u, kHalf)));
            EXPECT_EQ(tome::device::to_half(half).bits, u);
        }
        if (!std::isnan(bfloat)) {
            EXPECT_EQ(bfloat, static_cast<float>(decode16(u, kBFloat)));
            EXPECT_EQ(tome::device::to_bfloat(bfloat).bits, u);
        }
        const float any = std::bit_cast<float>(static_cast<uint32_t>(engine()));
        if (std::isnan(any)) continue;
        EXPECT_EQ(tome::device::to_bfloat(any).bits, encode16(any, kBFloat)) << any;
        const float small = std::ldexp(any, any == 0 ? 0 : -std::ilogb(any) + int(bits % 44) - 26);
        EXPECT_EQ(tome::device::to_half(small).bits, encode16(small, kHalf)) << small;
    }
}

// --- wrong kernels
// --------------------------------------------------------------------------------

void expect_failure(Probe probe, unsigned blocks, unsigned threads, const char* says) {
    for (uint32_t seed : {0u, 1u, 2u}) {
        const tome_emulation::UseOptions use({.seed = seed});
        std::vector<int> out(256, 0);
        EXPECT_NE(run(probe, blocks, threads, 1024, out), cudaSuccess) << says;
        EXPECT_NE(tome_emulation::last_failure().find(says), std::string::npos)
            << "expected: " << says << "\ngot: " << tome_emulation::last_failure();
        // The next launch is not disturbed.
        EXPECT_LAUNCHED(run(reverse_block, 1, 64, 64 * sizeof(int), out));
    }
}

TEST(WrongKernels, ShuffleThatALaneDoesNotReach) {
    expect_failure(shuffles_without_a_lane, 1, 32, "for thread 7 has returned");
}

TEST(WrongKernels, ShuffleInTwoPlaces) {
    expect_failure(shuffles_in_two_places, 1, 32, "waits in __shfl_xor_sync");
}

TEST(WrongKernels, ShuffleFromOutsideTheMask) {
    expect_failure(shuffles_from_outside_the_mask, 1, 32, "from lane 20");
}

TEST(WrongKernels, BarrierThatAThreadDoesNotReach) {
    expect_failure(forgets_a_barrier, 1, 64, "waits in __syncthreads");
    expect_failure(returns_before_a_barrier, 1, 64, "thread 40 has returned");
}

void expect_no_overlap(Probe probe, const char* says) {
    for (uint32_t seed : {0u, 1u, 2u}) {
        const tome_emulation::UseOptions use({.seed = seed});
        std::vector<int> out(64, 0);
        EXPECT_LAUNCHED(run(probe, 1, 64, 0, out));
        const Ints p{out.data()};
        EXPECT_NE(launch_overlapping(probe, dim3(1), dim3(64), 0, nullptr, p), cudaSuccess);
        EXPECT_NE(tome_emulation::last_failure().find(says), std::string::npos)
            << "expected: " << says << "\ngot: " << tome_emulation::last_failure();
    }
}

TEST(WrongKernels, ThreadThatDoesNotWaitForEarlierKernels) {
    expect_no_overlap(returns_before_waiting, "thread 9 ends without having waited");
    expect_no_overlap(lets_go_before_waiting, "lets the next kernel begin before");
}

TEST(WrongKernels, LaunchOutOfBounds) {
    std::vector<int> out(2048, 0);
    EXPECT_EQ(run(reverse_block, 1, 1025, 8192, out), cudaErrorInvalidConfiguration);
    EXPECT_EQ(run(reverse_block, 1, 32, 228 * 1024, out), cudaErrorInvalidConfiguration);
    EXPECT_EQ(run(reverse_block, 0, 32, 1024, out), cudaSuccess) << "an empty grid is no error";
}

#ifdef TOME_RACE_HOOKS

TEST(WrongKernels, ReadWithoutBarrier) {
    expect_failure(reads_without_barrier, 1, 64, "data race");
}

TEST(WrongKernels, ReadBeforeWaiting) {
    expect_no_overlap(reads_before_waiting, "before it has waited for earlier kernels");
}

TEST(WrongKernels, WriteWithoutBarrier) {
    expect_failure(writes_without_barrier, 1, 64, "data race");
}

TEST(WrongKernels, AsynchronousCopyOverWhatIsRead) {
    expect_failure(copies_over_what_is_read, 1, 64, "data race");
    expect_failure(copies_four_bytes_over_what_is_read, 1, 64, "data race");
}

TEST(WrongKernels, ReadOfAnotherBlock) {
    expect_failure(reads_other_blocks, 2, 32, "of another block");
}

#else

TEST(WrongKernels, PassTheEndOfSharedMemory) {
    std::vector<int> out(64, 0);
    EXPECT_DEATH(run(passes_the_end_of_shared_memory, 1, 32, 32 * sizeof(int), out),
                 "use-after-poison|heap-buffer-overflow");
}

#endif

TEST(WrongKernels, CopiesThatAreNotWaitedFor) {
    // Poison is read instead: no failure, but never the right values.
    std::vector<int> out(128, 1);
    EXPECT_LAUNCHED(run(forgets_to_wait_for_copies, 1, 32, 512, out));
    for (int value : out) EXPECT_NE(value, 2);
}

}  // namespace
}  // namespace tome_test

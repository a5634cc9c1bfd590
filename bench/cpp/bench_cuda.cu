// match, merge and merge_add_norm on CUDA without torch: what bench/gpu_figures.py must agree with.
//
//   nvcc -std=c++20 -O3 -Icsrc/core/include -Icsrc/core/cuda bench/cpp/bench_cuda.cu
//       csrc/core/cuda/*.cu -o bench_cuda && ./bench_cuda [--dry-run] [ROW]...
//
// Prints a line of JSON for each row: microseconds per call, medians over rounds of a replayed
// graph that holds at least a millisecond of calls; the inputs rotate through more memory than the
// L2 cache holds, but for a batch of 1. With --dry-run every figure is null and no GPU is needed.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "tome_core/cuda.h"

namespace {

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "bench_cuda: %s: %s\n", what, cudaGetErrorString(error));
    std::exit(1);
}

template <class T>
T* allocate(int64_t count) {
    void* data = nullptr;
    check(cudaMalloc(&data, static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T)),
          "cudaMalloc");
    return static_cast<T*>(data);
}

// bfloat16 values between -1 and 1, spread evenly enough.
__global__ void fill(uint16_t* data, int64_t count, uint32_t seed) {
    int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
    for (; i < count; i += int64_t{gridDim.x} * blockDim.x) {
        uint32_t h = (static_cast<uint32_t>(i) + seed) * 2654435761u;
        h ^= h >> 15;
        h *= 2246822519u;
        h ^= h >> 13;
        const float value = static_cast<float>(h) * 0x1p-31f - 1.0f;
        data[i] = static_cast<uint16_t>(__float_as_uint(value) >> 16);
    }
}

__global__ void fill_ones(float* data, int64_t count) {
    int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
    for (; i < count; i += int64_t{gridDim.x} * blockDim.x) data[i] = 1.0f;
}

// A graph's own launch takes some 10 us, which must not count.
constexpr float kGraphUs = 1500;

// Times `calls` calls, which take the inputs in turn.
template <class Call>
float median_of_graph(const Call& call, int inputs, int calls, int rounds) {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreate(&stream), "cudaStreamCreate");
    for (int i = 0; i < inputs; ++i) check(call(i, stream), "first call");
    check(cudaStreamSynchronize(stream), "first calls");
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < calls; ++i) check(call(i % inputs, stream), "captured call");
    check(cudaStreamEndCapture(stream, &graph), "capture");
    check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
    cudaEvent_t start = nullptr, end = nullptr;
    check(cudaEventCreate(&start), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
    std::vector<float> times;
    for (int round = -3; round < rounds; ++round) {
        check(cudaEventRecord(start, stream), "cudaEventRecord");
        check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
        check(cudaEventRecord(end, stream), "cudaEventRecord");
        check(cudaEventSynchronize(end), "cudaEventSynchronize");
        float milliseconds = 0;
        check(cudaEventElapsedTime(&milliseconds, start, end), "cudaEventElapsedTime");
        if (round >= 0) times.push_back(1e3f * milliseconds / static_cast<float>(calls));
    }
    check(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
    check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");
    std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
    return times[static_cast<size_t>(rounds / 2)];
}

template <class Call>
float median_us(const Call& call, int inputs, int rounds) {
    const float first = median_of_graph(call, inputs, std::max(inputs, 8), 3);
    const int calls = static_cast<int>(kGraphUs / std::max(first, 0.5f)) + 1;
    return median_of_graph(call, inputs, std::max(inputs, calls), rounds);
}

// A layer of a ViT, in bfloat16; keys lie in packed qkv.
void layer(const char* name, int64_t batch, int64_t tokens, int64_t channels, int64_t heads,
           int64_t r, bool dry) {
    if (dry) {
        std::printf(
            "{\"row\": \"%s\", \"us\": {\"match\": null, \"merge\": null, \"both\": null, "
            "\"merge_add_norm\": null}}\n",
            name);
        return;
    }
    const int64_t dim = channels / heads, rows = tokens - r;
    const int64_t key_count = batch * tokens * 3 * channels, x_count = batch * tokens * channels;
    const int64_t cold = (256 << 20) / (2 * (key_count + x_count)) + 1;
    // A model has just written what it merges: a single image is found in the cache.
    const int inputs = batch == 1 ? 4 : static_cast<int>(std::clamp<int64_t>(cold, 2, 64));
    std::vector<tome::MatchParams> matches;
    std::vector<tome::MergeParams> merges;
    std::vector<tome::MergeAddNormParams> folded;
    auto* weights = allocate<uint16_t>(channels);
    fill<<<1024, 256>>>(weights, channels, 0);
    for (int i = 0; i < inputs; ++i) {
        auto* qkv = allocate<uint16_t>(key_count);
        auto* x = allocate<uint16_t>(x_count);
        fill<<<1024, 256>>>(qkv, key_count, static_cast<uint32_t>(2 * i));
        fill<<<1024, 256>>>(x, x_count, static_cast<uint32_t>(2 * i + 1));
        auto* size = allocate<float>(batch * tokens);
        fill_ones<<<1024, 256>>>(size, batch * tokens);
        auto* members = allocate<int32_t>(batch * tokens);
        auto* offsets = allocate<int32_t>(batch * (rows + 1));
        matches.push_back({qkv + channels, tome::DType::kBFloat16, batch, heads, tokens, dim,
                           tokens * 3 * channels, dim, 3 * channels, r, 1,
                           allocate<int32_t>(batch * tokens), members, offsets});
        merges.push_back({x, tome::DType::kBFloat16, batch, tokens, rows, channels,
                          tokens * channels, channels, size, members, offsets, tome::Reduce::kMean,
                          allocate<uint16_t>(batch * rows * channels),
                          allocate<float>(batch * rows)});
    }
    for (size_t i = 0; i < merges.size(); ++i) {
        const tome::MergeParams& p = merges[i];
        tome::MergeAddNormParams q{};
        q.x = p.x;
        // For a branch stands the x half a turn away, as far from the cache as can be.
        q.branch = merges[(i + merges.size() / 2) % merges.size()].x;
        q.dtype = p.dtype;
        q.batch = batch;
        q.tokens = tokens;
        q.rows = rows;
        q.channels = channels;
        q.x_stride_batch = q.branch_stride_batch = p.stride_batch;
        q.x_stride_token = q.branch_stride_token = p.stride_token;
        q.weight = q.bias = weights;
        q.eps = 1e-6;
        q.size = p.size;
        q.members = p.members;
        q.offsets = p.offsets;
        q.out = p.out;
        q.normed = allocate<uint16_t>(batch * rows * channels);
        q.out_size = p.out_size;
        folded.push_back(q);
    }
    check(cudaDeviceSynchronize(), "fill");
    auto* workspace =
        allocate<char>(static_cast<int64_t>(tome::match_cuda_workspace_bytes(matches[0])));
    const auto match = [&](int i, cudaStream_t stream) {
        return tome::match_cuda(matches[static_cast<size_t>(i)], workspace, stream);
    };
    const auto merge = [&](int i, cudaStream_t stream) {
        return tome::merge_cuda(merges[static_cast<size_t>(i)], stream);
    };
    const auto both = [&](int i, cudaStream_t stream) {
        const cudaError_t error = match(i, stream);
        return error == cudaSuccess ? merge(i, stream) : error;
    };
    const float match_us = median_us(match, inputs, 50);
    const float merge_us = median_us(merge, inputs, 50);
    const float both_us = median_us(both, inputs, 50);
    const auto merge_add_norm = [&](int i, cudaStream_t stream) {
        return tome::merge_add_norm_cuda(folded[static_cast<size_t>(i)], stream);
    };
    const float folded_us = median_us(merge_add_norm, inputs, 50);
    std::printf(
        "{\"row\": \"%s\", \"us\": {\"match\": %.3f, \"merge\": %.3f, \"both\": %.3f, "
        "\"merge_add_norm\": %.3f}}\n",
        name, match_us, merge_us, both_us, folded_us);
    std::fflush(stdout);
    for (const tome::MatchParams& p : matches) {
        cudaFree(const_cast<uint16_t*>(static_cast<const uint16_t*>(p.metric)) - channels);
        cudaFree(p.assign);
        cudaFree(p.members);
        cudaFree(p.offsets);
    }
    for (const tome::MergeParams& p : merges) {
        cudaFree(const_cast<void*>(p.x));
        cudaFree(const_cast<float*>(p.size));
        cudaFree(p.out);
        cudaFree(p.out_size);
    }
    for (const tome::MergeAddNormParams& p : folded) cudaFree(p.normed);
    cudaFree(weights);
    cudaFree(workspace);
}

}  // namespace

int main(int count, char** arguments) {
    bool dry = false;
    std::vector<const char*> names;
    for (int i = 1; i < count; ++i) {
        if (std::strcmp(arguments[i], "--dry-run") == 0) {
            dry = true;
        } else {
            names.push_back(arguments[i]);
        }
    }
    struct Row {
        const char* name;
        int64_t batch, tokens, channels, heads, r;
    };
    constexpr Row kRows[] = {{"layer:vit_b", 256, 197, 768, 12, 13},
                             {"layer:vit_l384", 64, 577, 1024, 16, 23},
                             {"layer:single", 1, 197, 768, 12, 13},
                             {"layer:single_l384", 1, 577, 1024, 16, 23}};
    size_t found = 0;
    for (const Row& row : kRows) {
        const bool named = std::any_of(names.begin(), names.end(), [&](const char* name) {
            return std::strcmp(name, row.name) == 0;
        });
        if (!names.empty() && !named) continue;
        ++found;
        layer(row.name, row.batch, row.tokens, row.channels, row.heads, row.r, dry);
    }
    if (found >= names.size()) return 0;
    std::fprintf(stderr, "bench_cuda: no row has one of these names\n");
    return 2;
}

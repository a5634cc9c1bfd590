// Microbenchmarks of tome_core, each next to the copy that bounds it from below.
//
//   cmake -S . -B build -DTOME_BUILD_BENCH=ON && cmake --build build
//   build/bench_core --benchmark_filter='merge.*bf16' --benchmark_counters_tabular=true
//
// Bytes/s counts what must be moved: the input once and the output once.

#include <benchmark/benchmark.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tome_core/thread_pool.h"
#include "tome_core/tome_core.h"

namespace {

using tome::DType;

struct Size {
    int64_t batch, tokens, channels, heads, dim, r;
};

// ViT-B/16 at 224 and ViT-L/16 at 384, and the first stage of a diffusion U-Net.
const Size kSizes[] = {
    {1, 197, 768, 12, 64, 16},    {8, 197, 768, 12, 64, 16},  {64, 197, 768, 12, 64, 16},
    {1, 577, 1024, 16, 64, 23},   {8, 577, 1024, 16, 64, 23}, {64, 577, 1024, 16, 64, 23},
    {2, 4096, 320, 1, 320, 2048},
};

std::string label(const char* what, const Size& s, DType dtype, int threads) {
    return std::string(what) + "/B" + std::to_string(s.batch) + "_N" + std::to_string(s.tokens) +
           "_C" + std::to_string(s.channels) + (dtype == DType::kFloat32 ? "/f32" : "/bf16") +
           "/threads" + std::to_string(threads);
}

// Random float32, or its upper halves: bfloat16 by truncation.
std::vector<char> random_values(int64_t count, DType dtype) {
    std::mt19937 engine(1);
    std::normal_distribution<float> normal;
    const auto element = static_cast<size_t>(tome::element_size(dtype));
    std::vector<char> out(static_cast<size_t>(count) * element);
    for (int64_t i = 0; i < count; ++i) {
        const float value = normal(engine);
        std::memcpy(out.data() + static_cast<size_t>(i) * element,
                    reinterpret_cast<const char*>(&value) + (4 - element), element);
    }
    return out;
}

struct Plan {
    std::vector<int32_t> assign, members, offsets;
    int64_t rows;
};

// The keys of a packed qkv tensor (batch, tokens, 3, heads, dim), read in place.
tome::MatchParams match_params(const Size& s, DType dtype, const std::vector<char>& qkv,
                               Plan& plan) {
    plan.rows = s.tokens - s.r;
    plan.assign.resize(static_cast<size_t>(s.batch * s.tokens));
    plan.members.resize(plan.assign.size());
    plan.offsets.resize(static_cast<size_t>(s.batch * (plan.rows + 1)));
    const int64_t token = 3 * s.heads * s.dim;
    return {qkv.data() + s.heads * s.dim * tome::element_size(dtype),
            dtype,
            s.batch,
            s.heads,
            s.tokens,
            s.dim,
            s.tokens * token,
            s.dim,
            token,
            s.r,
            1,
            plan.assign.data(),
            plan.members.data(),
            plan.offsets.data()};
}

Plan make_plan(const Size& s) {
    Plan plan;
    const std::vector<char> qkv =
        random_values(s.batch * s.tokens * 3 * s.heads * s.dim, DType::kFloat32);
    tome::match(match_params(s, DType::kFloat32, qkv, plan), tome::Threads::serial());
    return plan;
}

void match(benchmark::State& state, Size s, DType dtype, int threads) {
    tome::ThreadPool pool(threads);
    Plan plan;
    const std::vector<char> qkv = random_values(s.batch * s.tokens * 3 * s.heads * s.dim, dtype);
    const tome::MatchParams params = match_params(s, dtype, qkv, plan);
    for (auto _ : state) tome::match(params, pool.threads());
    state.SetItemsProcessed(state.iterations() * s.batch * s.tokens);
}

void merge(benchmark::State& state, Size s, DType dtype, int threads) {
    tome::ThreadPool pool(threads);
    const Plan plan = make_plan(s);
    const std::vector<char> x = random_values(s.batch * s.tokens * s.channels, dtype);
    const std::vector<float> size(static_cast<size_t>(s.batch * s.tokens), 2.0f);
    const int64_t out_bytes = s.batch * plan.rows * s.channels * tome::element_size(dtype);
    std::vector<char> out(static_cast<size_t>(out_bytes));
    std::vector<float> out_size(static_cast<size_t>(s.batch * plan.rows));
    const tome::MergeParams params{x.data(),
                                   dtype,
                                   s.batch,
                                   s.tokens,
                                   plan.rows,
                                   s.channels,
                                   s.tokens * s.channels,
                                   s.channels,
                                   size.data(),
                                   plan.members.data(),
                                   plan.offsets.data(),
                                   tome::Reduce::kMean,
                                   out.data(),
                                   out_size.data()};
    for (auto _ : state) benchmark::DoNotOptimize(tome::merge(params, pool.threads()));
    state.SetBytesProcessed(state.iterations() * (static_cast<int64_t>(x.size()) + out_bytes));
}

void merge_add_norm(benchmark::State& state, Size s, DType dtype, int threads) {
    tome::ThreadPool pool(threads);
    const Plan plan = make_plan(s);
    const std::vector<char> x = random_values(s.batch * s.tokens * s.channels, dtype);
    const std::vector<char> branch = x;
    const std::vector<char> vectors = random_values(s.channels, dtype);
    const std::vector<float> size(static_cast<size_t>(s.batch * s.tokens), 2.0f);
    const int64_t out_bytes = s.batch * plan.rows * s.channels * tome::element_size(dtype);
    std::vector<char> out(static_cast<size_t>(out_bytes)), normed(out);
    std::vector<float> out_size(static_cast<size_t>(s.batch * plan.rows));
    tome::MergeAddNormParams p{};
    p.x = x.data();
    p.branch = branch.data();
    p.dtype = dtype;
    p.batch = s.batch;
    p.tokens = s.tokens;
    p.rows = plan.rows;
    p.channels = s.channels;
    p.x_stride_batch = p.branch_stride_batch = s.tokens * s.channels;
    p.x_stride_token = p.branch_stride_token = s.channels;
    p.weight = p.bias = vectors.data();
    p.eps = 1e-6;
    p.size = size.data();
    p.members = plan.members.data();
    p.offsets = plan.offsets.data();
    p.out = out.data();
    p.normed = normed.data();
    p.out_size = out_size.data();
    for (auto _ : state) benchmark::DoNotOptimize(tome::merge_add_norm(p, pool.threads()));
    state.SetBytesProcessed(state.iterations() * 2 * (static_cast<int64_t>(x.size()) + out_bytes));
}

void unmerge(benchmark::State& state, Size s, DType dtype, int threads) {
    tome::ThreadPool pool(threads);
    const Plan plan = make_plan(s);
    const std::vector<char> x = random_values(s.batch * plan.rows * s.channels, dtype);
    const int64_t out_bytes = s.batch * s.tokens * s.channels * tome::element_size(dtype);
    std::vector<char> out(static_cast<size_t>(out_bytes));
    const tome::UnmergeParams params{x.data(),
                                     dtype,
                                     s.batch,
                                     s.tokens,
                                     plan.rows,
                                     s.channels,
                                     plan.rows * s.channels,
                                     s.channels,
                                     plan.assign.data(),
                                     out.data()};
    for (auto _ : state) benchmark::DoNotOptimize(tome::unmerge(params, pool.threads()));
    state.SetBytesProcessed(state.iterations() * (static_cast<int64_t>(x.size()) + out_bytes));
}

// Counts the multiply-adds of the two products, as two operations each.
void attention(benchmark::State& state, Size s, DType dtype, int threads) {
    tome::ThreadPool pool(threads);
    const int64_t head_bytes = s.heads * s.dim * tome::element_size(dtype);
    const int64_t token = 3 * s.heads * s.dim;
    const std::vector<char> qkv = random_values(s.batch * s.tokens * token, dtype);
    const std::vector<float> size(static_cast<size_t>(s.batch * s.tokens), 2.0f);
    std::vector<char> out(static_cast<size_t>(s.batch * s.tokens * head_bytes));
    std::vector<float> lse(static_cast<size_t>(s.batch * s.heads * s.tokens));
    const tome::HeadStrides strides{s.tokens * token, s.dim, token};
    const tome::AttentionInputs inputs{qkv.data(),
                                       qkv.data() + head_bytes,
                                       qkv.data() + 2 * head_bytes,
                                       dtype,
                                       s.batch,
                                       s.heads,
                                       s.tokens,
                                       s.tokens,
                                       s.dim,
                                       strides,
                                       strides,
                                       strides,
                                       size.data(),
                                       0.125};
    const tome::AttentionParams params{inputs, out.data(), lse.data()};
    for (auto _ : state) {
        tome::attention(params, pool.threads());
        benchmark::ClobberMemory();
    }
    const auto operations =
        static_cast<double>(4 * s.batch * s.heads * s.tokens * s.tokens * s.dim);
    state.counters["FLOP"] =
        benchmark::Counter(operations, benchmark::Counter::kIsIterationInvariantRate);
}

// The floor: all of x copied once, split over the same threads.
void copy(benchmark::State& state, Size s, DType dtype, int threads) {
    tome::ThreadPool pool(threads);
    const std::vector<char> x = random_values(s.batch * s.tokens * s.channels, dtype);
    std::vector<char> out(x.size());
    for (auto _ : state) {
        pool.threads().parallel_for(
            static_cast<int64_t>(x.size()), int64_t{1} << 16, [&](int64_t begin, int64_t end) {
                std::memcpy(out.data() + begin, x.data() + begin, static_cast<size_t>(end - begin));
            });
        benchmark::ClobberMemory();
    }
    state.SetBytesProcessed(state.iterations() * 2 * static_cast<int64_t>(x.size()));
}

}  // namespace

int main(int argc, char** argv) {
    const int all = static_cast<int>(std::thread::hardware_concurrency());
    for (const Size& s : kSizes) {
        for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
            for (int threads = 1; threads <= all; threads = threads < all ? all : all + 1) {
                const auto add = [&](const char* what, auto* run) {
                    benchmark::RegisterBenchmark(label(what, s, dtype, threads).c_str(), run, s,
                                                 dtype, threads)
                        ->UseRealTime()
                        ->Unit(benchmark::kMicrosecond);
                };
                add("copy", copy);
                add("merge", merge);
                add("merge_add_norm", merge_add_norm);
                add("unmerge", unmerge);
                add("match", match);
                add("attention", attention);
            }
        }
    }
    benchmark::AddCustomContext("isa", tome::isa_name(tome::active_isa()));
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
    return 0;
}

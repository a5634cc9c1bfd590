// Runs every operator on the GPU against tome_core's CPU kernels, without torch. Prints a line of
// JSON for each case, and flushes it: what ran before a crash is never lost.
//
//   nvcc -std=c++20 -O3 -arch=native -Icsrc/core/include bench/cpp/gpu_check.cpp
//       csrc/core/cpu/*.cpp csrc/core/cuda/*.cu -o gpu_check
//   gpu_check [--list] [--set all|sanitizer|repeats|emulator] [--repeats N] [--case NAME]...
//   gpu_check --self-test        shows that wrong results are found
//
// A case runs at least twice. Before each run its outputs, and some bytes around them, are filled
// with a pattern that changes from run to run, so one comparison of bits shows both what was not
// written and what depends on timing. Exit status: 0 all right, 1 something wrong, 70 a CUDA error,
// after which nothing else in this process could be trusted; the cases not reached are not printed.
//
// tests/emulation builds the same source against the stand-in for CUDA.

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tome_core/cuda.h"
#include "tome_core/thread_pool.h"
#include "tome_core/tome_core.h"

#ifdef TOME_EMULATION
#include "emulator.h"
#endif

namespace {

using tome::DType;

// --- the device
// ------------------------------------------------------------------------------------

#ifdef TOME_EMULATION
constexpr bool kEmulated = true;
cudaError_t device_allocate(void** data, size_t bytes) {
    *data = std::malloc(bytes);
    return *data == nullptr ? cudaErrorInvalidValue : cudaSuccess;
}
void device_free(void* data) { std::free(data); }
cudaError_t device_fill(void* data, int value, size_t bytes) {
    std::memset(data, value, bytes);
    return cudaSuccess;
}
cudaError_t upload(void* to, const void* from, size_t bytes) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t download(void* to, const void* from, size_t bytes) { return upload(to, from, bytes); }
cudaError_t device_wait() { return cudaSuccess; }
std::string error_text(cudaError_t error) {
    return std::string(cudaGetErrorString(error)) + ": " + tome_emulation::last_failure();
}
// Another order of threads and blocks every time.
void choose_order(int run) { tome_emulation::options().seed = static_cast<uint32_t>(run); }
#else
constexpr bool kEmulated = false;
cudaError_t device_allocate(void** data, size_t bytes) { return cudaMalloc(data, bytes); }
void device_free(void* data) { cudaFree(data); }
cudaError_t device_fill(void* data, int value, size_t bytes) {
    return cudaMemsetAsync(data, value, bytes, nullptr);
}
cudaError_t upload(void* to, const void* from, size_t bytes) {
    return cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice);
}
cudaError_t download(void* to, const void* from, size_t bytes) {
    return cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost);
}
cudaError_t device_wait() { return cudaDeviceSynchronize(); }
std::string error_text(cudaError_t error) {
    return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}
void choose_order(int) {}
#endif

// What a CUDA call answered, thrown to where a case is reported.
struct CudaError {
    cudaError_t error;
    const char* where;
};

void check(cudaError_t error, const char* where) {
    if (error != cudaSuccess) throw CudaError{error, where};
}

// --- arrays on the host
// ----------------------------------------------------------------------------

double decode_half(uint16_t bits) {
    const double sign = bits >> 15 ? -1.0 : 1.0;
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return fraction ? std::nan("") : sign * HUGE_VAL;
    if (exponent == 0) return sign * std::ldexp(fraction, -24);
    return sign * std::ldexp(fraction + 1024, exponent - 25);
}

// To nearest, ties to even. No input here is too large for float16.
uint16_t encode_half(double value) {
    if (std::isnan(value)) return 0x7e00;
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const double size = std::fabs(value);
    const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
    const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    const int bits = (exponent + 14) * 1024 + units;
    return static_cast<uint16_t>(sign | std::min(bits, 0x7c00));
}

uint16_t encode_bfloat(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    if (std::isnan(value)) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

double load(DType dtype, const void* data, int64_t i) {
    switch (dtype) {
        case DType::kFloat32:
            return static_cast<const float*>(data)[i];
        case DType::kFloat16:
            return decode_half(static_cast<const uint16_t*>(data)[i]);
        case DType::kBFloat16:
            return std::bit_cast<float>(uint32_t{static_cast<const uint16_t*>(data)[i]} << 16);
        case DType::kFloat64:
            break;
    }
    return static_cast<const double*>(data)[i];
}

class Array {
  public:
    Array(DType dtype, int64_t count)
        : dtype_(dtype),
          count_(count),
          bytes_(static_cast<size_t>(std::max<int64_t>(count, 1) * tome::element_size(dtype))) {}

    DType dtype() const { return dtype_; }
    int64_t count() const { return count_; }
    size_t bytes() const { return bytes_.size(); }
    void* data() { return bytes_.data(); }
    const void* data() const { return bytes_.data(); }
    void* at(int64_t i) { return bytes_.data() + i * tome::element_size(dtype_); }
    double operator[](int64_t i) const { return load(dtype_, data(), i); }

    void set(int64_t i, double value) {
        switch (dtype_) {
            case DType::kFloat32:
                reinterpret_cast<float*>(bytes_.data())[i] = static_cast<float>(value);
                return;
            case DType::kFloat16:
                reinterpret_cast<uint16_t*>(bytes_.data())[i] = encode_half(value);
                return;
            case DType::kBFloat16:
                reinterpret_cast<uint16_t*>(bytes_.data())[i] =
                    encode_bfloat(static_cast<float>(value));
                return;
            case DType::kFloat64:
                reinterpret_cast<double*>(bytes_.data())[i] = value;
                return;
        }
    }

    // The same values in the dtype that references are computed in.
    Array exact() const {
        const bool wide = dtype_ == DType::kFloat64;
        Array out(wide ? DType::kFloat64 : DType::kFloat32, count_);
        for (int64_t i = 0; i < count_; ++i) out.set(i, (*this)[i]);
        return out;
    }

  private:
    DType dtype_;
    int64_t count_;
    std::vector<unsigned char> bytes_;
};

using Ints = std::vector<int32_t>;
using Floats = std::vector<float>;

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

    uint64_t bits() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return z ^ z >> 31;
    }
    int64_t below(int64_t limit) { return static_cast<int64_t>(bits() % uint64_t(limit)); }
    // Four uniform numbers added: near enough to a normal one, mean 0 and variance 1.
    double normal() {
        const uint64_t b = bits();
        const auto sum = (b & 0xffff) + (b >> 16 & 0xffff) + (b >> 32 & 0xffff) + (b >> 48);
        return (static_cast<double>(sum) / 65536.0 - 2.0) * 1.7320508;
    }

  private:
    uint64_t state_;
};

// A (batch, heads, tokens, dim) tensor somewhere in memory, with NaN wherever it is not.
struct Heads {
    Array memory;
    int64_t offset;
    tome::HeadStrides strides;
};

enum class Layout { kPacked, kHeads, kOdd };  // one of three in qkv, contiguous, off 16 bytes

Heads random_heads(DType dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t dim,
                   Layout layout, Random& random) {
    const int64_t row = layout == Layout::kOdd ? dim + 3 : dim;
    const int64_t parts = layout == Layout::kPacked ? 3 : 1;
    Heads t{Array(dtype, batch * tokens * heads * parts * row + 1), 0, {}};
    if (layout == Layout::kPacked) {
        t.strides = {tokens * 3 * heads * row, row, 3 * heads * row};
        t.offset = heads * row;
    } else {
        t.strides = {heads * tokens * row, tokens * row, row};
        t.offset = layout == Layout::kOdd ? 1 : 0;
    }
    for (int64_t i = 0; i < t.memory.count(); ++i) t.memory.set(i, std::nan(""));
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t h = 0; h < heads; ++h) {
            for (int64_t n = 0; n < tokens; ++n) {
                const int64_t at =
                    t.offset + b * t.strides.batch + h * t.strides.head + n * t.strides.token;
                for (int64_t d = 0; d < dim; ++d) t.memory.set(at + d, random.normal());
            }
        }
    }
    return t;
}

Array random_array(DType dtype, int64_t count, Random& random) {
    Array out(dtype, count);
    for (int64_t i = 0; i < count; ++i) out.set(i, random.normal());
    return out;
}

// The relative error of rounding to dtype.
double roundoff(DType dtype) {
    return dtype == DType::kFloat16    ? 0x1p-11
           : dtype == DType::kBFloat16 ? 0x1p-8
           : dtype == DType::kFloat32  ? 0x1p-24
                                       : 0x1p-53;
}

// --- a case
// ----------------------------------------------------------------------------------------

enum class Op {
    kMatch,
    kSelect,
    kPlan,
    kMerge,
    kMergeBackward,
    kMergeAddNorm,
    kUnmerge,
    kChain,  // match, merge, merge_add_norm and unmerge one behind the other, as in a block
    kAttention,
    kAttentionBackward,
    kClsAttention,
};
constexpr const char* kOpNames[] = {
    "match",          "select",  "plan",  "merge",     "merge_backward",
    "merge_add_norm", "unmerge", "chain", "attention", "attention_backward",
    "cls_attention"};

enum class Sizes { kNone, kSome, kZeros };  // kZeros: one key in four hidden, and all of one image

constexpr unsigned kAll = 1, kSanitizer = 2, kRepeats = 4, kEmulator = 8;  // sets of cases

struct Case {
    Op op = Op::kMatch;
    DType dtype = DType::kBFloat16;
    int64_t batch = 1, heads = 1, queries = 0, tokens = 0, dim = 0;  // dim: also channels
    int64_t r = 0, prefix = 0;  // r: also how many rows fewer than tokens, and what select drops
    Layout layout = Layout::kPacked;
    Sizes sizes = Sizes::kSome;
    tome::Reduce reduce = tome::Reduce::kMean;
    bool fuse = false;
    unsigned sets = kAll;
};

const char* short_name(DType dtype) {
    constexpr const char* kNames[] = {"f32", "f16", "bf16", "f64"};
    return kNames[static_cast<int>(dtype)];
}

std::string name_of(const Case& c) {
    char text[160];
    const bool attention = c.op >= Op::kAttention;
    std::snprintf(text, sizeof text, "%s:%s:B%lldH%lldN%lldD%lld", kOpNames[int(c.op)],
                  short_name(c.dtype), static_cast<long long>(c.batch),
                  static_cast<long long>(c.heads), static_cast<long long>(c.tokens),
                  static_cast<long long>(c.dim));
    std::string name = text;
    const auto number = [&](const char* letter, int64_t value) {
        name += letter + std::to_string(value);
    };
    if (attention && c.op != Op::kClsAttention && c.queries != c.tokens) number("M", c.queries);
    if (!attention) number("r", c.r);
    if (c.prefix > 0) number("p", c.prefix);
    constexpr const char* kLayouts[] = {"", ":heads", ":odd"};
    name += kLayouts[int(c.layout)];
    constexpr const char* kSizes[] = {":none", "", ":zeros"};
    name += kSizes[int(c.sizes)];
    constexpr const char* kReduces[] = {"", ":sum", ":amax"};
    name += kReduces[int(c.reduce)];
    if (c.fuse) name += ":fuse";
    return name;
}

// Device memory of a case, freed with it.
class Memory {
  public:
    static constexpr size_t kGuard = 256;

    explicit Memory(size_t bytes) : bytes_(bytes) {
        check(device_allocate(&data_, bytes + 2 * kGuard), "cudaMalloc");
    }
    ~Memory() { device_free(data_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    char* data() const { return static_cast<char*>(data_) + kGuard; }
    size_t bytes() const { return bytes_; }
    void poison(int value) const {
        check(device_fill(data_, value, bytes_ + 2 * kGuard), "cudaMemsetAsync");
    }
    // With the guards.
    std::vector<unsigned char> content() const {
        std::vector<unsigned char> out(bytes_ + 2 * kGuard);
        check(download(out.data(), data_, out.size()), "cudaMemcpy");
        return out;
    }

  private:
    void* data_ = nullptr;
    size_t bytes_;
};

enum class Type { kInt32, kFloat };

struct Output {
    std::string name;
    Type type;
    DType dtype;  // of kFloat
    int64_t count;
    std::unique_ptr<Memory> memory;
    std::vector<unsigned char> bytes;  // of the first run, without guards

    int64_t element() const { return type == Type::kInt32 ? 4 : tome::element_size(dtype); }
    const int32_t* ints() const { return reinterpret_cast<const int32_t*>(bytes.data()); }
    double operator[](int64_t i) const {
        return type == Type::kInt32 ? ints()[i] : load(dtype, bytes.data(), i);
    }
};

// What is said about a case.
struct Verdict {
    bool ok = true;
    std::string why;     // the first thing that is wrong
    std::string output;  // where
    int64_t index = -1;  // flat, of the worst element
    int64_t wrong = 0, of = 0;
    double worst = 0;  // the largest error, in units of what rounding may do: above 1 is wrong
    double error = 0;  // the largest error itself
    int64_t ties = 0;  // tokens that match chose otherwise, among scores equal to rounding
    std::vector<std::string> first;  // [index, got, wanted] of the first wrong ones

    void fail(const std::string& reason, const std::string& where) {
        if (ok) why = reason, output = where;
        ok = false;
    }
};

std::string number_text(double x) {
    char text[40];
    std::snprintf(text, sizeof text, std::isfinite(x) ? "%.9g" : "\"%g\"", x);
    return text;
}

// A case ready to run: inputs and outputs on the device, the call, and what to make of the outputs.
struct Trial {
    std::vector<std::unique_ptr<Memory>> inputs;
    std::vector<Output> outputs;
    std::unique_ptr<Memory> workspace;
    std::function<cudaError_t()> run;
    std::function<void(Verdict&)> judge;

    void* put(const void* data, size_t bytes) {
        inputs.push_back(std::make_unique<Memory>(std::max<size_t>(bytes, 1)));
        if (bytes > 0) check(upload(inputs.back()->data(), data, bytes), "cudaMemcpy");
        return inputs.back()->data();
    }
    template <class T>
    T* put(const std::vector<T>& x) {
        return static_cast<T*>(put(x.data(), x.size() * sizeof(T)));
    }
    void* put(const Array& x) { return put(x.data(), x.bytes()); }
    const void* put(const Heads& x) {
        return static_cast<char*>(put(x.memory)) + x.offset * tome::element_size(x.memory.dtype());
    }
    void* out(const char* name, Type type, DType dtype, int64_t count) {
        const int64_t element = type == Type::kInt32 ? 4 : tome::element_size(dtype);
        outputs.push_back({name,
                           type,
                           dtype,
                           count,
                           std::make_unique<Memory>(static_cast<size_t>(count * element)),
                           {}});
        return outputs.back().memory->data();
    }
    int32_t* out_ints(const char* name, int64_t count) {
        return static_cast<int32_t*>(out(name, Type::kInt32, DType::kFloat32, count));
    }
    float* out_floats(const char* name, int64_t count) {
        return static_cast<float*>(out(name, Type::kFloat, DType::kFloat32, count));
    }
    const Output& operator[](const std::string& name) const {
        for (const Output& x : outputs) {
            if (x.name == name) return x;
        }
        std::abort();
    }
};

tome::Threads threads() {
    static tome::ThreadPool pool(std::min(4, int(std::thread::hardware_concurrency())));
    return pool.threads();
}

// Every element of `got` as near to `want` as `limit` says.
void compare(Verdict& v, const Output& got, const std::function<double(int64_t)>& want,
             const std::function<double(int64_t)>& limit) {
    int64_t wrong = 0, worst_at = -1;
    double worst = 0;
    std::vector<std::string> first;
    for (int64_t i = 0; i < got.count; ++i) {
        const double g = got[i], w = want(i);
        if (std::isnan(g) && std::isnan(w)) continue;
        const double error = g == w ? 0.0 : std::fabs(g - w), allowed = limit(i);
        const double share = error == 0 ? 0.0 : error / allowed;
        v.error = std::max(v.error, error);
        if (!(share <= worst)) worst = std::isnan(share) ? HUGE_VAL : share, worst_at = i;
        if (share <= 1) continue;
        if (++wrong <= 8) {
            first.push_back("[" + std::to_string(i) + ", " + number_text(g) + ", " +
                            number_text(w) + "]");
        }
    }
    v.worst = std::max(v.worst, worst);
    if (wrong == 0) return;
    if (v.ok) v.index = worst_at, v.wrong = wrong, v.of = got.count, v.first = first;
    v.fail("values", got.name);
}

void compare_ints(Verdict& v, const Output& got, const Ints& want) {
    compare(
        v, got, [&](int64_t i) { return double(want[size_t(i)]); }, [](int64_t) { return 0.5; });
}

// Besides, the error of each row of `width` elements in the mean over them. A single element may be
// off by the roundings of all its terms; over a row these cancel, and a key left out does not.
void compare_rows(Verdict& v, const Output& got, const Array& want, int64_t width, double relative,
                  double floor) {
    for (int64_t row = 0; row * width < got.count; ++row) {
        double error = 0, size = 0;
        for (int64_t i = row * width; i < (row + 1) * width; ++i) {
            error += (got[i] - want[i]) * (got[i] - want[i]);
            size += want[i] * want[i];
        }
        error = std::sqrt(error / double(width)), size = std::sqrt(size / double(width));
        const double share = error / (relative * size + floor);
        if (!(share <= v.worst)) v.worst = share;
        if (share <= 1) continue;
        if (v.ok) {
            v.index = row * width, v.of = got.count / width;
            for (int64_t i = row * width; i < row * width + std::min<int64_t>(8, width); ++i) {
                v.first.push_back("[" + std::to_string(i) + ", " + number_text(got[i]) + ", " +
                                  number_text(want[i]) + "]");
            }
        }
        ++v.wrong;
        v.fail("a row's mean error", got.name);
    }
}

// --- plans
// ----------------------------------------------------------------------------------------

struct Plan {
    int64_t batch, tokens, rows;
    Ints assign, members, offsets;
};

Plan plan_of(Ints assign, int64_t batch, int64_t tokens, int64_t rows) {
    Plan p{batch,
           tokens,
           rows,
           std::move(assign),
           Ints(size_t(batch * tokens)),
           Ints(size_t(batch * (rows + 1)))};
    if (!tome::plan({p.assign.data(), batch, tokens, rows, p.members.data(), p.offsets.data()},
                    threads())) {
        p.rows = -1;  // refused
    }
    return p;
}

// Some rows stay empty, and one token in eight is dropped.
Plan random_plan(const Case& c, Random& random) {
    Ints assign;
    const int64_t rows = c.tokens - c.r;
    for (int64_t i = 0; i < c.batch * c.tokens; ++i) {
        const bool drop = random.below(8) == 0;
        assign.push_back(drop ? -1 : static_cast<int32_t>(random.below(rows)));
    }
    return plan_of(assign, c.batch, c.tokens, rows);
}

Floats random_sizes(const Case& c, Random& random) {
    Floats out;
    for (int64_t b = 0; b < c.batch; ++b) {
        for (int64_t n = 0; n < c.tokens; ++n) {
            const auto size = static_cast<float>(1 + random.below(5));
            const bool hidden = random.below(4) == 0 || (c.batch > 1 && b == 1);
            out.push_back(c.sizes == Sizes::kZeros && hidden ? 0.0f : size);
        }
    }
    if (c.sizes == Sizes::kNone) out.clear();
    return out;
}

// Scores of an image in float64: cosines of the mean keys of its A tokens and its B tokens.
std::vector<std::vector<double>> exact_scores(const Case& c, const Heads& keys, int64_t image,
                                              const std::vector<int64_t>& a,
                                              const std::vector<int64_t>& b) {
    const auto unit = [&](int64_t n) {
        std::vector<double> mean(size_t(c.dim), 0.0);
        double square = 0;
        for (int64_t d = 0; d < c.dim; ++d) {
            for (int64_t h = 0; h < c.heads; ++h) {
                mean[size_t(d)] += keys.memory[keys.offset + image * keys.strides.batch +
                                               h * keys.strides.head + n * keys.strides.token + d];
            }
            square += mean[size_t(d)] * mean[size_t(d)];
        }
        for (double& x : mean) x /= std::sqrt(square);
        return mean;
    };
    std::vector<std::vector<double>> units, scores;
    for (int64_t j : b) units.push_back(unit(j));
    for (int64_t i : a) {
        const std::vector<double> u = unit(i);
        scores.emplace_back();
        for (const std::vector<double>& w : units) {
            double sum = 0;
            for (size_t d = 0; d < u.size(); ++d) sum += u[d] * w[d];
            scores.back().push_back(sum);
        }
    }
    return scores;
}

// Whether an image's choices, where they differ from the CPU's, were between scores that are equal
// up to rounding.
bool is_a_tie(const Case& c, const Heads& keys, int64_t image, const int32_t* got, int64_t r) {
    std::vector<int64_t> a, b;
    for (int64_t n = c.prefix; n < c.tokens; ++n) (n % 2 == 0 ? a : b).push_back(n);
    const auto num_a = static_cast<int64_t>(a.size()), num_b = static_cast<int64_t>(b.size());
    const int64_t first_b_row = c.prefix + num_a - r;
    const double tolerance =
        c.dtype == DType::kFloat64 ? 1e-12 : 2 * (7e-7 + double(c.dim) * 0x1p-24);
    const auto scores = exact_scores(c, keys, image, a, b);
    int64_t row = c.prefix, merged = 0;
    double least_merged = HUGE_VAL, most_kept = -HUGE_VAL;
    for (int64_t n = 0; n < c.prefix; ++n) {
        if (got[n] != n) return false;
    }
    for (int64_t j = 0; j < num_b; ++j) {
        if (got[b[size_t(j)]] != first_b_row + j) return false;
    }
    for (int64_t i = 0; i < num_a; ++i) {
        const std::vector<double>& mine = scores[size_t(i)];
        const double best = *std::max_element(mine.begin(), mine.end());
        const int64_t to = got[a[size_t(i)]];
        if (to < first_b_row) {
            if (to != row++) return false;
            most_kept = std::max(most_kept, best);
            continue;
        }
        if (to >= first_b_row + num_b || mine[size_t(to - first_b_row)] < best - tolerance) {
            return false;
        }
        ++merged;
        least_merged = std::min(least_merged, best);
    }
    return merged == r && least_merged >= most_kept - tolerance;
}

tome::MatchParams match_params(const Case& c, const void* keys, const Heads& t, int32_t* assign,
                               int32_t* members, int32_t* offsets) {
    return {keys,           c.dtype,         c.batch, c.heads,  c.tokens, c.dim,   t.strides.batch,
            t.strides.head, t.strides.token, c.r,     c.prefix, assign,   members, offsets};
}

// The plan that a device wrote: consistent, and the CPU's up to ties.
void judge_match(Verdict& v, const Case& c, const Heads& keys, const Trial& t) {
    const int64_t r = tome::cut_r(c.tokens, c.r, c.prefix), rows = c.tokens - r;
    const Output& assign = t["assign"];
    const Plan own =
        plan_of({assign.ints(), assign.ints() + assign.count}, c.batch, c.tokens, rows);
    Plan want{c.batch,
              c.tokens,
              rows,
              Ints(size_t(c.batch * c.tokens)),
              Ints(size_t(c.batch * c.tokens)),
              Ints(size_t(c.batch * (rows + 1)))};
    Heads copy = keys;
    tome::match(match_params(c, copy.memory.at(copy.offset), keys, want.assign.data(),
                             want.members.data(), want.offsets.data()),
                threads());
    if (own.rows < 0) {
        compare_ints(v, assign, want.assign);
        return v.fail("not a plan", "assign");
    }
    for (int64_t b = 0; b < c.batch; ++b) {
        const int32_t *mine = assign.ints() + b * c.tokens, *its = &want.assign[b * c.tokens];
        if (std::equal(mine, mine + c.tokens, its)) continue;
        if (!is_a_tie(c, keys, b, mine, r)) {
            compare_ints(v, assign, want.assign);
            return v.fail("not the best matches", "assign");
        }
        for (int64_t n = 0; n < c.tokens; ++n) v.ties += mine[n] != its[n];
    }
    compare_ints(v, t["members"], own.members);
    compare_ints(v, t["offsets"], own.offsets);
}

// --- merging
// --------------------------------------------------------------------------------------

// x (batch, tokens, channels), rows a little apart for some layouts.
struct Rows {
    Array memory;
    int64_t stride_batch, stride_row;
};

Rows random_rows(const Case& c, int64_t count, Random& random) {
    const int64_t apart = c.layout == Layout::kOdd ? c.dim + 3 : c.dim;
    return {random_array(c.dtype, c.batch * count * apart, random), count * apart, apart};
}

// One rounding of the result, and those of sums in float32 (float64).
double merge_limit(DType dtype, double want) {
    const double sums = dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
    return roundoff(dtype) * std::fabs(want) * 1.01 + 64 * sums;
}

// `sums`: how many elements of x went into each, at most.
void judge_merge(Verdict& v, const Case& c, const Rows& x, const Floats& size, const Plan& plan,
                 const Trial& t) {
    const Array exact = x.memory.exact();
    Array out(exact.dtype(), c.batch * plan.rows * c.dim);
    Floats out_size(static_cast<size_t>(c.batch * plan.rows));
    tome::merge({exact.data(), exact.dtype(), c.batch, c.tokens, plan.rows, c.dim, x.stride_batch,
                 x.stride_row, size.empty() ? nullptr : size.data(), plan.members.data(),
                 plan.offsets.data(), c.reduce, out.data(), out_size.data()},
                threads());
    const double terms = c.reduce == tome::Reduce::kSum ? 16.0 : 1.0;
    compare(
        v, t["out"], [&](int64_t i) { return out[i]; },
        [&](int64_t i) { return terms * merge_limit(c.dtype, out[i]); });
    compare(
        v, t["out_size"], [&](int64_t i) { return double(out_size[size_t(i)]); },
        [](int64_t) { return 1e-30; });
}

// `out` against the CPU; `normed` against the norm, in float64, of what the device stored in `out`.
void judge_merge_add_norm(Verdict& v, const Case& c, const Rows& x, const Rows& branch,
                          const std::vector<Array>& vectors, const Floats& size, const Plan& plan,
                          const Trial& t) {
    const Array a = x.memory.exact(), b = branch.memory.exact();
    std::vector<Array> exact;
    for (const Array& vector : vectors) exact.push_back(vector.exact());
    Array out(a.dtype(), c.batch * plan.rows * c.dim), normed = out;
    Floats out_size(static_cast<size_t>(c.batch * plan.rows));
    tome::MergeAddNormParams p{};
    p.x = a.data(), p.branch = b.data(), p.dtype = a.dtype();
    p.batch = c.batch, p.tokens = c.tokens, p.rows = plan.rows, p.channels = c.dim;
    p.x_stride_batch = x.stride_batch, p.x_stride_token = x.stride_row;
    p.branch_stride_batch = branch.stride_batch, p.branch_stride_token = branch.stride_row;
    p.scale = exact[0].data(), p.weight = exact[1].data(), p.bias = exact[2].data();
    p.eps = 1e-6, p.size = size.empty() ? nullptr : size.data();
    p.members = plan.members.data(), p.offsets = plan.offsets.data();
    p.out = out.data(), p.normed = normed.data(), p.out_size = out_size.data();
    tome::merge_add_norm(p, threads());
    const Output &got = t["sum"], &got_normed = t["normed"];
    compare(
        v, got, [&](int64_t i) { return out[i]; },
        [&](int64_t i) { return 4 * merge_limit(c.dtype, out[i]); });
    compare(
        v, t["sum_size"], [&](int64_t i) { return double(out_size[size_t(i)]); },
        [](int64_t) { return 1e-30; });
    std::vector<double> want(static_cast<size_t>(got.count)), limit = want;
    const double unit = c.dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
    for (int64_t row = 0; row < c.batch * plan.rows; ++row) {
        double mean = 0, square = 0;
        for (int64_t d = 0; d < c.dim; ++d) mean += got[row * c.dim + d] / double(c.dim);
        for (int64_t d = 0; d < c.dim; ++d) {
            const double from = got[row * c.dim + d] - mean;
            square += from * from / double(c.dim);
        }
        for (int64_t d = 0; d < c.dim; ++d) {
            const auto i = static_cast<size_t>(row * c.dim + d);
            const double scaled = (got[int64_t(i)] - mean) / std::sqrt(square + 1e-6) * exact[1][d];
            want[i] = scaled + exact[2][d];
            limit[i] = roundoff(c.dtype) * std::fabs(want[i]) * 1.01 +
                       unit * (64 + 64 * std::fabs(scaled) + double(c.dim));
        }
    }
    compare(
        v, got_normed, [&](int64_t i) { return want[size_t(i)]; },
        [&](int64_t i) { return limit[size_t(i)]; });
}

tome::MergeAddNormParams merge_add_norm_params(const Case& c, Trial& t, const Rows& x,
                                               const Rows& branch,
                                               const std::vector<Array>& vectors, const float* size,
                                               const int32_t* members, const int32_t* offsets,
                                               int64_t rows) {
    tome::MergeAddNormParams p{};
    p.x = t.put(x.memory), p.branch = t.put(branch.memory), p.dtype = c.dtype;
    p.batch = c.batch, p.tokens = c.tokens, p.rows = rows, p.channels = c.dim;
    p.x_stride_batch = x.stride_batch, p.x_stride_token = x.stride_row;
    p.branch_stride_batch = branch.stride_batch, p.branch_stride_token = branch.stride_row;
    p.scale = t.put(vectors[0]), p.weight = t.put(vectors[1]), p.bias = t.put(vectors[2]);
    p.eps = 1e-6, p.size = size, p.members = members, p.offsets = offsets;
    p.out = t.out("sum", Type::kFloat, c.dtype, c.batch * rows * c.dim);
    p.normed = t.out("normed", Type::kFloat, c.dtype, c.batch * rows * c.dim);
    p.out_size = t.out_floats("sum_size", c.batch * rows);
    return p;
}

void set_up_match(const Case& c, Trial& t, Random& random) {
    auto keys = std::make_shared<Heads>(
        random_heads(c.dtype, c.batch, c.heads, c.tokens, c.dim, c.layout, random));
    const int64_t rows = c.tokens - tome::cut_r(c.tokens, c.r, c.prefix);
    const void* data = t.put(*keys);
    int32_t* assign = t.out_ints("assign", c.batch * c.tokens);
    int32_t* members = t.out_ints("members", c.batch * c.tokens);
    int32_t* offsets = t.out_ints("offsets", c.batch * (rows + 1));
    const tome::MatchParams p = match_params(c, data, *keys, assign, members, offsets);
    t.workspace =
        std::make_unique<Memory>(std::max<size_t>(tome::match_cuda_workspace_bytes(p), 1));
    t.run = [p, &t] { return tome::match_cuda(p, t.workspace->data(), nullptr); };
    t.judge = [&c, &t, keys](Verdict& v) { judge_match(v, c, *keys, t); };
}

void set_up_select(const Case& c, Trial& t, Random& random) {
    auto scores = std::make_shared<Array>(c.dtype, c.batch * c.tokens);
    for (int64_t i = 0; i < scores->count(); ++i) {
        // With `fuse` few different scores, so that there are ties, and a NaN.
        scores->set(i, c.fuse ? double(random.below(7)) - 3.0 : random.normal());
        if (c.fuse && i % 97 == 5) scores->set(i, std::nan(""));
    }
    const int64_t keep = c.tokens - c.prefix - c.r;
    const int64_t rows = tome::select_rows(c.tokens, keep, c.prefix, c.fuse);
    tome::SelectParams p{};
    p.scores = t.put(*scores), p.dtype = c.dtype, p.batch = c.batch, p.tokens = c.tokens;
    p.stride_batch = c.tokens, p.keep = keep, p.num_prefix_tokens = c.prefix, p.fuse = c.fuse;
    p.assign = t.out_ints("assign", c.batch * c.tokens);
    p.members = t.out_ints("members", c.batch * c.tokens);
    p.offsets = t.out_ints("offsets", c.batch * (rows + 1));
    t.run = [p] { return tome::select_cuda(p, nullptr); };
    t.judge = [&c, &t, p, rows, scores](Verdict& v) {
        Ints assign(size_t(c.batch * c.tokens)), members = assign,
                                                 offsets(size_t(c.batch * (rows + 1)));
        tome::SelectParams cpu = p;
        cpu.scores = scores->data(), cpu.assign = assign.data();
        cpu.members = members.data(), cpu.offsets = offsets.data();
        tome::select(cpu, threads());
        compare_ints(v, t["assign"], assign);
        compare_ints(v, t["members"], members);
        compare_ints(v, t["offsets"], offsets);
    };
}

void set_up_plan(const Case& c, Trial& t, Random& random) {
    auto plan = std::make_shared<Plan>(random_plan(c, random));
    const tome::PlanParams p{t.put(plan->assign),
                             c.batch,
                             c.tokens,
                             plan->rows,
                             t.out_ints("members", c.batch * c.tokens),
                             t.out_ints("offsets", c.batch * (plan->rows + 1))};
    t.run = [p] { return tome::plan_cuda(p, nullptr); };
    t.judge = [&t, plan](Verdict& v) {
        compare_ints(v, t["members"], plan->members);
        compare_ints(v, t["offsets"], plan->offsets);
    };
}

void set_up_merge(const Case& c, Trial& t, Random& random) {
    auto plan = std::make_shared<Plan>(random_plan(c, random));
    auto x = std::make_shared<Rows>(random_rows(c, c.tokens, random));
    auto size = std::make_shared<Floats>(random_sizes(c, random));
    const tome::MergeParams p{t.put(x->memory),
                              c.dtype,
                              c.batch,
                              c.tokens,
                              plan->rows,
                              c.dim,
                              x->stride_batch,
                              x->stride_row,
                              size->empty() ? nullptr : t.put(*size),
                              t.put(plan->members),
                              t.put(plan->offsets),
                              c.reduce,
                              t.out("out", Type::kFloat, c.dtype, c.batch * plan->rows * c.dim),
                              t.out_floats("out_size", c.batch * plan->rows)};
    t.run = [p] { return tome::merge_cuda(p, nullptr); };
    t.judge = [&c, &t, plan, x, size](Verdict& v) { judge_merge(v, c, *x, *size, *plan, t); };
}

void set_up_merge_backward(const Case& c, Trial& t, Random& random) {
    auto plan = std::make_shared<Plan>(random_plan(c, random));
    auto grad = std::make_shared<Rows>(random_rows(c, plan->rows, random));
    auto size = std::make_shared<Floats>(random_sizes(c, random));
    const tome::MergeBackwardParams p{
        t.put(grad->memory),
        c.dtype,
        c.batch,
        c.tokens,
        plan->rows,
        c.dim,
        grad->stride_batch,
        grad->stride_row,
        size->empty() ? nullptr : t.put(*size),
        t.put(plan->members),
        t.put(plan->offsets),
        c.reduce,
        t.out("grad_x", Type::kFloat, c.dtype, c.batch * c.tokens * c.dim)};
    t.run = [p] { return tome::merge_backward_cuda(p, nullptr); };
    t.judge = [&c, &t, p, plan, grad, size](Verdict& v) {
        const Array exact = grad->memory.exact();
        Array want(exact.dtype(), c.batch * c.tokens * c.dim);
        tome::MergeBackwardParams cpu = p;
        cpu.grad = exact.data(), cpu.dtype = exact.dtype(), cpu.out = want.data();
        cpu.size = size->empty() ? nullptr : size->data();
        cpu.members = plan->members.data(), cpu.offsets = plan->offsets.data();
        tome::merge_backward(cpu, threads());
        compare(
            v, t["grad_x"], [&](int64_t i) { return want[i]; },
            [&](int64_t i) { return merge_limit(c.dtype, want[i]); });
    };
}

void set_up_unmerge(const Case& c, Trial& t, Random& random) {
    auto plan = std::make_shared<Plan>(random_plan(c, random));
    auto x = std::make_shared<Rows>(random_rows(c, plan->rows, random));
    const tome::UnmergeParams p{t.put(x->memory),
                                c.dtype,
                                c.batch,
                                c.tokens,
                                plan->rows,
                                c.dim,
                                x->stride_batch,
                                x->stride_row,
                                t.put(plan->assign),
                                t.out("out", Type::kFloat, c.dtype, c.batch * c.tokens * c.dim)};
    t.run = [p] { return tome::unmerge_cuda(p, nullptr); };
    t.judge = [&c, &t, p, plan, x](Verdict& v) {
        Array want(c.dtype, c.batch * c.tokens * c.dim);
        tome::UnmergeParams cpu = p;
        cpu.x = x->memory.data(), cpu.assign = plan->assign.data(), cpu.out = want.data();
        tome::unmerge(cpu, threads());
        compare(v, t["out"], [&](int64_t i) { return want[i]; }, [](int64_t) { return 1e-30; });
    };
}

void set_up_merge_add_norm(const Case& c, Trial& t, Random& random) {
    auto plan = std::make_shared<Plan>(random_plan(c, random));
    auto x = std::make_shared<Rows>(random_rows(c, c.tokens, random));
    auto branch = std::make_shared<Rows>(random_rows(c, c.tokens, random));
    auto size = std::make_shared<Floats>(random_sizes(c, random));
    auto vectors = std::make_shared<std::vector<Array>>();
    for (int i = 0; i < 3; ++i) vectors->push_back(random_array(c.dtype, c.dim, random));
    const float* sizes = size->empty() ? nullptr : t.put(*size);
    const int32_t *members = t.put(plan->members), *offsets = t.put(plan->offsets);
    const tome::MergeAddNormParams p =
        merge_add_norm_params(c, t, *x, *branch, *vectors, sizes, members, offsets, plan->rows);
    t.run = [p] { return tome::merge_add_norm_cuda(p, nullptr); };
    t.judge = [&c, &t, plan, x, branch, size, vectors](Verdict& v) {
        judge_merge_add_norm(v, c, *x, *branch, *vectors, *size, *plan, t);
    };
}

// A block's kernels with nothing to wait for between them, where an overlap that lets one begin too
// early would show. Channels of x: heads * dim.
void set_up_chain(const Case& c, Trial& t, Random& random) {
    set_up_match(c, t, random);
    const auto match = t.run;
    const auto judge = t.judge;
    auto flat = std::make_shared<Case>(c);
    flat->dim = c.heads * c.dim, flat->layout = Layout::kHeads;
    const int64_t rows = c.tokens - tome::cut_r(c.tokens, c.r, c.prefix);
    auto x = std::make_shared<Rows>(random_rows(*flat, c.tokens, random));
    auto branch = std::make_shared<Rows>(random_rows(*flat, c.tokens, random));
    auto size = std::make_shared<Floats>(random_sizes(c, random));
    auto vectors = std::make_shared<std::vector<Array>>();
    for (int i = 0; i < 3; ++i) vectors->push_back(random_array(c.dtype, flat->dim, random));
    const float* sizes = t.put(*size);
    auto* assign = reinterpret_cast<int32_t*>(t["assign"].memory->data());
    auto* members = reinterpret_cast<int32_t*>(t["members"].memory->data());
    auto* offsets = reinterpret_cast<int32_t*>(t["offsets"].memory->data());
    void* merged = t.out("out", Type::kFloat, c.dtype, c.batch * rows * flat->dim);
    const tome::MergeParams p{t.put(x->memory),
                              c.dtype,
                              c.batch,
                              c.tokens,
                              rows,
                              flat->dim,
                              x->stride_batch,
                              x->stride_row,
                              sizes,
                              members,
                              offsets,
                              tome::Reduce::kMean,
                              merged,
                              t.out_floats("out_size", c.batch * rows)};
    const tome::MergeAddNormParams q =
        merge_add_norm_params(*flat, t, *x, *branch, *vectors, sizes, members, offsets, rows);
    const tome::UnmergeParams u{
        merged,
        c.dtype,
        c.batch,
        c.tokens,
        rows,
        flat->dim,
        rows * flat->dim,
        flat->dim,
        assign,
        t.out("unmerged", Type::kFloat, c.dtype, c.batch * c.tokens * flat->dim)};
    t.run = [=] {
        cudaError_t error = match();
        if (error == cudaSuccess) error = tome::merge_cuda(p, nullptr);
        if (error == cudaSuccess) error = tome::merge_add_norm_cuda(q, nullptr);
        return error == cudaSuccess ? tome::unmerge_cuda(u, nullptr) : error;
    };
    t.judge = [=, &t](Verdict& v) {
        judge(v);
        const Output &plan_out = t["assign"], &out = t["out"];
        const Plan plan = plan_of({plan_out.ints(), plan_out.ints() + plan_out.count}, flat->batch,
                                  flat->tokens, rows);
        if (plan.rows < 0) return;
        judge_merge(v, *flat, *x, *size, plan, t);
        judge_merge_add_norm(v, *flat, *x, *branch, *vectors, *size, plan, t);
        const auto source = [&](int64_t i) {
            const int64_t n = i / flat->dim, b = n / flat->tokens;
            return out[(b * rows + plan.assign[size_t(n)]) * flat->dim + i % flat->dim];
        };
        compare(v, t["unmerged"], source, [](int64_t) { return 1e-30; });
    };
}

// --- attention
// ------------------------------------------------------------------------------------

struct AttentionData {
    Heads q, k, v;
    Floats size;
    double scale;
};

std::shared_ptr<AttentionData> attention_data(const Case& c, Random& random) {
    const auto heads = [&](int64_t tokens) {
        return random_heads(c.dtype, c.batch, c.heads, tokens, c.dim, c.layout, random);
    };
    Heads q = heads(c.queries), k = heads(c.tokens), v = heads(c.tokens);
    return std::make_shared<AttentionData>(AttentionData{std::move(q), std::move(k), std::move(v),
                                                         random_sizes(c, random),
                                                         1.0 / std::sqrt(double(c.dim))});
}

tome::AttentionInputs attention_inputs(const Case& c, const AttentionData& x, DType dtype,
                                       const void* q, const void* k, const void* v,
                                       const float* size) {
    return {q,        k,     v,           dtype,       c.batch,     c.heads, c.queries,
            c.tokens, c.dim, x.q.strides, x.k.strides, x.v.strides, size,    x.scale};
}

// q, k and v in float32, with what attention makes of them.
struct Reference {
    Array q, k, v, out, lse;
    tome::AttentionInputs inputs;

    Reference(const Case& c, const AttentionData& x)
        : q(x.q.memory.exact()),
          k(x.k.memory.exact()),
          v(x.v.memory.exact()),
          out(DType::kFloat32, c.batch * c.queries * c.heads * c.dim),
          lse(DType::kFloat32, c.batch * c.heads * c.queries),
          inputs(attention_inputs(c, x, DType::kFloat32, q.at(x.q.offset), k.at(x.k.offset),
                                  v.at(x.v.offset), x.size.empty() ? nullptr : x.size.data())) {
        tome::attention({inputs, out.data(), lse.data()}, threads());
    }
};

// Results are rounded once, and the weights before them; the rest is float32.
double row_error(DType dtype) { return 3 * roundoff(dtype) + 1e-5; }

void set_up_attention(const Case& c, Trial& t, Random& random) {
    auto x = attention_data(c, random);
    const void *q = t.put(x->q), *k = t.put(x->k), *values = t.put(x->v);
    const float* size = x->size.empty() ? nullptr : t.put(x->size);
    void* out = t.out("out", Type::kFloat, c.dtype, c.batch * c.queries * c.heads * c.dim);
    void* lse = t.out("lse", Type::kFloat, DType::kFloat32, c.batch * c.heads * c.queries);
    const tome::AttentionParams p{attention_inputs(c, *x, c.dtype, q, k, values, size), out, lse};
    t.run = [p] { return tome::attention_cuda(p, nullptr); };
    t.judge = [&c, &t, x](Verdict& v) {
        const Reference want(c, *x);
        // What rounding every weight may do to a sum of p v is at most its share of the sum of
        // p |v|.
        Array sizes_of_v = want.v, sums = want.out, unused = want.lse;
        for (int64_t i = 0; i < sizes_of_v.count(); ++i) {
            sizes_of_v.set(i, std::fabs(sizes_of_v[i]));
        }
        tome::AttentionInputs inputs = want.inputs;
        inputs.v = sizes_of_v.at(x->v.offset);
        tome::attention({inputs, sums.data(), unused.data()}, threads());
        compare(
            v, t["out"], [&](int64_t i) { return want.out[i]; },
            [&](int64_t i) {
                return 1.01 * roundoff(c.dtype) * (std::fabs(want.out[i]) + sums[i]) +
                       1e-5 * sums[i] + 1e-30;
            });
        compare_rows(v, t["out"], want.out, c.dim, row_error(c.dtype), 1e-30);
        compare(
            v, t["lse"], [&](int64_t i) { return want.lse[i]; },
            [&](int64_t i) { return 4e-6 * (1 + std::fabs(want.lse[i])); });
    };
}

void set_up_attention_backward(const Case& c, Trial& t, Random& random) {
    auto x = attention_data(c, random);
    auto grad = std::make_shared<Heads>(
        random_heads(c.dtype, c.batch, c.heads, c.queries, c.dim, Layout::kHeads, random));
    auto want = std::make_shared<Reference>(c, *x);
    auto out = std::make_shared<Array>(c.dtype, want->out.count());  // as a forward rounds it
    for (int64_t i = 0; i < out->count(); ++i) out->set(i, want->out[i]);
    tome::AttentionBackwardParams p{};
    const void *q = t.put(x->q), *k = t.put(x->k), *values = t.put(x->v);
    const float* size = x->size.empty() ? nullptr : t.put(x->size);
    static_cast<tome::AttentionInputs&>(p) = attention_inputs(c, *x, c.dtype, q, k, values, size);
    p.grad = t.put(*grad), p.grad_strides = grad->strides;
    p.out = t.put(*out), p.lse = t.put(want->lse);
    const int64_t row = c.heads * c.dim;
    p.grad_q = t.out("grad_q", Type::kFloat, c.dtype, c.batch * c.queries * row);
    p.grad_k = t.out("grad_k", Type::kFloat, c.dtype, c.batch * c.tokens * row);
    p.grad_v = t.out("grad_v", Type::kFloat, c.dtype, c.batch * c.tokens * row);
    t.workspace = std::make_unique<Memory>(
        std::max<size_t>(tome::attention_backward_cuda_workspace_bytes(p), 1));
    t.run = [p, &t] { return tome::attention_backward_cuda(p, t.workspace->data(), nullptr); };
    t.judge = [&c, &t, x, grad, want, out, row](Verdict& v) {
        Array g = grad->memory.exact(), rounded = out->exact();
        Array grad_q(DType::kFloat32, c.batch * c.queries * row);
        Array grad_k(DType::kFloat32, c.batch * c.tokens * row), grad_v = grad_k;
        tome::AttentionBackwardParams cpu{};
        static_cast<tome::AttentionInputs&>(cpu) = want->inputs;
        cpu.grad = g.at(grad->offset), cpu.grad_strides = grad->strides;
        cpu.out = rounded.data(), cpu.lse = want->lse.data();
        cpu.grad_q = grad_q.data(), cpu.grad_k = grad_k.data(), cpu.grad_v = grad_v.data();
        tome::attention_backward(cpu, threads());
        // The floor is what float32 leaves where terms cancel.
        const double floor = 1e-5, relative = row_error(c.dtype) + roundoff(c.dtype);
        compare_rows(v, t["grad_q"], grad_q, c.dim, relative, floor);
        compare_rows(v, t["grad_k"], grad_k, c.dim, relative, floor);
        compare_rows(v, t["grad_v"], grad_v, c.dim, relative, floor);
    };
}

void set_up_cls_attention(const Case& c, Trial& t, Random& random) {
    auto x = attention_data(c, random);
    tome::ClsAttentionParams p{};
    p.q = t.put(x->q), p.k = t.put(x->k), p.dtype = c.dtype;
    p.batch = c.batch, p.heads = c.heads, p.keys = c.tokens, p.dim = c.dim;
    p.q_stride_batch = x->q.strides.batch, p.q_stride_head = x->q.strides.head;
    p.k_strides = x->k.strides, p.size = x->size.empty() ? nullptr : t.put(x->size);
    p.scale = x->scale;
    p.out = t.out("out", Type::kFloat, DType::kFloat32, c.batch * c.tokens);
    t.run = [p] { return tome::cls_attention_cuda(p, nullptr); };
    t.judge = [&c, &t, p, x](Verdict& v) {
        Array q = x->q.memory.exact(), k = x->k.memory.exact();
        Array want(DType::kFloat32, c.batch * c.tokens);
        tome::ClsAttentionParams cpu = p;
        cpu.q = q.at(x->q.offset), cpu.k = k.at(x->k.offset), cpu.dtype = DType::kFloat32;
        cpu.size = x->size.empty() ? nullptr : x->size.data(), cpu.out = want.data();
        tome::cls_attention(cpu, threads());
        compare(
            v, t["out"], [&](int64_t i) { return want[i]; },
            [&](int64_t i) { return 2e-5 * std::fabs(want[i]) + 1e-12; });
    };
}

void set_up(const Case& c, Trial& t) {
    uint64_t seed = 1;
    for (char letter : name_of(c)) seed = seed * 131 + static_cast<unsigned char>(letter);
    Random random(seed);
    switch (c.op) {
        case Op::kMatch:
            return set_up_match(c, t, random);
        case Op::kSelect:
            return set_up_select(c, t, random);
        case Op::kPlan:
            return set_up_plan(c, t, random);
        case Op::kMerge:
            return set_up_merge(c, t, random);
        case Op::kMergeBackward:
            return set_up_merge_backward(c, t, random);
        case Op::kMergeAddNorm:
            return set_up_merge_add_norm(c, t, random);
        case Op::kUnmerge:
            return set_up_unmerge(c, t, random);
        case Op::kChain:
            return set_up_chain(c, t, random);
        case Op::kAttention:
            return set_up_attention(c, t, random);
        case Op::kAttentionBackward:
            return set_up_attention_backward(c, t, random);
        case Op::kClsAttention:
            return set_up_cls_attention(c, t, random);
    }
}

// --- running
// --------------------------------------------------------------------------------------

// Faults put into the first output after a run, to show that they are found.
enum class Spoil { kNothing, kValue, kUnwritten, kGuard, kRepeat };

constexpr unsigned char pattern(int run) { return run % 2 == 0 ? 0xa5 : 0x5a; }

void look(Verdict& v, Output& x, int run, Spoil spoil) {
    std::vector<unsigned char> now = x.memory->content();
    const size_t guard = Memory::kGuard, bytes = x.memory->bytes();
    const auto element = static_cast<size_t>(x.element());
    if (bytes > 0) {
        const size_t at = guard + bytes / element / 2 * element;  // the middle one
        if (spoil == Spoil::kUnwritten) std::memset(&now[at], pattern(run), element);
        if (spoil == Spoil::kGuard) now[guard + bytes] ^= 1;
        if (spoil == Spoil::kRepeat && run == 1) now[at] ^= 1;
        // A bit that is worth an eighth of a value of any dtype.
        if (spoil == Spoil::kValue) {
            const bool low = x.type == Type::kInt32;
            now[at + (low ? 0 : element - 1)] ^= low ? 1 : 0x40;
        }
    }
    for (size_t i = 0; i < guard; ++i) {
        if (now[i] != pattern(run)) v.fail("wrote in front of the output", x.name);
        if (now[guard + bytes + i] != pattern(run)) v.fail("wrote behind the output", x.name);
    }
    now.erase(now.begin(), now.begin() + guard);
    now.resize(bytes);
    if (run == 0) {
        x.bytes = std::move(now);
        return;
    }
    if (now == x.bytes) return;
    int64_t differ = 0, unwritten = 0, where = -1;
    for (size_t i = 0; i < bytes; i += element) {
        if (std::equal(&now[i], &now[i] + element, &x.bytes[i])) continue;
        if (where < 0) where = static_cast<int64_t>(i / element);
        ++differ;
        unwritten += std::all_of(&now[i], &now[i] + element,
                                 [&](unsigned char byte) { return byte == pattern(run); });
    }
    if (v.ok) v.index = where, v.wrong = differ, v.of = x.count;
    v.fail(unwritten == differ ? "not written" : "other bits in run " + std::to_string(run + 1),
           x.name);
}

Verdict run_case(const Case& c, int repeats, Spoil spoil = Spoil::kNothing) {
    Verdict v;
    Trial t;
    t.outputs.reserve(16);
    set_up(c, t);
    for (int run = 0; run < repeats && v.ok; ++run) {
        choose_order(run);
        for (const Output& x : t.outputs) x.memory->poison(pattern(run));
        if (t.workspace) t.workspace->poison(pattern(run));
        check(t.run(), "launch");
        check(device_wait(), "cudaDeviceSynchronize");
        for (size_t i = 0; i < t.outputs.size(); ++i) {
            look(v, t.outputs[i], run, i == 0 ? spoil : Spoil::kNothing);
        }
        // What was not written is not judged: the second run tells.
        if (run == 1 && v.ok) t.judge(v);
    }
    return v;
}

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (char letter : text) {
        if (letter == '"' || letter == '\\') out += '\\';
        out += static_cast<unsigned char>(letter) < 32 ? ' ' : letter;
    }
    return out + "\"";
}

void print(const Case& c, int repeats, const Verdict& v, const std::string& error) {
    std::string line = "{\"case\": " + quoted(name_of(c)) +
                       ", \"op\": " + quoted(kOpNames[int(c.op)]) +
                       ", \"ok\": " + (v.ok && error.empty() ? "true" : "false") +
                       ", \"repeats\": " + std::to_string(repeats);
    if (error.empty()) {
        line += ", \"worst\": " + number_text(v.worst) + ", \"error\": " + number_text(v.error);
    } else {
        line += ", \"cuda_error\": " + quoted(error);
    }
    if (v.ties > 0) line += ", \"ties\": " + std::to_string(v.ties);
    if (!v.ok) {
        line += ", \"why\": " + quoted(v.why) + ", \"output\": " + quoted(v.output) +
                ", \"index\": " + std::to_string(v.index) +
                ", \"wrong\": " + std::to_string(v.wrong) + ", \"of\": " + std::to_string(v.of);
        line += ", \"first\": [";
        for (size_t i = 0; i < v.first.size(); ++i) line += (i ? ", " : "") + v.first[i];
        line += "]";
    }
    std::printf("%s}\n", line.c_str());
    std::fflush(stdout);
}

// --- the list
// -------------------------------------------------------------------------------------

constexpr DType kF32 = DType::kFloat32, kF16 = DType::kFloat16, kBF16 = DType::kBFloat16,
                kF64 = DType::kFloat64;

std::vector<Case> match_cases() {
    std::vector<Case> all;
    const auto add = [&](DType dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t dim,
                         int64_t r, int64_t prefix, Layout layout, unsigned sets = kAll) {
        Case c;
        c.op = Op::kMatch, c.dtype = dtype, c.batch = batch, c.heads = heads, c.tokens = tokens;
        c.dim = dim, c.r = r, c.prefix = prefix, c.layout = layout, c.sets = sets;
        all.push_back(c);
    };
    for (DType dtype : {kBF16, kF32, kF16, kF64}) {
        const unsigned watched = dtype == kBF16 || dtype == kF64 ? kSanitizer : 0u;
        for (int64_t n = 2; n <= 17; ++n) {  // as many as can be, and a few
            const bool some = n == 2 || n == 7 || n == 16;
            add(dtype, 2, 3, n, 64, n, n % 3, Layout::kPacked,
                kAll | (some && dtype != kF16 ? kEmulator | watched : 0u));
            add(dtype, 3, 1, n, 40, n / 3, 1, Layout::kOdd);
        }
        add(dtype, 3, 5, 50, 80, 24, 2, Layout::kPacked, kAll | kEmulator | watched);
        add(dtype, 2, 2, 31, 37, 7, 0, Layout::kOdd, kAll | kEmulator);
        add(dtype, 4, 12, 197, 64, 13, 1, Layout::kPacked,
            kAll | watched | (dtype == kBF16 ? kRepeats : 0u));
        add(dtype, 1, 12, 197, 64, 13, 1, Layout::kPacked, kAll | (dtype == kBF16 ? kRepeats : 0u));
        add(dtype, 1, 12, 197, 64, 98, 1, Layout::kHeads);
        add(dtype, 2, 16, 577, 64, 23, 1, Layout::kPacked, kAll | (dtype == kBF16 ? kRepeats : 0u));
        add(dtype, 1, 4, 1025, 128, 300, 5, Layout::kPacked);
        add(dtype, 1, 1, 4096, 320, 2048, 0, Layout::kHeads,
            kAll | (dtype == kBF16 ? kRepeats : 0u));
    }
    add(kBF16, 150, 12, 197, 64, 13, 1, Layout::kPacked);  // more images than multiprocessors
    return all;
}

std::vector<Case> plan_cases() {
    std::vector<Case> all;
    struct Shape {
        int64_t batch, tokens, r, prefix;
    };
    for (const Shape& s : {Shape{2, 1, 0, 0}, Shape{3, 17, 8, 1}, Shape{4, 197, 60, 1},
                           Shape{2, 577, 500, 1}, Shape{1, 4096, 1000, 5}}) {
        Case c;
        c.batch = s.batch, c.tokens = s.tokens, c.r = s.r, c.prefix = s.prefix;
        c.sets = kAll | (s.tokens == 197 ? kSanitizer : 0u) | (s.tokens < 500 ? kEmulator : 0u);
        for (DType dtype : {kF32, kF64}) {
            for (bool fuse : {false, true}) {
                c.op = Op::kSelect, c.dtype = dtype, c.fuse = fuse;
                all.push_back(c);
            }
        }
        c.op = Op::kPlan, c.dtype = kF32, c.fuse = false;
        all.push_back(c);
    }
    return all;
}

std::vector<Case> merge_cases() {
    std::vector<Case> all;
    struct Shape {
        int64_t batch, tokens, channels, r;
        Layout layout;
        unsigned sets;
    };
    const Shape shapes[] = {
        {4, 197, 768, 13, Layout::kHeads, kAll | kSanitizer},
        {2, 577, 1024, 23, Layout::kHeads, kAll},
        {1, 197, 768, 13, Layout::kHeads, kAll},
        {3, 50, 37, 24, Layout::kOdd, kAll | kSanitizer | kEmulator},
        {2, 31, 40, 7, Layout::kHeads, kAll | kEmulator},
        {2, 33, 72, 30, Layout::kOdd, kAll},
        {1, 130, 1280, 64, Layout::kHeads, kAll},
        {1, 4096, 320, 2048, Layout::kHeads, kAll},
        {1, 17, 2500, 5, Layout::kHeads, kAll},  // more channels than most blocks have lanes
    };
    for (DType dtype : {kBF16, kF32, kF16, kF64}) {
        for (const Shape& s : shapes) {
            Case c;
            c.dtype = dtype, c.batch = s.batch, c.tokens = s.tokens, c.dim = s.channels;
            c.r = s.r, c.layout = s.layout;
            for (Op op : {Op::kMerge, Op::kMergeBackward, Op::kMergeAddNorm, Op::kUnmerge}) {
                c.op = op, c.reduce = tome::Reduce::kMean;
                c.sets = dtype == kBF16 || dtype == kF32 ? s.sets : s.sets & ~kSanitizer;
                if (op == Op::kMerge && s.tokens == 197 && dtype == kBF16) c.sets |= kRepeats;
                all.push_back(c);
                if (op == Op::kUnmerge) continue;
                if (s.tokens == 50 || s.tokens == 197) {
                    c.sets = kAll;
                    c.sizes = Sizes::kNone;
                    all.push_back(c);
                    c.sizes = Sizes::kSome;
                    if (op == Op::kMergeAddNorm) continue;
                    c.reduce = tome::Reduce::kSum;
                    all.push_back(c);
                    if (op == Op::kMergeBackward) continue;
                    c.reduce = tome::Reduce::kAmax;
                    all.push_back(c);
                }
            }
        }
        for (int64_t batch : {1, 8}) {
            Case c;
            c.op = Op::kChain, c.dtype = dtype, c.batch = batch, c.heads = 12, c.tokens = 197;
            c.dim = 64, c.r = 13, c.prefix = 1;
            c.sets = kAll | (dtype == kBF16 ? kRepeats : 0u) | (batch == 1 ? kSanitizer : 0u);
            if (batch == 1 || dtype == kBF16) all.push_back(c);
        }
        Case c;
        c.op = Op::kChain, c.dtype = dtype, c.batch = 2, c.heads = 2, c.tokens = 33, c.dim = 20;
        c.r = 9, c.prefix = 1, c.sets = kAll | kEmulator;
        all.push_back(c);
    }
    return all;
}

std::vector<Case> attention_cases() {
    std::vector<Case> all;
    const auto add = [&](DType dtype, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
                         int64_t dim, Layout layout, Sizes sizes, unsigned sets = kAll) {
        Case c;
        c.dtype = dtype, c.batch = batch, c.heads = heads, c.queries = queries, c.tokens = keys;
        c.dim = dim, c.layout = layout, c.sizes = sizes, c.sets = sets;
        for (Op op : {Op::kAttention, Op::kAttentionBackward}) {
            c.op = op;
            all.push_back(c);
        }
    };
    for (DType dtype : {kBF16, kF16, kF32}) {
        const unsigned watched = dtype == kF16 ? 0u : kSanitizer;
        const unsigned repeated = dtype == kBF16 ? kRepeats : 0u;
        for (int64_t n : {1, 5, 16, 49, 50, 64, 65, 80, 128, 150, 197, 208, 256, 257, 577, 1025}) {
            const bool small = n == 5 || n == 50 || n == 65;
            add(dtype, 2, 3, n, n, 64, Layout::kPacked, Sizes::kSome,
                kAll | (small ? kEmulator : 0u) | (n == 50 || n == 197 || n == 257 ? watched : 0u) |
                    (n == 197 || n == 577 ? repeated : 0));
        }
        for (int64_t n : {50, 197, 577}) {
            add(dtype, 3, 2, n, n, 64, Layout::kPacked, Sizes::kZeros,
                kAll | (n == 50 ? kEmulator | watched : 0u));
            add(dtype, 2, 2, n, n, 64, Layout::kPacked, Sizes::kNone);
            add(dtype, 2, 2, n, n, 64, Layout::kHeads, Sizes::kSome);
            add(dtype, 1, 2, n, n, 64, Layout::kOdd, Sizes::kSome);
        }
        struct Pair {
            int64_t queries, keys;
        };
        for (const Pair& s : {Pair{1, 197}, Pair{5, 64}, Pair{197, 5}, Pair{50, 257}, Pair{577, 80},
                              Pair{128, 577}, Pair{33, 208}, Pair{300, 197}}) {
            add(dtype, 2, 2, s.queries, s.keys, 64, Layout::kPacked, Sizes::kSome,
                kAll | (s.queries == 5 ? kEmulator : 0u));
        }
        for (int64_t dim : {32, 72, 80, 128, 17, 48, 96}) {
            for (int64_t n : {1, 50, 197, 257}) {
                add(dtype, 2, 2, n, n, dim, Layout::kPacked, Sizes::kSome,
                    kAll | (n == 50 && (dim == 72 || dim == 128) ? watched : 0u) |
                        (n == 50 && dim == 72 && dtype == kBF16 ? kEmulator : 0u));
            }
        }
        add(dtype, 16, 12, 197, 197, 64, Layout::kPacked, Sizes::kSome);
        add(dtype, 2, 2, 128, 577, 80, Layout::kHeads, Sizes::kZeros);
        for (int64_t n : {1, 5, 50, 197, 577, 1025, 4096}) {
            Case c;
            c.op = Op::kClsAttention, c.dtype = dtype, c.batch = 2, c.heads = n == 4096 ? 16 : 3;
            c.queries = 1, c.tokens = n, c.dim = n == 50 ? 80 : 64;
            c.sizes = n == 577 ? Sizes::kZeros : n == 1025 ? Sizes::kNone : Sizes::kSome;
            c.sets = kAll | (n == 50 ? kEmulator | watched : 0u) | (n == 197 ? repeated : 0);
            all.push_back(c);
        }
    }
    return all;
}

// The most useful first: the time for all may run out.
std::vector<Case> every_case() {
    std::vector<Case> all;
    for (auto* make : {attention_cases, match_cases, merge_cases, plan_cases}) {
        const std::vector<Case> some = make();
        all.insert(all.end(), some.begin(), some.end());
    }
    std::stable_partition(all.begin(), all.end(),
                          [](const Case& c) { return c.dtype == DType::kBFloat16; });
    return all;
}

int self_test() {
    int bad = 0;
    std::vector<bool> seen(std::size(kOpNames));
    for (const Case& c : every_case()) {
        const bool reference = c.dtype == kF32 || c.op == Op::kSelect || c.op == Op::kPlan;
        if (seen[size_t(c.op)] || !reference || !(c.sets & kEmulator) || c.tokens < 5) continue;
        seen[size_t(c.op)] = true;
        for (Spoil spoil :
             {Spoil::kNothing, Spoil::kValue, Spoil::kUnwritten, Spoil::kGuard, Spoil::kRepeat}) {
            const Verdict v = run_case(c, 3, spoil);
            const bool right = v.ok == (spoil == Spoil::kNothing);
            std::printf("%s spoiled in way %d: %s %s\n", name_of(c).c_str(), int(spoil),
                        v.ok ? "ok" : v.why.c_str(), right ? "" : "  WRONG");
            bad += !right;
        }
    }
    for (size_t i = 0; i < seen.size(); ++i) {
        if (!seen[i]) std::printf("no case for %s\n", kOpNames[i]), ++bad;
    }
    return bad == 0 ? 0 : 1;
}

[[noreturn]] void usage(const char* what) {
    std::fprintf(stderr,
                 "gpu_check: %s\nusage: gpu_check [--list] [--set all|sanitizer|repeats|emulator] "
                 "[--repeats N] [--case NAME]... | --self-test\n",
                 what);
    std::exit(2);
}

}  // namespace

int main(int count, char** arguments) {
    unsigned set = kEmulated ? kEmulator : kAll;
    int repeats = 3;
    bool list = false;
    std::vector<std::string> names;
    for (int i = 1; i < count; ++i) {
        const std::string option = arguments[i];
        const auto value = [&]() -> std::string {
            if (i + 1 >= count) usage((option + " needs a value").c_str());
            return arguments[++i];
        };
        if (option == "--list") {
            list = true;
        } else if (option == "--self-test") {
            return self_test();
        } else if (option == "--case") {
            names.push_back(value());
        } else if (option == "--repeats") {
            repeats = std::max(2, std::atoi(value().c_str()));
        } else if (option == "--set") {
            const std::string name = value();
            set = name == "all"         ? kAll
                  : name == "sanitizer" ? kSanitizer
                  : name == "repeats"   ? kRepeats
                  : name == "emulator"  ? kEmulator
                                        : 0u;
            if (set == 0) usage(("no such set: " + name).c_str());
        } else {
            usage(("unknown option: " + option).c_str());
        }
    }
    std::vector<Case> chosen;
    for (const Case& c : every_case()) {
        const bool named = std::find(names.begin(), names.end(), name_of(c)) != names.end();
        if (names.empty() ? (c.sets & set) != 0 : named) chosen.push_back(c);
    }
    if (chosen.size() < names.size()) usage("no case has one of these names; see --list");
    if (list) {
        for (const Case& c : chosen) std::printf("%s\n", name_of(c).c_str());
        return 0;
    }
    bool good = true;
    for (const Case& c : chosen) {
        Verdict v;
        try {
            v = run_case(c, repeats);
            print(c, repeats, v, "");
        } catch (const CudaError& e) {
            print(c, repeats, v, std::string(e.where) + ": " + error_text(e.error));
            // Not through static destructors: they would wait for a context that is lost.
            std::_Exit(70);
        }
        good &= v.ok;
    }
    return good ? 0 : 1;
}

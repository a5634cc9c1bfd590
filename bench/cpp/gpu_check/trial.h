// A case on the device: its inputs and outputs, and how results are compared.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cases.h"
#include "device.h"
#include "tome_core/thread_pool.h"

namespace gpu_check {

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

inline std::string number_text(double x) {
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
        inputs.back()->poison(0xff);  // around it: NaN of every dtype, -1
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
    void* work(size_t bytes) {
        workspace = std::make_unique<Memory>(std::max<size_t>(bytes, 1));
        return workspace->data();
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

inline tome::Threads threads() {
    static tome::ThreadPool pool(std::min(4, int(std::thread::hardware_concurrency())));
    return pool.threads();
}

// Every element of `got` as near to `want` as `limit` says.
inline void compare(Verdict& v, const Output& got, const std::function<double(int64_t)>& want,
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

inline void compare_ints(Verdict& v, const Output& got, const Ints& want) {
    compare(
        v, got, [&](int64_t i) { return double(want[size_t(i)]); }, [](int64_t) { return 0.5; });
}

// Besides, the error of each row of `width` elements in the mean over them. A single element may be
// off by the roundings of all its terms; over a row these cancel, and a key left out does not.
inline void compare_rows(Verdict& v, const Output& got, const Array& want, int64_t width,
                         double relative, double floor) {
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

}  // namespace gpu_check

// tome_core on numpy arrays, for tests that look inside. Built by CMake only: it is tied to one
// Python version, so it is never part of the wheel. bfloat16 arrays travel as uint16.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "tome_core/thread_pool.h"
#include "tome_core/tome_core.h"
#include "tuning.h"

namespace py = pybind11;

namespace {

using tome::DType;
using tome::Isa;
using tome::Status;
using Ints = py::array_t<int32_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

[[noreturn]] void fail(const std::string& message) { throw py::value_error(message); }

DType dtype_of(const py::array& x) {
    switch (x.dtype().char_()) {
        case 'f':
            return DType::kFloat32;
        case 'd':
            return DType::kFloat64;
        case 'e':
            return DType::kFloat16;
        case 'H':
            return DType::kBFloat16;
    }
    fail("expected float32, float64, float16 or uint16 (bfloat16), got " +
         py::str(x.dtype()).cast<std::string>());
}

void check_rank(const py::array& x, const char* name, int64_t low, int64_t high) {
    if (x.ndim() < low || x.ndim() > high) {
        fail(std::string(name) + ": expected rank " + std::to_string(low) + ", got " +
             std::to_string(x.ndim()));
    }
}

void check_shape(const py::array& x, const char* name, const std::vector<int64_t>& shape) {
    if (std::vector<int64_t>(x.shape(), x.shape() + x.ndim()) != shape) {
        fail(std::string(name) + ": expected shape " +
             py::str(py::cast(shape)).cast<std::string>() + ", got " +
             py::str(x.attr("shape")).cast<std::string>());
    }
}

// In elements. The last dimension must be contiguous.
int64_t stride(const py::array& x, int64_t dim) {
    const int64_t last = x.ndim() - 1;
    if (x.shape(last) > 1 && x.strides(last) != x.itemsize()) {
        fail("expected a contiguous last dimension");
    }
    return x.strides(dim) / x.itemsize();
}

tome::Reduce parse_reduce(const std::string& name) {
    if (name == "mean") return tome::Reduce::kMean;
    if (name == "sum") return tome::Reduce::kSum;
    if (name == "amax") return tome::Reduce::kAmax;
    fail("reduce: expected mean, sum or amax, got " + name);
}

Isa parse_isa(const std::string& name) {
    for (Isa isa : tome::kIsas) {
        if (name == tome::isa_name(isa)) return isa;
    }
    fail("isa: expected portable, avx2, avx512, avx512_bf16 or amx_bf16, got " + name);
}

void check_status(const Status& status) {
    static const char* const kNames[] = {"ok",
                                         "assign out of range",
                                         "member out of range",
                                         "member repeated",
                                         "offsets not ordered",
                                         "targets not ordered"};
    if (status) return;
    fail(std::string(kNames[status.code]) + ": image " + std::to_string(status.batch) + ", index " +
         std::to_string(status.index) + ", value " + std::to_string(status.value));
}

const float* data_or_null(const std::optional<Floats>& size, const char* name, int64_t batch,
                          int64_t tokens) {
    if (!size) return nullptr;
    check_shape(*size, name, {batch, tokens});
    return size->data();
}

py::tuple match(const py::array& metric, int64_t r, int64_t num_prefix_tokens,
                const std::optional<Floats>& weight, const std::optional<Ints>& targets,
                const std::optional<Floats>& size, const std::optional<Floats>& importance,
                const std::optional<double>& threshold, int threads) {
    check_rank(metric, "metric", 3, 4);
    const int64_t n = metric.ndim() - 2;
    tome::MatchParams p{};
    p.metric = metric.data();
    p.dtype = dtype_of(metric);
    p.batch = metric.shape(0);
    p.heads = n == 2 ? metric.shape(1) : 1;
    p.tokens = metric.shape(n);
    p.dim = metric.shape(n + 1);
    p.stride_batch = stride(metric, 0);
    p.stride_head = n == 2 ? stride(metric, 1) : 0;
    p.stride_token = stride(metric, n);
    p.r = r;
    p.num_prefix_tokens = num_prefix_tokens;
    p.weight = data_or_null(weight, "weight", p.batch, p.tokens);
    p.size = data_or_null(size, "size", p.batch, p.tokens);
    p.importance = data_or_null(importance, "importance", p.batch, p.tokens);
    if (threshold) p.threshold = *threshold;
    if (targets) {
        check_rank(*targets, "targets", 1, 1);
        p.targets = targets->data();
        p.num_targets = targets->shape(0);
    }
    const int64_t rows = p.tokens - tome::cut_r(p);
    Ints assign({p.batch, p.tokens}), members({p.batch, p.tokens}), offsets({p.batch, rows + 1});
    p.assign = assign.mutable_data();
    p.members = members.mutable_data();
    p.offsets = offsets.mutable_data();
    tome::ThreadPool pool(threads);
    check_status(tome::match(p, pool.threads()));
    return py::make_tuple(assign, members, offsets);
}

py::tuple plan(const Ints& assign, int64_t rows, int threads) {
    check_rank(assign, "assign", 2, 2);
    const int64_t batch = assign.shape(0), tokens = assign.shape(1);
    Ints members({batch, tokens}), offsets({batch, rows + 1});
    tome::ThreadPool pool(threads);
    check_status(tome::plan(
        {assign.data(), batch, tokens, rows, members.mutable_data(), offsets.mutable_data()},
        pool.threads()));
    return py::make_tuple(members, offsets);
}

py::tuple merge(const py::array& x, const Ints& members, const Ints& offsets,
                const std::optional<Floats>& size, const std::string& reduce, int threads) {
    check_rank(x, "x", 3, 3);
    check_rank(offsets, "offsets", 2, 2);
    tome::MergeParams p{};
    p.x = x.data();
    p.dtype = dtype_of(x);
    p.batch = x.shape(0);
    p.tokens = x.shape(1);
    p.rows = offsets.shape(1) - 1;
    p.channels = x.shape(2);
    p.stride_batch = stride(x, 0);
    p.stride_token = stride(x, 1);
    check_shape(members, "members", {p.batch, p.tokens});
    check_shape(offsets, "offsets", {p.batch, p.rows + 1});
    p.size = data_or_null(size, "size", p.batch, p.tokens);
    p.members = members.data();
    p.offsets = offsets.data();
    p.reduce = parse_reduce(reduce);
    py::array out(x.dtype(), std::vector<py::ssize_t>{p.batch, p.rows, p.channels});
    Floats out_size({p.batch, p.rows});
    p.out = out.mutable_data();
    p.out_size = out_size.mutable_data();
    tome::ThreadPool pool(threads);
    check_status(tome::merge(p, pool.threads()));
    return py::make_tuple(out, out_size);
}

py::array merge_backward(const py::array& grad, const Ints& members, const Ints& offsets,
                         const std::optional<Floats>& size, const std::string& reduce,
                         int threads) {
    check_rank(grad, "grad", 3, 3);
    check_rank(members, "members", 2, 2);
    tome::MergeBackwardParams p{};
    p.grad = grad.data();
    p.dtype = dtype_of(grad);
    p.batch = grad.shape(0);
    p.tokens = members.shape(1);
    p.rows = grad.shape(1);
    p.channels = grad.shape(2);
    p.stride_batch = stride(grad, 0);
    p.stride_row = stride(grad, 1);
    check_shape(members, "members", {p.batch, p.tokens});
    check_shape(offsets, "offsets", {p.batch, p.rows + 1});
    p.size = data_or_null(size, "size", p.batch, p.tokens);
    p.members = members.data();
    p.offsets = offsets.data();
    p.reduce = parse_reduce(reduce);
    if (p.reduce == tome::Reduce::kAmax) fail("reduce: expected mean or sum, got amax");
    py::array out(grad.dtype(), std::vector<py::ssize_t>{p.batch, p.tokens, p.channels});
    p.out = out.mutable_data();
    tome::ThreadPool pool(threads);
    check_status(tome::merge_backward(p, pool.threads()));
    return out;
}

py::array unmerge(const py::array& x, const Ints& assign, int threads) {
    check_rank(x, "x", 3, 3);
    check_rank(assign, "assign", 2, 2);
    tome::UnmergeParams p{};
    p.x = x.data();
    p.dtype = dtype_of(x);
    p.batch = x.shape(0);
    p.tokens = assign.shape(1);
    p.rows = x.shape(1);
    p.channels = x.shape(2);
    p.stride_batch = stride(x, 0);
    p.stride_row = stride(x, 1);
    check_shape(assign, "assign", {p.batch, p.tokens});
    p.assign = assign.data();
    py::array out(x.dtype(), std::vector<py::ssize_t>{p.batch, p.tokens, p.channels});
    p.out = out.mutable_data();
    tome::ThreadPool pool(threads);
    check_status(tome::unmerge(p, pool.threads()));
    return out;
}

}  // namespace

PYBIND11_MODULE(_tome_core, m) {
    m.doc() = "tome_core on numpy arrays, and what it decides inside. For tests.";

    m.def("best_isa", [] { return tome::isa_name(tome::best_isa()); });
    m.def("active_isa", [] { return tome::isa_name(tome::active_isa()); });
    m.def(
        "set_isa",
        [](const std::string& name) {
            if (!tome::set_isa(parse_isa(name))) fail("isa: this machine lacks " + name);
        },
        py::arg("name"));

    m.def("cut_r", py::overload_cast<int64_t, int64_t, int64_t>(&tome::cut_r), py::arg("tokens"),
          py::arg("r"), py::arg("num_prefix_tokens"));
    m.def("match", &match, py::arg("metric"), py::arg("r"), py::arg("num_prefix_tokens") = 0,
          py::arg("weight") = py::none(), py::arg("targets") = py::none(),
          py::arg("size") = py::none(), py::arg("importance") = py::none(),
          py::arg("threshold") = py::none(), py::arg("threads") = 1);
    m.def("plan", &plan, py::arg("assign"), py::arg("rows"), py::arg("threads") = 1);
    m.def("merge", &merge, py::arg("x"), py::arg("members"), py::arg("offsets"),
          py::arg("size") = py::none(), py::arg("reduce") = "mean", py::arg("threads") = 1);
    m.def("merge_backward", &merge_backward, py::arg("grad"), py::arg("members"),
          py::arg("offsets"), py::arg("size") = py::none(), py::arg("reduce") = "mean",
          py::arg("threads") = 1);
    m.def("unmerge", &unmerge, py::arg("x"), py::arg("assign"), py::arg("threads") = 1);

    // Sizes at which a path switches; see tuning.h.
    m.attr("BYTES_PER_TASK") = tome::tuning::kBytesPerTask;
    m.attr("PACKED_BYTES") = tome::tuning::kPackedBytes;
    m.def("rows_per_task", &tome::tuning::rows_per_task, py::arg("row_bytes"));
    m.def("columns_per_chunk", &tome::tuning::columns_per_chunk, py::arg("dim"),
          py::arg("element_bytes"), py::arg("panel"));
    m.def("split_image", &tome::tuning::split_image, py::arg("batch"), py::arg("threads"),
          py::arg("multiply_adds"));
}

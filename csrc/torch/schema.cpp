// The operators' schemas, in one place. Their contract is documented in Python (tome_ext/plan.py).

#include <string>

#include "stable.h"
#include "tome_core/isa.h"

#ifndef TOME_VERSION
#error "TOME_VERSION is set by the build (setup.py reads tome_ext/_version.py)"
#endif

namespace {

// JSON, so that adding a field never changes the schema.
std::string build_info() {
    return std::string("{\"version\": \"" TOME_VERSION "\", \"torch\": \"" TORCH_VERSION_BUILT
                       "\", \"compiler\": \"" __VERSION__ "\", \"isa\": \"") +
           tome::isa_name(tome::active_isa()) + "\"}";
}

// The operators that have kernels.
constexpr const char* kSchemas[] = {
    "match(Tensor metric, int r, int num_prefix_tokens=0) -> (Tensor assign, Tensor members, "
    "Tensor offsets)",
    "select(Tensor scores, int keep, int num_prefix_tokens=0, bool fuse=False) -> (Tensor assign, "
    "Tensor members, Tensor offsets)",
    "plan(Tensor assign, int num_rows) -> (Tensor members, Tensor offsets)",
    "merge(Tensor x, Tensor? size, Tensor members, Tensor offsets, str reduce=\"mean\") -> "
    "(Tensor, Tensor)",
    "merge_add_norm(Tensor x, Tensor branch, Tensor? size, Tensor members, Tensor offsets, "
    "Tensor? scale=None, Tensor? weight=None, Tensor? bias=None, float eps=1e-6) -> (Tensor, "
    "Tensor, Tensor)",
    "merge_backward(Tensor grad, Tensor? size, Tensor members, Tensor offsets, str "
    "reduce=\"mean\") -> Tensor",
    "unmerge(Tensor x, Tensor assign) -> Tensor",
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? size=None, float? scale=None) -> "
    "(Tensor out, Tensor lse)",
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? size, Tensor out, "
    "Tensor lse, float? scale=None) -> (Tensor, Tensor, Tensor)",
    "cls_attention(Tensor q, Tensor k, Tensor? size=None, float? scale=None) -> Tensor",
};

}  // namespace

STABLE_TORCH_LIBRARY(tome, m) {
    for (const char* schema : kSchemas) {
        m.def(schema);
        // The same in plain PyTorch, from tome_ext/reference.py, to which the CUDA library turns on
        // a GPU that cannot run its kernels.
        m.def((std::string("_plain_") + schema).c_str());
    }
    // attention_forward without lse. Written in Python (tome_ext/ops.py): a call of the dispatcher
    // from here would lose the text of an error, and torch would print it instead.
    m.def(
        "attention(Tensor q, Tensor k, Tensor v, Tensor? size=None, float? scale=None) -> Tensor");
    m.def("_build_info() -> str");
    m.def("_cuda_build_info() -> str");
    m.def("_cuda_obstacle(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(tome, CompositeExplicitAutograd, m) {
    m.impl("_build_info", TORCH_BOX(&build_info));
}

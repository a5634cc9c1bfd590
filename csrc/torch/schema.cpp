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

}  // namespace

STABLE_TORCH_LIBRARY(tome, m) {
    m.def(
        "match(Tensor metric, int r, int num_prefix_tokens=0) -> (Tensor assign, Tensor members, "
        "Tensor offsets)");
    m.def("plan(Tensor assign, int num_rows) -> (Tensor members, Tensor offsets)");
    m.def(
        "merge(Tensor x, Tensor? size, Tensor members, Tensor offsets, str reduce=\"mean\") -> "
        "(Tensor, Tensor)");
    m.def(
        "merge_backward(Tensor grad, Tensor? size, Tensor members, Tensor offsets, str "
        "reduce=\"mean\") -> Tensor");
    m.def("unmerge(Tensor x, Tensor assign) -> Tensor");
    m.def("_build_info() -> str");
    m.def("_cuda_build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(tome, CompositeExplicitAutograd, m) {
    m.impl("_build_info", TORCH_BOX(&build_info));
}

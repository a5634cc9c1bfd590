// Defines the operators to torch. Their contract is documented in Python (tome_ext/plan.py).

#include <string>

#include "calls.h"
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

template <class... Calls>
void define(torch::stable::detail::StableLibrary& m, tome::torch_layer::CallList<Calls...>) {
    for (const std::string& schema : {std::string(Calls::kName) + Calls::kSchema...}) {
        m.def(schema.c_str());
        // The same in plain PyTorch, from tome_ext/reference.py, to which the CUDA library turns on
        // a GPU that cannot run its kernels.
        m.def(("_plain_" + schema).c_str());
    }
}

}  // namespace

STABLE_TORCH_LIBRARY(tome, m) {
    define(m, tome::torch_layer::AllCalls{});
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

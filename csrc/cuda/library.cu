// Registers the CUDA implementations of the raw ops, whose schemas Python defines.
#if !defined(__CUDA_ARCH__)
#include <memory>

#include "ops.h"

namespace fused_mlp::cuda {

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("normalize", TORCH_BOX(&normalize));
  m.impl("normalize_backward", TORCH_BOX(&normalize_backward));
  m.impl("linear_act", TORCH_BOX(&linear_act));
  m.impl("linear_act_backward", TORCH_BOX(&linear_act_backward));
  m.impl("linear_batch_norm_act", TORCH_BOX(&linear_batch_norm_act));
  m.impl("linear_relu", TORCH_BOX(&linear_relu));
  m.impl("linear_relu_backward", TORCH_BOX(&linear_relu_backward));
  m.impl("research_net", TORCH_BOX(&research_net));
  m.impl("research_net_backward", TORCH_BOX(&research_net_backward));
  m.impl("batch_norm_act", TORCH_BOX(&batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
  m.impl("batch_norm_leaky_relu", TORCH_BOX(&batch_norm_leaky_relu));
  m.impl("batch_norm_leaky_relu_backward", TORCH_BOX(&batch_norm_leaky_relu_backward));
}

}  // namespace fused_mlp::cuda

STABLE_TORCH_LIBRARY_IMPL(fused_mlp_kernels, CUDA, m) { fused_mlp::cuda::register_ops(m); }

extern "C" {

// Registers the ops under another key as well, until the returned handle is given to
// fused_mlp_cuda_unregister. With a launch hook this runs them on tensors of the CPU.
__attribute__((visibility("default"))) void* fused_mlp_cuda_register(const char* key) {
  auto* library =
      new torch::stable::detail::StableLibrary(torch::stable::detail::StableLibrary::Kind::IMPL,
                                               "fused_mlp_kernels", key, __FILE__, __LINE__);
  fused_mlp::cuda::register_ops(*library);
  return library;
}

__attribute__((visibility("default"))) void fused_mlp_cuda_unregister(void* library) {
  delete static_cast<torch::stable::detail::StableLibrary*>(library);
}
}
#endif

// The table of the AVX-512 kernels with bfloat16's own in it.

#include "cpu/kernels/kernels.h"

namespace fused_mlp::FUSED_MLP_ISA {

void linear_relu_bfloat16(const LinearAct&);
void linear_relu_bfloat16_backward(const LinearActBackward&);
int64_t research_net_bfloat16_saved_numel(const ResearchNet&);
void research_net_bfloat16(const ResearchNet&);
void research_net_bfloat16_backward(const ResearchNetBackward&);

namespace {

// Calls bfloat16's kernel for bfloat16, else what AVX-512 has.
template <auto kBFloat16Kernel, auto kKernel, class Op>
auto choose(const Op& op, DType dtype) {
  return dtype == DType::kBFloat16 ? kBFloat16Kernel(op) : (avx512::kKernels.*kKernel)(op);
}

Kernels make_kernels() {
  Kernels kernels = avx512::kKernels;
  kernels.isa = "avx512_bf16";
  kernels.bfloat16 = true;
  // The other activations keep to AVX-512's, and beyond the cache to the library's product.
  kernels.linear_act = [](const LinearAct& op) {
    op.in_bfloat16() ? linear_relu_bfloat16(op) : avx512::kKernels.linear_act(op);
  };
  kernels.linear_act_backward = [](const LinearActBackward& op) {
    op.forward.in_bfloat16() ? linear_relu_bfloat16_backward(op)
                             : avx512::kKernels.linear_act_backward(op);
  };
  kernels.research_net_saved_numel = [](const ResearchNet& op) {
    return choose<research_net_bfloat16_saved_numel, &Kernels::research_net_saved_numel>(op,
                                                                                         op.dtype);
  };
  kernels.research_net = [](const ResearchNet& op) {
    choose<research_net_bfloat16, &Kernels::research_net>(op, op.dtype);
  };
  kernels.research_net_backward = [](const ResearchNetBackward& op) {
    choose<research_net_bfloat16_backward, &Kernels::research_net_backward>(op, op.forward.dtype);
  };
  return kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels made = make_kernels();
  return made;
}

}  // namespace fused_mlp::FUSED_MLP_ISA

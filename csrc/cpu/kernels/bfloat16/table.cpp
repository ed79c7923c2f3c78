// The table of the AVX-512 kernels with bfloat16's own in it.

#include "cpu/kernels/kernels.h"

#include "cpu/kernels/bfloat16/tuning.h"

namespace fused_mlp::FUSED_MLP_ISA {

void linear_act_bfloat16(const LinearAct&);
void linear_act_bfloat16_backward(const LinearActBackward&);
void mlp_bfloat16(const LinearAct* chain, int layers);
void mlp_bfloat16_backward(const LinearActBackward* chain, int layers);
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
  kernels.isa = FUSED_MLP_STRING(FUSED_MLP_ISA);
  kernels.bfloat16 = true;
  kernels.bfloat16_weight_numel = kMostWeight;
  kernels.linear_act = [](const LinearAct& op) {
    choose<linear_act_bfloat16, &Kernels::linear_act>(op, op.dtype);
  };
  kernels.linear_act_backward = [](const LinearActBackward& op) {
    choose<linear_act_bfloat16_backward, &Kernels::linear_act_backward>(op, op.forward.dtype);
  };
  kernels.mlp = [](const LinearAct* chain, int layers) {
    const bool pairs = chain->dtype == DType::kBFloat16;
    (pairs ? mlp_bfloat16 : avx512::kKernels.mlp)(chain, layers);
  };
  kernels.mlp_backward = [](const LinearActBackward* chain, int layers) {
    const bool pairs = chain->forward.dtype == DType::kBFloat16;
    (pairs ? mlp_bfloat16_backward : avx512::kKernels.mlp_backward)(chain, layers);
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

// The table of this instruction set's kernels.

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vec.h"

namespace fused_mlp::FUSED_MLP_ISA {

void linear_act(const LinearAct&);
void linear_act_backward(const LinearActBackward&);
void mlp(const LinearAct* chain, int layers);
void mlp_backward(const LinearActBackward* chain, int layers);
void act_dropout(const ActDropoutPass&);
void act_dropout_backward(const ActDropoutPassBackward&);
void batch_norm_act(const BatchNormAct&);
void batch_norm_act_backward(const BatchNormActBackward&);
void normalize(const Normalize&);
void normalize_backward(const NormalizeBackward&);
int64_t research_net_saved_numel(const ResearchNet&);
void research_net(const ResearchNet&);
void research_net_backward(const ResearchNetBackward&);
void cross_entropy(const CrossEntropy&);
void squared_error(const SquaredError&);
void sgd(const Sgd&);
void adam(const Adam&);
double squared_norm(DType dtype, int64_t numel, const void* data);
void scale(DType dtype, int64_t numel, double factor, void* data);

extern const Kernels kKernels = {
    .isa = FUSED_MLP_STRING(FUSED_MLP_ISA),
    .wide = FUSED_MLP_VECTOR_BYTES >= 32,
    .bfloat16 = false,
    .bfloat16_weight_numel = 0,
    .linear_act = linear_act,
    .linear_act_backward = linear_act_backward,
    .mlp = mlp,
    .mlp_backward = mlp_backward,
    .act_dropout = act_dropout,
    .act_dropout_backward = act_dropout_backward,
    .batch_norm_act = batch_norm_act,
    .batch_norm_act_backward = batch_norm_act_backward,
    .normalize = normalize,
    .normalize_backward = normalize_backward,
    .research_net_saved_numel = research_net_saved_numel,
    .research_net = research_net,
    .research_net_backward = research_net_backward,
    .cross_entropy = cross_entropy,
    .squared_error = squared_error,
    .sgd = sgd,
    .adam = adam,
    .squared_norm = squared_norm,
    .scale = scale,
};

}  // namespace fused_mlp::FUSED_MLP_ISA

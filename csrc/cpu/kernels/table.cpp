// The table of this instruction set's kernels.

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/vec.h"

#define FUSED_MLP_STRING_(name) #name
#define FUSED_MLP_STRING(name) FUSED_MLP_STRING_(name)

namespace fused_mlp::FUSED_MLP_ISA {

void linear_relu(const LinearReLU&);
void linear_relu_backward(const LinearReLUBackward&);
void relu_dropout(const ReLUDropout&);
void relu_dropout_backward(const ReLUDropoutBackward&);
void batch_norm_leaky_relu(const BatchNormLeakyReLU&);
void batch_norm_leaky_relu_backward(const BatchNormLeakyReLUBackward&);
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
    .linear_relu = linear_relu,
    .linear_relu_backward = linear_relu_backward,
    .relu_dropout = relu_dropout,
    .relu_dropout_backward = relu_dropout_backward,
    .batch_norm_leaky_relu = batch_norm_leaky_relu,
    .batch_norm_leaky_relu_backward = batch_norm_leaky_relu_backward,
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

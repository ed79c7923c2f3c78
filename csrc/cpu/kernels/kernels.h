// The kernels as the ops call them: plain structs of pointers and sizes, one table of functions
// for each instruction set. Matrices are row-major with a leading dimension in elements.
#pragma once

#include <cstdint>

#include "common/activation.h"

namespace fused_mlp {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A dropout layer: nothing is dropped where `seed` is null. `seed` points to two numbers.
struct Dropout {
  double p = 0;
  const int64_t* seed = nullptr;
  uint32_t stream = 0;
  bool scaled = true;  // false where something else multiplies what is kept

  bool active() const { return seed != nullptr && p > 0; }
  double scale() const { return !scaled ? 1 : p < 1 ? 1 / (1 - p) : 0; }
};

// One value a channel, of the input's dtype or float32; null stands for `none`.
struct ChannelVector {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride = 1;
};

// What stands behind a product or a batch norm: an activation and dropout.
struct ActDropout {
  Activation activation = Activation::kNone;
  double negative_slope = 0;
  Dropout dropout;

  // ReLU's gradient needs no mask: its output is 0 where an element was dropped.
  bool masks_gradient() const { return dropout.active() && activation != Activation::kReLU; }
};

// A batch norm in evaluation between a product and its activation; none without statistics.
struct EvaluatedNorm {
  ChannelVector running_mean, running_var, weight, bias;
  double eps = 0;

  bool active() const { return running_mean.data != nullptr; }
};

struct LinearAct {
  DType dtype;
  int64_t rows, in_features, out_features;
  const void* input;  // [rows, in_features]
  int64_t input_stride;
  const void* weight;  // [out_features, in_features]
  int64_t weight_stride;
  const void* bias;  // [out_features] or null
  EvaluatedNorm norm;
  ActDropout act;
  void* output;  // [rows, out_features]
  void* seen;    // [rows, out_features], what the activation saw; may be null
};

struct LinearActBackward {
  LinearAct forward;
  const void* kept;         // the forward's output, or `seen`, as the activation needs; may be null
  const void* grad_output;  // [rows, out_features]
  void* grad_input;         // any of the three may be null
  void* grad_weight;
  void* grad_bias;
};

// output = dropout(activation(norm(input))), in place or not.
struct ActDropoutPass {
  DType dtype;
  int64_t rows, columns;
  EvaluatedNorm norm;
  ActDropout act;
  const void* input;
  void* output;
};

// grad = the gradient of what the activation saw; grad_bias gets its column sums unless null.
struct ActDropoutPassBackward {
  DType dtype;
  int64_t rows, columns;
  ActDropout act;
  const void* kept;  // as in LinearActBackward
  const void* grad_output;
  void* grad;
  void* grad_bias;
};

// Input as [batches, channels, length], length 1 for a 2-D input. mean and rstd are written, in the
// compute type (double for float64, else float).
struct BatchNormAct {
  DType dtype;
  int64_t batches, channels, length;
  const void* input;
  ChannelVector running_mean, running_var, weight, bias;
  int64_t* num_batches_tracked;
  bool training, rectify;  // ReLU in place of LeakyReLU
  double momentum, eps, negative_slope;
  double scale;  // of the output: a dropout's, whose mask comes in a pass of its own
  void* output;
  void* mean;
  void* rstd;
};

// Reads the forward's mean, rstd, weight and bias; output and running statistics are not used.
struct BatchNormActBackward {
  BatchNormAct forward;
  const void* grad_output;
  void* grad_input;  // any of the three may be null
  ChannelVector grad_weight, grad_bias;
};

// Input as [outer, count, inner]: each of outer x inner groups has `count` values, `inner` apart.
struct Normalize {
  DType dtype;
  int64_t outer, count, inner;
  const void* input;
  double correction, eps;
  void* output;
  void* mean;  // [outer, inner], in the compute type
  void* std;
};

// Reads the forward's mean and std.
struct NormalizeBackward {
  Normalize forward;
  const void* grad_output;
  void* grad_input;
};

constexpr int kMaxLayers = 32;

// widths[0] input features, widths[l + 1] output features of Linear l; `layers` Linears. The batch
// norm stands behind Linear layers - 2.
struct ResearchNet {
  DType dtype;
  int64_t rows;
  int layers;
  int64_t widths[kMaxLayers + 1];
  const void* input;
  int64_t input_stride;
  const void* weights[kMaxLayers];  // contiguous
  const void* biases[kMaxLayers];
  Dropout dropout[kMaxLayers];
  ChannelVector bn_weight, bn_bias, running_mean, running_var;
  int64_t* num_batches_tracked;
  bool training;
  double momentum, eps, negative_slope;
  void* output;
  void* saved;  // laid out by Shape in network.h; may be null in evaluation
};

struct ResearchNetBackward {
  ResearchNet forward;
  const void* grad_output;
  void* grad_input;  // any may be null
  void* grad_weights[kMaxLayers];
  void* grad_biases[kMaxLayers];
  ChannelVector grad_bn_weight, grad_bn_bias;
};

// The losses of a training step and the gradient of their input, float32 or float64. Everything is
// contiguous but the classes. The sum over the rows is divided by `divisor`.
struct CrossEntropy {
  DType dtype;
  int64_t rows, columns;
  const void* output;     // [rows, columns]
  const int64_t* target;  // [rows]: a class in [0, columns), or ignore_index
  int64_t target_stride;
  const void* weight;  // [columns] or null
  int64_t ignore_index;
  double label_smoothing, divisor;
  void* grad;
  void* loss;  // one element
};
struct SquaredError {
  DType dtype;
  int64_t rows, columns;
  const void* output;
  const void* target;
  double divisor;
  void* grad;
  void* loss;
};

// One parameter's update by the rules of torch.optim.SGD, and of Adam and AdamW (`decoupled`), in
// float32 or float64.
struct Sgd {
  DType dtype;
  int64_t numel;
  void* parameter;
  const void* gradient;
  void* momentum_buffer;  // null without momentum
  double lr, weight_decay, momentum, dampening;
  bool nesterov, maximize;
};
struct Adam {
  DType dtype;
  int64_t numel;
  void* parameter;
  const void* gradient;
  void *exp_avg, *exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  double lr, weight_decay, beta1, beta2, eps;
  double bias_correction1, bias_correction2;  // 1 - beta^step
  bool decoupled, maximize;
};

// The name of the instruction set a file is compiled for, as the doctor prints it.
#define FUSED_MLP_STRING_(name) #name
#define FUSED_MLP_STRING(name) FUSED_MLP_STRING_(name)

struct Kernels {
  const char* isa;
  // Whether products beyond the cache beat the library's: without FMA they do not.
  bool wide;
  // Whether bfloat16 has products of its own, at any width (kernels/bfloat16/), and the most
  // elements of a single layer's weight up to which they beat the library's.
  bool bfloat16;
  int64_t bfloat16_weight_numel;
  void (*linear_act)(const LinearAct&);
  void (*linear_act_backward)(const LinearActBackward&);
  // Layers in a row, in float32, float64 or, where it has products of its own, bfloat16. Each reads
  // what the one before it puts out; forward, outputs of hidden layers may all be null. Backward
  // takes grad_output of the last layer and gives grad_input of the first.
  void (*mlp)(const LinearAct* chain, int layers);
  void (*mlp_backward)(const LinearActBackward* chain, int layers);
  void (*act_dropout)(const ActDropoutPass&);
  void (*act_dropout_backward)(const ActDropoutPassBackward&);
  void (*batch_norm_act)(const BatchNormAct&);
  void (*batch_norm_act_backward)(const BatchNormActBackward&);
  void (*normalize)(const Normalize&);
  void (*normalize_backward)(const NormalizeBackward&);
  int64_t (*research_net_saved_numel)(const ResearchNet&);
  void (*research_net)(const ResearchNet&);
  void (*research_net_backward)(const ResearchNetBackward&);
  void (*cross_entropy)(const CrossEntropy&);
  void (*squared_error)(const SquaredError&);
  void (*sgd)(const Sgd&);
  void (*adam)(const Adam&);
  double (*squared_norm)(DType dtype, int64_t numel, const void* data);
  void (*scale)(DType dtype, int64_t numel, double factor, void* data);
};

namespace baseline {
extern const Kernels kKernels;
}
#if defined(FUSED_MLP_HAS_AVX2)
namespace avx2 {
extern const Kernels kKernels;
}
#endif
#if defined(FUSED_MLP_HAS_AVX512)
namespace avx512 {
extern const Kernels kKernels;
}
#endif
#if defined(FUSED_MLP_HAS_AVX512_BF16)
namespace avx512_bf16 {
const Kernels& kernels();
}
#endif
#if defined(FUSED_MLP_HAS_AMX_BF16)
namespace amx_bf16 {
const Kernels& kernels();
}
#endif

}  // namespace fused_mlp

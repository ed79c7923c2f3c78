// linear_act and linear_relu on the CPU: our kernels, or where those would lose torch's matrix
// product with our passes before and after it.

#include "cpu/ops.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fused_mlp {
namespace {

// The widest side of a weight our kernels multiply by in any case: they beat the library's product
// where its call and the separate passes weigh most. Wider ones they take where they have FMA;
// half precision where they have its instructions, as the library does.
constexpr int64_t kOwnWidth = 256;

bool runs_own(const LinearAct& op) {
  const bool single = op.dtype == DType::kFloat32 || op.dtype == DType::kFloat64;
  const bool pairs = op.dtype == DType::kBFloat16 && kernels().bfloat16 &&
                     op.in_features * op.out_features <= kernels().bfloat16_weight_numel;
  return (op.in_features <= kOwnWidth && op.out_features <= kOwnWidth) ||
         (single && kernels().wide) || pairs;
}

bool has_float16_arithmetic() {
#if defined(__x86_64__)
  // AVX512-FP16; GCC 11 does not know it by name.
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 23 & 1) != 0;
#else
  return true;
#endif
}

// float16 beyond kOwnWidth is multiplied as float32 by our kernels, unless the processor has
// float16 arithmetic: torch's products take 54 ms for 1024 cubed forward and 2.2 s backward, as
// float32 13 and 21.
bool runs_as_single(const LinearAct& op) {
  static const bool has_arithmetic = has_float16_arithmetic();
  return op.dtype == DType::kFloat16 && kernels().wide && !has_arithmetic;
}

// Forward, fewer rows than this are not worth a converted weight: 1024 squared with GELU takes
// torch 45 us for one row and 160 for four, as float32 126 and 108.
constexpr int64_t kFewestSingle = 4;

// The tensor in another dtype, contiguous.
Tensor converted(const Tensor& tensor, ScalarType dtype) {
  elements_of(tensor);
  return as_contiguous(torch::stable::to(tensor, dtype));
}

// A matrix whose rows are contiguous: the tensor as [rows, columns], copied if it must be.
struct Matrix {
  Tensor tensor;
  int64_t stride;
};

Matrix rows_of(const Tensor& tensor, int64_t columns) {
  if (tensor.dim() == 2 && (columns <= 1 || tensor.stride(1) == 1) && tensor.stride(0) >= columns) {
    return {tensor, tensor.stride(0)};
  }
  return {as_contiguous(tensor), columns};
}

LinearAct describe(const Tensor& input, const Tensor& weight) {
  STD_TORCH_CHECK(
      weight.dim() == 2 && input.dim() >= 1 && input.size(input.dim() - 1) == weight.size(1),
      "linear_act: input (*, in_features) and weight (out_features, in_features) do "
      "not fit together");
  STD_TORCH_CHECK(input.is_cpu() && weight.is_cpu() && input.scalar_type() == weight.scalar_type(),
                  "linear_act: input and weight must be CPU tensors of one dtype");
  LinearAct op{};
  op.dtype = dtype_of(input);
  op.rows = 1;
  for (int64_t d = 0; d + 1 < input.dim(); ++d) op.rows *= input.size(d);
  op.in_features = weight.size(1);
  op.out_features = weight.size(0);
  return op;
}

// The output, and what the activation saw in `seen` where that is wanted.
Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const ActDropout& act, Tensor* seen, const EvaluatedNorm& norm = {}) {
  LinearAct op = describe(input, weight);
  op.norm = norm;
  op.act = act;
  STD_TORCH_CHECK(!bias || (bias->numel() == op.out_features && bias->is_cpu() &&
                            bias->scalar_type() == input.scalar_type()),
                  "linear_act: bias must be a CPU tensor of out_features elements");
  std::vector<int64_t> sizes = sizes_of(input);
  sizes.back() = op.out_features;
  if (!runs_own(op) && runs_as_single(op) && op.rows >= kFewestSingle) {
    const auto single = [](const Tensor& tensor) { return converted(tensor, ScalarType::Float); };
    std::optional<Tensor> single_bias;
    if (bias) single_bias = single(*bias);
    const Tensor output = forward(single(input), single(weight), single_bias, act, seen, norm);
    if (seen) *seen = converted(*seen, ScalarType::Half);
    return converted(output, ScalarType::Half);
  }
  if (!runs_own(op)) {
    elements_of(input), elements_of(weight), data_of(bias);
    const Tensor product = linear(input, weight, bias);
    const Tensor output = seen ? new_empty_cpu(sizes, input.scalar_type()) : product;
    if (seen) *seen = product;
    const bool nothing = act.activation == Activation::kNone && !act.dropout.active();
    if (nothing && !norm.active() && !seen) return product;  // two results must not be one tensor
    kernels().act_dropout({op.dtype, op.rows, op.out_features, norm, act, product.const_data_ptr(),
                           output.mutable_data_ptr()});
    return output;
  }
  const Matrix rows = rows_of(input, op.in_features);
  const Matrix matrix = rows_of(weight, op.in_features);
  std::optional<Tensor> bias_rows;
  if (bias) bias_rows = as_contiguous(*bias);
  const Tensor output = new_empty_cpu(sizes, input.scalar_type());
  if (seen) {
    *seen = new_empty_cpu(sizes, input.scalar_type());
    op.seen = seen->mutable_data_ptr();
  }
  op.input = elements_of(rows.tensor);
  op.input_stride = rows.stride;
  op.weight = elements_of(matrix.tensor);
  op.weight_stride = matrix.stride;
  op.bias = data_of(bias_rows);
  op.output = output.mutable_data_ptr();
  kernels().linear_act(op);
  return output;
}

std::vector<Tensor> backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                             const Tensor* kept, const ActDropout& act,
                             const std::vector<bool>& output_mask) {
  LinearActBackward op{};
  op.forward = describe(input, weight);
  LinearAct& net = op.forward;
  net.act = act;
  STD_TORCH_CHECK(output_mask.size() == 3, "linear_act_backward: output_mask must have 3 flags");
  const auto fits = [&](const Tensor& tensor) {
    return tensor.numel() == net.rows * net.out_features && tensor.is_cpu() &&
           tensor.scalar_type() == input.scalar_type();
  };
  STD_TORCH_CHECK(fits(grad_output) && (kept == nullptr || fits(*kept)),
                  "linear_act_backward: grad_output or what forward kept do not fit input and "
                  "weight");
  STD_TORCH_CHECK(kept || act.activation == Activation::kNone,
                  "linear_act_backward: this activation needs what forward kept");
  if (!runs_own(net) && runs_as_single(net)) {
    const auto single = [](const Tensor& tensor) { return converted(tensor, ScalarType::Float); };
    Tensor single_kept;
    if (kept) single_kept = single(*kept);
    std::vector<Tensor> gradients = backward(single(grad_output), single(input), single(weight),
                                             kept ? &single_kept : nullptr, act, output_mask);
    for (Tensor& gradient : gradients) gradient = converted(gradient, ScalarType::Half);
    return gradients;
  }
  const Tensor grad = as_contiguous(grad_output);
  std::optional<Tensor> kept_rows;
  if (kept) kept_rows = as_contiguous(*kept);
  std::vector<Tensor> gradients;
  const auto wanted = [&](int i, const std::vector<int64_t>& sizes) -> void* {
    if (!output_mask[i]) return nullptr;
    gradients.push_back(new_empty_cpu(sizes, input.scalar_type()));
    return gradients.back().mutable_data_ptr();
  };
  if (!runs_own(net)) {
    elements_of(input), elements_of(weight);
    const Tensor gated = new_empty_cpu({net.rows, net.out_features}, input.scalar_type());
    Tensor grad_bias;
    if (output_mask[2]) grad_bias = new_empty_cpu({net.out_features}, input.scalar_type());
    kernels().act_dropout_backward({net.dtype, net.rows, net.out_features, act, data_of(kept_rows),
                                    elements_of(grad), gated.mutable_data_ptr(),
                                    output_mask[2] ? grad_bias.mutable_data_ptr() : nullptr});
    if (output_mask[0]) {
      gradients.push_back(
          torch::stable::reshape(torch::stable::matmul(gated, weight), sizes_of(input)));
    }
    if (output_mask[1]) {
      const Tensor rows = torch::stable::reshape(input, {net.rows, net.in_features});
      gradients.push_back(torch::stable::matmul(torch::stable::transpose(gated, 0, 1), rows));
    }
    if (output_mask[2]) gradients.push_back(grad_bias);
    return gradients;
  }
  const Matrix rows = rows_of(input, net.in_features);
  const Matrix matrix = rows_of(weight, net.in_features);
  net.input = elements_of(rows.tensor);
  net.input_stride = rows.stride;
  net.weight = elements_of(matrix.tensor);
  net.weight_stride = matrix.stride;
  op.kept = data_of(kept_rows);
  op.grad_output = elements_of(grad);
  op.grad_input = wanted(0, sizes_of(input));
  op.grad_weight = wanted(1, {net.out_features, net.in_features});
  op.grad_bias = wanted(2, {net.out_features});
  kernels().linear_act_backward(op);
  return gradients;
}

}  // namespace

std::vector<Tensor> linear_act(const Tensor& input, const Tensor& weight,
                               const std::optional<Tensor>& bias, int64_t activation,
                               double negative_slope, double dropout_p,
                               const std::optional<Tensor>& seed, bool keep_input) {
  const ActDropout act = {activation_of(activation), negative_slope,
                          dropout_of(dropout_p, seed, 0)};
  if (!keep_input) return {forward(input, weight, bias, act, nullptr)};
  Tensor seen;
  const Tensor output = forward(input, weight, bias, act, &seen);
  return {output, seen};
}

std::vector<Tensor> linear_act_backward(const Tensor& grad_output, const Tensor& input,
                                        const Tensor& weight, const std::optional<Tensor>& kept,
                                        int64_t activation, double negative_slope, double dropout_p,
                                        const std::optional<Tensor>& seed,
                                        std::vector<bool> output_mask) {
  const ActDropout act = {activation_of(activation), negative_slope,
                          dropout_of(dropout_p, seed, 0)};
  return backward(grad_output, input, weight, kept ? &*kept : nullptr, act, output_mask);
}

Tensor linear_batch_norm_act(const Tensor& input, const Tensor& weight,
                             const std::optional<Tensor>& bias, const Tensor& running_mean,
                             const Tensor& running_var, const std::optional<Tensor>& bn_weight,
                             const std::optional<Tensor>& bn_bias, double eps, int64_t activation,
                             double negative_slope, double dropout_p,
                             const std::optional<Tensor>& seed) {
  STD_TORCH_CHECK(input.dim() == 2 && weight.dim() == 2,
                  "linear_batch_norm_act: input and weight must have two dimensions");
  const int64_t channels = weight.size(0);
  const EvaluatedNorm norm = {channels_of(running_mean, channels, "running_mean"),
                              channels_of(running_var, channels, "running_var"),
                              channels_of(bn_weight, channels, "bn_weight"),
                              channels_of(bn_bias, channels, "bn_bias"), eps};
  return forward(input, weight, bias,
                 {activation_of(activation, Activation::kLeakyReLU), negative_slope,
                  dropout_of(dropout_p, seed, 0)},
                 nullptr, norm);
}

Tensor linear_relu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   double dropout_p, const std::optional<Tensor>& seed) {
  return forward(input, weight, bias, {Activation::kReLU, 0, dropout_of(dropout_p, seed, 0)},
                 nullptr);
}

std::vector<Tensor> linear_relu_backward(const Tensor& grad_output, const Tensor& input,
                                         const Tensor& weight, const Tensor& output,
                                         double dropout_p, std::vector<bool> output_mask) {
  // A seed of no use but to say that there is dropout: ReLU's gradient needs the scale alone.
  static const int64_t kNoSeed[2] = {0, 0};
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1,
                  "linear_relu_backward: dropout_p must be between 0 and 1");
  return backward(grad_output, input, weight, &output,
                  {Activation::kReLU, 0, {dropout_p, kNoSeed, 0}}, output_mask);
}

}  // namespace fused_mlp

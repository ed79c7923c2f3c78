// linear_relu on the CPU: our kernels, or where those would lose torch's matrix product with our
// passes before and after it.

#include "cpu/ops.h"

namespace fused_mlp {
namespace {

// The widest side of a weight our kernels multiply by in any case: they beat the library's product
// where its call and the separate passes weigh most. Wider ones they take where they have FMA;
// half precision where they have its instructions, as the library does.
constexpr int64_t kOwnWidth = 256;

bool runs_own(const LinearReLU& op) {
  const bool single = op.dtype == DType::kFloat32 || op.dtype == DType::kFloat64;
  return (op.in_features <= kOwnWidth && op.out_features <= kOwnWidth) ||
         (single && kernels().wide) || (op.dtype == DType::kBFloat16 && kernels().bfloat16);
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

LinearReLU describe(const Tensor& input, const Tensor& weight) {
  STD_TORCH_CHECK(
      weight.dim() == 2 && input.dim() >= 1 && input.size(input.dim() - 1) == weight.size(1),
      "linear_relu: input (*, in_features) and weight (out_features, in_features) do "
      "not fit together");
  STD_TORCH_CHECK(input.is_cpu() && weight.is_cpu() && input.scalar_type() == weight.scalar_type(),
                  "linear_relu: input and weight must be CPU tensors of one dtype");
  LinearReLU op{};
  op.dtype = dtype_of(input);
  op.rows = 1;
  for (int64_t d = 0; d + 1 < input.dim(); ++d) op.rows *= input.size(d);
  op.in_features = weight.size(1);
  op.out_features = weight.size(0);
  return op;
}

}  // namespace

Tensor linear_relu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   double dropout_p, const std::optional<Tensor>& seed) {
  LinearReLU op = describe(input, weight);
  op.dropout = dropout_of(dropout_p, seed, 0);
  STD_TORCH_CHECK(!bias || (bias->numel() == op.out_features && bias->is_cpu() &&
                            bias->scalar_type() == input.scalar_type()),
                  "linear_relu: bias must be a CPU tensor of out_features elements");
  std::vector<int64_t> sizes = sizes_of(input);
  sizes.back() = op.out_features;
  if (!runs_own(op)) {
    elements_of(input), elements_of(weight), data_of(bias);
    const Tensor output = linear(input, weight, bias);
    kernels().relu_dropout(
        {op.dtype, op.rows, op.out_features, output.mutable_data_ptr(), op.dropout});
    return output;
  }
  const Matrix rows = rows_of(input, op.in_features);
  const Matrix matrix = rows_of(weight, op.in_features);
  std::optional<Tensor> bias_rows;
  if (bias) bias_rows = as_contiguous(*bias);
  const Tensor output = new_empty_cpu(sizes, input.scalar_type());
  op.input = elements_of(rows.tensor);
  op.input_stride = rows.stride;
  op.weight = elements_of(matrix.tensor);
  op.weight_stride = matrix.stride;
  op.bias = data_of(bias_rows);
  op.output = output.mutable_data_ptr();
  kernels().linear_relu(op);
  return output;
}

std::vector<Tensor> linear_relu_backward(const Tensor& grad_output, const Tensor& input,
                                         const Tensor& weight, const Tensor& output,
                                         double dropout_p, std::vector<bool> output_mask) {
  LinearReLUBackward op{};
  op.forward = describe(input, weight);
  LinearReLU& net = op.forward;
  STD_TORCH_CHECK(output_mask.size() == 3, "linear_relu_backward: output_mask must have 3 flags");
  STD_TORCH_CHECK(grad_output.numel() == net.rows * net.out_features &&
                      output.numel() == grad_output.numel() && grad_output.is_cpu() &&
                      output.is_cpu() && grad_output.scalar_type() == input.scalar_type() &&
                      output.scalar_type() == input.scalar_type(),
                  "linear_relu_backward: grad_output and output do not fit input and weight");
  // A seed of no use but to say that there is dropout: backward scales by 1 / (1 - p) alone.
  static const int64_t kNoSeed[2] = {0, 0};
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1,
                  "linear_relu_backward: dropout_p must be between 0 and 1");
  net.dropout = {dropout_p, kNoSeed, 0};
  const Tensor grad = as_contiguous(grad_output), result = as_contiguous(output);
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
    kernels().relu_dropout_backward({net.dtype, net.rows, net.out_features, elements_of(result),
                                     elements_of(grad), net.dropout.scale(),
                                     gated.mutable_data_ptr(),
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
  net.output = const_cast<void*>(elements_of(result));
  op.grad_output = elements_of(grad);
  op.grad_input = wanted(0, sizes_of(input));
  op.grad_weight = wanted(1, {net.out_features, net.in_features});
  op.grad_bias = wanted(2, {net.out_features});
  kernels().linear_relu_backward(op);
  return gradients;
}

}  // namespace fused_mlp

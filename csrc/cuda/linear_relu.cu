// linear_relu: y = dropout(relu(x W^T + b)) for inputs of any leading shape.
#if !defined(__CUDA_ARCH__)
#include <dlfcn.h>

#include "common/philox.h"
#include "gemm.h"
#include "ops.h"
#include "settings.h"

namespace fused_mlp::cuda {
namespace {

// The input as a matrix with stride 1 along its rows.
struct Rows {
  Tensor tensor;
  int64_t count, stride;

  Rows(const Tensor& input, int64_t columns) : tensor(input) {
    const bool matrix = input.dim() == 2 && (input.stride(1) == 1 || columns == 1);
    if (!matrix) tensor = as_contiguous(input);
    count = columns ? tensor.numel() / columns : 0;
    stride = matrix && count > 1 ? tensor.stride(0) : columns;
  }

  // The same memory as a two-dimensional tensor.
  Tensor matrix(int64_t columns) const {
    AtenTensorHandle handle = nullptr;
    const int64_t sizes[] = {count, columns}, strides[] = {stride, 1};
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes, strides, 0, &handle));
    return Tensor(handle);
  }
};

int64_t rows_of(const Tensor& input) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < input.dim(); ++d) rows *= input.size(d);
  return rows;
}

double scale_of(double probability) { return probability < 1 ? 1 / (1 - probability) : 0; }

using AddmmActivation = AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle,
                                           double, double, int32_t, AtenTensorHandle*);

// torch's C entry to aten::_addmm_activation on this kind of device, or null. The dispatcher's
// stable interface takes no Scalar arguments, which that op has; the C shims of AOTInductor do.
// They live in libtorch_cuda, which a build against a CPU wheel must not link, so they are looked
// up in the library that torch has loaded.
AddmmActivation find_addmm_activation(bool cuda) {
  void* library = dlopen(cuda ? "libtorch_cuda.so" : "libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<AddmmActivation>(dlsym(
      library, cuda ? "aoti_torch_cuda__addmm_activation" : "aoti_torch_cpu__addmm_activation"));
}

AddmmActivation addmm_activation(const Tensor& tensor) {
  static const AddmmActivation on_cuda = find_addmm_activation(true);
  static const AddmmActivation on_cpu = find_addmm_activation(false);
  return tensor.is_cuda() ? on_cuda : on_cpu;
}

// x W^T by the library, with bias and ReLU in its epilogue if it can; `finished` says whether
// they are.
Tensor library_layer(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     bool* finished) {
  const Tensor transposed = permute(weight, {1, 0});
  const AddmmActivation function = bias ? addmm_activation(x) : nullptr;
  *finished = function != nullptr;
  if (function == nullptr) return torch::stable::matmul(x, transposed);
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      function(bias->get(), x.get(), transposed.get(), 1.0, 1.0, 0, &result));
  return Tensor(result);
}

}  // namespace

Tensor linear_relu(const Tensor& input, const Tensor& weight, OptionalTensor bias, double dropout_p,
                   OptionalTensor seed) {
  const Context context(input);
  const DType dtype = dtype_of(input);
  const int64_t in = weight.size(1), out = weight.size(0), rows = rows_of(input);
  std::vector<int64_t> sizes = sizes_of(input);
  sizes.back() = out;
  if (rows == 0 || out == 0) return new_tensor(sizes, input.scalar_type(), input);
  const double probability = seed ? dropout_p : 0;
  const uint32_t threshold = philox::threshold(probability);
  const OptionalTensor seeds = contiguous_parameter(seed), biases = contiguous_parameter(bias);
  const Tensor weights = as_contiguous(weight);
  if (in > 0 && !uses_own_product(rows, in, out, probability > 0)) {
    const Rows x(input, in);
    bool finished = false;
    Tensor result = library_layer(x.matrix(in), weights, biases, &finished);
    if (!finished || probability > 0) {
      ElementParameters p = {};
      p.bias = finished ? nullptr : data(biases);
      p.result = result.data_ptr();
      p.output = p.result;
      p.seed = threshold ? static_cast<const int64_t*>(data(seeds)) : nullptr;
      p.rows = rows;
      p.columns = static_cast<int32_t>(out);
      p.scale = scale_of(probability);
      p.threshold = threshold;
      relu_dropout(dtype, p, context.stream());
    }
    return new_view(result, sizes);
  }
  Tensor result = new_tensor(sizes, input.scalar_type(), input);
  const Rows x(input, in);
  GemmParameters p = {};
  p.x = x.tensor.data_ptr();
  p.weight = weights.data_ptr();
  p.bias = data(biases);
  p.result = result.data_ptr();
  p.seed = threshold ? static_cast<const int64_t*>(data(seeds)) : nullptr;
  p.rows = rows;
  p.x_stride = x.stride;
  p.in = static_cast<int32_t>(in);
  p.out = static_cast<int32_t>(out);
  p.scale = scale_of(probability);
  p.threshold = threshold;
  linear_relu_layer(choose_math(dtype, context.device(), allow_tf32()), dtype, p, context.stream());
  return result;
}

Tensors linear_relu_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                             const Tensor& output, double dropout_p,
                             std::vector<bool> output_mask) {
  const Context context(input);
  const DType dtype = dtype_of(input);
  const ScalarType type = input.scalar_type();
  const int64_t in = weight.size(1), out = weight.size(0), rows = rows_of(input);
  const bool want_weight = output_mask[1], want_bias = output_mask[2];
  Tensors results;
  if (rows == 0 || out == 0 || in == 0) {
    // Sums over nothing; without inputs only the bias has a gradient to speak of.
    if (output_mask[0]) results.push_back(new_tensor(sizes_of(input), type, input));
    if (want_weight) results.push_back(new_tensor({out, in}, type, input));
    for (Tensor& result : results) torch::stable::zero_(result);
    if (!want_bias) return results;
    Tensor bias = new_tensor({out}, type, input);
    torch::stable::zero_(bias);
    if (rows == 0 || out == 0) {
      results.push_back(bias);
      return results;
    }
  }
  const Rows g(grad_output, out);
  const Tensor y = as_contiguous(output), weights = as_contiguous(weight);
  if (in == 0 || !uses_own_product(rows, in, out, false)) {
    Tensor dz = new_tensor({rows, out}, type, input);
    ElementParameters p = {};
    p.g = g.tensor.data_ptr();
    p.g_stride = g.stride;
    p.output = y.data_ptr();
    p.result = dz.data_ptr();
    p.rows = rows;
    p.columns = static_cast<int32_t>(out);
    p.scale = scale_of(dropout_p);
    relu_gate(dtype, p, context.stream());
    if (in > 0 && output_mask[0])
      results.push_back(new_view(torch::stable::matmul(dz, weights), sizes_of(input)));
    if (in > 0 && want_weight)
      results.push_back(torch::stable::matmul(permute(dz, {1, 0}), Rows(input, in).matrix(in)));
    if (want_bias) {
      const int64_t first = 0;
      results.push_back(
          torch::stable::sum(dz, torch::headeronly::IntHeaderOnlyArrayRef(&first, 1)));
    }
    return results;
  }
  const Rows x(input, in);
  const Math math = choose_math(dtype, context.device(), allow_tf32());
  GemmParameters p = {};
  p.x = x.tensor.data_ptr();
  p.x_stride = x.stride;
  p.weight = weights.data_ptr();
  p.g = g.tensor.data_ptr();
  p.g_stride = g.stride;
  p.output = y.data_ptr();
  p.rows = rows;
  p.in = static_cast<int32_t>(in);
  p.out = static_cast<int32_t>(out);
  p.scale = scale_of(dropout_p);
  if (output_mask[0]) {
    Tensor grad = new_tensor(sizes_of(input), type, input);
    p.result = grad.data_ptr();
    linear_relu_input_gradient(math, dtype, p, context.stream());
    results.push_back(grad);
  }
  if (!want_weight && !want_bias) return results;
  NetReduceParameters reduce = {};
  reduce.parameters = out * in + out;
  reduce.segments = 2;
  reduce.begin[1] = out * in;
  reduce.begin[2] = out * in + out;
  if (want_weight) {
    results.push_back(new_tensor({out, in}, type, input));
    reduce.target[0] = results.back().data_ptr();
  }
  if (want_bias) {
    results.push_back(new_tensor({out}, type, input));
    reduce.target[1] = results.back().data_ptr();
  }
  p.gradient_stride = gradient_stride(reduce.parameters);
  p.splits = weight_gradient_splits(p, context.device());
  const Tensor sums = workspace(p.splits * p.gradient_stride * accumulator_size(dtype), input);
  p.result = sums.data_ptr();
  linear_relu_weight_gradient(math, dtype, p, reduce, context.stream());
  return results;
}

}  // namespace fused_mlp::cuda
#endif

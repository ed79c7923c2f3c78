// linear_act: y = dropout(activation(x W^T + b)) for inputs of any leading shape; linear_relu,
// which is that of ReLU; and linear_batch_norm_act, with a batch norm of running statistics in
// between.
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

// What stands behind the product but the batch norm. Without a seed nothing is dropped.
Behind behind(Activation activation, double negative_slope, double dropout_p,
              const OptionalTensor& seed) {
  Behind b = {};
  const double probability = seed ? dropout_p : 0;
  b.activation = activation;
  b.slope = negative_slope;
  b.scale = scale_of(probability);
  b.threshold = philox::threshold(probability);
  b.kept_input = activation == Activation::kTanh && probability > 0;
  b.seed = b.threshold ? static_cast<const int64_t*>(seed->data_ptr()) : nullptr;
  return b;
}

// A function of torch's C interface on this kind of device, or null. The dispatcher's stable
// interface takes no Scalar arguments, which these ops have; the C shims of AOTInductor do. They
// live in libtorch_cuda, which a build against a CPU wheel must not link, so they are looked up in
// the library that torch has loaded.
template <class Function>
struct Shim {
  Function on_cuda, on_cpu;

  explicit Shim(const std::string& name)
      : on_cuda(find("libtorch_cuda.so", "aoti_torch_cuda_" + name)),
        on_cpu(find("libtorch_cpu.so", "aoti_torch_cpu_" + name)) {}
  Function of(const Tensor& tensor) const { return tensor.is_cuda() ? on_cuda : on_cpu; }

 private:
  static Function find(const char* file, const std::string& symbol) {
    void* library = dlopen(file, RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, symbol.c_str())) : nullptr;
  }
};

using AddmmActivation = AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle,
                                           double, double, int32_t, AtenTensorHandle*);
using AddmmOut = AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle,
                                    AtenTensorHandle, double, double);

// x W^T by the library, with the bias and, if `rectify`, ReLU in its epilogue if it can; `finished`
// says whether they are.
Tensor library_layer(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     bool rectify, bool* finished) {
  static const Shim<AddmmActivation> addmm_activation("_addmm_activation");
  static const Shim<AddmmOut> addmm("addmm_out");
  const Tensor transposed = permute(weight, {1, 0});
  *finished = true;
  if (bias && rectify && addmm_activation.of(x)) {
    AtenTensorHandle result = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        addmm_activation.of(x)(bias->get(), x.get(), transposed.get(), 1.0, 1.0, 0, &result));
    return Tensor(result);
  }
  if (bias && !rectify && addmm.of(x)) {
    Tensor result = new_tensor({x.size(0), weight.size(0)}, x.scalar_type(), x);
    STABLE_TORCH_ERROR_CODE_CHECK(
        addmm.of(x)(result.get(), bias->get(), x.get(), transposed.get(), 1.0, 1.0));
    return result;
  }
  *finished = !bias && !rectify;
  return torch::stable::matmul(x, transposed);
}

// The output, and what the activation saw in `seen` where that is wanted.
Tensor forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
               const Behind& behind, bool dropout, Tensor* seen, const Context& context) {
  const DType dtype = dtype_of(input);
  const ScalarType type = input.scalar_type();
  const int64_t in = weight.size(1), out = weight.size(0), rows = rows_of(input);
  std::vector<int64_t> sizes = sizes_of(input);
  sizes.back() = out;
  if (rows == 0 || out == 0) {
    if (seen) *seen = new_tensor(sizes, type, input);
    return new_tensor(sizes, type, input);
  }
  const OptionalTensor biases = contiguous_parameter(bias);
  const Tensor weights = as_contiguous(weight);
  const Rows x(input, in);
  if (in > 0 && !uses_own_product(rows, in, out, dropout)) {
    const bool rectify = behind.activation == Activation::kReLU && !behind.norm.mean && !seen;
    bool finished = false;
    const Tensor product = library_layer(x.matrix(in), weights, biases, rectify, &finished);
    const bool plain = rectify || (behind.activation == Activation::kNone && !behind.norm.mean);
    const Tensor result = seen ? new_tensor(sizes, type, input) : product;
    if (seen || !finished || !plain || dropout) {
      ElementParameters p = {};
      p.bias = finished ? nullptr : data(biases);
      p.from = product.data_ptr();
      p.result = result.data_ptr();
      p.seen = seen && p.bias ? product.data_ptr() : nullptr;
      p.behind = behind;
      p.rows = rows;
      p.columns = static_cast<int32_t>(out);
      act_elements(dtype, p, context.stream());
    }
    if (seen) *seen = new_view(product, sizes);
    return new_view(result, sizes);
  }
  Tensor result = new_tensor(sizes, type, input);
  GemmParameters p = {};
  p.x = x.tensor.data_ptr();
  p.weight = weights.data_ptr();
  p.bias = data(biases);
  p.result = result.data_ptr();
  if (seen) {
    *seen = new_tensor(sizes, type, input);
    p.seen = seen->data_ptr();
  }
  p.behind = behind;
  p.rows = rows;
  p.x_stride = x.stride;
  p.in = static_cast<int32_t>(in);
  p.out = static_cast<int32_t>(out);
  linear_act_layer(choose_math(dtype, context.device(), allow_tf32()), dtype, p, context.stream());
  return result;
}

Tensors backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                 const OptionalTensor& kept, const Behind& behind,
                 const std::vector<bool>& output_mask) {
  const Context context(input);
  const DType dtype = dtype_of(input);
  const ScalarType type = input.scalar_type();
  const int64_t in = weight.size(1), out = weight.size(0), rows = rows_of(input);
  const bool want_weight = output_mask[1], want_bias = output_mask[2];
  STD_TORCH_CHECK(kept || behind.activation == Activation::kNone,
                  "linear_act_backward: this activation needs what forward kept");
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
  const OptionalTensor from = contiguous_parameter(kept);
  const Tensor weights = as_contiguous(weight);
  if (in == 0 || !uses_own_product(rows, in, out, false)) {
    Tensor dz = new_tensor({rows, out}, type, input);
    ElementParameters p = {};
    p.g = g.tensor.data_ptr();
    p.g_stride = g.stride;
    p.from = data(from);
    p.result = dz.data_ptr();
    p.behind = behind;
    p.rows = rows;
    p.columns = static_cast<int32_t>(out);
    act_elements(dtype, p, context.stream());
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
  p.kept = data(from);
  p.behind = behind;
  p.rows = rows;
  p.in = static_cast<int32_t>(in);
  p.out = static_cast<int32_t>(out);
  if (output_mask[0]) {
    Tensor grad = new_tensor(sizes_of(input), type, input);
    p.result = grad.data_ptr();
    linear_act_input_gradient(math, dtype, p, context.stream());
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
  linear_act_weight_gradient(math, dtype, p, reduce, context.stream());
  return results;
}

}  // namespace

Tensors linear_act(const Tensor& input, const Tensor& weight, OptionalTensor bias,
                   int64_t activation, double negative_slope, double dropout_p, OptionalTensor seed,
                   bool keep_input) {
  const Context context(input);
  const OptionalTensor seeds = contiguous_parameter(seed);
  const Behind what = behind(activation_of(activation), negative_slope, dropout_p, seeds);
  const bool dropout = seed && dropout_p > 0;
  if (!keep_input) return {forward(input, weight, bias, what, dropout, nullptr, context)};
  Tensor seen;
  const Tensor output = forward(input, weight, bias, what, dropout, &seen, context);
  return {output, seen};
}

Tensors linear_act_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                            OptionalTensor kept, int64_t activation, double negative_slope,
                            double dropout_p, OptionalTensor seed, std::vector<bool> output_mask) {
  const OptionalTensor seeds = contiguous_parameter(seed);
  Behind what = behind(activation_of(activation), negative_slope, dropout_p, seeds);
  return backward(grad_output, input, weight, kept, what, output_mask);
}

Tensor linear_batch_norm_act(const Tensor& input, const Tensor& weight, OptionalTensor bias,
                             const Tensor& running_mean, const Tensor& running_var,
                             OptionalTensor bn_weight, OptionalTensor bn_bias, double eps,
                             int64_t activation, double negative_slope, double dropout_p,
                             OptionalTensor seed) {
  const Context context(input);
  const OptionalTensor seeds = contiguous_parameter(seed);
  const OptionalTensor mean = as_contiguous(running_mean), var = as_contiguous(running_var);
  const OptionalTensor weights = contiguous_parameter(bn_weight),
                       biases = contiguous_parameter(bn_bias);
  Behind what =
      behind(activation_of(activation, Activation::kLeakyReLU), negative_slope, dropout_p, seeds);
  what.norm = {data(mean),
               data(var),
               data(weights),
               data(biases),
               eps,
               wide_flag(mean, input, kNormWideMean) | wide_flag(var, input, kNormWideVar) |
                   wide_flag(weights, input, kNormWideWeight) |
                   wide_flag(biases, input, kNormWideBias),
               0};
  return forward(input, weight, bias, what, seed && dropout_p > 0, nullptr, context);
}

Tensor linear_relu(const Tensor& input, const Tensor& weight, OptionalTensor bias, double dropout_p,
                   OptionalTensor seed) {
  const Context context(input);
  const OptionalTensor seeds = contiguous_parameter(seed);
  return forward(input, weight, bias, behind(Activation::kReLU, 0, dropout_p, seeds),
                 seed && dropout_p > 0, nullptr, context);
}

Tensors linear_relu_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                             const Tensor& output, double dropout_p,
                             std::vector<bool> output_mask) {
  Behind what = behind(Activation::kReLU, 0, 0, std::nullopt);
  what.scale = scale_of(dropout_p);  // all that ReLU's gradient needs of dropout
  return backward(grad_output, input, weight, output, what, output_mask);
}

}  // namespace fused_mlp::cuda
#endif

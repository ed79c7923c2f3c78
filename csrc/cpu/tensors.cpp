#include "cpu/tensors.h"

#include "cpu/parallel.h"

namespace fused_mlp {

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "fused_mlp: expected float32, float64, bfloat16 or float16");
  }
}

ScalarType accumulate_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor new_empty_cpu(IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  int64_t few[8];
  std::vector<int64_t> many(sizes.size() > 8 ? sizes.size() : 0);
  int64_t* strides = many.empty() ? few : many.data();
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  // Torch is not asked about small tensors: three calls of its interface each.
  constexpr int64_t kMany = int64_t{1} << 16;
  if (stride >= kMany && tensor.numel() > 0) {
    advise_large_pages(tensor.mutable_data_ptr(),
                       static_cast<size_t>(tensor.numel()) * tensor.element_size());
  }
  return tensor;
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

const void* elements_of(const Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
  STD_TORCH_CHECK(data != nullptr || tensor.numel() == 0,
                  "a tensor has no memory: its storage was resized to 0 bytes; resize it back, or "
                  "give another tensor");
  return data;
}

Tensor as_contiguous(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  elements_of(tensor);
  return torch::stable::contiguous(tensor);
}

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  StableIValue stack[3] = {from(input), from(weight), from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION));
  return as_contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}

Tensor permute(const Tensor& tensor, const std::vector<int64_t>& dims) {
  using torch::stable::detail::from;
  StableIValue stack[2] = {from(tensor), from(dims)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::permute", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void random_(const Tensor& tensor) {
  using torch::stable::detail::from;
  StableIValue stack[2] = {from(tensor), from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::random_", "", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

const void* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? elements_of(*tensor) : nullptr;
}

ChannelVector channels_of(const std::optional<Tensor>& tensor, int64_t channels, const char* name) {
  if (!tensor) return {};
  STD_TORCH_CHECK(tensor->is_cpu() && tensor->dim() == 1 && tensor->size(0) == channels,
                  "fused_mlp: ", name, " must be a CPU vector of ", channels, " elements");
  return {const_cast<void*>(elements_of(*tensor)), dtype_of(*tensor), tensor->stride(0)};
}

const int64_t* seed_of(const std::optional<Tensor>& seed) {
  if (!seed) return nullptr;
  STD_TORCH_CHECK(seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 2 &&
                      seed->is_contiguous(),
                  "fused_mlp: seed must be a contiguous int64 CPU tensor of 2 elements");
  return static_cast<const int64_t*>(elements_of(*seed));
}

Dropout dropout_of(double p, const std::optional<Tensor>& seed, uint32_t stream) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, "fused_mlp: dropout_p must be between 0 and 1, but got ", p);
  if (!seed) return {};
  return {p, seed_of(seed), stream};
}

Activation activation_of(int64_t number, Activation last) {
  STD_TORCH_CHECK(number >= 0 && number <= static_cast<int64_t>(last),
                  "fused_mlp: there is no activation of number ", number);
  return static_cast<Activation>(number);
}

int64_t* counter_of(const std::optional<Tensor>& num_batches_tracked) {
  if (!num_batches_tracked) return nullptr;
  STD_TORCH_CHECK(num_batches_tracked->is_cpu() &&
                      num_batches_tracked->scalar_type() == ScalarType::Long &&
                      num_batches_tracked->numel() == 1,
                  "fused_mlp: num_batches_tracked must be one int64 number on the CPU");
  elements_of(*num_batches_tracked);
  return num_batches_tracked->mutable_data_ptr<int64_t>();
}

}  // namespace fused_mlp

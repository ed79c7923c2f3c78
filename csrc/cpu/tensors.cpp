#include "cpu/tensors.h"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"

namespace fused_mlp {

DType dtype_of(const Tensor& tensor) {
  // By torch's own numbers: scalar_type() translates them, which takes four times as long.
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  if (dtype == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (dtype == aoti_torch_dtype_float64()) return DType::kFloat64;
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  if (dtype == aoti_torch_dtype_float16()) return DType::kFloat16;
  STD_TORCH_CHECK(false, "fused_mlp: expected float32, float64, bfloat16 or float16");
}

ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
    default:
      return ScalarType::Float;
  }
}

int64_t size_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

ScalarType accumulate_type(const Tensor& tensor) {
  return dtype_of(tensor) == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

namespace {

void* memory_of(AtenTensorHandle tensor) {
  void* data = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor, &data));
  return data;
}

AtenTensorHandle new_handle(IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
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
  // Torch is not asked about small tensors: two calls of its interface each.
  constexpr int64_t kMany = int64_t{1} << 16;
  if (stride >= kMany) {
    int64_t bytes = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &bytes));
    advise_large_pages(memory_of(handle), static_cast<size_t>(bytes));
  }
  return handle;
}

// What stands behind the first `numel` elements.
char* behind(const Tensor& saved, int64_t numel) {
  char* data = static_cast<char*>(const_cast<void*>(saved.const_data_ptr()));
  return data + numel * size_of(saved.scalar_type());
}

}  // namespace

Tensor new_empty_cpu(IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return Tensor(new_handle(sizes, dtype));
}

NewTensors::~NewTensors() {
  for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
}

void* NewTensors::add(IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  handles_.push_back(new_handle(sizes, dtype));
  return memory_of(handles_.back());
}

StableIValue NewTensors::release() {
  StableListHandle list;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(handles_.size(), &list));
  for (AtenTensorHandle handle : handles_) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, torch::stable::detail::from(handle)));
  }
  handles_.clear();
  return torch::stable::detail::from(list);
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

const void* Copies::contiguous_data(const Tensor& tensor) {
  if (tensor.is_contiguous()) return elements_of(tensor);
  copies.push_back(as_contiguous(tensor));
  return copies.back().const_data_ptr();
}

void draw_seed(int64_t* seed) {
  const Tensor drawn = new_empty_cpu({2}, ScalarType::Long);
  random_(drawn);
  std::memcpy(seed, drawn.const_data_ptr(), kSeedBytes);
}

int64_t* seed_in(const Tensor& saved, int64_t numel) {
  return reinterpret_cast<int64_t*>(behind(saved, numel) - kSeedBytes);
}

void clear_behind(const Tensor& saved, int64_t numel) {
  std::fill(behind(saved, numel), behind(saved, saved.numel()), '\0');
}

Dropout dropout_of(double p, const std::optional<Tensor>& seed, uint32_t stream) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, "fused_mlp: dropout_p must be between 0 and 1, but got ", p);
  if (!seed) return {};
  return {p, seed_of(seed), stream};
}

BatchNormAct batch_norm_of(const ActDropout& act) {
  BatchNormAct op{};
  op.rectify = act.activation == Activation::kReLU;
  op.negative_slope = act.activation == Activation::kNone ? 1 : act.negative_slope;
  op.scale = act.dropout.active() ? act.dropout.scale() : 1;
  return op;
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

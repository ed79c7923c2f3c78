// torch tensors for the ops' host code, on the LibTorch stable ABI. Host pass only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "common/activation.h"
#include "launch.h"
#include "standardize.h"

namespace fused_mlp::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor) {
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
      STD_TORCH_CHECK(false, "fused_mlp: float32, float64, bfloat16 or float16 expected");
  }
}

inline ScalarType accumulator_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline Activation activation_of(int64_t number, Activation last = Activation::kTanh) {
  STD_TORCH_CHECK(number >= 0 && number <= static_cast<int64_t>(last),
                  "fused_mlp: there is no activation of number ", number);
  return static_cast<Activation>(number);
}

// Makes the tensor's device current, and says where and on what a launch goes.
class Context {
 public:
  explicit Context(const Tensor& tensor) {
    int index = 0;
    if (!simulated()) {
      index = tensor.get_device_index();
      guard_.emplace(index);
      stream_ = static_cast<cudaStream_t>(
          torch::stable::accelerator::getCurrentStream(index).nativeHandle());
    }
    device_ = &fused_mlp::cuda::device(index);
  }
  const Device& device() const { return *device_; }
  cudaStream_t stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
  const Device* device_ = nullptr;
};

// Uninitialised memory on the device of `like`.
inline Tensor new_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                          ScalarType type, const Tensor& like) {
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, device_type, device_index,
                                                  &handle));
  return Tensor(handle);
}

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

inline Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  return new_strided(sizes, contiguous_strides(sizes), type, like);
}

// Scratch memory of the caching allocator; may be empty.
inline Tensor workspace(int64_t bytes, const Tensor& like) {
  return new_tensor({bytes}, ScalarType::Byte, like);
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline std::vector<int64_t> strides_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return {strides.begin(), strides.end()};
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor contiguous_parameter(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(as_contiguous(*tensor)) : tensor;
}

// A running statistic that the kernel can update in place: itself, or a copy to be written back.
struct Running {
  OptionalTensor original, dense;
  explicit Running(const OptionalTensor& tensor)
      : original(tensor), dense(contiguous_parameter(tensor)) {}
  void write_back() {
    if (original && original->data_ptr() != dense->data_ptr())
      torch::stable::copy_(*original, *dense);
  }
};

inline const void* data(const OptionalTensor& tensor) {
  return tensor ? tensor->data_ptr() : nullptr;
}

inline void* mutable_data(const OptionalTensor& tensor) {
  return tensor ? tensor->data_ptr() : nullptr;
}

// `flag` where a parameter is kept in float32 beside another input type.
inline int32_t wide_flag(const OptionalTensor& tensor, const Tensor& input, int32_t flag) {
  return tensor && tensor->scalar_type() == ScalarType::Float &&
                 input.scalar_type() != ScalarType::Float
             ? flag
             : 0;
}

// Permutes dimensions without copying.
inline Tensor permute(const Tensor& tensor, const std::vector<int64_t>& order) {
  std::vector<int64_t> sizes, strides;
  for (const int64_t d : order) {
    sizes.push_back(tensor.size(d));
    strides.push_back(tensor.stride(d));
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      tensor.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, &handle));
  return Tensor(handle);
}

// A contiguous tensor under another shape.
inline Tensor new_view(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      tensor.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, &handle));
  return Tensor(handle);
}

// A standardisation of up to three tensors, ready to launch: x, y and, backward, g.
struct Standardization {
  Tensor x, y;
  OptionalTensor g;
  bool columns = false;
  StandardizeParameters parameters = {};
  std::vector<int64_t> order;  // of y's dimensions, as the caller has them; empty if they are so

  // y as the op returns it. Compiled graphs rely on contiguous tensors, as other backends give
  // them.
  Tensor result() const { return as_contiguous(order.empty() ? y : permute(y, order)); }
};

// Chooses layout and output strides; copies inputs only where no layout serves them.
// `reduced` has one entry for each dimension of x, which must not be empty. With `ordered` the
// elements of a group are numbered in their logical order, as dropout's mask needs it.
Standardization standardization(const Tensor& x, const OptionalTensor& g,
                                const std::vector<bool>& reduced, bool ordered = false);

// Registers every op of this library with the dispatcher under a key.
void register_ops(torch::stable::detail::StableLibrary& library);

}  // namespace fused_mlp::cuda

// A C++ object that Python holds between calls: in a tensor whose memory is the object itself and
// whose deleter frees it. Torch counts the references, so nothing leaks and nothing is used after
// it was freed.
#pragma once

#include <utility>

#include "cpu/tensors.h"

namespace fused_mlp {

template <class T>
struct Held {
  // Its own address, so that a copy of the bytes, or any other tensor, is not taken for it.
  const Held* self;
  const void* kind;
  T content;

  static constexpr char kKind = 0;
};

template <class T>
Tensor hold(T content) {
  auto* held = new Held<T>{nullptr, &Held<T>::kKind, std::move(content)};
  held->self = held;
  const int64_t size = sizeof(Held<T>), stride = 1;
  return torch::stable::from_blob(
      held, {&size, 1}, {&stride, 1}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      ScalarType::Byte, [](void* data) { delete static_cast<Held<T>*>(data); });
}

// What `hold` was given, or null for any other tensor.
template <class T>
const T* find_held(const Tensor& tensor) {
  const bool plausible = tensor.is_cpu() && tensor.scalar_type() == ScalarType::Byte &&
                         tensor.numel() == static_cast<int64_t>(sizeof(Held<T>));
  const auto* held = plausible ? static_cast<const Held<T>*>(tensor.const_data_ptr()) : nullptr;
  const bool is = held != nullptr && held->self == held && held->kind == &Held<T>::kKind;
  return is ? &held->content : nullptr;
}

// The same, raising for any other tensor; `maker` names the op that returned it.
template <class T>
const T& held_in(const Tensor& tensor, const char* maker) {
  const T* content = find_held<T>(tensor);
  STD_TORCH_CHECK(content != nullptr, "fused_mlp: expected what ", maker,
                  " returned, not a copy of it");
  return *content;
}

}  // namespace fused_mlp

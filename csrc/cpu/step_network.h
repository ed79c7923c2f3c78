// The network of a training step: what train_step.cpp asks of it, whatever its kind.
#pragma once

#include <memory>

#include "cpu/tensors.h"

namespace fused_mlp {

// A tensor that a plan holds. Its address is read anew at every step, since `.data = ` and `.set_`
// move it; what else they could change must be as it was.
class Slot {
 public:
  explicit Slot(const Tensor& tensor)
      : tensor_(tensor), dtype_(tensor.scalar_type()), numel_(tensor.numel()) {
    STD_TORCH_CHECK(holds(), "train_step_plan: expected contiguous CPU tensors");
  }
  bool holds() const {
    return tensor_.numel() == numel_ && tensor_.scalar_type() == dtype_ &&
           tensor_.is_contiguous() && tensor_.is_cpu() &&
           (tensor_.const_data_ptr() != nullptr || numel_ == 0);
  }
  void* data() const { return tensor_.mutable_data_ptr(); }
  int64_t numel() const { return numel_; }
  const Tensor& tensor() const { return tensor_; }

 private:
  Tensor tensor_;
  ScalarType dtype_;
  int64_t numel_;
};

using OptionalSlot = std::optional<Slot>;

inline OptionalSlot slot_of(const std::optional<Tensor>& tensor) {
  return tensor ? OptionalSlot(*tensor) : std::nullopt;
}
inline void* data_of(const OptionalSlot& slot) { return slot ? slot->data() : nullptr; }
inline bool holds_if_there(const OptionalSlot& slot) { return !slot || slot->holds(); }

// Parameters have places: weights, biases, then weight and bias of every batch norm.
class StepNetwork {
 public:
  virtual ~StepNetwork() = default;

  DType dtype = DType::kFloat32;
  int64_t in_features = 0, out_features = 0;
  std::vector<OptionalSlot> parameters, buffers;

  bool holds() const;
  virtual bool takes(int64_t rows) const = 0;

  // One step, in this order. `input` has contiguous rows; `momentum` is that of a batch norm whose
  // running statistics are cumulative averages.
  virtual void begin(const Tensor& input, double momentum) = 0;
  virtual int64_t saved_numel() = 0;
  virtual void place(void* saved, void* output) = 0;
  virtual void set_gradient(size_t place, void* gradient) = 0;
  virtual void forward() = 0;
  virtual void backward(const void* grad_output) = 0;
};

// The network that research_net_prepare or mlp_prepare made a handle of.
std::unique_ptr<StepNetwork> step_network_of(const Tensor& handle);

}  // namespace fused_mlp

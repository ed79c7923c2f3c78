// From torch's tensors to the plain structs of the kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/kernels/kernels.h"

namespace fused_mlp {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels of the instruction set chosen for this machine (isa.cpp).
const Kernels& kernels();

// The kernels' name of a dtype; raises for one they do not take.
DType dtype_of(const Tensor& tensor);

// The dtype that the kernels call so.
ScalarType scalar_type_of(DType dtype);

// The bytes of an element of one of these dtypes.
int64_t size_of(ScalarType dtype);

// float64 for float64, float32 for the others: the dtype of sums and statistics.
ScalarType accumulate_type(const Tensor& tensor);

// An uninitialized contiguous CPU tensor. Straight to the allocator: the dispatcher's empty costs
// 0.4 us more.
Tensor new_empty_cpu(IntHeaderOnlyArrayRef sizes, ScalarType dtype);

// New tensors that an op gives back as a list. Torch is given the handles themselves: a vector of
// Tensor counts one reference more for each and takes it back, 0.6 us for the gradients of a
// network.
class NewTensors {
 public:
  explicit NewTensors(size_t most) { handles_.reserve(most); }
  NewTensors(const NewTensors&) = delete;
  NewTensors& operator=(const NewTensors&) = delete;
  ~NewTensors();

  // Adds an uninitialized tensor and returns its elements.
  void* add(IntHeaderOnlyArrayRef sizes, ScalarType dtype);
  // What an op returns for Tensor[]; nothing is left here.
  StableIValue release();

 private:
  std::vector<AtenTensorHandle> handles_;
};

// The sizes of a tensor, as a copy.
std::vector<int64_t> sizes_of(const Tensor& tensor);

// The elements of a tensor that kernels read. Raises where its storage was emptied
// (untyped_storage().resize_(0)), which ends the process in torch's own ops.
const void* elements_of(const Tensor& tensor);

// The tensor itself, or a contiguous copy.
Tensor as_contiguous(const Tensor& tensor);

// The contiguous copies that a call's pointers may lead into.
struct Copies {
  std::vector<Tensor> copies;

  // The elements of the tensor, or of a copy.
  const void* contiguous_data(const Tensor& tensor);
};

// Torch's own ops, through its dispatcher.
Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias);
Tensor permute(const Tensor& tensor, const std::vector<int64_t>& dims);
void random_(const Tensor& tensor);

// The elements of a tensor on the CPU, or null for an optional that is empty.
const void* data_of(const std::optional<Tensor>& tensor);

// One value a channel, of any stride; raises for a tensor of other sizes.
ChannelVector channels_of(const std::optional<Tensor>& tensor, int64_t channels, const char* name);

// The two numbers of a seed, or null.
const int64_t* seed_of(const std::optional<Tensor>& seed);

// Draws a seed as draw_seed in fused_mlp/dropout.py does.
constexpr size_t kSeedBytes = 2 * sizeof(int64_t);
void draw_seed(int64_t* seed);

// `numel` elements of float32 or float64 and a seed behind them, at a multiple of 8 bytes.
inline int64_t with_seed(int64_t numel, ScalarType dtype) {
  const int64_t word = 8 / size_of(dtype);
  return (numel + word - 1) / word * word + 2 * word;
}

// The seed at the end of the first `numel` elements of `saved`, behind what the kernels keep.
int64_t* seed_in(const Tensor& saved, int64_t numel);

// Zeros behind them: two equal calls keep equal bytes.
void clear_behind(const Tensor& saved, int64_t numel);

// A dropout layer from an op's arguments.
Dropout dropout_of(double p, const std::optional<Tensor>& seed, uint32_t stream);

// A batch norm with this activation and the scale of this dropout; nothing else of it is set.
BatchNormAct batch_norm_of(const ActDropout& act);

// The activation of a number from 0 to `last`; raises for others.
Activation activation_of(int64_t number, Activation last = Activation::kTanh);

// The address of the counter, or null.
int64_t* counter_of(const std::optional<Tensor>& num_batches_tracked);

}  // namespace fused_mlp

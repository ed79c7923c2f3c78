// Chains of Linear layers in bfloat16, one layer after the other in one call.

#include "cpu/kernels/bfloat16/gemm.h"
#include "cpu/kernels/kernels.h"
#include "cpu/parallel.h"

namespace fused_mlp::FUSED_MLP_ISA {

void linear_act_bfloat16(const LinearAct&);
void linear_act_bfloat16_backward(const LinearActBackward&);

namespace {

// Room for what goes from layer to layer: two of the widest, in turns.
class Rooms {
 public:
  explicit Rooms(int64_t numel) : stride_(numel), memory_(2 * numel) {}
  BFloat16* of(int layer) const { return memory_.data() + layer % 2 * stride_; }

 private:
  int64_t stride_;
  Temporary<BFloat16> memory_;
};

}  // namespace

void mlp_bfloat16(const LinearAct* chain, int layers) {
  int64_t widest = 0;
  for (int l = 0; l + 1 < layers; ++l) {
    if (chain[l].output == nullptr) widest = larger(widest, chain[l].out_features);
  }
  const Rooms rooms(chain[0].rows * widest);
  const void* input = chain[0].input;
  for (int l = 0; l < layers; ++l) {
    LinearAct layer = chain[l];
    layer.input = input;
    if (layer.output == nullptr) layer.output = rooms.of(l);
    linear_act_bfloat16(layer);
    input = layer.output;
  }
}

void mlp_bfloat16_backward(const LinearActBackward* chain, int layers) {
  int64_t widest = 0;
  for (int l = 1; l < layers; ++l) widest = larger(widest, chain[l].forward.in_features);
  const Rooms rooms(chain[0].forward.rows * widest);
  const void* grad = chain[layers - 1].grad_output;
  for (int l = layers - 1; l >= 0; --l) {
    LinearActBackward layer = chain[l];
    layer.grad_output = grad;
    if (l > 0) layer.grad_input = rooms.of(l);
    linear_act_bfloat16_backward(layer);
    grad = layer.grad_input;
  }
}

}  // namespace fused_mlp::FUSED_MLP_ISA

// What the files of linear_act and the chains of mlp.cpp share.
#pragma once

#include "cpu/kernels/batch_norm.h"
#include "cpu/kernels/gemm.h"

namespace fused_mlp::FUSED_MLP_ISA {

// Elements for the coefficients of a batch norm, if there is one.
template <class T>
int64_t norm_room(const EvaluatedNorm& norm, int64_t channels) {
  return norm.active() ? 3 * round_up(channels, kPanel<T>) : 0;
}

// The batch norm behind a product.
template <class T>
class Norm {
 public:
  // `bias` is the product's where it can still be changed, else null.
  Norm(const EvaluatedNorm& norm, int64_t channels, T* arrays, T* bias) : active_(norm.active()) {
    if (active_)
      affine_ = evaluated<T>(norm, channels, round_up(channels, kPanel<T>), arrays, bias);
  }
  const Affine<T>* get() const { return active_ ? &affine_ : nullptr; }

 private:
  bool active_;
  Affine<T> affine_{};
};

// The rows of `matrix` from one on; null stays null.
template <class S>
const S* rows_from(const void* matrix, int64_t row, int64_t columns) {
  return matrix ? static_cast<const S*>(matrix) + row * columns : nullptr;
}

// Weights beyond the cache, in float32 and float64.
void linear_act_wide(const LinearAct& op);
void linear_act_wide_backward(const LinearActBackward& op);

// bfloat16 and float16.
void linear_act_half(const LinearAct& op);
void linear_act_half_backward(const LinearActBackward& op);

}  // namespace fused_mlp::FUSED_MLP_ISA

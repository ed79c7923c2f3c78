// The activations of linear_act: value and gradient of a vector, and the passes over a block that
// stand before and after a product.
#pragma once

#include "cpu/kernels/batch_norm.h"
#include "cpu/kernels/dropout.h"
#include "cpu/kernels/elementary.h"
#include "cpu/kernels/gelu.h"
#include "cpu/kernels/kernels.h"

namespace fused_mlp::FUSED_MLP_ISA {

// value(x) and gradient(grad, kept): `kept` is the output for ReLU, LeakyReLU and tanh (for the
// first two what they saw does as well), what the activation saw for GELU and SiLU. Formulas are
// torch's, so that infinities and NaN go the same ways.
template <class T, Activation kActivation>
struct Act {
  Vec<T> slope;

  FUSED_MLP_INLINE Vec<T> value(Vec<T> x) const {
    if constexpr (kActivation == Activation::kReLU) {
      return relu<T>(x);
    } else if constexpr (kActivation == Activation::kLeakyReLU) {
      return leaky_relu<T>(x, slope);
    } else if constexpr (kActivation == Activation::kGELU) {
      return x * gelu_share<T>(x);
    } else if constexpr (kActivation == Activation::kGELUTanh) {
      return x * gelu_tanh_share<T>(x);
    } else if constexpr (kActivation == Activation::kSiLU) {
      return x / (T(1) + exp<T>(-x));
    } else if constexpr (kActivation == Activation::kTanh) {
      return tanh<T>(x);
    } else {
      return x;
    }
  }

  FUSED_MLP_INLINE Vec<T> gradient(Vec<T> grad, Vec<T> kept) const {
    if constexpr (kActivation == Activation::kReLU) {
      return select<T>(kept <= Vec<T>{}, Vec<T>{}, grad);
    } else if constexpr (kActivation == Activation::kLeakyReLU) {
      return select<T>(kept > Vec<T>{}, grad, grad * slope);
    } else if constexpr (kActivation == Activation::kGELU) {
      return grad * gelu_slope<T>(kept);
    } else if constexpr (kActivation == Activation::kGELUTanh) {
      return grad * gelu_tanh_slope<T>(kept);
    } else if constexpr (kActivation == Activation::kSiLU) {
      const Vec<T> share = T(1) / (T(1) + exp<T>(-kept));
      return grad * share * (T(1) + kept * (T(1) - share));
    } else if constexpr (kActivation == Activation::kTanh) {
      return grad * (T(1) - kept * kept);
    } else {
      return grad;
    }
  }
};

// Room for the mask of a block.
inline int64_t mask_room(int64_t rows, int64_t columns) { return rows * mask_bytes(columns) + 64; }

// to = dropout(activation(norm(block))). The block begins at (row, column) of the result, column a
// multiple of 8; `to` may be the block. `norm` may be null. `mask` has `mask_room` bytes and is
// used with dropout alone.
template <class S>
void finish_act(const Affine<Compute<S>>* norm, const ActDropout& act, int64_t row, int64_t rows,
                int64_t column, int64_t columns, const Compute<S>* block, int64_t stride, S* to,
                int64_t leading, uint8_t* mask);

// panel = dropout(activation(norm(panel))): rows row … row + rows - 1 of the result as a transposed
// panel (panels.h). `norm` may be null. `mask` has `mask_room` bytes.
template <class T>
void finish_panel(const Affine<T>* norm, const ActDropout& act, int64_t row, int64_t rows,
                  int64_t features, T* panel, uint8_t* mask);

// to = the gradient of what the activation saw, in rows padded with zeros; it may be the gradient
// itself, of `leading` elements a row. `kept` is as Act says, in rows of `columns`, or null.
template <class S>
void gate(const ActDropout& act, int64_t row, int64_t rows, int64_t columns, const S* grad_output,
          int64_t leading, const S* kept, Compute<S>* to, int64_t stride, uint8_t* mask);

}  // namespace fused_mlp::FUSED_MLP_ISA

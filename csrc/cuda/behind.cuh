// What stands behind a product, forward and backward: batch norm of running statistics, an
// activation, dropout.
#pragma once

#include "activation.cuh"
#include "gemm.h"
#include "staging.cuh"

namespace fused_mlp::cuda {

// (x - mean) * scale + shift
template <class A>
struct Affine {
  A mean, scale, shift;
};

template <class T>
FUSED_MLP_DEVICE Affine<Acc<T>> evaluated_norm(const EvaluatedNorm& n, int64_t column) {
  using A = Acc<T>;
  const A var = load_parameter<T>(n.var, n.wide & kNormWideVar, column);
  const A rstd = A(1) / root(var + static_cast<A>(n.eps));
  return {load_parameter<T>(n.mean, n.wide & kNormWideMean, column),
          n.weight ? rstd * load_parameter<T>(n.weight, n.wide & kNormWideWeight, column) : rstd,
          n.bias ? load_parameter<T>(n.bias, n.wide & kNormWideBias, column) : A(0)};
}

template <class T, int V>
FUSED_MLP_DEVICE Pack<T, V> narrowed(const Pack<Acc<T>, V>& values) {
  Pack<T, V> pack;
#pragma unroll
  for (int j = 0; j < V; ++j) pack.at[j] = narrow<T>(values.at[j]);
  return pack;
}

// dropout(act(z)), rounded; bit j of `kept` says whether z[j] stays. A dropped NaN stays NaN, as in
// torch.
template <class T, int V, class F>
FUSED_MLP_DEVICE Pack<T, V> activated(const F& act, const Pack<Acc<T>, V>& z, uint32_t kept,
                                      Acc<T> scale) {
  Pack<T, V> y;
#pragma unroll
  for (int j = 0; j < V; ++j)
    y.at[j] = narrow<T>(act.value(z.at[j]) * (kept >> j & 1 ? scale : Acc<T>(0)));
  return y;
}

// The gradient in front of activation and dropout, from the gradient behind them and what was kept:
// a source of `stage`, from (row, column) of the whole matrix on. Column is a multiple of the
// packs' width. ReLU's output is 0 where an element was dropped, so that ReLU needs no mask.
template <class T, class F>
struct GatedMatrix {
  using A = Acc<T>;
  static constexpr bool kKeeps = F::kKind != Activation::kNone;
  static constexpr bool kMasks = F::kKind != Activation::kReLU;

  F act;
  Matrix<T> gradient, kept;
  A scale;
  Mask mask;
  int64_t row0, column0;
  bool kept_input;

  FUSED_MLP_DEVICE GatedMatrix(const F& f, const Behind& behind, const T* g, int64_t g_stride,
                               const T* seen, int64_t stride, int64_t row, int64_t column)
      : act(f),
        gradient{g + row * g_stride + column, g_stride},
        kept{kKeeps ? seen + row * stride + column : nullptr, stride},
        scale(static_cast<A>(behind.scale)),
        mask{behind.seed, kMasks ? behind.threshold : 0},
        row0(row),
        column0(column),
        kept_input(behind.kept_input != 0) {}

  FUSED_MLP_DEVICE T gate(T g, T seen, bool keep) const {
    A from = widen(seen);
    if constexpr (F::kKind == Activation::kTanh)
      if (kept_input) from = act.value(from);
    const A behind = widen(g) * (keep ? scale : A(0));
    // What ReLU selects is rounded already: rounded afterwards, the bfloat16 kernel of linear_relu
    // takes 88 registers in place of 79 on sm_80, and two blocks in place of three.
    if constexpr (F::kKind == Activation::kReLU)
      return act.gradient(A(1), from) == A(0) ? narrow<T>(A(0)) : narrow<T>(behind);
    else
      return narrow<T>(act.gradient(behind, from));
  }
  FUSED_MLP_DEVICE bool packs(int columns) const {
    return gradient.packs(columns) && (!kKeeps || kept.packs(columns));
  }
  template <int V>
  FUSED_MLP_DEVICE Pack<T, V> load(int row, int column) const {
    Pack<T, V> g = load_pack<V>(gradient.data + row * gradient.stride + column), seen = g;
    if constexpr (kKeeps) seen = load_pack<V>(kept.data + row * kept.stride + column);
    const uint32_t bits = mask.template bits<V>(row0 + row, column0 + column);
#pragma unroll
    for (int j = 0; j < V; ++j) g.at[j] = gate(g.at[j], seen.at[j], bits >> j & 1);
    return g;
  }
  FUSED_MLP_DEVICE Pack<T, kPackWidth<T>> pack(int row, int column) const {
    return load<kPackWidth<T>>(row, column);
  }
  FUSED_MLP_DEVICE T at(int row, int column) const { return load<1>(row, column).at[0]; }
};

}  // namespace fused_mlp::cuda

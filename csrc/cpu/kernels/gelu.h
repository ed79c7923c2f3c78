// GELU is x share(x); its derivative is its slope. Once with erf, once with torch's approximation
// by tanh. Both are at -x 1 less what they are at x. Infinities and NaN go the ways of torch's
// formulas, which the slopes from tables follow by adding 0 times what overflows there.
#pragma once

#include "cpu/kernels/elementary.h"
#include "cpu/kernels/lookup_tables.h"

namespace fused_mlp::FUSED_MLP_ISA {

// What the table holds of -|x|, at x.
template <class T>
FUSED_MLP_INLINE Vec<T> mirrored(const LookupTable& table, Vec<T> x) {
  const Vec<T> below = look_up(table, x);
  return select<T>(x > Vec<T>{}, T(1) - below, below);
}

template <class T>
FUSED_MLP_INLINE Vec<T> gelu_share(Vec<T> x) {
  if constexpr (kLooksUp<T>) {
    return mirrored<T>(kGeluTable, x);
  } else {
    constexpr T kRoot2 = T(0.70710678118654752440);
    return T(0.5) * (T(1) + erf<T>(x * kRoot2));
  }
}

template <class T>
FUSED_MLP_INLINE Vec<T> gelu_slope(Vec<T> x) {
  if constexpr (kLooksUp<T>) {
    return mirrored<T>(kGeluSlopeTable, x) + T(0) * x;
  } else {
    constexpr T kDensity = T(0.39894228040143267794);  // 1 / sqrt(2 pi)
    return gelu_share<T>(x) + x * (exp<T>(x * x * T(-0.5)) * kDensity);
  }
}

template <class T>
struct GeluTanh {
  static constexpr T kBeta = T(0.79788456080286535588), kKappa = T(0.044715);

  FUSED_MLP_INLINE static Vec<T> tanh_of(Vec<T> x) {
    return tanh<T>(kBeta * (x + kKappa * (x * x * x)));
  }
};

template <class T>
FUSED_MLP_INLINE Vec<T> gelu_tanh_share(Vec<T> x) {
  if constexpr (kLooksUp<T>) {
    return mirrored<T>(kGeluTanhTable, x);
  } else {
    return T(0.5) * (T(1) + GeluTanh<T>::tanh_of(x));
  }
}

template <class T>
FUSED_MLP_INLINE Vec<T> gelu_tanh_slope(Vec<T> x) {
  const Vec<T> square = x * x;
  if constexpr (kLooksUp<T>) {
    return mirrored<T>(kGeluTanhSlopeTable, x) + T(0) * square;
  } else {
    using C = GeluTanh<T>;
    const Vec<T> t = C::tanh_of(x), slope = C::kBeta * (T(1) + T(3) * C::kKappa * square);
    return T(0.5) * (T(1) + t) + T(0.5) * x * (T(1) - t * t) * slope;
  }
}

}  // namespace fused_mlp::FUSED_MLP_ISA

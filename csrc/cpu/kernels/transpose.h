// Transposing a square of vectors in registers.
#pragma once

#include <utility>

#include "cpu/kernels/vec.h"

namespace fused_mlp::FUSED_MLP_ISA {

// Interleaves the lower (or upper) halves of a and b, lane by lane.
template <bool kUpper, class T, int... kLane>
FUSED_MLP_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::integer_sequence<int, kLane...>) {
  constexpr int kFrom = kUpper ? kLanes<T> / 2 : 0;
  const Vec<Bits<T>> order = {(kFrom + kLane / 2 + (kLane % 2) * kLanes<T>)...};
  return __builtin_shuffle(a, b, order);
}

// Transposes a square of kLanes vectors: log2(kLanes) rounds of interleaving rows half a square
// apart.
template <class T>
FUSED_MLP_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  using Lanes = std::make_integer_sequence<int, kLanes<T>>;
  for (int round = 1; round < kLanes<T>; round *= 2) {
    Vec<T> next[kLanes<T>];
    for (int i = 0; i < kLanes<T> / 2; ++i) {
      next[2 * i] = interleave<false, T>(rows[i], rows[i + kLanes<T> / 2], Lanes{});
      next[2 * i + 1] = interleave<true, T>(rows[i], rows[i + kLanes<T> / 2], Lanes{});
    }
    for (int i = 0; i < kLanes<T>; ++i) rows[i] = next[i];
  }
}

}  // namespace fused_mlp::FUSED_MLP_ISA

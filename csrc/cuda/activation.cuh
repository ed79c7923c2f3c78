// What stands behind a product or a batch norm: the activations, value and derivative, in one
// table, and dropout.
#pragma once

#include "common/activation.h"
#include "common/philox.h"
#include "device.cuh"

namespace fused_mlp::cuda {

// value(x) and gradient(g, kept): `kept` is the output for ReLU, LeakyReLU and tanh (for the first
// two what they saw does as well), what the activation saw for GELU and SiLU. Formulas are torch's,
// so that infinities and NaN go the same ways.
template <class A, Activation kActivation>
struct Act {
  static constexpr Activation kKind = kActivation;
  A slope;

  FUSED_MLP_DEVICE A value(A x) const {
    if constexpr (kActivation == Activation::kReLU) {
      return x <= A(0) ? A(0) : x;
    } else if constexpr (kActivation == Activation::kLeakyReLU) {
      return x > A(0) ? x : x * slope;
    } else if constexpr (kActivation == Activation::kGELU) {
      return x * A(0.5) * (A(1) + erf(x * kRootHalf));
    } else if constexpr (kActivation == Activation::kGELUTanh) {
      return x * A(0.5) * (A(1) + tanh(kBeta * (x + kKappa * (x * x * x))));
    } else if constexpr (kActivation == Activation::kSiLU) {
      return x / (A(1) + exp(-x));
    } else if constexpr (kActivation == Activation::kTanh) {
      return tanh(x);
    } else {
      return x;
    }
  }

  FUSED_MLP_DEVICE A gradient(A g, A kept) const {
    if constexpr (kActivation == Activation::kReLU) {
      return kept <= A(0) ? A(0) : g;
    } else if constexpr (kActivation == Activation::kLeakyReLU) {
      return kept > A(0) ? g : g * slope;
    } else if constexpr (kActivation == Activation::kGELU) {
      const A share = A(0.5) * (A(1) + erf(kept * kRootHalf));
      return g * (share + kept * (exp(kept * kept * A(-0.5)) * kDensity));
    } else if constexpr (kActivation == Activation::kGELUTanh) {
      const A square = kept * kept;
      const A t = tanh(kBeta * (kept + kKappa * (kept * square)));
      const A slope_of_t = kBeta * (A(1) + A(3) * kKappa * square);
      return g * (A(0.5) * (A(1) + t) + A(0.5) * kept * (A(1) - t * t) * slope_of_t);
    } else if constexpr (kActivation == Activation::kSiLU) {
      const A share = A(1) / (A(1) + exp(-kept));
      return g * share * (A(1) + kept * (A(1) - share));
    } else if constexpr (kActivation == Activation::kTanh) {
      return g * (A(1) - kept * kept);
    } else {
      return g;
    }
  }

 private:
  static constexpr A kRootHalf = A(0.70710678118654752440);
  static constexpr A kDensity = A(0.39894228040143267794);  // of the normal distribution at 0
  static constexpr A kBeta = A(0.79788456080286535588), kKappa = A(0.044715);  // GELU by tanh
};

// Which activations a kernel knows: ReLU alone, or each. A kernel of the first kind asks nothing at
// run time; one of the second chooses once, around its loops.
struct OnlyReLU {
  static constexpr bool kAny = false;
  template <class A, class Body>
  FUSED_MLP_DEVICE static void choose(Activation, A, const Body& body) {
    body(Act<A, Activation::kReLU>{A(0)});
  }
};

struct AnyActivation {
  static constexpr bool kAny = true;
  template <class A, class Body>
  FUSED_MLP_DEVICE static void choose(Activation activation, A slope, const Body& body) {
    switch (activation) {
      case Activation::kNone:
        return body(Act<A, Activation::kNone>{slope});
      case Activation::kReLU:
        return body(Act<A, Activation::kReLU>{slope});
      case Activation::kLeakyReLU:
        return body(Act<A, Activation::kLeakyReLU>{slope});
      case Activation::kGELU:
        return body(Act<A, Activation::kGELU>{slope});
      case Activation::kGELUTanh:
        return body(Act<A, Activation::kGELUTanh>{slope});
      case Activation::kSiLU:
        return body(Act<A, Activation::kSiLU>{slope});
      case Activation::kTanh:
        return body(Act<A, Activation::kTanh>{slope});
    }
  }
};

// Whether column `word` (0 … 7) of a group of bits survives. philox::keep indexes an array, which
// the compiler keeps in local memory where the column is not known to it.
FUSED_MLP_DEVICE bool keeps(const philox::Group& bits, uint32_t word, uint32_t threshold) {
  const uint32_t low = word & 2 ? bits.words[1] : bits.words[0];
  const uint32_t high = word & 2 ? bits.words[3] : bits.words[2];
  return (((word & 4 ? high : low) >> (16 * (word & 1))) & 0xFFFFu) >= threshold;
}

// Dropout's mask over a matrix. The seed is read only where something may be dropped.
struct Mask {
  const int64_t* seed;
  uint32_t threshold;

  // Bit j: column + j of the row stays. The columns lie in one group of eight.
  template <int V>
  FUSED_MLP_DEVICE uint32_t bits(int64_t row, int64_t column) const {
    if (!threshold) return ~0u;
    const philox::Stream stream = philox::make_stream(seed[0], seed[1], 0);
    const philox::Group group = philox::draw(stream, row, static_cast<uint32_t>(column / 8));
    uint32_t kept = 0;
#pragma unroll
    for (int j = 0; j < V; ++j)
      kept |= static_cast<uint32_t>(keeps(group, column % 8 + j, threshold)) << j;
    return kept;
  }
};

}  // namespace fused_mlp::cuda

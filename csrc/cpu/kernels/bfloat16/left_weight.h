// A weight[out, in] as the left operand of panels of activations: it is read where it lies, but for
// the edges that a product would read beyond.
#pragma once

#if defined(__AMX_BF16__)
#include "cpu/kernels/bfloat16/tiles.h"
#else
#include "cpu/kernels/bfloat16/dots.h"
#endif

namespace fused_mlp::FUSED_MLP_ISA {

#if defined(__AMX_BF16__)

// The last terms of all rows, if they are fewer than a tile takes, and the last rows, if they are,
// are copied between zeros.
class LeftWeight {
 public:
  static int64_t edge_numel(int64_t in, int64_t out) {
    return tails_numel(in, out) + (out % kRowGroup ? kRowGroup * whole_terms(in) : 0);
  }

  LeftWeight() = default;
  // `edge` holds edge_numel(in, out) elements, which this fills.
  LeftWeight(const BFloat16* weight, int64_t in, int64_t out, BFloat16* edge)
      : weight_(weight), in_(in), out_(out) {
    const int64_t whole = whole_terms(in);
    if (whole < in) {
      for (int64_t row = 0; row < round_up(out, kRowGroup); ++row) {
        const __m512i terms = row < out ? load_elements(weight + row * in + whole, in - whole)
                                        : _mm512_setzero_si512();
        _mm512_storeu_si512(edge + row * kVectorElements, terms);
      }
      tails_ = edge;
    }
    if (out % kRowGroup) {
      BFloat16* bottom = edge + tails_numel(in, out);
      for (int64_t row = 0; row < kRowGroup; ++row) {
        const int64_t from = out / kRowGroup * kRowGroup + row;
        const size_t bytes = static_cast<size_t>(whole) * sizeof(BFloat16);
        if (from < out) {
          std::memcpy(bottom + row * whole, weight + from * in, bytes);
        } else {
          std::memset(bottom + row * whole, 0, bytes);
        }
      }
      bottom_ = bottom;
    }
  }

  // Two tiles' rows of features, or one where no more are left.
  struct Block {
    TileRows left[2];
    int64_t steps;
    bool high;

    template <class Ends>
    FUSED_MLP_INLINE void multiply(int vectors, const Pair* panel, const Ends& ends) const {
      alignas(64) float sums[kProductRows * kPairPanel];
      multiply_tiles(high, vectors > 1, steps, left, panel, kPairPanel, sums, kPairPanel,
                     Start::kZero);
      if (!high) std::memset(sums + kRowGroup * kPairPanel, 0, sizeof(sums) / 2);
      if (vectors > 1) {
        finish<2>(sums, ends);
      } else {
        finish<1>(sums, ends);
      }
    }

   private:
    template <int kVectors, class Ends>
    FUSED_MLP_INLINE void finish(const float* sums, const Ends& ends) const {
      for (int i = 0; i < kProductRows; i += 2) {
        Vec<float> sum[2][kVectors];
        for (int j = 0; j < kVectors; ++j) {
          const float* at = sums + i * kPairPanel + j * kLanes<float>;
          sum[0][j] = load_raw(at) + ends.start(i, j);
          sum[1][j] = load_raw(at + kPairPanel) + ends.start(i + 1, j);
        }
        ends.below(i).template finish<2, kVectors>(sum);
      }
    }
  };

  // Calls body(feature, block) for blocks of the features begin … end - 1.
  template <class Body>
  FUSED_MLP_INLINE void for_blocks(int64_t begin, int64_t end, const Body& body) const {
    for (int64_t feature = begin; feature < end; feature += kProductRows) {
      const bool high = end - feature > kRowGroup;
      body(feature, Block{{rows(feature), rows(high ? feature + kRowGroup : feature)},
                          padded_pairs(in_) / kPairGroup,
                          high});
    }
  }

 private:
  static int64_t whole_terms(int64_t in) { return in / kVectorElements * kVectorElements; }
  static int64_t tails_numel(int64_t in, int64_t out) {
    return in % kVectorElements ? round_up(out, kRowGroup) * kVectorElements : 0;
  }

  FUSED_MLP_INLINE TileRows rows(int64_t feature) const {
    const BFloat16* tail = tails_ ? tails_ + feature * kVectorElements : nullptr;
    if (feature + kRowGroup > out_) return {bottom_, whole_terms(in_), tail, kVectorElements};
    return {weight_ + feature * in_, in_, tail, kVectorElements};
  }

  const BFloat16 *weight_ = nullptr, *tails_ = nullptr, *bottom_ = nullptr;
  int64_t in_ = 0, out_ = 0;
};

#else

// A zero completes the last pair of each row.
class LeftWeight {
 public:
  static int64_t edge_numel(int64_t in, int64_t out) { return in % 2 ? (in + 1) * out : 0; }

  LeftWeight() = default;
  LeftWeight(const BFloat16* weight, int64_t in, int64_t out, BFloat16* edge)
      : weight_(weight), stride_(in), pairs_(pairs_of(in)) {
    if (in % 2 == 0) return;
    weight_ = edge;
    stride_ = in + 1;
    for (int64_t row = 0; row < out; ++row, edge += in + 1, weight += in) {
      std::memcpy(edge, weight, static_cast<size_t>(in) * sizeof(BFloat16));
      edge[in] = {0};
    }
  }

  struct Block {
    PairLeft left;
    int64_t pairs;
    int height;

    template <class Ends>
    FUSED_MLP_INLINE void multiply(int vectors, const Pair* panel, const Ends& ends) const {
      pair_tile_of<kTileRows>(height, vectors, pairs, left, panel, kPairPanel, ends);
    }
  };

  // Calls body(feature, block) for blocks of nearly the same height, whole pairs of features.
  template <class Body>
  FUSED_MLP_INLINE void for_blocks(int64_t begin, int64_t end, const Body& body) const {
    const int64_t couples = ceil_div(end - begin, 2), count = ceil_div(couples, kTileRows / 2);
    int64_t feature = begin;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t height = smaller(2 * (couples / count + (i < couples % count)), end - feature);
      body(feature, Block{rows_left(weight_ + feature * stride_, stride_), pairs_,
                          static_cast<int>(height)});
      feature += height;
    }
  }

 private:
  const BFloat16* weight_ = nullptr;
  int64_t stride_ = 0, pairs_ = 0;
};

#endif

}  // namespace fused_mlp::FUSED_MLP_ISA

// Rows of activations as transposed panels: [features][kPanel], a lane a row.
//
// A layer is then weight @ panel, and the weight is the left operand of the register tile, which is
// read where it lies: nothing is packed. An element's sum runs over its terms in order, in the runs
// of gemm.h whatever the blocks, so a row's bits depend on nothing but the row.
#pragma once

#include "cpu/kernels/batch_norm.h"
#include "cpu/kernels/blocked_gemm.h"
#include "cpu/kernels/dropout.h"
#include "cpu/kernels/transpose.h"

namespace fused_mlp::FUSED_MLP_ISA {

// rows[count, columns] into a panel; lanes behind `count` are zeros up to a whole vector.
template <class S>
void read_transposed(const S* rows, int64_t stride, int64_t count, int64_t columns,
                     Compute<S>* panel) {
  using T = Compute<S>;
  for (int64_t row = 0; row < count; row += kLanes<T>) {
    const int64_t height = smaller(kLanes<T>, count - row);
    for_vectors<T>(columns, [&](int64_t c, int width) {
      Vec<T> square[kLanes<T>];
      load_transposed(rows + row * stride + c, stride, height, width, square);
      for (int i = 0; i < width; ++i) store_raw(panel + (c + i) * kPanel<T> + row, square[i]);
    });
  }
}

// The first `count` lanes of a panel into rows[count, columns], `stride` elements apart.
template <class S>
void write_transposed(const Compute<S>* panel, int64_t count, int64_t columns, S* rows,
                      int64_t stride) {
  using T = Compute<S>;
  for (int64_t row = 0; row < count; row += kLanes<T>) {
    const int64_t height = smaller(kLanes<T>, count - row);
    for_vectors<T>(columns, [&](int64_t c, int width) {
      Vec<T> square[kLanes<T>];
      load_transposed(panel + c * kPanel<T> + row, kPanel<T>, width, kLanes<T>, square);
      for (int i = 0; i < height; ++i) {
        store_up_to(rows + (row + i) * stride + c, square[i], width);
      }
    });
  }
}

// Dropout of `features` features from first_feature (a multiple of 8) on.
template <class T>
void drop_transposed(const Dropout& dropout, int64_t first_row, int64_t rows, int64_t first_feature,
                     int64_t features, uint8_t* mask, T* panel) {
  const Vec<T> kept = splat(static_cast<T>(dropout.scale()));
  draw_mask(dropout, first_row, rows, first_feature, features, mask);
  for (int64_t row = 0; row < rows; row += kLanes<T>) {
    const int64_t height = smaller(kLanes<T>, rows - row);
    for (int64_t f = 0; f < features; f += 8) {
      alignas(64) Bits<T> of_rows[kLanes<T>] = {};
      for (int64_t i = 0; i < height; ++i) {
        of_rows[i] = mask[(row + i) * mask_bytes(features) + f / 8];
      }
      Vec<Bits<T>> bytes;
      std::memcpy(&bytes, of_rows, sizeof(bytes));
      for (int bit = 0; bit < smaller(8, features - f); ++bit) {
        T* at = panel + (f + bit) * kPanel<T> + row;
        const Vec<Bits<T>> keep = (bytes & (Bits<T>{1} << bit)) != Vec<Bits<T>>{};
        store_raw(at, load_raw(at) * select<T>(keep, kept, Vec<T>{}));
      }
    }
  }
}

// LeakyReLU of the normalized features from `first` on, of `rows` rows.
template <class T>
FUSED_MLP_INLINE void normalize_transposed(const Affine<T>& affine, int64_t rows, int64_t first,
                                           int64_t features, T slope, T* panel) {
  for (int64_t c = first; c < first + features; ++c, panel += kPanel<T>) {
    const Vec<T> mean = splat(affine.mean[c]), scale = splat(affine.scale[c]),
                 shift = splat(affine.shift[c]);
    for (int64_t row = 0; row < rows; row += kLanes<T>) {
      T* at = panel + row;
      store_raw(at, leaky_relu<T>((load_raw(at) - mean) * scale + shift, splat(slope)));
    }
  }
}

// Elements of the room that multiply_panels converts blocks of a weight in.
template <class S>
constexpr int64_t kPanelRoom =
    std::is_same_v<S, Compute<S>> ? 0 : kGemmRows * kGemmStride<Compute<S>>;

// after = weight[features, in] @ before + bias, then max(., 0) if `rectify`, of `rows` rows: panels
// of `in` features before, `stride` elements apart after. Every panel is multiplied by a block of
// the weight, whose rows are `leading` apart, before the next.
template <class S>
void multiply_panels(const S* weight, int64_t leading, const Compute<S>* bias, int64_t in,
                     int64_t features, int64_t rows, const Compute<S>* before, Compute<S>* after,
                     int64_t stride, bool rectify, Compute<S>* room) {
  using T = Compute<S>;
  constexpr bool kInPlace = std::is_same_v<S, T>;
  const bool cached = kInPlace && in <= kCacheWidth;
  const bool far = kInPlace && !cached;
  const Parts feature_parts(features,
                            cached     ? features
                            : kInPlace ? kInPlaceRows
                                       : kGemmRows,
                            far ? kInPlaceTile : kTileRows);
  const Parts depth_parts(in, kInPlace ? kInPlaceDepth<T> : kGemmWidth<T>, kTerms);
  for (int64_t i = 0; i < feature_parts.count; ++i) {
    const int64_t first = feature_parts.begin(i), height = feature_parts.length(i);
    for (int64_t part = 0; part < larger(1, depth_parts.count); ++part) {
      const int64_t k = depth_parts.begin(part), depth = depth_parts.length(part);
      Left<T> left = {room, kGemmStride<T>, 1};
      if constexpr (kInPlace) {
        left = {weight + first * leading + k, leading, 1};
      } else {
        copy_in(weight + first * leading + k, leading, height, depth, room, kGemmStride<T>);
      }
      for (int64_t row = 0, panel = 0; row < rows; row += kPanel<T>, ++panel) {
        multiply<T>(height, smaller(kPanel<T>, rows - row), depth, left,
                    packed(before + (panel * in + k) * kPanel<T>, depth),
                    after + panel * stride + first * kPanel<T>, kPanel<T>,
                    part > 0 ? Start::kAccumulate : Start::kRowBias, bias + first,
                    rectify && part + 1 >= depth_parts.count,
                    far ? Operands::kFar : Operands::kNear);
      }
    }
  }
}

}  // namespace fused_mlp::FUSED_MLP_ISA

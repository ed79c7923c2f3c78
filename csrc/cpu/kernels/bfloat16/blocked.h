// Products of any size, cut into blocks that fit a core's cache, as in blocked_gemm.h: what stands
// before and after a product is done on blocks as they enter and leave. An element's sum runs over
// its terms in order whatever the blocks, so the bits do not depend on the number of threads.
#pragma once

#include "cpu/kernels/bfloat16/gemm.h"
#include "cpu/kernels/blocked_gemm.h"
#include "cpu/kernels/dropout.h"

namespace fused_mlp::FUSED_MLP_ISA {

// Terms of a sum that are worked on at a time.
constexpr int64_t kPairTerms = 1024;
constexpr int64_t kPairStride = kPairTerms + kVectorElements;  // of a block, in elements
constexpr int64_t kResultWidth = 256;
constexpr int64_t kResultStride = kResultWidth + kLanes<float>;
// Rows that a weight's gradient sums at a time.
constexpr int64_t kPairGradRows = 256;
// The multiply-adds of a product, and what its elements cost.
FUSED_MLP_INLINE int64_t product_work(int64_t rows, int64_t terms, int64_t columns) {
  return rows * (terms * columns + kElementCost * (terms + columns));
}

// The blocks of rows of a product: they depend on the rows alone, so that statistics of blocks do.
// An even number of them, which two threads share evenly.
FUSED_MLP_INLINE Parts pair_row_parts(int64_t rows) {
  const int64_t count = ceil_div(rows, kPairRows);
  return Parts(rows, count > 1 ? ceil_div(rows, round_up(count, 2)) : kPairRows, kRowGroup);
}

// A `load` of blocks of rows in memory; zeros behind the last column up to a whole vector.
FUSED_MLP_INLINE auto load_pairs(const BFloat16* matrix, int64_t leading) {
  return [=](int64_t row, int64_t rows, int64_t column, int64_t columns, BFloat16* to,
             int64_t stride) {
    const BFloat16* from = matrix + row * leading + column;
    for (int64_t r = 0; r < rows; ++r, from += leading, to += stride) {
      for (int64_t c = 0; c < columns; c += kVectorElements) {
        _mm512_storeu_si512(to + c, load_elements(from + c, columns - c));
      }
    }
  };
}
// A `load` of blocks of rows as pairs of rows.
FUSED_MLP_INLINE auto load_row_pairs(const BFloat16* matrix, int64_t leading) {
  return [=](int64_t row, int64_t rows, int64_t column, int64_t columns, Pair* to, int64_t stride) {
    interleave_rows(matrix + row * leading + column, leading, rows, columns, to, stride);
  };
}

// Calls body(vector, row, column, width) for the vectors of a block of a result.
template <class Body>
FUSED_MLP_INLINE void for_block(const float* block, int64_t stride, int64_t rows, int64_t columns,
                                const Body& body) {
  for (int64_t row = 0; row < rows; ++row) {
    for_vectors<float>(columns, [&](int64_t c, int width) {
      body(load_raw(block + row * stride + c), row, c, width);
    });
  }
}

// ReLU and dropout of a block that begins at (row, column) of the result, rounded.
inline void store_relu_dropout(const Dropout& dropout, int64_t row, int64_t rows, int64_t column,
                               int64_t columns, const float* block, int64_t stride, BFloat16* to,
                               int64_t leading) {
  alignas(64) uint8_t mask[kPairRows * kResultWidth / 8 + 64];
  const bool drops = dropout.active();
  if (drops) draw_mask(dropout, row, rows, column, columns, mask);
  const Vec<float> kept = splat(static_cast<float>(dropout.scale()));
  for_block(block, stride, rows, columns, [&](Vec<float> y, int64_t r, int64_t c, int width) {
    y = relu<float>(y);
    if (drops) {
      const auto bits = mask_lanes<float>(mask + r * mask_bytes(columns), c);
      y *= select<float>(bits, kept, Vec<float>{});
    }
    store_sixteen(to + r * leading + c, y, width);
  });
}

// The right operand: a weight[columns, terms] if `transposed`, else a matrix[terms, columns];
// panels packed beforehand, or each when it is needed where there is one block of rows.
class PairPanels {
 public:
  PairPanels(const void* matrix, int64_t stride, int64_t terms, int64_t columns, bool transposed)
      : matrix_(static_cast<const BFloat16*>(matrix)),
        stride_(stride),
        terms_(terms),
        columns_(columns),
        transposed_(transposed) {}

  int64_t terms() const { return terms_; }
  int64_t columns() const { return columns_; }

  // Pairs that `pack_all` needs for a product of that many rows; 0 where it is not worth it.
  int64_t packed_size(int64_t rows) const {
    return pair_row_parts(rows).count > 1 ? packed_pairs_numel(terms_, columns_) : 0;
  }

  void pack_all(Pair* room) {
    const int64_t pairs = padded_pairs(terms_);
    const int64_t work = larger(1, pairs * kPairPanel * kPassCost / 8);
    parallel_for(ceil_div(columns_, kPairPanel), larger(1, kThreadWork / work),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t panel = begin; panel < end; ++panel) {
                     pack_one(panel, 0, terms_, room + panel * pairs * kPairPanel);
                   }
                 });
    packed_ = room;
  }

  // Terms first … first + terms - 1 of a panel; `room` holds them if they must be packed.
  const Pair* get(int64_t panel, int64_t first, int64_t terms, Pair* room) const {
    if (packed_) return packed_ + (panel * padded_pairs(terms_) + first / 2) * kPairPanel;
    pack_one(panel, first, terms, room);
    return room;
  }

 private:
  void pack_one(int64_t panel, int64_t first, int64_t terms, Pair* to) const {
    const int64_t column = panel * kPairPanel, width = smaller(kPairPanel, columns_ - column);
    if (transposed_) {
      pack_pairs_transposed(matrix_ + column * stride_ + first, stride_, terms, width, to);
    } else {
      pack_pairs(matrix_ + first * stride_ + column, stride_, terms, width, to);
    }
  }

  const BFloat16* matrix_;
  int64_t stride_, terms_, columns_;
  bool transposed_;
  const Pair* packed_ = nullptr;
};

// c = a @ b + bias. load(row, rows, k, terms, to, stride) fills a block of a; finish(row, rows,
// column, columns, block, stride) takes a block of c and may write into it.
template <class Load, class Finish>
void blocked_product(int64_t rows, const PairPanels& b, const float* bias, const Load& load,
                     const Finish& finish) {
  const int64_t columns = b.columns();
  if (rows == 0 || columns == 0) return;
  const Parts row_parts = pair_row_parts(rows);
  const Parts term_parts(b.terms(), kPairTerms, kVectorElements);
  int64_t width = kResultWidth;
  const int64_t threads = product_work(rows, b.terms(), columns) > kPairWork ? thread_count() : 1;
  // Narrower blocks where there are too few to keep all threads busy.
  while (width > kPairPanel && row_parts.count * ceil_div(columns, width) < 2 * threads) width /= 2;
  const Parts column_parts(columns, width, kPairPanel);
  const int64_t work = product_work(row_parts.size, larger(1, b.terms()), column_parts.size);
  const int64_t grain = larger(1, kPairWork / work);
  parallel_for(row_parts.count * column_parts.count, grain, [&](int64_t begin, int64_t end) {
    Arena own(Scratch::kTask, Arena::bytes<BFloat16>(row_parts.size * kPairStride) +
                                  Arena::bytes<float>(row_parts.size * kResultStride) +
                                  Arena::bytes<Pair>(kPairTerms / 2 * kPairPanel));
    BFloat16* left = own.take<BFloat16>(row_parts.size * kPairStride);
    float* result = own.take<float>(row_parts.size * kResultStride);
    Pair* room = own.take<Pair>(kPairTerms / 2 * kPairPanel);
    const TileConfiguration tiles;
    int64_t loaded = -1;  // the row part that `left` holds
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row_part = task / column_parts.count, column_part = task % column_parts.count;
      const int64_t row = row_parts.begin(row_part), height = row_parts.length(row_part);
      const int64_t first = column_parts.begin(column_part);
      const int64_t wide = column_parts.length(column_part);
      for (int64_t part = 0; part < larger(1, term_parts.count); ++part) {
        const int64_t k = term_parts.begin(part);
        const int64_t terms = b.terms() > 0 ? term_parts.length(part) : 0;
        const Start start = part > 0 ? Start::kAccumulate : bias ? Start::kBias : Start::kZero;
        if (term_parts.count > 1 || loaded != row_part) {
          load(row, height, k, terms, left, kPairStride);
          loaded = row_part;
        }
        for (int64_t c = 0; c < wide; c += kPairPanel) {
          const Pair* panel = b.get((first + c) / kPairPanel, k, terms, room);
          multiply_pairs(height, smaller(kPairPanel, wide - c), padded_pairs(terms),
                         rows_left(left, kPairStride), packed_pairs(panel, padded_pairs(terms)),
                         result + c, kResultStride, start, bias ? bias + first + c : nullptr);
        }
      }
      finish(row, height, first, wide, result, kResultStride);
    }
  });
}

// sums[c] += both halves of the pairs of column c.
inline void add_pair_sums(const Pair* block, int64_t stride, int64_t rows, int64_t columns,
                          float* sums) {
  for (int64_t c = 0; c < columns; c += kLanes<float>) {
    Vec<float> sum[2] = {load_raw(sums + c)};
    for (int64_t row = 0; row < rows; ++row) {
      VecU32 pairs;
      std::memcpy(&pairs, block + row * stride + c, sizeof(pairs));
      sum[0] += (Vec<float>)(pairs << 16);
      sum[1] += (Vec<float>)(pairs & 0xFFFF0000u);
    }
    store_raw(sums + c, sum[0] + sum[1]);
  }
}

// The gradient of a weight[out, in] and of its bias over all rows, times `scale`. load_grad and
// load_input(row, rows, column, columns, to, stride) fill blocks of pairs of rows; either target
// may be null.
template <class LoadGrad, class LoadInput>
void blocked_pair_grad(int64_t rows, int64_t in, int64_t out, float scale,
                       const LoadGrad& load_grad, const LoadInput& load_input, void* grad_weight,
                       void* grad_bias) {
  if ((grad_weight == nullptr && grad_bias == nullptr) || out == 0) return;
  const int64_t width = grad_weight ? in : 0;
  const int64_t threads = product_work(rows, width, out) > kPairWork ? thread_count() : 1;
  int64_t out_most = kResultWidth, in_most = kResultWidth;
  const auto tasks_of = [&] {
    return ceil_div(out, out_most) * larger(1, ceil_div(width, in_most));
  };
  while (out_most > kPairPanel &&
         (tasks_of() < threads || (tasks_of() % threads && tasks_of() < 3 * threads))) {
    if (smaller(out, out_most) > smaller(width, in_most)) {
      out_most /= 2;
    } else if (in_most > kPairPanel) {
      in_most /= 2;
    } else {
      break;
    }
  }
  const Parts out_parts(out, out_most, larger(2, kRowGroup)),
      in_parts(width, in_most, kLanes<float>);
  const int64_t in_count = larger(1, in_parts.count);
  const int64_t work = larger(1, product_work(rows, larger(1, width / in_count), out_parts.size));
  constexpr int64_t kPairs = kPairGradRows / 2;
  parallel_for(out_parts.count * in_count, larger(1, kPairWork / work),
               [&](int64_t begin, int64_t end) {
                 constexpr int64_t kStride = transposed_stride(kPairs);
                 Arena own(Scratch::kTask, Arena::bytes<float>(out_parts.size * kResultStride) +
                                               2 * Arena::bytes<Pair>(kPairs * kResultStride) +
                                               Arena::bytes<BFloat16>(out_parts.size * kStride) +
                                               Arena::bytes<float>(kResultStride) +
                                               Arena::bytes<double>(kResultStride));
                 float* sums = own.take<float>(out_parts.size * kResultStride);
                 Pair* grad = own.take<Pair>(kPairs * kResultStride);
                 Pair* input = own.take<Pair>(kPairs * kResultStride);
                 BFloat16* transposed = own.take<BFloat16>(out_parts.size * kStride);
                 float* block_bias = own.take<float>(kResultStride);
                 double* bias = own.take<double>(kResultStride);
                 const TileConfiguration tiles;
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t o = out_parts.begin(task / in_count);
                   const int64_t outs = out_parts.length(task / in_count);
                   const int64_t i = in_parts.begin(task % in_count);
                   const int64_t ins = width > 0 ? in_parts.length(task % in_count) : 0;
                   const bool sum_bias = grad_bias && task % in_count == 0;
                   for (int64_t c = 0; c < kResultStride; ++c) bias[c] = 0;
                   for (int64_t row = 0; row < rows; row += kPairGradRows) {
                     const int64_t height = smaller(kPairGradRows, rows - row);
                     load_grad(row, height, o, outs, grad, kResultStride);
                     if (sum_bias) {
                       for (int64_t c = 0; c < kResultStride; ++c) block_bias[c] = 0;
                       add_pair_sums(grad, kResultStride, pairs_of(height), outs, block_bias);
                       for (int64_t c = 0; c < outs; ++c)
                         bias[c] += static_cast<double>(block_bias[c]);
                     }
                     if (ins == 0) continue;
                     load_input(row, height, i, ins, input, kResultStride);
                     clear_padding(height, kResultWidth, kResultStride, grad);
                     clear_padding(height, kResultWidth, kResultStride, input);
                     const int64_t pairs = padded_pairs(height);
                     multiply_pairs(outs, ins, pairs,
                                    transposed_left(grad, kResultStride, pairs, outs, transposed),
                                    plain_pairs(input, kResultStride), sums, kResultStride,
                                    row == 0 ? Start::kZero : Start::kAccumulate);
                   }
                   if (sum_bias) {
                     for (int64_t c = 0; c < outs; ++c) {
                       static_cast<BFloat16*>(grad_bias)[o + c] =
                           to_bfloat16(static_cast<float>(bias[c] * static_cast<double>(scale)));
                     }
                   }
                   if (ins == 0) continue;
                   if (rows == 0)
                     std::memset(sums, 0, static_cast<size_t>(outs * kResultStride) * 4);
                   BFloat16* to = static_cast<BFloat16*>(grad_weight) + o * in + i;
                   for_block(sums, kResultStride, outs, ins,
                             [&](Vec<float> sum, int64_t r, int64_t c, int lanes) {
                               store_sixteen(to + r * in + c, sum * scale, lanes);
                             });
                 }
               });
}

}  // namespace fused_mlp::FUSED_MLP_ISA

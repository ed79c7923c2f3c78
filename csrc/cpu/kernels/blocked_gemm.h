// Matrix products beyond a core's cache, cut into blocks that fit it and multiplied as gemm.h does.
//
// Operands and results are reached through functions that load or finish one block, so what stands
// before and after a product (conversion, batch norm, gate, ReLU, dropout, statistics) is done on
// blocks that lie in the cache. An element's sum runs over its terms in order whatever the blocks,
// so the bits do not depend on the number of threads.
#pragma once

#include "cpu/kernels/chunks.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/rows.h"

namespace fused_mlp::FUSED_MLP_ISA {

// Rows of a block: whole register tiles. 112 x 256 floats of the left operand and of the result
// are 240 kB, a quarter of an L2 cache, and a panel of the right operand fills two thirds of an L1.
constexpr int64_t kGemmRows = 112 / kTileRows * kTileRows;
// Columns of a block, and terms of a sum that are worked on at a time.
template <class T>
constexpr int64_t kGemmWidth = 1024 / static_cast<int64_t>(sizeof(T));
// Rows that a weight's gradient sums at a time.
constexpr int64_t kGradRows = 128;
// A dimension of a block in memory: no power of two, so that rows fall into different cache sets.
template <class T>
constexpr int64_t kGemmStride = kGemmWidth<T> + 64 / static_cast<int64_t>(sizeof(T));

// `total` cut into equal parts of at most `most`, whole multiples of `unit` but for the last.
struct Parts {
  int64_t total, size, count;

  Parts(int64_t all, int64_t most, int64_t unit)
      : total(all),
        size(larger(unit, round_up(ceil_div(all, larger(1, ceil_div(all, most))), unit))),
        count(ceil_div(all, size)) {}
  int64_t begin(int64_t part) const { return part * size; }
  int64_t length(int64_t part) const { return smaller(size, total - part * size); }
};

// The blocks of rows of a product: they depend on the rows alone, so that statistics of blocks do.
// An even number of them, which two threads share evenly.
FUSED_MLP_INLINE Parts gemm_row_parts(int64_t rows) {
  const int64_t count = ceil_div(rows, kGemmRows);
  return Parts(rows, count > 1 ? ceil_div(rows, round_up(count, 2)) : kGemmRows, 1);
}

// A `load` of blocks of a matrix in memory, converted to the compute type.
template <class S>
FUSED_MLP_INLINE auto load_rows(const S* matrix, int64_t leading) {
  return [=](int64_t row, int64_t rows, int64_t column, int64_t columns, Compute<S>* to,
             int64_t stride) {
    copy_in(matrix + row * leading + column, leading, rows, columns, to, stride);
  };
}

// A `finish` that writes blocks into a matrix: change(value, row, column, width) of every vector.
template <class S, class Change>
FUSED_MLP_INLINE void finish_rows(const Compute<S>* block, int64_t stride, int64_t rows,
                                  int64_t columns, S* to, int64_t leading, const Change& change) {
  using T = Compute<S>;
  for (int64_t row = 0; row < rows; ++row) {
    for_vectors<T>(columns, [&](int64_t c, int width) {
      store_up_to(to + row * leading + c, change(load_raw(block + row * stride + c), row, c, width),
                  width);
    });
  }
}

// Bytes for the dropout mask of a block.
constexpr int64_t kBlockMask = kGemmRows * kGemmWidth<float> / 8 + 64;

// The right operand, `depth` x `columns`: panels packed beforehand, or each when it is needed where
// there is one block of rows and nothing gained by keeping them. It is a weight[columns, depth] if
// `transposed`, else a matrix[depth, columns].
template <class S>
class Panels {
 public:
  using T = Compute<S>;

  Panels(const S* matrix, int64_t stride, int64_t depth, int64_t columns, bool transposed)
      : matrix_(matrix),
        stride_(stride),
        depth_(depth),
        columns_(columns),
        transposed_(transposed) {}

  int64_t depth() const { return depth_; }
  int64_t columns() const { return columns_; }

  // Elements that `pack_all` needs for a product of that many rows; 0 where it is not worth it.
  int64_t packed_size(int64_t rows) const {
    return gemm_row_parts(rows).count > 1 ? packed_numel<T>(depth_, columns_) : 0;
  }

  void pack_all(T* room) {
    const int64_t work = larger(1, depth_ * kPanel<T> * kPassCost / 8);
    parallel_for(ceil_div(columns_, kPanel<T>), larger(1, kThreadWork / work),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t panel = begin; panel < end; ++panel) {
                     pack_one(panel, 0, depth_, room + panel * depth_ * kPanel<T>);
                   }
                 });
    packed_ = room;
  }

  // Rows first … first + depth - 1 of a panel; `room` holds them if they must be packed.
  const T* get(int64_t panel, int64_t first, int64_t depth, T* room) const {
    if (packed_) return packed_ + (panel * depth_ + first) * kPanel<T>;
    pack_one(panel, first, depth, room);
    return room;
  }

 private:
  void pack_one(int64_t panel, int64_t first, int64_t depth, T* to) const {
    const int64_t column = panel * kPanel<T>, width = smaller(kPanel<T>, columns_ - column);
    if (transposed_) {
      pack_transposed<T>(matrix_ + column * stride_ + first, stride_, depth, width,
                         static_cast<const T*>(nullptr), to);
    } else {
      pack<T>(matrix_ + first * stride_ + column, stride_, depth, width, to);
    }
  }

  const S* matrix_;
  int64_t stride_, depth_, columns_;
  bool transposed_;
  const T* packed_ = nullptr;
};

// c = a @ b + bias, a block at a time. load(row, rows, k, depth, to, stride) fills a block of a;
// finish(row, rows, column, columns, block, stride) takes a block of c, whose rows do not depend on
// the number of threads. `bias` is null or has whole panels.
template <class S, class Load, class Finish>
void blocked_gemm(int64_t rows, const Panels<S>& b, const Compute<S>* bias, const Load& load,
                  const Finish& finish) {
  using T = Compute<S>;
  const int64_t columns = b.columns(), stride = kGemmStride<T>;
  if (rows == 0 || columns == 0) return;
  const Parts row_parts = gemm_row_parts(rows);
  const Parts depth_parts(b.depth(), kGemmWidth<T>, kLanes<T>);
  const int64_t work = row_parts.size * larger(1, b.depth());
  int64_t width = kGemmWidth<T>;
  const int64_t threads = rows * b.depth() * columns > kThreadWork ? thread_count() : 1;
  // Narrower blocks where there are too few to keep all threads busy.
  while (width > kPanel<T> && row_parts.count * ceil_div(columns, width) < 2 * threads) width /= 2;
  const Parts column_parts(columns, width, kPanel<T>);
  const int64_t grain = larger(1, kThreadWork / (work * column_parts.size));
  parallel_for(row_parts.count * column_parts.count, grain, [&](int64_t begin, int64_t end) {
    Arena own(Scratch::kTask, 2 * Arena::bytes<T>(row_parts.size * stride) +
                                  Arena::bytes<T>(kGemmWidth<T> * kPanel<T>));
    T* left = own.take<T>(row_parts.size * stride);
    T* result = own.take<T>(row_parts.size * stride);
    T* room = own.take<T>(kGemmWidth<T> * kPanel<T>);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row_part = task / column_parts.count, column_part = task % column_parts.count;
      const int64_t row = row_parts.begin(row_part), height = row_parts.length(row_part);
      const int64_t first = column_parts.begin(column_part);
      const int64_t wide = column_parts.length(column_part);
      for (int64_t part = 0; part < larger(1, depth_parts.count); ++part) {
        const int64_t k = depth_parts.begin(part);
        const int64_t depth = b.depth() > 0 ? depth_parts.length(part) : 0;
        const Start start = part > 0 ? Start::kAccumulate : bias ? Start::kBias : Start::kZero;
        load(row, height, k, depth, left, stride);
        for (int64_t c = 0; c < wide; c += kPanel<T>) {
          const T* panel = b.get((first + c) / kPanel<T>, k, depth, room);
          multiply<T>(height, smaller(kPanel<T>, wide - c), depth, {left, stride, 1},
                      packed(panel, depth), result + c, stride, start,
                      bias ? bias + first + c : nullptr);
        }
      }
      finish(row, height, first, wide, result, stride);
    }
  });
}

// The gradient of a weight[out, in] and of its bias over all rows. load_grad and load_input(row,
// rows, column, columns, to, stride) fill blocks; either target may be null.
template <class S, class LoadGrad, class LoadInput>
void blocked_weight_grad(int64_t rows, int64_t in, int64_t out, const LoadGrad& load_grad,
                         const LoadInput& load_input, S* grad_weight, S* grad_bias) {
  using T = Compute<S>;
  if ((grad_weight == nullptr && grad_bias == nullptr) || out == 0) return;
  const int64_t stride = kGemmStride<T>;
  const int64_t width = grad_weight ? in : 0;
  const int64_t threads = rows * larger(1, width) * out > kThreadWork ? thread_count() : 1;
  int64_t out_most = kGemmWidth<T>, in_most = kGemmWidth<T>;
  const auto tasks_of = [&] {
    return ceil_div(out, out_most) * larger(1, ceil_div(width, in_most));
  };
  // Smaller blocks until there is one for every thread, and twice as many if they do not share
  // out evenly.
  while (out_most > kPanel<T> &&
         (tasks_of() < threads || (tasks_of() % threads && tasks_of() < 3 * threads))) {
    if (smaller(out, out_most) > smaller(width, in_most)) {
      out_most /= 2;
    } else if (in_most > kPanel<T>) {
      in_most /= 2;
    } else {
      break;
    }
  }
  const Parts out_parts(out, out_most, 2), in_parts(width, in_most, kLanes<T>);
  const int64_t in_count = larger(1, in_parts.count);
  const int64_t work = larger(1, rows * out_parts.size * larger(1, width / in_count));
  parallel_for(
      out_parts.count * in_count, larger(1, kThreadWork / work), [&](int64_t begin, int64_t end) {
        Arena own(Scratch::kTask, Arena::bytes<T>(out_parts.size * stride) +
                                      2 * Arena::bytes<T>(kGradRows * stride) +
                                      Arena::bytes<T>(stride) + Arena::bytes<double>(stride));
        T* sums = own.take<T>(out_parts.size * stride);
        T* grad = own.take<T>(kGradRows * stride);
        T* input = own.take<T>(kGradRows * stride);
        T* block_bias = own.take<T>(stride);
        double* bias = own.take<double>(stride);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t o = out_parts.begin(task / in_count),
                        outs = out_parts.length(task / in_count);
          const int64_t i = in_parts.begin(task % in_count);
          const int64_t ins = width > 0 ? in_parts.length(task % in_count) : 0;
          const bool sum_bias = grad_bias && task % in_count == 0;
          for (int64_t c = 0; c < stride; ++c) bias[c] = 0;
          for (int64_t row = 0; row < rows; row += kGradRows) {
            const int64_t height = smaller(kGradRows, rows - row);
            load_grad(row, height, o, outs, grad, stride);
            if (sum_bias) {
              for (int64_t c = 0; c < stride; ++c) block_bias[c] = 0;
              add_column_sums(grad, stride, height, outs, block_bias);
              for (int64_t c = 0; c < outs; ++c) bias[c] += static_cast<double>(block_bias[c]);
            }
            if (ins == 0) continue;
            load_input(row, height, i, ins, input, stride);
            multiply<T>(outs, ins, height, {grad, 1, stride}, plain(input, stride), sums, stride,
                        row == 0 ? Start::kZero : Start::kAccumulate);
          }
          if (sum_bias) {
            for (int64_t c = 0; c < outs; ++c) {
              grad_bias[o + c] = narrow<S>(static_cast<T>(bias[c]));
            }
          }
          if (ins == 0) continue;
          if (rows == 0) std::memset(sums, 0, static_cast<size_t>(outs * stride) * sizeof(T));
          copy_out(sums, stride, outs, ins, grad_weight + o * in + i, in);
        }
      });
}

}  // namespace fused_mlp::FUSED_MLP_ISA

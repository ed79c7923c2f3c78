// Matrix products beyond a core's cache, cut into blocks that fit it and multiplied as gemm.h does.
//
// Results are handed over block by block, so what stands behind a product (gate, ReLU, dropout,
// sums) is done while a block lies in the cache. An element's sum runs over its terms in order
// whatever the blocks, so the bits do not depend on the number of threads.
#pragma once

#include "cpu/kernels/chunks.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/rows.h"

namespace fused_mlp::FUSED_MLP_ISA {

// Rows of a block: whole register tiles.
constexpr int64_t kGemmRows = 112 / kTileRows * kTileRows;
// Columns of a block: whole panels.
template <class T>
constexpr int64_t kGemmWidth = round_up(1024 / static_cast<int64_t>(sizeof(T)), kPanel<T>);
// Rows that a weight's gradient sums at a time.
constexpr int64_t kGradRows = 256;
// A dimension of a block in memory: no power of two, so that rows fall into different cache sets.
template <class T>
constexpr int64_t kGemmStride = kGemmWidth<T> + 64 / static_cast<int64_t>(sizeof(T));

// A left operand beyond the cache is read where it lies, in blocks of rows and terms that fit an L2
// cache. Copying blocks of 112 x 256 to places of their own first took 10 to 25 % more, since
// nothing hides the wait for a short copy.
constexpr int64_t kInPlaceRows = 8 * kInPlaceTile;
template <class T>
constexpr int64_t kInPlaceDepth = 4096 / static_cast<int64_t>(sizeof(T));
// Rows a multiple of this apart share four sets of an L1 cache at most.
template <class T>
constexpr int64_t kFewSets = kInPlaceDepth<T> / 4;

// `total` cut into equal parts of at most `most`, whole multiples of `unit` but for the last.
struct Parts {
  int64_t total, size, count;

  Parts(int64_t all, int64_t most, int64_t unit)
      : total(all),
        size(
            larger(unit, round_up(ceil_div(all, larger(1, ceil_div(all, larger(1, most)))), unit))),
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
struct LoadRows {
  const S* matrix;
  int64_t leading;

  FUSED_MLP_INLINE void operator()(int64_t row, int64_t rows, int64_t column, int64_t columns,
                                   Compute<S>* to, int64_t stride) const {
    copy_in(matrix + row * leading + column, leading, rows, columns, to, stride);
  }
};

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

// The right operand, `depth` x `columns`: panels packed beforehand, or each when it is needed where
// there is one block of rows and nothing gained by keeping them.
template <class T>
class Panels {
 public:
  Panels(const T* matrix, int64_t stride, int64_t depth, int64_t columns)
      : matrix_(matrix), stride_(stride), depth_(depth), columns_(columns) {}

  const T* matrix() const { return matrix_; }
  int64_t stride() const { return stride_; }
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
    pack<T>(matrix_ + first * stride_ + column, stride_, depth, width, to);
  }

  const T* matrix_;
  int64_t stride_, depth_, columns_;
  const T* packed_ = nullptr;
};

// The blocks of a product's result, narrower where there are too few to keep all threads busy.
template <class T>
Parts gemm_column_parts(int64_t row_parts, int64_t columns, bool threaded) {
  int64_t width = kGemmWidth<T>;
  const int64_t threads = threaded ? thread_count() : 1;
  while (width > kPanel<T> && row_parts * ceil_div(columns, width) < 2 * threads) width /= 2;
  return Parts(columns, width, kPanel<T>);
}

// c = a @ b, a block at a time; rows of a are `leading` apart. finish(row, rows, column, columns,
// block, stride) takes a block of c, whose rows do not depend on the number of threads.
template <class T, class Finish>
void blocked_gemm(int64_t rows, const T* a, int64_t leading, const Panels<T>& b,
                  const Finish& finish) {
  const int64_t columns = b.columns(), stride = kGemmStride<T>;
  if (rows == 0 || columns == 0) return;
  const Parts row_parts = gemm_row_parts(rows);
  const Parts depth_parts(b.depth(), kInPlaceDepth<T>, kTerms);
  const int64_t work = row_parts.size * larger(1, b.depth());
  const Parts column_parts =
      gemm_column_parts<T>(row_parts.count, columns, rows * b.depth() * columns > kThreadWork);
  const int64_t grain = larger(1, kThreadWork / (work * column_parts.size));
  parallel_for(row_parts.count * column_parts.count, grain, [&](int64_t begin, int64_t end) {
    Arena own(Scratch::kTask, Arena::bytes<T>(row_parts.size * stride) +
                                  Arena::bytes<T>(kInPlaceDepth<T> * kPanel<T>));
    T* result = own.take<T>(row_parts.size * stride);
    T* room = own.take<T>(kInPlaceDepth<T> * kPanel<T>);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row_part = task / column_parts.count, column_part = task % column_parts.count;
      const int64_t row = row_parts.begin(row_part), height = row_parts.length(row_part);
      const int64_t first = column_parts.begin(column_part);
      const int64_t wide = column_parts.length(column_part);
      for (int64_t part = 0; part < larger(1, depth_parts.count); ++part) {
        const int64_t k = depth_parts.begin(part), depth = depth_parts.length(part);
        for (int64_t c = 0; c < wide; c += kPanel<T>) {
          const T* panel = b.get((first + c) / kPanel<T>, k, depth, room);
          multiply<T>(height, smaller(kPanel<T>, wide - c), depth,
                      {a + row * leading + k, leading, 1}, packed(panel, depth), result + c, stride,
                      part > 0 ? Start::kAccumulate : Start::kZero, nullptr, false, Operands::kFar);
        }
      }
      finish(row, height, first, wide, result, stride);
    }
  });
}

// The gradient of a weight[out, in] and of its bias over all rows, from the gradient of the
// product, whose rows are `leading` apart. load_input(row, rows, column, columns, to, stride) fills
// blocks of the input; either target may be null.
template <class T, class LoadInput>
void blocked_weight_grad(int64_t rows, int64_t in, int64_t out, const T* grad, int64_t leading,
                         const LoadInput& load_input, T* grad_weight, T* grad_bias) {
  if ((grad_weight == nullptr && grad_bias == nullptr) || out == 0) return;
  const int64_t stride = kGemmStride<T>;
  const int64_t width = grad_weight ? in : 0;
  const int64_t threads = rows * larger(1, width) * out > kThreadWork ? thread_count() : 1;
  // The gradient is read in place where its rows lie in whole vectors, and not in few cache sets.
  const bool in_place = leading % kLanes<T> == 0 && leading % kFewSets<T> != 0;
  // One pass over the rows needs no sums that stay in the cache; but rows of a page would share a
  // set of it.
  const bool direct = grad_weight && rows > 0 && rows <= kGradRows && in % kLanes<T> == 0 &&
                      in % kInPlaceDepth<T> != 0;
  // Larger blocks copy less of the input.
  const int64_t large = 2 * kGemmWidth<T>;
  int64_t out_most = in_place && ceil_div(out, large) % threads == 0 ? large : kGemmWidth<T>;
  int64_t in_most = kGemmWidth<T>;
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
  const int64_t tasks = out_parts.count * in_count;
  parallel_for(tasks, larger(1, kThreadWork / work), [&](int64_t begin, int64_t end) {
    Arena own(Scratch::kTask, Arena::bytes<T>(direct ? 0 : out_parts.size * stride) +
                                  2 * Arena::bytes<T>(kGradRows * stride) +
                                  Arena::bytes<T>(out_parts.size + kLanes<T>) +
                                  Arena::bytes<double>(out_parts.size));
    T* room = own.take<T>(direct ? 0 : out_parts.size * stride);
    T* copied = own.take<T>(kGradRows * stride);
    T* input = own.take<T>(kGradRows * stride);
    T* block_bias = own.take<T>(out_parts.size + kLanes<T>);
    double* bias = own.take<double>(out_parts.size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t o = out_parts.begin(task / in_count), outs = out_parts.length(task / in_count);
      const int64_t i = in_parts.begin(task % in_count);
      const int64_t ins = width > 0 ? in_parts.length(task % in_count) : 0;
      const bool sum_bias = grad_bias && task % in_count == 0;
      T* sums = direct ? grad_weight + o * in + i : room;
      const int64_t sums_stride = direct ? in : stride;
      for (int64_t c = 0; c < outs; ++c) bias[c] = 0;
      for (int64_t row = 0; row < rows; row += kGradRows) {
        const int64_t height = smaller(kGradRows, rows - row);
        const T* block = grad + row * leading + o;
        int64_t block_stride = leading;
        if (!in_place) {
          copy_in(block, leading, height, outs, copied, stride);
          block = copied;
          block_stride = stride;
        }
        if (sum_bias) {
          for (int64_t c = 0; c < outs + kLanes<T>; ++c) block_bias[c] = 0;
          add_column_sums(block, block_stride, height, outs, block_bias);
          for (int64_t c = 0; c < outs; ++c) bias[c] += static_cast<double>(block_bias[c]);
        }
        if (ins == 0) continue;
        load_input(row, height, i, ins, input, stride);
        multiply<T>(outs, ins, height, {block, 1, block_stride}, plain(input, stride), sums,
                    sums_stride, row == 0 ? Start::kZero : Start::kAccumulate);
      }
      if (sum_bias) {
        for (int64_t c = 0; c < outs; ++c) grad_bias[o + c] = static_cast<T>(bias[c]);
      }
      if (ins == 0 || direct) continue;
      if (rows == 0) std::memset(sums, 0, static_cast<size_t>(outs * stride) * sizeof(T));
      copy_out(sums, stride, outs, ins, grad_weight + o * in + i, in);
    }
  });
}

}  // namespace fused_mlp::FUSED_MLP_ISA

// Products beyond a core's cache: by torch's BLAS where that is faster (cpu/blas.h), else in
// blocks.
#pragma once

#include <limits>

#include "cpu/blas.h"
#include "cpu/kernels/activation.h"
#include "cpu/kernels/blocked_gemm.h"

namespace fused_mlp::FUSED_MLP_ISA {

// Whether BLAS can make a product of these sizes and leading dimensions, and makes large ones
// faster.
template <class... Sizes>
bool takes_blas(Sizes... sizes) {
  constexpr int64_t kMost = std::numeric_limits<int>::max() - 64;  // a row may be padded
  return ((sizes > 0 && sizes <= kMost) && ...) && blas_is_faster();
}

// Rows from which it is faster forward, where it packs the weight that our panels read in place.
constexpr int64_t kBlasForward = 256;

// Whether it makes a product with a weight of `in` by `out`, or the weight's gradient. Its threads
// wait for each other: at 64 rows (784,[512,256],10) trains in 1.4 times the time with it, and
// (17,[256,256],6) at 256; from 5 to 32 rows of 1024 features on it takes 0.75 of the time.
template <class... Sizes>
bool takes_blas_backward(int64_t rows, int64_t in, int64_t out, Sizes... strides) {
  constexpr int64_t kFew = 5, kMany = 96;
  constexpr int64_t kWide = int64_t{1} << 17, kVeryWide = int64_t{1} << 20;
  return rows >= kFew && in * out >= (rows < kMany ? kVeryWide : kWide) &&
         takes_blas(rows, in, out, strides...);
}

// ------------------------------------------------------------------------------------- forward

// A layer's operands in the compute type: weight[out, in], and a batch norm that may be null.
template <class T>
struct BlasLayer {
  int64_t in, out;
  const T* weight;
  int64_t weight_stride;
  const T* bias;
  const Affine<T>* norm;
  ActDropout act;

  bool takes_blas(int64_t rows, int64_t input_stride) const {
    return rows >= kBlasForward &&
           FUSED_MLP_ISA::takes_blas(rows, in, out, input_stride, weight_stride);
  }

  // Rows row … row + rows - 1 of dropout(activation(norm(input @ weight.T + bias))); `seen`, what
  // the activation saw, may be null. Pointers lead to the first of these rows.
  void run(int64_t row, int64_t rows, const T* input, int64_t input_stride, T* seen,
           T* output) const {
    T* product = seen ? seen : output;
    blas_multiply(rows, out, in, BlasMatrix<T>{input, input_stride},
                  BlasMatrix<T>{weight, weight_stride, true}, product, out);
    const bool bare = norm == nullptr && seen == nullptr && !act.dropout.active();
    const bool rectify = bare && act.activation == Activation::kReLU;
    const bool finished = rectify || (bare && act.activation == Activation::kNone);
    for_row_blocks(rows, out * kPassCost, [&](int64_t begin, int64_t count) {
      for_some_rows(begin, begin + count, out, [&](int64_t first, int64_t some) {
        T* block = product + first * out;
        rectify ? add_bias(block, some, relu<T>)
                : add_bias(block, some, [](Vec<T> z) { return z; });
        if (finished) return;
        Arena own(Scratch::kTask, Arena::bytes<uint8_t>(mask_room(some, out)));
        finish_act<T>(norm, act, row + first, some, 0, out, block, out, output + first * out, out,
                      own.take<uint8_t>(mask_room(some, out)));
      });
    });
  }

 private:
  template <class Change>
  void add_bias(T* block, int64_t rows, const Change& change) const {
    for (; rows > 0; --rows, block += out) {
      for_vectors<T>(out, [&](int64_t c, int width) {
        const Vec<T> z = load_up_to(block + c, width) + load_up_to(bias + c, width);
        store_up_to(block + c, change(z), width);
      });
    }
  }
};

// ------------------------------------------------------------------------------------ backward

// Elements that packing `b` for its products takes, 0 where it is not worth it.
template <class T>
int64_t packed_size(const Panels<T>& b, int64_t rows) {
  return takes_blas_backward(rows, b.columns(), b.depth()) ? 0 : b.packed_size(rows);
}

// to = finish(a @ b), in rows padded to whole vectors. finish(row, rows, column, columns, block,
// stride) turns a block of the product into one of `to`, where the block itself may lie; blocks
// have the rows of gemm_row_parts.
template <class T, class Finish>
void multiply_and_finish(int64_t rows, const T* a, int64_t leading, const Panels<T>& b, T* to,
                         const Finish& finish) {
  const int64_t columns = b.columns(), depth = b.depth(), stride = padded<T>(columns);
  if (!takes_blas_backward(rows, columns, depth, leading, b.stride())) {
    return blocked_gemm<T>(rows, a, leading, b, finish);
  }
  blas_multiply(rows, columns, depth, BlasMatrix<T>{a, leading},
                BlasMatrix<T>{b.matrix(), b.stride()}, to, stride);
  const int64_t work = rows * columns * kPassCost;
  const Parts row_parts = gemm_row_parts(rows);
  const Parts column_parts = gemm_column_parts<T>(row_parts.count, columns, work > kThreadWork);
  const int64_t tasks = row_parts.count * column_parts.count;
  parallel_for(tasks, larger(1, kThreadWork * tasks / work), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row_part = task / column_parts.count, column_part = task % column_parts.count;
      const int64_t row = row_parts.begin(row_part), column = column_parts.begin(column_part);
      finish(row, row_parts.length(row_part), column, column_parts.length(column_part),
             to + row * stride + column, stride);
    }
  });
}

// to = a @ b, in rows of their own.
template <class T>
void multiply_into(int64_t rows, const T* a, int64_t leading, const Panels<T>& b, T* to) {
  const int64_t columns = b.columns();
  if (takes_blas_backward(rows, columns, b.depth(), leading, b.stride())) {
    return blas_multiply(rows, columns, b.depth(), BlasMatrix<T>{a, leading},
                         BlasMatrix<T>{b.matrix(), b.stride()}, to, columns);
  }
  blocked_gemm<T>(rows, a, leading, b,
                  [&](int64_t row, int64_t height, int64_t column, int64_t width, const T* block,
                      int64_t stride) {
                    copy_out(block, stride, height, width, to + row * columns + column, columns);
                  });
}

// The gradient of a weight[out, in] and of its bias as blocked_weight_grad has it. BLAS reads the
// input where it lies, or all of it at once.
template <class T, class LoadInput>
void weight_grad(int64_t rows, int64_t in, int64_t out, const T* grad, int64_t leading,
                 const LoadInput& load_input, T* grad_weight, T* grad_bias) {
  constexpr bool kLies = std::is_same_v<LoadInput, LoadRows<T>>;
  int64_t stride = padded<T>(in);
  if constexpr (kLies) stride = load_input.leading;
  if (!grad_weight || !takes_blas_backward(rows, in, out, leading, stride)) {
    return blocked_weight_grad<T>(rows, in, out, grad, leading, load_input, grad_weight, grad_bias);
  }
  blocked_weight_grad<T>(rows, in, out, grad, leading, load_input, nullptr, grad_bias);
  Temporary<T> loaded(kLies ? 0 : rows * stride);
  const T* input = loaded.data();
  if constexpr (kLies) {
    input = load_input.matrix;
  } else {
    for_row_blocks(rows, in * kPassCost, [&](int64_t first, int64_t some) {
      load_input(first, some, 0, in, loaded.data() + first * stride, stride);
    });
  }
  blas_multiply(out, in, rows, BlasMatrix<T>{grad, leading, true}, BlasMatrix<T>{input, stride},
                grad_weight, in);
}

}  // namespace fused_mlp::FUSED_MLP_ISA

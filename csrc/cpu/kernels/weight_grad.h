// The gradient of a Linear's weight and bias, summed over blocks of rows in private partial sums.
#pragma once

#include "cpu/kernels/chunks.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/rows.h"

namespace fused_mlp::FUSED_MLP_ISA {

// A partial sum holds the weight's gradient, as it is or transposed, and then the bias's.
template <class T>
class WeightGrad {
 public:
  WeightGrad(int64_t in_features, int64_t out_features, bool weight_wanted = true)
      : in_(in_features),
        out_(out_features),
        weight_wanted_(weight_wanted),
        // Whole vectors along the side that wastes fewer lanes: 10 -> 64 is stored as [10, 64].
        transposed_(in_features * round_up(out_features, kLanes<T>) <
                    out_features * round_up(in_features, kLanes<T>)),
        rows_(transposed_ ? in_ : out_),
        stride_(round_up(transposed_ ? out_ : in_, 2 * kLanes<T>)) {}

  int64_t numel() const { return rows_ * stride_ + round_up(out_, kPanel<T>); }

  // Before the first block of rows, which writes the weight's sums; without rows, all are zero.
  void clear(T* sums, bool has_rows) const {
    T* from = has_rows ? bias_of(sums) : sums;
    std::memset(from, 0, static_cast<size_t>(sums + numel() - from) * sizeof(T));
  }

  // The partial sums of the bias's gradient, for passes that sum the columns of grad themselves.
  T* bias_of(T* sums) const { return sums + rows_ * stride_; }

  // sums += the column sums of grad, a block of padded rows.
  void add_bias(int64_t rows, const T* grad, int64_t grad_stride, T* sums) const {
    add_column_sums(grad, grad_stride, rows, out_, bias_of(sums));
  }

  // Whether add_weight wants the input's rows padded: else it reads past their end, or rows of a
  // power of two, 1 kB and more, fall into the same cache sets. To read (4,[64,64],2) where it lies
  // spares 6 % of backward.
  bool pads_input() const { return !transposed_ && (in_ % kLanes<T> != 0 || in_ > 8 * kLanes<T>); }

  // sums (+)= grad.T @ input; both blocks have padded rows, but for an input that needs none. The
  // first block overwrites.
  void add_weight(bool first, int64_t rows, const T* grad, int64_t grad_stride, const T* input,
                  int64_t input_stride, T* sums, Ahead ahead = {}) const {
    if (!weight_wanted_) return;
    const Start start = first ? Start::kZero : Start::kAccumulate;
    if (transposed_) {
      multiply<T>(in_, out_, rows, {input, 1, input_stride}, plain(grad, grad_stride), sums,
                  stride_, start, nullptr, false, Operands::kNear, ahead);
    } else {
      multiply<T>(out_, in_, rows, {grad, 1, grad_stride}, plain(input, input_stride), sums,
                  stride_, start, nullptr, false, Operands::kNear, ahead);
    }
  }

  // Adds the partial sums in order and writes them out; either target may be null.
  template <class S>
  void merge(T* partial, int64_t chunks, S* grad_weight, S* grad_bias) const {
    const int64_t size = numel(), columns = transposed_ ? out_ : in_;
    const auto sum = [&](int64_t i) {
      Vec<T> total = load_raw(partial + i);
      for (int64_t chunk = 1; chunk < chunks; ++chunk)
        total += load_raw(partial + chunk * size + i);
      return total;
    };
    if (grad_bias) {
      for_vectors<T>(out_, [&](int64_t c, int width) {
        store_up_to(grad_bias + c, sum(rows_ * stride_ + c), width);
      });
    }
    if (grad_weight == nullptr) return;
    const int64_t work = larger(1, kPassCost * chunks * columns);
    parallel_for(rows_, larger(1, kThreadWork / work), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for_vectors<T>(columns, [&](int64_t c, int width) {
          const Vec<T> total = sum(row * stride_ + c);
          if (transposed_) {
            store_raw(partial + row * stride_ + c, total);
          } else {
            store_up_to(grad_weight + row * in_ + c, total, width);
          }
        });
      }
    });
    for (int64_t row = 0; transposed_ && row < out_; ++row) {
      for (int64_t c = 0; c < in_; ++c) {
        grad_weight[row * in_ + c] = narrow<S>(partial[c * stride_ + row]);
      }
    }
  }

 private:
  int64_t in_, out_;
  bool weight_wanted_, transposed_;
  int64_t rows_, stride_;
};

}  // namespace fused_mlp::FUSED_MLP_ISA

// Losses with the gradient of what they judge, in one pass over the rows.

#include "cpu/kernels/chunks.h"
#include "cpu/kernels/rows.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

// An exponential costs about as much as this many multiply-adds.
constexpr int64_t kExpCost = 64;

// Calls term(begin, end), which returns the loss of these rows, for chunks of the rows and adds up
// in a fixed order.
template <class Term>
double sum_rows(int64_t rows, int64_t work, const Term& term) {
  double partial[kMaxChunks];
  const int64_t chunks = chunk_count(rows, work, kLeastRows);
  for_chunks(rows, chunks,
             [&](int64_t chunk, int64_t begin, int64_t end) { partial[chunk] = term(begin, end); });
  double total = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[chunk];
  return total;
}

// The gradient of one row, as a multiple of softmax less what the target takes; returns its loss.
template <class T>
T row_loss(const CrossEntropy& op, int64_t target, T smooth, T all_smooth, const T* x, T* grad) {
  const T* weight = static_cast<const T*>(op.weight);
  const T scale = static_cast<T>(1 / op.divisor);
  const T hard = static_cast<T>(1 - op.label_smoothing) * (weight ? weight[target] : T(1));
  T most = x[0];
  for (int64_t c = 1; c < op.columns; ++c) most = x[c] > most ? x[c] : most;
  T sum = 0;
  for (int64_t c = 0; c < op.columns; ++c) sum += grad[c] = std::exp(x[c] - most);
  const T log_sum = most + std::log(sum);
  const T factor = scale * (hard + all_smooth) / sum;
  for (int64_t c = 0; c < op.columns; ++c) grad[c] *= factor;
  grad[target] -= scale * hard;
  T loss = hard * (log_sum - x[target]);
  if (smooth == T(0)) return loss;
  for (int64_t c = 0; c < op.columns; ++c) {
    const T share = smooth * (weight ? weight[c] : T(1));
    grad[c] -= scale * share;
    loss += share * (log_sum - x[c]);
  }
  return loss;
}

template <class T>
void run(const CrossEntropy& op) {
  const T* weight = static_cast<const T*>(op.weight);
  const T smooth = static_cast<T>(op.label_smoothing / static_cast<double>(op.columns));
  T all_smooth = 0;
  for (int64_t c = 0; c < op.columns; ++c) all_smooth += smooth * (weight ? weight[c] : T(1));
  const double total = sum_rows(op.rows, op.columns * kExpCost, [&](int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t target = op.target[row * op.target_stride];
      const T* x = static_cast<const T*>(op.output) + row * op.columns;
      T* grad = static_cast<T*>(op.grad) + row * op.columns;
      if (target == op.ignore_index) {
        std::memset(grad, 0, static_cast<size_t>(op.columns) * sizeof(T));
      } else {
        sum += static_cast<double>(row_loss<T>(op, target, smooth, all_smooth, x, grad));
      }
    }
    return sum;
  });
  // Where no row counts the mean is 0 / 0, as in torch.
  *static_cast<T*>(op.loss) = static_cast<T>(total / op.divisor);
}

template <class T>
void run(const SquaredError& op) {
  const T* output = static_cast<const T*>(op.output);
  const T* target = static_cast<const T*>(op.target);
  T* grad = static_cast<T*>(op.grad);
  const T factor = static_cast<T>(2 / op.divisor);
  const double total = sum_rows(op.rows, op.columns * kPassCost, [&](int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t row = begin; row < end; ++row) {
      T squares = 0;
      for (int64_t i = row * op.columns; i < (row + 1) * op.columns; ++i) {
        const T error = output[i] - target[i];
        squares += error * error;
        grad[i] = factor * error;
      }
      sum += static_cast<double>(squares);
    }
    return sum;
  });
  *static_cast<T*>(op.loss) = static_cast<T>(total / op.divisor);
}

template <class Op>
void run_exact(const Op& op) {
  if (op.dtype == DType::kFloat64) {
    run<double>(op);
  } else {
    run<float>(op);
  }
}

}  // namespace

void cross_entropy(const CrossEntropy& op) { run_exact(op); }
void squared_error(const SquaredError& op) { run_exact(op); }

}  // namespace fused_mlp::FUSED_MLP_ISA

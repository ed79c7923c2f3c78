// The updates of torch.optim on one parameter, and what clipping gradients by their norm needs.
//
// Plain loops: the compiler makes vectors of them, square root and division included.

#include "cpu/kernels/rows.h"
#include "cpu/parallel.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

// Elements worth handing to a second thread: about 10 us of Adam, against 2 us to wake it.
constexpr int64_t kUpdateGrain = int64_t{1} << 14;
// Elements that are squared and summed in the compute type before the sum goes on in double.
constexpr int64_t kNormSpan = 4096;

// Calls body(T{}) with the type of the elements; half types have no native optimizer.
template <class Body>
void dispatch_exact(DType dtype, const Body& body) {
  if (dtype == DType::kFloat64) {
    body(double{});
  } else {
    body(float{});
  }
}

template <class T>
void update(const Sgd& op, int64_t begin, int64_t end) {
  T* __restrict parameter = static_cast<T*>(op.parameter);
  const T* __restrict gradient = static_cast<const T*>(op.gradient);
  T* __restrict buffer = static_cast<T*>(op.momentum_buffer);
  const T sign = op.maximize ? T(-1) : T(1);
  const T lr = static_cast<T>(op.lr), decay = static_cast<T>(op.weight_decay);
  const T momentum = static_cast<T>(op.momentum), keep = static_cast<T>(1 - op.dampening);
  const bool decays = op.weight_decay != 0, nesterov = op.nesterov;
  if (buffer == nullptr) {
    for (int64_t i = begin; i < end; ++i) {
      T g = sign * gradient[i];
      if (decays) g += decay * parameter[i];
      parameter[i] -= lr * g;
    }
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    T g = sign * gradient[i];
    if (decays) g += decay * parameter[i];
    const T b = momentum * buffer[i] + keep * g;
    buffer[i] = b;
    parameter[i] -= lr * (nesterov ? g + momentum * b : b);
  }
}

template <class T>
void update(const Adam& op, int64_t begin, int64_t end) {
  T* __restrict parameter = static_cast<T*>(op.parameter);
  const T* __restrict gradient = static_cast<const T*>(op.gradient);
  T* __restrict average = static_cast<T*>(op.exp_avg);
  T* __restrict square = static_cast<T*>(op.exp_avg_sq);
  T* __restrict largest = static_cast<T*>(op.max_exp_avg_sq);
  const T sign = op.maximize ? T(-1) : T(1);
  const bool decoupled = op.decoupled && op.weight_decay != 0;
  const bool decays = !op.decoupled && op.weight_decay != 0;
  const T shrink = static_cast<T>(1 - op.lr * op.weight_decay);
  const T decay = static_cast<T>(op.weight_decay);
  const T beta2 = static_cast<T>(op.beta2), new1 = static_cast<T>(1 - op.beta1),
          new2 = static_cast<T>(1 - op.beta2), eps = static_cast<T>(op.eps);
  const T step = static_cast<T>(op.lr / op.bias_correction1);
  const T root = static_cast<T>(1 / std::sqrt(op.bias_correction2));
  const auto element = [&](int64_t i, auto amsgrad) {
    T p = parameter[i], g = sign * gradient[i];
    if (decoupled) p *= shrink;
    if (decays) g += decay * p;
    const T m = average[i] + new1 * (g - average[i]);
    T v = beta2 * square[i] + new2 * g * g;
    average[i] = m;
    square[i] = v;
    if constexpr (amsgrad) {
      v = largest[i] < v || v != v ? v : largest[i];  // as torch.maximum, a NaN wins
      largest[i] = v;
    }
    parameter[i] = p - step * m / (std::sqrt(v) * root + eps);
  };
  if (largest != nullptr) {
    for (int64_t i = begin; i < end; ++i) element(i, std::true_type{});
  } else {
    for (int64_t i = begin; i < end; ++i) element(i, std::false_type{});
  }
}

template <class Op>
void update_all(const Op& op) {
  dispatch_exact(op.dtype, [&](auto element) {
    parallel_for(op.numel, kUpdateGrain,
                 [&](int64_t begin, int64_t end) { update<decltype(element)>(op, begin, end); });
  });
}

template <class T>
double sum_of_squares(const T* x, int64_t count) {
  double total = 0;
  for (; count > 0; x += kNormSpan, count -= kNormSpan) {
    Vec<T> sums[4] = {};
    int64_t turn = 0;
    for_vectors<T>(smaller(count, kNormSpan), [&](int64_t i, int width) {
      const Vec<T> v = load_up_to(x + i, width);
      sums[turn++ % 4] += v * v;
    });
    total += static_cast<double>(sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
  return total;
}

}  // namespace

void sgd(const Sgd& op) { update_all(op); }
void adam(const Adam& op) { update_all(op); }

double squared_norm(DType dtype, int64_t numel, const void* data) {
  double total = 0;
  dispatch_exact(dtype, [&](auto element) {
    total = sum_of_squares(static_cast<const decltype(element)*>(data), numel);
  });
  return total;
}

void scale(DType dtype, int64_t numel, double factor, void* data) {
  dispatch_exact(dtype, [&](auto element) {
    using T = decltype(element);
    T* x = static_cast<T*>(data);
    for (int64_t i = 0; i < numel; ++i) x[i] *= static_cast<T>(factor);
  });
}

}  // namespace fused_mlp::FUSED_MLP_ISA

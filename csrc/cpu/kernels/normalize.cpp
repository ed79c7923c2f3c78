// (x - mean) / (std + eps) over groups of values of [outer, count, inner].

#include "cpu/kernels/moments.h"
#include "cpu/kernels/stream.h"

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

double deviation(const Normalize& op, double m2) {
  const double freedom = static_cast<double>(op.count) - op.correction;
  return std::sqrt(m2 / (freedom > 0 ? freedom : 0));
}

// Fewest spans of a chunk.
constexpr int64_t kLeastSpans = 4;

// Moments of one long span, cut into chunks for the threads.
template <class S>
Moments span_moments(const S* x, int64_t count) {
  const int64_t spans = ceil_div(count, kSpan);
  const int64_t chunks = chunk_count(spans, kSpan * kPassCost, kLeastSpans);
  Moments parts[kMaxChunks];
  for_chunks(spans, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    add_span(x + begin * kSpan, smaller(end * kSpan, count) - begin * kSpan, parts[chunk]);
  });
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    parts[0].merge(parts[chunk].count, parts[chunk].mean, parts[chunk].m2);
  }
  return parts[0];
}

// Calls body(begin, length) over stretches of a group that was read once.
template <class S, class Body>
void for_spans_backwards(int64_t count, const Body& body) {
  for_rows_backwards(ceil_div(count, kSpan), kSpan * static_cast<int64_t>(sizeof(S)),
                     kSpan * kPassCost, [&](int64_t first, int64_t spans) {
                       body(first * kSpan, smaller(spans * kSpan, count - first * kSpan));
                     });
}

template <class S>
void forward_span(const S* x, int64_t count, Compute<S> mean, Compute<S> rstd, S* y,
                  bool past = false) {
  for_vectors<Compute<S>>(count, [&](int64_t c, int width) {
    store_result(y + c, (load_up_to(x + c, width) - mean) * rstd, width, past);
  });
}

template <class S>
void forward(const Normalize& op) {
  using T = Compute<S>;
  const S* x = static_cast<const S*>(op.input);
  S* y = static_cast<S*>(op.output);
  T* mean = static_cast<T*>(op.mean);
  T* std = static_cast<T*>(op.std);
  const auto finish = [&](int64_t group, double group_mean, double m2) {
    mean[group] = static_cast<T>(group_mean);
    std[group] = static_cast<T>(deviation(op, m2));
    return static_cast<T>(1 / (deviation(op, m2) + op.eps));
  };
  if (op.inner == 1 && op.outer == 1) {
    const Moments moments = span_moments(x, op.count);
    const T rstd = finish(0, op.count ? moments.mean : NAN, moments.m2);
    const bool past = goes_past_cache<S>(y, 1, op.count);
    for_spans_backwards<S>(op.count, [&](int64_t begin, int64_t length) {
      const Fence fence = {past};
      forward_span(x + begin, length, mean[0], rstd, y + begin, past);
    });
    return;
  }
  if (op.inner == 1) {
    for_row_blocks(op.outer, op.count * 2 * kPassCost, [&](int64_t first, int64_t rows) {
      for (int64_t row = first; row < first + rows; ++row) {
        Moments moments;
        add_span(x + row * op.count, op.count, moments);
        const T rstd = finish(row, op.count ? moments.mean : NAN, moments.m2);
        forward_span(x + row * op.count, op.count, mean[row], rstd, y + row * op.count);
      }
    });
    return;
  }
  const int64_t inner = op.inner;
  const Folded shape = Folded::of<T>(op.count, inner);
  const int64_t room = round_up(shape.columns, kLanes<T>);
  Arena arena(Scratch::kCall,
              2 * Arena::bytes<double>(inner) + Arena::bytes<T>(inner) + 2 * Arena::bytes<T>(room));
  double* means = arena.take<double>(inner);
  double* m2 = arena.take<double>(inner);
  T* rstd = arena.take<T>(inner);
  T* wide_mean = arena.take<T>(room);
  T* wide_rstd = arena.take<T>(room);
  for (int64_t o = 0; o < op.outer; ++o, x += op.count * inner, y += op.count * inner) {
    column_moments(x, op.count, inner, means, m2);
    for (int64_t c = 0; c < inner; ++c) {
      rstd[c] = finish(o * inner + c, op.count ? means[c] : NAN, m2[c]);
    }
    repeat(mean + o * inner, shape, wide_mean);
    repeat(rstd, shape, wide_rstd);
    const bool past = op.outer == 1 && goes_past_cache<S>(y, op.count, inner);
    for_row_blocks(shape.all_rows(), shape.columns * kPassCost, [&](int64_t first, int64_t rows) {
      const Fence fence = {past};
      for (int64_t row = first; row < first + rows; ++row) {
        for_vectors<T>(shape.width(row), [&](int64_t c, int width) {
          const int64_t i = row * shape.columns + c;
          const Vec<T> centred = load_up_to(x + i, width) - load_raw(wide_mean + c);
          store_result(y + i, centred * load_raw(wide_rstd + c), width, past);
        });
      }
    });
  }
}

// Of one group: the sums of grad and of grad * (x - mean).
struct GradSums {
  double grad = 0, grad_x = 0;
};

// dx = (grad - k2 - (x - mean) * rstd * k3) * rstd: every factor stays in float's range for any
// data.
template <class T>
struct Slopes {
  T mean, rstd, k2, k3;
};

template <class T>
FUSED_MLP_INLINE Vec<T> input_grad(Vec<T> grad, Vec<T> x, Vec<T> mean, Vec<T> rstd, Vec<T> k2,
                                   Vec<T> k3) {
  return (grad - k2 - (x - mean) * rstd * k3) * rstd;
}

template <class T>
Slopes<T> slopes(const Normalize& op, const GradSums& sums, int64_t group) {
  const double mean = static_cast<double>(static_cast<const T*>(op.mean)[group]);
  const double std = static_cast<double>(static_cast<const T*>(op.std)[group]);
  const double rstd = 1 / (std + op.eps);
  const double freedom = static_cast<double>(op.count) - op.correction;
  // std does not change where it is 0, says torch's backward of std.
  const double k3 = std == 0 ? 0 : sums.grad_x / ((freedom > 0 ? freedom : 0) * std);
  return {static_cast<T>(mean), static_cast<T>(rstd),
          static_cast<T>(sums.grad / static_cast<double>(op.count)), static_cast<T>(k3)};
}

template <class S>
GradSums span_sums(const S* x, const S* grad, int64_t count, Compute<S> mean) {
  using T = Compute<S>;
  GradSums sums;
  for (int64_t first = 0; first < count; first += kSpan) {
    Vec<T> g[2] = {}, gx[2] = {};
    int which = 0;
    for_vectors<T>(smaller(kSpan, count - first), [&](int64_t c, int width) {
      const Vec<T> value = load_up_to(grad + first + c, width);
      g[which] += value;
      gx[which] += value * (load_up_to(x + first + c, width) - mean);
      which ^= 1;
    });
    sums.grad += static_cast<double>(sum_lanes<T>(g[0] + g[1]));
    sums.grad_x += static_cast<double>(sum_lanes<T>(gx[0] + gx[1]));
  }
  return sums;
}

template <class S>
void backward_span(const S* x, const S* grad, int64_t count, const Slopes<Compute<S>>& k, S* dx,
                   bool past = false) {
  using T = Compute<S>;
  const Vec<T> mean = splat(k.mean), rstd = splat(k.rstd), k2 = splat(k.k2), k3 = splat(k.k3);
  for_vectors<T>(count, [&](int64_t c, int width) {
    store_result(
        dx + c,
        input_grad<T>(load_up_to(grad + c, width), load_up_to(x + c, width), mean, rstd, k2, k3),
        width, past);
  });
}

template <class S>
void backward_columns(const NormalizeBackward& op, int64_t o);

template <class S>
void backward(const NormalizeBackward& op) {
  using T = Compute<S>;
  const Normalize& norm = op.forward;
  const S* x = static_cast<const S*>(norm.input);
  const S* grad = static_cast<const S*>(op.grad_output);
  S* dx = static_cast<S*>(op.grad_input);
  if (norm.inner == 1 && norm.outer == 1) {
    const T mean = static_cast<const T*>(norm.mean)[0];
    const int64_t spans = ceil_div(norm.count, kSpan);
    const int64_t chunks = chunk_count(spans, kSpan * 2 * kPassCost, kLeastSpans);
    GradSums parts[kMaxChunks];
    for_chunks(spans, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
      const int64_t first = begin * kSpan;
      parts[chunk] =
          span_sums(x + first, grad + first, smaller(end * kSpan, norm.count) - first, mean);
    });
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      parts[0].grad += parts[chunk].grad;
      parts[0].grad_x += parts[chunk].grad_x;
    }
    const Slopes<T> k = slopes<T>(norm, parts[0], 0);
    const bool past = goes_past_cache<S>(dx, 1, norm.count);
    for_spans_backwards<S>(norm.count, [&](int64_t begin, int64_t length) {
      const Fence fence = {past};
      backward_span(x + begin, grad + begin, length, k, dx + begin, past);
    });
    return;
  }
  if (norm.inner == 1) {
    const int64_t count = norm.count;
    for_row_blocks(norm.outer, count * 3 * kPassCost, [&](int64_t first, int64_t rows) {
      for (int64_t row = first; row < first + rows; ++row) {
        const T mean = static_cast<const T*>(norm.mean)[row];
        const S* row_x = x + row * count;
        const S* row_grad = grad + row * count;
        const Slopes<T> k = slopes<T>(norm, span_sums(row_x, row_grad, count, mean), row);
        backward_span(row_x, row_grad, count, k, dx + row * count);
      }
    });
    return;
  }
  for (int64_t o = 0; o < norm.outer; ++o) backward_columns<S>(op, o);
}

template <class S>
void backward_columns(const NormalizeBackward& op, int64_t o) {
  using T = Compute<S>;
  const Normalize& norm = op.forward;
  const int64_t inner = norm.inner, offset = o * norm.count * inner;
  const S* x = static_cast<const S*>(norm.input) + offset;
  const S* grad = static_cast<const S*>(op.grad_output) + offset;
  S* dx = static_cast<S*>(op.grad_input) + offset;
  const Folded shape = Folded::of<T>(norm.count, inner);
  const int64_t room = round_up(shape.columns, kLanes<T>);
  Arena arena(Scratch::kCall, 4 * Arena::bytes<T>(room) + 2 * Arena::bytes<double>(inner));
  T* mean = arena.take<T>(room);
  T* rstd = arena.take<T>(room);
  T* k2 = arena.take<T>(room);
  T* k3 = arena.take<T>(room);
  double* sum = arena.take<double>(inner);
  double* sum_x = arena.take<double>(inner);
  repeat(static_cast<const T*>(norm.mean) + o * inner, shape, mean);
  column_sums<T>(
      shape,
      [&](int64_t i, int64_t c, int width) -> Terms<T> {
        const Vec<T> value = load_up_to(grad + i, width);
        return {value, value * (load_up_to(x + i, width) - load_raw(mean + c))};
      },
      sum, sum_x);
  for (int64_t c = 0; c < inner; ++c) {
    const Slopes<T> k = slopes<T>(norm, {sum[c], sum_x[c]}, o * inner + c);
    for (int64_t wide = c; wide < shape.columns; wide += inner) {
      rstd[wide] = k.rstd;
      k2[wide] = k.k2;
      k3[wide] = k.k3;
    }
  }
  const bool past = norm.outer == 1 && goes_past_cache<S>(dx, norm.count, inner);
  for_row_blocks(shape.all_rows(), shape.columns * kPassCost, [&](int64_t first, int64_t rows) {
    const Fence fence = {past};
    for (int64_t row = first; row < first + rows; ++row) {
      for_vectors<T>(shape.width(row), [&](int64_t c, int width) {
        const int64_t i = row * shape.columns + c;
        store_result(
            dx + i,
            input_grad<T>(load_up_to(grad + i, width), load_up_to(x + i, width), load_raw(mean + c),
                          load_raw(rstd + c), load_raw(k2 + c), load_raw(k3 + c)),
            width, past);
      });
    }
  });
}

}  // namespace

void normalize(const Normalize& op) {
  dispatch(op.dtype, [&](auto element) { forward<decltype(element)>(op); });
}
void normalize_backward(const NormalizeBackward& op) {
  dispatch(op.forward.dtype, [&](auto element) { backward<decltype(element)>(op); });
}

}  // namespace fused_mlp::FUSED_MLP_ISA

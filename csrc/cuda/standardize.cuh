// What standardising by columns and by rows shares: statistics, merged in a fixed order, and the
// transforms that follow from them.
#pragma once

#include "activation.cuh"
#include "standardize.h"

namespace fused_mlp::cuda::standardize {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // 16-byte packs in flight a thread

// Three sums of a backward pass: of du, of du (x - mean), and of x - mean, which would be zero if
// the mean were not rounded.
template <class A>
struct Sums {
  A du, du_x, x;
};

template <class A>
FUSED_MLP_DEVICE Sums<A> merge(const Sums<A>& a, const Sums<A>& b) {
  return {a.du + b.du, a.du_x + b.du_x, a.x + b.x};
}
using fused_mlp::cuda::merge;

// Of the thread `by` further on, and of the first, within parts of a warp of `width` threads.
template <class A>
FUSED_MLP_DEVICE Moments<A> shuffle_down(const Moments<A>& m, int by, int width) {
  return {__shfl_down_sync(~0u, m.count, by, width), __shfl_down_sync(~0u, m.mean, by, width),
          __shfl_down_sync(~0u, m.m2, by, width)};
}
template <class A>
FUSED_MLP_DEVICE Sums<A> shuffle_down(const Sums<A>& s, int by, int width) {
  return {__shfl_down_sync(~0u, s.du, by, width), __shfl_down_sync(~0u, s.du_x, by, width),
          __shfl_down_sync(~0u, s.x, by, width)};
}
template <class A>
FUSED_MLP_DEVICE Moments<A> shuffle_from_first(const Moments<A>& m, int width) {
  return {__shfl_sync(~0u, m.count, 0, width), __shfl_sync(~0u, m.mean, 0, width),
          __shfl_sync(~0u, m.m2, 0, width)};
}
template <class A>
FUSED_MLP_DEVICE Sums<A> shuffle_from_first(const Sums<A>& s, int width) {
  return {__shfl_sync(~0u, s.du, 0, width), __shfl_sync(~0u, s.du_x, 0, width),
          __shfl_sync(~0u, s.x, 0, width)};
}

// Partial results: two or three arrays, indexed by chunk and group so that readers coalesce.
template <class A>
FUSED_MLP_DEVICE void store_partial(const StandardizeParameters& p, int64_t k, int64_t total,
                                    const Moments<A>& m) {
  A* to = static_cast<A*>(p.partials);
  to[k] = m.mean;
  to[total + k] = m.m2;
}
template <class A>
FUSED_MLP_DEVICE void store_partial(const StandardizeParameters& p, int64_t k, int64_t total,
                                    const Sums<A>& s) {
  A* to = static_cast<A*>(p.partials);
  to[k] = s.du;
  to[total + k] = s.du_x;
  to[2 * total + k] = s.x;
}
template <class A>
FUSED_MLP_DEVICE void load_partial(const StandardizeParameters& p, int64_t k, int64_t total,
                                   int64_t count, Moments<A>& m) {
  const A* from = static_cast<const A*>(p.partials);
  m = {static_cast<A>(count), from[k], from[total + k]};
}
template <class A>
FUSED_MLP_DEVICE void load_partial(const StandardizeParameters& p, int64_t k, int64_t total,
                                   int64_t, Sums<A>& s) {
  const A* from = static_cast<const A*>(p.partials);
  s = {from[k], from[total + k], from[2 * total + k]};
}

// Moments of N numbers in registers.
template <int N, class A>
FUSED_MLP_DEVICE Moments<A> moments_of(const A (&x)[N]) {
  A sum = x[0];
#pragma unroll
  for (int k = 1; k < N; ++k) sum += x[k];
  const A mean = sum * (A(1) / A(N));
  A m2 = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) m2 = fused(x[k] - mean, x[k] - mean, m2);
  return {A(N), mean, m2};
}

// What stands behind the affine map. LeakyReLU serves for no activation too, with a slope of 1, and
// is all that the kernels that are not `kAny` know.
template <class A, bool kAny>
struct Ending {
  A slope;
  bool rectifies;

  FUSED_MLP_DEVICE A value(A u) const {
    if constexpr (kAny)
      if (rectifies) return Act<A, Activation::kReLU>{A(0)}.value(u);
    return Act<A, Activation::kLeakyReLU>{slope}.value(u);
  }
  FUSED_MLP_DEVICE A gradient(A g, A u) const {
    if constexpr (kAny)
      if (rectifies) return Act<A, Activation::kReLU>{A(0)}.gradient(g, u);
    return Act<A, Activation::kLeakyReLU>{slope}.gradient(g, u);
  }
};

template <class A, bool kAny>
FUSED_MLP_DEVICE Ending<A, kAny> ending_of(const StandardizeParameters& p) {
  return {p.flags & kNormalizes ? A(1) : static_cast<A>(p.slope), (p.flags & kRectifies) != 0};
}

// Dropout of V elements: nothing at all in the kernels that are not `kAny`.
template <class A, bool kAny>
struct Dropped {
  uint32_t kept;
  A scale;
  FUSED_MLP_DEVICE A operator()(int j, A value) const {
    if constexpr (kAny) return value * (kept >> j & 1 ? scale : A(0));
    return value;
  }
};

// Of elements from number `first` of a group on, or of as many groups from `group` on where
// `kAcross`. The mask's rows are those of [elements, groups], or have mask_length elements each.
template <class A, bool kAny, int V, bool kAcross>
FUSED_MLP_DEVICE Dropped<A, kAny> dropped(const StandardizeParameters& p, int64_t group,
                                          int64_t first) {
  Dropped<A, kAny> d = {~0u, A(1)};
  if constexpr (kAny) {
    d.scale = static_cast<A>(p.dropout_scale);
    if (!p.threshold) return d;
    const philox::Stream stream = philox::make_stream(p.seed[0], p.seed[1], 0);
    const int64_t length = p.mask_length, groups = p.outer * (kAcross ? p.inner : 1);
    int64_t row = first, column = group;
    if (length) {
      const int64_t set = first / length;
      row = set * groups + group;
      column = first - set * length;
    }
    philox::Group bits = {};
    int64_t drawn_row = -1, drawn_column = 0;
    d.kept = 0;
#pragma unroll 1
    for (int j = 0; j < V; ++j) {
      if (row != drawn_row || column / 8 != drawn_column) {
        drawn_row = row;
        drawn_column = column / 8;
        bits = philox::draw(stream, row, static_cast<uint32_t>(drawn_column));
      }
      d.kept |= static_cast<uint32_t>(keeps(bits, column % 8, p.threshold)) << j;
      if (kAcross == (length == 0)) {
        ++column;
        if (length && column == length) {
          column = 0;
          row += groups;
        }
      } else {
        ++row;
      }
    }
  }
  return d;
}

// y = ending((x - mean) * scale + shift) of one group. The mean is kept as a number near it (an
// element, or the rounded mean) and the rest, so that 1e4 +- 1e-2 keeps its digits.
template <class A, bool kAny>
struct Transform {
  A origin, rest, scale, shift;
  Ending<A, kAny> ending;
  FUSED_MLP_DEVICE A centred(A x) const { return (x - origin) - rest; }
  FUSED_MLP_DEVICE A pre(A x) const { return fused(centred(x), scale, shift); }
  FUSED_MLP_DEVICE A operator()(A x) const { return ending.value(pre(x)); }
};

// dx = scale * du + b * (x - mean) + c of one group.
template <class A, bool kAny>
struct Gradient {
  Transform<A, kAny> forward;
  A b, c;
  FUSED_MLP_DEVICE A du(A g, A x) const { return forward.ending.gradient(g, forward.pre(x)); }
  FUSED_MLP_DEVICE A operator()(A g, A x) const {
    return fused(forward.scale, du(g, x), fused(b, forward.centred(x), c));
  }
};

template <class T, bool kAny>
FUSED_MLP_DEVICE void set_affine(const StandardizeParameters& p, int64_t group, Acc<T> rstd,
                                 Transform<Acc<T>, kAny>& t) {
  using A = Acc<T>;
  t.scale = p.weight ? rstd * load_parameter<T>(p.weight, p.flags & kWideWeight, group) : rstd;
  t.shift = p.bias ? load_parameter<T>(p.bias, p.flags & kWideBias, group) : A(0);
}

// The group's transform from the moments of its elements less `origin`; the `writer` among the
// blocks that know them keeps the statistics and moves the running ones.
template <class T, bool kAny>
FUSED_MLP_DEVICE Transform<Acc<T>, kAny> finish_forward(const StandardizeParameters& p,
                                                        int64_t group, Acc<T> origin,
                                                        Moments<Acc<T>> m, bool writer) {
  using A = Acc<T>;
  Transform<A, kAny> t;
  t.origin = origin;
  t.rest = m.mean;
  t.ending = ending_of<A, kAny>(p);
  A deviation;
  if (p.flags & kGivenStatistics) {
    t.origin = load_parameter<T>(p.running_mean, p.flags & kWideRunningMean, group);
    t.rest = 0;
    const A var = load_parameter<T>(p.running_var, p.flags & kWideRunningVar, group);
    deviation = A(1) / root(var + static_cast<A>(p.eps));
    set_affine<T>(p, group, deviation, t);
  } else if (p.flags & kNormalizes) {
    const A freedom = m.count - static_cast<A>(p.correction);
    deviation = root(m.m2 / (freedom > A(0) ? freedom : A(0)));
    t.scale = A(1) / (deviation + static_cast<A>(p.eps));
    t.shift = 0;
  } else {
    deviation = A(1) / root(m.m2 / m.count + static_cast<A>(p.eps));
    set_affine<T>(p, group, deviation, t);
    if (writer && p.running_mean) {
      const A momentum = static_cast<A>(p.momentum);
      const A mean = load_parameter<T>(p.running_mean, p.flags & kWideRunningMean, group);
      const A var = load_parameter<T>(p.running_var, p.flags & kWideRunningVar, group);
      store_parameter<T>(p.running_mean, p.flags & kWideRunningMean, group,
                         fused(momentum, (origin + m.mean) - mean, mean));
      store_parameter<T>(
          p.running_var, p.flags & kWideRunningVar, group,
          fused(momentum, m.m2 / (m.count > A(1) ? m.count - A(1) : A(1)) - var, var));
    }
  }
  if (writer) {
    static_cast<A*>(p.mean)[group] = t.origin + t.rest;
    static_cast<A*>(p.deviation)[group] = deviation;
    if (group == 0 && p.batches_tracked && !(p.flags & kGivenStatistics)) *p.batches_tracked += 1;
  }
  return t;
}

// What the gate of the backward pass needs: the forward transform.
template <class T, bool kAny>
FUSED_MLP_DEVICE Transform<Acc<T>, kAny> reload_forward(const StandardizeParameters& p,
                                                        int64_t group) {
  using A = Acc<T>;
  Transform<A, kAny> t;
  t.origin = static_cast<const A*>(p.mean)[group];
  t.rest = 0;
  t.ending = ending_of<A, kAny>(p);
  const A deviation = static_cast<const A*>(p.deviation)[group];
  if (p.flags & kNormalizes) {
    t.scale = A(1) / (deviation + static_cast<A>(p.eps));
    t.shift = 0;
  } else {
    set_affine<T>(p, group, deviation, t);
  }
  return t;
}

template <class T, bool kAny>
FUSED_MLP_DEVICE Gradient<Acc<T>, kAny> finish_backward(const StandardizeParameters& p,
                                                        int64_t group, int64_t count,
                                                        const Transform<Acc<T>, kAny>& t,
                                                        const Sums<Acc<T>>& s, bool writer) {
  using A = Acc<T>;
  const A n = static_cast<A>(count);
  const A off = p.flags & kGivenStatistics ? A(0) : s.x / n;  // of the rounded mean
  const A du_x = s.du_x - s.du * off;
  const A deviation = static_cast<const A*>(p.deviation)[group];
  Gradient<A, kAny> d = {t, A(0), A(0)};
  if (p.flags & kNormalizes) {
    if (deviation != A(0)) {
      const A freedom = n - static_cast<A>(p.correction);
      d.b = -du_x * t.scale * t.scale / ((freedom > A(0) ? freedom : A(0)) * deviation);
    }
    d.c = -t.scale * s.du / n - d.b * off;
  } else {
    if (!(p.flags & kGivenStatistics)) {
      d.b = -t.scale * deviation * deviation * (du_x / n);
      d.c = -t.scale * s.du / n - d.b * off;
    }
    if (writer && p.grad_weight)
      store_parameter<T>(p.grad_weight, p.flags & kWideWeight, group, du_x * deviation);
    if (writer && p.grad_bias) store_parameter<T>(p.grad_bias, p.flags & kWideBias, group, s.du);
  }
  return d;
}

}  // namespace fused_mlp::cuda::standardize

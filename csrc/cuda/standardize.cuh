// What standardising by columns and by rows shares: statistics, merged in a fixed order, and the
// transforms that follow from them.
#pragma once

#include "device.cuh"
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

// y = act((x - mean) * scale + shift) of one group. The mean is kept as a number near it (an
// element, or the rounded mean) and the rest, so that 1e4 +- 1e-2 keeps its digits.
template <class A>
struct Transform {
  A origin, rest, scale, shift, slope;
  FUSED_MLP_DEVICE A centred(A x) const { return (x - origin) - rest; }
  FUSED_MLP_DEVICE A pre(A x) const { return fused(centred(x), scale, shift); }
  FUSED_MLP_DEVICE A operator()(A x) const {
    const A u = pre(x);
    return u > A(0) ? u : u * slope;
  }
};

// dx = scale * du + b * (x - mean) + c of one group.
template <class A>
struct Gradient {
  Transform<A> forward;
  A b, c;
  FUSED_MLP_DEVICE A du(A g, A x) const { return forward.pre(x) > A(0) ? g : g * forward.slope; }
  FUSED_MLP_DEVICE A operator()(A g, A x) const {
    return fused(forward.scale, du(g, x), fused(b, forward.centred(x), c));
  }
};

// LeakyReLU's slope; 1 for normalize, which has none. The same for every group.
template <class A>
FUSED_MLP_DEVICE A slope_of(const StandardizeParameters& p) {
  return p.flags & kNormalizes ? A(1) : static_cast<A>(p.slope);
}

template <class T>
FUSED_MLP_DEVICE void set_affine(const StandardizeParameters& p, int64_t group, Acc<T> rstd,
                                 Transform<Acc<T>>& t) {
  using A = Acc<T>;
  t.scale = p.weight ? rstd * load_parameter<T>(p.weight, p.flags & kWideWeight, group) : rstd;
  t.shift = p.bias ? load_parameter<T>(p.bias, p.flags & kWideBias, group) : A(0);
}

// The group's transform from the moments of its elements less `origin`; the `writer` among the
// blocks that know them keeps the statistics and moves the running ones.
template <class T>
FUSED_MLP_DEVICE Transform<Acc<T>> finish_forward(const StandardizeParameters& p, int64_t group,
                                                  Acc<T> origin, Moments<Acc<T>> m, bool writer) {
  using A = Acc<T>;
  Transform<A> t;
  t.origin = origin;
  t.rest = m.mean;
  t.slope = slope_of<A>(p);
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
template <class T>
FUSED_MLP_DEVICE Transform<Acc<T>> reload_forward(const StandardizeParameters& p, int64_t group) {
  using A = Acc<T>;
  Transform<A> t;
  t.origin = static_cast<const A*>(p.mean)[group];
  t.rest = 0;
  t.slope = slope_of<A>(p);
  const A deviation = static_cast<const A*>(p.deviation)[group];
  if (p.flags & kNormalizes) {
    t.scale = A(1) / (deviation + static_cast<A>(p.eps));
    t.shift = 0;
  } else {
    set_affine<T>(p, group, deviation, t);
  }
  return t;
}

template <class T>
FUSED_MLP_DEVICE Gradient<Acc<T>> finish_backward(const StandardizeParameters& p, int64_t group,
                                                  int64_t count, const Transform<Acc<T>>& t,
                                                  const Sums<Acc<T>>& s, bool writer) {
  using A = Acc<T>;
  const A n = static_cast<A>(count);
  const A off = p.flags & kGivenStatistics ? A(0) : s.x / n;  // of the rounded mean
  const A du_x = s.du_x - s.du * off;
  const A deviation = static_cast<const A*>(p.deviation)[group];
  Gradient<A> d = {t, A(0), A(0)};
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

// Device code of standardize.cu. Statistics are Welford moments, merged in a fixed order.
#pragma once

#include "device.cuh"
#include "standardize.h"

namespace fused_mlp::cuda::standardize {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // packs in flight a thread

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

template <class A>
FUSED_MLP_DEVICE Moments<A> shuffle_down(const Moments<A>& m, int by) {
  return {__shfl_down_sync(~0u, m.count, by), __shfl_down_sync(~0u, m.mean, by),
          __shfl_down_sync(~0u, m.m2, by)};
}
template <class A>
FUSED_MLP_DEVICE Sums<A> shuffle_down(const Sums<A>& s, int by) {
  return {__shfl_down_sync(~0u, s.du, by), __shfl_down_sync(~0u, s.du_x, by),
          __shfl_down_sync(~0u, s.x, by)};
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

// dx = a * du + b * (x - mean) + c of one group.
template <class A>
struct Gradient {
  Transform<A> forward;
  A a, b, c;
  FUSED_MLP_DEVICE A du(A g, A x) const { return forward.pre(x) > A(0) ? g : g * forward.slope; }
  FUSED_MLP_DEVICE A operator()(A g, A x) const {
    return fused(a, du(g, x), fused(b, forward.centred(x), c));
  }
};

template <class T>
FUSED_MLP_DEVICE void set_affine(const StandardizeParameters& p, int64_t group, Acc<T> rstd,
                                 Transform<Acc<T>>& t) {
  using A = Acc<T>;
  t.scale = p.weight ? rstd * load_parameter<T>(p.weight, p.flags & kWideWeight, group) : rstd;
  t.shift = p.bias ? load_parameter<T>(p.bias, p.flags & kWideBias, group) : A(0);
  t.slope = static_cast<A>(p.slope);
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
    t.slope = 1;
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
  const A deviation = static_cast<const A*>(p.deviation)[group];
  if (p.flags & kNormalizes) {
    t.scale = A(1) / (deviation + static_cast<A>(p.eps));
    t.shift = 0;
    t.slope = 1;
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
  Gradient<A> d = {t, t.scale, A(0), A(0)};
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

// ---------------------------------------------------------------- columns
// Threads form rows of `lanes` threads; a thread owns V neighbouring columns and strides over rows.
template <class T, int V>
struct ColumnBlock {
  int lane, row, rows_at_once;
  int64_t chunk, slab, column, group, groups;
  bool active;

  FUSED_MLP_DEVICE explicit ColumnBlock(const StandardizeParameters& p) {
    const int tile = p.lanes * V;
    const int64_t tiles = (p.inner + tile - 1) / tile;
    lane = threadIdx.x % p.lanes;
    row = threadIdx.x / p.lanes;
    rows_at_once = kThreads / p.lanes;
    chunk = blockIdx.x % p.chunks;
    const int64_t rest = blockIdx.x / p.chunks;
    slab = rest / tiles;
    column = (rest % tiles) * tile + static_cast<int64_t>(lane) * V;
    active = column < p.inner;
    group = slab * p.inner + column;
    groups = p.outer * p.inner;
  }

  FUSED_MLP_DEVICE int64_t first(const StandardizeParameters& p) const {
    return chunk * p.per_chunk;
  }
  FUSED_MLP_DEVICE int64_t last(const StandardizeParameters& p) const {
    const int64_t end = (chunk + 1) * p.per_chunk;
    return end < p.middle ? end : p.middle;
  }

  // Merges the rows of threads: every thread ends with the block's statistic of its columns.
  template <class S>
  FUSED_MLP_DEVICE void merge_rows(const StandardizeParameters& p, S (&s)[V]) const {
    __shared__ S shared[V][kThreads];  // neighbouring threads in neighbouring banks
#pragma unroll
    for (int j = 0; j < V; ++j) shared[j][threadIdx.x] = s[j];
    for (int half = rows_at_once / 2; half > 0; half /= 2) {
      __syncthreads();
      if (row < half) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          s[j] = merge(s[j], shared[j][threadIdx.x + half * p.lanes]);
          shared[j][threadIdx.x] = s[j];
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < V; ++j) s[j] = shared[j][lane];
  }

  // Chunk by chunk in the order of chunks, then rows of threads as a tree.
  template <class S>
  FUSED_MLP_DEVICE void merge_partials(const StandardizeParameters& p, S (&s)[V]) const {
    const int64_t total = p.chunks * groups;
    if (active) {
      for (int64_t k = row; k < p.chunks; k += rows_at_once) {
        const int64_t begin = k * p.per_chunk;
        const int64_t count =
            (begin + p.per_chunk < p.middle ? begin + p.per_chunk : p.middle) - begin;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          S other;
          load_partial(p, k * groups + group + j, total, count, other);
          s[j] = merge(s[j], other);
        }
      }
    }
    merge_rows(p, s);
  }

  template <class S>
  FUSED_MLP_DEVICE void store_partials(const StandardizeParameters& p, const S (&s)[V]) const {
    if (!active || row != 0) return;
#pragma unroll
    for (int j = 0; j < V; ++j)
      store_partial(p, chunk * groups + group + j, p.chunks * groups, s[j]);
  }
};

template <class T, int V>
FUSED_MLP_DEVICE void columns_forward(const StandardizeParameters& p) {
  using A = Acc<T>;
  const ColumnBlock<T, V> at(p);
  const int step = at.rows_at_once;
  const int64_t last = at.last(p);
  const T* x = static_cast<const T*>(p.x) + at.slab * p.x_outer + at.column;
  T* y = static_cast<T*>(p.y) + at.slab * p.y_outer + at.column;
  Moments<A> m[V] = {};
  A origin[V] = {};
  if (at.active && !(p.flags & kGivenStatistics)) {
    const Pack<T, V> first = load_pack<V>(x);
#pragma unroll
    for (int j = 0; j < V; ++j) origin[j] = widen(first.at[j]);
  }
  if (p.phase & kMeasure) {
    if (at.active) {
      int64_t r = at.first(p) + at.row;
      for (; r + (kUnroll - 1) * step < last; r += kUnroll * step) {
        Pack<T, V> pack[kUnroll];
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) pack[k] = load_pack<V>(x + (r + k * step) * p.x_middle);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          A values[kUnroll];
#pragma unroll
          for (int k = 0; k < kUnroll; ++k) values[k] = widen(pack[k].at[j]) - origin[j];
          m[j] = merge(m[j], moments_of(values));
        }
      }
      for (; r < last; r += step) {
        const Pack<T, V> pack = load_pack<V>(x + r * p.x_middle);
#pragma unroll
        for (int j = 0; j < V; ++j) m[j] = merge(m[j], {A(1), widen(pack.at[j]) - origin[j], A(0)});
      }
    }
    at.merge_rows(p, m);
    if (!(p.phase & kApply)) return at.store_partials(p, m);
  } else if (!(p.flags & kGivenStatistics)) {
    at.merge_partials(p, m);
  }
  if (!at.active) return;
  Transform<A> transform[V];
#pragma unroll
  for (int j = 0; j < V; ++j)
    transform[j] =
        finish_forward<T>(p, at.group + j, origin[j], m[j], at.chunk == 0 && at.row == 0);
  int64_t r = at.first(p) + at.row;
  for (; r < last; r += kUnroll * step) {
    Pack<T, V> pack[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      if (r + k * step < last) pack[k] = load_pack<V>(x + (r + k * step) * p.x_middle);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (r + k * step >= last) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) pack[k].at[j] = narrow<T>(transform[j](widen(pack[k].at[j])));
      store_pack<V>(y + (r + k * step) * p.y_middle, pack[k]);
    }
  }
}

template <class T, int V>
FUSED_MLP_DEVICE void columns_backward(const StandardizeParameters& p) {
  using A = Acc<T>;
  constexpr int kRows = kUnroll / 2;  // two tensors are read
  const ColumnBlock<T, V> at(p);
  const int step = at.rows_at_once;
  const int64_t last = at.last(p);
  const T* x = static_cast<const T*>(p.x) + at.slab * p.x_outer + at.column;
  const T* g = static_cast<const T*>(p.g) + at.slab * p.g_outer + at.column;
  T* y = static_cast<T*>(p.y) + at.slab * p.y_outer + at.column;
  Sums<A> s[V] = {};
  Gradient<A> gradient[V] = {};
  if (at.active) {
#pragma unroll
    for (int j = 0; j < V; ++j) gradient[j].forward = reload_forward<T>(p, at.group + j);
  }
  if (p.phase & kMeasure) {
    if (at.active) {
      for (int64_t r = at.first(p) + at.row; r < last; r += kRows * step) {
        Pack<T, V> xs[kRows], gs[kRows];
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          if (r + k * step >= last) continue;
          xs[k] = load_pack<V>(x + (r + k * step) * p.x_middle);
          gs[k] = load_pack<V>(g + (r + k * step) * p.g_middle);
        }
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          if (r + k * step >= last) continue;
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const A value = widen(xs[k].at[j]);
            const A du = gradient[j].du(widen(gs[k].at[j]), value);
            const A centred = gradient[j].forward.centred(value);
            s[j] = {s[j].du + du, fused(du, centred, s[j].du_x), s[j].x + centred};
          }
        }
      }
    }
    at.merge_rows(p, s);
    if (!(p.phase & kApply)) return at.store_partials(p, s);
  } else if (p.partials) {
    at.merge_partials(p, s);
  }
  if (!at.active) return;
#pragma unroll
  for (int j = 0; j < V; ++j)
    gradient[j] = finish_backward<T>(p, at.group + j, p.middle, gradient[j].forward, s[j],
                                     at.chunk == 0 && at.row == 0);
  if (!p.y) return;
  for (int64_t r = at.first(p) + at.row; r < last; r += kRows * step) {
    Pack<T, V> xs[kRows], gs[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (r + k * step >= last) continue;
      xs[k] = load_pack<V>(x + (r + k * step) * p.x_middle);
      gs[k] = load_pack<V>(g + (r + k * step) * p.g_middle);
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (r + k * step >= last) continue;
#pragma unroll
      for (int j = 0; j < V; ++j)
        xs[k].at[j] = narrow<T>(gradient[j](widen(gs[k].at[j]), widen(xs[k].at[j])));
      store_pack<V>(y + (r + k * step) * p.y_middle, xs[k]);
    }
  }
}

// ---------------------------------------------------------------- rows
// A block walks a range of one group's elements, 16 bytes a thread where x is aligned, with single
// elements before and after.
template <class T>
struct RowBlock {
  int64_t chunk, group, first, last;

  FUSED_MLP_DEVICE explicit RowBlock(const StandardizeParameters& p) {
    chunk = blockIdx.x % p.chunks;
    group = blockIdx.x / p.chunks;
    const int64_t count = p.middle * p.inner;
    first = chunk * p.per_chunk;
    last = first + p.per_chunk < count ? first + p.per_chunk : count;
  }

  // Calls body.template visit<V, K>(segment, i, step) for K packs of V elements at i, i + step, …
  template <class Body>
  FUSED_MLP_DEVICE void walk(const StandardizeParameters& p, const T* x, Body& body) const {
    constexpr int V = kPackWidth<T>;
    const int threads = blockDim.x, thread = threadIdx.x;
    if (p.inner < 2 * V * 32 && p.middle > 1) {  // short segments: element by element
      for (int64_t k = first + thread; k < last; k += threads)
        body.template visit<1, 1>(k / p.inner, k % p.inner, 0);
      return;
    }
    for (int64_t segment = first / p.inner; segment * p.inner < last; ++segment) {
      const int64_t base = segment * p.inner;
      const int64_t begin = base < first ? first - base : 0;
      const int64_t end = last - base < p.inner ? last - base : p.inner;
      const uintptr_t address = reinterpret_cast<uintptr_t>(x + segment * p.x_middle + begin);
      int64_t start = begin + (((16 - (address & 15)) & 15) / sizeof(T));
      start = start < end ? start : end;
      for (int64_t i = begin + thread; i < start; i += threads)
        body.template visit<1, 1>(segment, i, 0);
      const int64_t packs = (end - start) / V;
      int64_t k = thread;
      for (; k + (Body::kPacks - 1) * threads < packs; k += Body::kPacks * threads)
        body.template visit<V, Body::kPacks>(segment, start + k * V, threads * V);
      for (; k < packs; k += threads) body.template visit<V, 1>(segment, start + k * V, 0);
      for (int64_t i = start + packs * V + thread; i < end; i += threads)
        body.template visit<1, 1>(segment, i, 0);
    }
  }

  // Every thread ends with the block's statistic.
  template <class S>
  FUSED_MLP_DEVICE S merge_threads(S s) const {
    __shared__ S shared[kThreads / 32];
    for (int by = 16; by > 0; by /= 2) s = merge(s, shuffle_down(s, by));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = s;
    __syncthreads();
    s = shared[0];
    for (int warp = 1; warp < blockDim.x / 32; ++warp) s = merge(s, shared[warp]);
    return s;
  }

  template <class S>
  FUSED_MLP_DEVICE S merge_partials(const StandardizeParameters& p) const {
    const int64_t count = p.middle * p.inner;
    S s = {};
    for (int64_t k = threadIdx.x; k < p.chunks; k += blockDim.x) {
      const int64_t begin = k * p.per_chunk;
      S other;
      load_partial(p, group * p.chunks + k, p.outer * p.chunks,
                   (begin + p.per_chunk < count ? begin + p.per_chunk : count) - begin, other);
      s = merge(s, other);
    }
    return merge_threads(s);
  }
};

// Loads a pack wherever it lies; x of a walk is aligned, the other tensors need not be.
template <int V, class T>
FUSED_MLP_DEVICE Pack<T, V> load_any(const T* from) {
  if constexpr (V == 1) {
    return load_pack<V>(from);
  } else {
    if (aligned16(from)) return load_pack<V>(from);
    Pack<T, V> pack;
#pragma unroll
    for (int j = 0; j < V; ++j) pack.at[j] = from[j];
    return pack;
  }
}

template <int V, class T>
FUSED_MLP_DEVICE void store_any(T* to, const Pack<T, V>& pack) {
  if constexpr (V == 1) {
    store_pack<V>(to, pack);
  } else {
    if (aligned16(to)) return store_pack<V>(to, pack);
#pragma unroll
    for (int j = 0; j < V; ++j) to[j] = pack.at[j];
  }
}

template <class T>
struct MeasureRows {
  static constexpr int kPacks = kUnroll;
  const StandardizeParameters& p;
  const T* x;
  Acc<T> origin;
  Moments<Acc<T>> m;

  template <int V, int K>
  FUSED_MLP_DEVICE void visit(int64_t segment, int64_t i, int step) {
    const T* from = x + segment * p.x_middle + i;
    Acc<T> values[V * K];
    Pack<T, V> pack[K];
#pragma unroll
    for (int k = 0; k < K; ++k) pack[k] = load_pack<V>(from + k * step);
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int j = 0; j < V; ++j) values[k * V + j] = widen(pack[k].at[j]) - origin;
    m = merge(m, moments_of(values));
  }
};

template <class T>
struct ApplyRows {
  static constexpr int kPacks = kUnroll;
  const StandardizeParameters& p;
  const T* x;
  T* y;
  Transform<Acc<T>> transform;

  template <int V, int K>
  FUSED_MLP_DEVICE void visit(int64_t segment, int64_t i, int step) {
    const T* from = x + segment * p.x_middle + i;
    T* to = y + segment * p.y_middle + i;
    Pack<T, V> pack[K];
#pragma unroll
    for (int k = 0; k < K; ++k) pack[k] = load_pack<V>(from + k * step);
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int j = 0; j < V; ++j) pack[k].at[j] = narrow<T>(transform(widen(pack[k].at[j])));
      store_any<V>(to + k * step, pack[k]);
    }
  }
};

template <class T>
struct MeasureRowsBackward {
  static constexpr int kPacks = kUnroll / 2;
  const StandardizeParameters& p;
  const T* x;
  const T* g;
  Gradient<Acc<T>> gradient;
  Sums<Acc<T>> s;

  template <int V, int K>
  FUSED_MLP_DEVICE void visit(int64_t segment, int64_t i, int step) {
    Pack<T, V> xs[K], gs[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      xs[k] = load_pack<V>(x + segment * p.x_middle + i + k * step);
      gs[k] = load_any<V>(g + segment * p.g_middle + i + k * step);
    }
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const Acc<T> value = widen(xs[k].at[j]);
        const Acc<T> du = gradient.du(widen(gs[k].at[j]), value);
        const Acc<T> centred = gradient.forward.centred(value);
        s = {s.du + du, fused(du, centred, s.du_x), s.x + centred};
      }
  }
};

template <class T>
struct ApplyRowsBackward {
  static constexpr int kPacks = kUnroll / 2;
  const StandardizeParameters& p;
  const T* x;
  const T* g;
  T* y;
  Gradient<Acc<T>> gradient;

  template <int V, int K>
  FUSED_MLP_DEVICE void visit(int64_t segment, int64_t i, int step) {
    Pack<T, V> xs[K], gs[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      xs[k] = load_pack<V>(x + segment * p.x_middle + i + k * step);
      gs[k] = load_any<V>(g + segment * p.g_middle + i + k * step);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int j = 0; j < V; ++j)
        xs[k].at[j] = narrow<T>(gradient(widen(gs[k].at[j]), widen(xs[k].at[j])));
      store_any<V>(y + segment * p.y_middle + i + k * step, xs[k]);
    }
  }
};

template <class T>
FUSED_MLP_DEVICE void rows_forward(const StandardizeParameters& p) {
  using A = Acc<T>;
  const RowBlock<T> at(p);
  const T* x = static_cast<const T*>(p.x) + at.group * p.x_outer;
  const A origin = p.flags & kGivenStatistics ? A(0) : widen(*x);
  Moments<A> m = {};
  if (p.phase & kMeasure) {
    MeasureRows<T> measure = {p, x, origin, {}};
    at.walk(p, x, measure);
    m = at.merge_threads(measure.m);
    if (!(p.phase & kApply)) {
      if (threadIdx.x == 0) store_partial(p, at.group * p.chunks + at.chunk, p.outer * p.chunks, m);
      return;
    }
  } else if (!(p.flags & kGivenStatistics)) {
    m = at.template merge_partials<Moments<A>>(p);
  }
  ApplyRows<T> apply = {
      p, x, static_cast<T*>(p.y) + at.group * p.y_outer,
      finish_forward<T>(p, at.group, origin, m, at.chunk == 0 && threadIdx.x == 0)};
  at.walk(p, x, apply);
}

template <class T>
FUSED_MLP_DEVICE void rows_backward(const StandardizeParameters& p) {
  using A = Acc<T>;
  const RowBlock<T> at(p);
  const T* x = static_cast<const T*>(p.x) + at.group * p.x_outer;
  const T* g = static_cast<const T*>(p.g) + at.group * p.g_outer;
  Gradient<A> gradient = {reload_forward<T>(p, at.group), A(0), A(0), A(0)};
  Sums<A> s = {};
  if (p.phase & kMeasure) {
    MeasureRowsBackward<T> measure = {p, x, g, gradient, {}};
    at.walk(p, x, measure);
    s = at.merge_threads(measure.s);
    if (!(p.phase & kApply)) {
      if (threadIdx.x == 0) store_partial(p, at.group * p.chunks + at.chunk, p.outer * p.chunks, s);
      return;
    }
  } else if (p.partials) {
    s = at.template merge_partials<Sums<A>>(p);
  }
  gradient = finish_backward<T>(p, at.group, p.middle * p.inner, gradient.forward, s,
                                at.chunk == 0 && threadIdx.x == 0);
  if (!p.y) return;
  ApplyRowsBackward<T> apply = {p, x, g, static_cast<T*>(p.y) + at.group * p.y_outer, gradient};
  at.walk(p, x, apply);
}

}  // namespace fused_mlp::cuda::standardize

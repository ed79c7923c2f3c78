// Standardising groups that are contiguous, whole or in segments: a block walks one group or a
// chunk of it, or each of its warps, or of their parts, a short group of its own. 16 bytes a thread
// where x is aligned, with single elements before and after.
#pragma once

#include "standardize.cuh"

namespace fused_mlp::cuda::standardize {

template <class T>
struct RowBlock {
  int lanes, thread;  // how many threads share the group, and which of them this is
  int64_t chunk, group, first, last;
  bool leads;  // whether the thread writes for its group

  FUSED_MLP_DEVICE explicit RowBlock(const StandardizeParameters& p) {
    lanes = p.lanes;
    thread = threadIdx.x % lanes;
    const int64_t k = static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
    chunk = k % p.chunks;
    group = k / p.chunks;
    const int64_t count = p.middle * p.inner;
    first = chunk * p.per_chunk;
    last = first + p.per_chunk < count ? first + p.per_chunk : count;
    leads = thread == 0;
    if (group >= p.outer) {  // threads left over: they only take part in shuffles
      group = p.outer - 1;
      last = first;
      leads = false;
    }
  }

  // Calls body.template visit<V, K>(segment, i, step) for K packs of V elements at i, i + step, …
  template <class Body>
  FUSED_MLP_DEVICE void walk(const StandardizeParameters& p, const T* x, Body& body) const {
    constexpr int V = kPackWidth<T>;
    const int threads = lanes;
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

  // Every thread ends with its group's statistic.
  template <class S>
  FUSED_MLP_DEVICE S merge_threads(S s) const {
    __shared__ S shared[kThreads / 32];
    const int width = lanes < 32 ? lanes : 32;
    for (int by = width / 2; by > 0; by /= 2) s = merge(s, shuffle_down(s, by, width));
    if (lanes <= 32) return shuffle_from_first(s, width);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = s;
    __syncthreads();
    s = shared[0];
    for (int warp = 1; warp < lanes / 32; ++warp) s = merge(s, shared[warp]);
    return s;
  }

  template <class S>
  FUSED_MLP_DEVICE S merge_partials(const StandardizeParameters& p) const {
    const int64_t count = p.middle * p.inner;
    S s = {};
    for (int64_t k = thread; k < p.chunks; k += lanes) {
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
    store_global<V>(to, pack);
  } else {
    if (aligned16(to)) return store_global<V>(to, pack);
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

template <class T, bool kAny>
struct ApplyRows {
  static constexpr int kPacks = kUnroll;
  const StandardizeParameters& p;
  const T* x;
  T* y;
  int64_t group;
  Transform<Acc<T>, kAny> transform;

  template <int V, int K>
  FUSED_MLP_DEVICE void visit(int64_t segment, int64_t i, int step) {
    const T* from = x + segment * p.x_middle + i;
    T* to = y + segment * p.y_middle + i;
    Pack<T, V> pack[K];
#pragma unroll
    for (int k = 0; k < K; ++k) pack[k] = load_pack<V>(from + k * step);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const auto drop = dropped<Acc<T>, kAny, V, false>(p, group, segment * p.inner + i + k * step);
#pragma unroll
      for (int j = 0; j < V; ++j)
        pack[k].at[j] = narrow<T>(drop(j, transform(widen(pack[k].at[j]))));
      store_any<V>(to + k * step, pack[k]);
    }
  }
};

template <class T, bool kAny>
struct MeasureRowsBackward {
  static constexpr int kPacks = kUnroll / 2;
  const StandardizeParameters& p;
  const T* x;
  const T* g;
  int64_t group;
  Gradient<Acc<T>, kAny> gradient;
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
    for (int k = 0; k < K; ++k) {
      const auto drop = dropped<Acc<T>, kAny, V, false>(p, group, segment * p.inner + i + k * step);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const Acc<T> value = widen(xs[k].at[j]);
        const Acc<T> du = gradient.du(drop(j, widen(gs[k].at[j])), value);
        const Acc<T> centred = gradient.forward.centred(value);
        s = {s.du + du, fused(du, centred, s.du_x), s.x + centred};
      }
    }
  }
};

template <class T, bool kAny>
struct ApplyRowsBackward {
  static constexpr int kPacks = kUnroll / 2;
  const StandardizeParameters& p;
  const T* x;
  const T* g;
  T* y;
  int64_t group;
  Gradient<Acc<T>, kAny> gradient;

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
      const auto drop = dropped<Acc<T>, kAny, V, false>(p, group, segment * p.inner + i + k * step);
#pragma unroll
      for (int j = 0; j < V; ++j)
        xs[k].at[j] = narrow<T>(gradient(drop(j, widen(gs[k].at[j])), widen(xs[k].at[j])));
      store_any<V>(y + segment * p.y_middle + i + k * step, xs[k]);
    }
  }
};

template <class T, bool kAny>
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
      if (at.leads) store_partial(p, at.group * p.chunks + at.chunk, p.outer * p.chunks, m);
      return;
    }
  } else if (!(p.flags & kGivenStatistics)) {
    m = at.template merge_partials<Moments<A>>(p);
  }
  ApplyRows<T, kAny> apply = {
      p, x, static_cast<T*>(p.y) + at.group * p.y_outer, at.group,
      finish_forward<T, kAny>(p, at.group, origin, m, at.chunk == 0 && at.leads)};
  at.walk(p, x, apply);
}

template <class T, bool kAny>
FUSED_MLP_DEVICE void rows_backward(const StandardizeParameters& p) {
  using A = Acc<T>;
  const RowBlock<T> at(p);
  const T* x = static_cast<const T*>(p.x) + at.group * p.x_outer;
  const T* g = static_cast<const T*>(p.g) + at.group * p.g_outer;
  Gradient<A, kAny> gradient = {reload_forward<T, kAny>(p, at.group), A(0), A(0)};
  Sums<A> s = {};
  if (p.phase & kMeasure) {
    MeasureRowsBackward<T, kAny> measure = {p, x, g, at.group, gradient, {}};
    at.walk(p, x, measure);
    s = at.merge_threads(measure.s);
    if (!(p.phase & kApply)) {
      if (at.leads) store_partial(p, at.group * p.chunks + at.chunk, p.outer * p.chunks, s);
      return;
    }
  } else if (p.partials) {
    s = at.template merge_partials<Sums<A>>(p);
  }
  gradient = finish_backward<T, kAny>(p, at.group, p.middle * p.inner, gradient.forward, s,
                                      at.chunk == 0 && at.leads);
  if (!p.y) return;
  ApplyRowsBackward<T, kAny> apply = {
      p, x, g, static_cast<T*>(p.y) + at.group * p.y_outer, at.group, gradient};
  at.walk(p, x, apply);
}

}  // namespace fused_mlp::cuda::standardize

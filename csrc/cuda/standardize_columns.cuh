// Standardising columns: a block walks the rows of a tile of neighbouring columns.
//
// Threads form rows of `lanes` threads, and a thread walks down V neighbouring columns. What
// belongs to a column as such (merging, finishing, parameters) is done once, by thread c of the
// block for column c of the tile, so that neighbours read and write neighbours; the result goes
// through shared memory to the threads that walk the column.
#pragma once

#include "standardize.cuh"

namespace fused_mlp::cuda::standardize {

constexpr int kSectorBytes = 32;  // what memory moves at least

// Threads that share a row at most: tiles of up to 256 columns, one a thread.
__host__ __device__ constexpr int most_lanes(bool vectors) { return vectors ? 32 : 128; }

template <class T, int V>
struct ColumnBlock {
  using A = Acc<T>;
  // By column, number c lies at [c % V][c / V]; by lane, [j][lane]. With this much more than the
  // lanes to a line, neither order of reading meets itself in a bank.
  static constexpr int kSkew = 128 / static_cast<int>(sizeof(A)) / V;

  int lane, row, rows_at_once, tile;
  int64_t chunk, slab, first_column, groups;
  bool active;  // whether the thread's lane has columns to walk
  bool owns;    // whether there is a column for the thread to finish

  FUSED_MLP_DEVICE explicit ColumnBlock(const StandardizeParameters& p) {
    tile = p.lanes * V;
    const int64_t tiles = (p.inner + tile - 1) / tile;
    lane = threadIdx.x % p.lanes;
    row = threadIdx.x / p.lanes;
    rows_at_once = kThreads / p.lanes;
    chunk = blockIdx.x % p.chunks;
    const int64_t rest = blockIdx.x / p.chunks;
    slab = rest / tiles;
    first_column = (rest % tiles) * tile;
    active = column() < p.inner;
    owns = threadIdx.x < tile && first_column + threadIdx.x < p.inner;
    groups = p.outer * p.inner;
  }

  FUSED_MLP_DEVICE int64_t column() const { return first_column + static_cast<int64_t>(lane) * V; }
  FUSED_MLP_DEVICE int64_t own_group(const StandardizeParameters& p) const {
    return slab * p.inner + first_column + threadIdx.x;
  }
  FUSED_MLP_DEVICE bool writes() const { return chunk == 0; }

  FUSED_MLP_DEVICE int64_t first(const StandardizeParameters& p) const {
    return chunk * p.per_chunk;
  }
  FUSED_MLP_DEVICE int64_t last(const StandardizeParameters& p) const {
    const int64_t end = (chunk + 1) * p.per_chunk;
    return end < p.middle ? end : p.middle;
  }

  // Merges the rows of threads as a tree; returns the statistic of the thread's own column.
  template <class S>
  FUSED_MLP_DEVICE S merge_rows(const StandardizeParameters& p, S (&s)[V]) const {
    __shared__ S shared[V][kThreads + kSkew];
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
    return shared[threadIdx.x % V][threadIdx.x / V];
  }

  FUSED_MLP_DEVICE int64_t partial(const StandardizeParameters& p, int64_t of_chunk,
                                   int own) const {
    return of_chunk * groups + slab * p.inner + first_column + own;
  }

  template <class S>
  FUSED_MLP_DEVICE void store_own_partial(const StandardizeParameters& p, const S& s) const {
    if (owns) store_partial(p, partial(p, chunk, threadIdx.x), p.chunks * groups, s);
  }

  // Merges the chunks' statistics: threads that share a column take chunks in turn, then a tree.
  // Returns the statistic of the thread's own column.
  template <class S>
  FUSED_MLP_DEVICE S merge_partials(const StandardizeParameters& p) const {
    __shared__ S shared[kThreads];
    const int own = threadIdx.x % tile, part = threadIdx.x / tile, parts = kThreads / tile;
    S s = {};
    if (first_column + own < p.inner) {
#pragma unroll 4
      for (int64_t k = part; k < p.chunks; k += parts) {
        const int64_t begin = k * p.per_chunk;
        const int64_t end = begin + p.per_chunk < p.middle ? begin + p.per_chunk : p.middle;
        S other;
        load_partial(p, partial(p, k, own), p.chunks * groups, end - begin, other);
        s = merge(s, other);
      }
    }
    shared[threadIdx.x] = s;
    for (int half = parts / 2; half > 0; half /= 2) {
      __syncthreads();
      if (part < half) {
        s = merge(s, shared[threadIdx.x + half * tile]);
        shared[threadIdx.x] = s;
      }
    }
    return s;
  }
};

// N numbers of each column in shared memory, on their way from a column's owner to its walkers.
template <class T, int V, int N>
struct ColumnVectors {
  using A = Acc<T>;
  A at[N][V][most_lanes(V > 1) + ColumnBlock<T, V>::kSkew];

  FUSED_MLP_DEVICE void set(int which, A value) {
    at[which][threadIdx.x % V][threadIdx.x / V] = value;
  }
  FUSED_MLP_DEVICE A get(int which, int lane, int j) const { return at[which][j][lane]; }
};

template <class T, int V, bool kAny>
FUSED_MLP_DEVICE void columns_forward(const StandardizeParameters& p) {
  using A = Acc<T>;
  __shared__ ColumnVectors<T, V, 4> shared;
  const ColumnBlock<T, V> at(p);
  const int step = at.rows_at_once;
  const int64_t last = at.last(p);
  const T* slab = static_cast<const T*>(p.x) + at.slab * p.x_outer;
  const T* x = slab + at.column();
  T* y = static_cast<T*>(p.y) + at.slab * p.y_outer + at.column();
  Moments<A> own = {};
  if (p.phase & kMeasure) {
    Moments<A> m[V] = {};
    if (at.active) {
      A origin[V];
      const Pack<T, V> top = load_pack<V>(x);
#pragma unroll
      for (int j = 0; j < V; ++j) origin[j] = widen(top.at[j]);
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
    own = at.merge_rows(p, m);
    if (!(p.phase & kApply)) return at.store_own_partial(p, own);
  } else if (!(p.flags & kGivenStatistics)) {
    own = at.template merge_partials<Moments<A>>(p);
  }
  if (at.owns) {
    const A origin = p.flags & kGivenStatistics ? A(0) : widen(slab[at.first_column + threadIdx.x]);
    const Transform<A, kAny> t =
        finish_forward<T, kAny>(p, at.own_group(p), origin, own, at.writes());
    shared.set(0, t.origin);
    shared.set(1, t.rest);
    shared.set(2, t.scale);
    shared.set(3, t.shift);
  }
  __syncthreads();
  if (!at.active) return;
  Transform<A, kAny> transform[V];
#pragma unroll
  for (int j = 0; j < V; ++j)
    transform[j] = {shared.get(0, at.lane, j), shared.get(1, at.lane, j), shared.get(2, at.lane, j),
                    shared.get(3, at.lane, j), ending_of<A, kAny>(p)};
  for (int64_t r = at.first(p) + at.row; r < last; r += kUnroll * step) {
    Pack<T, V> pack[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      if (r + k * step < last) pack[k] = load_pack<V>(x + (r + k * step) * p.x_middle);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (r + k * step >= last) continue;
      const auto drop = dropped<A, kAny, V, true>(p, at.column(), r + k * step);
#pragma unroll
      for (int j = 0; j < V; ++j)
        pack[k].at[j] = narrow<T>(drop(j, transform[j](widen(pack[k].at[j]))));
      store_global<V>(y + (r + k * step) * p.y_middle, pack[k]);
    }
  }
}

template <class T, int V, bool kAny>
FUSED_MLP_DEVICE void columns_backward(const StandardizeParameters& p) {
  using A = Acc<T>;
  // Two tensors are read. Of 16-bit numbers with dropout more rows spill on sm_90.
  constexpr int kRows = kAny && V == 8 ? 1 : kUnroll / 2;
  __shared__ ColumnVectors<T, V, 5> shared;
  const ColumnBlock<T, V> at(p);
  const int step = at.rows_at_once;
  const int64_t last = at.last(p);
  const T* x = static_cast<const T*>(p.x) + at.slab * p.x_outer + at.column();
  const T* g = static_cast<const T*>(p.g) + at.slab * p.g_outer + at.column();
  T* y = static_cast<T*>(p.y) + at.slab * p.y_outer + at.column();
  Transform<A, kAny> own_forward;
  if (at.owns) {
    own_forward = reload_forward<T, kAny>(p, at.own_group(p));
    shared.set(0, own_forward.origin);
    shared.set(1, own_forward.scale);
    shared.set(2, own_forward.shift);
  }
  const auto forward = [&](int j) -> Transform<A, kAny> {
    return {shared.get(0, at.lane, j), A(0), shared.get(1, at.lane, j), shared.get(2, at.lane, j),
            ending_of<A, kAny>(p)};
  };
  Gradient<A, kAny> gradient[V];
  Sums<A> own = {};
  if (p.phase & kMeasure) {
    __syncthreads();
    Sums<A> s[V] = {};
    if (at.active) {
#pragma unroll
      for (int j = 0; j < V; ++j) gradient[j].forward = forward(j);
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
          const auto drop = dropped<A, kAny, V, true>(p, at.column(), r + k * step);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const A value = widen(xs[k].at[j]);
            const A du = gradient[j].du(drop(j, widen(gs[k].at[j])), value);
            const A centred = gradient[j].forward.centred(value);
            s[j] = {s[j].du + du, fused(du, centred, s[j].du_x), s[j].x + centred};
          }
        }
      }
    }
    own = at.merge_rows(p, s);
    if (!(p.phase & kApply)) return at.store_own_partial(p, own);
  } else if (p.partials) {
    own = at.template merge_partials<Sums<A>>(p);
  }
  if (at.owns) {
    const Gradient<A, kAny> d =
        finish_backward<T, kAny>(p, at.own_group(p), p.middle, own_forward, own, at.writes());
    shared.set(3, d.b);
    shared.set(4, d.c);
  }
  __syncthreads();
  if (!at.active || !p.y) return;
#pragma unroll
  for (int j = 0; j < V; ++j)
    gradient[j] = {forward(j), shared.get(3, at.lane, j), shared.get(4, at.lane, j)};
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
      const auto drop = dropped<A, kAny, V, true>(p, at.column(), r + k * step);
#pragma unroll
      for (int j = 0; j < V; ++j)
        xs[k].at[j] = narrow<T>(gradient[j](drop(j, widen(gs[k].at[j])), widen(xs[k].at[j])));
      store_global<V>(y + (r + k * step) * p.y_middle, xs[k]);
    }
  }
}

}  // namespace fused_mlp::cuda::standardize

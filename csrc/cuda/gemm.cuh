// Device code of gemm.cu.
#pragma once

#include "behind.cuh"
#include "staging.cuh"

namespace fused_mlp::cuda::gemm {

constexpr int kTile = 64;      // rows and columns of a block's result
constexpr int kThreads = 256;  // eight warps with one 16 x 32 block each

// How much of the summed dimension is in shared memory at a time.
template <class M>
constexpr int kDepth = sizeof(typename M::A) == 8 ? 32 : 64;

__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

// Bytes of one operand, of the result on its way out, and of all shared memory.
template <class M>
constexpr int kOperandBytes = larger(kTile * M::leading(kDepth<M>), kDepth<M>* M::leading(kTile)) *
                              static_cast<int>(sizeof(typename M::Storage));
constexpr int kResultLeading = kTile + 8;
template <class M>
constexpr int kResultBytes = kTile * kResultLeading * static_cast<int>(sizeof(typename M::A));
constexpr int kMaskBytes = kTile * kTile / 8;
// The bias and, in the kernels of any activation, a batch norm's mean, scale and shift.
template <class M, class Known>
constexpr int kVectorBytes =
    (Known::kAny ? 4 : 1) * kTile * static_cast<int>(sizeof(typename M::A));
template <class M, class Known>
constexpr int kSharedBytes =
    larger(2 * kOperandBytes<M>, kResultBytes<M>) + kVectorBytes<M, Known> + kMaskBytes;

// `Known`: OnlyReLU or AnyActivation.
template <class M, class Known>
struct Block {
  using T = typename M::T;
  using S = typename M::Storage;
  using A = typename M::A;

  const GemmParameters& p;
  char* shared;

  FUSED_MLP_DEVICE S* left() const { return reinterpret_cast<S*>(shared); }
  FUSED_MLP_DEVICE S* right() const { return reinterpret_cast<S*>(shared + kOperandBytes<M>); }
  FUSED_MLP_DEVICE A* result() const { return reinterpret_cast<A*>(shared); }
  FUSED_MLP_DEVICE uint8_t* mask() const {
    return reinterpret_cast<uint8_t*>(shared + kSharedBytes<M, Known> - kMaskBytes);
  }
  FUSED_MLP_DEVICE A* vector(int which) const {
    return reinterpret_cast<A*>(shared + kSharedBytes<M, Known> - kMaskBytes -
                                kVectorBytes<M, Known>) +
           which * kTile;
  }

  FUSED_MLP_DEVICE const T* x(int64_t row, int column) const {
    return static_cast<const T*>(p.x) + row * p.x_stride + column;
  }
  FUSED_MLP_DEVICE const T* weight(int64_t row, int column) const {
    return static_cast<const T*>(p.weight) + row * p.in + column;
  }
  FUSED_MLP_DEVICE static int left_of(int64_t count, int64_t from, int most) {
    return count - from < most ? static_cast<int>(count - from) : most;
  }

  // Adds the product of the operands in shared memory to the warp's sums.
  template <bool TA, bool TB>
  FUSED_MLP_DEVICE void multiply(A (&c)[16], int depth) const {
    const int warp = threadIdx.x / 32;
    M::template product<TA, TB>(c, left(), M::leading(TA ? kTile : kDepth<M>), right(),
                                M::leading(TB ? kTile : kDepth<M>), warp % 4 * kBlockRows, kTile,
                                warp / 4 * kBlockColumns, kTile, round_up(depth, M::kPad));
  }

  template <bool TA, bool TB, class Visit>
  FUSED_MLP_DEVICE void each(const A (&c)[16], Visit visit) const {
    const int warp = threadIdx.x / 32;
    M::template each<TA, TB>(c, warp % 4 * kBlockRows, warp / 4 * kBlockColumns, kTile, visit);
  }

  // Puts sums in shared memory so that they leave it in whole rows. Begins synchronised, as the
  // loops over the operands end, and ends so.
  template <bool TA, bool TB>
  FUSED_MLP_DEVICE void collect(const A (&c)[16]) const {
    each<TA, TB>(c, [&](int row, int column, auto values) {
      constexpr int W = sizeof(values) / sizeof(A);
      store_pack<W>(result() + row * kResultLeading + column, values);
    });
    __syncthreads();
  }

  template <class Out>
  FUSED_MLP_DEVICE void write(Out* to, int64_t stride, int rows, int columns) const {
    constexpr int V = kPackWidth<Out>;
    if (columns % V == 0 && stride % V == 0 && aligned16(to)) {
      const int packs = columns / V;
      for (int k = threadIdx.x; k < rows * packs; k += kThreads) {
        const int row = k / packs, column = (k - row * packs) * V;
        store_global<V>(to + row * stride + column,
                        narrow_pack<Out>(result() + row * kResultLeading + column));
      }
      return;
    }
    for (int k = threadIdx.x; k < rows * columns; k += kThreads) {
      const int row = k / columns, column = k - row * columns;
      to[row * stride + column] = narrow<Out>(result()[row * kResultLeading + column]);
    }
  }

  // What is the same in every row of the tile, and the tile's mask, into shared memory.
  FUSED_MLP_DEVICE void prepare(int64_t m0, int n0, int columns) const {
    const int c = threadIdx.x;
    if (c < columns) {
      vector(0)[c] = p.bias ? widen(static_cast<const T*>(p.bias)[n0 + c]) : A(0);
      if constexpr (Known::kAny)
        if (p.behind.norm.mean) {
          const Affine<A> norm = evaluated_norm<T>(p.behind.norm, n0 + c);
          vector(1)[c] = norm.mean;
          vector(2)[c] = norm.scale;
          vector(3)[c] = norm.shift;
        }
    }
    if (!p.behind.threshold) return;
    const Mask drawn = {p.behind.seed, p.behind.threshold};
    for (int k = threadIdx.x; k < kMaskBytes; k += kThreads)
      mask()[k] = static_cast<uint8_t>(drawn.template bits<8>(m0 + k / 8, n0 + k % 8 * 8));
  }

  // Writes what follows from the sums of V columns in shared memory.
  template <int V, class F>
  FUSED_MLP_DEVICE void finish_pack(const F& act, int64_t m0, int n0, int row, int column) const {
    const auto load = [&](const A* from) {
      if constexpr (V == 1)
        return load_pack<1>(from);
      else
        return load_sums<T>(from);
    };
    Pack<A, V> z = load(result() + row * kResultLeading + column);
    const Pack<A, V> bias = load(vector(0) + column);
#pragma unroll
    for (int j = 0; j < V; ++j) z.at[j] += bias.at[j];
    const int64_t at = (m0 + row) * p.out + n0 + column;
    if constexpr (Known::kAny) {
      if (p.seen) store_global<V>(static_cast<T*>(p.seen) + at, narrowed<T>(z));
      if (p.behind.norm.mean) {
        const Pack<A, V> mean = load(vector(1) + column), scale = load(vector(2) + column),
                         shift = load(vector(3) + column);
#pragma unroll
        for (int j = 0; j < V; ++j) z.at[j] = fused(z.at[j] - mean.at[j], scale.at[j], shift.at[j]);
      }
    }
    const uint32_t kept = p.behind.threshold ? mask()[row * 8 + column / 8] >> (column % 8) : ~0u;
    store_global<V>(static_cast<T*>(p.result) + at,
                    activated<T>(act, z, kept, static_cast<A>(p.behind.scale)));
  }

  template <class F>
  FUSED_MLP_DEVICE void finish(const F& act, int64_t m0, int n0, int rows, int columns) const {
    constexpr int V = kPackWidth<T>;
    if (p.out % V == 0 && aligned16(p.result) && aligned16(p.seen)) {
      const int packs = columns / V;
      for (int k = threadIdx.x; k < rows * packs; k += kThreads)
        finish_pack<V>(act, m0, n0, k / packs, k % packs * V);
    } else {
      for (int k = threadIdx.x; k < rows * columns; k += kThreads)
        finish_pack<1>(act, m0, n0, k / columns, k % columns);
    }
  }

  FUSED_MLP_DEVICE void layer() const {
    const int tiles = (p.out + kTile - 1) / kTile;
    const int64_t m0 = static_cast<int64_t>(blockIdx.x / tiles) * kTile;
    const int n0 = static_cast<int>(blockIdx.x % tiles) * kTile;
    const int rows = left_of(p.rows, m0, kTile), columns = left_of(p.out, n0, kTile);
    prepare(m0, n0, columns);
    A c[16] = {};
    for (int k0 = 0; k0 < p.in; k0 += kDepth<M>) {
      const int depth = left_of(p.in, k0, kDepth<M>), ld = M::leading(kDepth<M>);
      stage_matrix<M>(left(), ld, x(m0, k0), p.x_stride, rows, kTile, depth,
                      round_up(depth, M::kPad));
      stage_matrix<M>(right(), ld, weight(n0, k0), p.in, columns, kTile, depth,
                      round_up(depth, M::kPad));
      __syncthreads();
      multiply<false, false>(c, depth);
      __syncthreads();
    }
    collect<false, false>(c);
    Known::template choose<A>(p.behind.activation, static_cast<A>(p.behind.slope),
                              [&](const auto& act) { finish(act, m0, n0, rows, columns); });
  }

  // Rows of the gradient in front of activation and dropout, from (row, column) on.
  FUSED_MLP_DEVICE void stage_gate(S* to, int ld, int64_t row, int column, int rows, int all_rows,
                                   int columns, int pad) const {
    Known::template choose<A>(
        p.behind.activation, static_cast<A>(p.behind.slope), [&](const auto& act) {
          const GatedMatrix source(act, p.behind, static_cast<const T*>(p.g), p.g_stride,
                                   static_cast<const T*>(p.kept), p.out, row, column);
          stage<M>(to, ld, source, rows, all_rows, columns, pad);
        });
  }

  FUSED_MLP_DEVICE void input_gradient() const {
    const int tiles = (p.in + kTile - 1) / kTile;
    const int64_t m0 = static_cast<int64_t>(blockIdx.x / tiles) * kTile;
    const int n0 = static_cast<int>(blockIdx.x % tiles) * kTile;
    const int rows = left_of(p.rows, m0, kTile), columns = left_of(p.in, n0, kTile);
    A c[16] = {};
    for (int k0 = 0; k0 < p.out; k0 += kDepth<M>) {
      const int depth = left_of(p.out, k0, kDepth<M>), padded = round_up(depth, M::kPad);
      stage_gate(left(), M::leading(kDepth<M>), m0, k0, rows, kTile, depth, padded);
      stage_matrix<M>(right(), M::leading(kTile), weight(k0, n0), p.in, depth, padded, columns,
                      kTile);
      __syncthreads();
      multiply<false, true>(c, depth);
      __syncthreads();
    }
    collect<false, true>(c);
    write(static_cast<T*>(p.result) + m0 * p.in + n0, p.in, rows, columns);
  }

  FUSED_MLP_DEVICE void weight_gradient() const {
    const int tiles = (p.in + kTile - 1) / kTile, tiles_out = (p.out + kTile - 1) / kTile;
    const int64_t split = blockIdx.x / (tiles * tiles_out);
    const int tile = static_cast<int>(blockIdx.x % (tiles * tiles_out));
    const int m0 = tile / tiles * kTile, n0 = tile % tiles * kTile;
    const int rows = left_of(p.out, m0, kTile), columns = left_of(p.in, n0, kTile);
    const int64_t first = split * p.rows_per_split;
    const int64_t last = first + p.rows_per_split < p.rows ? first + p.rows_per_split : p.rows;
    A c[16] = {}, bias = 0;
    for (int64_t k0 = first; k0 < last; k0 += kDepth<M>) {
      const int depth = left_of(last, k0, kDepth<M>), padded = round_up(depth, M::kPad);
      const int ld = M::leading(kTile);
      stage_gate(left(), ld, k0, m0, depth, padded, rows, kTile);
      stage_matrix<M>(right(), ld, x(k0, n0), p.x_stride, depth, padded, columns, kTile);
      __syncthreads();
      multiply<true, true>(c, depth);
      if (n0 == 0 && threadIdx.x < kTile)
        for (int k = 0; k < depth; ++k) bias += M::load(left()[M::at(k, threadIdx.x, ld)]);
      __syncthreads();
    }
    collect<true, true>(c);
    A* to = static_cast<A*>(p.result) + split * p.gradient_stride;
    write(to + static_cast<int64_t>(m0) * p.in + n0, p.in, rows, columns);
    if (n0 == 0 && threadIdx.x < rows)
      to[static_cast<int64_t>(p.out) * p.in + m0 + threadIdx.x] = bias;
  }

  FUSED_MLP_DEVICE void run() const {
    if (p.product == Product::kLayer)
      layer();
    else if (p.product == Product::kInputGradient)
      input_gradient();
    else
      weight_gradient();
  }
};

// A thread takes V neighbouring columns of a row: a 16-byte pack, or one where rows are not whole
// packs. Neighbours draw the same eight columns' bits again, which costs less than sharing them.
template <class Known, class T, int V, class F>
FUSED_MLP_DEVICE void elements(const ElementParameters& p, const F& act) {
  using A = Acc<T>;
  const int units = p.columns / V;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k >= p.rows * units) return;
  const int64_t row = k / units;
  const int column = static_cast<int>(k - row * units) * V;
  const int64_t at = row * p.columns + column;
  T* to = static_cast<T*>(p.result) + at;
  if (p.g) {
    const GatedMatrix source(act, p.behind, static_cast<const T*>(p.g), p.g_stride,
                             static_cast<const T*>(p.from), p.columns, row, column);
    return store_global<V>(to, source.template load<V>(0, 0));
  }
  const Pack<T, V> product = load_pack<V>(static_cast<const T*>(p.from) + at);
  Pack<A, V> z;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    z.at[j] = widen(product.at[j]);
    if (p.bias) z.at[j] += widen(static_cast<const T*>(p.bias)[column + j]);
  }
  if constexpr (Known::kAny) {
    if (p.seen) store_global<V>(static_cast<T*>(p.seen) + at, narrowed<T>(z));
    if (p.behind.norm.mean) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const Affine<A> norm = evaluated_norm<T>(p.behind.norm, column + j);
        z.at[j] = fused(z.at[j] - norm.mean, norm.scale, norm.shift);
      }
    }
  }
  const Mask mask = {p.behind.seed, p.behind.threshold};
  store_global<V>(
      to, activated<T>(act, z, mask.template bits<V>(row, column), static_cast<A>(p.behind.scale)));
}

template <class Known, class T>
FUSED_MLP_DEVICE void elements(const ElementParameters& p) {
  Known::template choose<Acc<T>>(p.behind.activation, static_cast<Acc<T>>(p.behind.slope),
                                 [&](const auto& act) {
                                   if (p.vectors)
                                     elements<Known, T, kPackWidth<T>>(p, act);
                                   else
                                     elements<Known, T, 1>(p, act);
                                 });
}

}  // namespace fused_mlp::cuda::gemm

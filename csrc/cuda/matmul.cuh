// Products of matrices in shared memory: a warp computes 16 x 32 blocks.
//
// A math names the type that operands are stored in, how a matrix is laid out so that no access
// has bank conflicts, and three products, all with row-major operands:
//     product<false, false>   A[m][k] B[n][k]^T     a layer
//     product<false, true>    A[m][k] B[k][n]       its gradient to the input
//     product<true, true>     A[k][m]^T B[k][n]     its gradient to the weight
// Each lane holds 16 sums; `each` tells where they belong, in runs of kRun neighbouring columns.
#pragma once

#include "device.cuh"

namespace fused_mlp::cuda {

constexpr int kBlockRows = 16;
constexpr int kBlockColumns = 32;

__host__ __device__ constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// ---------------------------------------------------------------- FMA
// T is the type of the tensors; S, what is stored and multiplied, float or double.
template <class T_, class S>
struct Fma {
  using T = T_;
  using Storage = S;
  using A = S;
  static constexpr bool kTensorCores = false;
  static constexpr int kPack = 16 / sizeof(S);
  static constexpr int kPad = kPack;
  static constexpr int kRowPad = kPack;

  // An odd number of 16-byte packs a row: eight rows start in eight different bank groups.
  __host__ __device__ static constexpr int leading(int columns) {
    const int packs = round_up(columns, kPack) / kPack;
    return (packs | 1) * kPack;
  }
  __host__ __device__ static constexpr int gradient_leading(int columns) {
    return round_up(columns, kPack);
  }
  FUSED_MLP_DEVICE static int at(int row, int column, int ld) { return row * ld + column; }
  FUSED_MLP_DEVICE static S store(A value) { return widen(narrow<T>(value)); }
  FUSED_MLP_DEVICE static S from(T value) { return widen(value); }
  FUSED_MLP_DEVICE static A load(S value) { return value; }

  template <bool TB>
  static constexpr int kRun = TB ? kPack : 1;

  // Row i (0 … 3) of a lane; two neighbouring rows a lane keep epilogues free of conflicts.
  template <bool TA>
  FUSED_MLP_DEVICE static int row(int i) {
    const int tm = (threadIdx.x % 32) / 8;
    constexpr int kRows = TA ? kPack : 2;
    return kRows * tm + i % kRows + 4 * kRows * (i / kRows);
  }
  template <bool TB>
  FUSED_MLP_DEVICE static int column(int j) {
    const int tn = threadIdx.x % 8;
    return TB ? kPack * tn + j % kPack + 8 * kPack * (j / kPack) : tn + 8 * j;
  }

  template <bool TA, bool TB>
  FUSED_MLP_DEVICE static void product(A (&c)[16], const S* a, int lda, const S* b, int ldb, int m0,
                                       int m_count, int n0, int n_count, int k_count) {
    if constexpr (!TA && !TB) {
      const S *rows[4], *columns[4];
      const int groups = (n_count - n0 + 7) / 8;  // of eight columns, at most four count
#pragma unroll
      for (int i = 0; i < 4; ++i) rows[i] = a + (m0 + row<TA>(i)) * lda;
#pragma unroll
      for (int j = 0; j < 4; ++j) columns[j] = b + min(n0 + column<TB>(j), n_count - 1) * ldb;
      for (int k = 0; k < k_count; k += kPack) {
        Pack<S, kPack> av[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) av[i] = load_pack<kPack>(rows[i] + k);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j >= groups) break;
          const Pack<S, kPack> bv = load_pack<kPack>(columns[j] + k);
#pragma unroll
          for (int q = 0; q < kPack; ++q)
#pragma unroll
            for (int i = 0; i < 4; ++i) c[4 * i + j] = fused(av[i].at[q], bv.at[q], c[4 * i + j]);
        }
      }
    } else {
      const int n_last = round_up(n_count, kPack) - kPack;
      int columns[4 / kPack];
#pragma unroll
      for (int j = 0; j < 4 / kPack; ++j) columns[j] = min(n0 + column<true>(j * kPack), n_last);
      if constexpr (!TA) {
        for (int k = 0; k < k_count; k += kPack) {
          Pack<S, kPack> av[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) av[i] = load_pack<kPack>(a + (m0 + row<false>(i)) * lda + k);
#pragma unroll
          for (int q = 0; q < kPack; ++q) {
#pragma unroll
            for (int j = 0; j < 4 / kPack; ++j) {
              const Pack<S, kPack> bv = load_pack<kPack>(b + (k + q) * ldb + columns[j]);
#pragma unroll
              for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int r = 0; r < kPack; ++r) {
                  A& sum = c[4 * i + kPack * j + r];
                  sum = fused(av[i].at[q], bv.at[r], sum);
                }
            }
          }
        }
      } else {
        const int m_last = round_up(m_count, kPack) - kPack;
        int rows[4 / kPack];
#pragma unroll
        for (int i = 0; i < 4 / kPack; ++i) rows[i] = min(m0 + row<true>(i * kPack), m_last);
        for (int k = 0; k < k_count; ++k) {
          Pack<S, kPack> av[4 / kPack], bv[4 / kPack];
#pragma unroll
          for (int i = 0; i < 4 / kPack; ++i) av[i] = load_pack<kPack>(a + k * lda + rows[i]);
#pragma unroll
          for (int j = 0; j < 4 / kPack; ++j) bv[j] = load_pack<kPack>(b + k * ldb + columns[j]);
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
              c[4 * i + j] =
                  fused(av[i / kPack].at[i % kPack], bv[j / kPack].at[j % kPack], c[4 * i + j]);
        }
      }
    }
  }

  // Calls visit(row, column, Pack<A, kRun<TB>>) for the lane's sums in columns below n_count.
  template <bool TA, bool TB, class Visit>
  FUSED_MLP_DEVICE static void each(const A (&c)[16], int m0, int n0, int n_count, Visit visit) {
    constexpr int kWidth = kRun<TB>;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; j += kWidth) {
        if (n0 + column<TB>(j) >= n_count) continue;
        Pack<A, kWidth> values;
#pragma unroll
        for (int r = 0; r < kWidth; ++r) values.at[r] = c[4 * i + j + r];
        visit(m0 + row<TA>(i), n0 + column<TB>(j), values);
      }
  }
};

// ---------------------------------------------------------------- tensor cores
// Where the sums of an m16n8 fragment belong.
struct Fragments {
  template <bool TB>
  static constexpr int kRun = 2;

  template <bool TA, bool TB, class Visit>
  FUSED_MLP_DEVICE static void each(const float (&c)[16], int m0, int n0, int n_count,
                                    Visit visit) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (n0 + 8 * j >= n_count) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Pack<float, 2> values = {c[4 * j + 2 * h], c[4 * j + 2 * h + 1]};
        visit(m0 + lane / 4 + 8 * h, n0 + 8 * j + 2 * (lane % 4), values);
      }
    }
  }
};

// float rounded to tf32; rows of 32 columns are permuted so that rows and columns of a matrix can
// both be read as fragments.
struct Tf32 : Fragments {
  using T = float;
  using Storage = float;
  using A = float;
  static constexpr bool kTensorCores = true;
  static constexpr int kPad = 16;
  static constexpr int kRowPad = 16;

  __host__ __device__ static constexpr int leading(int columns) { return round_up(columns, 32); }
  __host__ __device__ static constexpr int gradient_leading(int columns) {
    return round_up(columns, 32) + 8;
  }
  FUSED_MLP_DEVICE static int at(int row, int column, int ld) {
    return row * ld + (column ^ (8 * (row & 3) + (row & 4)));
  }
  FUSED_MLP_DEVICE static float store(float value) {
#if __CUDA_ARCH__ >= 800
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return __uint_as_float(bits);
#else
    return value;
#endif
  }
  FUSED_MLP_DEVICE static float from(float value) { return store(value); }
  FUSED_MLP_DEVICE static float load(float value) { return value; }

  template <bool TA, bool TB>
  FUSED_MLP_DEVICE static void product(float (&c)[16], const float* a, int lda, const float* b,
                                       int ldb, int m0, int, int n0, int n_count, int k_count) {
#if __CUDA_ARCH__ >= 800
    const int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
    const int tiles = (round_up(n_count, kPad) - n0) / 8;
    const auto operand = [](const float* matrix, bool transposed, int outer, int k, int ld) {
      return __float_as_uint(transposed ? matrix[at(k, outer, ld)] : matrix[at(outer, k, ld)]);
    };
    for (int k = 0; k < k_count; k += 8) {
      uint32_t av[4];
#pragma unroll
      for (int r = 0; r < 4; ++r)
        av[r] = operand(a, TA, m0 + group + 8 * (r & 1), k + t + 4 * (r >> 1), lda);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (j >= tiles) break;
        const uint32_t b0 = operand(b, TB, n0 + 8 * j + group, k + t, ldb);
        const uint32_t b1 = operand(b, TB, n0 + 8 * j + group, k + t + 4, ldb);
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
            "{%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[4 * j]), "+f"(c[4 * j + 1]), "+f"(c[4 * j + 2]), "+f"(c[4 * j + 3])
            : "r"(av[0]), "r"(av[1]), "r"(av[2]), "r"(av[3]), "r"(b0), "r"(b1));
      }
    }
#endif
  }
};

// bfloat16 or float16; ldmatrix reads rows as they lie or transposed.
template <class T_>
struct Mma16 : Fragments {
  using T = T_;
  using Storage = T;
  using A = float;
  static constexpr bool kTensorCores = true;
  static constexpr int kPad = 16;
  static constexpr int kRowPad = 16;

  // An odd number of 16-byte packs a row, as in Fma.
  __host__ __device__ static constexpr int leading(int columns) {
    return round_up(columns, 16) + 8;
  }
  __host__ __device__ static constexpr int gradient_leading(int columns) {
    return round_up(columns, 32) + 8;
  }
  FUSED_MLP_DEVICE static int at(int row, int column, int ld) { return row * ld + column; }
  FUSED_MLP_DEVICE static T store(float value) { return narrow<T>(value); }
  FUSED_MLP_DEVICE static T from(T value) { return value; }
  FUSED_MLP_DEVICE static float load(T value) { return widen(value); }

  template <bool TRANSPOSED>
  FUSED_MLP_DEVICE static void load_matrices(uint32_t (&r)[4], const T* row) {
#if __CUDA_ARCH__ >= 800
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (TRANSPOSED)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(address)
                   : "memory");
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(address)
                   : "memory");
#endif
  }

  FUSED_MLP_DEVICE static void multiply(float* c, const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    if constexpr (sizeof(T) == 2 && Is<T, __half>::value)
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
          "{%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
          "{%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
  }

  template <bool TA, bool TB>
  FUSED_MLP_DEVICE static void product(float (&c)[16], const T* a, int lda, const T* b, int ldb,
                                       int m0, int, int n0, int n_count, int k_count) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    const int tiles = (round_up(n_count, kPad) - n0) / 8;
    for (int k = 0; k < k_count; k += 16) {
      uint32_t av[4], bv[4];
      if constexpr (TA)
        load_matrices<true>(av, a + (k + 8 * (matrix / 2) + r) * lda + m0 + 8 * (matrix % 2));
      else
        load_matrices<false>(av, a + (m0 + lane % 16) * lda + k + 8 * (lane / 16));
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        if (j >= tiles) break;
        if constexpr (TB)
          load_matrices<true>(bv, b + (k + 8 * (matrix % 2) + r) * ldb + n0 + 8 * (j + matrix / 2));
        else
          load_matrices<false>(bv,
                               b + (n0 + 8 * (j + matrix / 2) + r) * ldb + k + 8 * (matrix % 2));
        multiply(c + 4 * j, av, bv[0], bv[1]);
        multiply(c + 4 * j + 4, av, bv[2], bv[3]);
      }
    }
  }

 private:
  template <class X, class Y>
  struct Is {
    static constexpr bool value = false;
  };
  template <class X>
  struct Is<X, X> {
    static constexpr bool value = true;
  };
};

// A block's warps share out the 16 x 32 blocks of an m_count x n_count product.
template <class M, bool TA, bool TB, class Visit>
FUSED_MLP_DEVICE void multiply_all(const typename M::Storage* a, int lda,
                                   const typename M::Storage* b, int ldb, int m_count, int n_count,
                                   int k_count, Visit visit) {
  const int row_blocks = (m_count + kBlockRows - 1) / kBlockRows;
  const int blocks = row_blocks * ((n_count + kBlockColumns - 1) / kBlockColumns);
  for (int block = threadIdx.x / 32; block < blocks; block += blockDim.x / 32) {
    const int m0 = block % row_blocks * kBlockRows, n0 = block / row_blocks * kBlockColumns;
    typename M::A c[16] = {};
    M::template product<TA, TB>(c, a, lda, b, ldb, m0, m_count, n0, n_count,
                                round_up(k_count, M::kPad));
    M::template each<TA, TB>(c, m0, n0, round_up(n_count, M::kPad), visit);
  }
}

// Stores a run of sums as storage numbers; columns from `count` on become zero.
template <class M, int W>
FUSED_MLP_DEVICE void store_run(typename M::Storage* matrix, int ld, int row, int column, int count,
                                const Pack<typename M::A, W>& values) {
  Pack<typename M::Storage, W> stored;
#pragma unroll
  for (int r = 0; r < W; ++r)
    stored.at[r] = M::store(column + r < count ? values.at[r] : typename M::A(0));
  store_pack<W>(matrix + M::at(row, column, ld), stored);
}

}  // namespace fused_mlp::cuda

// Device-side pieces that every kernel shares: number types, 16-byte packs, Welford moments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fused_mlp::cuda {

#define FUSED_MLP_DEVICE __device__ __forceinline__

// The type sums are kept in: double for double, else float.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulator<T>::type;

FUSED_MLP_DEVICE float widen(float x) { return x; }
FUSED_MLP_DEVICE double widen(double x) { return x; }
FUSED_MLP_DEVICE float widen(__half x) { return __half2float(x); }
FUSED_MLP_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
FUSED_MLP_DEVICE T narrow(Acc<T> x) {
  return x;
}
template <>
FUSED_MLP_DEVICE __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
FUSED_MLP_DEVICE __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

FUSED_MLP_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FUSED_MLP_DEVICE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
FUSED_MLP_DEVICE float root(float x) { return sqrtf(x); }
FUSED_MLP_DEVICE double root(double x) { return sqrt(x); }

// What fits in one 128-bit access.
template <class T>
constexpr int kPackWidth = 16 / sizeof(T);

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};

// The built-in type of one access of so many bytes. Accesses go through it because the compiler
// splits a struct's copy into its members, and then does not always join them again.
template <int BYTES>
struct Word {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <int N, class T>
FUSED_MLP_DEVICE Pack<T, N> load_pack(const T* from) {
  Pack<T, N> pack;
  if constexpr (N == 1) {
    pack.at[0] = *from;
  } else {
    const auto word = *reinterpret_cast<const typename Word<N * sizeof(T)>::type*>(from);
    memcpy(&pack, &word, sizeof(pack));
  }
  return pack;
}

template <int N, class T>
FUSED_MLP_DEVICE void store_pack(T* to, const Pack<T, N>& pack) {
  if constexpr (N == 1) {
    *to = pack.at[0];
  } else {
    typename Word<N * sizeof(T)>::type word;
    memcpy(&word, &pack, sizeof(pack));
    *reinterpret_cast<typename Word<N * sizeof(T)>::type*>(to) = word;
  }
}

// The same to global memory. The compiler splits the store above into single elements where it
// loses sight of the alignment (float: 4 stores instead of 1), so this one is spelled out.
template <int N, class T>
FUSED_MLP_DEVICE void store_global(T* to, const Pack<T, N>& pack) {
  if constexpr (N == 1) {
    *to = pack.at[0];
  } else {
    typename Word<N * sizeof(T)>::type word;
    memcpy(&word, &pack, sizeof(pack));
    __stwb(reinterpret_cast<typename Word<N * sizeof(T)>::type*>(to), word);
  }
}

template <class T>
FUSED_MLP_DEVICE bool aligned16(const T* pointer) {
  return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0;
}

// Count, mean and sum of squared deviations of a set of numbers.
template <class A>
struct Moments {
  A count, mean, m2;
};

// The moments of the union of two sets (Chan et al.).
template <class A>
FUSED_MLP_DEVICE Moments<A> merge(const Moments<A>& a, const Moments<A>& b) {
  const A count = a.count + b.count;
  if (b.count == A(0)) return a;
  const A share = b.count / count;
  const A delta = b.mean - a.mean;
  return {count, fused(delta, share, a.mean), a.m2 + b.m2 + delta * delta * (a.count * share)};
}

// A parameter stored in T or, where `wide`, in float.
template <class T>
FUSED_MLP_DEVICE Acc<T> load_parameter(const void* data, bool wide, int64_t k) {
  return wide ? static_cast<Acc<T>>(static_cast<const float*>(data)[k])
              : widen(static_cast<const T*>(data)[k]);
}

template <class T>
FUSED_MLP_DEVICE void store_parameter(void* data, bool wide, int64_t k, Acc<T> value) {
  if (wide)
    static_cast<float*>(data)[k] = static_cast<float>(value);
  else
    static_cast<T*>(data)[k] = narrow<T>(value);
}

}  // namespace fused_mlp::cuda

// SIMD vectors of the instruction set this unit is compiled for, and the element types they load.
//
// GCC/Clang vector extensions: one source serves SSE2, AVX2, AVX-512 and NEON. Everything lives in
// a namespace named after the instruction set, so that the linker never merges two of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FUSED_MLP_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FUSED_MLP_VECTOR_BYTES 32
#else
#define FUSED_MLP_VECTOR_BYTES 16
#endif

#define FUSED_MLP_INLINE inline __attribute__((always_inline))

namespace fused_mlp {

// The half types as they lie in memory; arithmetic is done in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace fused_mlp

namespace fused_mlp::FUSED_MLP_ISA {

// The type sums and activations of elements of type S are kept in.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class T>
struct VecOf {
  typedef T Type __attribute__((vector_size(FUSED_MLP_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::Type;

// Lanes of a vector of T.
template <class T>
constexpr int kLanes = FUSED_MLP_VECTOR_BYTES / static_cast<int>(sizeof(T));

typedef uint32_t VecU32 __attribute__((vector_size(FUSED_MLP_VECTOR_BYTES)));
typedef uint16_t VecU16 __attribute__((vector_size(FUSED_MLP_VECTOR_BYTES / 2)));

template <class T>
FUSED_MLP_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};  // value - 0 keeps the sign of zero, value + 0 does not
}

template <class T>
FUSED_MLP_INLINE Vec<T> load_raw(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
FUSED_MLP_INLINE void store_raw(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}

// -------------------------------------------------------------------------- element types

FUSED_MLP_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Rounds to nearest even; a NaN stays one.
FUSED_MLP_INLINE BFloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

// Exact: scales the exponent by a multiplication, which also normalizes denormals.
FUSED_MLP_INLINE float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  uint32_t bits = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
  float value;
  if (bits >= 0x0F800000u) {  // infinity and NaN
    bits |= 0x7F800000u;
    std::memcpy(&value, &bits, sizeof(value));
  } else {
    std::memcpy(&value, &bits, sizeof(value));
    value *= 0x1p112f;
  }
  std::memcpy(&bits, &value, sizeof(bits));
  bits |= sign;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Rounds to nearest even through the float adder; overflow gives infinity, a NaN stays one.
FUSED_MLP_INLINE Float16 to_float16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
  if (bits >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};
  if (bits < 0x38800000u) {  // a denormal or zero: the adder aligns it to 2**-24
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    value += 0.5f;
    std::memcpy(&bits, &value, sizeof(bits));
    return {static_cast<uint16_t>(sign | (bits - 0x3F000000u))};
  }
  bits += 0xC8000FFFu + ((bits >> 13) & 1u);  // rebias the exponent, round half to even
  return {static_cast<uint16_t>(sign | (bits >> 13))};
}

FUSED_MLP_INLINE float widen(float x) { return x; }
FUSED_MLP_INLINE double widen(double x) { return x; }
FUSED_MLP_INLINE float widen(BFloat16 x) { return to_float(x); }
FUSED_MLP_INLINE float widen(Float16 x) { return to_float(x); }

template <class S>
FUSED_MLP_INLINE S narrow(Compute<S> x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    return to_bfloat16(x);
  } else if constexpr (std::is_same_v<S, Float16>) {
    return to_float16(x);
  } else {
    return x;
  }
}

// One vector of elements of type S, in the compute type.
template <class S>
FUSED_MLP_INLINE Vec<Compute<S>> load(const S* p) {
  using T = Compute<S>;
  if constexpr (std::is_same_v<S, T>) {
    return load_raw(p);
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    VecU16 half;
    std::memcpy(&half, p, sizeof(half));
    const VecU32 bits = __builtin_convertvector(half, VecU32) << 16;
    Vec<float> v;
    std::memcpy(&v, &bits, sizeof(v));
    return v;
  } else {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Vec<float> v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(p[i]);
    return v;
#endif
  }
}

// As to_bfloat16 of each lane; the instruction for it takes denormals for zero.
FUSED_MLP_INLINE VecU16 to_bfloat16(Vec<float> v) {
#if defined(__AVX512BF16__)
  return (VecU16)_mm512_cvtneps_pbh((__m512)v);
#else
  VecU32 bits;
  std::memcpy(&bits, &v, sizeof(bits));
  const VecU32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const VecU32 is_nan = (VecU32)((bits & 0x7FFFFFFFu) > 0x7F800000u);
  const VecU32 quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), VecU16);
#endif
}

template <class S>
FUSED_MLP_INLINE void store(S* p, Vec<Compute<S>> v) {
  using T = Compute<S>;
  if constexpr (std::is_same_v<S, T>) {
    store_raw(p, v);
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    const VecU16 half = to_bfloat16(v);
    std::memcpy(p, &half, sizeof(half));
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
#else
    for (int i = 0; i < kLanes<float>; ++i) p[i] = to_float16(v[i]);
#endif
  }
}

// The first `count` (fewer than a vector's) elements; the other lanes are `fill`. One masked
// instruction (in bfloat16 a few) on AVX-512, a quarter of a 5-column gradient's copy by lanes.
// Elsewhere out of line, as is store_some: inlined into every loop's tail they made the library
// four times as slow to compile.
template <class S>
__attribute__((noinline)) Vec<Compute<S>> load_lanes(const S* p, int count, Compute<S> fill) {
  Vec<Compute<S>> v = splat<Compute<S>>(fill);
  for (int i = 0; i < count; ++i) v[i] = widen(p[i]);
  return v;
}

template <class S>
__attribute__((noinline)) void store_lanes(S* p, Vec<Compute<S>> v, int count) {
  for (int i = 0; i < count; ++i) p[i] = narrow<S>(v[i]);
}

template <class S>
FUSED_MLP_INLINE Vec<Compute<S>> load_some(const S* p, int count, Compute<S> fill = 0) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>) {
    return (Vec<float>)_mm512_mask_loadu_ps((__m512)splat(fill),
                                            static_cast<__mmask16>((1u << count) - 1), p);
  } else if constexpr (std::is_same_v<S, double>) {
    return (Vec<double>)_mm512_mask_loadu_pd((__m512d)splat(fill),
                                             static_cast<__mmask8>((1u << count) - 1), p);
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    const VecU16 half = (VecU16)_mm256_maskz_loadu_epi16(mask, p);
    const VecU32 bits = __builtin_convertvector(half, VecU32) << 16;
    return (Vec<float>)_mm512_mask_mov_ps((__m512)splat(fill), mask, (__m512)bits);
  }
#endif
  return load_lanes(p, count, fill);
}

template <class S>
FUSED_MLP_INLINE void store_some(S* p, Vec<Compute<S>> v, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>) {
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
  } else if constexpr (std::is_same_v<S, double>) {
    return _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), (__m512d)v);
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    return _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1),
                                    (__m256i)to_bfloat16(v));
  }
#endif
  store_lanes(p, v, count);
}

// ------------------------------------------------------------------------------ arithmetic

// The integers as wide as T; comparisons of vectors give masks of them.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <class T>
FUSED_MLP_INLINE Vec<T> select(Vec<Bits<T>> mask, Vec<T> yes, Vec<T> no) {
  return mask ? yes : no;
}

// max(x, 0) that keeps a NaN, as torch.relu does.
template <class T>
FUSED_MLP_INLINE Vec<T> relu(Vec<T> x) {
  return select<T>(x <= Vec<T>{}, Vec<T>{}, x);
}

// x where x > 0, x * slope elsewhere; a NaN stays one.
template <class T>
FUSED_MLP_INLINE Vec<T> leaky_relu(Vec<T> x, Vec<T> slope) {
  return select<T>(x > Vec<T>{}, x, x * slope);
}

template <class T>
FUSED_MLP_INLINE T sum_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

FUSED_MLP_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FUSED_MLP_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
FUSED_MLP_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FUSED_MLP_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace fused_mlp::FUSED_MLP_ISA

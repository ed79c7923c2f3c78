// Stores that go past the caches, for results too large to be found there again: the line that
// would be overwritten is not read first, and what lies in the cache stays there.
#pragma once

#include "cpu/kernels/moments.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fused_mlp::FUSED_MLP_ISA {

// Results of so many bytes and what they are made of fit no common last level of two cores
// together. A number, because what systems say of it is wrong in virtual machines.
constexpr int64_t kPastCache = int64_t{32} << 20;

// Whether the vectors of a result[rows, columns] should and can go past the caches. Rows that are
// read as longer ones, of 16 columns or 10, are whole vectors all the same.
template <class S>
FUSED_MLP_INLINE bool goes_past_cache(const S* to, int64_t rows, int64_t columns) {
  const bool whole = columns % kLanes<Compute<S>> == 0 || rows == 1 || columns < kFoldedColumns;
  return whole && rows * columns * static_cast<int64_t>(sizeof(S)) >= kPastCache &&
         reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

// Stores a vector to an address that is a multiple of its size.
template <class S>
FUSED_MLP_INLINE void store_past_cache(S* p, Vec<Compute<S>> v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>) return _mm512_stream_ps(p, (__m512)v);
  if constexpr (std::is_same_v<S, double>) return _mm512_stream_pd(p, (__m512d)v);
  if constexpr (std::is_same_v<S, BFloat16>) {
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)to_bfloat16(v));
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<S, float>) return _mm256_stream_ps(p, (__m256)v);
  if constexpr (std::is_same_v<S, double>) return _mm256_stream_pd(p, (__m256d)v);
  if constexpr (std::is_same_v<S, BFloat16>) {
    return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)to_bfloat16(v));
  }
#elif defined(__SSE2__)
  if constexpr (std::is_same_v<S, float>) return _mm_stream_ps(p, (__m128)v);
  if constexpr (std::is_same_v<S, double>) return _mm_stream_pd(p, (__m128d)v);
#endif
  store(p, v);
}

// Makes a task's stores past the caches visible to other threads before they are told it is done.
struct Fence {
  bool needed;
  ~Fence() {
#if defined(__SSE2__)
    if (needed) _mm_sfence();
#endif
  }
};

// Stores a vector, or the first lanes of one, past the caches if `past`.
template <class S>
FUSED_MLP_INLINE void store_result(S* p, Vec<Compute<S>> v, int width, bool past) {
  if (past && width == kLanes<Compute<S>>) {
    store_past_cache(p, v);
  } else {
    store_up_to(p, v, width);
  }
}

}  // namespace fused_mlp::FUSED_MLP_ISA

#include "cpu/kernels/dropout.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_mlp::FUSED_MLP_ISA {
namespace {

typedef uint64_t VecU64 __attribute__((vector_size(FUSED_MLP_VECTOR_BYTES)));
typedef uint16_t VecHalves __attribute__((vector_size(FUSED_MLP_VECTOR_BYTES)));
constexpr int kCounters = FUSED_MLP_VECTOR_BYTES / 8;

// The 64-bit products of the low halves of each lane; the high halves are not read.
FUSED_MLP_INLINE VecU64 multiply_low(VecU64 x, uint32_t factor) {
#if defined(__AVX512F__)
  return (VecU64)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
  return (VecU64)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#elif defined(__x86_64__)
  return (VecU64)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(factor));
#else
  return (x & 0xFFFFFFFFu) * factor;
#endif
}

// One counter a 64-bit lane, a word in each lane's low half: a multiplication then gives both
// halves of its product without a shuffle, and rubbish in the high halves does no harm.
struct Counters {
  VecU64 c0, c1, c2, c3;
};

// Each round waits for the one before, and a processor looks little further ahead than the rounds
// of one vector: four that take them together need 0.85 ns a counter in place of 1.1 on
// AVX-512, 2.3 in place of 3.1 on AVX2, 6 in place of 14 on SSE2.
constexpr int kTogether = 4;

FUSED_MLP_INLINE void run_rounds(Counters (&counters)[kTogether], uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
  for (int round = 0; round < philox::kRounds; ++round) {
    for (Counters& c : counters) {
      const VecU64 product0 = multiply_low(c.c0, philox::kMultiplier0);
      const VecU64 product1 = multiply_low(c.c2, philox::kMultiplier1);
      c = {(product1 >> 32) ^ c.c1 ^ k0, product1, (product0 >> 32) ^ c.c3 ^ k1, product0};
    }
    k0 += philox::kWeyl0;
    k1 += philox::kWeyl1;
  }
}

// Eight decisions a lane: a byte each, written in the order of lane_of_byte.
FUSED_MLP_INLINE void decide(const Counters& c, VecHalves threshold, uint8_t* bytes) {
  const VecU64 low = (c.c0 & 0xFFFFFFFFu) | (c.c1 << 32);
  const VecU64 high = (c.c2 & 0xFFFFFFFFu) | (c.c3 << 32);
#if defined(__AVX512BW__)
  // Both halves of a lane side by side: a comparison gives the bytes of every second lane.
  const __m512i even = _mm512_unpacklo_epi64((__m512i)low, (__m512i)high);
  const __m512i odd = _mm512_unpackhi_epi64((__m512i)low, (__m512i)high);
  const uint32_t kept[2] = {_mm512_cmpge_epu16_mask(even, (__m512i)threshold),
                            _mm512_cmpge_epu16_mask(odd, (__m512i)threshold)};
  std::memcpy(bytes, kept, sizeof(kept));
#else
  const VecU64 low_bits = VecU64{} + 0x0008000400020001u;
  const VecU64 high_bits = VecU64{} + 0x0080004000200010u;
  VecU64 bits = ((VecU64)((VecHalves)low >= threshold) & low_bits) |
                ((VecU64)((VecHalves)high >= threshold) & high_bits);
  bits |= bits >> 32;
  bits |= bits >> 16;
  for (int lane = 0; lane < kCounters; ++lane) bytes[lane] = static_cast<uint8_t>(bits[lane]);
#endif
}

// The lane that a byte of `decide` comes from.
FUSED_MLP_INLINE int lane_of_byte(int byte) {
#if defined(__AVX512BW__)
  return byte % 4 * 2 + byte / 4;
#else
  return byte;
#endif
}

}  // namespace

void draw_mask(const Dropout& dropout, int64_t first_row, int64_t rows, int64_t first_column,
               int64_t columns, uint8_t* mask) {
  const int64_t groups = mask_bytes(columns);
  if (groups == 0) return;
  const uint32_t threshold = philox::threshold(dropout.p);
  if (threshold > 0xFFFFu) {
    std::memset(mask, 0, static_cast<size_t>(rows * groups));
    return;
  }
  const philox::Stream stream =
      philox::make_stream(dropout.seed[0], dropout.seed[1], dropout.stream);
  const VecHalves limit = VecHalves{} + static_cast<uint16_t>(threshold);
  // The bytes of the mask in order are the groups of the first row, of the second, …: a lane takes
  // every kCounters-th of them and walks on by that many.
  const uint64_t first_group = static_cast<uint64_t>(first_column / philox::kColumnsPerGroup);
  VecU64 row, group;
  for (int byte = 0; byte < kCounters; ++byte) {
    row[lane_of_byte(byte)] = static_cast<uint64_t>(first_row + byte / groups);
    group[lane_of_byte(byte)] = first_group + static_cast<uint64_t>(byte % groups);
  }
  const uint64_t whole_rows = static_cast<uint64_t>(kCounters / groups);
  const uint64_t step = static_cast<uint64_t>(kCounters % groups);
  const VecU64 end = VecU64{} + (first_group + static_cast<uint64_t>(groups));
  for (int64_t i = 0; i < rows * groups;) {
    Counters counters[kTogether];
    for (Counters& c : counters) {
      c = {row, row >> 32, group, VecU64{} + stream.counter3};
      group += step;
      const VecU64 wrapped = (VecU64)(group >= end);
      group -= wrapped & static_cast<uint64_t>(groups);
      row += whole_rows - wrapped;  // a set mask is -1
    }
    run_rounds(counters, stream.key0, stream.key1);
    for (const Counters& c : counters) {
      decide(c, limit, mask + i);
      i += kCounters;
    }
  }
}

}  // namespace fused_mlp::FUSED_MLP_ISA

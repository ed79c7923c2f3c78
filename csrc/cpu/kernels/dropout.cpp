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

FUSED_MLP_INLINE void run_rounds(Counters& c, uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
  for (int round = 0; round < philox::kRounds; ++round) {
    const VecU64 product0 = multiply_low(c.c0, philox::kMultiplier0);
    const VecU64 product1 = multiply_low(c.c2, philox::kMultiplier1);
    c = {(product1 >> 32) ^ c.c1 ^ k0, product1, (product0 >> 32) ^ c.c3 ^ k1, product0};
    k0 += philox::kWeyl0;
    k1 += philox::kWeyl1;
  }
}

// Eight decisions a lane, gathered in its low byte.
FUSED_MLP_INLINE VecU64 decide(const Counters& c, VecHalves threshold) {
  const VecHalves low = (VecHalves)((c.c0 & 0xFFFFFFFFu) | (c.c1 << 32));
  const VecHalves high = (VecHalves)((c.c2 & 0xFFFFFFFFu) | (c.c3 << 32));
  const VecU64 low_bits = VecU64{} + 0x0008000400020001u;
  const VecU64 high_bits = VecU64{} + 0x0080004000200010u;
  VecU64 bits = ((VecU64)(low >= threshold) & low_bits) | ((VecU64)(high >= threshold) & high_bits);
  bits |= bits >> 32;
  return bits | (bits >> 16);
}

}  // namespace

void draw_mask(const Dropout& dropout, int64_t first_row, int64_t rows, int64_t columns,
               uint8_t* mask) {
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
  VecU64 row, group;
  for (int lane = 0; lane < kCounters; ++lane) {
    row[lane] = static_cast<uint64_t>(first_row + lane / groups);
    group[lane] = static_cast<uint64_t>(lane % groups);
  }
  const uint64_t whole_rows = static_cast<uint64_t>(kCounters / groups);
  const uint64_t step = static_cast<uint64_t>(kCounters % groups);
  const VecU64 end = VecU64{} + static_cast<uint64_t>(groups);
  for (int64_t i = 0; i < rows * groups; i += kCounters) {
    Counters counters = {row, row >> 32, group, VecU64{} + stream.counter3};
    run_rounds(counters, stream.key0, stream.key1);
    const VecU64 bytes = decide(counters, limit);
    for (int lane = 0; lane < kCounters; ++lane) mask[i + lane] = static_cast<uint8_t>(bytes[lane]);
    group += step;
    const VecU64 wrapped = (VecU64)(group >= end);
    group -= wrapped & end;
    row += whole_rows - wrapped;  // a set mask is -1
  }
}

}  // namespace fused_mlp::FUSED_MLP_ISA

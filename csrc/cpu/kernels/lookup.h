// Functions of |x| that become constant, from tables (scripts/activation_tables.py): for float on
// AVX-512, where two registers hold 32 entries and one instruction looks up 16 of them.
//
// |x| chooses one of 32 intervals, four to the octave, by three bits of its exponent and two of its
// mantissa; there a polynomial of degree 6 gives the value. That takes 21 instructions and no
// division: 0.30 ns an element of tanh where the formula of elementary.h takes 0.46, 0.34 ns of
// GELU's gradient where erf and exp take 0.8 (Emerald Rapids, one thread). The largest errors seen
// are 1.4 units in the last place of tanh, and 7.1e-8 of GELU's functions, which go from -0.13 to
// 1.13.
#pragma once

#include "cpu/kernels/vec.h"

namespace fused_mlp {

struct LookupTable {
  float lowest;  // where the first interval would begin if it did not reach down to 0
  float flat;    // from here on the function is constant; an interval begins here
  alignas(64) float rows[8][32];  // the intervals' middles; the terms of degree 0 … 6
};

}  // namespace fused_mlp

namespace fused_mlp::FUSED_MLP_ISA {

#if defined(__AVX512F__)
// Whether functions of T come from tables.
template <class T>
constexpr bool kLooksUp = std::is_same_v<T, float>;

// A NaN stays one: it compares with nothing, whatever interval its bits choose.
FUSED_MLP_INLINE Vec<float> look_up(const LookupTable& table, Vec<float> x) {
  const __m512 whole = _mm512_abs_ps((__m512)x), flat = _mm512_set1_ps(table.flat);
  const __m512 size = _mm512_mask_mov_ps(whole, _mm512_cmp_ps_mask(whole, flat, _CMP_GT_OQ), flat);
  // floats that are not negative are in the same order as integers
  const __m512i chosen = _mm512_max_epi32((__m512i)size, (__m512i)_mm512_set1_ps(table.lowest));
  const __m512i index = _mm512_srli_epi32(chosen, 21);  // of which five bits are looked at
  const auto entry = [&](int row) {
    const float* entries = table.rows[row];
    return (Vec<float>)_mm512_permutex2var_ps(_mm512_load_ps(entries), index,
                                              _mm512_load_ps(entries + 16));
  };
  const Vec<float> r = (Vec<float>)size - entry(0);
  Vec<float> sum = entry(7);
#pragma GCC unroll 6
  for (int row = 6; row > 0; --row) sum = sum * r + entry(row);
  return sum;
}
#else
template <class T>
constexpr bool kLooksUp = false;
#endif

}  // namespace fused_mlp::FUSED_MLP_ISA

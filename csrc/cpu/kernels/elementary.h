// exp, tanh and erf of vectors, for the activations.
//
// The polynomials are near-minimax fits (mpmath's chebyfit, 50 digits; linear programs for the last
// two): of expm1(r) / r for |r| <= ln(2) / 2, of erf(x) / x in x^2 for |x| <= 1, and beyond, as far
// as erf differs from 1, in double of exp(x^2) erfc(x) in (x - 3) / (x + 3), in float of log2 of
// erfc(x) and of (2^r - 1) / r for |r| <= 1 / 2, which takes half the instructions. The largest
// errors seen, in units in the last place, are 1.1 of exp, 3.3 of tanh and 2.4 of erf.
#pragma once

#include "cpu/kernels/lookup_tables.h"
#include "cpu/kernels/vec.h"

namespace fused_mlp::FUSED_MLP_ISA {

template <class T>
struct Series;

template <>
struct Series<float> {
  static constexpr float kLargest = 90, kSmallest = -110;  // exp overflows and underflows before
  static constexpr int kMantissa = 23, kBias = 127;
  // Added and taken off, rounds; the sum's last bits are the exponent of 2 to the rounded value.
  static constexpr float kRounder = 0x1.8p23f + kBias;
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kTanhFlat = 10, kErfFlat = 4;  // 1 from here on
  static constexpr float kExpm1[] = {0x1.000000p+0f, 0x1.000000p-1f, 0x1.555556p-3f,
                                     0x1.5554acp-5f, 0x1.1110c6p-7f, 0x1.6d75e6p-10f,
                                     0x1.a1520ap-13f};
  static constexpr float kErf[] = {0x1.20dd74p+0f,  -0x1.81273ep-2f, 0x1.ce2d10p-4f,
                                   -0x1.b7fabap-6f, 0x1.541270p-8f,  -0x1.a45088p-11f,
                                   0x1.4a5690p-14f};
  static constexpr float kLog2Erfc[] = {-0x1.0b9376p-11f, -0x1.a03fe4p+0f, -0x1.d76e8ep-1f,
                                        -0x1.30700cp-3f,  0x1.01b4d2p-5f,  -0x1.15eee8p-8f,
                                        0x1.18ba7cp-12f};
  static constexpr float kExp2m1[] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f,
                                      0x1.3cea88p-7f, 0x1.5bba0ep-10f};
};

template <>
struct Series<double> {
  static constexpr double kLargest = 720, kSmallest = -760;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRounder = 0x1.8p52 + kBias;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kTanhFlat = 20, kErfFlat = 6;
  static constexpr double kExpm1[] = {
      0x1.0000000000000p+0,  0x1.0000000000000p-1,  0x1.555555555555ap-3,  0x1.5555555555557p-5,
      0x1.111111110f1e5p-7,  0x1.6c16c16c15a48p-10, 0x1.a01a01b15de9dp-13, 0x1.a01a01a9f72adp-16,
      0x1.71ddf52ded199p-19, 0x1.27e4d3f50d87fp-22, 0x1.af639fa6e1b0bp-26, 0x1.1f7f6aa421dd8p-29};
  static constexpr double kErf[] = {
      0x1.20dd750429b6dp+0,  -0x1.812746b0379e6p-2,  0x1.ce2f21a042b30p-4,  -0x1.b82ce31284e00p-6,
      0x1.565bcd0dbaa38p-8,  -0x1.c02db3dac435fp-11, 0x1.f9a321d5b8e1ep-14, -0x1.f4d1e3183f7aep-17,
      0x1.b9df224ca4b97p-20, -0x1.5f1ecb6f0764cp-23, 0x1.f7b4bf3b13964p-27, -0x1.389d4f2641625p-30,
      0x1.05ffd737fb32ep-34};
  static constexpr double kErfcx[] = {
      0x1.6e9827d229d2dp-3,   -0x1.4e102b9cf8513p-2, 0x1.f6ff204105a04p-3,  -0x1.336ffbef08b8ap-3,
      0x1.258b13b00ec66p-4,   -0x1.8fa58eb5ea92cp-6, 0x1.17c839090a469p-8,  0x1.73101f6d2e434p-11,
      -0x1.39085f2b38287p-11, 0x1.7b9ef7977ceafp-15, 0x1.0cb2e63fe2177p-14, -0x1.af086905fc57fp-17,
      -0x1.0cc37e8e915adp-17, 0x1.0e3fb74fdc507p-19, 0x1.56695202d55bcp-20, 0x1.d0badb83f2cadp-29};
};

template <class T, size_t kCount>
FUSED_MLP_INLINE Vec<T> polynomial(Vec<T> x, const T (&coefficients)[kCount]) {
  Vec<T> sum = splat(coefficients[kCount - 1]);
#pragma GCC unroll 16
  for (int i = static_cast<int>(kCount) - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

template <class T>
FUSED_MLP_INLINE Vec<T> absolute(Vec<T> x) {
  return (Vec<T>)((Vec<Bits<T>>)x & ~(Vec<Bits<T>>)splat(T(-0.0)));
}

// The magnitude of a value that is not negative, with the sign of another.
template <class T>
FUSED_MLP_INLINE Vec<T> with_sign(Vec<T> magnitude, Vec<T> sign) {
  return (Vec<T>)((Vec<Bits<T>>)magnitude | ((Vec<Bits<T>>)sign & (Vec<Bits<T>>)splat(T(-0.0))));
}

// x = n ln(2) + r: exp(x) = 2^n + 2^n expm1(r).
template <class T>
struct Reduced {
  Vec<T> shifted, expm1;  // n + kRounder, expm1(r)

  // 2^n, where that is a normal number.
  FUSED_MLP_INLINE Vec<T> power() const {
    return (Vec<T>)((Vec<Bits<T>>)shifted << Series<T>::kMantissa);
  }
  // value 2^n for any n: in two factors where no instruction does it, for n may exceed the
  // exponents there are, in either direction.
  FUSED_MLP_INLINE Vec<T> scaled(Vec<T> value) const {
    using C = Series<T>;
#if defined(__AVX512F__)
    const Vec<T> n = shifted - C::kRounder;
    if constexpr (std::is_same_v<T, float>) {
      return (Vec<float>)_mm512_scalef_ps((__m512)value, (__m512)n);
    } else {
      return (Vec<double>)_mm512_scalef_pd((__m512d)value, (__m512d)n);
    }
#else
    const Vec<Bits<T>> n = (Vec<Bits<T>>)shifted - (Vec<Bits<T>>)splat(C::kRounder);
    const Vec<Bits<T>> half = n >> 1;
    return value * power_of_two(half) * power_of_two(n - half);
#endif
  }

 private:
  FUSED_MLP_INLINE static Vec<T> power_of_two(Vec<Bits<T>> n) {
    return (Vec<T>)((n + Series<T>::kBias) << Series<T>::kMantissa);
  }
};

template <class T>
FUSED_MLP_INLINE Reduced<T> reduce(Vec<T> x) {
  using C = Series<T>;
  const Vec<T> shifted = x * T(1.44269504088896340736) + C::kRounder;
  const Vec<T> n = shifted - C::kRounder;
  const Vec<T> r = (x - n * C::kLn2High) - n * C::kLn2Low;
  return {shifted, r * polynomial<T>(r, C::kExpm1)};
}

// A NaN stays one, infinities give infinity and 0.
template <class T>
FUSED_MLP_INLINE Vec<T> exp(Vec<T> x) {
  using C = Series<T>;
  x = select<T>(x > C::kLargest, splat(C::kLargest), x);
  x = select<T>(x < C::kSmallest, splat(C::kSmallest), x);
  const Reduced<T> y = reduce<T>(x);
  return y.scaled(y.expm1 + T(1));
}

// e / (e + 2) with e = expm1(2 x), right to the last places near zero too; 1 - 2 / (e + 2) where
// that rounds but once, which the gradient 1 - tanh(x)^2 needs.
template <class T>
FUSED_MLP_INLINE Vec<T> tanh_by_exp(Vec<T> x) {
  using C = Series<T>;
  Vec<T> size = absolute<T>(x);
  size = select<T>(size > C::kTanhFlat, splat(C::kTanhFlat), size);
  const Reduced<T> y = reduce<T>(size + size);
  const Vec<T> power = y.power();
  const Vec<T> expm1 = power * y.expm1 + (power - T(1));
  const Vec<Bits<T>> large = expm1 > T(2);
  const Vec<T> share = select<T>(large, splat(T(-2)), expm1) / (expm1 + T(2));
  return with_sign<T>(select<T>(large, share + T(1), share), x);
}

template <class T>
FUSED_MLP_INLINE Vec<T> tanh(Vec<T> x) {
  if constexpr (kLooksUp<T>) {
    return with_sign<T>(look_up(kTanhTable, x), x);
  } else {
    return tanh_by_exp<T>(x);
  }
}

// erfc(x) for 1 <= x <= kErfFlat.
FUSED_MLP_INLINE Vec<float> erfc_beyond_1(Vec<float> x) {
  using C = Series<float>;
  const Vec<float> exponent = polynomial<float>(x, C::kLog2Erfc);
  const Vec<float> shifted = exponent + C::kRounder;
  const Vec<Bits<float>> n = (Vec<Bits<float>>)shifted - (Vec<Bits<float>>)splat(C::kRounder);
  const Vec<float> r = exponent - (shifted - C::kRounder);
  const Vec<float> power = r * polynomial<float>(r, C::kExp2m1) + 1.0f;
  return (Vec<float>)((Vec<Bits<float>>)power + (n << C::kMantissa));
}

FUSED_MLP_INLINE Vec<double> erfc_beyond_1(Vec<double> x) {
  using C = Series<double>;
  return exp<double>(-(x * x)) * polynomial<double>((x - 3.0) / (x + 3.0), C::kErfcx);
}

template <class T>
FUSED_MLP_INLINE Vec<T> erf(Vec<T> x) {
  using C = Series<T>;
  Vec<T> size = absolute<T>(x);
  size = select<T>(size > C::kErfFlat, splat(C::kErfFlat), size);
  const Vec<T> near = size * polynomial<T>(size * size, C::kErf);
  // A NaN is not greater, and stays one.
  return with_sign<T>(select<T>(size > T(1), T(1) - erfc_beyond_1(size), near), x);
}

}  // namespace fused_mlp::FUSED_MLP_ISA

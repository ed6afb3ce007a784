// Elementary functions that a compiler vectorises: no table, no branch, no library call for float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define MIXKD_INLINE __host__ __device__ __forceinline__
#else
#define MIXKD_INLINE inline __attribute__((always_inline))
#endif

namespace mixkd {

// A variable and not the function of <limits>: device code may read constants but not call host functions.
template <typename T>
constexpr T INFINITE = std::numeric_limits<T>::infinity();

MIXKD_INLINE float float_of_bits(int32_t bits) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

MIXKD_INLINE int32_t bits_of_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(value);
#else
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

// e^x, within 2 ulp; below the smallest normal float 0, above the largest infinity; NaN stays NaN.
MIXKD_INLINE float exp_of(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  const float inside = x < -87.33f ? -87.33f : (x > 88.72f ? 88.72f : x);
  // Adding 1.5 * 2^23 leaves the nearest integer of x / ln 2 in the low bits.
  const float shifted = inside * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  // ln 2 in two parts, so that the first product is exact.
  const float r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  float series = 1.9875691500e-4f;
  series = series * r + 1.3981999507e-3f;
  series = series * r + 8.3334519073e-3f;
  series = series * r + 4.1665795894e-2f;
  series = series * r + 1.6666665459e-1f;
  series = series * r + 5.0000001201e-1f;
  series = (series * r) * r + r + 1.0f;
  // Two factors: 2^128 alone would be infinite.
  const int32_t exponent = bits_of_float(shifted) - 0x4b400000;
  const int32_t half = exponent >> 1;
  const float power = float_of_bits((half + 127) << 23) * float_of_bits((exponent - half + 127) << 23);
  const float value = series * power;
  const float low = x < -87.33f ? 0.0f : value;
  return x > 88.72f ? INFINITE<float> : low;
#endif
}

// 2^(n + r) for r in [-1/2, 1/2], exact for 0, else with relative error 9.2e-8; shifted = n + 1.5 * 2^23 + 127: its low
// bits hold n as a biased exponent, the others leave by the shift. n = -127 gives 0.
MIXKD_INLINE float exp2_of_parts(float shifted, float r) {
  float series = 1.32647273e-3f;
  series = series * r + 9.67151299e-3f;
  series = series * r + 5.55073358e-2f;
  series = series * r + 2.40222424e-1f;
  series = series * r + 6.93147004e-1f;
  series = series * r + 1.0f;
  return series * float_of_bits(static_cast<int32_t>(static_cast<uint32_t>(bits_of_float(shifted)) << 23));
}

// e^x for x <= 0, the argument of every softmax, in fewer steps than exp_of: 1 for 0 exactly, within 3 ulp above -20
// and to 1e-6 below, 0 from -88.02 on; NaN stays NaN.
MIXKD_INLINE float exp_of_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  const float inside = x < -88.02f ? -88.02f : x;
  const float shifted = inside * 1.44269504f + 12583039.0f;
  // x / ln 2 without its nearest integer, one rounding where products and sums are fused.
  return exp2_of_parts(shifted, inside * 1.44269504f - (shifted - 12583039.0f));
#endif
}

// 2^x for x <= 0: additions instead of products where those are what a loop waits for. 0 from -127 on.
MIXKD_INLINE float exp2_of_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return exp2f(x);
#else
  const float inside = x < -127.0f ? -127.0f : x;
  const float shifted = inside + 12583039.0f;
  return exp2_of_parts(shifted, inside - (shifted - 12583039.0f));
#endif
}

// ln x for x normal and positive, within 2 ulp; 0 gives -infinity; infinity and NaN stay. Not for denormals or x < 0.
MIXKD_INLINE float log_of(float x) {
#if defined(__CUDA_ARCH__)
  // Denormals count as 0, which saves their handling.
  float log2_x;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2_x) : "f"(x));
  return 0.6931471805599453f * log2_x;
#else
  const int32_t bits = bits_of_float(x);
  // The mantissa in [sqrt(1/2), sqrt(2)): 0x3f3504f3 is sqrt(1/2).
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  const float f = float_of_bits(bits - (exponent << 23)) - 1.0f;
  const float n = static_cast<float>(exponent);
  float series = 7.0376836292e-2f;
  series = series * f - 1.1514610310e-1f;
  series = series * f + 1.1676998740e-1f;
  series = series * f - 1.2420140846e-1f;
  series = series * f + 1.4249322787e-1f;
  series = series * f - 1.6668057665e-1f;
  series = series * f + 2.0000714765e-1f;
  series = series * f - 2.4999993993e-1f;
  series = series * f + 3.3333331174e-1f;
  const float square = f * f;
  const float small = (series * f * square - n * 2.12194440e-4f) - 0.5f * square;
  const float value = n * 0.693359375f + (f + small);
  const float low = x == 0.0f ? -INFINITE<float> : value;
  return x < INFINITE<float> ? low : x;
#endif
}

// ln x for the sum of probabilities that is at least the smallest normal number: like log_of, but with an error of 3e-8
// plus half a unit in the last place, and without the special case 0; infinity gives NaN.
MIXKD_INLINE float log_of_probability(float x) {
#if defined(__CUDA_ARCH__)
  return log_of(x);
#else
  const int32_t bits = bits_of_float(x);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  const float f = float_of_bits(bits - (exponent << 23)) + (x * 0.0f - 1.0f);  // NaN stays NaN
  float series = 8.67215097e-2f;
  series = series * f - 1.43790066e-1f;
  series = series * f + 1.49780035e-1f;
  series = series * f - 1.65644258e-1f;
  series = series * f + 1.99548751e-1f;
  series = series * f - 2.50016987e-1f;
  series = series * f + 3.33341658e-1f;
  const float square = f * f;
  return static_cast<float>(exponent) * 0.693147182f + (f + square * (series * f - 0.5f));
#endif
}
MIXKD_INLINE double log_of_probability(double x) { return ::log(x); }

// 2^x - 1 for |x| <= 0.72, without cancellation near 0: relative error 2.1e-7.
MIXKD_INLINE float exp2_minus_1_near_zero(float x) {
  float series = 1.54034467e-4f;
  series = series * x + 1.34537264e-3f;
  series = series * x + 9.61860828e-3f;
  series = series * x + 5.55017553e-2f;
  series = series * x + 2.40226418e-1f;
  series = series * x + 6.93147242e-1f;
  return series * x;
}

// e^x - 1 for |x| <= 1/2, likewise: relative error 1.9e-7.
MIXKD_INLINE float expm1_near_zero(float x) {
  float series = 1.38757483e-3f;
  series = series * x + 8.4023932e-3f;
  series = series * x + 4.16689701e-2f;
  series = series * x + 1.66661352e-1f;
  series = series * x + 4.99999821e-1f;
  return (series * x) * x + x;
}

// a / b for normal b, within 2 ulp.
MIXKD_INLINE float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}
MIXKD_INLINE double quotient(double a, double b) { return a / b; }

MIXKD_INLINE double exp_of(double x) { return ::exp(x); }
MIXKD_INLINE double log_of(double x) { return ::log(x); }
MIXKD_INLINE double exp_of_nonpositive(double x) { return ::exp(x); }
MIXKD_INLINE double exp2_of_nonpositive(double x) { return ::exp2(x); }
MIXKD_INLINE double expm1_near_zero(double x) { return ::expm1(x); }
MIXKD_INLINE double exp2_minus_1_near_zero(double x) { return ::expm1(x * 0.6931471805599453); }

// IEEE half precision <-> float by integer arithmetic, which vectorises; round to nearest even.
MIXKD_INLINE float float_of_half(uint16_t half) {
  const int32_t magnitude = (half & 0x7fff) << 13;
  // 2^112 moves the exponent's bias from 15 to 127, denormals included.
  const float value = float_of_bits(magnitude) * 5.192296858534828e33f;
  const int32_t special = bits_of_float(value) | (magnitude >= 0x0f800000 ? 0x7f800000 : 0);
  return float_of_bits(special | (static_cast<int32_t>(half & 0x8000) << 16));
}

MIXKD_INLINE uint16_t half_of_float(float value) {
  const int32_t bits = bits_of_float(value);
  const int32_t sign = bits & static_cast<int32_t>(0x80000000);
  const int32_t magnitude = bits ^ sign;
  // Normal halves: round the 13 low bits away, ties to even. Denormal ones: adding 0.5 lines the bits up at 2^-24.
  const int32_t rounded = (magnitude + ((15 - 127) * (1 << 23)) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const int32_t denormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000;
  const int32_t overflow = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const int32_t finite = magnitude < 0x38800000 ? denormal : rounded;
  const int32_t result = magnitude >= 0x47800000 ? overflow : finite;
  return static_cast<uint16_t>(result | ((sign >> 16) & 0x8000));
}

MIXKD_INLINE float float_of_bfloat16(uint16_t value) { return float_of_bits(static_cast<int32_t>(value) << 16); }

MIXKD_INLINE uint16_t bfloat16_of_float(float value) {
  const int32_t bits = bits_of_float(value);
  const int32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

}  // namespace mixkd

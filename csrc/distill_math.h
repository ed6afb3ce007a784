// The row formulas of every divergence, for one class at a time: no torch, no memory, CPU and CUDA alike.
//
// With q = softmax(s / tau) and v_j = dD / d log q_j = q_j dD/dq_j, the gradient of tau^2 D by the logit s_j is
// tau (v_j - q_j sum v). A backend sums value and v over the classes, then writes the gradient. Definitions and
// sources: mixkd_fast/ops/reference.py, which these formulas are tested against.
#pragma once

#include "fast_math.h"

namespace mixkd {

// In the order of mixkd_fast.ops.DivergenceName; NONE is a row without a teacher.
enum class Divergence : int {
  FORWARD_KL,
  REVERSE_KL,
  JSD,
  SKEW_FORWARD_KL,
  SKEW_REVERSE_KL,
  ALPHA_BETA,
  ADAPTIVE_KL,
  TVD,
  MSE,
  NONE,
  // alpha_beta for 0 < b <= a and for 0 < a < b. See arranged().
  ALPHA_BETA_FIRST,
  ALPHA_BETA_SECOND,
};

template <typename T>
struct DivergenceOptions {
  T beta, alpha, ab_alpha, ab_beta;
  bool detach_mixture;
  // adaptive_kl: weights of KL(p || q) and KL(q || p) of the row at hand.
  T forward_weight, reverse_weight;
};

template <typename T>
struct ClassTerms {
  T value;  // this class's summand of D
  T v;      // dD / d log q_j
};

// The limits of two-sided formulas at their ends are other divergences: resolved once per call.
template <typename T>
MIXKD_INLINE Divergence effective_divergence(Divergence divergence, const DivergenceOptions<T>& options) {
  if (divergence == Divergence::JSD && options.beta == T(0)) return Divergence::FORWARD_KL;
  if (divergence == Divergence::JSD && options.beta == T(1)) return Divergence::REVERSE_KL;
  if (divergence == Divergence::SKEW_FORWARD_KL && options.alpha == T(0)) return Divergence::FORWARD_KL;
  if (divergence == Divergence::SKEW_REVERSE_KL && options.alpha == T(0)) return Divergence::REVERSE_KL;
  return divergence;
}

// The form of alpha_beta for these options that a loop over classes can be vectorised with, where there is one.
template <typename T>
MIXKD_INLINE Divergence arranged(Divergence divergence, const DivergenceOptions<T>& options) {
  const T a = options.ab_alpha, b = options.ab_beta;
  if (divergence != Divergence::ALPHA_BETA || !(a > T(0) && b > T(0))) return divergence;
  return a < b ? Divergence::ALPHA_BETA_SECOND : Divergence::ALPHA_BETA_FIRST;
}

// a (log a - log b), 0 where a = 0.
template <typename T>
MIXKD_INLINE T kl_term(T a, T log_a, T log_b) {
  const T term = a * (log_a - log_b);
  return a == T(0) ? T(0) : term;
}

// Smallest normal number: log_of is not for smaller ones.
template <typename T>
constexpr T SMALLEST = std::numeric_limits<T>::min();

template <typename T>
MIXKD_INLINE T mixture(T weight_p, T p, T weight_q, T q) {
  const T m = weight_p * p + weight_q * q;
  return m < SMALLEST<T> ? SMALLEST<T> : m;
}

// a (log a - log m) for a mixture m >= c a with c > 0. The logarithm of the mixture may be taken from probabilities,
// unlike elsewhere: where m is too small for a normal number, a is below 1e-30 unless c is tiny, and the term below
// 1e-28.
template <typename T>
MIXKD_INLINE T mixture_term(T a, T log_a, T log_m) {
  const T term = a * (log_a - log_m);
  return a < SMALLEST<T> * T(100) ? T(0) : term;
}

// moved - power where moved = power 2^step, the difference where it cancels little.
template <typename T>
MIXKD_INLINE T rise(T power, T moved, T step) {
  const T close = power * exp2_minus_1_near_zero(step), far = moved - power;
  return (step < T(0) ? -step : step) < T(0.72) ? close : far;
}

// The same for moved = power e^step.
template <typename T>
MIXKD_INLINE T natural_rise(T power, T moved, T step) {
  const T close = power * expm1_near_zero(step), far = moved - power;
  return (step < T(0) ? -step : step) < T(0.5) ? close : far;
}

constexpr double LOG2_OF_E = 1.4426950408889634;

// With s = a + b, for |a| >= |b| the value is 1/a [(q^s - p^s)/s - (p^a q^b - p^s)/b], two rises from p^s; else the
// same with both sides exchanged. v = (q^s - p^a q^b) / a comes from the same rises. Here a and b are above 0, and
// which case it is is a constant: a choice at run time would keep a loop over classes from being vectorised. Powers are
// taken to the base 2.
template <bool exchange, typename T>
MIXKD_INLINE ClassTerms<T> alpha_beta_inside(T log_p, T log_q, const DivergenceOptions<T>& options) {
  const T large = exchange ? options.ab_beta : options.ab_alpha, small = exchange ? options.ab_alpha : options.ab_beta;
  const T s = options.ab_alpha + options.ab_beta;
  const T whole_exponent = s * T(LOG2_OF_E), small_exponent = small * T(LOG2_OF_E);
  // Here the power of s is 0: a gap from a masked class stays a number or -infinity, never NaN. The product of powers
  // is at most 2^-63 too large by it.
  const T least = T(sizeof(T) == 4 ? -127 : -1200) / whole_exponent;
  const T unbounded = exchange ? log_q : log_p, log_second = exchange ? log_p : log_q;
  const T log_first = unbounded < least ? least : unbounded, gap = log_second - log_first;
  const T log_power = whole_exponent * log_first, to_second = whole_exponent * gap, to_product = small_exponent * gap;
  const T power = exp2_of_nonpositive(log_power);
  const T second = rise(power, exp2_of_nonpositive(log_power + to_second), to_second);
  const T product = rise(power, exp2_of_nonpositive(log_power + to_product), to_product);
  const T value = second * (T(1) / (s * large)) - product * (T(1) / (small * large));
  return {value, exchange ? -product * (T(1) / small) : (second - product) * (T(1) / large)};
}

// A rise over x, or its limit at x = 0.
template <typename T>
MIXKD_INLINE T slope(T power, T log_moved, T x, T gap) {
  if (x == T(0)) return power == T(0) ? T(0) : power * gap;
  return natural_rise(power, exp_of(log_moved), x * gap) / x;
}

// x y, 0 for x = 0 even where y is infinite.
template <typename T>
MIXKD_INLINE T zero_or_product(T x, T y) {
  return x == T(0) ? T(0) : x * y;
}

// For any a and b, with the limits where one of a, b and s is 0.
template <typename T>
MIXKD_INLINE ClassTerms<T> alpha_beta_terms(T log_p, T log_q, const DivergenceOptions<T>& options) {
  if (log_p == -INFINITE<T> && log_q == -INFINITE<T>) return {T(0), T(0)};
  const T a = options.ab_alpha, b = options.ab_beta, s = a + b;
  if (a == T(0) && b == T(0)) {
    const T gap = log_q - log_p;
    return {gap * gap / T(2), gap};
  }
  const bool exchange = (a < T(0) ? -a : a) < (b < T(0) ? -b : b);
  const T log_first = exchange ? log_q : log_p, log_second = exchange ? log_p : log_q;
  const T large = exchange ? b : a, small = exchange ? a : b, gap = log_second - log_first;
  const T power = exp_of(zero_or_product(s, log_first));
  const T to_second = slope(power, zero_or_product(s, log_second), s, gap);
  const T to_product = slope(power, zero_or_product(large, log_first) + zero_or_product(small, log_second), small, gap);
  const T v = exchange ? -to_product : (zero_or_product(s, to_second) - zero_or_product(small, to_product)) / a;
  return {(to_second - to_product) / large, v};
}

// p = e^log_p, q = e^log_q. Constants times q are left out of v: they cancel in the gradient.
template <Divergence divergence, typename T>
MIXKD_INLINE ClassTerms<T> class_terms(T p, T q, T log_p, T log_q, const DivergenceOptions<T>& options) {
  if constexpr (divergence == Divergence::FORWARD_KL) {
    return {kl_term(p, log_p, log_q), -p};
  } else if constexpr (divergence == Divergence::REVERSE_KL) {
    const T term = kl_term(q, log_q, log_p);
    return {term, term};
  } else if constexpr (divergence == Divergence::JSD) {
    const T log_m = log_of_probability(mixture(options.beta, p, T(1) - options.beta, q));
    const T student = (T(1) - options.beta) * mixture_term(q, log_q, log_m);
    return {options.beta * mixture_term(p, log_p, log_m) + student, student};
  } else if constexpr (divergence == Divergence::SKEW_FORWARD_KL) {
    const T m = mixture(options.alpha, p, T(1) - options.alpha, q);
    return {mixture_term(p, log_p, log_of_probability(m)), -p * quotient((T(1) - options.alpha) * q, m)};
  } else if constexpr (divergence == Divergence::SKEW_REVERSE_KL) {
    const T m = mixture(T(1) - options.alpha, p, options.alpha, q);
    const T term = mixture_term(q, log_q, log_of_probability(m));
    // As a factor and not as a choice of terms: a loop over classes stays vectorised.
    const T attached = options.detach_mixture ? T(0) : options.alpha;
    return {term, term - q * quotient(attached * q, m)};
  } else if constexpr (divergence == Divergence::ALPHA_BETA) {
    return alpha_beta_terms(log_p, log_q, options);
  } else if constexpr (divergence == Divergence::ALPHA_BETA_FIRST || divergence == Divergence::ALPHA_BETA_SECOND) {
    return alpha_beta_inside<divergence == Divergence::ALPHA_BETA_SECOND>(log_p, log_q, options);
  } else if constexpr (divergence == Divergence::ADAPTIVE_KL) {
    const T forward = kl_term(p, log_p, log_q), reverse = kl_term(q, log_q, log_p);
    const T weighted_forward = options.forward_weight == T(0) ? T(0) : options.forward_weight * forward;
    const T weighted_reverse = options.reverse_weight == T(0) ? T(0) : options.reverse_weight * reverse;
    return {weighted_forward + weighted_reverse, weighted_reverse - options.forward_weight * p};
  } else if constexpr (divergence == Divergence::TVD) {
    const T distance = p > q ? p - q : q - p;
    const T side = q > p ? T(0.5) : (q < p ? T(-0.5) : T(0));
    return {T(0.5) * distance, q * side};
  } else {
    return {T(0), T(0)};
  }
}

}  // namespace mixkd

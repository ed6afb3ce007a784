// The arithmetic of one row of kd_loss on CUDA, eight classes at a time.
//
// Softmax runs in powers of two: e = 2^((x - max x) k), k = log2(e) / temperature: the largest e is 1 exactly.
// Gradients are written as differences that vanish exactly where one class has all the probability: q (x - sum v), not
// q x - q sum v. Also compiles for the host: tests/test_cuda_host_math.py.
#pragma once

#include "kd_common.cuh"

namespace mixkd::cuda {

// 2^x; below the smallest normal float 0.
MIXKD_INLINE float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return x < -126.0f ? 0.0f : std::exp2(x);
#endif
}

// sum + weight * value, where a weight of 0 adds nothing even if the value is infinite or NaN.
MIXKD_INLINE float plus_weighted(float sum, float weight, float value) {
  return weight == 0.0f ? sum : fmaf(weight, value, sum);
}

MIXKD_INLINE float larger(float a, float b) { return fmaxf(a, b); }

// 1 / divisor; 0 counts as 1.
MIXKD_INLINE float scale_of(float divisor) { return divisor == 0.0f ? 1.0f : 1.0f / divisor; }

// Options of the first reading.
struct Readout {
  float scale, inverse;  // log2(e) / temperature, 1 / temperature
  bool plain;            // also the softmax at temperature 1: a cross entropy that cannot share the other one
};

// First reading. `cross` is sum e_t (t' - s') for forward_kl, sum e_s (s' - t') for reverse_kl, x' = x - max x;
// sum (s - t)^2 for mse.
struct Statistics {
  float student_max = -INFINITE, student_sum = 0;
  float teacher_max = -INFINITE, teacher_sum = 0;
  float plain_max = -INFINITE, plain_sum = 0;
  float cross = 0, count = 0;
};

// Nothing seen yet must not give infinity - infinity.
MIXKD_INLINE float finite_max(float max) { return max == -INFINITE ? 0.0f : max; }

MIXKD_INLINE float e_of(float x, float finite_max, float scale) { return exp2_of((x - finite_max) * scale); }

// Moves the sums to larger maxima.
template <Divergence divergence>
MIXKD_INLINE void raise(Statistics& sums, float student_max, float teacher_max, float plain_max,
                        const Readout& readout) {
  if constexpr (has_softmax(divergence)) {
    const float student_factor = e_of(sums.student_max, finite_max(student_max), readout.scale);
    const float teacher_factor = e_of(sums.teacher_max, finite_max(teacher_max), readout.scale);
    const float moved = (finite_max(sums.teacher_max) - finite_max(teacher_max)) -
                        (finite_max(sums.student_max) - finite_max(student_max));
    if constexpr (divergence == Divergence::FORWARD_KL) {
      const float cross = teacher_factor * (sums.cross + sums.teacher_sum * moved);
      sums.cross = teacher_factor == 0.0f ? 0.0f : cross;
    } else if constexpr (divergence == Divergence::REVERSE_KL) {
      const float cross = student_factor * (sums.cross - sums.student_sum * moved);
      sums.cross = student_factor == 0.0f ? 0.0f : cross;
    }
    sums.student_sum *= student_factor;
    sums.teacher_sum *= teacher_factor;
    sums.student_max = student_max;
    sums.teacher_max = teacher_max;
  }
  if (readout.plain) {
    sums.plain_sum *= e_of(sums.plain_max, finite_max(plain_max), LOG2_E);
    sums.plain_max = plain_max;
  }
}

// Adds sums at the same maxima.
MIXKD_INLINE void add(Statistics& sums, const Statistics& part) {
  sums.student_sum += part.student_sum;
  sums.teacher_sum += part.teacher_sum;
  sums.plain_sum += part.plain_sum;
  sums.cross += part.cross;
  sums.count += part.count;
}

// Adds sums at their own maxima.
template <Divergence divergence>
MIXKD_INLINE void merge(Statistics& sums, Statistics part, const Readout& readout) {
  const float student_max = larger(sums.student_max, part.student_max),
              teacher_max = larger(sums.teacher_max, part.teacher_max);
  const float plain_max = larger(sums.plain_max, part.plain_max);
  raise<divergence>(sums, student_max, teacher_max, plain_max, readout);
  raise<divergence>(part, student_max, teacher_max, plain_max, readout);
  add(sums, part);
}

MIXKD_INLINE float largest(const float (&values)[CHUNK]) {
  float result = values[0];
#pragma unroll
  for (int i = 1; i < CHUNK; ++i) result = larger(result, values[i]);
  return result;
}

template <Divergence divergence>
MIXKD_INLINE void add_chunk(Statistics& sums, const float (&s)[CHUNK], const float (&t)[CHUNK],
                            const Readout& readout) {
  const float s_largest = largest(s);
  if constexpr (has_softmax(divergence)) {
    const float s_max = larger(sums.student_max, s_largest), t_max = larger(sums.teacher_max, largest(t));
    const float plain_max = larger(sums.plain_max, s_largest);
    if (s_max > sums.student_max || t_max > sums.teacher_max || (readout.plain && plain_max > sums.plain_max)) {
      raise<divergence>(sums, s_max, t_max, plain_max, readout);
    }
    const float s_finite = finite_max(s_max), t_finite = finite_max(t_max);
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      const float d_s = s[i] - s_finite, d_t = t[i] - t_finite;
      const float e_s = exp2_of(d_s * readout.scale), e_t = exp2_of(d_t * readout.scale);
      sums.student_sum += e_s;
      sums.teacher_sum += e_t;
      if constexpr (divergence == Divergence::FORWARD_KL) {
        sums.cross = plus_weighted(sums.cross, e_t, d_t - d_s);
      } else if constexpr (divergence == Divergence::REVERSE_KL) {
        sums.cross = plus_weighted(sums.cross, e_s, d_s - d_t);
      }
    }
  } else {
    if (readout.plain) {
      const float plain_max = larger(sums.plain_max, s_largest);
      if (plain_max > sums.plain_max) raise<divergence>(sums, 0.0f, 0.0f, plain_max, readout);
    }
    if constexpr (divergence == Divergence::MSE) {
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        const bool masked = s[i] == -INFINITE || t[i] == -INFINITE;
        const float difference = masked ? 0.0f : s[i] - t[i];
        sums.cross += difference * difference;
        sums.count += masked ? 0.0f : 1.0f;
      }
    }
  }
  if (readout.plain) {
    const float max = finite_max(sums.plain_max);
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) sums.plain_sum += e_of(s[i], max, LOG2_E);
  }
}

// Second reading, where it is needed.
struct TermSums {
  float value = 0, v = 0;
};

// Everything that turns a pair of logits into a gradient.
struct Factors {
  float scale, inverse;
  float s_max, t_max, s_log, t_log, s_share, t_share;  // log sum and 1 / sum of e
  float s_log2, t_log2;
  float plain_max, plain_share;  // ce weight / sum; 0 if the softmax at `temperature` serves
  float kd, v, ce;               // kd (v_j - q_j v) + ce q_j; ce: 0 unless that softmax serves
  float label_share, partner_share;
  int label, partner_label;
  DivergenceOptions<float> options;
};

template <Divergence divergence>
MIXKD_INLINE Factors make_factors(const Statistics& sums, const Job& job, const RowSetting& setting,
                                  const Readout& readout, float row_scale) {
  Factors f;
  f.scale = readout.scale;
  f.inverse = readout.inverse;
  f.s_max = finite_max(sums.student_max);
  f.t_max = finite_max(sums.teacher_max);
  f.s_log = logf(sums.student_sum);
  f.t_log = logf(sums.teacher_sum);
  f.s_log2 = log2f(sums.student_sum);
  f.t_log2 = log2f(sums.teacher_sum);
  f.s_share = 1.0f / sums.student_sum;
  f.t_share = 1.0f / sums.teacher_sum;
  const float ce = job.ce_weight * row_scale;
  f.plain_max = finite_max(sums.plain_max);
  f.plain_share = readout.plain ? ce / sums.plain_sum : 0.0f;
  f.kd = job.kd_gradient_weight * row_scale;
  f.v = 0.0f;
  f.ce = job.ce_weight != 0.0f && !readout.plain ? ce : 0.0f;
  f.label_share = setting.label >= 0 ? ce * setting.lam : 0.0f;
  f.partner_share = setting.partner_label >= 0 ? ce * (1.0f - setting.lam) : 0.0f;
  f.label = setting.label;
  f.partner_label = setting.partner_label;
  f.options = job.options;
  if constexpr (divergence == Divergence::MSE) f.kd = sums.count == 0.0f ? 0.0f : 2.0f * f.kd / sums.count;
  return f;
}

// Value and v of the divergences that need no second reading. v of reverse_kl leaves out what all classes share.
template <Divergence divergence>
MIXKD_INLINE TermSums terms_of(const Statistics& sums, const Factors& f) {
  if constexpr (divergence == Divergence::FORWARD_KL) {
    return {f.inverse * (sums.cross / sums.teacher_sum) + (f.s_log - f.t_log), -1.0f};
  } else if constexpr (divergence == Divergence::REVERSE_KL) {
    const float v = f.inverse * (sums.cross / sums.student_sum);
    return {v + (f.t_log - f.s_log), v};
  } else if constexpr (divergence == Divergence::MSE) {
    return {sums.count == 0.0f ? 0.0f : sums.cross / sums.count, 0.0f};
  } else {
    return {0.0f, 0.0f};
  }
}

// Lets the gradient know sum v; a NaN that comparisons swallowed reaches it too.
MIXKD_INLINE void set_terms(Factors& f, const TermSums& terms) {
  f.v = terms.value == terms.value ? terms.v : terms.value;
}

struct Pair {
  float p, q, log_p, log_q;
};

// The sum goes into the exponent, whose multiple is then the logarithm.
MIXKD_INLINE Pair pair_of(float s, float t, const Factors& f) {
  const float log2_p = fmaf(t - f.t_max, f.scale, -f.t_log2), log2_q = fmaf(s - f.s_max, f.scale, -f.s_log2);
  return {exp2_of(log2_p), exp2_of(log2_q), LN_2 * log2_p, LN_2 * log2_q};
}

template <Divergence divergence>
MIXKD_INLINE void add_terms(TermSums& sums, const float (&s)[CHUNK], const float (&t)[CHUNK], const Factors& f) {
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) {
    const Pair c = pair_of(s[i], t[i], f);
    const ClassTerms<float> terms = class_terms<divergence>(c.p, c.q, c.log_p, c.log_q, f.options);
    sums.value += terms.value;
    sums.v += terms.v;
  }
}

// d loss / d s of one class but for the labels' part.
template <Divergence divergence>
MIXKD_INLINE float gradient_of(float s, float t, const Factors& f) {
  if constexpr (divergence == Divergence::MSE) {
    return s == -INFINITE || t == -INFINITE ? 0.0f : f.kd * (s - t);
  } else if constexpr (divergence == Divergence::NONE) {
    return 0.0f;
  } else if constexpr (divergence == Divergence::FORWARD_KL) {
    return e_of(s, f.s_max, f.scale) * (f.s_share * (f.ce + f.kd)) - e_of(t, f.t_max, f.scale) * (f.t_share * f.kd);
  } else if constexpr (divergence == Divergence::REVERSE_KL) {
    const float d_s = s - f.s_max, q = exp2_of(d_s * f.scale) * f.s_share;
    const float gradient = q * (f.kd * (f.inverse * (d_s - (t - f.t_max)) - f.v) + f.ce);
    return q == 0.0f ? 0.0f : gradient;
  } else {
    const Pair c = pair_of(s, t, f);
    const float v = class_terms<divergence>(c.p, c.q, c.log_p, c.log_q, f.options).v;
    return f.kd * fmaf(-c.q, f.v, v) + c.q * f.ce;
  }
}

MIXKD_INLINE float plain_gradient_of(float s, const Factors& f) { return f.plain_share * e_of(s, f.plain_max, LOG2_E); }

// The gradient of a chunk that starts at class `start`.
template <Divergence divergence>
MIXKD_INLINE void chunk_gradient(const float (&s)[CHUNK], const float (&t)[CHUNK], const Factors& f, bool plain,
                                 int start, float (&out)[CHUNK]) {
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) out[i] = gradient_of<divergence>(s[i], t[i], f);
  if (plain) {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) out[i] += plain_gradient_of(s[i], f);
  }
  const unsigned label = static_cast<unsigned>(f.label - start),
                 partner = static_cast<unsigned>(f.partner_label - start);
  if (label < CHUNK || partner < CHUNK) {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      out[i] -= (label == static_cast<unsigned>(i) ? f.label_share : 0.0f) +
                (partner == static_cast<unsigned>(i) ? f.partner_share : 0.0f);
    }
  }
}

// lam CE(labels) + (1 - lam) CE(partner_labels) from the logits at the labels; a term of weight 0 may be infinite.
MIXKD_INLINE float cross_entropy(const Statistics& sums, const RowSetting& setting, const Readout& readout,
                                 float label_logit, float partner_logit) {
  const float max = readout.plain ? sums.plain_max : sums.student_max;
  const float log_sum = logf(readout.plain ? sums.plain_sum : sums.student_sum);
  float total = 0.0f;
  if (setting.lam != 0.0f) total += setting.lam * (log_sum - (label_logit - finite_max(max)));
  if (setting.partner_label >= 0 && setting.lam != 1.0f) {
    total += (1.0f - setting.lam) * (log_sum - (partner_logit - finite_max(max)));
  }
  return total;
}

// How the first reading of a call goes. At temperature 1 and equal width both softmaxes of the student are one.
template <Divergence divergence>
MIXKD_INLINE Readout readout_of(const Job& job) {
  const bool shared = has_softmax(divergence) && job.temperature == 1.0f && job.num_shared == job.num_classes;
  return {LOG2_E / job.temperature, 1.0f / job.temperature, job.ce_weight != 0.0f && !shared};
}

}  // namespace mixkd::cuda

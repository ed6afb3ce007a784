// kd_loss for narrow rows: a group of LANES neighbouring threads holds a row in registers, EACH classes per thread,
// several rows per warp. Class c sits in lane c % LANES, so that the group reads neighbouring addresses. No shared
// memory.
#pragma once

#include "kd_adaptive.cuh"
#include "kd_block.cuh"
#include "kd_launch.h"

namespace mixkd::cuda {

// Sums over the LANES threads of one row. Only these need to be at the same place in the code.
template <int LANES>
struct LaneGroup {
  unsigned mask;

  __device__ __forceinline__ LaneGroup() {
    const unsigned first = (threadIdx.x % WARP) / LANES * LANES;
    mask = LANES == WARP ? ALL_LANES : ((1u << (LANES % WARP)) - 1u) << first;
  }

  __device__ __forceinline__ float sum(float value) const {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(mask, value, offset);
    return value;
  }

  __device__ __forceinline__ float max(float value) const {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(mask, value, offset));
    return value;
  }

  template <int count>
  __device__ __forceinline__ void sum(float (&values)[count]) const {
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] = sum(values[i]);
  }
};

// This thread's classes of a row of n; -infinity beyond it.
template <int LANES, int EACH>
__device__ __forceinline__ void load_row(const void* row, Dtype dtype, int n, int lane, float (&out)[EACH]) {
  const auto load = [&](auto fixed) {
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int index = e * LANES + lane;
      out[e] = index < n ? load_value(row, static_cast<Dtype>(decltype(fixed)::value), index) : -INFINITE;
    }
  };
  // Outside the loop, so that all loads are on their way together.
  if (dtype == Dtype::F32) return load(FormatConstant<Format::F32>{});
  if (dtype == Dtype::BF16) return load(FormatConstant<Format::BF16>{});
  load(FormatConstant<Format::F16>{});
}

template <int LANES, int EACH>
__device__ __forceinline__ void store_row(void* row, Dtype dtype, int n, int lane, const float (&values)[EACH]) {
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const int index = e * LANES + lane;
    if (index < n) store_value(row, dtype, index, values[e]);
  }
}

// Maximum and sum of e of this group's row.
template <int LANES, int EACH, typename Value>
__device__ __forceinline__ void lane_softmax(const Value& x, float scale, const LaneGroup<LANES>& group, float& max,
                                             float& sum) {
  max = x(0);
#pragma unroll
  for (int e = 1; e < EACH; ++e) max = fmaxf(max, x(e));
  max = group.max(max);
  const float finite = finite_max(max);
  sum = 0.0f;
#pragma unroll
  for (int e = 0; e < EACH; ++e) sum += e_of(x(e), finite, scale);
  sum = group.sum(sum);
}

template <Divergence divergence, int LANES, int EACH>
__device__ __forceinline__ void narrow_row(const Job& job, int64_t index, float scale, LaneGroup<LANES>& group) {
  const int lane = threadIdx.x % LANES, num_classes = job.num_classes, num_shared = job.num_shared;
  const int student_bytes = bytes_of(job.student_dtype);
  const RowSetting setting = row_setting(job, index);
  const Readout readout = readout_of<divergence>(job);
  char* gradient =
      job.gradient == nullptr ? nullptr : static_cast<char*>(job.gradient) + index * num_classes * student_bytes;
  float out[EACH];
  if (setting.special) {
    if (lane == 0) write_special(job, index, setting.special_value);
    if (gradient == nullptr) return;
#pragma unroll
    for (int e = 0; e < EACH; ++e) out[e] = setting.special_value;
    return store_row<LANES>(gradient, job.student_dtype, num_classes, lane, out);
  }

  float whole[EACH], t[EACH];
  load_row<LANES>(static_cast<const char*>(job.student) + index * job.student_stride * student_bytes, job.student_dtype,
                  num_classes, lane, whole);
  if constexpr (divergence != Divergence::NONE) {
    load_row<LANES>(static_cast<const char*>(job.teacher) + index * job.teacher_stride * bytes_of(job.teacher_dtype),
                    job.teacher_dtype, num_shared, lane, t);
  }
  // The student's classes that the teacher has not count as masked, but for the cross entropy. Not kept beside `whole`:
  // wide rows have no registers for both.
  const auto shared = [&](int e) { return e * LANES + lane < num_shared ? whole[e] : -INFINITE; };

  Statistics sums;
  if constexpr (has_softmax(divergence)) {
    lane_softmax<LANES, EACH>(shared, readout.scale, group, sums.student_max, sums.student_sum);
    lane_softmax<LANES, EACH>([&](int e) { return t[e]; }, readout.scale, group, sums.teacher_max, sums.teacher_sum);
  }
  if (readout.plain)
    lane_softmax<LANES, EACH>([&](int e) { return whole[e]; }, LOG2_E, group, sums.plain_max, sums.plain_sum);
  if constexpr (divergence == Divergence::MSE) {
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const bool masked = shared(e) == -INFINITE || t[e] == -INFINITE;
      const float difference = masked ? 0.0f : shared(e) - t[e];
      sums.cross += difference * difference;
      sums.count += masked ? 0.0f : 1.0f;
    }
    sums.cross = group.sum(sums.cross);
    sums.count = group.sum(sums.count);
  }
  if constexpr (divergence == Divergence::FORWARD_KL || divergence == Divergence::REVERSE_KL) {
    const float s_max = finite_max(sums.student_max), t_max = finite_max(sums.teacher_max);
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const bool forward = divergence == Divergence::FORWARD_KL;
      const float weight = forward ? e_of(t[e], t_max, readout.scale) : e_of(shared(e), s_max, readout.scale);
      const float difference = forward ? (t[e] - t_max) - (shared(e) - s_max) : (shared(e) - s_max) - (t[e] - t_max);
      sums.cross = plus_weighted(sums.cross, weight, difference);
    }
    sums.cross = group.sum(sums.cross);
  }
  const float row_scale = scale * setting.weight;
  Factors factors = make_factors<divergence>(sums, job, setting, readout, row_scale);
  if constexpr (divergence == Divergence::ADAPTIVE_KL) {
    const auto visit = [&](const auto& body) {
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const Pair c = pair_of(shared(e), t[e], factors);
        body(e * LANES + lane, c.p, c.q);
      }
    };
    set_adaptive_weights(visit, group, factors.t_share, num_shared, factors.options);
  }
  TermSums terms = terms_of<divergence>(sums, factors);
  if constexpr (needs_terms(divergence)) {
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const Pair c = pair_of(shared(e), t[e], factors);
      const ClassTerms<float> found = class_terms<divergence>(c.p, c.q, c.log_p, c.log_q, factors.options);
      terms.value += found.value;
      terms.v += found.v;
    }
    terms.value = group.sum(terms.value);
    terms.v = group.sum(terms.v);
  }
  set_terms(factors, terms);
  if (lane == 0) write_losses<divergence>(job, index, sums, terms, setting, readout, row_scale);
  if (gradient == nullptr) return;
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    const int c = e * LANES + lane;
    if constexpr (divergence == Divergence::NONE) {
      out[e] = 0.0f;
    } else {
      out[e] = c < num_shared ? gradient_of<divergence>(shared(e), t[e], factors) : 0.0f;
    }
    if (readout.plain) out[e] += plain_gradient_of(whole[e], factors);
    out[e] -=
        (c == factors.label ? factors.label_share : 0.0f) + (c == factors.partner_label ? factors.partner_share : 0.0f);
  }
  store_row<LANES>(gradient, job.student_dtype, num_classes, lane, out);
}

}  // namespace mixkd::cuda

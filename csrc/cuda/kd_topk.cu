// kd_loss with a teacher of which only K classes are known: one block per row.
//
// Compared are K + 1 buckets, the last one all other classes of either side; or the K classes alone, renormalised. A
// bit per class in shared memory says which classes are among the K. Legend: kd_common.cuh.
#include "kd_adaptive.cuh"
#include "kd_block.cuh"
#include "kd_launch.h"

namespace mixkd::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int ALL_CHUNKS = 0x7fffffff;
// Of a divergence that gathers two softmaxes and nothing else: here the student's, over all classes and over the
// others.
constexpr Divergence BOTH = Divergence::TVD;

// One side of the buckets: from a logit to its probability and the logarithm of it.
struct Side {
  float scale, inverse, max, log, share;

  __device__ __forceinline__ float log_of(float logit) const { return fmaf(logit - max, inverse, -log); }
  __device__ __forceinline__ float e_of(float logit) const { return cuda::e_of(logit, max, scale); }
  __device__ __forceinline__ float of(float logit) const { return e_of(logit) * share; }
};

__device__ __forceinline__ Side side_of(const Readout& readout, float max, float sum) {
  return {readout.scale, readout.inverse, finite_max(max), logf(sum), 1.0f / sum};
}

struct Buckets {
  const Row<Format::MIXED>& row;
  const int64_t* indices;
  int num_top, count;  // count: with the last bucket
  Side p, q;
  Pair rest;

  __device__ __forceinline__ Pair at(int k) const {
    if (k == num_top) return rest;
    const float s = load_value(row.student, row.student_dtype(), indices[k]);
    const float t = load_value(row.teacher, row.teacher_dtype(), k);
    return {p.of(t), q.of(s), p.log_of(t), q.log_of(s)};
  }
};

__device__ __forceinline__ bool is_set(const uint32_t* bits, int index) {
  return (bits[index / 32] >> (index % 32)) & 1u;
}

// The softmax of value(k) over the K classes.
template <typename Value>
__device__ __forceinline__ Side softmax_of(const Value& value, int num_top, const Readout& readout, BlockGroup& group) {
  Statistics sums;
  for (int k = threadIdx.x; k < num_top; k += THREADS) {
    const float x = value(k);
    Statistics one;
    one.student_max = x;
    // NaN and infinity must not be lost in the maximum.
    one.student_sum = x < INFINITE ? 1.0f : NOT_A_NUMBER;
    merge<BOTH>(sums, one, readout);
  }
  group.merge<BOTH>(sums, readout);
  return side_of(readout, sums.student_max, sums.student_sum);
}

// Both sides over the K classes alone.
__device__ __forceinline__ void renormalize(Buckets& buckets, const Readout& readout, BlockGroup& group) {
  const Row<Format::MIXED>& row = buckets.row;
  const auto s = [&](int k) { return load_value(row.student, row.student_dtype(), buckets.indices[k]); };
  const auto t = [&](int k) { return load_value(row.teacher, row.teacher_dtype(), k); };
  buckets.q = softmax_of(s, buckets.num_top, Readout{readout.scale, readout.inverse, false}, group);
  // Log-probabilities are taken at temperature 1.
  buckets.p = softmax_of(t, buckets.num_top, Readout{LOG2_E, 1.0f, false}, group);
}

// The bucket of all other classes.
__device__ __forceinline__ void add_rest(Buckets& buckets, const Side& all, const Side& others, bool has_rest,
                                         BlockGroup& group) {
  float sum[1] = {0.0f};
  for (int k = threadIdx.x; k < buckets.num_top; k += THREADS) {
    sum[0] += expf(load_value(buckets.row.teacher, buckets.row.teacher_dtype(), k));
  }
  group.sum<1>(sum);
  constexpr float epsilon = 1.1920929e-7f;
  float p_rest = 1.0f - sum[0];
  // Below a few ulp this is rounding noise: a floor keeps its logarithm finite unless no class is left.
  if (p_rest <= 16.0f * epsilon) p_rest = has_rest ? epsilon : 0.0f;
  const float log_q = has_rest ? fmaf(others.max - all.max, all.inverse, others.log - all.log) : -INFINITE;
  buckets.rest = {p_rest, expf(log_q), logf(p_rest), log_q};
}

template <Divergence divergence>
__global__ void __launch_bounds__(THREADS, 2) top_kernel(const __grid_constant__ Job job) {
  extern __shared__ uint32_t is_top[];
  __shared__ __align__(16) float scratch[2 * MAX_WARPS * 8];
  BlockGroup group{scratch};
  const int num_classes = job.num_classes, num_words = (num_classes + 31) / 32;
  const float scale = scale_of(divisor_of(job));
  const Readout readout = readout_of<divergence>(job);
  for (int64_t index = blockIdx.x; index < job.num_rows; index += gridDim.x) {
    const RowSetting setting = row_setting(job, index);
    const Row<Format::MIXED> row = row_of<Format::MIXED>(job, index);
    Buckets buckets{
        row, job.top_indices + index * job.num_top, job.num_top, job.num_top, {LOG2_E, 1.0f, 0.0f, 0.0f, 1.0f}, {}, {}};
    bool invalid = false;
    for (int k = threadIdx.x; k < job.num_top; k += THREADS) {
      invalid |= buckets.indices[k] < 0 || buckets.indices[k] >= num_classes;
    }
    // A dropped row may hold anything.
    if (__syncthreads_or(invalid) || setting.special) {
      const float value = setting.special ? setting.special_value : NOT_A_NUMBER;
      if (threadIdx.x == 0) write_special(job, index, value);
      if (row.gradient != nullptr) fill_gradient(row, num_classes, 0, ALL_CHUNKS, value);
      continue;
    }
    for (int word = threadIdx.x; word < num_words; word += THREADS) is_top[word] = 0;
    __syncthreads();
    for (int k = threadIdx.x; k < job.num_top; k += THREADS) {
      atomicOr(is_top + buckets.indices[k] / 32, 1u << (buckets.indices[k] % 32));
    }
    __syncthreads();

    Statistics sums;
    for_chunks<false>(row, 0, num_classes, 0, ALL_CHUNKS,
                      [&](int start, const float (&s)[CHUNK], const float (&)[CHUNK]) {
                        float others[CHUNK];
#pragma unroll
                        for (int i = 0; i < CHUNK; ++i) {
                          const int c = start + i;
                          others[i] = c >= 0 && c < num_classes && is_set(is_top, c) ? -INFINITE : s[i];
                        }
                        add_chunk<BOTH>(sums, s, others, readout);
                      });
    group.merge<BOTH>(sums, readout);
    const float row_scale = scale * setting.weight;
    Factors factors = make_factors<divergence>(sums, job, setting, readout, row_scale);
    const Side all = side_of(readout, sums.student_max, sums.student_sum);
    const Side others = side_of(readout, sums.teacher_max, sums.teacher_sum);
    const bool with_tail = job.tail_mass && job.num_top < num_classes, has_rest = with_tail && sums.teacher_sum != 0.0f;
    if (with_tail) {
      buckets.q = all;
      buckets.count = job.num_top + 1;
      add_rest(buckets, all, others, has_rest, group);
    } else {
      renormalize(buckets, readout, group);
    }

    if constexpr (divergence == Divergence::ADAPTIVE_KL) {
      const auto visit = [&](const auto& body) {
        for (int k = threadIdx.x; k < buckets.count; k += THREADS) {
          const Pair c = buckets.at(k);
          body(k, c.p, c.q);
        }
      };
      set_adaptive_weights(visit, group, 0.0f, buckets.count, factors.options);
    }
    const auto terms_at = [&](const Pair& c) {
      return class_terms<divergence>(c.p, c.q, c.log_p, c.log_q, factors.options);
    };
    TermSums terms;
    for (int k = threadIdx.x; k < buckets.count; k += THREADS) {
      const ClassTerms<float> found = terms_at(buckets.at(k));
      terms.value += found.value;
      terms.v += found.v;
    }
    terms = group.sum(terms);
    // What the softmax at `temperature` gives to the cross entropy.
    const float shared_share = factors.ce * factors.s_share;
    if (terms.value != terms.value) terms.v = terms.value;
    if (threadIdx.x == 0) write_losses<divergence>(job, index, sums, terms, setting, readout, row_scale);
    if (row.gradient == nullptr) continue;

    const float rest_share = has_rest ? factors.kd * terms_at(buckets.rest).v * others.share : 0.0f;
    const float all_share = has_rest ? factors.kd * terms.v * all.share : 0.0f;
    const auto hard_part = [&](float s, int c) {
      float part = shared_share * all.e_of(s);
      if (readout.plain) part += plain_gradient_of(s, factors);
      return part - (c == factors.label ? factors.label_share : 0.0f) -
             (c == factors.partner_label ? factors.partner_share : 0.0f);
    };
    // The last bucket's share first, for all classes; the K classes are then written over.
    for_chunks<false>(row, 0, num_classes, 0, ALL_CHUNKS,
                      [&](int start, const float (&s)[CHUNK], const float (&)[CHUNK]) {
                        float out[CHUNK];
#pragma unroll
                        for (int i = 0; i < CHUNK; ++i) {
                          out[i] = hard_part(s[i], start + i);
                          if (has_rest) {
                            out[i] += rest_share * others.e_of(s[i]) - all_share * all.e_of(s[i]);
                          }
                        }
                        put(row.gradient, row.student_dtype(), row.gradient_aligned, start, 0, num_classes, out);
                      });
    __syncthreads();
    for (int k = threadIdx.x; k < job.num_top; k += THREADS) {
      const Pair c = buckets.at(k);
      const int64_t place = buckets.indices[k];
      const float s = load_value(row.student, row.student_dtype(), place);
      const float own = factors.kd * (terms_at(c).v - c.q * terms.v);
      store_value(row.gradient, row.student_dtype(), place, own + hard_part(s, static_cast<int>(place)));
    }
    // The bits are cleared for the next row only once nobody looks at them.
    __syncthreads();
  }
}

template <Divergence divergence>
void launch(const Job& job, const DeviceLimits& limits, cudaStream_t stream) {
  const int bytes = (job.num_classes + 31) / 32 * static_cast<int>(sizeof(uint32_t));
  // 2 KB: the kernel's other shared memory. 48 KB are everybody's.
  STD_TORCH_CHECK(bytes + 2048 <= limits.shared_bytes, "student_logits has ", job.num_classes,
                  " classes: too many for a TopK on this device");
  if (bytes + 2048 > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(top_kernel<divergence>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    limits.shared_bytes - 2048),
               "kd_loss shared memory");
  }
  const int64_t blocks = job.num_rows < 0x7fffffff ? job.num_rows : 0x7fffffff;
  top_kernel<divergence><<<static_cast<unsigned>(blocks), THREADS, bytes, stream>>>(job);
}

}  // namespace

void launch_top(const Job& job, const DeviceLimits& limits, cudaStream_t stream) {
  for_divergence(job.divergence, [&](auto divergence) {
    constexpr Divergence kind = decltype(divergence)::value;
    if constexpr (has_softmax(kind)) launch<kind>(job, limits, stream);
  });
  check_launch("kd_loss of a TopK");
}

}  // namespace mixkd::cuda

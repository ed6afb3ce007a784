// Device-side helpers of kd_loss: reading and writing chunks of rows in global memory, and sums over warps and blocks.
#pragma once

#include "kd_row_math.cuh"

namespace mixkd::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int MAX_WARPS = 32;

template <Format format>
struct Row {
  const char* student;
  const char* teacher;  // null without one
  char* gradient;       // null if none is wanted
  Dtype mixed_student_dtype, mixed_teacher_dtype;
  Chunks chunks;
  bool teacher_aligned, gradient_aligned;  // where the student's chunks start

  __device__ __forceinline__ Dtype student_dtype() const {
    return format == Format::MIXED ? mixed_student_dtype : static_cast<Dtype>(format);
  }
  __device__ __forceinline__ Dtype teacher_dtype() const {
    return format == Format::MIXED ? mixed_teacher_dtype : static_cast<Dtype>(format);
  }
};

template <Format format>
__device__ __forceinline__ Row<format> row_of(const Job& job, int64_t row) {
  Row<format> r;
  const int student_bytes = bytes_of(job.student_dtype), teacher_bytes = bytes_of(job.teacher_dtype);
  r.student = static_cast<const char*>(job.student) + row * job.student_stride * student_bytes;
  r.teacher = job.teacher == nullptr ? nullptr
                                     : static_cast<const char*>(job.teacher) + row * job.teacher_stride * teacher_bytes;
  r.gradient =
      job.gradient == nullptr ? nullptr : static_cast<char*>(job.gradient) + row * job.num_classes * student_bytes;
  r.mixed_student_dtype = job.student_dtype;
  r.mixed_teacher_dtype = job.teacher_dtype;
  r.chunks.lead = lead_of(r.student, job.student_dtype);
  // A chunk starts `lead` classes before a multiple of 8 of them.
  const auto aligned = [&](const char* data, int bytes) {
    return ((reinterpret_cast<uintptr_t>(data) - static_cast<uintptr_t>(r.chunks.lead * bytes)) & 15) == 0;
  };
  r.teacher_aligned = aligned(r.teacher, teacher_bytes);
  r.gradient_aligned = aligned(r.gradient, student_bytes);
  return r;
}

__device__ __forceinline__ uint4 load_16(const char* address) { return __ldg(reinterpret_cast<const uint4*>(address)); }

// The chunk that starts at class `start`; classes outside [begin, end) as -infinity.
__device__ __forceinline__ Packed fetch(const char* row, Dtype dtype, bool aligned, int start, int begin, int end) {
  Packed packed;
  const bool wide = dtype == Dtype::F32;
  if (aligned && start >= begin && start + CHUNK <= end) {
    const char* address = row + static_cast<int64_t>(start) * bytes_of(dtype);
    const uint4 low = load_16(address);
    uint4 high = make_uint4(0, 0, 0, 0);
    if (wide) high = load_16(address + 16);
    packed.words[0] = low.x, packed.words[1] = low.y, packed.words[2] = low.z, packed.words[3] = low.w;
    packed.words[4] = high.x, packed.words[5] = high.y, packed.words[6] = high.z, packed.words[7] = high.w;
    return packed;
  }
  if (wide) {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      const bool inside = start + i >= begin && start + i < end;
      packed.words[i] = inside ? __ldg(reinterpret_cast<const uint32_t*>(row) + (start + i)) : 0xff800000u;
    }
    return packed;
  }
  const uint32_t masked = dtype == Dtype::BF16 ? 0xff80u : 0xfc00u;
#pragma unroll
  for (int i = 0; i < CHUNK / 2; ++i) {
    uint32_t halves[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int index = start + 2 * i + j;
      halves[j] = index >= begin && index < end ? __ldg(reinterpret_cast<const uint16_t*>(row) + index) : masked;
    }
    packed.words[i] = halves[0] | (halves[1] << 16);
    packed.words[i + CHUNK / 2] = 0;
  }
  return packed;
}

__device__ __forceinline__ void put(char* row, Dtype dtype, bool aligned, int start, int begin, int end,
                                    const float (&values)[CHUNK]) {
  if (aligned && start >= begin && start + CHUNK <= end) {
    const Packed packed = pack(values, dtype);
    uint4* address = reinterpret_cast<uint4*>(row + static_cast<int64_t>(start) * bytes_of(dtype));
    address[0] = make_uint4(packed.words[0], packed.words[1], packed.words[2], packed.words[3]);
    if (dtype == Dtype::F32)
      address[1] = make_uint4(packed.words[4], packed.words[5], packed.words[6], packed.words[7]);
    return;
  }
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) {
    if (start + i >= begin && start + i < end) store_value(row, dtype, start + i, values[i]);
  }
}

// Calls body(start, s, t) for this thread's chunks of the classes [begin, end), chunks `from` to `to` of the row only.
// t is -infinity if not with_teacher. With `ahead` the next chunk is on its way while one is worked on; the code of
// mixed dtypes has no registers left for it.
template <bool with_teacher, Format format, bool ahead = format != Format::MIXED, typename Body>
__device__ __forceinline__ void for_chunks(const Row<format>& row, int begin, int end, int from, int to,
                                           const Body& body) {
  const int last = min(row.chunks.last(end), to);
  int chunk = max(row.chunks.first(begin), from) + static_cast<int>(threadIdx.x);
  if (begin >= end || chunk >= last) return;
  const auto fetch_student = [&](int j) {
    return fetch(row.student, row.student_dtype(), true, row.chunks.start_of(j), begin, end);
  };
  const auto fetch_teacher = [&](int j) {
    if constexpr (!with_teacher) return Packed{};
    return fetch(row.teacher, row.teacher_dtype(), row.teacher_aligned, row.chunks.start_of(j), begin, end);
  };
  const auto work = [&](int j, const Packed& student, const Packed& teacher) {
    float s[CHUNK], t[CHUNK];
    unpack(student, row.student_dtype(), s);
    if constexpr (with_teacher) {
      unpack(teacher, row.teacher_dtype(), t);
    } else {
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) t[i] = -INFINITE;
    }
    body(row.chunks.start_of(j), s, t);
  };
  const int stride = static_cast<int>(blockDim.x);
  if constexpr (!ahead) {
    for (; chunk < last; chunk += stride) work(chunk, fetch_student(chunk), fetch_teacher(chunk));
  } else {
    Packed student = fetch_student(chunk), teacher = fetch_teacher(chunk);
    for (; chunk + stride < last; chunk += stride) {
      const Packed student_now = student, teacher_now = teacher;
      student = fetch_student(chunk + stride);
      teacher = fetch_teacher(chunk + stride);
      work(chunk, student_now, teacher_now);
    }
    work(chunk, student, teacher);
  }
}

// The whole block writes one value to this part of a row's gradient.
template <Format format>
__device__ __forceinline__ void fill_gradient(const Row<format>& row, int end, int from, int to, float value) {
  float values[CHUNK];
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) values[i] = value;
  for (int j = from + static_cast<int>(threadIdx.x); j < min(row.chunks.last(end), to);
       j += static_cast<int>(blockDim.x)) {
    put(row.gradient, row.student_dtype(), row.gradient_aligned, row.chunks.start_of(j), 0, end, values);
  }
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, offset));
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(ALL_LANES, value, offset);
  return value;
}

// Sums over the lanes of statistics at the same maxima.
template <Divergence divergence>
__device__ __forceinline__ void warp_add(Statistics& sums, bool plain) {
  if constexpr (has_softmax(divergence)) {
    sums.student_sum = warp_sum(sums.student_sum);
    sums.teacher_sum = warp_sum(sums.teacher_sum);
  }
  if constexpr (divergence != Divergence::NONE && !needs_terms(divergence)) sums.cross = warp_sum(sums.cross);
  if constexpr (divergence == Divergence::MSE) sums.count = warp_sum(sums.count);
  if (plain) sums.plain_sum = warp_sum(sums.plain_sum);
}

// Every lane gets the statistics of all lanes; in one order, so that runs agree bit by bit.
template <Divergence divergence>
__device__ __forceinline__ void warp_merge(Statistics& sums, const Readout& readout) {
  float student_max = sums.student_max, teacher_max = sums.teacher_max, plain_max = sums.plain_max;
  if constexpr (has_softmax(divergence)) {
    student_max = warp_max(student_max);
    teacher_max = warp_max(teacher_max);
  }
  if (readout.plain) plain_max = warp_max(plain_max);
  raise<divergence>(sums, student_max, teacher_max, plain_max, readout);
  warp_add<divergence>(sums, readout.plain);
}

// Every lane gets the sum of `count` <= 32 * each partial results. All maxima first, so that no part waits for another.
template <Divergence divergence, int each>
__device__ __forceinline__ void merge_parts(Statistics& sums, const Statistics* parts, int count,
                                            const Readout& readout) {
  Statistics own[each];
  float student_max = -INFINITE, teacher_max = -INFINITE, plain_max = -INFINITE;
#pragma unroll
  for (int i = 0; i < each; ++i) {
    const int part = static_cast<int>(threadIdx.x % WARP) + i * WARP;
    own[i] = part < count ? parts[part] : Statistics{};
    student_max = fmaxf(student_max, own[i].student_max);
    teacher_max = fmaxf(teacher_max, own[i].teacher_max);
    plain_max = fmaxf(plain_max, own[i].plain_max);
  }
  if constexpr (has_softmax(divergence)) {
    student_max = warp_max(student_max);
    teacher_max = warp_max(teacher_max);
  }
  if (readout.plain) plain_max = warp_max(plain_max);
  sums = Statistics{student_max, 0.0f, teacher_max, 0.0f, plain_max, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < each; ++i) {
    raise<divergence>(own[i], student_max, teacher_max, plain_max, readout);
    add(sums, own[i]);
  }
  warp_add<divergence>(sums, readout.plain);
}

// Sums over a block. Every call takes the next of two scratch halves: one barrier per call is then enough, as nobody
// writes a half again before everybody has passed the barrier of the call in between. All threads must call.
struct BlockGroup {
  float* scratch;  // [2][MAX_WARPS][8], shared
  int half = 0;

  __device__ __forceinline__ float* take() {
    float* part = scratch + half * MAX_WARPS * 8;
    half ^= 1;
    return part;
  }

  template <int count>
  __device__ __forceinline__ void sum(float (&values)[count]) {
    static_assert(count <= 8, "scratch holds 8 values per warp");
    float* part = take();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, num_warps = blockDim.x / WARP;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float total = warp_sum(values[i]);
      if (lane == 0) part[warp * 8 + i] = total;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] = warp_sum(lane < num_warps ? part[lane * 8 + i] : 0.0f);
  }

  template <Divergence divergence>
  __device__ __forceinline__ void merge(Statistics& sums, const Readout& readout) {
    Statistics* part = reinterpret_cast<Statistics*>(take());
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, num_warps = blockDim.x / WARP;
    warp_merge<divergence>(sums, readout);
    if (lane == 0) part[warp] = sums;
    __syncthreads();
    merge_parts<divergence, 1>(sums, part, num_warps, readout);
  }

  __device__ __forceinline__ TermSums sum(const TermSums& terms) {
    float values[2] = {terms.value, terms.v};
    sum<2>(values);
    return {values[0], values[1]};
  }
};
static_assert(sizeof(Statistics) == 8 * sizeof(float), "a warp's scratch holds one Statistics");

__device__ __forceinline__ float divisor_of(const Job& job) {
  return job.divisor == nullptr ? job.fixed_divisor : *job.divisor;
}

__device__ __forceinline__ void write_special(const Job& job, int64_t row, float value) {
  job.kd[row] = value;
  job.ce[row] = value;
}

// Writes a row's weighted losses. One thread.
template <Divergence divergence>
__device__ __forceinline__ void write_losses(const Job& job, int64_t row, const Statistics& sums, const TermSums& terms,
                                             const RowSetting& setting, const Readout& readout, float row_scale) {
  const char* student = static_cast<const char*>(job.student) + row * job.student_stride * bytes_of(job.student_dtype);
  job.kd[row] = divergence == Divergence::NONE ? 0.0f : job.kd_value_weight * row_scale * terms.value;
  float ce = 0.0f;
  if (job.ce_weight != 0.0f) {
    const auto logit_at = [&](int64_t label, const float* read_before) {
      return read_before != nullptr ? read_before[row] : load_value(student, job.student_dtype, label);
    };
    const float label_logit = logit_at(setting.label, job.label_logits);
    const float partner_logit = setting.partner_label < 0 ? 0.0f : logit_at(setting.partner_label, job.partner_logits);
    ce = job.ce_weight * row_scale * cross_entropy(sums, setting, readout, label_logit, partner_logit);
  }
  job.ce[row] = ce;
}

}  // namespace mixkd::cuda

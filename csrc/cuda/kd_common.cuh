// What every CUDA path of kd_loss shares: one call as plain pointers, dtypes, a row in chunks of eight classes, its
// labels. Also compiles for the host: tests/test_cuda_host_math.py.
//
// Legend: N rows, C student classes, S classes that student and teacher share, K kept classes of a top-k teacher.
#pragma once

#include <cstdint>

#include "../distill_math.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace mixkd::cuda {

enum class Dtype : int { F32, BF16, F16 };
// A dtype that both sides have, known to the compiler; or whatever the job says.
enum class Format : int { F32, BF16, F16, MIXED };

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
// Classes that a thread handles at once: 16 bytes of a 16-bit dtype.
constexpr int CHUNK = 8;

struct Job {
  const void* student;         // [N, C]
  const void* teacher;         // [N, C_T] logits, or [N, K] fp32 log-probabilities; null without a teacher
  const int64_t* top_indices;  // [N, K] or null
  const int64_t* labels;       // [N] or null
  const int64_t* partner_labels;
  const float* lam;          // [N] or null
  const float* row_weights;  // [N] or null
  const float* divisor;      // on the device, or null: fixed_divisor
  void* gradient;            // [N, C] of the student's dtype, or null; may be `student`
  // [N] each, or null: where the gradient overwrites the student, its logits at labels and partner_labels, read before.
  const float *label_logits, *partner_logits;
  float* kd;  // [N]
  float* ce;  // [N]
  int64_t num_rows, student_stride, teacher_stride, ignore_index;
  int num_classes, num_shared, num_top;
  Dtype student_dtype, teacher_dtype;
  float temperature, fixed_divisor;
  float kd_value_weight;     // of D in the loss: temperature^2 included
  float kd_gradient_weight;  // of v - q sum v in the gradient: temperature included
  float ce_weight;           // 0 without labels
  DivergenceOptions<float> options;
  Divergence divergence;  // effective; NONE without a teacher or at kd_weight 0
  bool tail_mass;
};

MIXKD_INLINE constexpr bool has_softmax(Divergence divergence) {
  return divergence != Divergence::MSE && divergence != Divergence::NONE;
}
// The first reading gives value and sum of v of these; the others need one more before the gradient.
MIXKD_INLINE constexpr bool needs_terms(Divergence divergence) {
  return has_softmax(divergence) && divergence != Divergence::FORWARD_KL && divergence != Divergence::REVERSE_KL;
}

MIXKD_INLINE int bytes_of(Dtype dtype) { return dtype == Dtype::F32 ? 4 : 2; }

MIXKD_INLINE float half_to_float(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(bits));
#else
  return float_of_half(bits);
#endif
}

MIXKD_INLINE uint16_t float_to_16_bits(float value, Dtype dtype) {
#if defined(__CUDA_ARCH__)
  return dtype == Dtype::BF16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                              : __half_as_ushort(__float2half_rn(value));
#else
  return dtype == Dtype::BF16 ? bfloat16_of_float(value) : half_of_float(value);
#endif
}

MIXKD_INLINE float load_value(const void* row, Dtype dtype, int64_t index) {
  if (dtype == Dtype::F32) return static_cast<const float*>(row)[index];
  const uint16_t bits = static_cast<const uint16_t*>(row)[index];
  return dtype == Dtype::BF16 ? float_of_bfloat16(bits) : half_to_float(bits);
}

MIXKD_INLINE void store_value(void* row, Dtype dtype, int64_t index, float value) {
  if (dtype == Dtype::F32) {
    static_cast<float*>(row)[index] = value;
  } else {
    static_cast<uint16_t*>(row)[index] = float_to_16_bits(value, dtype);
  }
}

// CHUNK neighbouring classes as they are stored: 8 words of fp32, or 4 words of two 16-bit values each.
struct Packed {
  uint32_t words[CHUNK];
};

MIXKD_INLINE void unpack(const Packed& packed, Dtype dtype, float (&out)[CHUNK]) {
  if (dtype == Dtype::F32) {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) out[i] = float_of_bits(static_cast<int32_t>(packed.words[i]));
  } else if (dtype == Dtype::BF16) {
#pragma unroll
    for (int i = 0; i < CHUNK / 2; ++i) {
      out[2 * i] = float_of_bits(static_cast<int32_t>(packed.words[i] << 16));
      out[2 * i + 1] = float_of_bits(static_cast<int32_t>(packed.words[i] & 0xffff0000u));
    }
  } else {
#pragma unroll
    for (int i = 0; i < CHUNK / 2; ++i) {
      out[2 * i] = half_to_float(static_cast<uint16_t>(packed.words[i]));
      out[2 * i + 1] = half_to_float(static_cast<uint16_t>(packed.words[i] >> 16));
    }
  }
}

MIXKD_INLINE Packed pack(const float (&values)[CHUNK], Dtype dtype) {
  Packed packed;
  if (dtype == Dtype::F32) {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) packed.words[i] = static_cast<uint32_t>(bits_of_float(values[i]));
  } else {
#pragma unroll
    for (int i = 0; i < CHUNK / 2; ++i) {
      const uint32_t low = float_to_16_bits(values[2 * i], dtype), high = float_to_16_bits(values[2 * i + 1], dtype);
      packed.words[i] = low | (high << 16);
    }
  }
  return packed;
}

// How a row falls into chunks: chunk j holds the classes [8 j - lead, 8 j - lead + 8), those inside [begin, end) of
// them. With lead = elements since the last 16-byte boundary, every chunk starts on such a boundary.
struct Chunks {
  int lead;

  MIXKD_INLINE int start_of(int chunk) const { return chunk * CHUNK - lead; }
  MIXKD_INLINE int first(int begin) const { return (begin + lead) / CHUNK; }
  MIXKD_INLINE int last(int end) const { return (end + lead + CHUNK - 1) / CHUNK; }
};

MIXKD_INLINE int lead_of(const void* row, Dtype dtype) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) & 15) / bytes_of(dtype);
}

// A class outside the row is one that both sides mask: it adds nothing to any sum.
MIXKD_INLINE void mask_outside(float (&values)[CHUNK], int start, int begin, int end) {
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) {
    if (start + i < begin || start + i >= end) values[i] = -INFINITE;
  }
}

// A part of a row that is copied as a whole: some of its chunks, and bytes since the 16-byte boundary at or before its
// start.
struct Slice {
  Chunks chunks;
  int from, to;                 // chunks
  uint32_t begin, end;          // what is loaded: multiples of 16
  uint32_t own_begin, own_end;  // of it, the 16-byte pieces that no other row shares; empty if own_end <= own_begin
};

MIXKD_INLINE Slice slice_of(int lead, Dtype dtype, int num_classes, uint32_t rank, uint32_t size) {
  Slice slice;
  const uint32_t bytes = static_cast<uint32_t>(bytes_of(dtype));
  slice.chunks.lead = lead;
  const int64_t num_chunks = slice.chunks.last(num_classes);
  slice.from = static_cast<int>(num_chunks * rank / size);
  slice.to = static_cast<int>(num_chunks * (rank + 1) / size);
  const uint32_t row_begin = static_cast<uint32_t>(lead) * bytes,
                 row_end = row_begin + static_cast<uint32_t>(num_classes) * bytes;
  const uint32_t first = static_cast<uint32_t>(slice.from) * CHUNK * bytes,
                 last = static_cast<uint32_t>(slice.to) * CHUNK * bytes;
  const uint32_t row_end_up = (row_end + 15) / 16 * 16, row_end_down = row_end / 16 * 16,
                 row_begin_up = (row_begin + 15) / 16 * 16;
  slice.begin = first;
  slice.end = last < row_end_up ? last : row_end_up;
  slice.own_begin = first > row_begin_up ? first : row_begin_up;
  slice.own_end = slice.end < row_end_down ? slice.end : row_end_down;
  return slice;
}

// Copies what own_begin and own_end leave out of a slice, class by class: nothing outside the row is read.
MIXKD_INLINE void load_ends(char* room, const void* row, Dtype dtype, const Slice& slice, int num_classes, int thread,
                            int num_threads) {
  const uint32_t bytes = static_cast<uint32_t>(bytes_of(dtype)), stride = static_cast<uint32_t>(num_threads) * bytes;
  for (uint32_t place = slice.begin + static_cast<uint32_t>(thread) * bytes; place < slice.end; place += stride) {
    if (place >= slice.own_begin && place < slice.own_end) continue;
    const int c = static_cast<int>(place / bytes) - slice.chunks.lead;
    if (c >= 0 && c < num_classes) store_value(room, dtype, (place - slice.begin) / bytes, load_value(row, dtype, c));
  }
}

// Bytes that the largest of `size` slices takes, wherever the row starts; a multiple of 128.
inline size_t slice_room(Dtype dtype, int num_classes, int size) {
  const int num_chunks = (num_classes + 2 * CHUNK - 2) / CHUNK;
  return (static_cast<size_t>((num_chunks + size - 1) / size) * CHUNK * bytes_of(dtype) + 127) / 128 * 128;
}

// What a row's labels and weights make of it. A special row is not read: its loss and gradient are special_value.
struct RowSetting {
  float weight, lam;
  int label, partner_label;  // -1: none
  bool special;
  float special_value;
};

// As they lie in memory: may be read long before they are looked at.
struct RowInputs {
  int64_t label, partner_label;
  float weight, lam;
};

MIXKD_INLINE RowInputs row_inputs(const Job& job, int64_t row) {
  RowInputs inputs{0, 0, 1.0f, 1.0f};
  if (job.labels != nullptr) inputs.label = job.labels[row];
  if (job.partner_labels != nullptr) {
    inputs.partner_label = job.partner_labels[row];
    inputs.lam = job.lam[row];
  }
  if (job.row_weights != nullptr) inputs.weight = job.row_weights[row];
  return inputs;
}

MIXKD_INLINE bool is_dropped(const Job& job, const RowInputs& inputs) {
  return inputs.weight == 0.0f || (job.labels != nullptr && inputs.label == job.ignore_index) ||
         (job.partner_labels != nullptr && inputs.partner_label == job.ignore_index);
}

MIXKD_INLINE RowSetting row_setting(const Job& job, const RowInputs& inputs) {
  RowSetting setting;
  const bool dropped = is_dropped(job, inputs);
  const bool invalid = inputs.label < 0 || inputs.label >= job.num_classes || inputs.partner_label < 0 ||
                       inputs.partner_label >= job.num_classes;
  setting.weight = inputs.weight;
  setting.lam = inputs.lam;
  setting.label = job.labels == nullptr ? -1 : static_cast<int>(inputs.label);
  setting.partner_label = job.partner_labels == nullptr ? -1 : static_cast<int>(inputs.partner_label);
  setting.special = dropped || invalid;
  setting.special_value = dropped ? 0.0f : NOT_A_NUMBER;
  return setting;
}

MIXKD_INLINE RowSetting row_setting(const Job& job, int64_t row) { return row_setting(job, row_inputs(job, row)); }

}  // namespace mixkd::cuda

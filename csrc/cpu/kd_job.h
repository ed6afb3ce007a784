// One call of kd_loss as plain pointers: what the row loops see. No torch.
#pragma once

#include <cstdint>

#include "../distill_math.h"

namespace mixkd {

enum class Dtype : int { F32, BF16, F16, F64 };

// Legend: N rows, C student classes, S classes that student and teacher share, K kept classes of a top-k teacher.
struct KdJob {
  const void* student;         // [N, C], student_stride elements between rows
  const void* teacher;         // [N, C_T] logits, or [N, K] log-probabilities; null without a teacher
  const int64_t* top_indices;  // [N, K] or null
  const int64_t* labels;       // [N] or null
  const int64_t* partner_labels;
  const void* lam;          // [N] of the compute type, or null
  const void* row_weights;  // [N] of the compute type, or null
  void* gradient;           // [N, C] of the student's dtype, or null
  double* kd;               // [N]
  double* ce;
  Dtype student_dtype, teacher_dtype;
  int64_t student_stride, teacher_stride;
  int64_t num_classes, num_shared, num_top;
  int64_t ignore_index;
  double temperature, kd_weight, ce_weight;
  double scale;  // 1 / divisor: multiplies losses and gradient
  DivergenceOptions<double> options;
  Divergence divergence;  // effective; NONE without a teacher or at kd_weight 0
  bool tail_mass;
  bool in_place;  // the gradient takes the student's place: a row is read to its end before anything of it is written

  bool dropped(int64_t row, double weight) const {
    return weight == 0 || (labels != nullptr && labels[row] == ignore_index) ||
           (partner_labels != nullptr && partner_labels[row] == ignore_index);
  }
  bool in_range(int64_t label) const { return label >= 0 && label < num_classes; }
  bool invalid(int64_t row) const {
    if (labels != nullptr && !in_range(labels[row])) return true;
    if (partner_labels != nullptr && !in_range(partner_labels[row])) return true;
    for (int64_t k = 0; top_indices != nullptr && k < num_top; ++k) {
      if (!in_range(top_indices[row * num_top + k])) return true;
    }
    return false;
  }
};

// Rows begin..end of a job, computing in float, or in double if compute_double. One per instruction set.
using KdRows = void (*)(const KdJob& job, bool compute_double, int64_t begin, int64_t end);
void kd_rows_baseline(const KdJob& job, bool compute_double, int64_t begin, int64_t end);
void kd_rows_avx2(const KdJob& job, bool compute_double, int64_t begin, int64_t end);
void kd_rows_avx512(const KdJob& job, bool compute_double, int64_t begin, int64_t end);

}  // namespace mixkd

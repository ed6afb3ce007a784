// What the loops of relation_kl see, and the loops themselves, one set per instruction set. No torch.
#pragma once

#include <cstdint>

namespace mixkd {

enum class RelationDtype : int { F32, BF16, F16, F64 };

// One of `first` and `second` of one model: [rows, heads, length, width] of any strides, in elements.
struct RelationSide {
  const void* data;
  RelationDtype dtype;
  int64_t strides[4];
};

struct RelationJob {
  RelationSide student_first, student_second, teacher_first, teacher_second;
  const bool* keep;  // [rows, length]
  int64_t num_rows, num_heads, length, student_width, teacher_width;
  // Sums over queries of the divergence, [rows, heads].
  double* losses;
  // [rows, length, heads, student_width] in the dtype of the student, without the factor 1 / (heads sqrt(width));
  // null where not needed.
  void* grad_first;
  void* grad_second;
};

struct RelationLoops {
  // Row and head number `begin` to `end`: row * heads + head.
  void (*relations)(const RelationJob& job, bool compute_double, int64_t begin, int64_t end);
};

RelationLoops relation_loops_baseline();
RelationLoops relation_loops_avx2();
RelationLoops relation_loops_avx512();

}  // namespace mixkd

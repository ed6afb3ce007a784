// mixkd_fast::relation_kl on the CPU: arguments -> RelationJob, threads, registration.
//
// Loss and gradients come from one call; the backward multiplies them by what arrives from above. The relations, as
// large as [rows, heads, length, length], exist a few queries at a time: see relation_rows.h.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../checks.h"
#include "instruction_set.h"
#include "large_pages.h"
#include "relation_job.h"

namespace mixkd {
namespace {

// Bits of `needs`.
enum Needs : int64_t { FIRST = 1, SECOND = 2 };

RelationLoops pick_loops() {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::AVX512: return relation_loops_avx512();
    case InstructionSet::AVX2: return relation_loops_avx2();
    default: break;
  }
#endif
  return relation_loops_baseline();
}

RelationDtype dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return RelationDtype::F32;
    case ScalarType::BFloat16: return RelationDtype::BF16;
    case ScalarType::Half: return RelationDtype::F16;
    case ScalarType::Double: return RelationDtype::F64;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

// like: what the tensor's shape must be the same as.
RelationSide side_of(const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " must be [rows, heads, length, width]");
  for (int dimension = 0; dimension < 4; ++dimension) {
    STD_TORCH_CHECK(tensor.size(dimension) == like.size(dimension), name, " has a wrong shape");
  }
  RelationSide side{tensor.const_data_ptr(), dtype_of(name, tensor), {}};
  for (int dimension = 0; dimension < 4; ++dimension) side.strides[dimension] = tensor.stride(dimension);
  return side;
}

std::tuple<Tensor, Tensor, Tensor> relation_kl(Tensor student_first, Tensor student_second, Tensor teacher_first,
                                               Tensor teacher_second, Tensor keep, int64_t needs) {
  RelationJob job{};
  job.student_first = side_of("student_first", student_first, student_first);
  job.student_second = side_of("student_second", student_second, student_first);
  job.teacher_first = side_of("teacher_first", teacher_first, teacher_first);
  job.teacher_second = side_of("teacher_second", teacher_second, teacher_first);
  STD_TORCH_CHECK(job.student_second.dtype == job.student_first.dtype,
                  "student_second must have student_first's dtype");
  job.num_rows = student_first.size(0);
  job.num_heads = student_first.size(1);
  job.length = student_first.size(2);
  job.student_width = student_first.size(3);
  job.teacher_width = teacher_first.size(3);
  STD_TORCH_CHECK(teacher_first.size(0) == job.num_rows && teacher_first.size(1) == job.num_heads &&
                      teacher_first.size(2) == job.length,
                  "teacher_first must have the rows, heads and length of student_first");
  STD_TORCH_CHECK(job.num_heads > 0 && job.student_width > 0 && job.teacher_width > 0,
                  "heads and widths must be at least 1");
  STD_TORCH_CHECK(keep.dim() == 2 && keep.is_contiguous() && keep.scalar_type() == ScalarType::Bool &&
                      keep.size(0) == job.num_rows && keep.size(1) == job.length,
                  "keep must be contiguous bool [", job.num_rows, ", ", job.length, "]");
  job.keep = static_cast<const bool*>(keep.const_data_ptr());
  const bool compute_double = job.student_first.dtype == RelationDtype::F64 ||
                              job.teacher_first.dtype == RelationDtype::F64 ||
                              job.teacher_second.dtype == RelationDtype::F64;

  const auto gradient_of = [&](Needs bit) {
    const std::vector<int64_t> shape{job.num_rows, job.length, job.num_heads, job.student_width};
    return on_large_pages(torch::stable::new_empty(student_first, needs & bit ? shape : std::vector<int64_t>{0}));
  };
  Tensor grad_first = gradient_of(FIRST), grad_second = gradient_of(SECOND);
  job.grad_first = needs & FIRST ? grad_first.mutable_data_ptr() : nullptr;
  job.grad_second = needs & SECOND ? grad_second.mutable_data_ptr() : nullptr;
  std::vector<double> losses(job.num_rows * job.num_heads);
  job.losses = losses.data();

  static const RelationLoops loops = pick_loops();
  torch::stable::parallel_for(0, job.num_rows * job.num_heads, 1,
                              [&](int64_t begin, int64_t end) { loops.relations(job, compute_double, begin, end); });

  Tensor loss = torch::stable::new_empty(student_first, std::vector<int64_t>{job.num_rows},
                                         compute_double ? ScalarType::Double : ScalarType::Float);
  void* const to = loss.mutable_data_ptr();
  for (int64_t row = 0; row < job.num_rows; ++row) {
    double sum = 0;
    for (int64_t head = 0; head < job.num_heads; ++head) sum += losses[row * job.num_heads + head];
    sum /= static_cast<double>(job.num_heads);
    if (compute_double) {
      static_cast<double*>(to)[row] = sum;
    } else {
      static_cast<float*>(to)[row] = static_cast<float>(sum);
    }
  }
  return {loss, grad_first, grad_second};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixkd_fast, CPU, m) { m.impl("relation_kl", TORCH_BOX(&relation_kl)); }

}  // namespace mixkd

// Whether a call of kd_loss suits the cluster kernels, and of which dtype.
#include "kd_launch.h"

namespace mixkd::cuda {

template <Format format>
bool launch_cluster(const Job& job, const DeviceLimits& limits, cudaStream_t stream);

namespace {

// Narrower rows leave a block of a cluster without work for all its threads.
constexpr int NARROWEST = 4096;

// Whether every row of `data` lies at the student's distance from a 16-byte boundary.
bool aligned_with_student(const Job& job, const void* data, int64_t stride) {
  const int64_t bytes = bytes_of(job.student_dtype);
  const uint64_t start = reinterpret_cast<uintptr_t>(data) - reinterpret_cast<uintptr_t>(job.student);
  return start % 16 == 0 && (stride - job.student_stride) * bytes % 16 == 0;
}

}  // namespace

bool launch_hopper(const Job& job, const DeviceLimits& limits, cudaStream_t stream) {
  const bool suits = limits.major >= 9 && job.divergence != Divergence::ADAPTIVE_KL && job.num_classes >= NARROWEST &&
                     job.num_shared == job.num_classes;
  if (!suits) return false;
  if (job.teacher != nullptr &&
      (job.teacher_dtype != job.student_dtype || !aligned_with_student(job, job.teacher, job.teacher_stride))) {
    return false;
  }
  if (job.gradient != nullptr && !aligned_with_student(job, job.gradient, job.num_classes)) return false;
  switch (job.student_dtype) {
    case Dtype::F32: return launch_cluster<Format::F32>(job, limits, stream);
    case Dtype::BF16: return launch_cluster<Format::BF16>(job, limits, stream);
    case Dtype::F16: return launch_cluster<Format::F16>(job, limits, stream);
  }
  return false;
}

}  // namespace mixkd::cuda

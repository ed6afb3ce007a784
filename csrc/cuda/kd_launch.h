// The CUDA paths of kd_loss, as kd_loss.cu chooses among them.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <type_traits>

#include "kd_common.cuh"

namespace mixkd::cuda {

struct DeviceLimits {
  int index, num_multiprocessors, major, shared_bytes;  // shared memory that one block may ask for
};

// One block per row: any width, dtype and alignment.
void launch_wide(const Job& job, cudaStream_t stream);

// Several blocks per row, ordered by tickets. `workspace`: split_workspace_bytes, 16-byte aligned, contents of no
// matter.
bool split_takes(const Job& job);
size_t split_workspace_bytes(const Job& job);
void launch_split(const Job& job, const DeviceLimits& limits, void* workspace, cudaStream_t stream);

// Rows of at most NARROW classes, in registers. What else a small call needs happens in the same launch: with
// count_rows the divisor of "mean" is found by every block for itself; with `totals` and one block the losses are
// summed as well.
constexpr int NARROW = 1024;
struct Totals {
  float *loss, *kd, *ce;  // one element each
};
// Whether count_rows costs less than a launch of its own.
bool narrow_counts_rows(const Job& job);
// Returns whether it wrote `totals`.
bool launch_narrow(const Job& job, bool count_rows, const Totals& totals, cudaStream_t stream);

// Clusters of blocks that hold a row pair in shared memory; false if this call does not suit it.
bool launch_hopper(const Job& job, const DeviceLimits& limits, cudaStream_t stream);

// A teacher of which only K classes are known.
void launch_top(const Job& job, const DeviceLimits& limits, cudaStream_t stream);

// The divisor of "mean": the weight of all rows that are not dropped.
void launch_divisor(const Job& job, float* divisor, cudaStream_t stream);

// The student's logits at labels and partner_labels, [N] each; 0 for a label that is not there.
void launch_label_logits(const Job& job, float* label_logits, float* partner_logits, cudaStream_t stream);

// Sums over rows in a fixed order.
void launch_totals(const Job& job, const Totals& totals, cudaStream_t stream);

// loss [N] = kd + ce.
void launch_row_losses(const Job& job, float* loss, cudaStream_t stream);

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline void check_launch(const char* what) { check_cuda(cudaGetLastError(), what); }

template <Divergence divergence>
using DivergenceConstant = std::integral_constant<Divergence, divergence>;

template <Format format>
using FormatConstant = std::integral_constant<Format, format>;

// Calls body with the divergence as a compile-time constant.
template <typename Body>
void for_divergence(Divergence divergence, const Body& body) {
  switch (divergence) {
    case Divergence::FORWARD_KL: return body(DivergenceConstant<Divergence::FORWARD_KL>{});
    case Divergence::REVERSE_KL: return body(DivergenceConstant<Divergence::REVERSE_KL>{});
    case Divergence::JSD: return body(DivergenceConstant<Divergence::JSD>{});
    case Divergence::SKEW_FORWARD_KL: return body(DivergenceConstant<Divergence::SKEW_FORWARD_KL>{});
    case Divergence::SKEW_REVERSE_KL: return body(DivergenceConstant<Divergence::SKEW_REVERSE_KL>{});
    case Divergence::ALPHA_BETA: return body(DivergenceConstant<Divergence::ALPHA_BETA>{});
    case Divergence::ADAPTIVE_KL: return body(DivergenceConstant<Divergence::ADAPTIVE_KL>{});
    case Divergence::TVD: return body(DivergenceConstant<Divergence::TVD>{});
    case Divergence::MSE: return body(DivergenceConstant<Divergence::MSE>{});
    case Divergence::NONE: return body(DivergenceConstant<Divergence::NONE>{});
  }
}

// Calls body with the dtypes as a compile-time constant, as far as they are one.
template <typename Body>
void for_format(const Job& job, const Body& body) {
  if (job.teacher != nullptr && job.teacher_dtype != job.student_dtype) return body(FormatConstant<Format::MIXED>{});
  switch (job.student_dtype) {
    case Dtype::F32: return body(FormatConstant<Format::F32>{});
    case Dtype::BF16: return body(FormatConstant<Format::BF16>{});
    case Dtype::F16: return body(FormatConstant<Format::F16>{});
  }
}

}  // namespace mixkd::cuda

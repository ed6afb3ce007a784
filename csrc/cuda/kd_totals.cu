// The launches of kd_loss that go over rows rather than classes.
#include "kd_launch.h"
#include "kd_totals.cuh"

namespace mixkd::cuda {
namespace {

constexpr int THREADS = 1024;

__global__ void __launch_bounds__(THREADS) divisor_kernel(const __grid_constant__ Job job, float* divisor) {
  __shared__ double scratch[MAX_WARPS];
  const float weight = kept_weight(job, scratch);
  if (threadIdx.x == 0) *divisor = weight;
}

__global__ void __launch_bounds__(THREADS)
    totals_kernel(const float* kd, const float* ce, int64_t num_rows, const __grid_constant__ Totals totals) {
  __shared__ double scratch[MAX_WARPS];
  const RowTotals found = row_totals(kd, ce, num_rows, scratch);
  if (threadIdx.x != 0) return;
  *totals.kd = found.kd;
  *totals.ce = found.ce;
  *totals.loss = found.kd + found.ce;
}

__global__ void row_losses_kernel(const float* kd, const float* ce, int64_t num_rows, float* loss) {
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < num_rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    loss[row] = kd[row] + ce[row];
  }
}

__global__ void label_logits_kernel(const __grid_constant__ Job job, float* label_logits, float* partner_logits) {
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; row < job.num_rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const char* student =
        static_cast<const char*>(job.student) + row * job.student_stride * bytes_of(job.student_dtype);
    const auto logit_at = [&](const int64_t* labels) {
      const int64_t label = labels == nullptr ? -1 : labels[row];
      return label >= 0 && label < job.num_classes ? load_value(student, job.student_dtype, label) : 0.0f;
    };
    label_logits[row] = logit_at(job.labels);
    partner_logits[row] = logit_at(job.partner_labels);
  }
}

}  // namespace

void launch_divisor(const Job& job, float* divisor, cudaStream_t stream) {
  divisor_kernel<<<1, THREADS, 0, stream>>>(job, divisor);
  check_launch("kd_loss divisor");
}

void launch_label_logits(const Job& job, float* label_logits, float* partner_logits, cudaStream_t stream) {
  const int64_t blocks = (job.num_rows + 255) / 256;
  label_logits_kernel<<<static_cast<unsigned>(blocks < 4096 ? blocks : 4096), 256, 0, stream>>>(job, label_logits,
                                                                                                partner_logits);
  check_launch("kd_loss label logits");
}

void launch_totals(const Job& job, const Totals& totals, cudaStream_t stream) {
  totals_kernel<<<1, THREADS, 0, stream>>>(job.kd, job.ce, job.num_rows, totals);
  check_launch("kd_loss totals");
}

void launch_row_losses(const Job& job, float* loss, cudaStream_t stream) {
  if (job.num_rows == 0) return;
  const int64_t blocks = (job.num_rows + 255) / 256;
  row_losses_kernel<<<static_cast<unsigned>(blocks < 4096 ? blocks : 4096), 256, 0, stream>>>(job.kd, job.ce,
                                                                                              job.num_rows, loss);
  check_launch("kd_loss row losses");
}

}  // namespace mixkd::cuda

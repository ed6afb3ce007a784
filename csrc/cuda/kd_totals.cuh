// What happens over rows: the divisor of "mean" and the sums of the losses, by one block, in a fixed order.
#pragma once

#include "kd_block.cuh"

namespace mixkd::cuda {

// Sum over a block, in every thread. `scratch`: MAX_WARPS doubles, free to write.
__device__ __forceinline__ double block_sum(double value, double* scratch) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(ALL_LANES, value, offset);
  if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
  __syncthreads();
  double total = 0.0;
  for (unsigned warp = 0; warp < blockDim.x / WARP; ++warp) total += scratch[warp];
  __syncthreads();
  return total;
}

// The weight of all rows that are not dropped. Several rows at a time: one by one, each would wait for its labels.
__device__ __forceinline__ float kept_weight(const Job& job, double* scratch) {
  constexpr int AT_ONCE = 4;
  double weight = 0.0;
  for (int64_t first = threadIdx.x; first < job.num_rows; first += AT_ONCE * static_cast<int64_t>(blockDim.x)) {
    RowInputs inputs[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int64_t row = first + i * static_cast<int64_t>(blockDim.x);
      inputs[i] = RowInputs{0, 0, 0.0f, 0.0f};
      if (row < job.num_rows) inputs[i] = row_inputs(job, row);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      weight += is_dropped(job, inputs[i]) ? 0.0 : static_cast<double>(inputs[i].weight);
  }
  return static_cast<float>(block_sum(weight, scratch));
}

struct RowTotals {
  float kd, ce;
};

// kd and ce of all rows; they may have been written by other threads of this block before a barrier.
__device__ __forceinline__ RowTotals row_totals(const float* kd, const float* ce, int64_t num_rows, double* scratch) {
  double kd_sum = 0.0, ce_sum = 0.0;
  for (int64_t row = threadIdx.x; row < num_rows; row += blockDim.x) {
    kd_sum += static_cast<double>(kd[row]);
    ce_sum += static_cast<double>(ce[row]);
  }
  kd_sum = block_sum(kd_sum, scratch);
  ce_sum = block_sum(ce_sum, scratch);
  return {static_cast<float>(kd_sum), static_cast<float>(ce_sum)};
}

}  // namespace mixkd::cuda

// The cluster kernels of kd_loss for BF16 logits: one file per dtype, so that they compile side by side.
#include "kd_hopper_launch.cuh"

namespace mixkd::cuda {

template bool launch_cluster<Format::BF16>(const Job& job, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace mixkd::cuda

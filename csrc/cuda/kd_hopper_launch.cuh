// How a cluster launch of kd_loss is cut: blocks per cluster, buffers, clusters at a time.
#pragma once

#include <map>
#include <mutex>
#include <tuple>

#include "kd_hopper.cuh"

namespace mixkd::cuda {

struct ClusterLaunch {
  int size;     // blocks per cluster
  bool paired;  // two blocks of half the threads per multiprocessor
  size_t shared_bytes;
  ClusterPlan plan;
};

// The smallest cluster whose slices leave room for a second block on the multiprocessor, which works while the first
// waits for its cluster; failing that, 8 blocks with as many buffers as fit. size 0: the row pair does not fit at all.
inline ClusterLaunch plan_cluster(const Job& job, const DeviceLimits& limits) {
  const int sides = job.teacher == nullptr ? 1 : 2;
  const int64_t apart =
      job.teacher == nullptr || job.student_stride < job.teacher_stride ? job.student_stride : job.teacher_stride;
  const bool overlapping = apart * bytes_of(job.student_dtype) < 16;
  const auto cut = [&](int size, bool paired, int stages) {
    const size_t slice = slice_room(job.student_dtype, job.num_classes, size);
    return ClusterLaunch{size, paired, HEADER_BYTES + stages * sides * slice,
                         ClusterPlan{stages, static_cast<uint32_t>(slice), overlapping}};
  };
  // The runtime keeps 1 KB of every block's shared memory, and a multiprocessor has 1 KB more than one block may have.
  const size_t half = (static_cast<size_t>(limits.shared_bytes) - 1024) / 2;
  for (int size = 1; size <= MAX_CLUSTER; size *= 2) {
    const ClusterLaunch launch = cut(size, true, MAX_STAGES);
    if (launch.shared_bytes <= half) return launch;
  }
  for (int stages = MAX_STAGES; stages >= 2; --stages) {
    const ClusterLaunch launch = cut(MAX_CLUSTER, false, stages);
    if (launch.shared_bytes <= static_cast<size_t>(limits.shared_bytes)) return launch;
  }
  return ClusterLaunch{};
}

// Clusters that the device runs at a time; asked once per kernel and shape, as the answer takes longer than a launch.
inline int num_clusters(const void* kernel, const cudaLaunchConfig_t& config, const DeviceLimits& limits, int size) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, size_t>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& count = known[{kernel, limits.index, size, config.dynamicSmemBytes}];
  if (count == 0) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes),
               "kd_loss shared memory");
    check_cuda(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "kd_loss clusters");
  }
  return count;
}

template <Divergence divergence, Format format, int threads>
bool launch_kernel(const Job& job, const DeviceLimits& limits, const ClusterLaunch& launch, cudaStream_t stream) {
  const auto kernel = cluster_kernel<divergence, format, threads>;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(launch.size);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.size), 1, 1);
  config.blockDim = dim3(threads, 1, 1);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const int64_t at_once = num_clusters(reinterpret_cast<const void*>(kernel), config, limits, launch.size);
  if (at_once == 0) return false;
  config.gridDim.x *= static_cast<unsigned>(at_once < job.num_rows ? at_once : job.num_rows);
  check_cuda(cudaLaunchKernelEx(&config, kernel, job, launch.plan), "kd_loss in clusters");
  check_launch("kd_loss in clusters");
  return true;
}

template <Format format>
bool launch_cluster(const Job& job, const DeviceLimits& limits, cudaStream_t stream) {
  const ClusterLaunch launch = plan_cluster(job, limits);
  if (launch.size == 0) return false;
  bool launched = false;
  for_divergence(job.divergence, [&](auto divergence) {
    constexpr Divergence kind = decltype(divergence)::value;
    // Its head is searched for by one block: kd_wide.cu.
    if constexpr (kind != Divergence::ADAPTIVE_KL) {
      launched = launch.paired ? launch_kernel<kind, format, CLUSTER_THREADS / 2>(job, limits, launch, stream)
                               : launch_kernel<kind, format, CLUSTER_THREADS>(job, limits, launch, stream);
    }
  });
  return launched;
}

}  // namespace mixkd::cuda

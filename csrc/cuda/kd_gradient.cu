// mixkd_fast::scaled_gradient and mixkd_fast::scale_gradient_ on CUDA: the gradient that kd_loss saved, times what
// arrives from above. The factor is read on the device: nobody waits for it, and in place a factor of 1 moves nothing.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../checks.h"
#include "kd_launch.h"
#include "kd_stream.h"

namespace mixkd::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int LANES = 32;  // threads of a narrow row
constexpr int BLOCKS_PER_MULTIPROCESSOR = 8;

// One factor for all: a single row of N C classes.
struct Scaling {
  const char* from;  // [rows, classes]
  char* to;          // may be `from`
  const float* factors;
  int64_t num_rows, num_classes, factor_stride;
};

// The chunk of a row that starts at class `start`; what lies outside [0, num_classes) is left alone. Not by fetch() of
// kd_block.cuh: that may read only what the kernel does not write.
template <Dtype dtype>
__device__ __forceinline__ void scale_chunk(const char* from, char* to, bool aligned, int64_t start,
                                            int64_t num_classes, float factor) {
  constexpr int bytes = dtype == Dtype::F32 ? 4 : 2, words = CHUNK * bytes / 16;
  if (!aligned || start < 0 || start + CHUNK > num_classes) {
    for (int64_t c = start < 0 ? 0 : start; c < num_classes && c < start + CHUNK; ++c) {
      store_value(to, dtype, c, load_value(from, dtype, c) * factor);
    }
    return;
  }
  const uint4* source = reinterpret_cast<const uint4*>(from + start * bytes);
  uint4* target = reinterpret_cast<uint4*>(to + start * bytes);
  Packed packed{};
#pragma unroll
  for (int i = 0; i < words; ++i) {
    const uint4 part = source[i];
    packed.words[4 * i] = part.x, packed.words[4 * i + 1] = part.y;
    packed.words[4 * i + 2] = part.z, packed.words[4 * i + 3] = part.w;
  }
  float values[CHUNK];
  unpack(packed, dtype, values);
#pragma unroll
  for (int i = 0; i < CHUNK; ++i) values[i] *= factor;
  packed = pack(values, dtype);
#pragma unroll
  for (int i = 0; i < words; ++i) {
    target[i] =
        make_uint4(packed.words[4 * i], packed.words[4 * i + 1], packed.words[4 * i + 2], packed.words[4 * i + 3]);
  }
}

// Blocks of (threads of a row, rows).
template <Dtype dtype>
__global__ void __launch_bounds__(THREADS) scale_kernel(const __grid_constant__ Scaling job) {
  constexpr int bytes = dtype == Dtype::F32 ? 4 : 2;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < job.num_rows;
       row += static_cast<int64_t>(gridDim.y) * blockDim.y) {
    const float factor = job.factors[row * job.factor_stride];
    if (factor == 1.0f && job.from == job.to) continue;
    const char* from = job.from + row * job.num_classes * bytes;
    char* to = job.to + row * job.num_classes * bytes;
    const bool aligned = ((reinterpret_cast<uintptr_t>(from) ^ reinterpret_cast<uintptr_t>(to)) & 15) == 0;
    const int lead = lead_of(from, dtype);
    const int64_t num_chunks = (job.num_classes + lead + CHUNK - 1) / CHUNK;
    for (int64_t chunk = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; chunk < num_chunks;
         chunk += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      scale_chunk<dtype>(from, to, aligned, chunk * CHUNK - lead, job.num_classes, factor);
    }
  }
}

template <Dtype dtype>
void launch(const Scaling& job, int64_t most_blocks, cudaStream_t stream) {
  const int64_t chunks = (job.num_classes + CHUNK - 1) / CHUNK;
  const int lanes = chunks <= 4 * LANES && job.num_rows > 1 ? LANES : THREADS, rows = THREADS / lanes;
  const int64_t across = std::min<int64_t>((chunks + lanes - 1) / lanes, most_blocks);
  const int64_t down =
      std::min<int64_t>({(job.num_rows + rows - 1) / rows, std::max<int64_t>(1, most_blocks / across), 65535});
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(down));
  scale_kernel<dtype><<<grid, dim3(lanes, rows), 0, stream>>>(job);
}

// `result`: of the shape and dtype of grad_logits, or grad_logits itself.
void scale_into(Tensor& result, const Tensor& grad_logits, const Tensor& grad_output) {
  STD_TORCH_CHECK(grad_logits.dim() == 2 && grad_logits.is_contiguous(),
                  "grad_logits must be contiguous [rows, classes]");
  const int64_t num_rows = grad_logits.size(0), num_classes = grad_logits.size(1);
  const bool by_row = grad_output.dim() == 1;
  STD_TORCH_CHECK(by_row ? grad_output.size(0) == num_rows : grad_output.dim() == 0, "grad_output must be [] or [",
                  num_rows, "]");
  STD_TORCH_CHECK(grad_output.scalar_type() == ScalarType::Float, "grad_output must be float32");
  STD_TORCH_CHECK(grad_output.is_cuda() && grad_output.get_device_index() == grad_logits.get_device_index(),
                  "grad_output must be on the device of grad_logits");
  if (num_rows == 0 || num_classes == 0) return;
  const int32_t device = grad_logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  int num_multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device), "scaled_gradient");
  const int64_t most_blocks = static_cast<int64_t>(num_multiprocessors) * BLOCKS_PER_MULTIPROCESSOR;
  const Scaling job{
      static_cast<const char*>(grad_logits.const_data_ptr()),  static_cast<char*>(result.mutable_data_ptr()),
      static_cast<const float*>(grad_output.const_data_ptr()), by_row ? num_rows : 1,
      by_row ? num_classes : num_rows * num_classes,           by_row ? grad_output.stride(0) : 0};
  switch (grad_logits.scalar_type()) {
    case ScalarType::Float: launch<Dtype::F32>(job, most_blocks, stream); break;
    case ScalarType::BFloat16: launch<Dtype::BF16>(job, most_blocks, stream); break;
    case ScalarType::Half: launch<Dtype::F16>(job, most_blocks, stream); break;
    default: STD_TORCH_CHECK(false, "grad_logits must be float32, bfloat16 or float16");
  }
  check_launch("scaled_gradient");
}

Tensor scaled_gradient(Tensor grad_logits, Tensor grad_output) {
  Tensor result = torch::stable::empty_like(grad_logits);
  scale_into(result, grad_logits, grad_output);
  return result;
}

// For a gradient that nobody else holds or asks for again.
void scale_gradient_(Tensor grad_logits, Tensor grad_output) { scale_into(grad_logits, grad_logits, grad_output); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixkd_fast, CUDA, m) {
  m.impl("scaled_gradient", TORCH_BOX(&scaled_gradient));
  m.impl("scale_gradient_", TORCH_BOX(&scale_gradient_));
}

}  // namespace mixkd::cuda

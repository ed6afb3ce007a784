// mixkd_fast::mix_embeddings on CUDA, and the two parts of its backward: arguments -> jobs, launches, registration. The
// sorting between the parts is torch's (mixkd_fast/ops/mix_backward.py).
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../mix_checks.h"
#include "kd_stream.h"
#include "mix_kernels.cuh"

namespace mixkd::cuda {
namespace {

using torch::stable::new_empty;

constexpr int64_t PROGRAMS = 2048;  // warps that share the tokens in LayerNorm's backward
constexpr int64_t MOST_BLOCKS = 65535;

void check_last_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

void check_place(const char* name, const Optional& tensor, const Tensor& weight) {
  STD_TORCH_CHECK(!tensor.has_value() || (tensor->is_cuda() && tensor->get_device_index() == weight.get_device_index()),
                  name, " must be on the device of weight");
}

Element element_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Element::F32;
    case ScalarType::BFloat16: return Element::BF16;
    case ScalarType::Half: return Element::F16;
    default:
      STD_TORCH_CHECK(false, name,
                      " must be float32, bfloat16 or float16 for the cuda backend; float64 has the reference backend");
  }
}

NormValues norm_values(const char* name, const Optional& values) {
  if (!values.has_value()) return {nullptr, Element::F32};
  return {values->const_data_ptr(), element_of(name, *values)};
}

bool is_aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; });
}

// Calls body with an element of the tables' type.
template <typename Body>
void for_element(Element element, const Body& body) {
  switch (element) {
    case Element::F32: return body(float{});
    case Element::BF16: return body(__nv_bfloat16{});
    case Element::F16: return body(__half{});
  }
}

unsigned blocks_for(int64_t warps) {
  return static_cast<unsigned>(std::min<int64_t>((warps + WARPS_PER_BLOCK - 1) / WARPS_PER_BLOCK, MOST_BLOCKS));
}

struct Arguments {
  MixJob job;
  Element element;
  NormValues gain, bias;
  bool in_pieces;  // 16 bytes at a time
};

Arguments checked(const Tensor& input_ids, const Tensor& weight, const Tensor& partner, const Tensor& lam,
                  const Optional& padding_mask, const Optional& position_weight, const Optional& token_type_ids,
                  const Optional& token_type_weight, const Optional& position_ids, const Optional& norm_weight,
                  const Optional& norm_bias, double norm_eps, bool use_norm, int64_t num_rows, bool include_clean) {
  check_place("input_ids", input_ids, weight);
  check_place("partner", partner, weight);
  check_place("lam", lam, weight);
  check_place("padding_mask", padding_mask, weight);
  check_place("position_weight", position_weight, weight);
  check_place("token_type_ids", token_type_ids, weight);
  check_place("token_type_weight", token_type_weight, weight);
  check_place("position_ids", position_ids, weight);
  check_place("norm_weight", norm_weight, weight);
  check_place("norm_bias", norm_bias, weight);
  const Element element = element_of("weight", weight);  // first: it has the words for float64
  Arguments arguments{
      mix_job(input_ids, weight, partner, lam, padding_mask, position_weight, token_type_ids, token_type_weight,
              position_ids, norm_weight, norm_bias, norm_eps, use_norm, num_rows, include_clean, ScalarType::Float),
      element, norm_values("norm_weight", norm_weight), norm_values("norm_bias", norm_bias), false};
  const int64_t row_bytes = arguments.job.width * (arguments.element == Element::F32 ? 4 : 2);
  arguments.in_pieces = row_bytes % 16 == 0 && is_aligned({arguments.job.weight, arguments.job.position_weight,
                                                           arguments.job.token_type_weight});
  return arguments;
}

std::tuple<Tensor, Tensor, Tensor> mix_embeddings(Tensor input_ids, Tensor weight, Tensor partner, Tensor lam,
                                                  Optional padding_mask, Optional position_weight,
                                                  Optional token_type_ids, Optional token_type_weight,
                                                  Optional position_ids, Optional norm_weight, Optional norm_bias,
                                                  double norm_eps, bool use_norm, int64_t num_rows,
                                                  bool include_clean) {
  Arguments arguments =
      checked(input_ids, weight, partner, lam, padding_mask, position_weight, token_type_ids, token_type_weight,
              position_ids, norm_weight, norm_bias, norm_eps, use_norm, num_rows, include_clean);
  MixJob& job = arguments.job;
  const int32_t device = weight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  Tensor output = new_empty(weight, std::vector<int64_t>{partner.numel() + job.num_leading, job.length, job.width});
  const std::vector<int64_t> moments{use_norm ? job.num_tokens : 0};
  Tensor mean = new_empty(weight, moments, ScalarType::Float), rstd = new_empty(weight, moments, ScalarType::Float);
  job.output = output.mutable_data_ptr();
  job.mean = mean.mutable_data_ptr();
  job.rstd = rstd.mutable_data_ptr();
  if (job.num_tokens == 0 || job.width == 0) return {output, mean, rstd};
  const bool in_pieces = arguments.in_pieces && is_aligned({job.output});
  for_element(arguments.element, [&](auto element) {
    using E = decltype(element);
    const auto kernel = in_pieces ? mix_forward_kernel<E, 16 / sizeof(E)> : mix_forward_kernel<E, 1>;
    kernel<<<blocks_for(job.num_tokens), MIX_WARP * WARPS_PER_BLOCK, 0, stream>>>(job, arguments.gain, arguments.bias);
  });
  check_last_launch("mix_embeddings");
  return {output, mean, rstd};
}

// grad_x [tokens, H] and norm_sums [warps, 2, H], both float32.
std::tuple<Tensor, Tensor> mix_norm_backward(Tensor grad_output, Tensor input_ids, Tensor weight, Tensor partner,
                                             Tensor lam, Optional padding_mask, Optional position_weight,
                                             Optional token_type_ids, Optional token_type_weight, Optional position_ids,
                                             Optional norm_weight, Optional norm_bias, double norm_eps, bool use_norm,
                                             int64_t num_rows, bool include_clean, Tensor mean, Tensor rstd) {
  Arguments arguments =
      checked(input_ids, weight, partner, lam, padding_mask, position_weight, token_type_ids, token_type_weight,
              position_ids, norm_weight, norm_bias, norm_eps, use_norm, num_rows, include_clean);
  MixJob& job = arguments.job;
  check_place("grad_output", grad_output, weight);
  STD_TORCH_CHECK(grad_output.is_contiguous() && grad_output.numel() == job.num_tokens * job.width &&
                      grad_output.scalar_type() == weight.scalar_type(),
                  "grad_output must be contiguous, of the shape of the output and the dtype of weight");
  check_place("mean", mean, weight);
  check_place("rstd", rstd, weight);
  check_rows("mean", mean, job.num_tokens, ScalarType::Float);
  check_rows("rstd", rstd, job.num_tokens, ScalarType::Float);
  job.mean = mean.mutable_data_ptr();
  job.rstd = rstd.mutable_data_ptr();
  const int32_t device = weight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const int64_t tokens_each = std::max<int64_t>(1, (job.num_tokens + PROGRAMS - 1) / PROGRAMS);
  const int64_t warps = (job.num_tokens + tokens_each - 1) / tokens_each;
  Tensor grad_x = new_empty(weight, std::vector<int64_t>{job.num_tokens, job.width}, ScalarType::Float);
  Tensor norm_sums = new_empty(weight, std::vector<int64_t>{warps, 2, job.width}, ScalarType::Float);
  if (job.num_tokens == 0 || job.width == 0) return {grad_x, norm_sums};
  float* const of_x = static_cast<float*>(grad_x.mutable_data_ptr());
  float* const sums = static_cast<float*>(norm_sums.mutable_data_ptr());
  const void* incoming = grad_output.const_data_ptr();
  // Four columns: 16 bytes of the fp32 sums.
  const bool in_pieces = arguments.in_pieces && is_aligned({incoming, of_x, sums});
  for_element(arguments.element, [&](auto element) {
    using E = decltype(element);
    const auto kernel = in_pieces ? mix_norm_backward_kernel<E, 4> : mix_norm_backward_kernel<E, 1>;
    kernel<<<blocks_for(warps), MIX_WARP * WARPS_PER_BLOCK, 0, stream>>>(job, arguments.gain, incoming, of_x, sums,
                                                                         warps, tokens_each);
  });
  check_last_launch("mix_norm_backward");
  return {grad_x, norm_sums};
}

template <typename S, typename E>
void launch_sums(const Sums& job, bool in_pieces, cudaStream_t stream) {
  const int threads = MIX_WARP * WARPS_PER_BLOCK;
  const unsigned blocks = static_cast<unsigned>((job.num_chunks + WARPS_PER_BLOCK - 1) / WARPS_PER_BLOCK);
  if (in_pieces) {
    sum_runs_kernel<S, E, 4><<<blocks, threads, 0, stream>>>(job);
    join_runs_kernel<E, 4><<<blocks, threads, 0, stream>>>(job);
  } else {
    sum_runs_kernel<S, E, 1><<<blocks, threads, 0, stream>>>(job);
    join_runs_kernel<E, 1><<<blocks, threads, 0, stream>>>(job);
  }
  check_last_launch("sum_rows_");
}

// table[rows[e]] = sum of shares[e] * source[tokens[e]]; rows ascend; the caller zeroes the table.
void sum_rows(Tensor source, Tensor rows, Tensor tokens, Tensor shares, Tensor table) {
  STD_TORCH_CHECK(table.dim() == 2, "table must be [rows, width]");
  const int64_t num_entries = rows.numel(), width = table.size(1);
  STD_TORCH_CHECK(source.dim() == 2 && source.is_contiguous() && source.size(1) == width && table.is_contiguous(),
                  "source must be contiguous [tokens, ", width, "]");
  check_place("source", source, table);
  check_place("rows", rows, table);
  check_place("tokens", tokens, table);
  check_place("shares", shares, table);
  check_rows("rows", rows, num_entries, ScalarType::Long);
  check_rows("tokens", tokens, num_entries, ScalarType::Long);
  check_rows("shares", shares, num_entries, ScalarType::Float);
  const Element element = element_of("table", table), of_source = element_of("source", source);
  STD_TORCH_CHECK(of_source == element || of_source == Element::F32, "source must be float32 or of the dtype of table");
  if (num_entries == 0 || width == 0) return;
  const int32_t device = table.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const int64_t chunks = (num_entries + ENTRIES - 1) / ENTRIES;
  // Freed on return: the allocator hands it out again in the order of the stream.
  Tensor partials = new_empty(table, std::vector<int64_t>{chunks, 2, width}, ScalarType::Float);
  const Sums job{source.const_data_ptr(),
                 static_cast<const int64_t*>(rows.const_data_ptr()),
                 static_cast<const int64_t*>(tokens.const_data_ptr()),
                 static_cast<const float*>(shares.const_data_ptr()),
                 table.mutable_data_ptr(),
                 static_cast<float*>(partials.mutable_data_ptr()),
                 num_entries,
                 chunks,
                 width};
  const bool in_pieces = width % 4 == 0 && is_aligned({job.source, job.table, job.partials});
  for_element(element, [&](auto value) {
    using E = decltype(value);
    if (of_source == Element::F32) return launch_sums<float, E>(job, in_pieces, stream);
    launch_sums<E, E>(job, in_pieces, stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixkd_fast, CUDA, m) {
  m.impl("mix_embeddings", TORCH_BOX(&mix_embeddings));
  m.impl("mix_norm_backward", TORCH_BOX(&mix_norm_backward));
  m.impl("sum_rows_", TORCH_BOX(&sum_rows));
}

}  // namespace mixkd::cuda

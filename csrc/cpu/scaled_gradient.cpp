// mixkd_fast::scaled_gradient on the CPU: a saved gradient times what arrives from above, in one pass.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../checks.h"
#include "../fast_math.h"
#include "large_pages.h"

namespace mixkd {
namespace {

template <typename T, typename E, typename Factor, typename Load, typename Store>
void scale_rows(const E* in, E* out, Factor factor_of, int64_t num_rows, int64_t num_classes, Load load, Store store) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, num_classes));
  torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T factor = static_cast<T>(factor_of(r));
      const E* __restrict from = in + r * num_classes;
      E* __restrict to = out + r * num_classes;
#pragma omp simd
      for (int64_t c = 0; c < num_classes; ++c) to[c] = store(load(from[c]) * factor);
    }
  });
}

Tensor scaled_gradient(Tensor grad_logits, Tensor grad_output) {
  STD_TORCH_CHECK(grad_logits.dim() == 2 && grad_logits.is_contiguous(),
                  "grad_logits must be contiguous [rows, classes]");
  const int64_t num_rows = grad_logits.size(0), num_classes = grad_logits.size(1);
  const bool per_row = grad_output.dim() == 1;
  STD_TORCH_CHECK(grad_output.dim() == 0 || (per_row && grad_output.size(0) == num_rows), "grad_output must be [] or [",
                  num_rows, "]");
  // What a reduction hands down is expanded; a copy of [N] is nothing beside [N, C].
  const Tensor factors = torch::stable::contiguous(grad_output);
  // float64 also for narrower logits, if the teacher's are float64.
  const bool is_double = factors.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || factors.scalar_type() == ScalarType::Float, "grad_output must be float32 or float64");
  const void* const values = factors.const_data_ptr();
  const auto factor_of = [=](int64_t row) {
    const int64_t at = per_row ? row : 0;
    return is_double ? static_cast<const double*>(values)[at] : static_cast<const float*>(values)[at];
  };
  Tensor result = on_large_pages(torch::stable::empty_like(grad_logits));
  const void* in = grad_logits.const_data_ptr();
  void* out = result.mutable_data_ptr();
  const auto run = [&](auto element, auto compute, auto load, auto store) {
    using E = decltype(element);
    using T = decltype(compute);
    scale_rows<T>(static_cast<const E*>(in), static_cast<E*>(out), factor_of, num_rows, num_classes, load, store);
  };
  const auto same = [](auto value) { return value; };
  switch (grad_logits.scalar_type()) {
    case ScalarType::Float: run(0.0f, 0.0f, same, same); break;
    case ScalarType::Double: run(0.0, 0.0, same, same); break;
    case ScalarType::BFloat16:
      run(
          uint16_t(0), 0.0f, [](uint16_t x) { return float_of_bfloat16(x); },
          [](float x) { return bfloat16_of_float(x); });
      break;
    case ScalarType::Half:
      run(uint16_t(0), 0.0f, [](uint16_t x) { return float_of_half(x); }, [](float x) { return half_of_float(x); });
      break;
    default: STD_TORCH_CHECK(false, "grad_logits must be float32, bfloat16, float16 or float64");
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixkd_fast, CPU, m) { m.impl("scaled_gradient", TORCH_BOX(&scaled_gradient)); }

}  // namespace mixkd

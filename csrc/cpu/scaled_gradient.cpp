// mixkd_fast::scaled_gradient on the CPU: a saved gradient times what arrives from above, in one pass.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../checks.h"
#include "../fast_math.h"

namespace mixkd {
namespace {

template <typename Load, typename Store, typename E, typename T>
void scale_rows(const E* in, E* out, const T* factors, bool per_row, double scale, int64_t num_rows,
                int64_t num_classes, Load load, Store store) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, num_classes));
  torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T factor = static_cast<T>(factors[per_row ? r : 0] * scale);
      const E* __restrict from = in + r * num_classes;
      E* __restrict to = out + r * num_classes;
#pragma omp simd
      for (int64_t c = 0; c < num_classes; ++c) to[c] = store(load(from[c]) * factor);
    }
  });
}

Tensor scaled_gradient(Tensor grad_logits, Tensor grad_output, double scale) {
  STD_TORCH_CHECK(grad_logits.dim() == 2 && grad_logits.is_contiguous(),
                  "grad_logits must be contiguous [rows, classes]");
  const int64_t num_rows = grad_logits.size(0), num_classes = grad_logits.size(1);
  const bool per_row = grad_output.dim() == 1;
  STD_TORCH_CHECK(grad_output.dim() == 0 || (per_row && grad_output.size(0) == num_rows), "grad_output must be [] or [",
                  num_rows, "]");
  // What a reduction hands down is expanded; a copy of [N] is nothing beside [N, C].
  const Tensor factors = torch::stable::contiguous(grad_output);
  const bool is_double = grad_logits.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(factors.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
                  "grad_output has a wrong dtype");
  Tensor result = torch::stable::empty_like(grad_logits);
  const void* in = grad_logits.const_data_ptr();
  void* out = result.mutable_data_ptr();
  const auto run = [&](auto element, auto compute, auto load, auto store) {
    using E = decltype(element);
    using T = decltype(compute);
    scale_rows(static_cast<const E*>(in), static_cast<E*>(out), static_cast<const T*>(factors.const_data_ptr()),
               per_row, scale, num_rows, num_classes, load, store);
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

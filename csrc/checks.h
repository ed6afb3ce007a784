// What both machine-code backends ask of their tensors. Python checks shapes and options first, with better words;
// these checks keep a direct call of the op from reading foreign memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace mixkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

inline void check_matrix(const char* name, const Tensor& tensor, int64_t num_rows) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == num_rows, name, " must be [", num_rows, ", classes]");
  STD_TORCH_CHECK(tensor.size(1) >= 1, name, " must have at least 1 class");
  STD_TORCH_CHECK(tensor.size(1) == 1 || tensor.stride(1) == 1, name, " must have its classes next to each other");
}

// What a top-k teacher and a normalizer must be; compute: the dtype of losses.
inline void check_top_k(const Tensor& indices, const Tensor& logprobs, int64_t num_rows) {
  check_matrix("teacher_indices", indices, num_rows);
  STD_TORCH_CHECK(indices.is_contiguous() && indices.scalar_type() == ScalarType::Long &&
                      indices.size(1) == logprobs.size(1) && logprobs.is_contiguous(),
                  "teacher_indices must be contiguous int64 of the shape of teacher_logits, which is contiguous");
}

inline void check_normalizer(const std::optional<Tensor>& normalizer, ScalarType compute) {
  STD_TORCH_CHECK(!normalizer.has_value() || (normalizer->numel() == 1 && normalizer->scalar_type() == compute),
                  "normalizer must be one element of the dtype of the losses");
}

inline void check_rows(const char* name, const std::optional<Tensor>& tensor, int64_t num_rows, ScalarType dtype) {
  if (!tensor.has_value()) return;
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == num_rows, name, " must be [", num_rows, "]");
  STD_TORCH_CHECK(tensor->is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, " has a wrong dtype");
}

}  // namespace mixkd

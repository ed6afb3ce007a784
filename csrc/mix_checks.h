// Tensors of mix_embeddings -> MixJob, with what both machine-code backends ask of shapes and dtypes. Values are not
// read.
#pragma once

#include <algorithm>

#include "checks.h"
#include "mix_math.h"

namespace mixkd {

using Optional = std::optional<Tensor>;

inline void check_table(const char* name, const Optional& table, const Tensor& weight) {
  if (!table.has_value()) return;
  STD_TORCH_CHECK(table->dim() == 2 && table->is_contiguous() && table->size(1) == weight.size(1), name,
                  " must be contiguous [rows, ", weight.size(1), "]");
  STD_TORCH_CHECK(table->scalar_type() == weight.scalar_type(), name, " must have the dtype of weight");
}

inline void check_integers(const char* name, const Optional& values, int64_t rows, int64_t length) {
  if (!values.has_value()) return;
  STD_TORCH_CHECK(values->dim() == 2 && values->is_contiguous() && values->size(0) == rows && values->size(1) == length,
                  name, " must be contiguous [", rows, ", ", length, "]");
  STD_TORCH_CHECK(values->scalar_type() == ScalarType::Long, name, " must be int64");
}

// The job without output, mean, rstd and LayerNorm's values. compute: the dtype of lam, mean and rstd.
inline MixJob mix_job(const Tensor& input_ids, const Tensor& weight, const Tensor& partner, const Tensor& lam,
                      const Optional& padding_mask, const Optional& position_weight, const Optional& token_type_ids,
                      const Optional& token_type_weight, const Optional& position_ids, const Optional& norm_weight,
                      const Optional& norm_bias, double norm_eps, bool use_norm, int64_t num_rows, bool include_clean,
                      ScalarType compute) {
  MixJob job{};
  STD_TORCH_CHECK(input_ids.dim() == 2, "input_ids must be [rows, length]");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight must be contiguous [words, width]");
  const int64_t all_rows = input_ids.size(0), length = input_ids.size(1), num_mixed = partner.numel();
  const int64_t output_rows = num_mixed + (include_clean ? num_rows : 0);
  check_integers("input_ids", input_ids, all_rows, length);
  check_integers("token_type_ids", token_type_ids, all_rows, length);
  check_integers("position_ids", position_ids, output_rows, length);
  check_rows("partner", partner, num_mixed, ScalarType::Long);
  check_rows("lam", lam, num_mixed, compute);
  check_table("position_weight", position_weight, weight);
  check_table("token_type_weight", token_type_weight, weight);
  STD_TORCH_CHECK(token_type_ids.has_value() == token_type_weight.has_value(), "token_type_ids need token_type_weight");
  STD_TORCH_CHECK(num_rows >= 0 && num_rows <= all_rows && (num_rows > 0 || num_mixed == 0), "num_rows is ", num_rows);
  if (padding_mask.has_value()) {
    STD_TORCH_CHECK(padding_mask->is_contiguous() && padding_mask->numel() == input_ids.numel() &&
                        padding_mask->scalar_type() == ScalarType::Bool,
                    "padding_mask must be contiguous bool of the shape of input_ids");
  }
  for (const Optional* values : {&norm_weight, &norm_bias}) {
    if (!values->has_value()) continue;
    STD_TORCH_CHECK((*values)->numel() == weight.size(1) && (*values)->is_contiguous(),
                    "LayerNorm must be contiguous and as wide as weight");
    const ScalarType dtype = (*values)->scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
                        dtype == ScalarType::Double,
                    "LayerNorm must be float32, bfloat16, float16 or float64");
  }
  job.input_ids = static_cast<const int64_t*>(input_ids.const_data_ptr());
  job.weight = weight.const_data_ptr();
  job.partner = static_cast<const int64_t*>(partner.const_data_ptr());
  job.lam = lam.const_data_ptr();
  job.padding_mask = static_cast<const bool*>(data_or_null(padding_mask));
  job.position_weight = data_or_null(position_weight);
  job.position_ids = static_cast<const int64_t*>(data_or_null(position_ids));
  job.token_type_ids = static_cast<const int64_t*>(data_or_null(token_type_ids));
  job.token_type_weight = data_or_null(token_type_weight);
  job.num_rows = all_rows;
  job.length = length;
  job.width = weight.size(1);
  job.num_words = weight.size(0);
  job.num_positions = position_weight.has_value() ? position_weight->size(0) : 0;
  job.num_types = token_type_weight.has_value() ? token_type_weight->size(0) : 0;
  job.num_clean = num_rows;
  job.num_leading = include_clean ? num_rows : 0;
  job.num_tokens = output_rows * length;
  job.norm_eps = norm_eps;
  job.use_norm = use_norm;
  STD_TORCH_CHECK(!position_weight.has_value() || job.position_ids != nullptr || length <= job.num_positions,
                  "input_ids has ", length, " positions; allowed: 0 to ", job.num_positions);
  return job;
}

}  // namespace mixkd

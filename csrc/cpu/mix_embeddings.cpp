// mixkd_fast::mix_embeddings and its backward on the CPU: arguments -> MixJob, threads, registration.
//
// The gradient of a table is a sum over tokens per table row. Tokens are sorted by table row first, so that every row
// is written by one thread, in the order of the tokens: the result is the same for any number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "../mix_checks.h"
#include "instruction_set.h"
#include "large_pages.h"
#include "mix_job.h"

namespace mixkd {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

MixRows pick_rows() {
#if defined(__x86_64__)
  switch (instruction_set()) {
    case InstructionSet::AVX512: return mix_rows_avx512();
    case InstructionSet::AVX2: return mix_rows_avx2();
    default: break;
  }
#endif
  return mix_rows_baseline();
}

const MixRows& row_loops() {
  static const MixRows rows = pick_rows();
  return rows;
}

MixDtype dtype_of(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Float: return MixDtype::F32;
    case ScalarType::BFloat16: return MixDtype::BF16;
    case ScalarType::Half: return MixDtype::F16;
    case ScalarType::Double: return MixDtype::F64;
    default: STD_TORCH_CHECK(false, "weight must be float32, bfloat16, float16 or float64");
  }
}

void check_range(const char* name, const int64_t* values, int64_t count, int64_t size) {
  for (int64_t i = 0; values != nullptr && i < count; ++i) {
    STD_TORCH_CHECK(is_in(values[i], size), name, " holds ", values[i], "; allowed: 0 to ", size - 1);
  }
}

// LayerNorm's weight or bias [H] in the compute type; `otherwise` where there is none.
template <typename T>
std::vector<T> norm_values(const Optional& values, int64_t width, T otherwise) {
  std::vector<T> out(width, otherwise);
  if (!values.has_value()) return out;
  const void* data = values->const_data_ptr();
  for (int64_t h = 0; h < width; ++h) {
    switch (values->scalar_type()) {
      case ScalarType::Float: out[h] = static_cast<T>(static_cast<const float*>(data)[h]); break;
      case ScalarType::Double: out[h] = static_cast<T>(static_cast<const double*>(data)[h]); break;
      case ScalarType::BFloat16: out[h] = float_of_bfloat16(static_cast<const uint16_t*>(data)[h]); break;
      default: out[h] = float_of_half(static_cast<const uint16_t*>(data)[h]); break;
    }
  }
  return out;
}

// The arguments that forward and backward share, checked, and the job made of them.
struct Call {
  MixJob job{};
  MixDtype dtype;
  ScalarType compute;
  std::vector<double> norm_double[2];
  std::vector<float> norm_float[2];

  Call(const Tensor& input_ids, const Tensor& weight, const Tensor& partner, const Tensor& lam,
       const Optional& padding_mask, const Optional& position_weight, const Optional& token_type_ids,
       const Optional& token_type_weight, const Optional& position_ids, const Optional& norm_weight,
       const Optional& norm_bias, double norm_eps, bool use_norm, int64_t num_rows, bool include_clean)
      : dtype(dtype_of(weight)), compute(dtype == MixDtype::F64 ? ScalarType::Double : ScalarType::Float) {
    job = mix_job(input_ids, weight, partner, lam, padding_mask, position_weight, token_type_ids, token_type_weight,
                  position_ids, norm_weight, norm_bias, norm_eps, use_norm, num_rows, include_clean, compute);
    check_range("partner", job.partner, partner.numel(), job.num_rows);
    check_range("input_ids", job.input_ids, input_ids.numel(), job.num_words);
    check_range("token_type_ids", job.token_type_ids, input_ids.numel(), job.num_types);
    check_range("position_ids", job.position_ids, job.num_tokens, job.num_positions);
    if (!use_norm) return;
    if (compute == ScalarType::Double) {
      norm_double[0] = norm_values(norm_weight, job.width, 1.0);
      norm_double[1] = norm_values(norm_bias, job.width, 0.0);
      job.norm_weight = norm_double[0].data();
      job.norm_bias = norm_double[1].data();
    } else {
      norm_float[0] = norm_values(norm_weight, job.width, 1.0f);
      norm_float[1] = norm_values(norm_bias, job.width, 0.0f);
      job.norm_weight = norm_float[0].data();
      job.norm_bias = norm_float[1].data();
    }
  }
  Call(const Call&) = delete;

  // A thread is worth its start from some ten thousand numbers on.
  int64_t grain() const { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, job.width)); }
};

std::tuple<Tensor, Tensor, Tensor> mix_embeddings(Tensor input_ids, Tensor weight, Tensor partner, Tensor lam,
                                                  Optional padding_mask, Optional position_weight,
                                                  Optional token_type_ids, Optional token_type_weight,
                                                  Optional position_ids, Optional norm_weight, Optional norm_bias,
                                                  double norm_eps, bool use_norm, int64_t num_rows,
                                                  bool include_clean) {
  Call call(input_ids, weight, partner, lam, padding_mask, position_weight, token_type_ids, token_type_weight,
            position_ids, norm_weight, norm_bias, norm_eps, use_norm, num_rows, include_clean);
  MixJob& job = call.job;
  const int64_t output_rows = partner.numel() + job.num_leading;
  Tensor output = on_large_pages(new_empty(weight, std::vector<int64_t>{output_rows, job.length, job.width}));
  const std::vector<int64_t> moments{use_norm ? job.num_tokens : 0};
  Tensor mean = new_empty(weight, moments, call.compute), rstd = new_empty(weight, moments, call.compute);
  job.output = output.mutable_data_ptr();
  job.mean = mean.mutable_data_ptr();
  job.rstd = rstd.mutable_data_ptr();
  parallel_for(0, job.num_tokens, call.grain(),
               [&](int64_t begin, int64_t end) { row_loops().forward(job, call.dtype, begin, end); });
  return {output, mean, rstd};
}

// One share of a table's gradient: weight * source[token] goes to a row.
struct Entry {
  int64_t row, token;
  double weight;
};

constexpr int64_t PIECE = 256;  // entries

// table[r] = sum of the entries of r; the rest of the table is 0.
Tensor sum_by_row(const Call& call, const std::vector<Entry>& entries, const void* source, MixDtype source_dtype,
                  const Tensor& like) {
  Tensor table = on_large_pages(new_empty(like, std::vector<int64_t>{like.size(0), like.size(1)}));
  std::vector<int64_t> starts(like.size(0) + 1, 0);
  for (const Entry& entry : entries) ++starts[entry.row + 1];
  for (size_t r = 1; r < starts.size(); ++r) starts[r] += starts[r - 1];
  std::vector<int64_t> tokens(entries.size()), next(starts.begin(), starts.end() - 1);
  std::vector<double> weights(entries.size());
  for (const Entry& entry : entries) {
    const int64_t place = next[entry.row]++;
    tokens[place] = entry.token;
    weights[place] = entry.weight;
  }
  std::vector<SumPiece> pieces;
  std::vector<SumSplit> splits;
  int64_t num_partials = 0;
  for (int64_t row = 0; row < like.size(0); ++row) {
    const int64_t begin = starts[row], end = starts[row + 1];
    if (begin == end) continue;
    if (end - begin <= PIECE) {
      pieces.push_back({row, begin, end, -1});
      continue;
    }
    const int64_t first = num_partials;
    for (int64_t at = begin; at < end; at += PIECE)
      pieces.push_back({row, at, std::min(end, at + PIECE), num_partials++});
    splits.push_back({row, first, num_partials});
  }
  const Tensor partials = new_empty(like, std::vector<int64_t>{num_partials, call.job.width}, call.compute);
  SumJob job{source,
             source_dtype,
             call.dtype,
             tokens.data(),
             weights.data(),
             pieces.data(),
             splits.data(),
             partials.mutable_data_ptr(),
             table.mutable_data_ptr(),
             call.job.width};
  const size_t row_bytes = call.job.width * like.element_size();
  parallel_for(0, like.size(0), call.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (starts[row] == starts[row + 1]) std::memset(static_cast<char*>(job.table) + row * row_bytes, 0, row_bytes);
    }
  });
  parallel_for(0, static_cast<int64_t>(pieces.size()), 8,
               [&](int64_t begin, int64_t end) { row_loops().sum_pieces(job, begin, end); });
  parallel_for(0, static_cast<int64_t>(splits.size()), 1,
               [&](int64_t begin, int64_t end) { row_loops().sum_splits(job, begin, end); });
  return table;
}

// All tokens of the output, one after the other.
template <typename T, typename Visit>
void for_tokens(const MixJob& job, Visit visit) {
  for (int64_t row = 0; row < job.num_tokens / std::max<int64_t>(1, job.length); ++row) {
    const Pair<T> pair = pair_of<T>(job, row);
    for (int64_t place = 0; place < job.length; ++place)
      visit(row * job.length + place, token_of(job, pair, row, place));
  }
}

// Gradients of LayerNorm's weight and bias, and grad_x [tokens, H] of the compute type.
template <typename T>
std::pair<Tensor, std::vector<T>> norm_backward(const Call& call, const Tensor& grad_output) {
  const MixJob& job = call.job;
  Tensor grad_x = on_large_pages(new_empty(grad_output, std::vector<int64_t>{job.num_tokens, job.width}, call.compute));
  // Shares of fixed size, added in order: the same result for any number of threads.
  const int64_t share = std::max<int64_t>(64, (job.num_tokens + 63) / 64),
                shares = (job.num_tokens + share - 1) / share;
  std::vector<T> sums(shares * 2 * job.width, T(0));
  parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      row_loops().norm_backward(job, call.dtype, grad_output.const_data_ptr(), grad_x.mutable_data_ptr(),
                                sums.data() + s * 2 * job.width, s * share, std::min(job.num_tokens, (s + 1) * share));
    }
  });
  std::vector<T> total(2 * job.width, T(0));
  for (int64_t s = 0; s < shares; ++s) {
    for (int64_t h = 0; h < 2 * job.width; ++h) total[h] += sums[s * 2 * job.width + h];
  }
  return {grad_x, total};
}

template <typename T>
Tensor norm_gradient(const T* values, const Optional& like, const Tensor& weight, bool needed) {
  if (!needed || !like.has_value()) return new_empty(weight, std::vector<int64_t>{0});
  Tensor gradient = new_empty(*like, std::vector<int64_t>{like->numel()});
  void* out = gradient.mutable_data_ptr();
  for (int64_t h = 0; h < like->numel(); ++h) {
    switch (like->scalar_type()) {
      case ScalarType::Float: static_cast<float*>(out)[h] = static_cast<float>(values[h]); break;
      case ScalarType::Double: static_cast<double*>(out)[h] = values[h]; break;
      case ScalarType::BFloat16:
        static_cast<uint16_t*>(out)[h] = bfloat16_of_float(static_cast<float>(values[h]));
        break;
      default: static_cast<uint16_t*>(out)[h] = half_of_float(static_cast<float>(values[h])); break;
    }
  }
  return gradient;
}

// Bits of `needs`.
enum Needs : int64_t { WEIGHT = 1, POSITION = 2, TOKEN_TYPE = 4, NORM_WEIGHT = 8, NORM_BIAS = 16 };

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Gradients table_gradients(const Call& call, const Tensor& grad_output, const Tensor& weight,
                          const Optional& position_weight, const Optional& token_type_weight,
                          const Optional& norm_weight, const Optional& norm_bias, int64_t needs) {
  const MixJob& job = call.job;
  const auto nothing = [&weight] { return new_empty(weight, std::vector<int64_t>{0}); };
  Gradients gradients{nothing(), nothing(), nothing(), nothing(), nothing()};
  Optional grad_x;
  const void* source = grad_output.const_data_ptr();
  MixDtype source_dtype = call.dtype;
  if (job.use_norm) {
    auto [of_x, sums] = norm_backward<T>(call, grad_output);
    grad_x = of_x;
    source = of_x.const_data_ptr();
    source_dtype = call.compute == ScalarType::Double ? MixDtype::F64 : MixDtype::F32;
    std::get<3>(gradients) = norm_gradient(sums.data(), norm_weight, weight, needs & NORM_WEIGHT);
    std::get<4>(gradients) = norm_gradient(sums.data() + job.width, norm_bias, weight, needs & NORM_BIAS);
  }
  std::vector<Entry> entries;
  const auto gather = [&](auto first, auto second) {
    entries.clear();
    for_tokens<T>(job, [&](int64_t index, const Token<T>& token) {
      if (token.first_weight != T(0)) entries.push_back({first(token), index, static_cast<double>(token.first_weight)});
      if (token.second_weight != T(0))
        entries.push_back({second(token), index, static_cast<double>(token.second_weight)});
    });
  };
  if (needs & WEIGHT) {
    gather([](const Token<T>& t) { return t.first_word; }, [](const Token<T>& t) { return t.second_word; });
    std::get<0>(gradients) = sum_by_row(call, entries, source, source_dtype, weight);
  }
  if (position_weight.has_value() && (needs & POSITION)) {
    entries.clear();
    for_tokens<T>(job, [&](int64_t index, const Token<T>& token) { entries.push_back({token.position, index, 1.0}); });
    std::get<1>(gradients) = sum_by_row(call, entries, source, source_dtype, *position_weight);
  }
  if (token_type_weight.has_value() && (needs & TOKEN_TYPE)) {
    gather([](const Token<T>& t) { return t.first_type; }, [](const Token<T>& t) { return t.second_type; });
    std::get<2>(gradients) = sum_by_row(call, entries, source, source_dtype, *token_type_weight);
  }
  return gradients;
}

Gradients mix_embeddings_backward(Tensor grad_output, Tensor input_ids, Tensor weight, Tensor partner, Tensor lam,
                                  Optional padding_mask, Optional position_weight, Optional token_type_ids,
                                  Optional token_type_weight, Optional position_ids, Optional norm_weight,
                                  Optional norm_bias, double norm_eps, bool use_norm, int64_t num_rows,
                                  bool include_clean, Tensor mean, Tensor rstd, int64_t needs, bool deterministic) {
  Call call(input_ids, weight, partner, lam, padding_mask, position_weight, token_type_ids, token_type_weight,
            position_ids, norm_weight, norm_bias, norm_eps, use_norm, num_rows, include_clean);
  MixJob& job = call.job;
  STD_TORCH_CHECK(grad_output.is_contiguous() && grad_output.numel() == job.num_tokens * job.width &&
                      grad_output.scalar_type() == weight.scalar_type(),
                  "grad_output must be contiguous, of the shape of the output and the dtype of weight");
  if (use_norm) {
    check_rows("mean", mean, job.num_tokens, call.compute);
    check_rows("rstd", rstd, job.num_tokens, call.compute);
  }
  job.mean = mean.mutable_data_ptr();
  job.rstd = rstd.mutable_data_ptr();
  const auto run = call.compute == ScalarType::Double ? table_gradients<double> : table_gradients<float>;
  return run(call, grad_output, weight, position_weight, token_type_weight, norm_weight, norm_bias, needs);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixkd_fast, CPU, m) {
  m.impl("mix_embeddings", TORCH_BOX(&mix_embeddings));
  m.impl("mix_embeddings_backward", TORCH_BOX(&mix_embeddings_backward));
}

}  // namespace mixkd

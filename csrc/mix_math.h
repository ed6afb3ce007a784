// Mixed embeddings of one token at a time: no torch, no loop over the width, CPU and CUDA alike. The definition is
// mixkd_fast/ops/mix_reference.py, which both are tested against:
//
//   x = (u W_i + v W_j) + (P + (u Y_i + v Y_j)),   u = lam keep_i, v = (1 - lam) keep_j,
//
// then LayerNorm. In this order lam = 1 gives W_i exactly where P = -Y_i, which encoder.py relies on.
//
// Legend: R rows of ids, B clean rows, M mixed rows, L positions, H width, V words, P positions known, T token types.
#pragma once

#include <cmath>
#include <cstdint>

#include "fast_math.h"

namespace mixkd {

// One call as plain pointers. Tables and output have one dtype, lam, mean and rstd the compute type: double for
// float64, float otherwise.
struct MixJob {
  const int64_t* input_ids;       // [R, L]
  const void* weight;             // [V, H]
  const int64_t* partner;         // [M]
  const void* lam;                // [M]
  const bool* padding_mask;       // [R, L] or null; true contributes 0
  const void* position_weight;    // [P, H] or null
  const int64_t* position_ids;    // [output rows, L], or null: 0..L-1
  const int64_t* token_type_ids;  // [R, L], or null with token_type_weight
  const void* token_type_weight;  // [T, H] or null
  const void* norm_weight;        // [H], or null: 1
  const void* norm_bias;          // [H], or null: 0
  void* output;                   // [output rows, L, H]
  void* mean;                     // [output rows * L] with use_norm
  void* rstd;
  int64_t num_rows, length, width, num_words, num_positions, num_types;
  int64_t num_clean;    // B: mixed row m has row m % B as its first
  int64_t num_leading;  // clean rows before the mixed ones in the output: 0 or B
  int64_t num_tokens;   // of the output
  double norm_eps;
  bool use_norm;
};

// The two rows of an output row. A clean row is its own partner at weight 0.
template <typename T>
struct Pair {
  int64_t first_row, second_row;
  T lam;
};

template <typename T>
MIXKD_INLINE Pair<T> pair_of(const MixJob& job, int64_t row) {
  if (row < job.num_leading) return {row, row, T(1)};
  const int64_t mixed = row - job.num_leading;
  return {mixed % job.num_clean, job.partner[mixed], static_cast<const T*>(job.lam)[mixed]};
}

MIXKD_INLINE bool is_in(int64_t index, int64_t size) { return index >= 0 && index < size; }

// What one token of the output is made of; a weight of 0 leaves that side's table rows unread.
template <typename T>
struct Token {
  int64_t first_word, second_word, first_type, second_type, position;
  T first_weight, second_weight;
  bool valid;  // every index is inside its table
};

template <typename T>
MIXKD_INLINE Token<T> token_of(const MixJob& job, const Pair<T>& pair, int64_t row, int64_t place) {
  Token<T> token{0, 0, 0, 0, place, T(0), T(0), false};
  if (job.position_ids != nullptr) token.position = job.position_ids[row * job.length + place];
  if (!is_in(pair.second_row, job.num_rows)) return token;
  const int64_t first = pair.first_row * job.length + place, second = pair.second_row * job.length + place;
  token.first_word = job.input_ids[first];
  token.second_word = job.input_ids[second];
  if (job.token_type_weight != nullptr) {
    token.first_type = job.token_type_ids[first];
    token.second_type = job.token_type_ids[second];
  }
  token.first_weight = job.padding_mask != nullptr && job.padding_mask[first] ? T(0) : pair.lam;
  token.second_weight = job.padding_mask != nullptr && job.padding_mask[second] ? T(0) : T(1) - pair.lam;
  token.valid = is_in(token.first_word, job.num_words) && is_in(token.second_word, job.num_words);
  if (job.token_type_weight != nullptr) {
    token.valid = token.valid && is_in(token.first_type, job.num_types) && is_in(token.second_type, job.num_types);
  }
  if (job.position_weight != nullptr) token.valid = token.valid && is_in(token.position, job.num_positions);
  return token;
}

// LayerNorm from the sum of squared deviations of a row.
template <typename T>
MIXKD_INLINE T rstd_of(T squared_deviations, int64_t width, double norm_eps) {
  return T(1) / std::sqrt(squared_deviations / T(width) + T(norm_eps));
}

// d loss / dx of LayerNorm: `scaled` is grad_output times norm_weight, the means of `scaled` and of scaled * normalized
// are over the row.
template <typename T>
MIXKD_INLINE T norm_gradient(T scaled, T normalized, T mean_scaled, T mean_product, T rstd) {
  return rstd * (scaled - mean_scaled - normalized * mean_product);
}

}  // namespace mixkd

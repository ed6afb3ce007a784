// What the row loops of mix_embeddings see, and the loops themselves, one set per instruction set. No torch.
#pragma once

#include <cstdint>

#include "../mix_math.h"

namespace mixkd {

enum class MixDtype : int { F32, BF16, F16, F64 };

// A share of one table row's gradient: entries begin..end. A row of few entries is one piece and is written at once;
// a row of many is cut into pieces of fixed length, whose sums are added in order afterwards. Neither cut nor order
// depends on the number of threads.
struct SumPiece {
  int64_t table_row, begin, end;
  int64_t partial;  // where the sum goes, or -1: it is the whole row
};
struct SumSplit {
  int64_t table_row, begin, end;  // partials
};

// table[r] = sum over the entries e of r of weights[e] * source[tokens[e]], in the compute type.
struct SumJob {
  const void* source;  // [tokens, H]
  MixDtype source_dtype, table_dtype;
  const int64_t* tokens;
  const double* weights;
  const SumPiece* pieces;
  const SumSplit* splits;
  void* partials;  // [partials, H] of the compute type
  void* table;     // rows without entries are left alone
  int64_t width;
};

struct MixRows {
  // Tokens begin..end of the output.
  void (*forward)(const MixJob& job, MixDtype dtype, int64_t begin, int64_t end);
  // For tokens begin..end: grad_x [tokens, H] of the compute type, and norm_sums [2, H] += gradient of norm_weight,
  // norm_bias.
  void (*norm_backward)(const MixJob& job, MixDtype dtype, const void* grad_output, void* grad_x, void* norm_sums,
                        int64_t begin, int64_t end);
  void (*sum_pieces)(const SumJob& job, int64_t begin, int64_t end);
  void (*sum_splits)(const SumJob& job, int64_t begin, int64_t end);
};

MixRows mix_rows_baseline();
MixRows mix_rows_avx2();
MixRows mix_rows_avx512();

}  // namespace mixkd

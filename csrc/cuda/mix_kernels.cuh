// The kernels of mix_embeddings: a warp per token, columns in pieces of up to 16 bytes. Sums by table row take entries
// that are sorted by row: every sum has a fixed order, and nothing is added atomically.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../mix_math.h"

namespace mixkd::cuda {

constexpr int MIX_WARP = 32, WARPS_PER_BLOCK = 4, ENTRIES = 64;

enum class Element : int { F32, BF16, F16 };

// LayerNorm's weight or bias [H] in its own dtype, or null.
struct NormValues {
  const void* values;
  Element element;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <typename E>
__device__ __forceinline__ E from_float(float value) {
  if constexpr (sizeof(E) == 4) {
    return value;
  } else if constexpr (std::is_same_v<E, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

// Neighbouring columns, read and written at once.
template <typename E, int N>
struct alignas(sizeof(E) * N) Piece {
  E values[N];
};

template <typename E, int N>
__device__ __forceinline__ void load_piece(const void* table, int64_t row, int64_t width, int64_t column,
                                           float (&out)[N]) {
  const auto piece = *reinterpret_cast<const Piece<E, N>*>(static_cast<const E*>(table) + row * width + column);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_float(piece.values[i]);
}

template <typename E, int N>
__device__ __forceinline__ void store_piece(void* table, int64_t row, int64_t width, int64_t column,
                                            const float (&values)[N]) {
  Piece<E, N> piece;
#pragma unroll
  for (int i = 0; i < N; ++i) piece.values[i] = from_float<E>(values[i]);
  *reinterpret_cast<Piece<E, N>*>(static_cast<E*>(table) + row * width + column) = piece;
}

__device__ __forceinline__ float norm_value(const NormValues& norm, int64_t column, float otherwise) {
  if (norm.values == nullptr) return otherwise;
  switch (norm.element) {
    case Element::F32: return static_cast<const float*>(norm.values)[column];
    case Element::BF16: return __bfloat162float(static_cast<const __nv_bfloat16*>(norm.values)[column]);
    default: return __half2float(static_cast<const __half*>(norm.values)[column]);
  }
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = MIX_WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// first_share * table[first] + second_share * table[second]; a side of weight 0 is not read.
template <typename E, int N>
__device__ __forceinline__ void mix_pieces(const void* table, int64_t first, int64_t second, float first_share,
                                           float second_share, int64_t width, int64_t column, float (&out)[N]) {
  float values[N];
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = 0.0f;
  if (first_share != 0.0f) {
    load_piece<E>(table, first, width, column, values);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = first_share * values[i];
  }
  if (second_share != 0.0f) {
    load_piece<E>(table, second, width, column, values);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] += second_share * values[i];
  }
}

// Columns [column, column + N) of x, before LayerNorm.
template <typename E, int N>
__device__ __forceinline__ void mixed_piece(const MixJob& job, const Token<float>& token, int64_t column,
                                            float (&x)[N]) {
  const float u = token.first_weight, v = token.second_weight;
  mix_pieces<E>(job.weight, token.first_word, token.second_word, u, v, job.width, column, x);
  if (job.token_type_weight == nullptr && job.position_weight == nullptr) return;
  float added[N] = {};
  if (job.token_type_weight != nullptr) {
    mix_pieces<E>(job.token_type_weight, token.first_type, token.second_type, u, v, job.width, column, added);
  }
  if (job.position_weight != nullptr) {
    float place[N];
    load_piece<E>(job.position_weight, token.position, job.width, column, place);
#pragma unroll
    for (int i = 0; i < N; ++i) added[i] = place[i] + added[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] += added[i];
}

__device__ __forceinline__ Token<float> token_at(const MixJob& job, int64_t index) {
  const int64_t row = index / job.length;
  return token_of(job, pair_of<float>(job, row), row, index % job.length);
}

__device__ __forceinline__ int64_t warp_index() {
  return static_cast<int64_t>(blockIdx.x) * WARPS_PER_BLOCK + threadIdx.x / MIX_WARP;
}

// Tokens of the output. With LayerNorm the tables' rows are read three times; the second and third reading hit the L1
// cache.
template <typename E, int N>
__global__ void __launch_bounds__(MIX_WARP* WARPS_PER_BLOCK)
    mix_forward_kernel(const __grid_constant__ MixJob job, const NormValues gain, const NormValues bias) {
  const int lane = threadIdx.x % MIX_WARP;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * WARPS_PER_BLOCK;
  for (int64_t index = warp_index(); index < job.num_tokens; index += stride) {
    const Token<float> token = token_at(job, index);
    float mean = 0.0f, rstd = 1.0f;
    if (job.use_norm && token.valid) {
      float sum = 0.0f, squares = 0.0f, x[N];
      for (int64_t column = lane * N; column < job.width; column += MIX_WARP * N) {
        mixed_piece<E>(job, token, column, x);
#pragma unroll
        for (int i = 0; i < N; ++i) sum += x[i];
      }
      mean = warp_sum(sum) / static_cast<float>(job.width);
      for (int64_t column = lane * N; column < job.width; column += MIX_WARP * N) {
        mixed_piece<E>(job, token, column, x);
#pragma unroll
        for (int i = 0; i < N; ++i) squares += (x[i] - mean) * (x[i] - mean);
      }
      rstd = rstd_of(warp_sum(squares), job.width, job.norm_eps);
    }
    if (!token.valid) mean = rstd = __int_as_float(0x7fc00000);
    if (job.use_norm && lane == 0) {
      static_cast<float*>(job.mean)[index] = mean;
      static_cast<float*>(job.rstd)[index] = rstd;
    }
    for (int64_t column = lane * N; column < job.width; column += MIX_WARP * N) {
      float x[N];
      if (token.valid) {
        mixed_piece<E>(job, token, column, x);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = mean;
      }
      if (job.use_norm) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          x[i] = (x[i] - mean) * rstd * norm_value(gain, column + i, 1.0f) + norm_value(bias, column + i, 0.0f);
        }
      }
      store_piece<E>(job.output, index, job.width, column, x);
    }
  }
}

// grad_x [tokens, H] of tokens_each tokens per warp, and the warp's part of norm_sums [warps, 2, H]: gradients of
// LayerNorm's weight and bias. A lane owns its columns.
template <typename E, int N>
__global__ void __launch_bounds__(MIX_WARP* WARPS_PER_BLOCK)
    mix_norm_backward_kernel(const __grid_constant__ MixJob job, const NormValues gain, const void* grad_output,
                             float* grad_x, float* norm_sums, int64_t num_warps, int64_t tokens_each) {
  const int lane = threadIdx.x % MIX_WARP;
  const int64_t warp = warp_index();
  if (warp >= num_warps) return;
  float* const sums = norm_sums + warp * 2 * job.width;
  for (int64_t column = lane * N; column < job.width; column += MIX_WARP * N) {
    const float nothing[N] = {};
    store_piece<float>(sums, 0, job.width, column, nothing);
    store_piece<float>(sums, 1, job.width, column, nothing);
  }
  const int64_t end = (warp + 1) * tokens_each < job.num_tokens ? (warp + 1) * tokens_each : job.num_tokens;
  for (int64_t index = warp * tokens_each; index < end; ++index) {
    const Token<float> token = token_at(job, index);
    const float mean = static_cast<const float*>(job.mean)[index], rstd = static_cast<const float*>(job.rstd)[index];
    float of_mean = 0.0f, of_product = 0.0f;
    // An invalid token has NaN for mean and rstd, and so for its gradient; its tables are not read.
    for (int64_t column = lane * N; column < job.width; column += MIX_WARP * N) {
      float x[N] = {}, incoming[N], of_gain[N], of_bias[N];
      if (token.valid) mixed_piece<E>(job, token, column, x);
      load_piece<E>(grad_output, index, job.width, column, incoming);
      load_piece<float>(sums, 0, job.width, column, of_gain);
      load_piece<float>(sums, 1, job.width, column, of_bias);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float normalized = (x[i] - mean) * rstd, scaled = incoming[i] * norm_value(gain, column + i, 1.0f);
        of_gain[i] += incoming[i] * normalized;
        of_bias[i] += incoming[i];
        of_mean += scaled;
        of_product += scaled * normalized;
      }
      store_piece<float>(sums, 0, job.width, column, of_gain);
      store_piece<float>(sums, 1, job.width, column, of_bias);
    }
    of_mean = warp_sum(of_mean) / static_cast<float>(job.width);
    of_product = warp_sum(of_product) / static_cast<float>(job.width);
    for (int64_t column = lane * N; column < job.width; column += MIX_WARP * N) {
      float x[N] = {}, incoming[N];
      if (token.valid) mixed_piece<E>(job, token, column, x);
      load_piece<E>(grad_output, index, job.width, column, incoming);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float normalized = (x[i] - mean) * rstd, scaled = incoming[i] * norm_value(gain, column + i, 1.0f);
        x[i] = norm_gradient(scaled, normalized, of_mean, of_product, rstd);
      }
      store_piece<float>(grad_x, index, job.width, column, x);
    }
  }
}

// Entries e of a table's gradient: shares[e] * source[tokens[e]] goes to rows[e]; rows ascend.
struct Sums {
  const void* source;  // [tokens, H]
  const int64_t* rows;
  const int64_t* tokens;
  const float* shares;
  void* table;      // rows without entries are left alone
  float* partials;  // [chunks, 2, H]
  int64_t num_entries, num_chunks, width;
};

// A warp takes a chunk of ENTRIES. A run of equal rows that lies whole in it is written at once; the part of one that
// began before goes to partials[chunk, 0], of one that begins here and goes on to partials[chunk, 1].
template <typename S, typename E, int N>
__global__ void __launch_bounds__(MIX_WARP* WARPS_PER_BLOCK) sum_runs_kernel(const __grid_constant__ Sums job) {
  const int64_t chunk = warp_index();
  if (chunk >= job.num_chunks) return;
  const int64_t begin = chunk * ENTRIES;
  const int64_t end = begin + ENTRIES < job.num_entries ? begin + ENTRIES : job.num_entries;
  const int64_t before = begin > 0 ? job.rows[begin - 1] : -1;
  for (int64_t column = threadIdx.x % MIX_WARP * N; column < job.width; column += MIX_WARP * N) {
    float total[N] = {};
    for (int64_t entry = begin; entry < end; ++entry) {
      const int64_t row = job.rows[entry], following = entry + 1 < job.num_entries ? job.rows[entry + 1] : -1;
      const float share = job.shares[entry];
      if (share != 0.0f) {
        float values[N];
        load_piece<S>(job.source, job.tokens[entry], job.width, column, values);
#pragma unroll
        for (int i = 0; i < N; ++i) total[i] += share * values[i];
      }
      if (entry + 1 < end && following == row) continue;
      if (before == row) {
        store_piece<float>(job.partials, chunk * 2, job.width, column, total);
      } else if (following == row) {
        store_piece<float>(job.partials, chunk * 2 + 1, job.width, column, total);
      } else {
        store_piece<E>(job.table, row, job.width, column, total);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) total[i] = 0.0f;
    }
  }
}

// Adds up the run that begins in a chunk and goes on, in the order of the chunks.
template <typename E, int N>
__global__ void __launch_bounds__(MIX_WARP* WARPS_PER_BLOCK) join_runs_kernel(const __grid_constant__ Sums job) {
  const int64_t chunk = warp_index();
  if (chunk >= job.num_chunks) return;
  const int64_t begin = chunk * ENTRIES, after = begin + ENTRIES;
  if (after >= job.num_entries) return;
  const int64_t row = job.rows[after];
  // It must be this chunk's last row, and not a run that began before it.
  if (job.rows[after - 1] != row || (begin > 0 && job.rows[begin - 1] == row)) return;
  for (int64_t column = threadIdx.x % MIX_WARP * N; column < job.width; column += MIX_WARP * N) {
    float total[N], more[N];
    load_piece<float>(job.partials, chunk * 2 + 1, job.width, column, total);
    for (int64_t next = chunk + 1; next * ENTRIES < job.num_entries && job.rows[next * ENTRIES] == row; ++next) {
      load_piece<float>(job.partials, next * 2, job.width, column, more);
#pragma unroll
      for (int i = 0; i < N; ++i) total[i] += more[i];
    }
    store_piece<E>(job.table, row, job.width, column, total);
  }
}

}  // namespace mixkd::cuda

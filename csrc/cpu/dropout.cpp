// mixkd_fast::dropout on the CPU: Bernoulli dropout whose mask is a function of (seed, position).
//
// Nothing is kept for the backward, which applies the same mask to the gradient. torch draws each decision from one
// serial generator, which takes longer than the matrix products around it on processors with bf16 arithmetic.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "../checks.h"
#include "../fast_math.h"

namespace mixkd {
namespace {

constexpr int64_t BLOCK = 1 << 14;

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__)
#define MIXKD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MIXKD_CLONES
#endif

// The output function of splitmix64 (Steele, Lea and Flood 2014): one key for each block of positions.
uint64_t key_of_block(uint64_t seed, uint64_t block) {
  uint64_t x = seed + (block + 1) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// A random 32-bit number for each position in a block: two rounds of multiply and shift over position and key.
MIXKD_INLINE uint32_t number_at(uint32_t position, uint32_t low_key, uint32_t high_key) {
  uint32_t x = position * 0x9e3779b9u + low_key;
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15) ^ high_key) * 0x735a2d97u;
  return x ^ (x >> 15);
}

MIXKD_CLONES void drop_block(const float* from, float* to, int64_t count, uint64_t key, uint32_t limit, float scale) {
  const uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float kept = from[i] * scale;
    to[i] = number_at(static_cast<uint32_t>(i), low, high) >= limit ? kept : 0.0f;
  }
}

MIXKD_CLONES void drop_block(const uint16_t* from, uint16_t* to, int64_t count, uint64_t key, uint32_t limit,
                             float scale) {
  const uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t kept = bfloat16_of_float(float_of_bfloat16(from[i]) * scale);
    to[i] = number_at(static_cast<uint32_t>(i), low, high) >= limit ? kept : uint16_t(0);
  }
}

template <typename T>
void drop(const T* from, T* to, int64_t count, uint64_t seed, double p) {
  const uint32_t limit = static_cast<uint32_t>(std::min(std::llround(p * 4294967296.0), 4294967295ll));
  const float scale = static_cast<float>(1.0 / (1.0 - p));
  torch::stable::parallel_for(0, (count + BLOCK - 1) / BLOCK, 2, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * BLOCK;
      drop_block(from + first, to + first, std::min(BLOCK, count - first), key_of_block(seed, block), limit, scale);
    }
  });
}

Tensor dropout(Tensor input, Tensor seed, double p) {
  STD_TORCH_CHECK(p >= 0 && p < 1, "p must be in [0, 1)");
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed must be one int64");
  const Tensor plain = torch::stable::contiguous(input);
  Tensor output = torch::stable::empty_like(plain);
  const uint64_t key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const void* const from = plain.const_data_ptr();
  void* const to = output.mutable_data_ptr();
  switch (input.scalar_type()) {
    case ScalarType::Float:
      drop(static_cast<const float*>(from), static_cast<float*>(to), plain.numel(), key, p);
      break;
    case ScalarType::BFloat16:
      drop(static_cast<const uint16_t*>(from), static_cast<uint16_t*>(to), plain.numel(), key, p);
      break;
    default: STD_TORCH_CHECK(false, "input must be float32 or bfloat16");
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixkd_fast, CPU, m) { m.impl("dropout", TORCH_BOX(&dropout)); }

}  // namespace mixkd

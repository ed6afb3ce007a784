// The row loops of mix_embeddings for processors with AVX2 and FMA.
#include "mix_includes.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace mixkd {
namespace avx2 {
#include "mix_rows.h"
}  // namespace avx2

MixRows mix_rows_avx2() { return avx2::mix_rows(); }
}  // namespace mixkd
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// The row loops of mix_embeddings for processors with AVX-512 (F, BW, DQ, VL).
#include "mix_includes.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace mixkd {
namespace avx512 {
#include "mix_rows.h"
}  // namespace avx512

MixRows mix_rows_avx512() { return avx512::mix_rows(); }
}  // namespace mixkd
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// The loops of relation_kl for processors with AVX-512 (F, BW, DQ, VL).
#include "relation_includes.h"

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
constexpr int VECTOR_BYTES = 64;
#include "relation_rows.h"
}  // namespace avx512

RelationLoops relation_loops_avx512() { return avx512::relation_loops(); }
}  // namespace mixkd
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

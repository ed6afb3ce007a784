// The loops of relation_kl for processors with AVX2 and FMA.
#include "relation_includes.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace mixkd {
namespace avx2 {
constexpr int VECTOR_BYTES = 32;
#include "relation_rows.h"
}  // namespace avx2

RelationLoops relation_loops_avx2() { return avx2::relation_loops(); }
}  // namespace mixkd
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

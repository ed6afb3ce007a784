// The loops of relation_kl for processors with AVX-512 (F, BW, DQ, VL).
#include "relation_includes.h"
#include "target_region.h"

#if defined(__x86_64__)
MIXKD_BEGIN_AVX512
namespace mixkd {
namespace avx512 {
constexpr int VECTOR_BYTES = 64;
#include "relation_rows.h"
}  // namespace avx512

RelationLoops relation_loops_avx512() { return avx512::relation_loops(); }
}  // namespace mixkd
MIXKD_END_REGION
#endif

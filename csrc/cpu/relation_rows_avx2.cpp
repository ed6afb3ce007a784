// The loops of relation_kl for processors with AVX2 and FMA.
#include "relation_includes.h"
#include "target_region.h"

#if defined(__x86_64__)
MIXKD_BEGIN_AVX2
namespace mixkd {
namespace avx2 {
constexpr int VECTOR_BYTES = 32;
#include "relation_rows.h"
}  // namespace avx2

RelationLoops relation_loops_avx2() { return avx2::relation_loops(); }
}  // namespace mixkd
MIXKD_END_REGION
#endif

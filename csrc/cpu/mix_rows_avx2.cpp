// The row loops of mix_embeddings for processors with AVX2 and FMA.
#include "mix_includes.h"
#include "target_region.h"

#if defined(__x86_64__)
MIXKD_BEGIN_AVX2
namespace mixkd {
namespace avx2 {
#include "mix_rows.h"
}  // namespace avx2

MixRows mix_rows_avx2() { return avx2::mix_rows(); }
}  // namespace mixkd
MIXKD_END_REGION
#endif

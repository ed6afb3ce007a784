// The row loops of mix_embeddings for processors with AVX-512 (F, BW, DQ, VL).
#include "mix_includes.h"
#include "target_region.h"

#if defined(__x86_64__)
MIXKD_BEGIN_AVX512
namespace mixkd {
namespace avx512 {
#include "mix_rows.h"
}  // namespace avx512

MixRows mix_rows_avx512() { return avx512::mix_rows(); }
}  // namespace mixkd
MIXKD_END_REGION
#endif

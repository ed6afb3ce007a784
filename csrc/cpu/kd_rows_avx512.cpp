// The row loops of kd_loss for processors with AVX-512 (F, BW, DQ, VL).
#include "kd_includes.h"
#include "target_region.h"

#if defined(__x86_64__)
MIXKD_BEGIN_AVX512
namespace mixkd {
namespace avx512 {
// clang-format off: each needs the one before it.
#include "kd_blocks.h"
#include "kd_rows.h"
#include "kd_wide.h"
#include "kd_medium.h"
#include "kd_narrow.h"
#include "kd_top.h"
#include "kd_dispatch.h"
// clang-format on
}  // namespace avx512

void kd_rows_avx512(const KdJob& job, bool compute_double, int64_t begin, int64_t end) {
  avx512::kd_rows(job, compute_double, begin, end);
}
}  // namespace mixkd
MIXKD_END_REGION
#endif

// The row loops of kd_loss for processors with AVX2, FMA.
#include "kd_includes.h"
#include "target_region.h"

#if defined(__x86_64__)
MIXKD_BEGIN_AVX2
namespace mixkd {
namespace avx2 {
// clang-format off: each needs the one before it.
#include "kd_blocks.h"
#include "kd_rows.h"
#include "kd_wide.h"
#include "kd_medium.h"
#include "kd_narrow.h"
#include "kd_top.h"
#include "kd_dispatch.h"
// clang-format on
}  // namespace avx2

void kd_rows_avx2(const KdJob& job, bool compute_double, int64_t begin, int64_t end) {
  avx2::kd_rows(job, compute_double, begin, end);
}
}  // namespace mixkd
MIXKD_END_REGION
#endif

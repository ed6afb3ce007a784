// The row loops of kd_loss for every processor.
#include "kd_includes.h"

namespace mixkd {
namespace baseline {
// clang-format off: each needs the one before it.
#include "kd_blocks.h"
#include "kd_rows.h"
#include "kd_wide.h"
#include "kd_medium.h"
#include "kd_narrow.h"
#include "kd_top.h"
#include "kd_dispatch.h"
// clang-format on
}  // namespace baseline

void kd_rows_baseline(const KdJob& job, bool compute_double, int64_t begin, int64_t end) {
  baseline::kd_rows(job, compute_double, begin, end);
}
}  // namespace mixkd

// The row loops of mix_embeddings for every processor.
#include "mix_includes.h"

namespace mixkd {
namespace baseline {
#include "mix_rows.h"
}  // namespace baseline

MixRows mix_rows_baseline() { return baseline::mix_rows(); }
}  // namespace mixkd

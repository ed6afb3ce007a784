// The loops of relation_kl for every processor.
#include "relation_includes.h"

namespace mixkd {
namespace baseline {
constexpr int VECTOR_BYTES = 16;
#include "relation_rows.h"
}  // namespace baseline

RelationLoops relation_loops_baseline() { return baseline::relation_loops(); }
}  // namespace mixkd

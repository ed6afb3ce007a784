// Standard headers of the row loops of mix_embeddings: included before any target region, so that their inline
// functions, which the linker shares between files, use the instructions that every machine has.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include "mix_job.h"

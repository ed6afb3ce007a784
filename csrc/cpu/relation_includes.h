// Standard headers of the loops of relation_kl: included before any target region, so that their inline
// functions, which the linker shares between files, use the instructions that every machine has.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>

#include "../fast_math.h"
#include "relation_job.h"

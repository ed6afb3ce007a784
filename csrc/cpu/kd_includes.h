// Standard headers of the row loops: included before any target region, so that their inline functions, which
// the linker shares between files, use the instructions that every machine has.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "kd_job.h"

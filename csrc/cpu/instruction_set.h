// Which set of row loops this processor runs. ATEN_CPU_CAPABILITY (default, avx2, avx512) lowers it, as it does for
// torch.
#pragma once

#include <cstdlib>
#include <cstring>

namespace mixkd {

enum class InstructionSet { BASELINE, AVX2, AVX512 };

inline InstructionSet instruction_set() {
#if defined(__x86_64__)
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const auto wants = [wish](const char* name) { return wish != nullptr && std::strcmp(wish, name) == 0; };
  __builtin_cpu_init();
  if (wants("default") || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
    return InstructionSet::BASELINE;
  if (wants("avx2") || !__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return InstructionSet::AVX2;
  }
  return InstructionSet::AVX512;
#else
  return InstructionSet::BASELINE;
#endif
}

}  // namespace mixkd

// MIXKD_BEGIN_AVX2, MIXKD_BEGIN_AVX512, MIXKD_BEGIN_AMX ... MIXKD_END_REGION: the functions defined between them use
// instructions that not every x86 processor has. Headers whose inline functions the linker shares between files are
// included before.
#pragma once

#define MIXKD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MIXKD_BEGIN_REGION(clang_features, gcc_features) \
  MIXKD_PRAGMA(clang attribute push(__attribute__((target(clang_features))), apply_to = function))
#define MIXKD_END_REGION MIXKD_PRAGMA(clang attribute pop)
#else
#define MIXKD_BEGIN_REGION(clang_features, gcc_features) \
  MIXKD_PRAGMA(GCC push_options) MIXKD_PRAGMA(GCC target(gcc_features))
#define MIXKD_END_REGION MIXKD_PRAGMA(GCC pop_options)
#endif

#define MIXKD_BEGIN_AVX2 MIXKD_BEGIN_REGION("avx2,fma", "avx2,fma")
#define MIXKD_BEGIN_AVX512                                          \
  MIXKD_BEGIN_REGION("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl", \
                     "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define MIXKD_BEGIN_AMX                                                                 \
  MIXKD_BEGIN_REGION("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16", \
                     "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")

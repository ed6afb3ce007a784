// The blocks of bf16_product_ for x86: both factors are laid out in tiles of 16 x 32, which AMX or AVX-512 multiplies.
//
// A pair is two neighbours in depth, the unit of both instruction sets. A tile of a has 16 rows of 16 pairs; a tile of
// b 16 rows of pairs, each of 16 columns. What lies the other way round in memory is transposed pair by pair.
#include "bf16_product.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <initializer_list>
#include <new>

#include "instruction_set.h"
#include "target_region.h"

#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11))
#include <cpuid.h>
#include <immintrin.h>
#include <strings.h>
#include <sys/syscall.h>
#include <unistd.h>

MIXKD_BEGIN_AMX

namespace mixkd {
namespace {

constexpr int64_t TILE = 16, TILE_DEPTH = 32, TILE_SIZE = TILE * TILE_DEPTH;
constexpr int64_t MOST_DEPTH = 512;  // of what is laid out at a time: three quarters of a megabyte with the sums
constexpr int64_t SUMS_ROW = MOST_OF_BLOCK + TILE;  // rows that do not all fall into the same few sets of a cache

struct Scratch {
  alignas(64) uint16_t a[MOST_OF_BLOCK * MOST_DEPTH];
  alignas(64) uint16_t b[MOST_OF_BLOCK * MOST_DEPTH];
  alignas(64) float sums[MOST_OF_BLOCK * SUMS_ROW];
};

// 16 x 16 pairs.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Lane l of r[i + j] now holds column 4 l + j of the rows i to i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}

// A tile whose depth lies in memory as it comes: `lines` lines of `depth` elements, at most 16 and 32.
inline void load_lines(const uint16_t* data, int64_t stride, int64_t lines, int64_t depth, __m512i (&r)[16]) {
  const __mmask32 mask = depth >= TILE_DEPTH ? ~__mmask32(0) : (__mmask32(1) << depth) - 1;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    r[i] = i < lines ? _mm512_maskz_loadu_epi16(mask, data + i * stride) : _mm512_setzero_si512();
  }
}

// A tile whose lines lie in memory one beside the other: pairs are put together from two rows.
inline void load_pairs(const uint16_t* data, int64_t stride, int64_t lines, int64_t depth, __m512i (&r)[16]) {
  const __mmask16 mask = lines >= TILE ? ~__mmask16(0) : static_cast<__mmask16>((1u << lines) - 1);
  const auto row = [&](int64_t k) {
    return k < depth ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, data + k * stride))
                     : _mm512_setzero_si512();
  };
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_or_si512(row(2 * i), _mm512_slli_epi32(row(2 * i + 1), 16));
}

// Lays out `lines` rows of a (or columns of b) over `depth`: the tiles of a line next to each other, zeros where there
// is nothing. stride: from line to line; depth_stride: along the depth; one of them is 1. pairs_first: as b wants it.
void lay_out(const uint16_t* data, int64_t stride, int64_t depth_stride, int64_t lines, int64_t depth, bool pairs_first,
             uint16_t* to) {
  const int64_t tiles_of_line = (depth + TILE_DEPTH - 1) / TILE_DEPTH;
  const auto store = [&](__m512i(&r)[16], int64_t line, int64_t k) {
    uint16_t* const tile = to + (line / TILE * tiles_of_line + k / TILE_DEPTH) * TILE_SIZE;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * TILE_DEPTH, r[i]);
  };
  __m512i r[16];
  // Memory is read in its order.
  if (depth_stride == 1) {
    for (int64_t line = 0; line < lines; line += TILE) {
      for (int64_t k = 0; k < depth; k += TILE_DEPTH) {
        load_lines(data + line * stride + k, stride, lines - line, depth - k, r);
        if (pairs_first) transpose(r);
        store(r, line, k);
      }
    }
    return;
  }
  for (int64_t k = 0; k < depth; k += TILE_DEPTH) {
    for (int64_t line = 0; line < lines; line += TILE) {
      load_pairs(data + k * depth_stride + line, depth_stride, lines - line, depth - k, r);
      if (!pairs_first) transpose(r);
      store(r, line, k);
    }
  }
}

// sums [32, 32] (or what there is of it) += the products of `count` tiles; a and b: one line of tiles or two.
struct TilePair {
  const uint16_t* a[2];
  const uint16_t* b[2];
  float* sums;
  int64_t count;
  bool two_a, two_b, add;
};

// The intrinsics that load from memory do not tell the compiler so.
inline void finish_writes() { asm volatile("" ::: "memory"); }

void multiply_by_amx(const TilePair& p) {
  finish_writes();
  constexpr int64_t STRIDE = SUMS_ROW * sizeof(float);
  float* const lower = p.sums + TILE * SUMS_ROW;
  if (p.add) {
    _tile_loadd(0, p.sums, STRIDE);
    if (p.two_b) _tile_loadd(1, p.sums + TILE, STRIDE);
    if (p.two_a) _tile_loadd(2, lower, STRIDE);
    if (p.two_a && p.two_b) _tile_loadd(3, lower + TILE, STRIDE);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < p.count; ++k) {
    const int64_t at = k * TILE_SIZE;
    _tile_loadd(4, p.a[0] + at, 64);
    _tile_loadd(6, p.b[0] + at, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (p.two_b) {
      _tile_loadd(7, p.b[1] + at, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (p.two_a) {
      _tile_loadd(5, p.a[1] + at, 64);
      _tile_dpbf16ps(2, 5, 6);
      if (p.two_b) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, p.sums, STRIDE);
  if (p.two_b) _tile_stored(1, p.sums + TILE, STRIDE);
  if (p.two_a) _tile_stored(2, lower, STRIDE);
  if (p.two_a && p.two_b) _tile_stored(3, lower + TILE, STRIDE);
}

void multiply_by_avx512(const TilePair& p) {
  constexpr int ROWS = 8;
  const uint16_t* const second_b = p.two_b ? p.b[1] : p.b[0];
  for (int64_t row = 0; row < (p.two_a ? 2 : 1) * TILE; row += ROWS) {
    const uint16_t* const a = p.a[row / TILE] + row % TILE * TILE_DEPTH;
    float* const out = p.sums + row * SUMS_ROW;
    __m512 sums[ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      sums[r][0] = p.add ? _mm512_load_ps(out + r * SUMS_ROW) : _mm512_setzero_ps();
      sums[r][1] = p.add && p.two_b ? _mm512_load_ps(out + r * SUMS_ROW + TILE) : _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < p.count * TILE_SIZE; k += TILE_SIZE) {
      for (int64_t pair = 0; pair < TILE_SIZE; pair += TILE_DEPTH) {
        const __m512bh left = (__m512bh)_mm512_load_si512(p.b[0] + k + pair);
        const __m512bh right = (__m512bh)_mm512_load_si512(second_b + k + pair);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          int32_t value;
          __builtin_memcpy(&value, a + k + r * TILE_DEPTH + pair / TILE, sizeof(value));
          const __m512bh factor = (__m512bh)_mm512_set1_epi32(value);
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], factor, left);
          sums[r][1] = _mm512_dpbf16_ps(sums[r][1], factor, right);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      _mm512_store_ps(out + r * SUMS_ROW, sums[r][0]);
      if (p.two_b) _mm512_store_ps(out + r * SUMS_ROW + TILE, sums[r][1]);
    }
  }
}

void write(const Bf16Product& p, const float* sums, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r, sums += SUMS_ROW) {
    const int64_t at = (row + r) * p.out_row + column;
    if (p.out_is_bf16) {
      uint16_t* const to = static_cast<uint16_t*>(p.out) + at;
      const __m512 scale = _mm512_set1_ps(p.scale);
      for (int64_t c = 0; c < columns; c += TILE) {
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(scale, _mm512_load_ps(sums + c)));
        const int64_t left = columns - c;
        _mm256_mask_storeu_epi16(to + c, static_cast<__mmask16>(left >= TILE ? 0xffff : (1u << left) - 1), rounded);
      }
    } else if (p.add) {
      float* const to = static_cast<float*>(p.out) + at;
      for (int64_t c = 0; c < columns; ++c) to[c] += p.scale * sums[c];
    } else {
      float* const to = static_cast<float*>(p.out) + at;
      for (int64_t c = 0; c < columns; ++c) to[c] = p.scale * sums[c];
    }
  }
}

void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } configuration;
  static_assert(sizeof(configuration) == 64, "what the instruction reads");
  asm volatile("" ::"r"(&configuration) : "memory");
  _tile_loadconfig(&configuration);
}

// The sums of one block over `depth` of what is laid out.
void multiply_block(Scratch& scratch, Bf16Unit unit, int64_t rows, int64_t columns, int64_t depth, bool add) {
  const int64_t count = (depth + TILE_DEPTH - 1) / TILE_DEPTH, line = count * TILE_SIZE;
  for (int64_t column = 0; column < columns; column += 2 * TILE) {
    for (int64_t row = 0; row < rows; row += 2 * TILE) {
      const uint16_t* const a = scratch.a + row / TILE * line;
      const uint16_t* const b = scratch.b + column / TILE * line;
      const TilePair pair{{a, a + line},
                          {b, b + line},
                          scratch.sums + row * SUMS_ROW + column,
                          count,
                          row + TILE < rows,
                          column + TILE < columns,
                          add};
      unit == Bf16Unit::AMX ? multiply_by_amx(pair) : multiply_by_avx512(pair);
    }
  }
}

Scratch& scratch_of_this_thread() {
  struct Freed {
    Scratch* scratch = static_cast<Scratch*>(std::aligned_alloc(64, sizeof(Scratch)));
    ~Freed() { std::free(scratch); }
  };
  static thread_local Freed own;
  if (own.scratch == nullptr) throw std::bad_alloc();
  return *own.scratch;
}

// Linux lets a process use AMX's registers after it has asked.
bool may_use_amx() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

}  // namespace

void bf16_product_blocks(const Bf16Product& p, Bf16Unit unit, int64_t begin, int64_t end) {
  Scratch& scratch = scratch_of_this_thread();
  if (unit == Bf16Unit::AMX) configure_tiles();
  const int64_t blocks_of_rows = p.blocks_of_rows();
  // A factor that is laid out whole serves the next block too.
  const bool is_whole = p.depth <= MOST_DEPTH;
  int64_t row_of_a = -1, column_of_b = -1;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block % blocks_of_rows * p.block_rows, column = block / blocks_of_rows * p.block_columns;
    const int64_t rows = std::min(p.block_rows, p.rows - row), columns = std::min(p.block_columns, p.columns - column);
    for (int64_t k = 0; k == 0 || k < p.depth; k += MOST_DEPTH) {
      const int64_t depth = std::min(MOST_DEPTH, p.depth - k);
      if (!is_whole || row_of_a != row) {
        lay_out(p.a.data + row * p.a.row + k * p.a.column, p.a.row, p.a.column, rows, depth, false, scratch.a);
      }
      if (!is_whole || column_of_b != column) {
        lay_out(p.b.data + k * p.b.row + column * p.b.column, p.b.column, p.b.row, columns, depth, true, scratch.b);
      }
      row_of_a = row, column_of_b = column;
      multiply_block(scratch, unit, rows, columns, depth, k > 0);
    }
    write(p, scratch.sums, row, rows, column, columns);
  }
  if (unit == Bf16Unit::AMX) _tile_release();
}

}  // namespace mixkd
MIXKD_END_REGION

namespace mixkd {

Bf16Unit bf16_unit() {
  static const Bf16Unit unit = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (instruction_set() != InstructionSet::AVX512 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return Bf16Unit::NONE;
    if (!(a >> 5 & 1)) return Bf16Unit::NONE;  // AVX512_BF16
    // What lowers oneDNN, with which torch multiplies bf16. Of its values these two kinds have less than AMX.
    const char* const most = std::getenv("ONEDNN_MAX_CPU_ISA");
    const auto is_one_of = [most](std::initializer_list<const char*> names) {
      return most != nullptr &&
             std::any_of(names.begin(), names.end(), [most](auto name) { return strcasecmp(most, name) == 0; });
    };
    if (is_one_of({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"})) {
      return Bf16Unit::NONE;
    }
    const bool has_amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
    const bool is_lowered = is_one_of({"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"});
    return has_amx && !is_lowered && may_use_amx() ? Bf16Unit::AMX : Bf16Unit::AVX512;
  }();
  return unit;
}

}  // namespace mixkd
#else
namespace mixkd {
Bf16Unit bf16_unit() { return Bf16Unit::NONE; }
void bf16_product_blocks(const Bf16Product&, Bf16Unit, int64_t, int64_t) {}
}  // namespace mixkd
#endif

// A product of bf16 matrices with sums and result in fp32, or rounded to bf16 once: what its blocks read and write.
#pragma once

#include <cstdint>

namespace mixkd {

// Strides in elements; one of them is 1.
struct Bf16Matrix {
  const uint16_t* data;
  int64_t row, column;
};

// out = scale a b, or out += scale a b. a [rows, depth], b [depth, columns]; the columns of out lie next to each other.
struct Bf16Product {
  Bf16Matrix a, b;
  void* out;
  int64_t out_row;
  bool out_is_bf16, add;
  float scale;
  int64_t rows, columns, depth;
  // Of a block, multiples of 32. A block is the work of one thread at a time.
  int64_t block_rows, block_columns;

  int64_t blocks_of_rows() const { return (rows + block_rows - 1) / block_rows; }
  int64_t blocks() const { return blocks_of_rows() * ((columns + block_columns - 1) / block_columns); }
};

constexpr int64_t MOST_OF_BLOCK = 256;  // rows and columns of a block at most

// What multiplies tiles: AMX, the bf16 instructions of AVX-512, or nothing here.
enum class Bf16Unit { NONE, AVX512, AMX };
Bf16Unit bf16_unit();

// Blocks [begin, end). The sum of an element runs over the depth in an order that does not depend on the blocks' sizes.
void bf16_product_blocks(const Bf16Product& product, Bf16Unit unit, int64_t begin, int64_t end);

}  // namespace mixkd

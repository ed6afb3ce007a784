// mixkd_fast::bf16_product_ on the CPU: arguments -> Bf16Product, threads over blocks, registration.
#include "bf16_product.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../checks.h"
#include "large_pages.h"

namespace mixkd {
namespace {

Bf16Matrix matrix_of(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.scalar_type() == ScalarType::BFloat16, name,
                  " must be a bfloat16 matrix");
  // The stride of a single row or column is anything, and never used.
  const int64_t column = tensor.size(1) == 1 ? 1 : tensor.stride(1);
  const int64_t row = tensor.size(0) == 1 && column != 1 ? 1 : tensor.stride(0);
  STD_TORCH_CHECK(row == 1 || column == 1, name, " must have its rows or its columns next to each other");
  return {static_cast<const uint16_t*>(tensor.const_data_ptr()), row, column};
}

// Blocks as large as they may be, but enough of them for all threads.
void cut(Bf16Product& product) {
  const int64_t threads = torch::stable::get_num_threads();
  const auto most = [](int64_t size) { return std::min<int64_t>(MOST_OF_BLOCK, (size + 31) / 32 * 32); };
  product.block_rows = most(product.rows);
  product.block_columns = most(product.columns);
  while (product.blocks() < threads && std::max(product.block_rows, product.block_columns) > 32) {
    int64_t& larger = product.block_rows > product.block_columns ? product.block_rows : product.block_columns;
    larger = (larger / 2 + 31) / 32 * 32;
  }
}

void bf16_product_(Tensor out, Tensor left, Tensor right, double scale, bool add) {
  Bf16Product product;
  product.a = matrix_of("left", left);
  product.b = matrix_of("right", right);
  product.rows = left.size(0);
  product.depth = left.size(1);
  product.columns = right.size(1);
  STD_TORCH_CHECK(right.size(0) == product.depth, "right must have as many rows as left has columns");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == product.rows && out.size(1) == product.columns, "out must be [",
                  product.rows, ", ", product.columns, "]");
  STD_TORCH_CHECK(out.size(1) == 1 || out.stride(1) == 1, "out must have its columns next to each other");
  product.out_is_bf16 = out.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(product.out_is_bf16 || out.scalar_type() == ScalarType::Float, "out must be float32 or bfloat16");
  STD_TORCH_CHECK(!(add && product.out_is_bf16), "sums are kept in float32");
  const Bf16Unit unit = bf16_unit();
  STD_TORCH_CHECK(unit != Bf16Unit::NONE, "this processor has no products of bfloat16");
  if (product.rows == 0 || product.columns == 0) return;
  product.out = out.mutable_data_ptr();
  product.out_row = out.stride(0);
  product.scale = static_cast<float>(scale);
  product.add = add;
  cut(product);
  torch::stable::parallel_for(0, product.blocks(), 1,
                              [&](int64_t begin, int64_t end) { bf16_product_blocks(product, unit, begin, end); });
}

bool has_bf16_product(Tensor) { return bf16_unit() != Bf16Unit::NONE; }

// For what is about to be written first.
void prefer_large_pages_(Tensor tensor) { on_large_pages(tensor); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mixkd_fast, CPU, m) {
  m.impl("bf16_product_", TORCH_BOX(&bf16_product_));
  m.impl("has_bf16_product", TORCH_BOX(&has_bf16_product));
  m.impl("prefer_large_pages_", TORCH_BOX(&prefer_large_pages_));
}

}  // namespace mixkd

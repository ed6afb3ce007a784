// Small matrix products in registers. Included once per instruction set, inside that set's namespace, which defines
// VECTOR_BYTES.

template <typename T>
struct VectorOf {
  typedef T Type __attribute__((vector_size(VECTOR_BYTES)));
  // In memory, where nothing is aligned to more than an element.
  typedef T Stored __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(T)), may_alias));
  static constexpr int64_t LANES = VECTOR_BYTES / sizeof(T);
};

constexpr int TILE_ROWS = 6;  // with two vectors each: the 16 registers of AVX2, and enough sums to hide a latency

// What a product reads and writes: C [rows, columns] = (or +=) A [rows, depth] B [depth, columns], A of any strides.
// columns is a multiple of LANES.
template <typename T>
struct Product {
  const T* a;
  int64_t a_row, a_column;
  const T* b;
  int64_t b_row;
  T* c;
  int64_t c_row;
  int64_t rows, columns, depth;
  bool add;
};

template <typename T, int ROWS, int VECTORS>
MIXKD_INLINE void product_tile(const Product<T>& p, int64_t row, int64_t column) {
  using Vector = typename VectorOf<T>::Type;
  using Stored = typename VectorOf<T>::Stored;
  constexpr int64_t LANES = VectorOf<T>::LANES;
  Vector sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = Vector{};
  }
  const T* a = p.a + row * p.a_row;
  const T* b = p.b + column;
  for (int64_t k = 0; k < p.depth; ++k, a += p.a_column, b += p.b_row) {
    Vector of_b[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) of_b[v] = *reinterpret_cast<const Stored*>(b + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const T factor = a[r * p.a_row];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += factor * of_b[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      Stored* const to = reinterpret_cast<Stored*>(p.c + (row + r) * p.c_row + column + v * LANES);
      *to = p.add ? static_cast<Vector>(*to) + sums[r][v] : sums[r][v];
    }
  }
}

template <typename T, int VECTORS>
void product_columns(const Product<T>& p, int64_t column) {
  int64_t row = 0;
  for (; row + TILE_ROWS <= p.rows; row += TILE_ROWS) product_tile<T, TILE_ROWS, VECTORS>(p, row, column);
  switch (p.rows - row) {
    case 5: return product_tile<T, 5, VECTORS>(p, row, column);
    case 4: return product_tile<T, 4, VECTORS>(p, row, column);
    case 3: return product_tile<T, 3, VECTORS>(p, row, column);
    case 2: return product_tile<T, 2, VECTORS>(p, row, column);
    case 1: return product_tile<T, 1, VECTORS>(p, row, column);
    default: return;
  }
}

template <typename T>
void multiply(const Product<T>& p) {
  constexpr int64_t LANES = VectorOf<T>::LANES;
  int64_t column = 0;
  for (; column + 2 * LANES <= p.columns; column += 2 * LANES) product_columns<T, 2>(p, column);
  for (; column < p.columns; column += LANES) product_columns<T, 1>(p, column);
}

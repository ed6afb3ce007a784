// A wide row in blocks: reading as floats, writing in the row's dtype, a running softmax. Included once per instruction
// set, before kd_rows.h.

constexpr int BLOCK = 1024;

// Blocks of a row as T: the row itself if it is stored so, else converted into `buffer`.
template <typename T>
struct Row {
  const void* data;
  Dtype dtype;
  T* buffer;

  const T* block(int64_t start, int n) const {
    T* out = buffer;
    if (dtype == Dtype::BF16) {
      const uint16_t* in = static_cast<const uint16_t*>(data) + start;
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = static_cast<T>(float_of_bfloat16(in[i]));
    } else if (dtype == Dtype::F16) {
      const uint16_t* in = static_cast<const uint16_t*>(data) + start;
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = static_cast<T>(float_of_half(in[i]));
    } else if constexpr (std::is_same_v<T, float>) {
      return static_cast<const float*>(data) + start;
    } else if (dtype == Dtype::F32) {
      const float* in = static_cast<const float*>(data) + start;
      for (int i = 0; i < n; ++i) out[i] = static_cast<T>(in[i]);
    } else {
      return static_cast<const T*>(data) + start;
    }
    return out;
  }

  T value(int64_t index) const {
    if (dtype == Dtype::BF16) return static_cast<T>(float_of_bfloat16(static_cast<const uint16_t*>(data)[index]));
    if (dtype == Dtype::F16) return static_cast<T>(float_of_half(static_cast<const uint16_t*>(data)[index]));
    if (dtype == Dtype::F32) return static_cast<T>(static_cast<const float*>(data)[index]);
    return static_cast<T>(static_cast<const double*>(data)[index]);
  }
};

// Writes n values of T at `start` of a row stored as dtype.
template <typename T>
void store_block(void* row, Dtype dtype, int64_t start, int n, const T* values) {
  if (dtype == Dtype::BF16) {
    uint16_t* out = static_cast<uint16_t*>(row) + start;
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = bfloat16_of_float(static_cast<float>(values[i]));
  } else if (dtype == Dtype::F16) {
    uint16_t* out = static_cast<uint16_t*>(row) + start;
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = half_of_float(static_cast<float>(values[i]));
  } else if (dtype == Dtype::F32) {
    float* out = static_cast<float*>(row) + start;
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = static_cast<float>(values[i]);
  } else {
    double* out = static_cast<double*>(row) + start;
    for (int i = 0; i < n; ++i) out[i] = static_cast<double>(values[i]);
  }
}

inline size_t bytes_of(Dtype dtype) { return dtype == Dtype::F64 ? 8 : dtype == Dtype::F32 ? 4 : 2; }

// Whether values of T are stored as they are.
template <typename T>
bool stored_as(Dtype dtype) {
  return dtype == (std::is_same_v<T, float> ? Dtype::F32 : Dtype::F64);
}

template <typename T>
T largest(const T* values, int n) {
  T result = -INFINITE<T>;
#pragma omp simd reduction(max : result)
  for (int i = 0; i < n; ++i) result = values[i] > result ? values[i] : result;
  return result;
}

// A running softmax: max of the values so far, sum of exp((value - max) * inverse_temperature). Blocks are summed in T,
// rows of blocks in double.
template <typename T>
struct Softmax {
  T inverse_temperature;
  T max = -INFINITE<T>;
  double sum = 0;

  // What to subtract before exp: an empty row so far must not give -inf - -inf.
  T shift() const { return max == -INFINITE<T> ? T(0) : max; }

  // Makes room for values up to `block_max`; returns the factor for sums gathered so far.
  T raise(T block_max) {
    if (!(block_max > max)) return T(1);
    const T factor = sum == 0 ? T(0) : exp_of_nonpositive((max - block_max) * inverse_temperature);
    max = block_max;
    sum *= factor;
    return factor;
  }

  void add(const T* values, int n) {
    raise(largest(values, n));
    const T subtract = shift();
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < n; ++i) total += exp_of_nonpositive((values[i] - subtract) * inverse_temperature);
    sum += total;
  }
};

// A block of bf16 logits read as floats where they are used, instead of converted first.
struct BFloat16Block {
  const uint16_t* data;
  MIXKD_INLINE float operator[](int i) const { return float_of_bfloat16(data[i]); }
};

template <typename T>
struct ConvertedBlocks {
  const Row<T>& row;
  const T* operator()(int64_t start, int n) const { return row.block(start, n); }
};

template <typename T>
struct BFloat16Blocks {
  const Row<T>& row;
  BFloat16Block operator()(int64_t start, int) const { return {static_cast<const uint16_t*>(row.data) + start}; }
};

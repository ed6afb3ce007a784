// The row loops of mix_embeddings. Included once per instruction set, inside that set's namespace.

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename E>
using ComputeOf = std::conditional_t<std::is_same_v<E, double>, double, float>;

MIXKD_INLINE float load(float value) { return value; }
MIXKD_INLINE double load(double value) { return value; }
MIXKD_INLINE float load(BFloat16 value) { return float_of_bfloat16(value.bits); }
MIXKD_INLINE float load(Half value) { return float_of_half(value.bits); }

template <typename E>
MIXKD_INLINE E store(ComputeOf<E> value) {
  if constexpr (std::is_same_v<E, BFloat16>) {
    return {bfloat16_of_float(value)};
  } else if constexpr (std::is_same_v<E, Half>) {
    return {half_of_float(value)};
  } else {
    return value;
  }
}

template <typename E>
MIXKD_INLINE const E* table_row(const void* table, int64_t row, int64_t width) {
  return static_cast<const E*>(table) + row * width;
}

// out = u first + v second; a side of weight 0 is not read.
template <typename E, typename O>
MIXKD_INLINE void mix_words(const MixJob& job, const Token<ComputeOf<E>>& token, O* __restrict out) {
  const auto u = token.first_weight, v = token.second_weight;
  const E* __restrict first = table_row<E>(job.weight, token.first_word, job.width);
  const E* __restrict second = table_row<E>(job.weight, token.second_word, job.width);
  const int64_t width = job.width;
  if (u != 0 && v != 0) {
#pragma omp simd
    for (int64_t h = 0; h < width; ++h) out[h] = store<O>(u * load(first[h]) + v * load(second[h]));
    return;
  }
  const E* __restrict only = v == 0 ? first : second;
  const auto weight = v == 0 ? u : v;
  if (weight == 0) {
    std::fill(out, out + width, store<O>(0));
  } else {
#pragma omp simd
    for (int64_t h = 0; h < width; ++h) out[h] = store<O>(weight * load(only[h]));
  }
}

// x += P + (u Y_i + v Y_j); a side of weight 0 is not read.
template <typename E>
MIXKD_INLINE void add_place(const MixJob& job, const Token<ComputeOf<E>>& token, ComputeOf<E>* __restrict x) {
  using T = ComputeOf<E>;
  const int64_t width = job.width;
  T u = token.first_weight, v = token.second_weight;
  if (job.token_type_weight == nullptr || (u == 0 && v == 0)) {
    if (job.position_weight == nullptr) return;
    const E* __restrict place = table_row<E>(job.position_weight, token.position, width);
#pragma omp simd
    for (int64_t h = 0; h < width; ++h) x[h] += load(place[h]);
    return;
  }
  const E* first = table_row<E>(job.token_type_weight, token.first_type, width);
  const E* second = table_row<E>(job.token_type_weight, token.second_type, width);
  // Both pointers to the side that counts: 0 times a NaN would be one.
  if (u == 0) first = second;
  if (v == 0) second = first;
  if (job.position_weight == nullptr) {
#pragma omp simd
    for (int64_t h = 0; h < width; ++h) x[h] += u * load(first[h]) + v * load(second[h]);
  } else {
    const E* __restrict place = table_row<E>(job.position_weight, token.position, width);
#pragma omp simd
    for (int64_t h = 0; h < width; ++h) x[h] += load(place[h]) + (u * load(first[h]) + v * load(second[h]));
  }
}

template <typename E>
MIXKD_INLINE void mix_row(const MixJob& job, const Token<ComputeOf<E>>& token, ComputeOf<E>* __restrict x) {
  mix_words<E>(job, token, x);
  if (job.position_weight != nullptr || job.token_type_weight != nullptr) add_place<E>(job, token, x);
}

// mean and rstd of x, then the normalised row.
template <typename E>
MIXKD_INLINE void normalize(const MixJob& job, int64_t index, const ComputeOf<E>* __restrict x, E* __restrict out) {
  using T = ComputeOf<E>;
  const int64_t width = job.width;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t h = 0; h < width; ++h) sum += x[h];
  const T mean = sum / T(width);
  T squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t h = 0; h < width; ++h) squares += (x[h] - mean) * (x[h] - mean);
  const T rstd = rstd_of(squares, width, job.norm_eps);
  static_cast<T*>(job.mean)[index] = mean;
  static_cast<T*>(job.rstd)[index] = rstd;
  const T* __restrict weight = static_cast<const T*>(job.norm_weight);
  const T* __restrict bias = static_cast<const T*>(job.norm_bias);
#pragma omp simd
  for (int64_t h = 0; h < width; ++h) out[h] = store<E>((x[h] - mean) * rstd * weight[h] + bias[h]);
}

// Tokens of the output in order, each made known while the one before it is worked on: its table rows lie anywhere.
template <typename E>
class Tokens {
 public:
  Tokens(const MixJob& job, int64_t begin, int64_t end) : job_(job), end_(end), index_(begin) {
    if (begin >= end) return;
    row_ = begin / job.length;
    place_ = begin % job.length;
    pair_ = pair_of<T>(job, row_);
    next_ = token_of(job, pair_, row_, place_);
  }

  Token<ComputeOf<E>> take() {
    const Token<T> token = next_;
    if (++index_ < end_) {
      if (++place_ == job_.length) {
        place_ = 0;
        pair_ = pair_of<T>(job_, ++row_);
      }
      next_ = token_of(job_, pair_, row_, place_);
      if (next_.first_weight != 0) prefetch(next_.first_word);
      if (next_.second_weight != 0) prefetch(next_.second_word);
    }
    return token;
  }

 private:
  using T = ComputeOf<E>;

  void prefetch(int64_t word) const {
    const char* row = reinterpret_cast<const char*>(table_row<E>(job_.weight, word, job_.width));
    const int64_t bytes = job_.width * static_cast<int64_t>(sizeof(E));
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 3);
  }

  const MixJob& job_;
  int64_t end_, index_, row_ = 0, place_ = 0;
  Pair<T> pair_{};
  Token<T> next_{};
};

template <typename E>
void forward_tokens(const MixJob& job, int64_t begin, int64_t end) {
  using T = ComputeOf<E>;
  Tokens<E> tokens(job, begin, end);
  E* const output = static_cast<E*>(job.output);
  if (job.position_weight == nullptr && job.token_type_weight == nullptr && !job.use_norm) {
    for (int64_t index = begin; index < end; ++index) mix_words<E>(job, tokens.take(), output + index * job.width);
    return;
  }
  const auto x = std::make_unique<T[]>(job.width);
  for (int64_t index = begin; index < end; ++index) {
    E* const out = output + index * job.width;
    mix_row<E>(job, tokens.take(), x.get());
    if (job.use_norm) {
      normalize<E>(job, index, x.get(), out);
    } else {
      std::transform(x.get(), x.get() + job.width, out, [](T value) { return store<E>(value); });
    }
  }
}

template <typename E>
void norm_backward_tokens(const MixJob& job, const void* grad_output, void* grad_x, void* norm_sums, int64_t begin,
                          int64_t end) {
  using T = ComputeOf<E>;
  const int64_t width = job.width;
  Tokens<E> tokens(job, begin, end);
  const auto x = std::make_unique<T[]>(width);
  T* __restrict normalized = x.get();
  T* __restrict weight_sum = static_cast<T*>(norm_sums);
  T* __restrict bias_sum = weight_sum + width;
  const T* __restrict weight = static_cast<const T*>(job.norm_weight);
  for (int64_t index = begin; index < end; ++index) {
    mix_row<E>(job, tokens.take(), normalized);
    const T mean = static_cast<const T*>(job.mean)[index], rstd = static_cast<const T*>(job.rstd)[index];
    const E* __restrict gradient = static_cast<const E*>(grad_output) + index * width;
    T* __restrict out = static_cast<T*>(grad_x) + index * width;
    T sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
    for (int64_t h = 0; h < width; ++h) {
      const T value = (normalized[h] - mean) * rstd, incoming = load(gradient[h]), scaled = incoming * weight[h];
      normalized[h] = value;
      out[h] = scaled;
      weight_sum[h] += incoming * value;
      bias_sum[h] += incoming;
      sum += scaled;
      product += scaled * value;
    }
    sum /= T(width);
    product /= T(width);
#pragma omp simd
    for (int64_t h = 0; h < width; ++h) out[h] = norm_gradient(out[h], normalized[h], sum, product, rstd);
  }
}

// out (+)= sum over entries begin..end, four table rows at a time.
template <typename S, typename T>
void sum_entries(const SumJob& job, int64_t begin, int64_t end, T* __restrict out) {
  const int64_t width = job.width;
  const auto row = [&](int64_t entry) { return table_row<S>(job.source, job.tokens[entry], width); };
  const auto weight = [&](int64_t entry) { return static_cast<T>(job.weights[entry]); };
  int64_t entry = begin;
  {
    const S* __restrict a = row(entry);
    const T u = weight(entry);
#pragma omp simd
    for (int64_t h = 0; h < width; ++h) out[h] = u * load(a[h]);
    ++entry;
  }
  for (; entry + 4 <= end; entry += 4) {
    const S* __restrict a = row(entry), * __restrict b = row(entry + 1);
    const S* __restrict c = row(entry + 2), * __restrict d = row(entry + 3);
    const T u = weight(entry), v = weight(entry + 1), w = weight(entry + 2), z = weight(entry + 3);
#pragma omp simd
    for (int64_t h = 0; h < width; ++h) {
      out[h] += (u * load(a[h]) + v * load(b[h])) + (w * load(c[h]) + z * load(d[h]));
    }
  }
  for (; entry < end; ++entry) {
    const S* __restrict a = row(entry);
    const T u = weight(entry);
#pragma omp simd
    for (int64_t h = 0; h < width; ++h) out[h] += u * load(a[h]);
  }
}

template <typename S, typename E>
void sum_pieces_of(const SumJob& job, int64_t begin, int64_t end) {
  using T = ComputeOf<E>;
  const int64_t width = job.width;
  const auto buffer = std::make_unique<T[]>(width);
  for (int64_t p = begin; p < end; ++p) {
    const SumPiece& piece = job.pieces[p];
    E* const row = static_cast<E*>(job.table) + piece.table_row * width;
    if (piece.partial >= 0) {
      sum_entries<S>(job, piece.begin, piece.end, static_cast<T*>(job.partials) + piece.partial * width);
    } else if constexpr (std::is_same_v<E, T>) {
      sum_entries<S>(job, piece.begin, piece.end, row);
    } else {
      sum_entries<S>(job, piece.begin, piece.end, buffer.get());
      std::transform(buffer.get(), buffer.get() + width, row, [](T value) { return store<E>(value); });
    }
  }
}

template <typename E>
void sum_splits_of(const SumJob& job, int64_t begin, int64_t end) {
  using T = ComputeOf<E>;
  const int64_t width = job.width;
  for (int64_t s = begin; s < end; ++s) {
    const SumSplit& split = job.splits[s];
    T* __restrict total = static_cast<T*>(job.partials) + split.begin * width;
    for (int64_t partial = split.begin + 1; partial < split.end; ++partial) {
      const T* __restrict more = static_cast<const T*>(job.partials) + partial * width;
#pragma omp simd
      for (int64_t h = 0; h < width; ++h) total[h] += more[h];
    }
    E* const row = static_cast<E*>(job.table) + split.table_row * width;
    std::transform(total, total + width, row, [](T value) { return store<E>(value); });
  }
}

// Calls body with a value of the dtype's element type.
template <typename Body>
void for_dtype(MixDtype dtype, const Body& body) {
  switch (dtype) {
    case MixDtype::F32: return body(float{});
    case MixDtype::BF16: return body(BFloat16{});
    case MixDtype::F16: return body(Half{});
    case MixDtype::F64: return body(double{});
  }
}

inline MixRows mix_rows() {
  MixRows rows{};
  rows.forward = [](const MixJob& job, MixDtype dtype, int64_t begin, int64_t end) {
    for_dtype(dtype, [&](auto element) { forward_tokens<decltype(element)>(job, begin, end); });
  };
  rows.norm_backward = [](const MixJob& job, MixDtype dtype, const void* grad_output, void* grad_x, void* norm_sums,
                          int64_t begin, int64_t end) {
    for_dtype(dtype, [&](auto element) {
      norm_backward_tokens<decltype(element)>(job, grad_output, grad_x, norm_sums, begin, end);
    });
  };
  rows.sum_pieces = [](const SumJob& job, int64_t begin, int64_t end) {
    for_dtype(job.table_dtype, [&](auto element) {
      using E = decltype(element);
      if (job.source_dtype == job.table_dtype) return sum_pieces_of<E, E>(job, begin, end);
      // After LayerNorm the source is of the compute type.
      sum_pieces_of<ComputeOf<E>, E>(job, begin, end);
    });
  };
  rows.sum_splits = [](const SumJob& job, int64_t begin, int64_t end) {
    for_dtype(job.table_dtype, [&](auto element) { sum_splits_of<decltype(element)>(job, begin, end); });
  };
  return rows;
}

// The loops of relation_kl. Included once per instruction set, inside that set's namespace.
//
// One row and head at a time. Its tokens are packed next to each other, which leaves the padding out for good; then a
// block of queries after the other: scores of student and teacher, both softmaxes, the divergence, and the share of
// the gradients. No more of the relations exists than BLOCK_QUERIES queries of one row and head per thread.

#include "relation_product.h"

constexpr int64_t BLOCK_QUERIES = 4 * TILE_ROWS;

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

MIXKD_INLINE float load(float value) { return value; }
MIXKD_INLINE double load(double value) { return value; }
MIXKD_INLINE float load(BFloat16 value) { return float_of_bfloat16(value.bits); }
MIXKD_INLINE float load(Half value) { return float_of_half(value.bits); }

MIXKD_INLINE void store(float value, float& to) { to = value; }
MIXKD_INLINE void store(double value, double& to) { to = value; }
MIXKD_INLINE void store(float value, BFloat16& to) { to.bits = bfloat16_of_float(value); }
MIXKD_INLINE void store(float value, Half& to) { to.bits = half_of_float(value); }
// fp64 arithmetic for the sake of the teacher alone.
MIXKD_INLINE void store(double value, float& to) { to = static_cast<float>(value); }
MIXKD_INLINE void store(double value, BFloat16& to) { to.bits = bfloat16_of_float(static_cast<float>(value)); }
MIXKD_INLINE void store(double value, Half& to) { to.bits = half_of_float(static_cast<float>(value)); }

// Calls `run` with a value of the type of the elements.
template <typename Run>
MIXKD_INLINE void with_element(RelationDtype dtype, Run run) {
  switch (dtype) {
    case RelationDtype::F32: return run(float{});
    case RelationDtype::BF16: return run(BFloat16{});
    case RelationDtype::F16: return run(Half{});
    case RelationDtype::F64: return run(double{});
  }
}

MIXKD_INLINE int64_t rounded_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Of one thread: everything that one row and head needs, sized for the longest row.
template <typename T>
struct RelationBuffers {
  static constexpr int64_t LANES = VectorOf<T>::LANES;
  const int64_t student_row, teacher_row, key_row;  // widths and length, in whole vectors
  std::unique_ptr<int64_t[]> tokens;
  std::unique_ptr<T[]> memory;
  T *student_first, *student_second, *student_keys;  // [tokens, student_row] twice, [student_width, key_row]
  T *teacher_first, *teacher_keys, *teacher_second;
  T *student_block, *teacher_block;  // [BLOCK_QUERIES, key_row]
  T *first_block, *grad_second;      // [BLOCK_QUERIES, student_row], [tokens, student_row]

  explicit RelationBuffers(const RelationJob& job)
      : student_row(rounded_up(job.student_width, LANES)),
        teacher_row(rounded_up(job.teacher_width, LANES)),
        key_row(rounded_up(job.length, LANES)),
        tokens(new int64_t[job.length]) {
    const int64_t student = job.length * student_row, teacher = job.length * teacher_row;
    const int64_t block = BLOCK_QUERIES * key_row;
    const int64_t sizes[] = {student, student, student_row * key_row,       teacher, teacher_row * key_row, teacher,
                             block,   block,   BLOCK_QUERIES * student_row, student};
    T** const parts[] = {&student_first,  &student_second, &student_keys,  &teacher_first, &teacher_keys,
                         &teacher_second, &student_block,  &teacher_block, &first_block,   &grad_second};
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    memory.reset(new T[total]);  // not cleared, as make_unique would
    T* next = memory.get();
    for (int part = 0; part < 10; ++part) {
      *parts[part] = next;
      next += sizes[part];
    }
  }
};

// The tokens of one row and head, next to each other: [tokens, row_size], 0 behind the width.
template <typename T>
void pack(const RelationSide& side, int64_t row, int64_t head, const int64_t* tokens, int64_t num_tokens, int64_t width,
          T* to, int64_t row_size) {
  with_element(side.dtype, [&](auto element) {
    using E = decltype(element);
    const E* const from = static_cast<const E*>(side.data) + row * side.strides[0] + head * side.strides[1];
    const int64_t step = side.strides[3];
    for (int64_t i = 0; i < num_tokens; ++i, to += row_size) {
      const E* const token = from + tokens[i] * side.strides[2];
      if (step == 1) {
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) to[c] = static_cast<T>(load(token[c]));
      } else {
        for (int64_t c = 0; c < width; ++c) to[c] = static_cast<T>(load(token[c * step]));
      }
      std::fill(to + width, to + row_size, T(0));
    }
  });
}

// keys [width, key_row] = packed [tokens, row_size] transposed, times 1 / sqrt(width); 0 behind the tokens. The scale
// stands here for both models, so that the scores of equal models are equal to the last bit.
template <typename T>
void transpose(const T* packed, int64_t num_tokens, int64_t row_size, int64_t width, T* keys, int64_t key_row) {
  const T scale = static_cast<T>(1.0 / std::sqrt(static_cast<double>(width)));
  const int64_t used = rounded_up(num_tokens, VectorOf<T>::LANES);
  for (int64_t c = 0; c < width; ++c) {
    T* const to = keys + c * key_row;
    for (int64_t i = 0; i < num_tokens; ++i) to[i] = packed[i * row_size + c] * scale;
    std::fill(to + num_tokens, to + used, T(0));
  }
}

// Scores of one query, [used], those behind num_tokens made to count nothing -> KL(p || q); student becomes q - p.
template <typename T>
MIXKD_INLINE T divergence(T* __restrict student, T* __restrict teacher, int64_t num_tokens, int64_t used) {
  // Far enough below every score to have no weight, and finite also after a score is taken from it.
  const T nothing = -std::numeric_limits<T>::max() / 4;
  std::fill(student + num_tokens, student + used, nothing);
  std::fill(teacher + num_tokens, teacher + used, nothing);
  T student_most = nothing, teacher_most = nothing;
#pragma omp simd reduction(max : student_most, teacher_most)
  for (int64_t j = 0; j < used; ++j) {
    student_most = student[j] > student_most ? student[j] : student_most;
    teacher_most = teacher[j] > teacher_most ? teacher[j] : teacher_most;
  }
  T student_sum = 0, teacher_sum = 0, difference = 0;
#pragma omp simd reduction(+ : student_sum, teacher_sum, difference)
  for (int64_t j = 0; j < used; ++j) {
    const T of_student = student[j] - student_most, of_teacher = teacher[j] - teacher_most;
    const T q = exp_of_nonpositive(of_student), p = exp_of_nonpositive(of_teacher);
    student[j] = q;
    teacher[j] = p;
    student_sum += q;
    teacher_sum += p;
    difference += p * (of_teacher - of_student);
  }
  const T student_share = 1 / student_sum, teacher_share = 1 / teacher_sum;
#pragma omp simd
  for (int64_t j = 0; j < used; ++j) student[j] = student[j] * student_share - teacher[j] * teacher_share;
  return difference * teacher_share + log_of(student_sum / teacher_sum);
}

// Gradients of packed tokens to where they belong.
template <typename T>
void unpack(const RelationJob& job, void* gradient, int64_t row, int64_t head, const int64_t* tokens,
            int64_t num_tokens, const T* from, int64_t row_size) {
  with_element(job.student_first.dtype, [&](auto element) {
    using E = decltype(element);
    const int64_t width = job.student_width;
    for (int64_t i = 0; i < num_tokens; ++i, from += row_size) {
      E* const to = static_cast<E*>(gradient) + ((row * job.length + tokens[i]) * job.num_heads + head) * width;
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) store(from[c], to[c]);
    }
  });
}

inline void clear_padding(const RelationJob& job, void* gradient, int64_t row, int64_t head) {
  with_element(job.student_first.dtype, [&](auto element) {
    using E = decltype(element);
    for (int64_t l = 0; l < job.length; ++l) {
      if (job.keep[row * job.length + l]) continue;
      E* const to = static_cast<E*>(gradient) + ((row * job.length + l) * job.num_heads + head) * job.student_width;
      std::fill(to, to + job.student_width, E{});
    }
  });
}

template <typename T>
double relation(const RelationJob& job, RelationBuffers<T>& b, int64_t row, int64_t head) {
  int64_t num_tokens = 0;
  for (int64_t l = 0; l < job.length; ++l) {
    if (job.keep[row * job.length + l]) b.tokens[num_tokens++] = l;
  }
  for (void* gradient : {job.grad_first, job.grad_second}) {
    if (gradient != nullptr && num_tokens < job.length) clear_padding(job, gradient, row, head);
  }
  if (num_tokens == 0) return 0;
  const int64_t* const tokens = b.tokens.get();
  const int64_t student_width = job.student_width, teacher_width = job.teacher_width;
  pack(job.student_first, row, head, tokens, num_tokens, student_width, b.student_first, b.student_row);
  pack(job.student_second, row, head, tokens, num_tokens, student_width, b.student_second, b.student_row);
  pack(job.teacher_first, row, head, tokens, num_tokens, teacher_width, b.teacher_first, b.teacher_row);
  pack(job.teacher_second, row, head, tokens, num_tokens, teacher_width, b.teacher_second, b.teacher_row);
  transpose(b.student_second, num_tokens, b.student_row, student_width, b.student_keys, b.key_row);
  transpose(b.teacher_second, num_tokens, b.teacher_row, teacher_width, b.teacher_keys, b.key_row);
  const int64_t used = rounded_up(num_tokens, VectorOf<T>::LANES);
  double loss = 0;
  for (int64_t begin = 0; begin < num_tokens; begin += BLOCK_QUERIES) {
    const int64_t count = std::min(BLOCK_QUERIES, num_tokens - begin);
    const T* const student_queries = b.student_first + begin * b.student_row;
    const T* const teacher_queries = b.teacher_first + begin * b.teacher_row;
    multiply<T>({student_queries, b.student_row, 1, b.student_keys, b.key_row, b.student_block, b.key_row, count, used,
                 student_width, false});
    multiply<T>({teacher_queries, b.teacher_row, 1, b.teacher_keys, b.key_row, b.teacher_block, b.key_row, count, used,
                 teacher_width, false});
    for (int64_t i = 0; i < count; ++i) {
      loss += divergence(b.student_block + i * b.key_row, b.teacher_block + i * b.key_row, num_tokens, used);
    }
    if (job.grad_first != nullptr) {
      multiply<T>({b.student_block, b.key_row, 1, b.student_second, b.student_row, b.first_block, b.student_row, count,
                   b.student_row, num_tokens, false});
      unpack(job, job.grad_first, row, head, tokens + begin, count, b.first_block, b.student_row);
    }
    if (job.grad_second != nullptr) {
      multiply<T>({b.student_block, 1, b.key_row, student_queries, b.student_row, b.grad_second, b.student_row,
                   num_tokens, b.student_row, count, begin > 0});
    }
  }
  if (job.grad_second != nullptr) {
    unpack(job, job.grad_second, row, head, tokens, num_tokens, b.grad_second, b.student_row);
  }
  return loss;
}

template <typename T>
void relations_of(const RelationJob& job, int64_t begin, int64_t end) {
  RelationBuffers<T> buffers(job);
  for (int64_t index = begin; index < end; ++index) {
    job.losses[index] = relation<T>(job, buffers, index / job.num_heads, index % job.num_heads);
  }
}

inline void relations(const RelationJob& job, bool compute_double, int64_t begin, int64_t end) {
  if (compute_double) {
    relations_of<double>(job, begin, end);
  } else {
    relations_of<float>(job, begin, end);
  }
}

inline RelationLoops relation_loops() { return {relations}; }

// The row loops of kd_loss. Included once per instruction set, inside that set's namespace: see kd_rows_*.cpp.
//
// Wide rows are read in blocks that stay in the first-level cache: a first reading gathers maxima and sums (rescaled
// when a larger maximum appears), a middle one sums D and v for the divergences whose gradient needs them, a last one
// writes the gradient. Narrow rows go 16 at a time, one per vector lane (kd_narrow.h).

// Everything of one row that both readings need.
template <typename T>
struct RowState {
  Softmax<T> student, teacher;  // over the shared classes, at the temperature
  Softmax<T> plain;             // over all classes, at temperature 1
  double value = 0;             // sum of the values of D
  double v = 0;                 // sum of v
  DivergenceOptions<T> options;
};

template <typename T>
struct Buffers {
  alignas(64) T student[BLOCK], teacher[BLOCK], out[BLOCK];
  alignas(64) T p[BLOCK], q[BLOCK], plain[BLOCK];  // rows of one block keep their exponentials
  std::vector<T> wide_first, wide_second;          // [C], where whole rows are kept
  std::vector<T> student_scales, teacher_scales;   // one per block
  std::vector<T> all_p, all_q;                     // [C], for adaptive_kl
};

// The exponentials of a row, kept by the first reading: two stores and loads that stay in a cache cost less than taking
// them again. Each block is relative to the maximum up to it; scales, one per block, make probabilities of them.
template <typename T>
struct Kept {
  T* student;  // [S]
  T* teacher;  // [S]; after the middle reading v takes their place
  std::vector<T>& student_scales;
  std::vector<T>& teacher_scales;
};

// Turns the maximum that was known at each block (-inf: nothing yet) into the block's scale.
template <typename T>
void finish_scales(const Softmax<T>& softmax, std::vector<T>& scales) {
  const T share = static_cast<T>(1 / softmax.sum);
  for (T& scale : scales) {
    scale = scale == -INFINITE<T> ? T(0) : exp_of((scale - softmax.max) * softmax.inverse_temperature) * share;
  }
}

// First reading. KL(p || q) needs no middle reading: its sum of v is -1 and its value is gathered here as
// sum p ((t - t_0) - (s - s_0)) / tau, t_0 and s_0 the first finite maxima of a block: large common offsets must
// cancel.
template <typename T>
void read_statistics(const KdJob& job, const Row<T>& student, const Row<T>& teacher, bool forward_kl, bool gather_plain,
                     RowState<T>& state, const Kept<T>& kept) {
  T student_start = 0, teacher_start = 0;
  bool student_known = false, teacher_known = false;
  double difference = 0;
  const T inverse = state.student.inverse_temperature;
  kept.student_scales.clear();
  kept.teacher_scales.clear();
  for (int64_t start = 0; start < job.num_shared; start += BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, job.num_shared - start));
    const T* s = student.block(start, n);
    const T* t = teacher.block(start, n);
    state.student.raise(largest(s, n));
    const T factor = state.teacher.raise(largest(t, n));
    kept.student_scales.push_back(state.student.max);
    kept.teacher_scales.push_back(state.teacher.max);
    // What underflows is gone, even if it was infinite.
    difference = factor == T(0) ? 0 : difference * factor;
    if (!student_known) student_start = state.student.shift();
    if (!teacher_known) teacher_start = state.teacher.shift();
    student_known = state.student.max != -INFINITE<T>;
    teacher_known = state.teacher.max != -INFINITE<T>;
    const T s_max = state.student.shift(), t_max = state.teacher.shift();
    T* __restrict s_kept = kept.student + start;
    T* __restrict t_kept = kept.teacher + start;
    T s_sum = 0, t_sum = 0, block_difference = 0;
    if (forward_kl) {
#pragma omp simd reduction(+ : s_sum, t_sum, block_difference)
      for (int i = 0; i < n; ++i) {
        const T e = exp_of_nonpositive((s[i] - s_max) * inverse), f = exp_of_nonpositive((t[i] - t_max) * inverse);
        s_kept[i] = e;
        t_kept[i] = f;
        s_sum += e;
        t_sum += f;
        const T product = f * ((t[i] - teacher_start) - (s[i] - student_start));
        block_difference += f == T(0) ? T(0) : product;
      }
    } else {
#pragma omp simd reduction(+ : s_sum, t_sum)
      for (int i = 0; i < n; ++i) {
        const T e = exp_of_nonpositive((s[i] - s_max) * inverse), f = exp_of_nonpositive((t[i] - t_max) * inverse);
        s_kept[i] = e;
        t_kept[i] = f;
        s_sum += e;
        t_sum += f;
      }
    }
    state.student.sum += s_sum;
    state.teacher.sum += t_sum;
    difference += block_difference;
    if (gather_plain) state.plain.add(s, n);
  }
  finish_scales(state.student, kept.student_scales);
  finish_scales(state.teacher, kept.teacher_scales);
  if (forward_kl) {
    const Softmax<T>& p = state.teacher;
    const Softmax<T>& q = state.student;
    const double offset = (q.shift() - student_start) - (p.shift() - teacher_start);
    state.value = (difference / p.sum + offset) * inverse + (std::log(q.sum) - std::log(p.sum));
    state.v = -1;
  }
}

// Logarithms of probabilities from logits, once the statistics of the row are there.
template <typename T>
struct LogNormalizer {
  T inverse, s_max, t_max, s_log, t_log;

  explicit LogNormalizer(const RowState<T>& state)
      : inverse(state.student.inverse_temperature),
        s_max(state.student.shift()),
        t_max(state.teacher.shift()),
        s_log(static_cast<T>(std::log(state.student.sum))),
        t_log(static_cast<T>(std::log(state.teacher.sum))) {}

  MIXKD_INLINE T log_q(T s) const { return (s - s_max) * inverse - s_log; }
  MIXKD_INLINE T log_p(T t) const { return (t - t_max) * inverse - t_log; }
};

// Middle reading: the sums of D's values and of v; v itself takes the place of the teacher's exponentials.
template <Divergence divergence, typename T, typename StudentBlock, typename TeacherBlock>
void sum_terms_of(const KdJob& job, StudentBlock student, TeacherBlock teacher, RowState<T>& state,
                  const Kept<T>& kept) {
  const DivergenceOptions<T> options = state.options;
  const LogNormalizer<T> normalizer(state);
  for (int64_t start = 0; start < job.num_shared; start += BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, job.num_shared - start));
    const auto s = student(start, n);
    const auto t = teacher(start, n);
    const T q_scale = kept.student_scales[start / BLOCK], p_scale = kept.teacher_scales[start / BLOCK];
    const T* __restrict e = kept.student + start;
    T* __restrict f = kept.teacher + start;
    T value = 0, v = 0;
#pragma omp simd reduction(+ : value, v)
    for (int i = 0; i < n; ++i) {
      const ClassTerms<T> terms = class_terms<divergence>(f[i] * p_scale, e[i] * q_scale, normalizer.log_p(t[i]),
                                                          normalizer.log_q(s[i]), options);
      value += terms.value;
      v += terms.v;
      f[i] = terms.v;
    }
    state.value += value;
    state.v += v;
  }
}

template <Divergence divergence, typename T>
void sum_terms(const KdJob& job, const Row<T>& student, const Row<T>& teacher, RowState<T>& state,
               const Kept<T>& kept) {
  if constexpr (std::is_same_v<T, float>) {
    if (student.dtype == Dtype::BF16 && teacher.dtype == Dtype::BF16) {
      using Blocks = BFloat16Blocks<T>;
      return sum_terms_of<divergence>(job, Blocks{student}, Blocks{teacher}, state, kept);
    }
  }
  using Blocks = ConvertedBlocks<T>;
  sum_terms_of<divergence>(job, Blocks{student}, Blocks{teacher}, state, kept);
}

// What a row's gradient is made of: kd (v - q sum v) + ce (softmax - labels).
template <typename T>
struct GradientScale {
  T kd, ce, lam;
  int64_t label, partner_label;  // -1: none
};

// Adds the labels' part of the cross entropy to a block of the gradient.
template <typename T>
void subtract_labels(T* out, int64_t start, int n, const GradientScale<T>& scale) {
  if (scale.label >= start && scale.label < start + n) out[scale.label - start] -= scale.ce * scale.lam;
  if (scale.partner_label >= start && scale.partner_label < start + n) {
    out[scale.partner_label - start] -= scale.ce * (T(1) - scale.lam);
  }
}

// Last reading of the shared classes.
template <Divergence divergence, typename T>
void write_gradient(const KdJob& job, const Row<T>& student, const Row<T>& teacher, const RowState<T>& state,
                    const GradientScale<T>& scale, bool share_plain, const Kept<T>& kept, void* gradient, T* out) {
  const T plain_max = state.plain.shift();
  const T plain_scale = scale.ce == T(0) ? T(0) : static_cast<T>(scale.ce / state.plain.sum);
  // In the row itself where the gradient is stored as T, perhaps over the exponentials; else converted afterwards. In
  // place a block's logits are still needed while its gradient is put together.
  const bool direct = stored_as<T>(job.student_dtype) && !job.in_place;
  const bool has_ce = scale.ce != T(0), separate = has_ce && !share_plain;
  const T sum_v = static_cast<T>(state.v);
  const T shared_ce = has_ce && share_plain ? scale.ce : T(0);
  for (int64_t start = 0; start < job.num_shared; start += BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, job.num_shared - start));
    T* block = direct ? static_cast<T*>(gradient) + start : out;
    const T q_scale = kept.student_scales[start / BLOCK];
    const T* e = kept.student + start;
    const T* __restrict f = kept.teacher + start;
    if constexpr (divergence == Divergence::FORWARD_KL) {
      const T of_student = (scale.kd + shared_ce) * q_scale, of_teacher = scale.kd * kept.teacher_scales[start / BLOCK];
#pragma omp simd
      for (int i = 0; i < n; ++i) block[i] = e[i] * of_student - f[i] * of_teacher;
    } else if constexpr (divergence == Divergence::REVERSE_KL) {
      const LogNormalizer<T> normalizer(state);
      const T* s = student.block(start, n);
      const T* t = teacher.block(start, n);
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const T q = e[i] * q_scale;
        // q (x - sum q x): in this order far-apart rows do not cancel.
        const T product = q * (scale.kd * ((normalizer.log_q(s[i]) - normalizer.log_p(t[i])) - sum_v) + shared_ce);
        block[i] = q == T(0) ? T(0) : product;
      }
    } else {
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const T q = e[i] * q_scale;
        block[i] = scale.kd * (f[i] - q * sum_v) + shared_ce * q;
      }
    }
    if (separate) {
      const T* s = student.block(start, n);
#pragma omp simd
      for (int i = 0; i < n; ++i) block[i] += exp_of_nonpositive(s[i] - plain_max) * plain_scale;
    }
    if (has_ce) subtract_labels(block, start, n, scale);
    if (!direct) store_block(gradient, job.student_dtype, start, n, block);
  }
}

// The cross entropy alone on classes [begin, end), from the statistics at temperature 1.
template <typename T>
void write_plain_gradient(const KdJob& job, const Row<T>& student, const RowState<T>& state,
                          const GradientScale<T>& scale, int64_t begin, int64_t end, void* gradient, T* out) {
  const T max = state.plain.shift();
  const T share = scale.ce == T(0) ? T(0) : static_cast<T>(scale.ce / state.plain.sum);
  for (int64_t start = begin; start < end; start += BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, end - start));
    if (scale.ce == T(0)) {
      std::fill(out, out + n, T(0));
    } else {
      const T* s = student.block(start, n);
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] = exp_of_nonpositive(s[i] - max) * share;
      subtract_labels(out, start, n, scale);
    }
    store_block(gradient, job.student_dtype, start, n, out);
  }
}

// lam CE(labels) + (1 - lam) CE(partner_labels) from the log of the sum of exponentials; a term of weight 0 is not
// looked at: it may be infinite.
template <typename T, typename Logit>
MIXKD_INLINE T hard_label_loss(const GradientScale<T>& scale, T log_sum, Logit logit) {
  T total = 0;
  if (scale.lam != T(0)) total += scale.lam * (log_sum - logit(scale.label));
  if (scale.partner_label >= 0 && scale.lam != T(1))
    total += (T(1) - scale.lam) * (log_sum - logit(scale.partner_label));
  return total;
}

template <typename T>
T cross_entropy(const RowState<T>& state, const Row<T>& student, const GradientScale<T>& scale) {
  const T shift = state.plain.shift();
  return hard_label_loss(scale, static_cast<T>(std::log(state.plain.sum)),
                         [&student, shift](int64_t label) { return student.value(label) - shift; });
}

// Mean of (s - t)^2 over the classes that neither side masks; temperature and softmax have no part in it.
template <typename T>
T squared_error(const KdJob& job, const Row<T>& student, const Row<T>& teacher, int64_t& count) {
  double total = 0;
  count = 0;
  for (int64_t start = 0; start < job.num_shared; start += BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, job.num_shared - start));
    const T* s = student.block(start, n);
    const T* t = teacher.block(start, n);
    T sum = 0;
    int kept = 0;
#pragma omp simd reduction(+ : sum, kept)
    for (int i = 0; i < n; ++i) {
      const bool masked = s[i] == -INFINITE<T> || t[i] == -INFINITE<T>;
      const T difference = masked ? T(0) : s[i] - t[i];
      sum += difference * difference;
      kept += masked ? 0 : 1;
    }
    total += sum;
    count += kept;
  }
  return count == 0 ? T(0) : static_cast<T>(total / static_cast<double>(count));
}

template <typename T>
void write_squared_gradient(const KdJob& job, const Row<T>& student, const Row<T>& teacher, const RowState<T>& state,
                            const GradientScale<T>& scale, int64_t count, void* gradient, T* out) {
  const T twice = count == 0 ? T(0) : T(2) * scale.kd / static_cast<T>(count);
  const T plain_max = state.plain.shift();
  const T plain_share = scale.ce == T(0) ? T(0) : static_cast<T>(scale.ce / state.plain.sum);
  for (int64_t start = 0; start < job.num_shared; start += BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, job.num_shared - start));
    const T* s = student.block(start, n);
    const T* t = teacher.block(start, n);
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const bool masked = s[i] == -INFINITE<T> || t[i] == -INFINITE<T>;
      out[i] = masked ? T(0) : twice * (s[i] - t[i]);
    }
    if (scale.ce != T(0)) {
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] += exp_of_nonpositive(s[i] - plain_max) * plain_share;
      subtract_labels(out, start, n, scale);
    }
    store_block(gradient, job.student_dtype, start, n, out);
  }
}

// The weights of adaptive_kl from p and q [n]: distance |p - q| over the head (the likeliest classes by p, ties by
// lower index, until their mass exceeds 0.5) and over the rest.
template <typename T>
void adaptive_weights(const T* p, const T* q, int64_t n, DivergenceOptions<T>& options) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t(0));
  // A heap with the likeliest class on top: the head is often a handful of classes.
  const auto later = [p](int64_t left, int64_t right) {
    return p[left] < p[right] || (p[left] == p[right] && left > right);
  };
  std::make_heap(order.begin(), order.end(), later);
  double mass = 0, head = 0, tail = 0;
  const auto distance = [p, q](int64_t index) { return std::abs(static_cast<double>(p[index]) - q[index]); };
  auto end = order.end();
  while (mass <= 0.5 && end != order.begin()) {
    std::pop_heap(order.begin(), end, later);
    mass += p[*--end];
    head += distance(*end);
  }
  for (auto index = order.begin(); index != end; ++index) tail += distance(*index);
  const double whole = head + tail;
  options.forward_weight = whole == 0 ? T(0) : static_cast<T>(head / whole);
  options.reverse_weight = whole == 0 ? T(0) : static_cast<T>(tail / whole);
}

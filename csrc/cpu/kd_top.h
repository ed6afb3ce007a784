// One row of kd_loss with a teacher of which only K classes are known. Included after kd_wide.h, once per instruction
// set.
//
// Compared are K + 1 buckets: the K classes, and the mass of all others on both sides; or the K classes alone,
// renormalised.

template <typename T>
struct TopBuckets {
  std::vector<T> log_p, log_q, p, q, v;
};

template <typename T>
T log_sum_exp(const std::vector<T>& values) {
  const T max = *std::max_element(values.begin(), values.end());
  const T shift = max == -INFINITE<T> ? T(0) : max;
  T sum = 0;
  for (const T value : values) sum += std::exp(value - shift);
  return std::log(sum) + shift;
}

// Fills the buckets; returns the log-probability of the student's other classes (-inf if there are none).
template <typename T>
T fill_buckets(const KdJob& job, const Row<T>& student, const Row<T>& teacher, const int64_t* indices, bool with_tail,
               const RowState<T>& state, Buffers<T>& buffers, TopBuckets<T>& buckets) {
  const Softmax<T>& q = state.student;
  const T log_sum = static_cast<T>(std::log(q.sum));
  const int64_t num_top = job.num_top;
  buckets.log_p.resize(num_top);
  buckets.log_q.resize(num_top);
  for (int64_t k = 0; k < num_top; ++k) {
    buckets.log_p[k] = teacher.value(k);
    buckets.log_q[k] = (student.value(indices[k]) - q.shift()) * q.inverse_temperature - log_sum;
  }
  T log_q_rest = -INFINITE<T>;
  if (with_tail) {
    // Summed anew without the K classes: 1 - sum would cancel.
    std::vector<T>& e = buffers.wide_first;
    e.resize(job.num_classes);
    for (int64_t start = 0; start < job.num_classes; start += BLOCK) {
      const int n = static_cast<int>(std::min<int64_t>(BLOCK, job.num_classes - start));
      const T* s = student.block(start, n);
#pragma omp simd
      for (int i = 0; i < n; ++i) e[start + i] = (s[i] - q.shift()) * q.inverse_temperature - log_sum;
    }
    for (int64_t k = 0; k < num_top; ++k) e[indices[k]] = -INFINITE<T>;
    log_q_rest = log_sum_exp(e);
    const T epsilon = std::numeric_limits<T>::epsilon();
    T sum = 0;
    for (int64_t k = 0; k < num_top; ++k) sum += std::exp(buckets.log_p[k]);
    T p_rest = T(1) - sum;
    if (p_rest <= T(16) * epsilon) p_rest = log_q_rest == -INFINITE<T> ? T(0) : epsilon;
    buckets.log_p.push_back(std::log(p_rest));
    buckets.log_q.push_back(log_q_rest);
  } else {
    const T p_norm = log_sum_exp(buckets.log_p), q_norm = log_sum_exp(buckets.log_q);
    for (int64_t k = 0; k < num_top; ++k) {
      buckets.log_p[k] -= p_norm;
      buckets.log_q[k] -= q_norm;
    }
  }
  const size_t count = buckets.log_p.size();
  buckets.p.resize(count);
  buckets.q.resize(count);
  buckets.v.resize(count);
  for (size_t k = 0; k < count; ++k) {
    buckets.p[k] = std::exp(buckets.log_p[k]);
    buckets.q[k] = std::exp(buckets.log_q[k]);
  }
  return log_q_rest;
}

template <Divergence divergence, typename T>
void top_row(const KdJob& job, const JobConstants<T>& constants, int64_t r, Buffers<T>& buffers) {
  const RowSetting<T> setting(job, constants, r);
  void* gradient = job.gradient == nullptr ? nullptr : at_row(job.gradient, job.student_dtype, r, job.num_classes);
  if (write_special_row(job, r, setting, gradient, buffers)) return;
  RowState<T> state = empty_state(constants);
  const Row<T> student{at_row(job.student, job.student_dtype, r, job.student_stride), job.student_dtype,
                       buffers.student};
  const Row<T> teacher{at_row(job.teacher, job.teacher_dtype, r, job.teacher_stride), job.teacher_dtype,
                       buffers.teacher};
  const int64_t* indices = job.top_indices + r * job.num_top;
  const bool has_ce = setting.scale.ce != T(0);
  for (int64_t start = 0; start < job.num_classes; start += BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, job.num_classes - start));
    const T* s = student.block(start, n);
    state.student.add(s, n);
    if (has_ce) state.plain.add(s, n);
  }
  TopBuckets<T> buckets;
  const bool with_tail = job.tail_mass && job.num_top < job.num_classes;
  const T log_q_rest = fill_buckets(job, student, teacher, indices, with_tail, state, buffers, buckets);
  const size_t count = buckets.p.size();
  if constexpr (divergence == Divergence::ADAPTIVE_KL) {
    if (state.student.sum == state.student.sum) {
      adaptive_weights(buckets.p.data(), buckets.q.data(), static_cast<int64_t>(count), state.options);
    } else {
      state.options.forward_weight = state.options.reverse_weight = std::numeric_limits<T>::quiet_NaN();
    }
  }
  for (size_t k = 0; k < count; ++k) {
    const ClassTerms<T> terms =
        class_terms<divergence>(buckets.p[k], buckets.q[k], buckets.log_p[k], buckets.log_q[k], state.options);
    state.value += terms.value;
    state.v += terms.v;
    buckets.v[k] = terms.v;
  }
  finish_row(job, constants, r, state.value, has_ce ? cross_entropy(state, student, setting.scale) : T(0),
             setting.weight);
  if (gradient == nullptr) return;

  // A class of the last bucket takes its share of it; the K classes replace theirs; the cross entropy adds to all.
  std::vector<T>& row = buffers.wide_second;
  row.resize(job.num_classes);
  const T plain_share = has_ce ? static_cast<T>(setting.scale.ce / state.plain.sum) : T(0),
          plain_max = state.plain.shift();
  const Softmax<T>& q = state.student;
  const T log_sum = static_cast<T>(std::log(q.sum));
  const bool has_rest = with_tail && log_q_rest != -INFINITE<T>;
  const T rest_v = has_rest ? buckets.v.back() : T(0), sum_v = static_cast<T>(state.v);
  const auto rest_gradient = [&](T logit) {
    const T log_q = (logit - q.shift()) * q.inverse_temperature - log_sum;
    return setting.scale.kd * (rest_v * exp_of(log_q - log_q_rest) - exp_of(log_q) * sum_v);
  };
  for (int64_t start = 0; start < job.num_classes; start += BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, job.num_classes - start));
    const T* s = student.block(start, n);
    T* out = row.data() + start;
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = has_rest ? rest_gradient(s[i]) : T(0);
  }
  for (int64_t k = 0; k < job.num_top; ++k) {
    row[indices[k]] = setting.scale.kd * (buckets.v[k] - buckets.q[k] * sum_v);
  }
  for (int64_t start = 0; start < job.num_classes; start += BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, job.num_classes - start));
    T* out = row.data() + start;
    if (has_ce) {
      const T* s = student.block(start, n);
#pragma omp simd
      for (int i = 0; i < n; ++i) out[i] += exp_of_nonpositive(s[i] - plain_max) * plain_share;
      subtract_labels(out, start, n, setting.scale);
    }
    store_block(gradient, job.student_dtype, start, n, out);
  }
}

// Rows of kd_loss that fit into one block: every exponential is taken once and kept for the gradient. Included after
// kd_wide.h, once per instruction set.

// exp((x - max) * inverse) of n values; returns max (0 if all are masked) and sum.
template <typename T>
struct Exponentials {
  T max, sum;

  Exponentials(const T* __restrict x, int n, T inverse, T* __restrict out) {
    max = largest(x, n);
    if (max == -INFINITE<T>) max = T(0);
    const T shift = max;
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < n; ++i) {
      const T e = exp_of_nonpositive((x[i] - shift) * inverse);
      out[i] = e;
      total += e;
    }
    sum = total;
  }
};

template <Divergence divergence, typename T>
void medium_row(const KdJob& job, const JobConstants<T>& constants, int64_t r, Buffers<T>& buffers) {
  const RowSetting<T> setting(job, constants, r);
  const int64_t num_classes = job.num_classes;
  void* gradient = job.gradient == nullptr ? nullptr : at_row(job.gradient, job.student_dtype, r, num_classes);
  if (write_special_row(job, r, setting, gradient, buffers)) return;
  const int n = static_cast<int>(num_classes), shared = static_cast<int>(job.num_shared);
  const Row<T> student{at_row(job.student, job.student_dtype, r, job.student_stride), job.student_dtype,
                       buffers.student};
  const Row<T> teacher{at_row(job.teacher, job.teacher_dtype, r, job.teacher_stride), job.teacher_dtype,
                       buffers.teacher};
  const T* __restrict s = student.block(0, n);
  const T* __restrict t = teacher.block(0, shared);
  T* __restrict p = buffers.p;
  T* __restrict q = buffers.q;
  const Exponentials<T> of_student(s, shared, constants.inverse, q), of_teacher(t, shared, constants.inverse, p);
  const T s_log = std::log(of_student.sum), t_log = std::log(of_teacher.sum);
  const T s_share = T(1) / of_student.sum, t_share = T(1) / of_teacher.sum;
  const T s_max = of_student.max, t_max = of_teacher.max, inverse = constants.inverse;
  const DivergenceOptions<T> options = constants.options;
  T value = 0, sum_v = 0;
#pragma omp simd reduction(+ : value, sum_v)
  for (int i = 0; i < shared; ++i) {
    const T likely = q[i] * s_share;
    const ClassTerms<T> terms = class_terms<divergence>(p[i] * t_share, likely, (t[i] - t_max) * inverse - t_log,
                                                        (s[i] - s_max) * inverse - s_log, options);
    value += terms.value;
    sum_v += terms.v;
    p[i] = terms.v;
    q[i] = likely;
  }
  // At temperature 1 and equal width both softmaxes of the student are one.
  const bool has_ce = constants.has_ce, share_plain = has_ce && shared == n && job.temperature == 1.0;
  T ce = 0;
  T plain_share = 0;
  if (has_ce) {
    T plain_max = s_max, plain_log = s_log;
    if (share_plain) {
      plain_share = setting.scale.ce;
    } else {
      const Exponentials<T> plain(s, n, T(1), buffers.plain);
      plain_max = plain.max;
      plain_log = std::log(plain.sum);
      plain_share = setting.scale.ce / plain.sum;
    }
    ce = hard_label_loss(setting.scale, plain_log, [s, plain_max](int64_t label) { return s[label] - plain_max; });
  }
  finish_row(job, constants, r, value, ce, setting.weight);
  if (gradient == nullptr) return;
  const bool direct = stored_as<T>(job.student_dtype) && !job.in_place;
  T* __restrict out = direct ? static_cast<T*>(gradient) : buffers.out;
  const T kd = setting.scale.kd;
  const T* __restrict plain = share_plain ? q : buffers.plain;
  if (has_ce) {
#pragma omp simd
    for (int i = 0; i < shared; ++i) out[i] = kd * (p[i] - q[i] * sum_v) + plain[i] * plain_share;
    for (int i = shared; i < n; ++i) out[i] = plain[i] * plain_share;
    subtract_labels(out, 0, n, setting.scale);
  } else {
#pragma omp simd
    for (int i = 0; i < shared; ++i) out[i] = kd * (p[i] - q[i] * sum_v);
    std::fill(out + shared, out + n, T(0));
  }
  if (!direct) store_block(gradient, job.student_dtype, 0, n, out);
}

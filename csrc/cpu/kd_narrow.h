// Narrow rows of kd_loss, 16 at a time, one per vector lane: a row of 3 classes fills no vector by itself. Included
// after kd_wide.h, once per instruction set. Arrays are [class][lane].

constexpr int LANES = 16;
constexpr int64_t NARROW = 48;

template <typename T>
struct LaneBuffers {
  alignas(64) T student[NARROW][LANES], teacher[NARROW][LANES], p[NARROW][LANES], q[NARROW][LANES],
      plain[NARROW][LANES];
};

// Lanes without a row repeat the last one: their results are not written.
template <typename T, typename E, typename Convert>
void load_lanes_as(const void* data, int64_t stride, int64_t row, int lanes, int64_t classes, T (*out)[LANES],
                   Convert convert) {
  for (int lane = 0; lane < LANES; ++lane) {
    const E* values = static_cast<const E*>(data) + (row + std::min(lane, lanes - 1)) * stride;
    for (int64_t c = 0; c < classes; ++c) out[c][lane] = static_cast<T>(convert(values[c]));
  }
}

template <typename T>
void load_lanes(const void* data, Dtype dtype, int64_t stride, int64_t row, int lanes, int64_t classes,
                T (*out)[LANES]) {
  const auto same = [](auto value) { return value; };
  switch (dtype) {
    case Dtype::BF16: return load_lanes_as<T, uint16_t>(data, stride, row, lanes, classes, out, float_of_bfloat16);
    case Dtype::F16: return load_lanes_as<T, uint16_t>(data, stride, row, lanes, classes, out, float_of_half);
    case Dtype::F32: return load_lanes_as<T, float>(data, stride, row, lanes, classes, out, same);
    case Dtype::F64: return load_lanes_as<T, double>(data, stride, row, lanes, classes, out, same);
  }
}

// exp((x - max) * inverse) of every lane into `e`; maximum (0 if all are masked) and sum.
template <typename T>
void lane_exponentials(const T (*x)[LANES], int64_t classes, T inverse, T (*e)[LANES], T* __restrict max,
                       T* __restrict sum) {
#pragma omp simd
  for (int lane = 0; lane < LANES; ++lane) {
    max[lane] = -INFINITE<T>;
    sum[lane] = T(0);
  }
  for (int64_t c = 0; c < classes; ++c) {
#pragma omp simd
    for (int lane = 0; lane < LANES; ++lane) max[lane] = x[c][lane] > max[lane] ? x[c][lane] : max[lane];
  }
#pragma omp simd
  for (int lane = 0; lane < LANES; ++lane) max[lane] = max[lane] == -INFINITE<T> ? T(0) : max[lane];
  for (int64_t c = 0; c < classes; ++c) {
#pragma omp simd
    for (int lane = 0; lane < LANES; ++lane) {
      e[c][lane] = exp_of_nonpositive((x[c][lane] - max[lane]) * inverse);
      sum[lane] += e[c][lane];
    }
  }
}

// Value and sum of v of every lane; leaves v in b.p and q in b.q for the gradient. mse: v is 2 (s - t) / count, q is 0.
template <Divergence divergence, typename T>
void lane_terms(const KdJob& job, const JobConstants<T>& constants, LaneBuffers<T>& b, T* __restrict value,
                T* __restrict sum_v) {
  const int64_t classes = job.num_shared;
#pragma omp simd
  for (int lane = 0; lane < LANES; ++lane) value[lane] = sum_v[lane] = T(0);
  if constexpr (divergence == Divergence::MSE) {
    alignas(64) T count[LANES];
#pragma omp simd
    for (int lane = 0; lane < LANES; ++lane) count[lane] = T(0);
    for (int64_t c = 0; c < classes; ++c) {
#pragma omp simd
      for (int lane = 0; lane < LANES; ++lane) {
        const T s = b.student[c][lane], t = b.teacher[c][lane];
        const bool masked = s == -INFINITE<T> || t == -INFINITE<T>;
        const T difference = masked ? T(0) : s - t;
        value[lane] += difference * difference;
        count[lane] += masked ? T(0) : T(1);
        b.p[c][lane] = T(2) * difference;
        b.q[c][lane] = T(0);
      }
    }
#pragma omp simd
    for (int lane = 0; lane < LANES; ++lane) {
      count[lane] = T(1) / (count[lane] == T(0) ? T(1) : count[lane]);
      value[lane] *= count[lane];
    }
    for (int64_t c = 0; c < classes; ++c) {
#pragma omp simd
      for (int lane = 0; lane < LANES; ++lane) b.p[c][lane] *= count[lane];
    }
  } else if constexpr (divergence != Divergence::NONE) {
    alignas(64) T s_max[LANES], s_sum[LANES], t_max[LANES], t_sum[LANES], s_log[LANES], t_log[LANES];
    const T inverse = constants.inverse;
    const DivergenceOptions<T> options = constants.options;
    lane_exponentials(b.student, classes, inverse, b.q, s_max, s_sum);
    lane_exponentials(b.teacher, classes, inverse, b.p, t_max, t_sum);
    // The sums are 0 (all masked) or at least 1: log_of may be used.
#pragma omp simd
    for (int lane = 0; lane < LANES; ++lane) {
      s_log[lane] = log_of(s_sum[lane]);
      t_log[lane] = log_of(t_sum[lane]);
      s_sum[lane] = T(1) / s_sum[lane];
      t_sum[lane] = T(1) / t_sum[lane];
    }
    for (int64_t c = 0; c < classes; ++c) {
#pragma omp simd
      for (int lane = 0; lane < LANES; ++lane) {
        const T s = (b.student[c][lane] - s_max[lane]) * inverse, t = (b.teacher[c][lane] - t_max[lane]) * inverse;
        const T p = b.p[c][lane] * t_sum[lane], q = b.q[c][lane] * s_sum[lane];
        const ClassTerms<T> terms = class_terms<divergence>(p, q, t - t_log[lane], s - s_log[lane], options);
        value[lane] += terms.value;
        sum_v[lane] += terms.v;
        b.p[c][lane] = terms.v;
        b.q[c][lane] = q;
      }
    }
  }
}

template <Divergence divergence, typename T>
void narrow_group(const KdJob& job, const JobConstants<T>& constants, int64_t row, int lanes, LaneBuffers<T>& b,
                  Buffers<T>& buffers) {
  constexpr bool has_kd = divergence != Divergence::NONE;
  const int64_t classes = job.num_classes;
  alignas(64) T value[LANES], sum_v[LANES], plain_max[LANES], plain_sum[LANES], plain_log[LANES], weight[LANES];
  load_lanes(job.student, job.student_dtype, job.student_stride, row, lanes, classes, b.student);
  if (has_kd) load_lanes(job.teacher, job.teacher_dtype, job.teacher_stride, row, lanes, job.num_shared, b.teacher);
  lane_terms<divergence>(job, constants, b, value, sum_v);
  if (constants.has_ce) {
    lane_exponentials(b.student, classes, T(1), b.plain, plain_max, plain_sum);
#pragma omp simd
    for (int lane = 0; lane < LANES; ++lane) plain_log[lane] = log_of(plain_sum[lane]);
  }
  for (int lane = 0; lane < LANES; ++lane) {
    weight[lane] =
        job.row_weights == nullptr ? T(1) : static_cast<const T*>(job.row_weights)[row + std::min(lane, lanes - 1)];
  }
  // The gradient takes the place of the teacher's logits.
  if (job.gradient != nullptr) {
    const int64_t shared = has_kd ? job.num_shared : 0;
    for (int64_t c = 0; c < shared; ++c) {
#pragma omp simd
      for (int lane = 0; lane < LANES; ++lane) {
        b.teacher[c][lane] = constants.kd_gradient * weight[lane] * (b.p[c][lane] - b.q[c][lane] * sum_v[lane]);
      }
    }
    for (int64_t c = shared; c < classes; ++c) {
#pragma omp simd
      for (int lane = 0; lane < LANES; ++lane) b.teacher[c][lane] = T(0);
    }
    if (constants.has_ce) {
#pragma omp simd
      for (int lane = 0; lane < LANES; ++lane) plain_sum[lane] = constants.ce_scale * weight[lane] / plain_sum[lane];
      for (int64_t c = 0; c < classes; ++c) {
#pragma omp simd
        for (int lane = 0; lane < LANES; ++lane) b.teacher[c][lane] += plain_sum[lane] * b.plain[c][lane];
      }
    }
  }
  for (int lane = 0; lane < lanes; ++lane) {
    const int64_t r = row + lane;
    const RowSetting<T> setting(job, constants, r);
    void* gradient = job.gradient == nullptr ? nullptr : at_row(job.gradient, job.student_dtype, r, classes);
    if (write_special_row(job, r, setting, gradient, buffers)) continue;
    const T shift = plain_max[lane];
    const auto logit = [&b, lane, shift](int64_t label) { return b.student[label][lane] - shift; };
    const T ce = constants.has_ce ? hard_label_loss(setting.scale, plain_log[lane], logit) : T(0);
    finish_row(job, constants, r, value[lane], ce, setting.weight);
    if (gradient == nullptr) continue;
    const bool direct = stored_as<T>(job.student_dtype);
    T* out = direct ? static_cast<T*>(gradient) : buffers.out;
    for (int64_t c = 0; c < classes; ++c) out[c] = b.teacher[c][lane];
    subtract_labels(out, 0, static_cast<int>(classes), setting.scale);
    if (!direct) store_block(gradient, job.student_dtype, 0, static_cast<int>(classes), out);
  }
}

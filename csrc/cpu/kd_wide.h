// One wide row of kd_loss from the readings of kd_rows.h. Included after it, once per instruction set.

template <typename T>
void fill_row(const KdJob& job, void* gradient, T value, T* out) {
  std::fill(out, out + BLOCK, value);
  for (int64_t start = 0; start < job.num_classes; start += BLOCK) {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, job.num_classes - start));
    store_block(gradient, job.student_dtype, start, n, out);
  }
}

// What all rows of a job share.
template <typename T>
struct JobConstants {
  T inverse;                // 1 / temperature
  T kd_gradient, ce_scale;  // of a row of weight 1
  double kd_scale;
  bool has_ce, has_pair;
  DivergenceOptions<T> options;

  explicit JobConstants(const KdJob& job)
      : inverse(static_cast<T>(1.0 / job.temperature)),
        ce_scale(static_cast<T>(job.ce_weight * job.scale)),
        has_ce(job.ce_weight != 0 && job.labels != nullptr),
        has_pair(has_ce && job.partner_labels != nullptr) {
    // D carries tau^2 and its derivative by a logit 1 / tau; mse knows no temperature.
    const double tau = job.divergence == Divergence::MSE ? 1.0 : job.temperature;
    kd_gradient = static_cast<T>(tau * job.kd_weight * job.scale);
    kd_scale = job.divergence == Divergence::NONE ? 0.0 : tau * tau * job.kd_weight * job.scale;
    options = {static_cast<T>(job.options.beta),
               static_cast<T>(job.options.alpha),
               static_cast<T>(job.options.ab_alpha),
               static_cast<T>(job.options.ab_beta),
               job.options.detach_mixture,
               T(0),
               T(0)};
  }
};

// Weight and labels of row r.
template <typename T>
struct RowSetting {
  GradientScale<T> scale;
  T weight;
  bool dropped, invalid;

  RowSetting(const KdJob& job, const JobConstants<T>& constants, int64_t r)
      : weight(job.row_weights == nullptr ? T(1) : static_cast<const T*>(job.row_weights)[r]) {
    dropped = job.dropped(r, weight);
    invalid = !dropped && job.invalid(r);
    scale.kd = constants.kd_gradient * weight;
    scale.ce = constants.has_ce ? constants.ce_scale * weight : T(0);
    scale.label = constants.has_ce ? job.labels[r] : -1;
    scale.partner_label = constants.has_pair ? job.partner_labels[r] : -1;
    scale.lam = constants.has_pair ? static_cast<const T*>(job.lam)[r] : T(1);
  }
};

template <typename T>
RowState<T> empty_state(const JobConstants<T>& constants) {
  RowState<T> state;
  state.student.inverse_temperature = state.teacher.inverse_temperature = constants.inverse;
  state.plain.inverse_temperature = T(1);
  state.options = constants.options;
  return state;
}

inline char* at_row(void* data, Dtype dtype, int64_t row, int64_t stride) {
  return static_cast<char*>(data) + row * stride * static_cast<int64_t>(bytes_of(dtype));
}

inline const char* at_row(const void* data, Dtype dtype, int64_t row, int64_t stride) {
  return static_cast<const char*>(data) + row * stride * static_cast<int64_t>(bytes_of(dtype));
}

template <typename T>
MIXKD_INLINE void finish_row(const KdJob& job, const JobConstants<T>& constants, int64_t r, double kd, T ce, T weight) {
  job.kd[r] = constants.kd_scale == 0 ? 0.0 : constants.kd_scale * weight * kd;
  job.ce[r] = constants.has_ce ? job.ce_weight * job.scale * weight * ce : 0.0;
}

// A row that is dropped (zeros) or that names a class that is not there (NaN). Returns whether it was one.
template <typename T>
bool write_special_row(const KdJob& job, int64_t r, const RowSetting<T>& setting, void* gradient, Buffers<T>& buffers) {
  if (!setting.dropped && !setting.invalid) return false;
  const T value = setting.dropped ? T(0) : std::numeric_limits<T>::quiet_NaN();
  job.kd[r] = job.ce[r] = value;
  if (gradient != nullptr) fill_row(job, gradient, value, buffers.out);
  return true;
}

template <typename T>
void find_adaptive_weights(const KdJob& job, const Kept<T>& kept, RowState<T>& state, Buffers<T>& buffers) {
  buffers.all_p.resize(job.num_shared);
  buffers.all_q.resize(job.num_shared);
  for (int64_t c = 0; c < job.num_shared; ++c) {
    buffers.all_p[c] = kept.teacher[c] * kept.teacher_scales[c / BLOCK];
    buffers.all_q[c] = kept.student[c] * kept.student_scales[c / BLOCK];
  }
  adaptive_weights(buffers.all_p.data(), buffers.all_q.data(), job.num_shared, state.options);
}

template <Divergence divergence, typename T>
void wide_row(const KdJob& job, const JobConstants<T>& constants, int64_t r, Buffers<T>& buffers) {
  const RowSetting<T> setting(job, constants, r);
  void* gradient = job.gradient == nullptr ? nullptr : at_row(job.gradient, job.student_dtype, r, job.num_classes);
  if (write_special_row(job, r, setting, gradient, buffers)) return;
  RowState<T> state = empty_state(constants);
  const Row<T> student{at_row(job.student, job.student_dtype, r, job.student_stride), job.student_dtype,
                       buffers.student};
  const bool has_ce = setting.scale.ce != T(0);
  constexpr bool has_kd = divergence != Divergence::NONE, is_mse = divergence == Divergence::MSE;
  Row<T> teacher{nullptr, job.teacher_dtype, buffers.teacher};
  if (has_kd) teacher.data = at_row(job.teacher, job.teacher_dtype, r, job.teacher_stride);

  // At temperature 1 and equal width both softmaxes of the student are one.
  const bool same_width = job.num_shared == job.num_classes;
  const bool share_plain = has_ce && has_kd && !is_mse && same_width && job.temperature == 1.0;
  const bool along = has_ce && has_kd && !is_mse && same_width && !share_plain;
  Kept<T> kept{nullptr, nullptr, buffers.student_scales, buffers.teacher_scales};
  if constexpr (has_kd && !is_mse) {
    // The gradient's own row holds the student's exponentials where it can: one row less in the caches.
    const bool in_gradient = gradient != nullptr && stored_as<T>(job.student_dtype) && !job.in_place;
    buffers.wide_first.resize(in_gradient ? 0 : job.num_shared);
    buffers.wide_second.resize(job.num_shared);
    kept.student = in_gradient ? static_cast<T*>(gradient) : buffers.wide_first.data();
    kept.teacher = buffers.wide_second.data();
    read_statistics(job, student, teacher, divergence == Divergence::FORWARD_KL, along, state, kept);
    if constexpr (divergence == Divergence::ADAPTIVE_KL) {
      // A NaN has no order.
      if (state.student.sum == state.student.sum && state.teacher.sum == state.teacher.sum) {
        find_adaptive_weights(job, kept, state, buffers);
      } else {
        state.options.forward_weight = state.options.reverse_weight = std::numeric_limits<T>::quiet_NaN();
      }
    }
    if constexpr (divergence != Divergence::FORWARD_KL) sum_terms<divergence>(job, student, teacher, state, kept);
  }
  if (share_plain) {
    state.plain = state.student;
  } else if (has_ce && !along) {
    for (int64_t start = 0; start < job.num_classes; start += BLOCK) {
      const int n = static_cast<int>(std::min<int64_t>(BLOCK, job.num_classes - start));
      state.plain.add(student.block(start, n), n);
    }
  }
  int64_t count = 0;
  if constexpr (is_mse) state.value = squared_error(job, student, teacher, count);
  // NaN, or no class at all on one side: the whole row is NaN, also where a block is masked.
  const bool poisoned = has_kd && !is_mse && !(state.student.sum > 0 && state.teacher.sum > 0);
  if (poisoned) state.value = std::numeric_limits<double>::quiet_NaN();
  finish_row(job, constants, r, state.value, has_ce ? cross_entropy(state, student, setting.scale) : T(0),
             setting.weight);
  if (gradient == nullptr) return;
  if (poisoned) {
    fill_row(job, gradient, std::numeric_limits<T>::quiet_NaN(), buffers.out);
    return;
  }

  int64_t rest = 0;
  if constexpr (is_mse) {
    write_squared_gradient(job, student, teacher, state, setting.scale, count, gradient, buffers.out);
    rest = job.num_shared;
  } else if constexpr (has_kd) {
    write_gradient<divergence>(job, student, teacher, state, setting.scale, share_plain, kept, gradient, buffers.out);
    rest = job.num_shared;
  }
  write_plain_gradient(job, student, state, setting.scale, rest, job.num_classes, gradient, buffers.out);
}

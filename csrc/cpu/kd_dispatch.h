// From a job to the row loop of its divergence. Included last, once per instruction set.

template <Divergence divergence, typename T>
void rows_of(const KdJob& job, int64_t begin, int64_t end) {
  // Too large for the stack of a thread; not cleared, as make_unique would.
  const std::unique_ptr<Buffers<T>> buffers(new Buffers<T>);
  const JobConstants<T> constants(job);
  constexpr bool narrow_form = divergence != Divergence::ADAPTIVE_KL;
  if constexpr (narrow_form) {
    if (job.top_indices == nullptr && job.num_classes <= NARROW) {
      const std::unique_ptr<LaneBuffers<T>> lanes(new LaneBuffers<T>);
      for (int64_t row = begin; row < end; row += LANES) {
        const int count = static_cast<int>(std::min<int64_t>(LANES, end - row));
        narrow_group<divergence>(job, constants, row, count, *lanes, *buffers);
      }
      return;
    }
  }
  constexpr bool top_form = divergence != Divergence::MSE && divergence != Divergence::NONE;
  constexpr bool medium_form = top_form && divergence != Divergence::ADAPTIVE_KL;
  for (int64_t r = begin; r < end; ++r) {
    if constexpr (top_form) {
      if (job.top_indices != nullptr) {
        top_row<divergence>(job, constants, r, *buffers);
        continue;
      }
    }
    if constexpr (medium_form) {
      if (job.num_classes <= BLOCK) {
        medium_row<divergence>(job, constants, r, *buffers);
        continue;
      }
    }
    wide_row<divergence>(job, constants, r, *buffers);
  }
}

template <typename T>
void rows(const KdJob& job, int64_t begin, int64_t end) {
  switch (job.divergence) {
    case Divergence::FORWARD_KL: return rows_of<Divergence::FORWARD_KL, T>(job, begin, end);
    case Divergence::REVERSE_KL: return rows_of<Divergence::REVERSE_KL, T>(job, begin, end);
    case Divergence::JSD: return rows_of<Divergence::JSD, T>(job, begin, end);
    case Divergence::SKEW_FORWARD_KL: return rows_of<Divergence::SKEW_FORWARD_KL, T>(job, begin, end);
    case Divergence::SKEW_REVERSE_KL: return rows_of<Divergence::SKEW_REVERSE_KL, T>(job, begin, end);
    case Divergence::ALPHA_BETA: return rows_of<Divergence::ALPHA_BETA, T>(job, begin, end);
    case Divergence::ALPHA_BETA_FIRST: return rows_of<Divergence::ALPHA_BETA_FIRST, T>(job, begin, end);
    case Divergence::ALPHA_BETA_SECOND: return rows_of<Divergence::ALPHA_BETA_SECOND, T>(job, begin, end);
    case Divergence::ADAPTIVE_KL: return rows_of<Divergence::ADAPTIVE_KL, T>(job, begin, end);
    case Divergence::TVD: return rows_of<Divergence::TVD, T>(job, begin, end);
    case Divergence::MSE: return rows_of<Divergence::MSE, T>(job, begin, end);
    case Divergence::NONE: return rows_of<Divergence::NONE, T>(job, begin, end);
  }
}

inline void kd_rows(const KdJob& job, bool compute_double, int64_t begin, int64_t end) {
  if (compute_double) {
    rows<double>(job, begin, end);
  } else {
    rows<float>(job, begin, end);
  }
}

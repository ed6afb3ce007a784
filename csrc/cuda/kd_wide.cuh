// The three readings of a row from global memory, for a part of its chunks each: used by kd_wide.cu and kd_split.cu.
#pragma once

#include "kd_block.cuh"
#include "kd_launch.h"

namespace mixkd::cuda {

template <Divergence divergence, Format format>
__device__ __forceinline__ Statistics read_statistics(const Job& job, const Row<format>& row, const Readout& readout,
                                                      int from, int to) {
  constexpr bool has_teacher = divergence != Divergence::NONE;
  Statistics sums;
  if (has_teacher || readout.plain) {
    for_chunks<has_teacher>(
        row, 0, job.num_shared, from, to,
        [&](int, const float (&s)[CHUNK], const float (&t)[CHUNK]) { add_chunk<divergence>(sums, s, t, readout); });
  }
  if (readout.plain && job.num_shared < job.num_classes) {
    for_chunks<false>(row, job.num_shared, job.num_classes, from, to,
                      [&](int, const float (&s)[CHUNK], const float (&t)[CHUNK]) {
                        add_chunk<Divergence::NONE>(sums, s, t, readout);
                      });
  }
  return sums;
}

// Where there are registers for the next chunk; in fp32 it takes twice as many.
template <Divergence divergence, Format format>
constexpr bool FETCHES_AHEAD = format != Format::MIXED && !(format == Format::F32 && needs_terms(divergence));

template <Divergence divergence, Format format>
__device__ __forceinline__ TermSums read_terms(const Job& job, const Row<format>& row, const Factors& factors, int from,
                                               int to) {
  TermSums sums;
  for_chunks<true, format, FETCHES_AHEAD<divergence, format>>(
      row, 0, job.num_shared, from, to,
      [&](int, const float (&s)[CHUNK], const float (&t)[CHUNK]) { add_terms<divergence>(sums, s, t, factors); });
  return sums;
}

template <Divergence divergence, Format format>
__device__ __forceinline__ void write_gradient(const Job& job, const Row<format>& row, const Factors& factors,
                                               bool plain, int from, int to) {
  for_chunks<divergence != Divergence::NONE, format, FETCHES_AHEAD<divergence, format>>(
      row, 0, job.num_shared, from, to, [&](int start, const float (&s)[CHUNK], const float (&t)[CHUNK]) {
        float out[CHUNK];
        chunk_gradient<divergence>(s, t, factors, plain, start, out);
        put(row.gradient, row.student_dtype(), row.gradient_aligned, start, 0, job.num_shared, out);
      });
  if (job.num_shared < job.num_classes) {
    for_chunks<false>(row, job.num_shared, job.num_classes, from, to,
                      [&](int start, const float (&s)[CHUNK], const float (&t)[CHUNK]) {
                        float out[CHUNK];
                        chunk_gradient<Divergence::NONE>(s, t, factors, plain, start, out);
                        put(row.gradient, row.student_dtype(), row.gradient_aligned, start, job.num_shared,
                            job.num_classes, out);
                      });
  }
}

}  // namespace mixkd::cuda

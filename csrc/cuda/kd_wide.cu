// kd_loss for rows of some thousand classes: one block per row. The second (and third) reading finds the row in L2, as
// only as many rows are at work as blocks fit on the GPU. Takes any dtypes, widths, strides and alignments.
#include "kd_adaptive.cuh"
#include "kd_wide.cuh"

namespace mixkd::cuda {
namespace {

constexpr int MAX_THREADS = 256;
constexpr int ALL_CHUNKS = 0x7fffffff;

template <Format format>
__device__ __forceinline__ void find_adaptive_weights(const Job& job, const Row<format>& row, BlockGroup& group,
                                                      Factors& factors) {
  const auto visit = [&](const auto& body) {
    // The counts of the search need the registers of a chunk fetched ahead.
    for_chunks<true, format, false>(row, 0, job.num_shared, 0, ALL_CHUNKS,
                                    [&](int start, const float (&s)[CHUNK], const float (&t)[CHUNK]) {
#pragma unroll
                                      for (int i = 0; i < CHUNK; ++i) {
                                        const Pair c = pair_of(s[i], t[i], factors);
                                        body(start + i, c.p, c.q);
                                      }
                                    });
  };
  set_adaptive_weights(visit, group, factors.t_share, job.num_shared, factors.options);
}

template <Divergence divergence, Format format>
__global__ void __launch_bounds__(MAX_THREADS, 2) row_kernel(const __grid_constant__ Job job) {
  __shared__ __align__(16) float scratch[2 * MAX_WARPS * 8];
  BlockGroup group{scratch};
  const float scale = scale_of(divisor_of(job));
  const Readout readout = readout_of<divergence>(job);
  for (int64_t index = blockIdx.x; index < job.num_rows; index += gridDim.x) {
    const RowSetting setting = row_setting(job, index);
    const Row<format> row = row_of<format>(job, index);
    if (setting.special) {
      if (threadIdx.x == 0) write_special(job, index, setting.special_value);
      if (row.gradient != nullptr) fill_gradient(row, job.num_classes, 0, ALL_CHUNKS, setting.special_value);
      continue;
    }
    const float row_scale = scale * setting.weight;
    Statistics sums = read_statistics<divergence>(job, row, readout, 0, ALL_CHUNKS);
    group.merge<divergence>(sums, readout);
    Factors factors = make_factors<divergence>(sums, job, setting, readout, row_scale);
    TermSums terms = terms_of<divergence>(sums, factors);
    if constexpr (divergence == Divergence::ADAPTIVE_KL) find_adaptive_weights(job, row, group, factors);
    if constexpr (needs_terms(divergence)) terms = group.sum(read_terms<divergence>(job, row, factors, 0, ALL_CHUNKS));
    set_terms(factors, terms);
    if (threadIdx.x == 0) write_losses<divergence>(job, index, sums, terms, setting, readout, row_scale);
    if (row.gradient != nullptr) write_gradient<divergence>(job, row, factors, readout.plain, 0, ALL_CHUNKS);
  }
}

template <Divergence divergence, Format format>
void launch(const Job& job, cudaStream_t stream) {
  // Two chunks per thread and reading, so that narrower rows do not leave most of a block idle.
  const int wanted = (job.num_classes / CHUNK / 2 + 127) / 128 * 128;
  const int threads = wanted < 128 ? 128 : (wanted > MAX_THREADS ? MAX_THREADS : wanted);
  const int64_t blocks = job.num_rows < 0x7fffffff ? job.num_rows : 0x7fffffff;
  row_kernel<divergence, format><<<static_cast<unsigned>(blocks), threads, 0, stream>>>(job);
}

}  // namespace

void launch_wide(const Job& job, cudaStream_t stream) {
  for_divergence(job.divergence, [&](auto divergence) {
    for_format(job, [&](auto format) { launch<decltype(divergence)::value, decltype(format)::value>(job, stream); });
  });
  check_launch("kd_loss of wide rows");
}

}  // namespace mixkd::cuda

// Launches of kd_loss for narrow rows: how many threads a row gets.
#include "kd_narrow.cuh"
#include "kd_totals.cuh"

namespace mixkd::cuda {
namespace {

constexpr int THREADS = 256;
// A call this small is one block: its losses are summed in the same launch.
constexpr int64_t ONE_BLOCK_LOGITS = 4096;
// The divisor of more rows than this, or found by so many blocks that they read more rows than this together, takes
// longer than a launch.
constexpr int64_t COUNTED_IN_PLACE = 8192;
constexpr int64_t COUNTED_BY_ALL_BLOCKS = 1 << 20;

// Threads of a row.
constexpr int lanes_of(int num_classes) { return num_classes <= 4 ? 1 : (num_classes <= 32 ? 8 : 32); }

int64_t num_blocks(const Job& job, int lanes) {
  if (job.num_rows * job.num_classes <= ONE_BLOCK_LOGITS) return 1;
  const int rows = THREADS / lanes;
  const int64_t wanted = (job.num_rows + rows - 1) / rows;
  return wanted < 0x7fffffff ? wanted : 0x7fffffff;
}

// Blocks of a multiprocessor for which the registers suffice; left to itself, the compiler spills a few of them.
constexpr int blocks_of(Divergence divergence, int each) {
  if (each == 4) return 3;
  const bool many_registers = divergence == Divergence::JSD || divergence == Divergence::ADAPTIVE_KL;
  return each == 16 && !many_registers ? 2 : 1;
}

template <Divergence divergence, int LANES, int EACH>
__global__ void __launch_bounds__(THREADS, blocks_of(divergence, EACH))
    narrow_kernel(const __grid_constant__ Job job, bool count_rows, const __grid_constant__ Totals totals) {
  __shared__ double scratch[MAX_WARPS];
  constexpr int ROWS = THREADS / LANES;
  LaneGroup<LANES> group;
  const float scale = scale_of(count_rows ? kept_weight(job, scratch) : divisor_of(job));
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * ROWS + threadIdx.x / LANES; row < job.num_rows;
       row += static_cast<int64_t>(gridDim.x) * ROWS) {
    narrow_row<divergence, LANES, EACH>(job, row, scale, group);
  }
  if (totals.loss == nullptr) return;
  // One block: it has written all rows.
  __syncthreads();
  const RowTotals found = row_totals(job.kd, job.ce, job.num_rows, scratch);
  if (threadIdx.x != 0) return;
  *totals.kd = found.kd;
  *totals.ce = found.ce;
  *totals.loss = found.kd + found.ce;
}

template <Divergence divergence, int LANES, int EACH>
void launch(const Job& job, bool count_rows, Totals& totals, cudaStream_t stream) {
  const int64_t blocks = num_blocks(job, LANES);
  if (blocks != 1) totals = Totals{};
  narrow_kernel<divergence, LANES, EACH>
      <<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(job, count_rows, totals);
}

}  // namespace

bool narrow_counts_rows(const Job& job) {
  return job.num_classes <= NARROW && job.num_rows <= COUNTED_IN_PLACE &&
         num_blocks(job, lanes_of(job.num_classes)) * job.num_rows <= COUNTED_BY_ALL_BLOCKS;
}

bool launch_narrow(const Job& job, bool count_rows, const Totals& wanted, cudaStream_t stream) {
  Totals totals = wanted;
  for_divergence(job.divergence, [&](auto divergence) {
    constexpr Divergence kind = decltype(divergence)::value;
    if (lanes_of(job.num_classes) == 1) return launch<kind, 1, 4>(job, count_rows, totals, stream);
    if (lanes_of(job.num_classes) == 8) return launch<kind, 8, 4>(job, count_rows, totals, stream);
    if (job.num_classes <= 128) return launch<kind, 32, 4>(job, count_rows, totals, stream);
    if (job.num_classes <= 512) return launch<kind, 32, 16>(job, count_rows, totals, stream);
    launch<kind, 32, 32>(job, count_rows, totals, stream);
  });
  check_launch("kd_loss of narrow rows");
  return totals.loss != nullptr;
}

}  // namespace mixkd::cuda

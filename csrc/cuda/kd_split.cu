// kd_loss for very wide rows: several blocks per row, so that the second reading of a row follows its first soon enough
// to find it in L2.
//
// The work is cut into items: a part of a row and one of its readings. Persistent blocks draw items in order by ticket.
// Step i of the order holds the first reading of row i, then (where a divergence needs it) the middle reading of row i
// - lag, then the writing of row i - 2 lag. An item waits until all parts of its row have finished the reading before;
// those have smaller tickets, so whoever holds the smallest unfinished ticket never waits and there is no deadlock,
// however few blocks run.
#include "kd_wide.cuh"

namespace mixkd::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int BLOCKS_PER_MULTIPROCESSOR = 2;
// Bytes of a part's student and teacher together: 8 chunks per thread of a 16-bit dtype.
constexpr int PART_BYTES = 64 * 1024;

// Zeroed before the launch but for the partial results.
struct Workspace {
  unsigned long long* ticket;
  unsigned* statistics_done;  // [N] parts that finished
  unsigned* terms_done;       // [N]
  Statistics* statistics;     // [N, parts]
  TermSums* terms;            // [N, parts]
};

struct Plan {
  int parts, lag;
  int64_t num_tickets;
};

int num_readings(const Job& job) { return needs_terms(job.divergence) ? 3 : 2; }

int num_parts(const Job& job) {
  const int pair = bytes_of(job.student_dtype) + (job.teacher == nullptr ? 0 : bytes_of(job.teacher_dtype));
  const int classes = PART_BYTES / pair;
  return (job.num_classes + classes - 1) / classes;
}

size_t zeroed_bytes(const Job& job) {
  return (16 + 2 * static_cast<size_t>(job.num_rows) * sizeof(unsigned) + 31) / 32 * 32;
}

__device__ __forceinline__ void wait_for(const unsigned* done, unsigned parts) {
  if (threadIdx.x == 0) {
    unsigned now;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(done) : "memory");
      if (now < parts) __nanosleep(32);
    } while (now < parts);
  }
  __syncthreads();
}

// After the part's result was written by this same thread.
__device__ __forceinline__ void report_done(unsigned* done) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(done) : "memory");
}

// All parts' statistics in every thread of the block; read past L1, which may hold an older state of the memory.
template <Divergence divergence>
__device__ __forceinline__ Statistics gather_statistics(const Statistics* parts, int count, const Readout& readout) {
  Statistics sums;
  for (int part = threadIdx.x % WARP; part < count; part += WARP) {
    const float4* source = reinterpret_cast<const float4*>(parts + part);
    const float4 low = __ldcg(source), high = __ldcg(source + 1);
    merge<divergence>(sums, Statistics{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}, readout);
  }
  warp_merge<divergence>(sums, readout);
  return sums;
}

__device__ __forceinline__ TermSums gather_terms(const TermSums* parts, int count) {
  float value = 0.0f, v = 0.0f;
  for (int part = threadIdx.x % WARP; part < count; part += WARP) {
    const float2 both = __ldcg(reinterpret_cast<const float2*>(parts + part));
    value += both.x;
    v += both.y;
  }
  return {warp_sum(value), warp_sum(v)};
}

template <Divergence divergence, Format format>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)
    split_kernel(const __grid_constant__ Job job, const __grid_constant__ Workspace workspace,
                 const __grid_constant__ Plan plan) {
  constexpr int READINGS = needs_terms(divergence) ? 3 : 2;
  __shared__ __align__(16) float scratch[2 * MAX_WARPS * 8];
  __shared__ unsigned long long drawn;
  BlockGroup group{scratch};
  const Readout readout = readout_of<divergence>(job);
  const float scale = scale_of(divisor_of(job));
  if (threadIdx.x == 0) drawn = atomicAdd(workspace.ticket, 1ull);
  __syncthreads();
  while (true) {
    const int64_t ticket = static_cast<int64_t>(drawn);
    if (ticket >= plan.num_tickets) return;
    // Everybody has read `drawn`; the next ticket is on its way while this item is worked on.
    __syncthreads();
    unsigned long long next = 0;
    if (threadIdx.x == 0) next = atomicAdd(workspace.ticket, 1ull);

    const int per_step = READINGS * plan.parts;
    const int64_t step = ticket / per_step;
    const int within = static_cast<int>(ticket - step * per_step);
    const int reading = within / plan.parts, part = within - reading * plan.parts;
    const int64_t index = step - static_cast<int64_t>(reading) * plan.lag;
    if (index >= 0 && index < job.num_rows) {
      const RowSetting setting = row_setting(job, index);
      const Row<format> row = row_of<format>(job, index);
      const int num_chunks = row.chunks.last(job.num_classes);
      const int from = static_cast<int>(static_cast<int64_t>(num_chunks) * part / plan.parts);
      const int to = static_cast<int>(static_cast<int64_t>(num_chunks) * (part + 1) / plan.parts);
      const float row_scale = scale * setting.weight;
      Statistics* statistics = workspace.statistics + index * plan.parts;
      TermSums* terms = workspace.terms + index * plan.parts;
      if (setting.special) {
        if (reading == READINGS - 1) {
          if (part == 0 && threadIdx.x == 0) write_special(job, index, setting.special_value);
          if (row.gradient != nullptr) fill_gradient(row, job.num_classes, from, to, setting.special_value);
        }
      } else if (reading == 0) {
        Statistics sums = read_statistics<divergence>(job, row, readout, from, to);
        group.merge<divergence>(sums, readout);
        if (threadIdx.x == 0) {
          statistics[part] = sums;
          report_done(workspace.statistics_done + index);
        }
      } else if (READINGS == 3 && reading == 1) {
        wait_for(workspace.statistics_done + index, plan.parts);
        const Statistics sums = gather_statistics<divergence>(statistics, plan.parts, readout);
        const Factors factors = make_factors<divergence>(sums, job, setting, readout, row_scale);
        const TermSums found = group.sum(read_terms<divergence>(job, row, factors, from, to));
        if (threadIdx.x == 0) {
          terms[part] = found;
          report_done(workspace.terms_done + index);
        }
      } else if (part == 0 || row.gradient != nullptr) {
        wait_for((READINGS == 3 ? workspace.terms_done : workspace.statistics_done) + index, plan.parts);
        const Statistics sums = gather_statistics<divergence>(statistics, plan.parts, readout);
        Factors factors = make_factors<divergence>(sums, job, setting, readout, row_scale);
        const TermSums found = READINGS == 3 ? gather_terms(terms, plan.parts) : terms_of<divergence>(sums, factors);
        set_terms(factors, found);
        if (part == 0 && threadIdx.x == 0)
          write_losses<divergence>(job, index, sums, found, setting, readout, row_scale);
        if (row.gradient != nullptr) write_gradient<divergence>(job, row, factors, readout.plain, from, to);
      }
    }
    if (threadIdx.x == 0) drawn = next;
    __syncthreads();
  }
}

template <Divergence divergence, Format format>
void launch(const Job& job, const DeviceLimits& limits, const Workspace& workspace, int parts, cudaStream_t stream) {
  const int blocks = limits.num_multiprocessors * BLOCKS_PER_MULTIPROCESSOR, readings = num_readings(job);
  // Far enough behind that the blocks at work do not wait for each other, near enough to be found in L2.
  const int lag = (blocks + readings * parts - 1) / (readings * parts) + 1;
  const int64_t steps = job.num_rows + static_cast<int64_t>(readings - 1) * lag;
  const Plan plan{parts, lag, steps * readings * parts};
  split_kernel<divergence, format><<<blocks, THREADS, 0, stream>>>(job, workspace, plan);
}

}  // namespace

bool split_takes(const Job& job) { return job.divergence != Divergence::ADAPTIVE_KL && num_parts(job) >= 3; }

size_t split_workspace_bytes(const Job& job) {
  return zeroed_bytes(job) +
         static_cast<size_t>(job.num_rows) * num_parts(job) * (sizeof(Statistics) + sizeof(TermSums));
}

void launch_split(const Job& job, const DeviceLimits& limits, void* memory, cudaStream_t stream) {
  const int parts = num_parts(job);
  char* bytes = static_cast<char*>(memory);
  Workspace workspace;
  workspace.ticket = reinterpret_cast<unsigned long long*>(bytes);
  workspace.statistics_done = reinterpret_cast<unsigned*>(bytes + 16);
  workspace.terms_done = workspace.statistics_done + job.num_rows;
  workspace.statistics = reinterpret_cast<Statistics*>(bytes + zeroed_bytes(job));
  workspace.terms = reinterpret_cast<TermSums*>(workspace.statistics + job.num_rows * parts);
  check_cuda(cudaMemsetAsync(memory, 0, zeroed_bytes(job), stream), "kd_loss workspace");
  for_divergence(job.divergence, [&](auto divergence) {
    for_format(job, [&](auto format) {
      constexpr Divergence kind = decltype(divergence)::value;
      // Its head is searched for by one block: kd_wide.cu.
      if constexpr (kind != Divergence::ADAPTIVE_KL)
        launch<kind, decltype(format)::value>(job, limits, workspace, parts, stream);
    });
  });
  check_launch("kd_loss of very wide rows");
}

}  // namespace mixkd::cuda

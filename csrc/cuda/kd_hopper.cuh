// kd_loss on Hopper (sm_90 and later): every logit is read from device memory once.
//
// A cluster of blocks takes a row pair, each block a slice of it, in shared memory. Bulk copies bring the slices of
// later rows while the statistics of this one are gathered; blocks exchange their partial sums through each other's
// shared memory; the gradient replaces the student's slice and leaves by bulk store.
//
// Buffers ("stages") go round: kept row k (dropped ones are not counted) uses stage k % stages and is the (k /
// stages)-th use of that stage's mbarrier. After the first exchange of row k all threads of the block are done with row
// k - 1; thread 0 waits until its store has been read out and starts the load of row k - 1 + stages into the same
// stage.
//
// A slice may start off a 16-byte boundary: then whole 16-byte pieces are loaded, with the neighbours' classes masked,
// and the classes of pieces that the row shares with its neighbours are stored one by one. The first and the last row
// have no neighbour on one side: their shared pieces are loaded one by one too.
#pragma once

#include "kd_block.cuh"
#include "kd_cluster.cuh"
#include "kd_launch.h"

namespace mixkd::cuda {

// Threads of a multiprocessor: in one block, or in two of half as many.
constexpr int CLUSTER_THREADS = 512;
constexpr int MAX_CLUSTER = 8;
constexpr int MAX_STAGES = 3;
// Barriers, then two exchange areas of one Statistics per warp of the cluster; stages start after it.
constexpr int EXCHANGE_BYTES = MAX_CLUSTER * (CLUSTER_THREADS / WARP) * static_cast<int>(sizeof(Statistics));
constexpr int HEADER_BYTES = 128 + 2 * EXCHANGE_BYTES;

struct ClusterPlan {
  int stages;
  uint32_t slice_bytes;  // room for one side of a slice; a multiple of 128
  bool overlapping;      // rows start less than 16 bytes apart: each may be the first and the last
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Whether the 16-byte pieces at a row's ends may reach beyond the memory of its tensor.
__device__ __forceinline__ bool is_edge(const Job& job, const ClusterPlan& plan, int64_t row) {
  return row == 0 || row == job.num_rows - 1 || plan.overlapping;
}

__device__ __forceinline__ const char* boundary_before(const char* address) {
  return address - (reinterpret_cast<uintptr_t>(address) & 15);
}

// One side of a chunk in shared memory; classes outside the row as -infinity.
template <Format format>
__device__ __forceinline__ void read_chunk(const char* stage, const Slice& slice, int chunk, int num_classes,
                                           float (&out)[CHUNK]) {
  constexpr Dtype dtype = static_cast<Dtype>(format);
  Packed packed;
  const uint4* source =
      reinterpret_cast<const uint4*>(stage + static_cast<uint32_t>((chunk - slice.from) * CHUNK * bytes_of(dtype)));
  const uint4 low = source[0];
  packed.words[0] = low.x, packed.words[1] = low.y, packed.words[2] = low.z, packed.words[3] = low.w;
  if constexpr (dtype == Dtype::F32) {
    const uint4 high = source[1];
    packed.words[4] = high.x, packed.words[5] = high.y, packed.words[6] = high.z, packed.words[7] = high.w;
  }
  unpack(packed, dtype, out);
  const int start = slice.chunks.start_of(chunk);
  if (start < 0 || start + CHUNK > num_classes) mask_outside(out, start, 0, num_classes);
}

// Calls body(chunk, s, t) for this thread's chunks of the slice.
template <Format format, int threads, bool with_teacher, typename Body>
__device__ __forceinline__ void for_slice(const char* student, const char* teacher, const Slice& slice, int num_classes,
                                          const Body& body) {
  for (int chunk = slice.from + static_cast<int>(threadIdx.x); chunk < slice.to; chunk += threads) {
    float s[CHUNK], t[CHUNK];
    read_chunk<format>(student, slice, chunk, num_classes, s);
    if constexpr (with_teacher) {
      read_chunk<format>(teacher, slice, chunk, num_classes, t);
    } else {
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) t[i] = -INFINITE;
    }
    body(chunk, s, t);
  }
}

// Partial results of all warps of the cluster, brought to all of them. Two areas in turn: a block that runs ahead
// writes the next exchange while others still read this one, and the one after only once these have passed the barrier
// in between.
template <int warps>
struct Exchange {
  Statistics* areas;  // [2][MAX_CLUSTER * warps], shared
  uint32_t rank, size;
  int area = 0;

  __device__ __forceinline__ const Statistics* all_to_all(const Statistics& part) {
    Statistics* own = areas + area * MAX_CLUSTER * warps;
    area ^= 1;
    const uint32_t lane = threadIdx.x % WARP;
    Statistics* slot = own + rank * warps + threadIdx.x / WARP;
    if (lane < size) {
      store_remote(slot, lane, part.student_max, part.student_sum, part.teacher_max, part.teacher_sum);
      store_remote(reinterpret_cast<float*>(slot) + 4, lane, part.plain_max, part.plain_sum, part.cross, part.count);
    }
    cluster_sync();
    return own;
  }

  template <Divergence divergence>
  __device__ __forceinline__ void merge_all(Statistics& sums, const Readout& readout) {
    warp_merge<divergence>(sums, readout);
    const Statistics* parts = all_to_all(sums);
    merge_parts<divergence, MAX_CLUSTER * warps / WARP>(sums, parts, static_cast<int>(size) * warps, readout);
  }

  __device__ __forceinline__ void sum_all(TermSums& terms) {
    Statistics part;
    part.cross = warp_sum(terms.value);
    part.count = warp_sum(terms.v);
    const Statistics* parts = all_to_all(part);
    float value = 0.0f, v = 0.0f;
    for (uint32_t i = threadIdx.x % WARP; i < size * warps; i += WARP) {
      value += parts[i].cross;
      v += parts[i].count;
    }
    terms = {warp_sum(value), warp_sum(v)};
  }
};

// Thread 0's view of the loads: which row comes next and how many have been started.
template <Divergence divergence, Format format>
struct Loader {
  const Job& job;
  const ClusterPlan& plan;
  uint64_t* barriers;
  char* stages;
  uint32_t rank, size;
  int64_t row, row_stride;
  RowInputs inputs;  // of `row`, read one load ahead so that nobody waits for them
  uint32_t started = 0;

  __device__ __forceinline__ void look() {
    if (row < job.num_rows) inputs = row_inputs(job, row);
  }

  __device__ __forceinline__ void start_next() {
    while (row < job.num_rows && row_setting(job, inputs).special) {
      row += row_stride;
      look();
    }
    if (row >= job.num_rows) return;
    const uint32_t stage = started % plan.stages;
    const Row<format> place = row_of<format>(job, row);
    const Slice slice = slice_of(place.chunks.lead, place.student_dtype(), job.num_classes, rank, size);
    const bool edge = is_edge(job, plan, row);
    const uint32_t begin = edge ? slice.own_begin : slice.begin, end = edge ? slice.own_end : slice.end;
    const uint32_t bytes = end > begin ? end - begin : 0;
    constexpr uint32_t sides = divergence == Divergence::NONE ? 1 : 2;
    char* student = stages + stage * sides * plan.slice_bytes + (begin - slice.begin);
    barrier_expect(barriers + stage, sides * bytes);
    if (bytes != 0) {
      bulk_load(student, boundary_before(place.student) + begin, bytes, barriers + stage);
      if (sides == 2)
        bulk_load(student + plan.slice_bytes, boundary_before(place.teacher) + begin, bytes, barriers + stage);
    }
    ++started;
    row += row_stride;
    look();
  }
};

// The gradient of a slice: over the student's slice in shared memory, and straight to memory where a piece is not the
// row's alone.
template <Divergence divergence, Format format, int threads>
__device__ __forceinline__ void write_slice(char* student, const char* teacher, const Slice& slice,
                                            const Row<format>& row, int num_classes, const Factors& factors,
                                            bool plain) {
  constexpr Dtype dtype = static_cast<Dtype>(format);
  for_slice<format, threads, divergence != Divergence::NONE>(
      student, teacher, slice, num_classes, [&](int chunk, const float (&s)[CHUNK], const float (&t)[CHUNK]) {
        float out[CHUNK];
        const int start = slice.chunks.start_of(chunk);
        chunk_gradient<divergence>(s, t, factors, plain, start, out);
        const Packed packed = pack(out, dtype);
        uint4* target =
            reinterpret_cast<uint4*>(student + static_cast<uint32_t>((chunk - slice.from) * CHUNK * bytes_of(dtype)));
        target[0] = make_uint4(packed.words[0], packed.words[1], packed.words[2], packed.words[3]);
        if constexpr (dtype == Dtype::F32)
          target[1] = make_uint4(packed.words[4], packed.words[5], packed.words[6], packed.words[7]);
        if (start < 0 || start + CHUNK > num_classes) put(row.gradient, dtype, false, start, 0, num_classes, out);
      });
  fence_before_bulk_copy();
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t begin = slice.own_begin, end = slice.own_end;
    if (end > begin) {
      bulk_store(row.gradient - slice.chunks.lead * bytes_of(dtype) + begin, student + (begin - slice.begin),
                 end - begin);
      bulk_commit();
    }
  }
}

#endif

template <Divergence divergence, Format format, int threads>
__global__ void __launch_bounds__(threads, CLUSTER_THREADS / threads)
    cluster_kernel(const __grid_constant__ Job job, const __grid_constant__ ClusterPlan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char memory[];
  constexpr bool has_teacher = divergence != Divergence::NONE;
  uint64_t* barriers = reinterpret_cast<uint64_t*>(memory);
  char* stages = memory + HEADER_BYTES;
  const uint32_t rank = cluster_rank(), size = cluster_size();
  Exchange<threads / WARP> exchange{reinterpret_cast<Statistics*>(memory + 128), rank, size};
  const int64_t first_row = blockIdx.x / size, row_stride = gridDim.x / size;
  Loader<divergence, format> loader{job, plan, barriers, stages, rank, size, first_row, row_stride};
  const int num_classes = job.num_classes;
  const Readout readout = readout_of<divergence>(job);
  const float scale = scale_of(divisor_of(job));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < plan.stages; ++stage) barrier_init(barriers + stage);
    fence_barrier_init();
  }
  // Also: no block writes into another one that has not started.
  cluster_sync();
  if (threadIdx.x == 0) {
    loader.look();
    for (int i = 0; i + 1 < plan.stages; ++i) loader.start_next();
  }

  uint32_t stage = 0, parity = 0;
  RowInputs next = first_row < job.num_rows ? row_inputs(job, first_row) : RowInputs{};
  for (int64_t index = first_row; index < job.num_rows; index += row_stride) {
    const RowSetting setting = row_setting(job, next);
    if (index + row_stride < job.num_rows) next = row_inputs(job, index + row_stride);
    const Row<format> row = row_of<format>(job, index);
    const Slice slice = slice_of(row.chunks.lead, row.student_dtype(), num_classes, rank, size);
    if (setting.special) {
      if (rank == 0 && threadIdx.x == 0) write_special(job, index, setting.special_value);
      if (row.gradient != nullptr) fill_gradient(row, num_classes, slice.from, slice.to, setting.special_value);
      continue;
    }
    char* student = stages + stage * (has_teacher ? 2 : 1) * plan.slice_bytes;
    char* teacher = student + plan.slice_bytes;
    const float row_scale = scale * setting.weight;
    barrier_wait(barriers + stage, parity);
    if (is_edge(job, plan, index)) {
      load_ends(student, row.student, row.student_dtype(), slice, num_classes, threadIdx.x, threads);
      if (has_teacher) load_ends(teacher, row.teacher, row.teacher_dtype(), slice, num_classes, threadIdx.x, threads);
      fence_before_bulk_copy();
      __syncthreads();
    }
    Statistics sums;
    for_slice<format, threads, has_teacher>(
        student, teacher, slice, num_classes,
        [&](int, const float (&s)[CHUNK], const float (&t)[CHUNK]) { add_chunk<divergence>(sums, s, t, readout); });
    exchange.template merge_all<divergence>(sums, readout);
    if (threadIdx.x == 0) {
      bulk_wait_read();
      loader.start_next();
    }
    Factors factors = make_factors<divergence>(sums, job, setting, readout, row_scale);
    TermSums terms = terms_of<divergence>(sums, factors);
    if constexpr (needs_terms(divergence)) {
      for_slice<format, threads, true>(
          student, teacher, slice, num_classes,
          [&](int, const float (&s)[CHUNK], const float (&t)[CHUNK]) { add_terms<divergence>(terms, s, t, factors); });
      exchange.sum_all(terms);
    }
    set_terms(factors, terms);
    // The last warp has a chunk less to work on than the first, if anything.
    if (rank == 0 && threadIdx.x == threads - 1)
      write_losses<divergence>(job, index, sums, terms, setting, readout, row_scale);
    if (row.gradient != nullptr) {
      write_slice<divergence, format, threads>(student, teacher, slice, row, num_classes, factors, readout.plain);
    }
    if (++stage == static_cast<uint32_t>(plan.stages)) {
      stage = 0;
      parity ^= 1;
    }
  }
  if (threadIdx.x == 0) bulk_wait();
  // Nobody leaves while its shared memory may be written to.
  cluster_sync();
#endif
}

}  // namespace mixkd::cuda

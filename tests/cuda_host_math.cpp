// One row of kd_loss as the CUDA cluster kernel works on it, played through on the host: slices of the row are copied
// with their neighbours' bytes, threads and blocks are loops. Built and called by test_cuda_host_math.py.
#include <cstring>
#include <utility>
#include <vector>

#include "cuda/kd_adaptive.cuh"

using namespace mixkd;
using namespace mixkd::cuda;

namespace {

// One thread that holds everything: what it found is the sum.
struct OneThread {
  template <int count>
  void sum(float (&)[count]) {}
};

void read_chunk(const std::vector<char>& shared, const Slice& slice, int chunk, Dtype dtype, int end,
                float (&out)[CHUNK]) {
  Packed packed;
  std::memcpy(&packed, shared.data() + (chunk - slice.from) * CHUNK * bytes_of(dtype), CHUNK * bytes_of(dtype));
  unpack(packed, dtype, out);
  mask_outside(out, slice.chunks.start_of(chunk), 0, end);
}

// A slice as the copy engine brings it, with its neighbours' bytes; an edge row's ends come class by class.
std::vector<char> load_slice(const Job& job, const void* row, const Slice& slice, uint32_t size, int threads,
                             bool is_edge) {
  std::vector<char> room(slice_room(job.student_dtype, job.num_classes, size), '\xff');
  const uint32_t begin = is_edge ? slice.own_begin : slice.begin, end = is_edge ? slice.own_end : slice.end;
  const char* boundary = static_cast<const char*>(row) - slice.chunks.lead * bytes_of(job.student_dtype);
  if (end > begin && end - slice.begin <= room.size()) {
    std::memcpy(room.data() + (begin - slice.begin), boundary + begin, end - begin);
  }
  for (int thread = 0; is_edge && thread < threads; ++thread) {
    load_ends(room.data(), row, job.student_dtype, slice, job.num_classes, thread, threads);
  }
  return room;
}

template <Divergence divergence>
void play_row(Job job, uint32_t size, int threads, bool is_edge, float* losses) {
  const RowSetting setting = row_setting(job, int64_t(0));
  const Readout readout = readout_of<divergence>(job);
  const Dtype dtype = job.student_dtype;
  const int lead = lead_of(job.student, dtype), bytes = bytes_of(dtype), num_classes = job.num_classes;
  char* gradient = static_cast<char*>(job.gradient) - lead * bytes;
  std::vector<Slice> slices;
  std::vector<std::vector<char>> shared_student, shared_teacher;
  Statistics sums;
  for (uint32_t rank = 0; rank < size; ++rank) {
    const Slice slice = slice_of(lead, dtype, num_classes, rank, size);
    slices.push_back(slice);
    shared_student.push_back(load_slice(job, job.student, slice, size, threads, is_edge));
    shared_teacher.push_back(load_slice(job, job.teacher, slice, size, threads, is_edge));
    for (int thread = 0; thread < threads; ++thread) {
      Statistics part;
      for (int chunk = slice.from + thread; chunk < slice.to; chunk += threads) {
        float s[CHUNK], t[CHUNK];
        read_chunk(shared_student.back(), slice, chunk, dtype, num_classes, s);
        read_chunk(shared_teacher.back(), slice, chunk, dtype, num_classes, t);
        add_chunk<divergence>(part, s, t, readout);
      }
      merge<divergence>(sums, part, readout);
    }
  }
  Factors factors = make_factors<divergence>(sums, job, setting, readout, 1.0f);
  const auto for_all = [&](const auto& body) {
    for (uint32_t rank = 0; rank < size; ++rank) {
      for (int chunk = slices[rank].from; chunk < slices[rank].to; ++chunk) {
        float s[CHUNK], t[CHUNK];
        read_chunk(shared_student[rank], slices[rank], chunk, dtype, num_classes, s);
        read_chunk(shared_teacher[rank], slices[rank], chunk, dtype, num_classes, t);
        body(rank, chunk, s, t);
      }
    }
  };
  if constexpr (divergence == Divergence::ADAPTIVE_KL) {
    OneThread group;
    const auto visit = [&](const auto& body) {
      for_all([&](uint32_t rank, int chunk, const float (&s)[CHUNK], const float (&t)[CHUNK]) {
        for (int i = 0; i < CHUNK; ++i) {
          const Pair c = pair_of(s[i], t[i], factors);
          body(slices[rank].chunks.start_of(chunk) + i, c.p, c.q);
        }
      });
    };
    set_adaptive_weights(visit, group, factors.t_share, num_classes, factors.options);
  }
  TermSums terms = terms_of<divergence>(sums, factors);
  if constexpr (needs_terms(divergence)) {
    for_all([&](uint32_t, int, const float (&s)[CHUNK], const float (&t)[CHUNK]) {
      add_terms<divergence>(terms, s, t, factors);
    });
  }
  set_terms(factors, terms);
  const float first = job.labels == nullptr ? 0.0f : load_value(job.student, dtype, setting.label);
  const float second = setting.partner_label < 0 ? 0.0f : load_value(job.student, dtype, setting.partner_label);
  losses[0] = job.kd_value_weight * terms.value;
  losses[1] = job.ce_weight == 0.0f ? 0.0f : job.ce_weight * cross_entropy(sums, setting, readout, first, second);
  for_all([&](uint32_t rank, int chunk, const float (&s)[CHUNK], const float (&t)[CHUNK]) {
    const int start = slices[rank].chunks.start_of(chunk);
    float out[CHUNK];
    chunk_gradient<divergence>(s, t, factors, readout.plain, start, out);
    const Packed packed = pack(out, dtype);
    std::memcpy(shared_student[rank].data() + (chunk - slices[rank].from) * CHUNK * bytes, &packed, CHUNK * bytes);
    if (start >= 0 && start + CHUNK <= num_classes) return;
    for (int i = 0; i < CHUNK; ++i) {
      if (start + i >= 0 && start + i < num_classes) store_value(job.gradient, dtype, start + i, out[i]);
    }
  });
  for (uint32_t rank = 0; rank < size; ++rank) {
    const Slice& slice = slices[rank];
    if (slice.own_end <= slice.own_begin) continue;
    std::memcpy(gradient + slice.own_begin, shared_student[rank].data() + (slice.own_begin - slice.begin),
                slice.own_end - slice.own_begin);
  }
}

template <int... numbers>
void dispatch(int divergence, const Job& job, uint32_t size, int threads, bool is_edge, float* losses,
              std::integer_sequence<int, numbers...>) {
  ((divergence == numbers ? play_row<static_cast<Divergence>(numbers)>(job, size, threads, is_edge, losses) : void()),
   ...);
}

}  // namespace

extern "C" void kd_row(const void* student, const void* teacher, void* gradient, int dtype, int num_classes,
                       int divergence, float temperature, const float* options, const int64_t* labels,
                       const int64_t* partner_labels, const float* lam, float ce_weight, int size, int threads,
                       int is_edge, float* losses) {
  Job job{};
  job.student = student;
  job.teacher = teacher;
  job.gradient = gradient;
  job.labels = labels;
  job.partner_labels = partner_labels;
  job.lam = lam;
  job.ignore_index = -100;
  job.num_classes = job.num_shared = num_classes;
  job.student_dtype = job.teacher_dtype = static_cast<Dtype>(dtype);
  job.temperature = temperature;
  job.options = {options[0], options[1], options[2], options[3], options[4] != 0.0f, 0.0f, 0.0f};
  job.divergence = effective_divergence(static_cast<Divergence>(divergence), job.options);
  const float power = job.divergence == Divergence::MSE ? 1.0f : temperature;
  job.kd_value_weight = power * power;
  job.kd_gradient_weight = power;
  job.ce_weight = ce_weight;
  dispatch(static_cast<int>(job.divergence), job, static_cast<uint32_t>(size), threads, is_edge != 0, losses,
           std::make_integer_sequence<int, 9>{});
}

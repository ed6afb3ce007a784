// The head of adaptive_kl: the smallest set of likeliest classes by p with mass above 0.5, ties by lower class index.
//
// No sort: the smallest p of the head is found three bits at a time from the mass of {p >= threshold}, and among its
// ties the last class in the head likewise. A `Visit` calls a function with (class, p, q) for the classes that a thread
// holds; a `Group` adds up what the threads of a row found. Also compiles for the host: tests/test_cuda_host_math.py.
#pragma once

#include "kd_row_math.cuh"

namespace mixkd::cuda {

constexpr int SEARCH_BITS = 3;
constexpr int SEARCH_WAYS = (1 << SEARCH_BITS) - 1;

// The largest value of num_bits bits for which the count from it on is still `enough`, as for every smaller value.
// tally(base, shift, out) adds this thread's part of the count at base + ((j + 1) << shift) to out[j].
template <typename Tally, typename Enough, typename Group>
MIXKD_INLINE uint32_t search_bits(int num_bits, const Tally& tally, const Enough& enough, Group& group) {
  uint32_t found = 0;
  for (int shift = (num_bits - 1) / SEARCH_BITS * SEARCH_BITS; shift >= 0; shift -= SEARCH_BITS) {
    float counts[SEARCH_WAYS] = {};
    tally(found, shift, counts);
    group.template sum<SEARCH_WAYS>(counts);
    int passed = 0;
#pragma unroll
    for (int j = 0; j < SEARCH_WAYS; ++j) passed += enough(counts[j]) ? 1 : 0;
    found += static_cast<uint32_t>(passed) << shift;
  }
  return found;
}

// Sets the weights of KL(p || q) and KL(q || p): the distance |p - q| over head and tail, as shares. p_max: about the
// largest p.
template <typename Visit, typename Group>
MIXKD_INLINE void set_adaptive_weights(const Visit& visit, Group& group, float p_max, int num_classes,
                                       DivergenceOptions<float>& options) {
  const auto bits_of = [](float p) { return static_cast<uint32_t>(bits_of_float(p)); };
  // A class well above 0.5 is the head alone. p_max is rounded otherwise than the p of its class: hence the margin.
  uint32_t threshold = bits_of(0.5f);
  if (!(p_max > 0.51f)) {
    threshold = search_bits(
        30,
        [&](uint32_t base, int shift, float (&counts)[SEARCH_WAYS]) {
          visit([&](int, float p, float) {
#pragma unroll
            for (uint32_t j = 0; j < SEARCH_WAYS; ++j) counts[j] += bits_of(p) >= base + ((j + 1) << shift) ? p : 0.0f;
          });
        },
        [](float mass) { return mass > 0.5f; }, group);
  }
  float above_and_ties[2] = {0.0f, 0.0f};
  visit([&](int, float p, float) {
    above_and_ties[0] += bits_of(p) > threshold ? p : 0.0f;
    above_and_ties[1] += bits_of(p) == threshold ? 1.0f : 0.0f;
  });
  group.template sum<2>(above_and_ties);
  const float smallest = float_of_bits(static_cast<int32_t>(threshold));
  const float needed = smallest > 0.0f ? floorf((0.5f - above_and_ties[0]) / smallest) + 1.0f : above_and_ties[1];
  uint32_t last_tie = static_cast<uint32_t>(num_classes);
  if (needed < above_and_ties[1]) {
    int num_bits = 1;
    while (num_bits < 31 && (num_classes >> num_bits) != 0) ++num_bits;
    // The largest class with fewer than `needed` ties before it is the last tie of the head.
    last_tie = search_bits(
        num_bits,
        [&](uint32_t base, int shift, float (&counts)[SEARCH_WAYS]) {
          visit([&](int index, float p, float) {
#pragma unroll
            for (uint32_t j = 0; j < SEARCH_WAYS; ++j) {
              const bool before = static_cast<uint32_t>(index) < base + ((j + 1) << shift);
              counts[j] += before && bits_of(p) == threshold ? 1.0f : 0.0f;
            }
          });
        },
        [needed](float ties) { return ties < needed; }, group);
  }
  float distances[2] = {0.0f, 0.0f};
  visit([&](int index, float p, float q) {
    const bool in_head =
        bits_of(p) > threshold || (bits_of(p) == threshold && static_cast<uint32_t>(index) <= last_tie);
    const float distance = fabsf(p - q);
    distances[0] += in_head ? distance : 0.0f;
    distances[1] += in_head ? 0.0f : distance;
  });
  group.template sum<2>(distances);
  const float whole = distances[0] + distances[1];
  // Also where the whole is NaN: then so are both.
  options.forward_weight = whole == 0.0f ? 0.0f : distances[0] / whole;
  options.reverse_weight = whole == 0.0f ? 0.0f : distances[1] / whole;
}

}  // namespace mixkd::cuda

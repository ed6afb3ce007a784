// mixkd_fast._host: from the lengths of rows to batches of near-equal padded size. No torch.
//
// The plan is a pure function of its arguments, the same on every platform: mixkd_fast/data/length_batches.py defines
// it and holds the same steps in numpy. Legend: N rows, a pool of rows not yet in a batch, groups of batches.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

using Rows = std::vector<int64_t>;
using Lengths = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

constexpr uint64_t GOLDEN = 0x9e3779b97f4a7c15u;
enum Purpose : uint64_t { ROWS, GROUPS, BATCHES };

// The output function of splitmix64.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// 0 .. count - 1 in an order that depends on the stream alone: sorted by one random number each.
Rows permutation(uint64_t seed, uint64_t epoch, Purpose purpose, int64_t first, int64_t count) {
  const uint64_t stream = mix(mix(mix(seed + GOLDEN) + epoch) + purpose);
  std::vector<std::pair<uint64_t, int64_t>> keys(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    keys[static_cast<size_t>(i)] = {mix(stream + (static_cast<uint64_t>(first + i) + 1) * GOLDEN), i};
  }
  std::sort(keys.begin(), keys.end());
  Rows order(keys.size());
  std::transform(keys.begin(), keys.end(), order.begin(), [](const auto& key) { return key.second; });
  return order;
}

struct Planner {
  const int32_t* lengths;
  int64_t num_rows, tokens_per_batch, rows_per_batch, window, pad_multiple, group_size;  // 0: no such limit
  bool drop_last;
  uint64_t seed, epoch;
  Rows pool = {}, order = {}, ends = {};  // ends: of every batch in `order`

  int64_t width(int64_t row) const { return (lengths[row] + pad_multiple - 1) / pad_multiple * pad_multiple; }

  bool fits(int64_t rows, int64_t width) const {
    return (rows_per_batch == 0 || rows <= rows_per_batch) &&
           (tokens_per_batch == 0 || rows * width <= tokens_per_batch);
  }

  // The pool from the shortest row to the longest; equally long ones stay in their order.
  void sort_pool() {
    std::vector<uint64_t> keys(pool.size());
    for (size_t i = 0; i < pool.size(); ++i) keys[i] = static_cast<uint64_t>(lengths[pool[i]]) << 32 | i;
    std::sort(keys.begin(), keys.end());
    Rows sorted(pool.size());
    for (size_t i = 0; i < pool.size(); ++i) sorted[i] = pool[keys[i] & 0xffffffffu];
    pool.swap(sorted);
  }

  // Where the batches of the sorted pool end: each takes as many rows as it may.
  Rows cut_pool() const {
    Rows cuts;
    const int64_t size = static_cast<int64_t>(pool.size());
    for (int64_t begin = 0; begin < size;) {
      int64_t end = begin + 1;
      while (end < size && fits(end - begin + 1, width(pool[static_cast<size_t>(end)]))) ++end;
      cuts.push_back(end);
      begin = end;
    }
    return cuts;
  }

  void emit(const Rows& cuts, size_t num_batches) {
    const int64_t base = static_cast<int64_t>(order.size());
    for (size_t i = 0; i < num_batches; ++i) ends.push_back(base + cuts[i]);
    const auto taken = pool.begin() + (num_batches == 0 ? 0 : cuts[num_batches - 1]);
    order.insert(order.end(), pool.begin(), taken);
    pool.erase(pool.begin(), taken);
  }

  // Halves the batch of most rows until there are group_size of them, or none has two rows.
  void split(Rows& cuts) const {
    while (static_cast<int64_t>(cuts.size()) < group_size) {
      size_t largest = 0;
      int64_t most = 0;
      for (size_t i = 0; i < cuts.size(); ++i) {
        const int64_t rows = cuts[i] - (i == 0 ? 0 : cuts[i - 1]);
        if (rows > most) largest = i, most = rows;
      }
      if (most < 2) return;
      cuts.insert(cuts.begin() + static_cast<int64_t>(largest), cuts[largest] - most / 2);
    }
  }

  void plan() {
    const Rows shuffled = permutation(seed, epoch, ROWS, 0, num_rows);
    // Where the rest is known beforehand it is random rows; what sorting leaves are the longest ones, every epoch.
    const bool known = drop_last && tokens_per_batch == 0;
    const int64_t num_taken = known ? num_rows - num_rows % (rows_per_batch * group_size) : num_rows;
    for (int64_t start = 0, end = 0; start < num_taken; start = end) {
      // At least as many as are left over: what waits for a whole group is not sorted again for every few rows.
      end = std::min(start + std::max(window, static_cast<int64_t>(pool.size())), num_taken);
      pool.insert(pool.end(), shuffled.begin() + start, shuffled.begin() + end);
      sort_pool();
      const Rows cuts = cut_pool();
      const int64_t last_rows = cuts.back() - (cuts.size() < 2 ? 0 : cuts[cuts.size() - 2]);
      const bool is_full = !fits(last_rows + 1, width(pool.back()));
      const int64_t complete = static_cast<int64_t>(cuts.size()) - (is_full ? 0 : 1);
      emit(cuts, static_cast<size_t>(complete / group_size * group_size));
    }
    if (!pool.empty() && !drop_last) {
      Rows cuts = cut_pool();
      split(cuts);
      emit(cuts, cuts.size());
    }
  }

  // Groups change places, then the batches within each; an incomplete last group stays last.
  Rows shuffle(Rows& offsets) const {
    const int64_t num_batches = static_cast<int64_t>(ends.size()), num_groups = num_batches / group_size;
    Rows batches;
    const Rows groups = permutation(seed, epoch, GROUPS, 0, num_groups);
    for (int64_t place = 0; place * group_size < num_batches; ++place) {
      const int64_t first = (place < num_groups ? groups[static_cast<size_t>(place)] : place) * group_size;
      const int64_t count = std::min(group_size, num_batches - first);
      for (const int64_t batch : permutation(seed, epoch, BATCHES, first, count)) batches.push_back(first + batch);
    }
    Rows result;
    result.reserve(order.size());
    offsets.assign(1, 0);
    for (const int64_t batch : batches) {
      const int64_t begin = batch == 0 ? 0 : ends[static_cast<size_t>(batch - 1)];
      result.insert(result.end(), order.begin() + begin, order.begin() + ends[static_cast<size_t>(batch)]);
      offsets.push_back(static_cast<int64_t>(result.size()));
    }
    return result;
  }
};

py::array_t<int64_t> to_array(const Rows& rows) {
  py::array_t<int64_t> array(static_cast<py::ssize_t>(rows.size()));
  if (!rows.empty()) std::memcpy(array.mutable_data(), rows.data(), rows.size() * sizeof(int64_t));
  return array;
}

py::tuple plan_batches(const Lengths& lengths, int64_t tokens_per_batch, int64_t rows_per_batch, int64_t window,
                       int64_t pad_multiple, int64_t group_size, bool drop_last, uint64_t seed, uint64_t epoch) {
  if (lengths.ndim() != 1) throw py::value_error("lengths must be one-dimensional");
  if (window < 1 || pad_multiple < 1 || group_size < 1) {
    throw py::value_error("window, pad_multiple and group_size must be at least 1");
  }
  Planner planner{lengths.data(), lengths.size(), tokens_per_batch, rows_per_batch, window,
                  pad_multiple,   group_size,     drop_last,        seed,           epoch};
  Rows order, offsets;
  {
    const py::gil_scoped_release release;
    planner.plan();
    order = planner.shuffle(offsets);
  }
  return py::make_tuple(to_array(order), to_array(offsets));
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Batch planning on the host; the face is mixkd_fast.data.length_batches.";
  m.def("plan_batches", &plan_batches, py::arg("lengths"), py::arg("tokens_per_batch"), py::arg("rows_per_batch"),
        py::arg("window"), py::arg("pad_multiple"), py::arg("group_size"), py::arg("drop_last"), py::arg("seed"),
        py::arg("epoch"));
}

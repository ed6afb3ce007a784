// mixkd_fast._host: from the lengths of rows to batches of near-equal padded size. No torch.
//
// The plan is a pure function of its arguments, the same on every platform: mixkd_fast/data/length_batches.py defines
// it and holds the same steps in numpy. Legend: N rows, a pool of rows not yet in a batch, groups of batches.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

using Rows = std::vector<int64_t>;
using Lengths = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

constexpr uint64_t GOLDEN = 0x9e3779b97f4a7c15u;
// Batches are filled to so many 1024ths of the budget; in sums of 1 / rows, one is 2^20.
constexpr int64_t FULL = 1024, ONE = 1 << 20, GROUPS_PER_WINDOW = 16;
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

// The rows of a sorted window by how many of them a batch may have whose longest they are.
struct Rooms {
  Rows of_row = {};

  // Where a batch ends that begins at each row, filled to fill / FULL but for its one row.
  Rows ends(int64_t fill) const {
    const int64_t size = static_cast<int64_t>(of_row.size());
    Rows result(of_row.size());
    for (int64_t begin = 0, end = 0; begin < size; ++begin) {
      end = std::max(end, begin + 1);
      while (end < size && end - begin + 1 <= of_row[static_cast<size_t>(end)] * fill / FULL) ++end;
      result[static_cast<size_t>(begin)] = end;
    }
    return result;
  }

  static Rows greedy(const Rows& ends, int64_t begin = 0) {
    Rows cuts;
    while (begin < static_cast<int64_t>(ends.size())) cuts.push_back(begin = ends[static_cast<size_t>(begin)]);
    return cuts;
  }

  int64_t num_batches(int64_t fill) const { return static_cast<int64_t>(greedy(ends(fill)).size()); }

  int64_t groups_of(int64_t group_size) const { return (num_batches(FULL) + group_size - 1) / group_size; }

  // Where num_batches batches end that are filled alike; as many as full batches or more, up to one for each row.
  Rows even_cuts(int64_t wanted) const {
    int64_t fill = 0;
    for (int64_t above = FULL; fill < above;) {
      const int64_t middle = (fill + above) / 2;
      if (num_batches(middle) <= wanted) {
        above = middle;
      } else {
        fill = middle + 1;
      }
    }
    Rows cuts = greedy(ends(fill));
    if (static_cast<int64_t>(cuts.size()) < wanted) cuts = between(fill, wanted);
    if (cuts.size() > 1) {
      // The last one is what is left: it takes of the one before it, up to half of both.
      const int64_t end = cuts.back(), both = end - (cuts.size() > 2 ? cuts[cuts.size() - 3] : 0);
      int64_t& before = cuts[cuts.size() - 2];
      before = std::min(before, end - std::min(both / 2, std::max<int64_t>(of_row.back() * fill / FULL, 1)));
    }
    return cuts;
  }

  // `fill` gives less than `wanted`, the one below it more: the first batches by one and the others by the other are
  // between, and one batch more by the tighter gives no or one batch more.
  Rows between(int64_t fill, int64_t wanted) const {
    const Rows looser = ends(fill), tighter = ends(fill - 1);
    Rows left(of_row.size() + 1, 0), cuts;
    for (size_t begin = of_row.size(); begin-- > 0;) left[begin] = 1 + left[static_cast<size_t>(looser[begin])];
    int64_t begin = 0;
    while (static_cast<int64_t>(cuts.size()) + left[static_cast<size_t>(begin)] < wanted) {
      cuts.push_back(begin = tighter[static_cast<size_t>(begin)]);
    }
    const Rows others = greedy(looser, begin);
    cuts.insert(cuts.end(), others.begin(), others.end());
    return cuts;
  }
};

struct Planner {
  const int32_t* lengths;
  int64_t num_rows, tokens_per_batch, rows_per_batch, window, pad_multiple, group_size;  // 0: no such limit
  bool drop_last;
  uint64_t seed, epoch;
  Rows pool = {}, order = {}, ends = {};  // ends: of every batch in `order`

  int64_t width(int64_t row) const { return (lengths[row] + pad_multiple - 1) / pad_multiple * pad_multiple; }

  // Rows of a batch whose longest is this one.
  int64_t room(int64_t row) const {
    const int64_t most = rows_per_batch == 0 ? num_rows : std::min(num_rows, rows_per_batch);
    return std::clamp<int64_t>(tokens_per_batch / width(row), 1, most);
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

  void plan_rows(const Rows& shuffled) {
    // The rest is random rows; what sorting leaves are the longest ones, every epoch.
    const int64_t num_taken = drop_last ? num_rows - num_rows % (rows_per_batch * group_size) : num_rows;
    Rows cuts;
    for (int64_t start = 0, end = 0; start < num_taken; start = end) {
      // At least as many as are left over: what waits for a whole group is not sorted again for every few rows.
      end = std::min(start + std::max(window, static_cast<int64_t>(pool.size())), num_taken);
      pool.insert(pool.end(), shuffled.begin() + start, shuffled.begin() + end);
      sort_pool();
      cuts.clear();
      const int64_t complete = static_cast<int64_t>(pool.size()) / rows_per_batch / group_size * group_size;
      for (int64_t batch = 1; batch <= complete; ++batch) cuts.push_back(batch * rows_per_batch);
      emit(cuts, cuts.size());
    }
    if (pool.empty() || drop_last) return;
    cuts.clear();
    const int64_t size = static_cast<int64_t>(pool.size());
    for (int64_t cut = rows_per_batch; cut < size; cut += rows_per_batch) cuts.push_back(cut);
    cuts.push_back(size);
    split(cuts);
    emit(cuts, cuts.size());
  }

  void plan_tokens(const Rows& shuffled) {
    int64_t about = 0;
    for (int64_t row = 0; row < num_rows; ++row) about += ONE / room(row);
    const int64_t num_windows =
        std::max<int64_t>(1, std::min(num_rows / window, about / ONE / group_size / GROUPS_PER_WINDOW));
    const auto bound = [&](int64_t place) {
      return place == num_windows ? num_rows : num_rows / group_size * place / num_windows * group_size;
    };
    for (int64_t place = 0; place < num_windows; ++place) {
      const int64_t start = bound(place);
      int64_t end = bound(place + 1);
      Rooms rooms = take(shuffled, start, end);
      Rows rest;
      if (rooms.groups_of(group_size) * group_size > end - start) {
        // Not a row for every batch, which only the last window can come to: random rows are left.
        const int64_t left = (end - start) % group_size;
        rest.assign(shuffled.begin() + end - left, shuffled.begin() + end);
        end -= left;
        rooms = take(shuffled, start, end);
      }
      emit_groups(rooms.even_cuts(rooms.groups_of(group_size) * group_size));
      if (drop_last) continue;
      for (const int64_t row : rest) order.push_back(row), ends.push_back(static_cast<int64_t>(order.size()));
    }
  }

  // A window becomes the pool, sorted.
  Rooms take(const Rows& shuffled, int64_t start, int64_t end) {
    pool.assign(shuffled.begin() + start, shuffled.begin() + end);
    sort_pool();
    Rooms rooms;
    for (const int64_t row : pool) rooms.of_row.push_back(room(row));
    return rooms;
  }

  // Deals batches to groups from the shortest to the longest, one to each group in turn, the one of fewest rows to the
  // group that has most so far.
  void emit_groups(const Rows& cuts) {
    const size_t num_groups = cuts.size() / static_cast<size_t>(group_size);
    const auto begin_of = [&](size_t batch) { return batch == 0 ? 0 : cuts[batch - 1]; };
    Rows rows(num_groups, 0);
    std::vector<size_t> dealt(cuts.size()), fewest_first(num_groups), most_first(num_groups);
    for (size_t turn = 0; turn < static_cast<size_t>(group_size); ++turn) {
      const auto size_of = [&](size_t i) { return cuts[turn * num_groups + i] - begin_of(turn * num_groups + i); };
      std::iota(fewest_first.begin(), fewest_first.end(), size_t{0});
      std::iota(most_first.begin(), most_first.end(), size_t{0});
      std::stable_sort(fewest_first.begin(), fewest_first.end(),
                       [&](size_t a, size_t b) { return size_of(a) < size_of(b); });
      std::stable_sort(most_first.begin(), most_first.end(), [&](size_t a, size_t b) { return rows[a] > rows[b]; });
      for (size_t i = 0; i < num_groups; ++i) {
        dealt[most_first[i] * static_cast<size_t>(group_size) + turn] = turn * num_groups + fewest_first[i];
        rows[most_first[i]] += size_of(fewest_first[i]);
      }
    }
    for (const size_t batch : dealt) {
      order.insert(order.end(), pool.begin() + begin_of(batch), pool.begin() + cuts[batch]);
      ends.push_back(static_cast<int64_t>(order.size()));
    }
    pool.clear();
  }

  void plan() {
    const Rows shuffled = permutation(seed, epoch, ROWS, 0, num_rows);
    if (tokens_per_batch != 0) {
      plan_tokens(shuffled);
    } else {
      plan_rows(shuffled);
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
  if (tokens_per_batch < 0 || rows_per_batch < 0 || tokens_per_batch + rows_per_batch == 0) {
    throw py::value_error("tokens_per_batch or rows_per_batch must be at least 1");
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

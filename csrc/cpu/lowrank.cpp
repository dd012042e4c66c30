#include "lowrank.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace soco::cpu {
namespace {

// Memory of a thread that is kept from call to call: a fresh piece of this size would be given
// back to the system and faulted in again every time.
enum Use { kX, kZ, kProducts, kValues, kGates, kUses };
template <typename A>
A* scratch(Use use, int64_t count) {
  thread_local std::vector<A> kept[kUses];
  if (static_cast<int64_t>(kept[use].size()) < count) kept[use].resize(count);
  return kept[use].data();
}

// What a task works on: some rows of down, or some outputs of a member.
struct Range {
  size_t member;
  int64_t begin, end;
};

// Cuts `rows` into a few ranges per thread, so that a slow one is made up for; but into none that
// is too small to be worth handing over.
void add_ranges(std::vector<Range>& tasks, size_t member, int64_t rows, int64_t row_bytes,
                int threads) {
  constexpr int64_t kPiece = 48;  // rows that the row kernels work through together
  constexpr int64_t kRangesPerThread = 4;
  const int64_t ranges = threads < 2 ? 1 : threads * kRangesPerThread;
  const int64_t least = rows_per_task(row_bytes), even = (rows + ranges - 1) / ranges;
  const int64_t step = ((even < least ? least : even) + kPiece - 1) / kPiece * kPiece;
  for (int64_t begin = 0; begin < rows; begin += step)
    tasks.push_back({member, begin, rows - begin < step ? rows : begin + step});
}

// Not more threads than have enough to do: handing over takes a few microseconds, and far more
// where somebody else uses the other cores.
int threads_for(const LowRankGroup& group, int most) {
  constexpr int64_t kProductsPerThread = 1 << 16;
  int64_t products = 0;
  for (const Member& member : group.members)
    products += member.rank * (group.in + member.rows) * group.tokens;
  return static_cast<int>(
      std::min<int64_t>(most, std::max<int64_t>(1, products / kProductsPerThread)));
}

int64_t bytes_of(Dtype dtype) {
  int64_t bytes = 0;
  visit_weight(dtype, [&](auto* tag) { bytes = sizeof(*tag); });
  return bytes;
}

template <typename T>
class Run {
  using A = Accumulate<T>;

 public:
  Run(const LowRankGroup& group, int threads)
      : g_(group),
        threads_(threads_for(group, threads)),
        weight_bytes_(bytes_of(group.weight_dtype)),
        z_(static_cast<A*>(group.z)) {
    int64_t outs = 0;
    for (const Member& member : g_.members) {
      z_columns_.push_back(ranks_);
      columns_.push_back(outs);
      ranks_ += member.rank;
      outs += member.out;
    }
    width_ = g_.gated ? g_.members[0].out : outs;
    add_ranges(down_tasks_, 0, ranks_, g_.in * weight_bytes_, threads_);
    if (g_.gated) {
      const int64_t inner = g_.members[0].rank + g_.members[1].rank;
      add_ranges(up_tasks_, 0, width_, inner * weight_bytes_, threads_);
    } else {
      for (size_t m = 0; m < g_.members.size(); ++m)
        add_ranges(up_tasks_, m, g_.members[m].out, g_.members[m].rank * weight_bytes_, threads_);
    }
  }

  void operator()() {
    if constexpr (std::is_same_v<T, A>) {
      x_ = static_cast<const A*>(g_.x);
    } else {
      A* const wide = scratch<A>(kX, g_.tokens * g_.in);
      at_level([&](auto level) { widen_row<level()>(g_.x, wide, g_.tokens * g_.in, g_.dtype); });
      x_ = wide;
    }
    if (z_ == nullptr) z_ = scratch<A>(kZ, g_.tokens * ranks_);
    two_phases(
        threads_, static_cast<int64_t>(down_tasks_.size()), static_cast<int64_t>(up_tasks_.size()),
        [this](int64_t task) { reduce(down_tasks_[task]); },
        [this](int64_t task) { expand(up_tasks_[task]); });
  }

 private:
  // z[:, rows of the range]
  void reduce(const Range& range) const {
    A* const z = z_ + range.begin;
    const int64_t rows = range.end - range.begin;
    products(x_, g_.in, g_.in, g_.down, range.begin, rows, g_.in, z, ranks_);
    if (g_.down_scale)
      for (int64_t t = 0; t < g_.tokens; ++t)
        for (int64_t r = 0; r < rows; ++r) z[t * ranks_ + r] *= g_.down_scale[range.begin + r];
  }

  // y[:, outputs of the range]
  void expand(const Range& range) const {
    const int64_t columns = range.end - range.begin, count = g_.tokens * columns;
    A* const values = scratch<A>(kValues, count);
    outputs(range.member, range.begin, range.end, values);
    if (g_.gated) {
      A* const factors = scratch<A>(kGates, count);
      outputs(1, range.begin, range.end, factors);
      at_level([&](auto level) { gate_rows<level()>(values, factors, count, g_.dtype); });
    }
    const int64_t first = (g_.gated ? 0 : columns_[range.member]) + range.begin;
    for (int64_t t = 0; t < g_.tokens; ++t)
      for (int64_t i = 0; i < columns; ++i) {
        const int64_t at = t * width_ + first + i;
        A value = values[t * columns + i];
        if (g_.residual) value += widen(static_cast<const T*>(g_.residual)[at]);
        static_cast<T*>(g_.y)[at] = narrow<T>(value);
      }
  }

  // Outputs begin .. end-1 of a member with its bias: (tokens, end - begin).
  void outputs(size_t number, int64_t begin, int64_t end, A* out) const {
    const Member& member = g_.members[number];
    const int64_t columns = end - begin, rank = member.rank;
    const A* const z = z_ + z_columns_[number];
    const int64_t* const sources = member.sources ? member.sources + begin : nullptr;
    int64_t first = begin, rows = columns;  // the rows of up that these outputs are made of
    if (sources) {
      int64_t i = 0;
      while (i < columns && sources[i] < rank) ++i;
      // Sources that are wrong give wrong outputs, but nothing outside of up and z is read.
      first = i < columns ? std::min(sources[i] - rank, member.rows) : 0;
      rows = 0;
      for (; i < columns; ++i) rows += sources[i] >= rank;
      rows = std::min(rows, member.rows - first);
    }
    A* const dots = scratch<A>(kProducts, g_.tokens * rows);
    products(z, ranks_, rank, member.up, first, rows, member.stride, dots, rows);
    if (member.up_scale)
      for (int64_t t = 0; t < g_.tokens; ++t)
        for (int64_t r = 0; r < rows; ++r) dots[t * rows + r] *= member.up_scale[first + r];
    const T* bias = static_cast<const T*>(g_.bias);
    if (bias) bias += columns_[number] + begin;
    for (int64_t t = 0; t < g_.tokens; ++t) {
      const A* const row = dots + t * rows;
      A* const to = out + t * columns;
      if (sources)
        gather(sources, columns, z + t * ranks_, rank, row, rows, first, to);
      else
        std::copy(row, row + columns, to);
      if (bias)
        for (int64_t i = 0; i < columns; ++i) to[i] += widen(bias[i]);
    }
  }

  // to[i] = cat(z, (rows of nothing up to first,) dots)[sources[i]]. Which of the two an output
  // comes from is as good as random, so that a branch for it would be guessed wrong half of the
  // times: both places are computed, and one is read.
  static void gather(const int64_t* sources, int64_t columns, const A* z, int64_t rank,
                     const A* dots, int64_t rows, int64_t first, A* to) {
    static const A nothing = 0;
    if (rank == 0) z = &nothing;
    if (rows == 0) dots = &nothing;
    const int64_t last_z = std::max<int64_t>(rank - 1, 0), last = std::max<int64_t>(rows - 1, 0);
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t source = std::min(std::max<int64_t>(sources[i], 0), rank + first + last);
      const A* const in_z = z + std::min(source, last_z);
      const A* const in_dots = dots + std::max<int64_t>(source - rank - first, 0);
      to[i] = *(source < rank ? in_z : in_dots);
    }
  }

  void products(const A* x, int64_t x_stride, int64_t inner, const void* weight, int64_t first,
                int64_t rows, int64_t w_stride, A* dots, int64_t dots_stride) const {
    const void* const begin = static_cast<const char*>(weight) + first * w_stride * weight_bytes_;
    at_level([&](auto level) {
      dot_rows<level()>(x, begin, dots, g_.tokens, inner, rows, x_stride, w_stride, dots_stride,
                        g_.weight_dtype);
    });
  }

  const LowRankGroup& g_;
  const int threads_;
  const int64_t weight_bytes_;
  A* z_;  // (tokens, ranks_)
  const A* x_ = nullptr;
  int64_t ranks_ = 0, width_ = 0;   // the sum of the ranks; columns of y
  std::vector<int64_t> z_columns_;  // where each member begins in z
  std::vector<int64_t> columns_;    // and in bias, and in y unless gated
  std::vector<Range> down_tasks_, up_tasks_;
};

}  // namespace

void low_rank_group(const LowRankGroup& group, int threads) {
  visit(group.dtype, [&](auto* tag) {
    Run<std::remove_pointer_t<decltype(tag)>> run(group, threads);
    run();
  });
}

}  // namespace soco::cpu

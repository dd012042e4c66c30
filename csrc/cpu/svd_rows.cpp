// One small matrix at a time, on one thread: see svd.h. All vectors are padded with zeros to whole
// registers, so that no loop has an end of its own.
#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/rotations.h"
#include "cpu/rows.h"
#include "cpu/vectors.h"
#include "svd.h"

namespace soco::cpu {
namespace {

template <typename A>
int64_t padded(int64_t count) {
  return (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

constexpr int kTogether = 8;  // vectors that a reflector is applied to at a time

// x_t -= factor (v x_t) v for `many` vectors x_t together, and the sums of their squares then,
// where they are asked for.
template <int many, typename A>
SOCO_SHARED void reflect_once(const A* v, A factor, A* const* x, int64_t begin, int64_t end,
                              A* squares = nullptr) {
  Vec<A> sums[many] = {};
  for (int64_t i = begin; i < end; i += kLanes<A>) {
    const Vec<A> own = load(v + i);
    for (int t = 0; t < many; ++t) sums[t] += own * load(x[t] + i);
  }
  Vec<A> by[many];
  for (int t = 0; t < many; ++t) {
    by[t] = filled(factor * total<A>(sums[t]));
    sums[t] = Vec<A>{};
  }
  for (int64_t i = begin; i < end; i += kLanes<A>) {
    const Vec<A> own = load(v + i);
    for (int t = 0; t < many; ++t) {
      const Vec<A> rest = load(x[t] + i) - by[t] * own;
      store(x[t] + i, rest);
      if (squares != nullptr) sums[t] += rest * rest;
    }
  }
  for (int t = 0; squares != nullptr && t < many; ++t) squares[t] = total<A>(sums[t]);
}

// Householder's QR of the matrix whose columns are given: `columns` becomes the reflectors
// I - factor v v^T (zeros before v's own place), row k of R goes to triangle[k], zeros before the
// diagonal. With `places`, the largest column left comes next and places[k] is where it was.
template <typename A>
__attribute__((noinline)) void factorize(Vectors<A> columns, Vectors<A> triangle, A* factors,
                                         A* squares, int32_t* places) {
  const int64_t count = columns.count, end = columns.step;
  for (int64_t j = 0; j < count; ++j) squares[j] = dot(columns[j], columns[j], 0, end);
  for (int64_t k = 0; k < count; ++k) {
    if (places != nullptr) {
      int64_t largest = k;
      for (int64_t j = k + 1; j < count; ++j)
        if (squares[j] > squares[largest]) largest = j;
      if (largest != k) {
        for (int64_t i = 0; i < end; ++i) std::swap(columns[k][i], columns[largest][i]);
        for (int64_t i = 0; i < k; ++i) std::swap(triangle[i][k], triangle[i][largest]);
        std::swap(squares[k], squares[largest]);
        std::swap(places[k], places[largest]);
      }
    }
    A* const v = columns[k];
    const int64_t begin = k / kLanes<A> * kLanes<A>;
    for (int64_t j = 0; j < k; ++j) triangle[k][j] = 0;
    if (!(squares[k] > JacobiLimits<A>::kSmallestPivot)) {  // nothing is left in this column
      factors[k] = 0;
      triangle[k][k] = 0;
      for (int64_t i = begin; i < end; ++i) v[i] = 0;
      for (int64_t j = k + 1; j < count; ++j) {
        triangle[k][j] = places == nullptr ? columns[j][k] : A(0);  // the rest is as small
        columns[j][k] = 0;
      }
      continue;
    }
    // H x = -sign(x_k) |x| e_k, with v = x + sign(x_k) |x| e_k, and factor 2 / |v|^2
    const A norm = std::sqrt(squares[k]), old = v[k];
    const A diagonal = old < 0 ? norm : -norm;
    v[k] = old - diagonal;
    factors[k] = 1 / (norm * (norm + std::abs(old)));
    triangle[k][k] = diagonal;
    for (int64_t j = k + 1; j < count;) {
      A* x[kTogether];
      A all[kTogether];
      const int64_t many = count - j < kTogether ? 1 : kTogether;
      for (int64_t t = 0; t < many; ++t) x[t] = columns[j + t];
      if (many == 1)
        reflect_once<1>(v, factors[k], x, begin, end, all);
      else
        reflect_once<kTogether>(v, factors[k], x, begin, end, all);
      for (int64_t t = 0; t < many; ++t, ++j) {
        const A entry = x[t][k], rest = all[t] - entry * entry;
        triangle[k][j] = entry;
        x[t][k] = 0;
        squares[j] = rest > A(0.1) * all[t] ? rest : dot(x[t], x[t], begin, end);
      }
    }
  }
}

// x_t = H_0 ... H_last x_t for kTogether vectors of `reflectors.step` numbers.
template <typename A>
void reflect(Vectors<A> reflectors, const A* factors, A* const* x) {
  for (int64_t k = reflectors.count - 1; k >= 0; --k)
    reflect_once<kTogether>(reflectors[k], factors[k], x, k / kLanes<A> * kLanes<A>,
                            reflectors.step);
}

// Fills x[given .. count-1] so that all of x are orthonormal, from the unit vector that has most
// outside the others' span.
template <typename A>
void complete(Vectors<A> x, int64_t given) {
  for (int64_t k = given; k < x.count; ++k) {
    int64_t best = 0;
    A least = 2;
    for (int64_t e = 0; e < x.length; ++e) {
      A inside = 0;
      for (int64_t i = 0; i < k; ++i) inside += x[i][e] * x[i][e];
      if (inside < least) {
        least = inside;
        best = e;
      }
    }
    A* const own = x[k];
    for (int64_t i = 0; i < x.step; ++i) own[i] = i == best;
    A square = 1;
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t i = 0; i < k; ++i) reflect_once<1>(x[i], A(1), &own, 0, x.step, &square);
    const A scale = 1 / std::sqrt(square);
    for (int64_t i = 0; i < x.length; ++i) own[i] *= scale;
  }
}

// The largest number of a padded vector, of which zeros do no harm, or of its negative.
template <typename A>
SOCO_SHARED A largest(const A* x, A sign, int64_t end) {
  const Vec<A> by = filled(sign);
  Vec<A> most = {};
  for (int64_t i = 0; i < end; i += kLanes<A>) {
    const Vec<A> v = by * load(x + i);
    most = v > most ? v : most;
  }
  A found = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) found = most[lane] > found ? most[lane] : found;
  return found;
}

template <typename A>
bool largest_is_negative(const A* x, int64_t end) {
  const A above = largest(x, A(1), end), below = largest(x, A(-1), end);
  if (above != below || above == 0) return above < below;
  int64_t first = 0;  // the first of equals
  while (std::abs(x[first]) != above) ++first;
  return x[first] < 0;
}

// The memory that a matrix needs beside its outputs.
template <typename A>
struct Scratch {
  Vectors<A> columns, triangle, x, turn, made;  // x and turn with zeros up to whole blocks
  A *factors, *second_factors, *squares, *scale, *rest;
  int32_t *places, *order, *row_order, *starts;

  static int64_t bytes(int64_t rows, int64_t count) {
    const int64_t tall = padded<A>(rows), wide = padded<A>(count), many = whole_blocks<A>(count);
    return static_cast<int64_t>(sizeof(A)) * (count * (tall + wide) + 2 * many * wide +
                                              (kTogether + 1) * tall + 2 * wide + 3 * many) +
           static_cast<int64_t>(sizeof(int32_t)) * (2 * count + rows + kRowSizes);
  }

  Scratch(void* memory, int64_t rows, int64_t count) {
    const int64_t tall = padded<A>(rows), wide = padded<A>(count), many = whole_blocks<A>(count);
    A* next = static_cast<A*>(memory);
    const auto take = [&next](int64_t numbers) {
      A* const begin = next;
      next += numbers;
      return begin;
    };
    columns = {take(count * tall), count, rows, tall};
    triangle = {take(count * wide), count, count, wide};
    x = {take(many * wide), many, count, wide};
    turn = {take(many * wide), many, count, wide};
    made = {take((kTogether + 1) * tall), kTogether + 1, rows, tall};
    factors = take(wide);
    second_factors = take(wide);
    squares = take(many);
    scale = take(many);
    rest = take(many);
    places = reinterpret_cast<int32_t*>(next);
    order = places + count;
    row_order = order + count;
    starts = row_order + rows;
  }
};

// Copies a matrix divided by 2^exponent, which makes its largest entry less than 1, its rows in the
// order that is found here. Returns whether all of it is finite.
template <typename A>
bool load_scaled(const A* matrix, const SvdBatch& batch, const Scratch<A>& own, int& exponent) {
  const Vectors<A>& columns = own.columns;
  A* const sizes = own.made[0];  // of the rows
  for (int64_t i = 0; i < columns.step; ++i) sizes[i] = 0;
  Vec<A> nothing = {};                         // NaN if anything is not finite
  constexpr int64_t kBeside = 64 / sizeof(A);  // columns of a cache line, if the rows lie whole
  for (int64_t j = 0; j < batch.columns; j += kBeside) {
    const int64_t end = j + kBeside < batch.columns ? j + kBeside : batch.columns;
    for (int64_t i = 0; i < batch.rows; ++i) {
      const A* const from = matrix + i * batch.row_stride;
      for (int64_t c = j; c < end; ++c) columns[c][i] = from[c * batch.column_stride];
    }
  }
  for (int64_t j = 0; j < batch.columns; ++j) {
    A* const column = columns[j];
    for (int64_t i = batch.rows; i < columns.step; ++i) column[i] = 0;
    for (int64_t i = 0; i < columns.step; i += kLanes<A>) {
      const Vec<A> v = load(column + i), size = v < 0 ? -v : v, most = load(sizes + i);
      store(sizes + i, size > most ? size : most);
      nothing += v * A(0);
    }
  }
  if (total<A>(nothing) != 0) return false;
  exponent = 0;
  std::frexp(largest(sizes, A(1), columns.step), &exponent);
  sort_rows(
      batch.rows,
      [&](int64_t i) {
        int of_row = -kRowSizes;
        if (sizes[i] > 0) std::frexp(sizes[i], &of_row);
        return sizes[i] > 0 ? of_row - exponent : -kRowSizes;
      },
      own.starts, own.row_order);
  // In two steps, each of which is a number even where the whole is not.
  const A once = std::ldexp(A(1), -(exponent / 2)),
          twice = std::ldexp(A(1), -(exponent - exponent / 2));
  A* const sorted = own.made[1];
  for (int64_t j = 0; j < batch.columns; ++j) {
    A* const column = columns[j];
    for (int64_t i = 0; i < batch.rows; ++i) sorted[i] = column[own.row_order[i]] * once * twice;
    for (int64_t i = 0; i < batch.rows; ++i) column[i] = sorted[i];
  }
  return true;
}

template <typename A>
void decompose(const SvdBatch& batch, int64_t number, void* memory) {
  const int64_t rows = batch.rows, count = batch.columns;
  const Scratch<A> own(memory, rows, count);
  const Vectors<A>&x = own.x, &turn = own.turn;
  int exponent = 0;
  if (!load_scaled(static_cast<const A*>(batch.matrices) + number * rows * count, batch, own,
                   exponent)) {
    batch.sweeps[number] = kNotFinite;
    return;
  }
  for (const Vectors<A>* zeroed : {&own.triangle, &x, &turn})
    for (int64_t i = 0; i < zeroed->count * zeroed->step; ++i) zeroed->data[i] = 0;
  for (int64_t j = 0; j < count; ++j) own.places[j] = static_cast<int32_t>(j);
  factorize(own.columns, own.triangle, own.factors, own.squares, own.places);
  factorize(own.triangle, x, own.second_factors, own.squares, static_cast<int32_t*>(nullptr));
  for (int64_t j = 0; j < count; ++j) turn[j][j] = 1;
  batch.sweeps[number] = orthogonalize(x, turn, own.squares, own.scale, own.rest);

  int64_t given = 0;  // in descending order, stable: an insertion, as they are almost sorted
  for (int64_t j = 0; j < count; ++j) {
    own.squares[j] = dot(x[j], x[j], 0, x.step);
    const bool seen = own.squares[j] > JacobiLimits<A>::kSmallestPivot;
    if (!seen) own.squares[j] = 0;
    given += seen;
    int64_t place = j;
    for (; place > 0 && own.squares[own.order[place - 1]] < own.squares[j]; --place)
      own.order[place] = own.order[place - 1];
    own.order[place] = static_cast<int32_t>(j);
  }
  // W takes the place of the triangle's reflectors only after V is made of them.
  A* const values = static_cast<A*>(batch.values) + number * count;
  A* const left = static_cast<A*>(batch.left) + number * count * rows;
  A* const right = static_cast<A*>(batch.right) + number * count * count;
  for (int64_t k = 0; k < count; ++k)
    values[k] = std::ldexp(std::sqrt(own.squares[own.order[k]]), exponent);
  for (int64_t k = 0; k < count; k += kTogether) {
    A* made[kTogether];
    for (int t = 0; t < kTogether; ++t) {
      made[t] = own.made[t];
      // Of its norm many rotations have made something not quite 1.
      const A* const from = turn[own.order[k + t < count ? k + t : k]];
      const A unit = 1 / std::sqrt(dot(from, from, 0, turn.step));
      for (int64_t i = 0; i < turn.step; ++i) made[t][i] = from[i] * unit;
    }
    reflect(own.triangle, own.second_factors, made);
    for (int t = 0; t < kTogether && k + t < count; ++t)
      for (int64_t i = 0; i < count; ++i) right[(k + t) * count + own.places[i]] = made[t][i];
  }
  const Vectors<A>& w = own.triangle;
  for (int64_t k = 0; k < given; ++k) {
    const A* const from = x[own.order[k]];
    const A scale = 1 / std::sqrt(own.squares[own.order[k]]);
    for (int64_t i = 0; i < w.step; ++i) w[k][i] = from[i] * scale;
  }
  complete(w, given);
  for (int64_t k = 0; k < count; k += kTogether) {
    A* made[kTogether];
    for (int t = 0; t < kTogether; ++t) {
      made[t] = own.made[t];
      const A* const from = w[k + t < count ? k + t : k];
      for (int64_t i = 0; i < own.made.step; ++i) made[t][i] = i < count ? from[i] : A(0);
    }
    reflect(own.columns, own.factors, made);
    for (int t = 0; t < kTogether && k + t < count; ++t) {
      A* const u = left + (k + t) * rows;
      A* const v = right + (k + t) * count;
      A* const unsorted = own.made[kTogether];
      for (int64_t i = rows; i < own.made.step; ++i) unsorted[i] = 0;
      for (int64_t i = 0; i < rows; ++i) unsorted[own.row_order[i]] = made[t][i];
      A* const padded_v = w[k + t];  // which is not needed any more
      for (int64_t i = 0; batch.sign_by_right && i < count; ++i) padded_v[i] = v[i];
      const bool flip = batch.sign_by_right ? largest_is_negative(padded_v, w.step)
                                            : largest_is_negative(unsorted, own.made.step);
      const A sign = flip ? A(-1) : A(1);
      for (int64_t i = 0; i < rows; ++i) u[i] = unsorted[i] * sign;
      for (int64_t i = 0; flip && i < count; ++i) v[i] = -v[i];
    }
  }
}

// Calls body with a null pointer of the type.
template <typename Body>
void visit_exact(Dtype dtype, Body body) {
  if (dtype == Dtype::kFloat64) return body(static_cast<double*>(nullptr));
  body(static_cast<float*>(nullptr));
}

}  // namespace

template <Level>
int64_t svd_matrix_bytes(int64_t rows, int64_t columns, Dtype dtype) {
  int64_t bytes = 0;
  visit_exact(dtype, [&](auto* tag) {
    bytes = Scratch<std::remove_pointer_t<decltype(tag)>>::bytes(rows, columns);
  });
  return bytes;
}

template <Level>
void svd_matrix(const SvdBatch& batch, int64_t number, void* scratch) {
  visit_exact(batch.dtype, [&](auto* tag) {
    decompose<std::remove_pointer_t<decltype(tag)>>(batch, number, scratch);
  });
}

constexpr Level kLevel = static_cast<Level>(SOCO_LEVEL);
template int64_t svd_matrix_bytes<kLevel>(int64_t, int64_t, Dtype);
template void svd_matrix<kLevel>(const SvdBatch&, int64_t, void*);

}  // namespace soco::cpu

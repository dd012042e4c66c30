// One small matrix at a time, on one thread: see svd.h. All vectors are padded with zeros to whole
// registers, so that no loop has an end of its own.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "cpu/rows.h"
#include "cpu/vectors.h"
#include "svd.h"

namespace soco::cpu {
namespace {

// Vectors of a block: as many pairs are turned side by side.
template <typename A>
constexpr int kPairs = 64 / static_cast<int>(sizeof(A));

template <typename A>
int64_t padded(int64_t count) {
  return (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

constexpr int kTogether = 8;  // vectors that a reflector is applied to at a time

template <typename A>
constexpr int64_t whole_blocks(int64_t count) {
  return (count + kPairs<A> - 1) / kPairs<A> * kPairs<A>;
}

// `count` vectors of `length` numbers, `step` apart.
template <typename A>
struct Vectors {
  A* data;
  int64_t count, length, step;
  A* operator[](int64_t i) const { return data + i * step; }
};

template <typename A>
SOCO_SHARED A dot(const A* x, const A* y, int64_t begin, int64_t end) {
  Vec<A> sums[2] = {};
  int64_t i = begin;
  for (; i + 2 * kLanes<A> <= end; i += 2 * kLanes<A>) {
    sums[0] += load(x + i) * load(y + i);
    sums[1] += load(x + i + kLanes<A>) * load(y + i + kLanes<A>);
  }
  if (i < end) sums[0] += load(x + i) * load(y + i);
  return total<A>(sums[0] + sums[1]);
}

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

// x - one * y and y + other * x
template <typename A>
SOCO_SHARED void rotate(A* x, A* y, A one, A other, int64_t end) {
  const Vec<A> a = filled(one), b = filled(other);
  for (int64_t i = 0; i < end; i += kLanes<A>) {
    const Vec<A> u = load(x + i), v = load(y + i);
    store(x + i, u - a * v);
    store(y + i, v + b * u);
  }
}

// The products of four vectors: i j, k l, i l, k j, i k, j l.
template <typename A>
SOCO_SHARED void products_of_four(const A* i, const A* k, const A* j, const A* l, int64_t end,
                                  A* products) {
  Vec<A> sums[6] = {};
  for (int64_t e = 0; e < end; e += kLanes<A>) {
    const Vec<A> vi = load(i + e), vk = load(k + e), vj = load(j + e), vl = load(l + e);
    sums[0] += vi * vj;
    sums[1] += vk * vl;
    sums[2] += vi * vl;
    sums[3] += vk * vj;
    sums[4] += vi * vk;
    sums[5] += vj * vl;
  }
  totals<A>(sums[0], sums[1], sums[2], sums[3], products);
  A last[4];
  totals<A>(sums[4], sums[5], sums[4], sums[5], last);
  products[4] = last[0];
  products[5] = last[1];
}

// The same for (i, j) and (k, l), and then for (i, l) and (k, j).
template <typename A>
SOCO_SHARED void rotate_four(A* i, A* k, A* j, A* l, const A (&ones)[4], const A (&others)[4],
                             int64_t end) {
  const Vec<A> a[4] = {filled(ones[0]), filled(ones[1]), filled(ones[2]), filled(ones[3])};
  const Vec<A> b[4] = {filled(others[0]), filled(others[1]), filled(others[2]), filled(others[3])};
  for (int64_t e = 0; e < end; e += kLanes<A>) {
    const Vec<A> vi = load(i + e), vk = load(k + e), vj = load(j + e), vl = load(l + e);
    const Vec<A> wi = vi - a[0] * vj, wj = vj + b[0] * vi;
    const Vec<A> wk = vk - a[1] * vl, wl = vl + b[1] * vk;
    store(i + e, wi - a[2] * wl);
    store(l + e, wl + b[2] * wi);
    store(k + e, wk - a[3] * wj);
    store(j + e, wj + b[3] * wk);
  }
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

// What turns two columns so that they become orthogonal, for kPairs pairs side by side. tangent is
// 0 where they are so already.
template <typename A>
struct Turns {
  A tangent[kPairs<A>], sine[kPairs<A>], cosine[kPairs<A>];
  A versine[kPairs<A>];  // 1 - cosine, with digits of its own

  bool any;  // of them turns

  __attribute__((noinline)) void find(const A* product, const A* first, const A* second, A limit) {
    A both[kPairs<A>], apart[kPairs<A>], turns[kPairs<A>], count = 0;
    for (int p = 0; p < kPairs<A>; ++p) {
      const A more = first[p] > second[p] ? first[p] : second[p];
      const A less = first[p] > second[p] ? second[p] : first[p];
      const A unit = 1 / (more > 0 ? more : A(1));
      both[p] = product[p] * unit;
      apart[p] = (second[p] - first[p]) * unit;
      const bool seen = less > JacobiLimits<A>::kSmallestPivot;  // squares below have no digits
      turns[p] = seen && std::abs(both[p]) > limit * std::sqrt(less * unit) ? A(1) : A(0);
    }
    for (int p = 0; p < kPairs<A>; ++p) count += turns[p];
    any = count > 0;
    if (!any) {
      for (int p = 0; p < kPairs<A>; ++p) {
        tangent[p] = sine[p] = versine[p] = 0;
        cosine[p] = 1;
      }
      return;
    }
    for (int p = 0; p < kPairs<A>; ++p) {
      // tan 2t = 2 both / apart, the smaller of the two angles
      const A steep = std::abs(apart[p]) + std::sqrt(apart[p] * apart[p] + 4 * both[p] * both[p]);
      const A found = turns[p] * 2 * both[p] / (turns[p] > 0 ? steep : A(1));
      tangent[p] = apart[p] < 0 ? -found : found;
      const A secant = std::sqrt(1 + tangent[p] * tangent[p]);
      const A part = 1 / (secant * (1 + secant));
      cosine[p] = (1 + secant) * part;
      sine[p] = tangent[p] * cosine[p];
      versine[p] = tangent[p] * tangent[p] * part;
    }
  }
};

// The columns of L, and what is turned with them. A column is scale[i] * x[i]: so a rotation takes
// one multiplication and addition for each number, and the cosines go into the scales (Gentleman,
// 1973). A scale has two parts, since a cosine that rounds to 1 would let the columns grow.
template <typename A>
struct Turned {
  static constexpr int kMany = kPairs<A>;

  Vectors<A> x, with;
  A *squares, *scale, *rest;  // squares: of the columns
  A limit;

  void refresh(int64_t i) const { squares[i] = scale[i] * scale[i] * dot(x[i], x[i], 0, x.step); }

  // Multiplies a scale by a cosine.
  static void shrink(A& whole, A& part, A versine) {
    const A less = part - whole * versine, sum = whole + less;
    part = less - (sum - whole);
    whole = sum;
  }

  // What a column became, and its square before.
  void put(int64_t i, A whole, A part, A square, A before) const {
    scale[i] = whole;
    rest[i] = part;
    squares[i] = square;
    if (whole < A(0x1p-10)) settle(i);
    if (!(square > A(0.5) * before)) refresh(i);  // digits were lost
  }

  // Multiplies the scale out.
  void settle(int64_t i) const {
    for (const Vectors<A>* of : {&x, &with}) {
      const Vec<A> by = filled(scale[i]);
      A* const own = (*of)[i];
      for (int64_t e = 0; e < of->step; e += kLanes<A>) store(own + e, by * load(own + e));
    }
    scale[i] = 1;
    rest[i] = 0;
  }

  // Disjoint pairs within a block; returns whether one was not orthogonal.
  __attribute__((noinline)) bool within(int64_t block, int round) const {
    constexpr int kOthers = kMany - 1;  // of a round robin
    int64_t i[kMany / 2], j[kMany / 2];
    A products[kMany] = {}, first[kMany] = {}, second[kMany] = {};
    for (int p = 0; p < kMany / 2; ++p) {
      const int one = p == 0 ? kOthers : (round + p) % kOthers;
      const int other = (round + kOthers - p) % kOthers;
      i[p] = block * kMany + (one < other ? one : other);
      j[p] = block * kMany + (one < other ? other : one);
      products[p] = scale[i[p]] * scale[j[p]] * dot(x[i[p]], x[j[p]], 0, x.step);
      first[p] = squares[i[p]];
      second[p] = squares[j[p]];
    }
    Turns<A> turns;
    turns.find(products, first, second, limit);
    for (int p = 0; p < kMany / 2; ++p) {
      const A tangent = turns.tangent[p];
      if (tangent == 0) continue;
      const A ratio = scale[j[p]] / scale[i[p]], one = tangent * ratio, other = tangent / ratio;
      rotate(x[i[p]], x[j[p]], one, other, x.step);
      rotate(with[i[p]], with[j[p]], one, other, with.step);
      const A more = tangent * products[p];
      for (const auto& [v, square, before] :
           {std::tuple{i[p], first[p] - more, first[p]}, {j[p], second[p] + more, second[p]}}) {
        A whole = scale[v], part = rest[v];
        shrink(whole, part, turns.versine[p]);
        put(v, whole, part, square, before);
      }
    }
    return turns.any;
  }

  // Pairs between two blocks: each two columns of the one against two of the other, in two steps.
  // The products for the second follow from those before the first, so that both go by in one pass.
  __attribute__((noinline)) bool between(int64_t one, int64_t other, int shift) const {
    constexpr int kFours = kMany / 2;
    // Four p: columns i, k of the one block, and j, l of the other. Of its pairs, (i, j) and (i, l)
    // lie at p, (k, l) and (k, j) at p + kFours; and so do i and k, and j and l, themselves.
    const auto left = [&](int p) { return one * kMany + 2 * (p % kFours) + p / kFours; };
    const auto right = [&](int p) {
      return other * kMany + 2 * ((p + shift) % kFours) + p / kFours;
    };
    A straight_product[kMany], crossed_product[kMany], beside[kMany];
    A first[kMany], second[kMany], first_scale[kMany], second_scale[kMany];
    for (int p = 0; p < kFours; ++p) {
      A sums[6];
      products_of_four(x[left(p)], x[left(p + kFours)], x[right(p)], x[right(p + kFours)], x.step,
                       sums);
      straight_product[p] = sums[0];
      straight_product[p + kFours] = sums[1];
      crossed_product[p] = sums[2];
      crossed_product[p + kFours] = sums[3];
      beside[p] = sums[4];
      beside[p + kFours] = sums[5];
    }
    for (int p = 0; p < kMany; ++p) {
      first[p] = squares[left(p)];
      second[p] = squares[right(p)];
      first_scale[p] = scale[left(p)];
      second_scale[p] = scale[right(p)];
    }
    for (int half = 0; half < kMany; half += kFours)
      for (int four = 0; four < kFours; ++four) {
        const int p = half + four, q = kFours - half + four;  // q: the other pair of the four
        straight_product[p] *= first_scale[p] * second_scale[p];
        crossed_product[p] *= first_scale[p] * second_scale[q];
      }
    for (int four = 0; four < kFours; ++four) {
      beside[four] *= first_scale[four] * first_scale[four + kFours];
      beside[four + kFours] *= second_scale[four] * second_scale[four + kFours];
    }
    Turns<A> straight, crossed;
    straight.find(straight_product, first, second, limit);
    A crossing[kMany], first_then[kMany], second_then[kMany];
    for (int half = 0; half < kMany; half += kFours)
      for (int four = 0; four < kFours; ++four) {
        const int p = half + four, q = kFours - half + four;
        // (c_p i - s_p j) (s_q k + c_q l), and with the two pairs exchanged
        crossing[p] = straight.cosine[p] * straight.sine[q] * beside[four] +
                      straight.cosine[p] * straight.cosine[q] * crossed_product[p] -
                      straight.sine[p] * straight.sine[q] * crossed_product[q] -
                      straight.sine[p] * straight.cosine[q] * beside[four + kFours];
        const A lower = first[p] - straight.tangent[p] * straight_product[p];
        const A upper = second[q] + straight.tangent[q] * straight_product[q];
        first_then[p] = lower > 0 ? lower : A(0);
        second_then[p] = upper > 0 ? upper : A(0);
      }
    crossed.find(crossing, first_then, second_then, limit);
    if (!straight.any && !crossed.any) return false;

    A ones[2][kMany], others[2][kMany];  // what rotates: first straight, then crossed
    A first_rest[kMany], second_rest[kMany], first_end[kMany], second_end[kMany];
    for (int p = 0; p < kMany; ++p) {
      first_rest[p] = rest[left(p)];
      second_rest[p] = rest[right(p)];
    }
    for (int p = 0; p < kMany; ++p) {
      const A ratio = second_scale[p] / first_scale[p];
      ones[0][p] = straight.tangent[p] * ratio;
      others[0][p] = straight.tangent[p] / ratio;
      shrink(first_scale[p], first_rest[p], straight.versine[p]);
      shrink(second_scale[p], second_rest[p], straight.versine[p]);
    }
    for (int half = 0; half < kMany; half += kFours)
      for (int four = 0; four < kFours; ++four) {
        const int p = half + four, q = kFours - half + four;
        const A ratio = second_scale[q] / first_scale[p];
        ones[1][p] = crossed.tangent[p] * ratio;
        others[1][p] = crossed.tangent[p] / ratio;
        first_end[p] = first_then[p] - crossed.tangent[p] * crossing[p];
        second_end[q] = second_then[p] + crossed.tangent[p] * crossing[p];
      }
    for (int half = 0; half < kMany; half += kFours)
      for (int four = 0; four < kFours; ++four) {
        const int p = half + four, q = kFours - half + four;
        shrink(first_scale[p], first_rest[p], crossed.versine[p]);
        shrink(second_scale[p], second_rest[p], crossed.versine[q]);
      }
    for (int p = 0; p < kFours; ++p) {
      const int q = p + kFours;
      if (straight.tangent[p] == 0 && straight.tangent[q] == 0 && crossed.tangent[p] == 0 &&
          crossed.tangent[q] == 0)
        continue;
      const A by[4] = {ones[0][p], ones[0][q], ones[1][p], ones[1][q]};
      const A with_by[4] = {others[0][p], others[0][q], others[1][p], others[1][q]};
      const int64_t i = left(p), k = left(q), j = right(p), l = right(q);
      rotate_four(x[i], x[k], x[j], x[l], by, with_by, x.step);
      rotate_four(with[i], with[k], with[j], with[l], by, with_by, with.step);
    }
    for (int p = 0; p < kMany; ++p) {
      put(left(p), first_scale[p], first_rest[p], first_end[p], first[p]);
      put(right(p), second_scale[p], second_rest[p], second_end[p], second[p]);
    }
    return true;
  }
};

// One-sided Jacobi: turns the columns x until they are orthogonal, and `turn` with them. The pairs
// run block against block, so that what is worked on lies in the nearest cache. Returns the sweeps.
template <typename A>
int32_t orthogonalize(Vectors<A> x, Vectors<A> turn, A* squares, A* scale, A* rest) {
  constexpr int kMany = kPairs<A>;
  const int64_t blocks = x.count / kMany;
  const Turned<A> turned{x,       turn,
                         squares, scale,
                         rest,    JacobiLimits<A>::kHalfUlp * std::sqrt(static_cast<A>(x.length))};
  for (int64_t i = 0; i < x.count; ++i) {
    scale[i] = 1;
    rest[i] = 0;
  }
  for (int32_t sweep = 0; sweep < kMostSweeps; ++sweep) {
    bool any = false;
    for (int64_t i = 0; i < x.count; ++i) turned.refresh(i);
    for (int64_t a = 0; a < blocks; ++a) {
      for (int round = 0; round < kMany - 1; ++round) any = turned.within(a, round) || any;
      for (int64_t b = a + 1; b < blocks; ++b)
        for (int shift = 0; shift < kMany / 2; ++shift) any = turned.between(a, b, shift) || any;
    }
    for (int64_t i = 0; i < x.count; ++i) turned.settle(i);
    if (!any) return sweep;
  }
  return kMostSweeps;
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
  Vec<A> nothing = {};  // NaN if anything is not finite
  for (int64_t j = 0; j < batch.columns; ++j) {
    A* const column = columns[j];
    const A* const from = matrix + j * batch.column_stride;
    for (int64_t i = 0; i < batch.rows; ++i) column[i] = from[i * batch.row_stride];
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
      const A* const from = turn[own.order[k + t < count ? k + t : k]];
      for (int64_t i = 0; i < turn.step; ++i) made[t][i] = from[i];
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

// One-sided Jacobi on padded vectors: plane rotations until all of them are orthogonal, see svd.h.
// Included by svd_rows.cpp only.
#pragma once
#include <cmath>
#include <tuple>

#include "cpu/vectors.h"
#include "svd.h"

namespace soco::cpu {
namespace {

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

// Vectors of a block: as many pairs are turned side by side.
template <typename A>
constexpr int kPairs = 64 / static_cast<int>(sizeof(A));

template <typename A>
constexpr int64_t whole_blocks(int64_t count) {
  return (count + kPairs<A> - 1) / kPairs<A> * kPairs<A>;
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

}  // namespace
}  // namespace soco::cpu

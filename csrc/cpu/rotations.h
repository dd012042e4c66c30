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

// The products of four vectors, number p of each kind: i j, k l, i l, k j, i k, j l. Their lanes
// are still to be summed.
template <typename A, int many>
SOCO_SHARED void products_of_four(const A* i, const A* k, const A* j, const A* l, int64_t end,
                                  Vec<A> (&products)[6][many], int p) {
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
  for (int kind = 0; kind < 6; ++kind) products[kind][p] = sums[kind];
}

// Rotates (i, j) and (k, l), and then (i, l) and (k, j), as `rotate` does.
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

// A number for each of kPairs pairs of columns, or for each of a block's columns.
template <typename A>
struct Pairs {
  static constexpr int kParts = kPairs<A> / kLanes<A>;
  Vec<A> part[kParts];

  static Pairs of(const A* numbers) {
    Pairs pairs;
    for (int r = 0; r < kParts; ++r) pairs.part[r] = load(numbers + r * kLanes<A>);
    return pairs;
  }
  void put(A* numbers) const {
    for (int r = 0; r < kParts; ++r) store(numbers + r * kLanes<A>, part[r]);
  }
  // With the numbers of the first half where those of the second were.
  Pairs exchanged() const {
    Pairs pairs;
    if constexpr (kParts == 1)
      pairs.part[0] = halves_exchanged(part[0]);
    else
      for (int r = 0; r < kParts; ++r) pairs.part[r] = part[(r + kParts / 2) % kParts];
    return pairs;
  }
  // With each number where the one before it was, and the first of a half at that half's end.
  Pairs advanced() const {
    Pairs pairs;
    if constexpr (kParts == 1) {
      pairs.part[0] = halves_advanced(part[0]);
    } else if constexpr (kParts == 2) {
      for (int r = 0; r < kParts; ++r) pairs.part[r] = lanes_advanced(part[r]);
    } else {
      constexpr int kHalf = kPairs<A> / 2;
      A from[kPairs<A>], to[kPairs<A>];
      put(from);
      for (int p = 0; p < kPairs<A>; ++p) to[p] = from[p / kHalf * kHalf + (p + 1) % kHalf];
      pairs = of(to);
    }
    return pairs;
  }
  bool any() const {  // that is not zero; none is negative
    Vec<A> sum = part[0];
    for (int r = 1; r < kParts; ++r) sum += part[r];
    return total<A>(sum) > 0;
  }
};

// op of the numbers of each pair.
template <typename Op, typename A, typename... More>
SOCO_SHARED Pairs<A> each(Op op, const Pairs<A>& first, const More&... more) {
  Pairs<A> found;
  for (int r = 0; r < Pairs<A>::kParts; ++r) found.part[r] = op(first.part[r], more.part[r]...);
  return found;
}

// What turns two columns so that they become orthogonal, for kPairs pairs side by side. tangent is
// 0 where they are so already.
template <typename A>
struct Turns {
  Pairs<A> tangent, sine, cosine;
  Pairs<A> versine;  // 1 - cosine, with digits of its own

  bool any;  // of them turns

  // The inverse roots follow each other, and what takes time is to wait for them.
  void find(const Pairs<A>& product, const Pairs<A>& first, const Pairs<A>& second, A limit) {
    using V = Vec<A>;
    const V one = filled(A(1)), half = filled(A(0.5)), nothing{};
    Pairs<A> turns;
    for (int r = 0; r < Pairs<A>::kParts; ++r) {
      const V x = first.part[r], y = second.part[r];
      const V more = x > y ? x : y, less = x > y ? y : x;
      const V unit = about_inverse(more > nothing ? more : one);  // any number near it
      const V both = product.part[r] * unit, apart = (y - x) * unit;
      const V size = both < nothing ? -both : both, distance = apart < nothing ? -apart : apart;
      const V least = less > JacobiLimits<A>::kSmallestPivot ? less * unit : one;
      turns.part[r] = size > limit * least * inverse_root(least) ? one : nothing;
      // squares below have no digits
      turns.part[r] = less > JacobiLimits<A>::kSmallestPivot ? turns.part[r] : nothing;
      const V turned = turns.part[r] * both;
      // sin 2t = 2 both / steep and cos 2t = apart / steep, the smaller of the two angles
      const V square = apart * apart + 4 * turned * turned;
      const V steep = inverse_root(turns.part[r] > nothing ? square : one);
      const V twice = turns.part[r] > nothing ? half + half * (distance * steep) : one;
      const V secant = inverse_root(twice);  // twice: cos^2 t
      const V sine_here = turned * steep * secant;
      cosine.part[r] = twice * secant;
      sine.part[r] = apart < nothing ? -sine_here : sine_here;
      tangent.part[r] = sine.part[r] * secant;
      versine.part[r] = sine_here * sine_here / (one + cosine.part[r]);
    }
    any = turns.any();
  }
};

// What is known of the columns of a block.
template <typename A>
struct Known {
  Pairs<A> squares, scale, rest;
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

  // Multiplies a scale by a cosine, or several by theirs.
  template <typename T>
  static void shrink(T& whole, T& part, T versine) {
    const T less = part - whole * versine, sum = whole + less;
    part = less - (sum - whole);
    whole = sum;
  }
  static void shrink(Known<A>& known, const Pairs<A>& versine) {
    for (int r = 0; r < Pairs<A>::kParts; ++r)
      shrink(known.scale.part[r], known.rest.part[r], versine.part[r]);
  }

  Known<A> known(int64_t block) const {
    const int64_t at = block * kMany;
    return {Pairs<A>::of(squares + at), Pairs<A>::of(scale + at), Pairs<A>::of(rest + at)};
  }
  void put(int64_t block, const Known<A>& known) const {
    const int64_t at = block * kMany;
    known.squares.put(squares + at);
    known.scale.put(scale + at);
    known.rest.put(rest + at);
  }

  // Whether a scale needs to be multiplied out, or a square to be summed again since digits were
  // lost.
  static bool worn(const Known<A>& known, const Pairs<A>& before) {
    const auto bad = [](Vec<A> whole, Vec<A> square, Vec<A> was) {
      const Vec<A> one = filled(A(1)), nothing{};
      const Vec<A> lost = square > A(0.5) * was ? nothing : was > nothing ? one : nothing;
      return whole < A(0x1p-10) ? one : lost;
    };
    return each(bad, known.scale, known.squares, before).any();
  }
  void renew(int64_t i, A before) const {
    if (scale[i] < A(0x1p-10)) settle(i);
    if (!(squares[i] > A(0.5) * before)) refresh(i);
  }
  // The same for a block of which the halves have been advanced `shift` times.
  __attribute__((noinline)) void renew(int64_t block, int shift, Known<A>& known,
                                       const Pairs<A>& before) const {
    constexpr int kHalf = kMany / 2;
    A own[3][kMany], was[kMany];
    known.squares.put(own[0]);
    known.scale.put(own[1]);
    known.rest.put(own[2]);
    before.put(was);
    A* const all[3] = {squares, scale, rest};
    for (int p = 0; p < kMany; ++p) {
      const int64_t i = block * kMany + (p % kHalf + shift) % kHalf + p / kHalf * kHalf;
      for (int of = 0; of < 3; ++of) all[of][i] = own[of][p];
      renew(i, was[p]);
      for (int of = 0; of < 3; ++of) own[of][p] = all[of][i];
    }
    known = {Pairs<A>::of(own[0]), Pairs<A>::of(own[1]), Pairs<A>::of(own[2])};
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
    turns.find(Pairs<A>::of(products), Pairs<A>::of(first), Pairs<A>::of(second), limit);
    if (!turns.any) return false;
    A tangents[kMany], versines[kMany];
    turns.tangent.put(tangents);
    turns.versine.put(versines);
    for (int p = 0; p < kMany / 2; ++p) {
      const A tangent = tangents[p];
      if (tangent == 0) continue;
      const A ratio = scale[j[p]] / scale[i[p]], one = tangent * ratio, other = tangent / ratio;
      rotate(x[i[p]], x[j[p]], one, other, x.step);
      rotate(with[i[p]], with[j[p]], one, other, with.step);
      const A more = tangent * products[p];
      squares[i[p]] -= more;
      squares[j[p]] += more;
      for (const int64_t v : {i[p], j[p]}) shrink(scale[v], rest[v], versines[p]);
      renew(i[p], first[p]);
      renew(j[p], second[p]);
    }
    return true;
  }

  // Pairs between two blocks: each two columns of the one against two of the other, in two steps.
  // The products for the second follow from those before the first, so that both go by in one pass.
  __attribute__((noinline)) bool between(int64_t one, int64_t other) const {
    constexpr int kFours = kMany / 2;
    Known<A> first = known(one), second = known(other);
    bool any = false;
    for (int shift = 0; shift < kFours; ++shift) {
      // Four p: columns i, k of the one block, and j, l of the other: numbers p and p + kFours of
      // those known. So of its pairs (i, j) and (k, l) lie at p and p + kFours; and crossed, (i, l)
      // and (k, j).
      const auto left = [&](int p) { return one * kMany + p; };
      const auto right = [&](int p) {
        return other * kMany + (p % kFours + shift) % kFours + p / kFours * kFours;
      };
      Vec<A> sums[6][kFours];
      for (int p = 0; p < kFours; ++p)
        products_of_four(x[left(p)], x[left(p + kFours)], x[right(p)], x[right(p + kFours)], x.step,
                         sums, p);
      A products[6][kMany];  // i j and k l; i l and k j; i k twice; j l twice
      for (int kind = 0; kind < 4; ++kind)
        totals<A, kFours>(sums[kind], products[kind / 2] + kind % 2 * kFours);
      for (int kind = 2; kind < 4; ++kind)
        for (int half = 0; half < kMany; half += kFours)
          totals<A, kFours>(sums[kind + 2], products[kind] + half);
      const auto times = [](Vec<A> a, Vec<A> b, Vec<A> c) { return a * b * c; };
      const Pairs<A> first_other = first.scale.exchanged(), second_other = second.scale.exchanged();
      const Pairs<A> product = each(times, Pairs<A>::of(products[0]), first.scale, second.scale);
      const Pairs<A> across = each(times, Pairs<A>::of(products[1]), first.scale, second_other);
      const Pairs<A> beside_first =
          each(times, Pairs<A>::of(products[2]), first.scale, first_other);
      const Pairs<A> beside_second =
          each(times, Pairs<A>::of(products[3]), second.scale, second_other);

      Turns<A> straight, crossed;
      straight.find(product, first.squares, second.squares, limit);
      // (c_p i - s_p j) (s_q k + c_q l), q the other pair of the four
      Pairs<A> crossing;
      const Pairs<A> cosine_other = straight.cosine.exchanged();
      const Pairs<A> sine_other = straight.sine.exchanged(), across_other = across.exchanged();
      for (int r = 0; r < Pairs<A>::kParts; ++r)
        crossing.part[r] = straight.cosine.part[r] * (sine_other.part[r] * beside_first.part[r] +
                                                      cosine_other.part[r] * across.part[r]) -
                           straight.sine.part[r] * (sine_other.part[r] * across_other.part[r] +
                                                    cosine_other.part[r] * beside_second.part[r]);
      const auto lower = [](Vec<A> square, Vec<A> tangent, Vec<A> of) {
        const Vec<A> then = square - tangent * of, nothing{};
        return then > nothing ? then : nothing;
      };
      const auto upper = [](Vec<A> square, Vec<A> tangent, Vec<A> of) {
        const Vec<A> then = square + tangent * of, nothing{};
        return then > nothing ? then : nothing;
      };
      const Pairs<A> first_before = first.squares, second_before = second.squares;
      first.squares = each(lower, first.squares, straight.tangent, product);
      second.squares = each(upper, second.squares, straight.tangent, product);
      crossed.find(crossing, first.squares, second.squares.exchanged(), limit);
      if (straight.any || crossed.any) {
        any = true;
        const auto over = [](Vec<A> tangent, Vec<A> a, Vec<A> b) { return tangent * (a / b); };
        A by[4][kMany];
        each(over, straight.tangent, second.scale, first.scale).put(by[0]);
        each(over, straight.tangent, first.scale, second.scale).put(by[1]);
        shrink(first, straight.versine);
        shrink(second, straight.versine);
        const Pairs<A> then_other = second.scale.exchanged();
        each(over, crossed.tangent, then_other, first.scale).put(by[2]);
        each(over, crossed.tangent, first.scale, then_other).put(by[3]);
        shrink(first, crossed.versine);
        shrink(second, crossed.versine.exchanged());
        first.squares = each(lower, first.squares, crossed.tangent, crossing);
        const auto exchange = [](const Pairs<A>& pairs) { return pairs.exchanged(); };
        second.squares = each(upper, second.squares, exchange(crossed.tangent), exchange(crossing));
        for (int p = 0; p < kFours; ++p) {
          const int q = p + kFours;
          const A ones[4] = {by[0][p], by[0][q], by[2][p], by[2][q]};
          const A others[4] = {by[1][p], by[1][q], by[3][p], by[3][q]};
          if (ones[0] == 0 && ones[1] == 0 && ones[2] == 0 && ones[3] == 0) continue;
          const int64_t i = left(p), k = left(q), j = right(p), l = right(q);
          rotate_four(x[i], x[k], x[j], x[l], ones, others, x.step);
          rotate_four(with[i], with[k], with[j], with[l], ones, others, with.step);
        }
        if (worn(first, first_before)) renew(one, 0, first, first_before);
        if (worn(second, second_before)) renew(other, shift, second, second_before);
      }
      second = {second.squares.advanced(), second.scale.advanced(), second.rest.advanced()};
    }
    put(one, first);
    put(other, second);
    return any;
  }
};

// One-sided Jacobi: turns the columns x until they are orthogonal, and `turn` with them. The pairs
// run block against block, so that what is worked on lies in the nearest cache. Returns the sweeps.
template <typename A>
int32_t orthogonalize(Vectors<A> x, Vectors<A> turn, A* squares, A* scale, A* rest) {
  constexpr int kMany = kPairs<A>;
  const int64_t blocks = x.count / kMany;
  const A limit = JacobiLimits<A>::kHalfUlp * std::sqrt(roundings<A>(x.length));
  const Turned<A> turned{x, turn, squares, scale, rest, limit};
  for (int64_t i = 0; i < x.count; ++i) {
    scale[i] = 1;
    rest[i] = 0;
  }
  for (int32_t sweep = 0; sweep < kMostSweeps; ++sweep) {
    bool any = false;
    for (int64_t i = 0; i < x.count; ++i) turned.refresh(i);
    for (int64_t a = 0; a < blocks; ++a) {
      for (int round = 0; round < kMany - 1; ++round) any = turned.within(a, round) || any;
      for (int64_t b = a + 1; b < blocks; ++b) any = turned.between(a, b) || any;
    }
    for (int64_t i = 0; i < x.count; ++i) turned.settle(i);
    if (!any) return sweep;
  }
  return kMostSweeps;
}

}  // namespace
}  // namespace soco::cpu

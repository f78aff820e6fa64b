// Selection by rank that gives way to what is in memory.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <utility>

#include <moeroute/policy/parts/choices.hpp>
#include <moeroute/policy/parts/selection.hpp>
#include <moeroute/residency/rule.hpp>
#include <moeroute/simd/marked_columns.hpp>
#include <moeroute/simd/reduce.hpp>
#include <moeroute/simd/select/top_k_row.hpp>

namespace moeroute {

namespace detail {

template <class>
inline constexpr bool selects_ranks = false;
template <>
inline constexpr bool selects_ranks<top_k> = true;
template <index_t n>
inline constexpr bool selects_ranks<top_k_of<n>> = true;

// One row's choices, the ranks `step` apart.
struct ranked_row {
  expert_id* id;
  float* value;
  index_t step;
  int k;

  expert_id& at(int r) const { return id[r * step]; }
  void set(int r, expert_id e, float x) const {
    id[r * step] = e;
    value[r * step] = x;
  }
  bool has(expert_id e) const {
    for (int r = 0; r < k; ++r)
      if (at(r) == e) return true;
    return false;
  }
};

// Ranks that are looked at as bits; those past them one by one.
inline constexpr int ranks_as_bits = 64;

// Ranks as bits, so that nothing is asked rank by rank: who comes first, and who then.
struct preferred_ranks {
  std::uint64_t first, then;
};

// The best J of the plain ranks, those of them in memory, and (unless only these may be chosen) the
// others in plain order. The plain ranks are those that are `there`, `best` of which, at least k,
// are candidates.
MOEROUTE_INLINE preferred_ranks preferred(const residency_rule& rule, std::uint64_t held,
                                          std::uint64_t there, int best) {
  const auto below = [](index_t n) {
    return n >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << n) - 1;
  };
  const std::uint64_t first = ((held & below(best)) | below(rule.forced)) & there;
  return {first, rule.kind == residency_kind::within ? 0 : there & ~held & ~first};
}

// c: the preferred of the plain ranks.
MOEROUTE_INLINE void prefer_resident(preferred_ranks ranks, const ranked_row& plain,
                                     const ranked_row& c) {
  auto [first, then] = ranks;
  for (int out = 0; out < c.k; ++out) {
    const bool of_first = first != 0;
    const std::uint64_t from = of_first ? first : then, left = from & (from - 1);
    first = of_first ? left : 0;
    then = of_first ? then : left;
    const bool any = from != 0;
    const int r = any ? std::countr_zero(from) : 0;
    c.set(out, any ? plain.at(r) : no_expert,
          any ? plain.value[r * plain.step] : simd::minus_infinity);
  }
}

// The same for more ranks than bits.
MOEROUTE_OUT_OF_LINE inline void prefer_resident_of_many(const residency_rule& rule,
                                                         const resident_view& set,
                                                         const ranked_row& plain, int best,
                                                         const ranked_row& c) {
  int out = 0;
  const int forced = static_cast<int>(rule.forced);
  for (int r = 0; r < forced && r < plain.k; ++r)
    c.set(out++, plain.at(r), plain.value[r * plain.step]);
  for (int pass = 0; pass < (rule.kind == residency_kind::within ? 1 : 2); ++pass)
    for (int r = forced; r < (pass == 0 ? best : plain.k) && out < c.k; ++r) {
      const expert_id e = plain.at(r);
      if (e == no_expert) break;
      if (set.contains(e) == (pass == 0)) c.set(out++, e, plain.value[r * plain.step]);
    }
  for (; out < c.k; ++out) c.set(out, no_expert, simd::minus_infinity);
}

// How many ranks it takes until their softmax mass is at least `share`.
template <class A>
int ranks_of_mass(const float* s, index_t experts, const ranked_row& plain, float share,
                  float* sorted) {
  const float max = plain.value[0];
  if (!(max > simd::minus_infinity) || !(max < simd::plus_infinity)) return plain.k;
  const float total = simd::row_sum_exp<A>(s, experts, max);
  for (int r = 0; r < plain.k; ++r) sorted[r] = plain.value[r * plain.step];
  simd::row_exp<A>(sorted, plain.k, max, sorted);
  double mass = 0.0;
  const double enough = static_cast<double>(share) * static_cast<double>(total);
  int n = 1;
  for (int r = 0; r < plain.k; ++r) {
    mass += static_cast<double>(sorted[r]);
    n += mass < enough;
  }
  return std::min(n, plain.k);
}

// The last rank before `end` that is missing and not forced; -1 where there is none. missing: of
// the first ranks, as bits.
inline int last_missing(const residency_rule& rule, const resident_view& set, const ranked_row& c,
                        std::uint64_t missing, int end) {
  for (; end > ranks_as_bits; --end) {
    const expert_id e = c.at(end - 1);
    if (end > rule.forced && e != no_expert && !set.contains(e)) return end - 1;
  }
  if (end < ranks_as_bits) missing &= (std::uint64_t{1} << end) - 1;
  if (rule.forced > 0)
    missing &= rule.forced < ranks_as_bits ? ~std::uint64_t{0} << rule.forced : std::uint64_t{0};
  return 63 - std::countl_zero(missing);
}

// From the last choice on: a missing one for the best in memory that is not chosen and close
// enough. free: scratch of the set's words.
template <class A>
MOEROUTE_OUT_OF_LINE void swap_missing(const residency_rule& rule, const resident_view& set,
                                       const float* s, const ranked_row& c, std::uint64_t missing,
                                       float range, std::uint64_t* free) {
  std::copy_n(set.words, resident_view::words_of(set.experts), free);
  for (int r = 0; r < c.k; ++r)
    if (const expert_id e = c.at(r); e != no_expert)
      free[e >> 6] &= ~(std::uint64_t{1} << (e & 63));
  index_t left = rule.swaps == 0 ? c.k : rule.swaps;
  for (int r = c.k; left > 0 && (r = last_missing(rule, set, c, missing, r)) >= 0; --left) {
    const simd::marked_best best = simd::best_of_marked<A>(s, set.experts, free);
    // One rounding, whatever the instruction set has. Who is too far below this one is so below
    // those before it too.
    if (!(best.value > simd::minus_infinity) ||
        !(best.value >= std::fma(-rule.strength, range, s[c.at(r)])))
      return;
    const auto f = static_cast<expert_id>(best.column);
    free[f >> 6] &= ~(std::uint64_t{1} << (f & 63));
    c.set(r, f, best.value);
  }
}

// Entropy in nats of the row's softmax; its largest is finite. row is scratch of E.
template <class A>
float entropy_of(const float* s, index_t experts, float* row) {
  using F = simd::vfloat<A>;
  const float max = simd::row_max<A>(s, experts);
  const float total = simd::row_sum_exp<A>(s, experts, max);
  const F top(max), none(0.0f);
  simd::map_row<A>(s, experts, row, [&](F x) {
    const F below = x - top;
    return simd::select<A>(below >= F(-87.0f), simd::exp_nonpositive<A>(below) * below, none);
  });
  return std::log(total) - simd::row_sum<A>(row, experts) / total;
}

template <class A>
MOEROUTE_OUT_OF_LINE void call_buddies(const residency_rule& rule, const resident_view& set,
                                       const float* s, const ranked_row& c, float* row) {
  const auto is_missing = [&](expert_id e) { return e != no_expert && !set.contains(e); };
  int missing = 0;
  for (int r = 0; r < c.k; ++r) missing += is_missing(c.at(r));
  if (missing == 0 || static_cast<float>(missing) > rule.most_missing * static_cast<float>(c.k))
    return;
  if (rule.least_entropy > 0.0f && entropy_of<A>(s, set.experts, row) < rule.least_entropy) return;
  for (int r = static_cast<int>(rule.forced); r < c.k; ++r) {
    if (!is_missing(c.at(r))) continue;
    for (const expert_id f :
         rule.buddies->of(c.at(r)).first(static_cast<std::size_t>(rule.search))) {
      if (f == no_expert) break;
      if (!set.contains(f) || c.has(f) || !(s[f] > simd::minus_infinity)) continue;
      c.set(r, f, s[f]);
      break;
    }
  }
}

// Columns that tie with the first that was put first: they are what they were, with the bonus.
MOEROUTE_COLD inline void keep_first_of_ties(const float* s, const resident_view& set, float bonus,
                                             float most, float* to) {
  bool first = true;
  for (expert_id e = 0; e < set.experts; ++e)
    if (s[e] == most && !std::exchange(first, false)) to[e] = set.contains(e) ? s[e] + bonus : s[e];
}

// Which of the first k <= 64 ranks of n rows, rank by rank in lanes, are experts in the set, and
// which are experts at all: bits of ranks, row by row.
template <class A>
void held_ranks(const resident_view& set, const expert_id* id, int k, int n, std::uint64_t* held,
                std::uint64_t* there) {
  std::fill_n(held, block_rows, 0);
  std::fill_n(there, block_rows, 0);
  for (int lane = 0; lane < n; lane += simd::width<A>)
    for (int low = 0; low < k; low += 32) {
      simd::vint<A> in(0), any(0);
      for (int r = low; r < std::min(k, low + 32); ++r) {
        const simd::vint<A> e = simd::load<A>(id + r * block_rows + lane), none(0),
                            bit(static_cast<std::int32_t>(1u << (r - low)));
        const auto expert = simd::differs<A>(e, simd::vint<A>(no_expert));
        any |= simd::select<A>(expert, bit, none);
        in |= simd::select<A>(expert & simd::marked_at<A>(set.words, set.experts, e), bit, none);
      }
      alignas(alignment) std::int32_t bits[2][simd::width<A>];
      in.store_aligned(bits[0]);
      any.store_aligned(bits[1]);
      for (int i = 0; i < simd::width<A>; ++i) {
        held[lane + i] |= std::uint64_t{static_cast<std::uint32_t>(bits[0][i])} << low;
        there[lane + i] |= std::uint64_t{static_cast<std::uint32_t>(bits[1][i])} << low;
      }
    }
}

// The same of one row.
template <class A>
MOEROUTE_INLINE void held_ranks(const resident_view& set, const simd::row_ranks& c, int k,
                                std::uint64_t& held, std::uint64_t& there) {
  held = there = 0;
  for (int r = 0; r < k; r += simd::width<A>) {
    const simd::vint<A> e = simd::vint<A>::load_aligned(c.column + r);
    const auto expert = simd::differs<A>(e, simd::vint<A>(no_expert));
    there |= std::uint64_t{expert.mask()} << r;
    held |= std::uint64_t{(expert & simd::marked_at<A>(set.words, set.experts, e)).mask()} << r;
  }
}

// Leaves out what is missing and hardly counts, of the rows of a block, one per lane.
template <class A>
void drop_cold(const residency_rule& rule, const resident_view& set, choice_block& c, int rows) {
  using F = simd::vfloat<A>;
  const F zero(0.0f), one(1.0f);
  for (int lane = 0; lane < rows; lane += simd::width<A>) {
    const auto for_each = [&](auto f) {
      for (int r = 0; r < c.k; ++r)
        f(r, c.id + r * block_rows + lane, c.value + r * block_rows + lane);
    };
    F largest = zero, all = zero, kept = zero;
    for_each([&](int, const expert_id*, const float* weight) {
      const F w = simd::load<A>(weight);
      largest = simd::select<A>(w > largest, w, largest);
    });
    const F least = F(rule.strength) * largest;
    for_each([&](int r, expert_id* id, float* weight) {
      const simd::vint<A> e = simd::load<A>(id), none(no_expert);
      const F w = simd::load<A>(weight);
      all += w;
      const auto held = simd::marked_at<A>(set.words, set.experts, e);
      const auto leaves =
          simd::vmask<A>(r >= rule.forced) & simd::differs<A>(e, none) & (w < least) & !held;
      const F left = simd::select<A>(leaves, zero, w);
      simd::select<A>(leaves, none, e).store_unaligned(id);
      left.store_unaligned(weight);
      kept += left;
    });
    if (rule.dropped == dropped_weight::lost) continue;
    // What lost nothing has all for kept; of infinite ones the quotient is no number.
    const auto shares = (kept > zero) & (kept != all);
    const F factor =
        simd::select<A>(shares, simd::divide<A>(all, simd::select<A>(shares, kept, one)), one);
    for_each([&](int, const expert_id*, float* weight) {
      (simd::load<A>(weight) * factor).store_unaligned(weight);
    });
  }
}

// The same of one row in registers, with the operations of a lane in their order.
template <class A, int n>
MOEROUTE_INLINE void drop_cold(const residency_rule& rule, const resident_view& set,
                               row_choices<A, n>& c) {
  using F = simd::vfloat<A>;
  using I = simd::vint<A>;
  constexpr int w = simd::width<A>;
  const F zero(0.0f), one(1.0f);
  const I none(no_expert);
  const auto for_each = [&](auto f) MOEROUTE_INLINE_LAMBDA {
    for (int r = 0; r < n && r * w < c.k; ++r) f(r, c.id[r], c.value[r]);
  };
  F largest = zero;
  for_each([&](int, I e, F x) MOEROUTE_INLINE_LAMBDA {
    largest = simd::select<A>(simd::differs<A>(e, none) & (x > largest), x, largest);
  });
  const F least = F(rule.strength) * simd::largest_lane<A>(largest);
  const bool shares_out = rule.dropped != dropped_weight::lost;
  const auto itself = [](F x) { return x; };
  const F all = shares_out ? c.sum(itself) : zero;
  for_each([&](int r, I& e, F& x) MOEROUTE_INLINE_LAMBDA {
    const auto held = simd::marked_at<A>(set.words, set.experts, e);
    const auto may_leave = simd::lanes_from<A>(static_cast<int>(rule.forced) - r * w);
    const auto leaves = may_leave & simd::differs<A>(e, none) & (x < least) & !held;
    e = simd::select<A>(leaves, none, e);
    x = simd::select<A>(leaves, zero, x);
  });
  if (!shares_out) return;
  const F kept = c.sum(itself);
  const auto shares = (kept > zero) & (kept != all);
  const F factor =
      simd::select<A>(shares, simd::divide<A>(all, simd::select<A>(shares, kept, one)), one);
  for_each([&](int, I, F& x) MOEROUTE_INLINE_LAMBDA { x *= factor; });
}

}  // namespace detail

/// A selection rule that gives way to what is in memory: router<Score, resident_selection<top_k>>
/// chooses other experts than router<Score, top_k> and weighs them as that one would.
///
/// Groups are chosen by plain scores; a rule moves choices within them. A row with an infinite
/// score stays as it is. The set may change between calls, not during one. Cost: cache_prior two
/// passes more over the row; max_rank the selection of `ranks` in place of k; margin_swap two
/// passes per expert that it looks for, in rows that miss something. Determinism: the same ids on
/// every ISA.
template <selection_rule Selection>
  requires detail::selects_ranks<Selection>
struct resident_selection {
  Selection plain{};
  residency_rule rule{};
  resident_view set{};
  bool has_best = false;  ///< of within: every row's best is in the set, so that none is forced

  index_t choices() const { return plain.choices(); }
  bool masks_experts() const { return plain.masks_experts(); }
  bool weighs_lost_with_0() const
    requires requires(const Selection& s) { s.weighs_lost_with_0(); }
  {
    return plain.weighs_lost_with_0();
  }
  /// Whether a row's best expert is its first choice.
  bool keeps_best() const { return !moves() || rule.forced > 0 || has_best; }

  /// Throws: error where the plain rule, this one, or the set does not fit E.
  void check(index_t experts) const {
    plain.check(experts);
    rule.check(experts, choices());
    if (rule.active()) check_size("resident_selection", "set.experts", set.experts, experts);
  }

  struct buffers {
    decltype(std::declval<const Selection&>().carve(std::declval<scratch&>(), index_t{})) plain;
    float* row;          ///< [16, E] where scores are moved, [E] where rows are looked through
    std::uint64_t* key;  ///< of the selection of ranks
    expert_id* id;       ///< [ranks + 1][16]
    float* value;
    float* sorted;         ///< [ranks]
    std::uint64_t* words;  ///< of the set
    std::int32_t* list;    ///< [E] where columns are packed
  };

  buffers carve(scratch& tape, index_t experts) const {
    const index_t most = ranks(experts);
    const bool on = moves();
    return {plain.carve(tape, experts),
            tape.take<float>(!on                         ? 0
                             : moves_scores() || swaps() ? block_rows * (experts + block_rows)
                                                         : experts + block_rows),
            tape.take<std::uint64_t>(on ? simd::top_k_scratch(experts, most) : 0),
            tape.take<expert_id>(on ? (most + 1) * block_rows : 0),
            tape.take<float>(on ? (most + 1) * block_rows : 0),
            tape.take<float>(on ? round_up(most, block_rows) : 0),
            tape.take<std::uint64_t>(swaps() ? resident_view::words_of(experts) : 0),
            tape.take<std::int32_t>(packs() || swaps() ? experts : 0)};
  }

  template <class A = simd::default_arch>
  void select(const logit_block& choice, float* rows, choice_block& c, const buffers& m) const {
    if (!moves()) return plain.template select<A>(choice, rows, c, m.plain);
    logit_block s = choice;
    if (plain.masks_experts()) {
      plain.template select<A>(choice, rows, c, m.plain);
      s.logits = rows;
      s.stride = choice.experts;
    }
    const auto row = [&](int i) {
      return detail::ranked_row{c.id + i, c.value + i, block_rows, c.k};
    };
    if (packs()) return this->template select_packed<A>(s, c, m);
    if (moves_scores()) return this->template move_scores<A>(s, c, m);
    if (swaps() && c.k <= detail::ranks_as_bits) {
      simd::top_k_block<A>(s.logits, s.stride, s.rows, s.experts, c.k, c.value, c.id, m.key);
      return this->template swap_lanes<A>(s, c, m);
    }
    const bool further = looks_further();
    const int most = further ? static_cast<int>(ranks(s.experts)) : c.k;
    float* const value = further ? m.value : c.value;
    expert_id* const id = further ? m.id : c.id;
    clear(s.rows, most, id, value);
    simd::top_k_block<A>(s.logits, s.stride, s.rows, s.experts, most, value, id, m.key);
    std::uint64_t held[block_rows], there[block_rows];
    detail::held_ranks<A>(set, id, std::min(most, detail::ranks_as_bits), s.rows, held, there);
    for (int i = 0; i < s.rows; ++i) {
      if (!further) {
        this->template change_row<A>(s.row(i), there[i] & ~held[i], row(i), m.row, m.words);
        continue;
      }
      const detail::ranked_row wide{id + i, value + i, block_rows, most};
      const int best = this->template candidates<A>(s.row(i), s.experts, wide, m.sorted);
      if (most <= detail::ranks_as_bits)
        detail::prefer_resident(detail::preferred(rule, held[i], there[i], best), wide, row(i));
      else
        detail::prefer_resident_of_many(rule, set, wide, best, row(i));
    }
  }

  /// The most columns of a row that comes alone.
  static constexpr index_t most_alone = 1024;

  bool takes_rows() const {
    if (!plain.takes_rows()) return false;
    return !moves() || (!masks_experts() && rule.forced > 0);
  }
  /// Whether rows of so many columns may come alone.
  bool takes_rows_of(index_t experts) const {
    return !moves() || (experts <= most_alone && ranks(experts) <= simd::max_row_k);
  }

  /// Requires: takes_rows() and takes_rows_of(experts).
  template <class A = simd::default_arch>
  void select_row(const float* s, index_t experts, simd::row_ranks& c) const {
    if (!moves()) return plain.template select_row<A>(s, experts, c);
    this->template select_active<A>(s, experts, c);
  }
  template <class A = simd::default_arch>
  void select_row(float* s, index_t experts, simd::row_ranks& c) const {
    if (!moves()) return plain.template select_row<A>(s, experts, c);
    this->template select_active<A>(s, experts, c);
  }

  bool lost(const buffers& m, int row, expert_id e, index_t experts) const
    requires requires(const Selection& s) { s.weighs_lost_with_0(); }
  {
    return plain.lost(m.plain, row, e, experts);
  }

  /// What was chosen and weighed, of the rows of a block or of one row: the last word on it.
  template <class A = simd::default_arch>
  MOEROUTE_INLINE void settle(choice_block& c, int rows) const {
    if (drops()) detail::drop_cold<A>(rule, set, c, rows);
  }
  template <class A = simd::default_arch, int n>
  MOEROUTE_INLINE void settle(row_choices<A, n>& c) const {
    if (drops()) detail::drop_cold<A, n>(rule, set, c);
  }

 private:
  bool drops() const { return rule.kind == residency_kind::drop_cold && rule.active(); }
  // Whether the rule has a say in the choice; who drops looks at weights.
  bool moves() const { return rule.kind != residency_kind::drop_cold && rule.active(); }
  // Rules that choose the k best of scores of their own making.
  bool moves_scores() const {
    return rule.kind == residency_kind::cache_prior ||
           (rule.kind == residency_kind::within && rule.ranks == 0);
  }
  // Who chooses among those in memory alone needs no other columns.
  bool packs() const {
    return rule.kind == residency_kind::within && rule.ranks == 0 && (rule.forced == 0 || has_best);
  }
  bool swaps() const { return rule.kind == residency_kind::margin_swap; }
  // Rules that choose among plain ranks, more of them than choices.
  bool looks_further() const {
    return rule.kind == residency_kind::max_rank || rule.kind == residency_kind::mass_threshold ||
           rule.kind == residency_kind::within;
  }
  // Plain ranks that the rule looks at.
  index_t ranks(index_t experts) const {
    switch (rule.kind) {
      case residency_kind::max_rank:
      case residency_kind::within: return rule.ranks == 0 ? choices() : rule.ranks;
      case residency_kind::mass_threshold:
        return rule.ranks == 0 ? std::min(experts, 4 * choices()) : rule.ranks;
      default: return choices();
    }
  }

  float range(const simd::row_bounds& own) const {
    return rule.range == score_range::running ? rule.running->value() : own.range();
  }

  // to: the scores that the choice is made on; false where the row stays as it is.
  template <class A>
  MOEROUTE_INLINE bool moved(const float* s, index_t experts, float* to) const {
    const simd::row_bounds own = simd::bounds_of<A>(s, experts);
    if (!(own.most >= own.least) || own.most == simd::plus_infinity) return false;
    if (rule.kind == residency_kind::within) {
      simd::keep_marked<A>(s, experts, set.words, to);
      if (rule.forced == 1) to[simd::first_column<A>(s, experts, own.most)] = simd::plus_infinity;
      return true;
    }
    const float bonus = rule.strength * this->range(own);
    if (rule.forced != 1)
      simd::add_to_marked<A>(s, experts, set.words, bonus, to);
    else if (simd::add_to_marked_after<A>(s, experts, set.words, bonus, own.most, to) > 1)
      detail::keep_first_of_ties(s, set, bonus, own.most, to);
    return true;
  }

  template <class A>
  void move_scores(const logit_block& s, choice_block& c, const buffers& m) const {
    const bool several = rule.forced > 1;
    if (several)
      simd::top_k_block<A>(s.logits, s.stride, s.rows, s.experts, static_cast<int>(rule.forced),
                           m.value, m.id, m.key);
    std::uint32_t is_moved = 0;
    for (int i = 0; i < s.rows; ++i) {
      float* const row = m.row + i * s.experts;
      if (!this->template moved<A>(s.row(i), s.experts, row)) {
        std::copy_n(s.row(i), s.experts, row);
        continue;
      }
      is_moved |= 1u << i;
      for (index_t r = 0; several && r < rule.forced; ++r)
        if (const expert_id e = m.id[r * block_rows + i]; e != no_expert)
          row[e] = simd::plus_infinity;
    }
    simd::top_k_block<A>(m.row, s.experts, s.rows, s.experts, c.k, c.value, c.id, m.key);
    // The plain best `forced` lead in their order; every value is the plain score of its expert.
    for (int i = 0; several && i < s.rows; ++i)
      for (index_t r = 0; r < rule.forced && (is_moved >> i & 1) != 0; ++r)
        c.id[r * block_rows + i] = m.id[r * block_rows + i];
    simd::take_values<A>(s.logits, s.stride, s.rows, s.experts, c.id, c.k, c.value);
  }

  // Lanes without a row are read with the others: they hold nobody.
  static void clear(int rows, int k, expert_id* id, float* value) {
    if (rows == block_rows) return;
    std::fill_n(id, k * block_rows, no_expert);
    std::fill_n(value, k * block_rows, simd::minus_infinity);
  }

  // The best in memory of every row, [k][16]: their columns move together, so that what is selected
  // from is short. Returns the rows that have a +inf, as bits.
  template <class A>
  std::uint32_t select_held(const logit_block& s, int k, const buffers& m, expert_id* id,
                            float* value) const {
    const index_t n = simd::list_marked(set.words, s.experts, m.list);
    const index_t size = std::max<index_t>(n, k), stride = size + block_rows;
    std::uint32_t infinite = 0;
    for (int i = 0; i < s.rows; ++i)
      infinite |= std::uint32_t{simd::pack_marked<A>(s.row(i), s.experts, set.words, size,
                                                     m.row + i * stride)}
                  << i;
    clear(s.rows, k, id, value);
    simd::top_k_block<A>(m.row, stride, s.rows, size, k, value, id, m.key);
    simd::renumber<A>(id, k * block_rows, m.list, n);
    return infinite;
  }

  template <class A>
  void select_packed(const logit_block& s, choice_block& c, const buffers& m) const {
    for (std::uint32_t infinite = this->template select_held<A>(s, c.k, m, c.id, c.value);
         infinite != 0; infinite &= infinite - 1) {
      const int i = std::countr_zero(infinite);
      simd::top_k_block<A>(s.row(i), s.stride, 1, s.experts, c.k, c.value + i, c.id + i, m.key);
    }
  }

  // margin_swap on the plain k best of every row, one row per lane. Those of them in memory are the
  // best in memory, in their order: who comes next there is the best that is not chosen.
  template <class A>
  void swap_lanes(const logit_block& s, choice_block& c, const buffers& m) const {
    using F = simd::vfloat<A>;
    using I = simd::vint<A>;
    this->template select_held<A>(s, c.k, m, m.id, m.value);
    alignas(alignment) float range[block_rows] = {};
    for (int i = 0; i < s.rows; ++i)
      range[i] = rule.range == score_range::running
                     ? rule.running->value()
                     : c.value[i] - simd::least_of<A>(s.row(i), s.experts);
    const I one(1), zero(0), none(no_expert);
    const F never(simd::minus_infinity), nothing(0.0f), step(1.0f);
    for (int lane = 0; lane < s.rows; lane += simd::width<A>) {
      const auto held = [&](I e) {
        return simd::differs<A>(e, none) & simd::marked_at<A>(set.words, set.experts, e);
      };
      I next = zero;  // at most k, where nobody asks
      for (int r = 0; r < c.k; ++r)
        next += simd::select<A>(held(simd::load<A>(c.id + r * block_rows + lane)), one, zero);
      F left(static_cast<float>(rule.swaps == 0 ? c.k : std::min<index_t>(rule.swaps, c.k)));
      left = simd::select<A>(simd::load<A>(c.value + lane) < F(simd::plus_infinity), left, nothing);
      for (int r = c.k - 1; r >= rule.forced; --r) {
        expert_id* const id = c.id + r * block_rows + lane;
        float* const value = c.value + r * block_rows + lane;
        const I e = simd::load<A>(id), at = next * I(block_rows) + simd::lane_numbers<A>();
        const F x = simd::load<A>(value), best = F::gather(m.value + lane, at);
        const auto asks = simd::differs<A>(e, none) & !held(e) & (left > nothing);
        // One rounding, whatever the instruction set has.
        const auto takes =
            asks & (best > never) &
            (best >= simd::fma<A>(F(-rule.strength), simd::load<A>(range + lane), x));
        simd::select<A>(takes, I::gather(m.id + lane, at), e).store_unaligned(id);
        simd::select<A>(takes, best, x).store_unaligned(value);
        next += simd::select<A>(takes, one, zero);
        // Who is too far below this one is so below those before it too.
        left = simd::select<A>(asks, simd::select<A>(takes, left - step, nothing), left);
      }
    }
  }

  // Of max_rank, mass_threshold, within the best ranks: how many plain ranks are candidates.
  template <class A>
  MOEROUTE_INLINE int candidates(const float* s, index_t experts, const detail::ranked_row& wide,
                                 float* sorted) const {
    if (rule.kind != residency_kind::mass_threshold) return wide.k;
    return std::max(static_cast<int>(choices()),
                    detail::ranks_of_mass<A>(s, experts, wide, rule.strength, sorted));
  }

  // margin_swap and buddy, on the plain k best.
  template <class A>
  MOEROUTE_INLINE void change_row(const float* s, std::uint64_t missing,
                                  const detail::ranked_row& c, float* row,
                                  std::uint64_t* words) const {
    const float most = c.value[0];  // the best of all: nothing is missing where there is none
    if (rule.kind == residency_kind::buddy) {
      if (most < simd::plus_infinity) detail::call_buddies<A>(rule, set, s, c, row);
      return;
    }
    if (most == simd::plus_infinity || detail::last_missing(rule, set, c, missing, c.k) < 0) return;
    const bool running = rule.range == score_range::running;
    const float least = running ? most : simd::least_of<A>(s, set.experts);
    detail::swap_missing<A>(rule, set, s, c, missing,
                            running ? rule.running->value() : most - least, words);
  }

  template <class A>
  void select_active(const float* s, index_t experts, simd::row_ranks& c) const {
    const int k = static_cast<int>(choices());
    const detail::ranked_row chosen{c.column, c.value, 1, k};
    alignas(alignment) float row[most_alone + block_rows];
    if (moves_scores()) {
      simd::row_ranks best;
      if (!this->template moved<A>(s, experts, row)) return simd::top_k_row<A>(s, experts, k, c);
      if (rule.forced > 1) {
        simd::top_k_row<A>(s, experts, static_cast<int>(rule.forced), best);
        for (int r = 0; r < rule.forced; ++r)
          if (best.column[r] != no_expert) row[best.column[r]] = simd::plus_infinity;
      }
      simd::top_k_row<A>(row, experts, k, c);
      for (int r = 0; rule.forced > 1 && r < rule.forced; ++r) c.column[r] = best.column[r];
      return simd::take_values<A>(s, experts, k, c);
    }
    std::uint64_t held, there;
    if (!looks_further()) {
      std::uint64_t words[most_alone / 64];
      simd::top_k_row<A>(s, experts, k, c);
      detail::held_ranks<A>(set, c, k, held, there);
      this->template change_row<A>(s, there & ~held, chosen, row, words);
    } else {
      const index_t most = ranks(experts);
      simd::row_ranks wide;
      simd::top_k_row<A>(s, experts, static_cast<int>(most), wide);
      detail::held_ranks<A>(set, wide, static_cast<int>(most), held, there);
      const int best = this->template candidates<A>(
          s, experts, {wide.column, wide.value, 1, static_cast<int>(most)}, row);
      const auto [first, then] = detail::preferred(rule, held, there, best);
      simd::take_ranks<A>(wide, first, then, k, c);
    }
  }
};
static_assert(row_selection<resident_selection<top_k>>);

}  // namespace moeroute

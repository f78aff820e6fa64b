// Selection by rank that gives way to what is in memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

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

// c: the best J of the plain ranks, those of them in memory, and (unless only these may be chosen)
// the others in plain order. The plain ranks are n, `best` of which, at least k, are candidates.
inline void prefer_resident(const residency_rule& rule, const resident_view& set,
                            const ranked_row& plain, int best, const ranked_row& c) {
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
  for (int r = 0; r < plain.k; ++r) {
    mass += static_cast<double>(sorted[r]);
    if (mass >= enough) return r + 1;
  }
  return plain.k;
}

inline int missing_of(const resident_view& set, const ranked_row& c) {
  int n = 0;
  for (int r = 0; r < c.k; ++r) n += c.at(r) != no_expert && !set.contains(c.at(r));
  return n;
}

// From the last choice on: a missing one for the best in memory that is not chosen and close
// enough. row is scratch of E.
template <class A>
MOEROUTE_OUT_OF_LINE void swap_missing(const residency_rule& rule, const resident_view& set,
                                       const float* s, const ranked_row& c, float range,
                                       float* row) {
  simd::keep_marked<A>(s, set.experts, set.words, row);
  for (int r = 0; r < c.k; ++r)
    if (c.at(r) != no_expert) row[c.at(r)] = simd::minus_infinity;
  index_t left = rule.swaps == 0 ? c.k : rule.swaps;
  for (int r = c.k - 1; r >= rule.forced && left > 0; --r) {
    const expert_id e = c.at(r);
    if (e == no_expert || set.contains(e)) continue;
    const float best = simd::row_max<A>(row, set.experts);
    if (!(best > simd::minus_infinity)) return;
    // One rounding, whatever the instruction set has.
    if (!(best >= std::fma(-rule.strength, range, s[e]))) continue;
    const auto f = static_cast<expert_id>(simd::first_column<A>(row, set.experts, best));
    row[f] = simd::minus_infinity;
    c.set(r, f, best);
    --left;
  }
}

// Entropy in nats of the row's softmax. row is scratch of E.
template <class A>
float entropy_of(const float* s, index_t experts, float* row) {
  using F = simd::vfloat<A>;
  const float max = simd::row_max<A>(s, experts);
  if (!(max > simd::minus_infinity) || !(max < simd::plus_infinity)) return 0.0f;
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
                                       const float* s, const ranked_row& c, int missing,
                                       float* row) {
  if (static_cast<float>(missing) > rule.most_missing * static_cast<float>(c.k)) return;
  if (rule.least_entropy > 0.0f && entropy_of<A>(s, set.experts, row) < rule.least_entropy) return;
  for (int r = static_cast<int>(rule.forced); r < c.k; ++r) {
    const expert_id e = c.at(r);
    if (e == no_expert || set.contains(e)) continue;
    for (const expert_id f : rule.buddies->of(e).first(static_cast<std::size_t>(rule.search))) {
      if (f == no_expert) break;
      if (!set.contains(f) || c.has(f) || !(s[f] > simd::minus_infinity)) continue;
      c.set(r, f, s[f]);
      break;
    }
  }
}

}  // namespace detail

/// A selection rule that gives way to what is in memory: router<Score, resident_selection<top_k>>
/// chooses other experts than router<Score, top_k> and weighs them as that one would.
///
/// Groups are chosen by plain scores; a rule moves choices within them. A row with an infinite
/// score stays as it is. The set may change between calls, not during one. Cost: cache_prior one
/// pass more over the row; max_rank the selection of `ranks` in place of k; margin_swap and buddy
/// two passes in rows that miss something. Determinism: the same ids on every ISA.
template <selection_rule Selection>
  requires detail::selects_ranks<Selection>
struct resident_selection {
  Selection plain{};
  residency_rule rule{};
  resident_view set{};

  index_t choices() const { return plain.choices(); }
  bool masks_experts() const { return plain.masks_experts(); }
  bool weighs_lost_with_0() const
    requires requires(const Selection& s) { s.weighs_lost_with_0(); }
  {
    return plain.weighs_lost_with_0();
  }
  /// Whether a row's best expert is its first choice.
  bool keeps_best() const { return !rule.active() || rule.forced > 0; }

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
    expert_id* id;       ///< [ranks][16]
    float* value;
    float* sorted;  ///< [ranks]
  };

  buffers carve(scratch& tape, index_t experts) const {
    const index_t most = ranks(experts);
    return {plain.carve(tape, experts),
            tape.take<float>(
                !rule.active() ? 0 : (moves_scores() ? block_rows : 1) * experts + block_rows),
            tape.take<std::uint64_t>(rule.active() ? simd::top_k_scratch(experts, most) : 0),
            tape.take<expert_id>(rule.active() ? most * block_rows : 0),
            tape.take<float>(rule.active() ? most * block_rows : 0),
            tape.take<float>(rule.active() ? round_up(most, block_rows) : 0)};
  }

  template <class A = simd::default_arch>
  void select(const logit_block& choice, float* rows, choice_block& c, const buffers& m) const {
    if (!rule.active()) return plain.template select<A>(choice, rows, c, m.plain);
    logit_block s = choice;
    if (plain.masks_experts()) {
      plain.template select<A>(choice, rows, c, m.plain);
      s.logits = rows;
      s.stride = choice.experts;
    }
    const auto row = [&](int i) {
      return detail::ranked_row{c.id + i, c.value + i, block_rows, c.k};
    };
    if (moves_scores()) return this->template move_scores<A>(s, c, m);
    if (!looks_further()) {
      simd::top_k_block<A>(s.logits, s.stride, s.rows, s.experts, c.k, c.value, c.id, m.key);
      for (int i = 0; i < s.rows; ++i) this->template change_row<A>(s.row(i), row(i), m.row);
      return;
    }
    const int most = static_cast<int>(ranks(s.experts));
    simd::top_k_block<A>(s.logits, s.stride, s.rows, s.experts, most, m.value, m.id, m.key);
    for (int i = 0; i < s.rows; ++i) {
      const detail::ranked_row wide{m.id + i, m.value + i, block_rows, most};
      this->template choose_of<A>(s.row(i), s.experts, wide, row(i), m.sorted);
    }
  }

  /// The most columns of a row that comes alone.
  static constexpr index_t most_alone = 1024;

  bool takes_rows() const {
    if (!plain.takes_rows()) return false;
    return !rule.active() || (!masks_experts() && rule.forced > 0);
  }
  /// Whether rows of so many columns may come alone.
  bool takes_rows_of(index_t experts) const {
    return !rule.active() || (experts <= most_alone && ranks(experts) <= simd::max_row_k);
  }

  /// Requires: takes_rows() and takes_rows_of(experts).
  template <class A = simd::default_arch>
  void select_row(const float* s, index_t experts, simd::row_ranks& c) const {
    if (!rule.active()) return plain.template select_row<A>(s, experts, c);
    this->template select_active<A>(s, experts, c);
  }
  template <class A = simd::default_arch>
  void select_row(float* s, index_t experts, simd::row_ranks& c) const {
    if (!rule.active()) return plain.template select_row<A>(s, experts, c);
    this->template select_active<A>(s, experts, c);
  }

  bool lost(const buffers& m, int row, expert_id e, index_t experts) const
    requires requires(const Selection& s) { s.weighs_lost_with_0(); }
  {
    return plain.lost(m.plain, row, e, experts);
  }

 private:
  // Rules that choose the k best of scores of their own making.
  bool moves_scores() const {
    return rule.kind == residency_kind::cache_prior ||
           (rule.kind == residency_kind::within && rule.ranks == 0);
  }
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
    if (rule.kind == residency_kind::within)
      simd::keep_marked<A>(s, experts, set.words, to);
    else
      simd::add_to_marked<A>(s, experts, set.words, rule.strength * this->range(own), to);
    if (rule.forced == 1) {
      const index_t best = simd::first_column<A>(s, experts, own.most);
      to[best] = simd::plus_infinity;
    }
    return true;
  }

  // The plain best `forced` lead in their order; every value is the plain score of its expert.
  void settle(const float* s, const expert_id* best, index_t step,
              const detail::ranked_row& c) const {
    for (int r = 0; r < c.k; ++r) {
      if (r < rule.forced && best != nullptr) c.at(r) = best[r * step];
      if (const expert_id e = c.at(r); e != no_expert) c.value[r * c.step] = s[e];
    }
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
    for (int i = 0; i < s.rows; ++i)
      settle(s.row(i), several && (is_moved >> i & 1) != 0 ? m.id + i : nullptr, block_rows,
             detail::ranked_row{c.id + i, c.value + i, block_rows, c.k});
  }

  // max_rank, mass_threshold, within the best ranks.
  template <class A>
  MOEROUTE_INLINE void choose_of(const float* s, index_t experts, const detail::ranked_row& wide,
                                 const detail::ranked_row& c, float* sorted) const {
    int best = wide.k;
    if (rule.kind == residency_kind::mass_threshold)
      best = std::max(c.k, detail::ranks_of_mass<A>(s, experts, wide, rule.strength, sorted));
    detail::prefer_resident(rule, set, wide, best, c);
  }

  // margin_swap and buddy, on the plain k best.
  template <class A>
  MOEROUTE_INLINE void change_row(const float* s, const detail::ranked_row& c, float* row) const {
    const int missing = detail::missing_of(set, c);
    if (missing == 0) return;
    const simd::row_bounds own = simd::bounds_of<A>(s, set.experts);
    if (own.most == simd::plus_infinity) return;
    if (rule.kind == residency_kind::buddy)
      detail::call_buddies<A>(rule, set, s, c, missing, row);
    else
      detail::swap_missing<A>(rule, set, s, c, this->range(own), row);
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
      settle(s, rule.forced > 1 ? best.column : nullptr, 1, chosen);
    } else if (!looks_further()) {
      simd::top_k_row<A>(s, experts, k, c);
      this->template change_row<A>(s, chosen, row);
    } else {
      const index_t most = ranks(experts);
      simd::row_ranks wide;
      simd::top_k_row<A>(s, experts, static_cast<int>(most), wide);
      // Registers of choices are read whole.
      this->template choose_of<A>(s, experts, {wide.column, wide.value, 1, static_cast<int>(most)},
                                  chosen, row);
      for (index_t r = k; r < round_up(k, block_rows); ++r) {
        c.column[r] = no_expert;
        c.value[r] = simd::minus_infinity;
      }
    }
  }
};
static_assert(row_selection<resident_selection<top_k>>);

}  // namespace moeroute

// Rules for a batch whose time is that of the distinct experts that it reads, and the plan of what
// they are.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include <moeroute/base/workspace.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/residency/resident_router.hpp>
#include <moeroute/simd/transpose.hpp>

namespace moeroute {

/// How a batch agrees on the experts that it reads; each token then takes its best among them.
enum class union_kind {
  opportunistic,  ///< every token's best k0 (or its shortest prefix with mass) join (OEA)
  budget,         ///< the `budget` experts with the most weight over the batch
  vote,           ///< of each group of experts the `stays` that most tokens chose
};

/// A rule of union_router; fields that a kind does not name are not read.
struct union_rule {
  union_kind kind = union_kind::opportunistic;
  index_t k0 = 1;     ///< of opportunistic: at most so many of a token join, k: the plain router
  float mass = 0.0f;  ///< of opportunistic: fewer where their weights reach this; 0: k0 always
  index_t most_rank = 0;  ///< of opportunistic: a token takes from its so many best; 0: no limit
  index_t budget = 1;     ///< of budget
  index_t groups = 1;     ///< of vote: of E / groups experts each
  index_t stays = 1;      ///< of vote
};

/// What a union was, over the calls since it was empty.
struct union_counts {
  std::int64_t batches = 0;
  std::int64_t tokens = 0;         ///< that are not masked
  std::int64_t plain_experts = 0;  ///< distinct ones that the router alone would have read
  std::int64_t agreed_on = 0;      ///< experts that the batch agreed on
  std::int64_t experts = 0;        ///< distinct ones that it reads
  std::int64_t forced = 0;         ///< of these, such as tokens kept against the rule: their best
  std::int64_t choices = 0;

  double experts_per_batch() const { return per_batch(experts); }
  double plain_experts_per_batch() const { return per_batch(plain_experts); }

 private:
  double per_batch(std::int64_t n) const {
    return batches == 0 ? 0.0 : static_cast<double>(n) / static_cast<double>(batches);
  }
};

/// A router that chooses by rank, for batches that read few distinct experts.
///
/// Every token keeps its best expert, whatever the batch agreed on; with fewer than k experts to
/// take from it has fewer choices (no_expert). Weights are the router's for the chosen experts.
/// The order of tokens does not matter (of budget: as far as sums in double are exact). Throws:
/// error where the rule does not fit k or E. Cost: two selections; serial. Determinism: as the
/// router. Source: opportunistic: arXiv 2511.02237.
template <score_function Score, selection_rule Selection = top_k>
  requires detail::selects_ranks<Selection>
class union_router {
 public:
  union_router(router<Score, Selection> plain, const union_rule& rule,
               union_counts* counts = nullptr)
      : plain_(std::move(plain)), rule_(rule), counts_(counts) {}

  const router<Score, Selection>& plain() const { return plain_; }
  index_t k() const { return plain_.k(); }
  index_t experts(index_t columns) const { return columns; }
  side_use reads_side(index_t columns) const { return side_use_of(plain_, columns); }

  void check(index_t, index_t experts) const {
    constexpr const char* where = "union_router";
    plain_.check(experts);
    check_range(where, "k0", rule_.k0, 1, k());
    if (!(rule_.mass >= 0.0f && rule_.mass <= 1.0f))
      fail_value(where, "mass", rule_.mass, "0 to 1");
    if (rule_.most_rank != 0) check_range(where, "most_rank", rule_.most_rank, k(), experts);
    check_range(where, "budget", rule_.budget, 1, experts);
    check_range(where, "groups", rule_.groups, 1, experts);
    check_size(where, "experts % groups", experts % rule_.groups, 0);
    check_range(where, "stays", rule_.stays, 1, experts / rule_.groups);
  }

  template <executor Exec = serial, class A = simd::default_arch>
  void route_batch(matrix_view<const float> z, const side_inputs& side, workspace& ws,
                   assignment& out, const Exec& = {}) const {
    using moved_router = router<Score, resident_selection<Selection>>;
    // Who opportunistically joins brings its best.
    const bool has_best = rule_.kind == union_kind::opportunistic;
    const residency_rule within{.kind = residency_kind::within, .ranks = rule_.most_rank};
    out.reset(z.rows, z.cols, k());
    const index_t words = resident_view::words_of(z.cols);
    moved_router moved{plain_.score,
                       {plain_.selection, within, {}, has_best},
                       plain_.weight,
                       plain_.bias,
                       plain_.transform};
    struct memory {
      std::uint64_t *agreed, *read;
      double* worth;
      expert_id *order, *id;
      float* value;
      decltype(plain_.carve(std::declval<scratch&>(), index_t{})) plain;
      decltype(moved.carve(std::declval<scratch&>(), index_t{})) narrowed;
    };
    const memory m = ws.carve([&](scratch& tape) {
      return memory{tape.take<std::uint64_t>(words),
                    tape.take<std::uint64_t>(words),
                    tape.take<double>(z.cols),
                    tape.take<expert_id>(z.cols),
                    tape.take<expert_id>(k() * block_rows),
                    tape.take<float>(k() * block_rows),
                    plain_.carve(tape, z.cols),
                    moved.carve(tape, z.cols)};
    });
    const bool narrows =
        rule_.kind != union_kind::opportunistic || rule_.k0 < k() || rule_.mass > 0.0f;
    // Weights of the plain choice are asked for by sums of them, or where it stays.
    const bool weighs = !narrows || rule_.kind == union_kind::budget || rule_.mass > 0.0f;
    this->template run<A>(plain_, m.plain, z, side, weighs, m.id, m.value, out);
    if (counts_ != nullptr) counts_->plain_experts += distinct(out, words, m.read);
    const resident_view agreed{m.agreed, z.cols};
    agree(out, words, m);
    if (narrows) {
      moved.selection.set = agreed;
      this->template run<A>(moved, m.narrowed, z, side, true, m.id, m.value, out);
    }
    if (counts_ == nullptr) return;
    ++counts_->batches;
    for (index_t t = 0; t < z.rows; ++t) counts_->tokens += !side.masked(t);
    counts_->agreed_on += agreed.count();
    counts_->experts += distinct(out, words, m.read);
    for (index_t w = 0; w < words; ++w) counts_->forced += std::popcount(m.read[w] & ~m.agreed[w]);
    for (const expert_id e : out.ids()) counts_->choices += e != no_expert;
  }

 private:
  // Every row's ids, and weights where they are asked for or it takes no less to choose.
  template <class A, class Router, class Buffers>
  static void run(const Router& router, const Buffers& buffers, matrix_view<const float> z,
                  const side_inputs& side, bool weighs, expert_id* id, float* value,
                  assignment& out) {
    weighs = weighs || !router.selects_on_logits() || router.transform.active() ||
             !side.k_of_token.empty();
    const int k = static_cast<int>(router.k());
    for (index_t t = 0; t < z.rows; t += block_rows) {
      const int rows = static_cast<int>(std::min<index_t>(block_rows, z.rows - t));
      choice_block c{k, id, value};
      clear_lanes(c, rows);
      const logit_block block{z.row(t), z.stride, rows, z.cols, t, &side};
      if (weighs)
        router.template route_block<A>(block, buffers, c);
      else
        router.selection.template select<A>(block, nullptr, c, buffers.select);
      if (side.mask.empty()) {
        simd::store_ranks<A>(reinterpret_cast<const float*>(id), k, rows,
                             reinterpret_cast<float*>(out.ids().data() + t * k));
        if (weighs) simd::store_ranks<A>(value, k, rows, out.weights().data() + t * k);
        continue;
      }
      for (int i = 0; i < rows; ++i)
        for (int r = 0; r < k; ++r) {
          const auto at = static_cast<std::size_t>((t + i) * k + r);
          const bool there = !side.masked(t + i);
          out.ids()[at] = there ? id[r * block_rows + i] : no_expert;
          out.weights()[at] = there ? value[r * block_rows + i] : 0.0f;
        }
    }
  }

  static index_t distinct(const assignment& a, index_t words, std::uint64_t* read) {
    std::fill_n(read, words, 0);
    for (const expert_id e : a.ids())
      if (e != no_expert) read[e >> 6] |= std::uint64_t{1} << (e & 63);
    index_t n = 0;
    for (index_t w = 0; w < words; ++w) n += std::popcount(read[w]);
    return n;
  }

  template <class Memory>
  void agree(const assignment& a, index_t words, const Memory& m) const {
    std::fill_n(m.agreed, words, 0);
    const auto join = [&](expert_id e) { m.agreed[e >> 6] |= std::uint64_t{1} << (e & 63); };
    if (rule_.kind == union_kind::opportunistic) {
      for (index_t t = 0; t < a.tokens(); ++t) {
        const auto ids = a.ids(t);
        if (!(rule_.mass > 0.0f)) {
          for (index_t r = 0; r < rule_.k0; ++r)
            if (const expert_id e = ids[static_cast<std::size_t>(r)]; e != no_expert) join(e);
          continue;
        }
        const auto weights = a.weights(t);
        float all = 0.0f, mass = 0.0f;
        for (const float w : weights) all += w;
        for (std::size_t r = 0; r < static_cast<std::size_t>(rule_.k0); ++r) {
          if (ids[r] == no_expert || (r > 0 && mass >= rule_.mass * all)) break;
          join(ids[r]);
          mass += weights[r];
        }
      }
      return;
    }
    const index_t experts = a.experts();
    std::fill_n(m.worth, experts, 0.0);
    const bool counts = rule_.kind == union_kind::vote;
    for (std::size_t c = 0; c < a.ids().size(); ++c)
      if (const expert_id e = a.ids()[c]; e != no_expert)
        m.worth[e] += counts ? 1.0 : static_cast<double>(a.weights()[c]);
    const index_t groups = counts ? rule_.groups : 1, size = experts / groups;
    const index_t most = counts ? rule_.stays : rule_.budget;
    for (index_t g = 0; g < groups; ++g) {
      std::iota(m.order, m.order + size, static_cast<expert_id>(g * size));
      std::partial_sort(m.order, m.order + most, m.order + size, [&](expert_id x, expert_id y) {
        return m.worth[x] > m.worth[y] || (m.worth[x] == m.worth[y] && x < y);
      });
      for (index_t i = 0; i < most; ++i)
        if (m.worth[m.order[i]] > 0.0) join(m.order[i]);
    }
  }

  router<Score, Selection> plain_;
  union_rule rule_;
  union_counts* counts_;
};
template <class Score, class Selection>
union_router(router<Score, Selection>, const union_rule&) -> union_router<Score, Selection>;
template <class Score, class Selection>
union_router(router<Score, Selection>, const union_rule&, union_counts*)
    -> union_router<Score, Selection>;
static_assert(batch_router<union_router<softmax>>);

/// Chosen experts are weighed as the router weighs them.
template <class Score, class Selection>
weight_maps weight_maps_of(const union_router<Score, Selection>& r, const side_inputs& side) {
  return weight_maps_of(r.plain(), side);
}

/// The distinct experts of a step, ascending, with the tokens of each: a plan of what is not empty.
///
/// Reused, it allocates nothing warm. Dropped choices are not read, hence not there.
class union_plan {
 public:
  /// Throws: error where an id of the assignment is outside [-1, E). Cost: O(T k + E / 64).
  void make(const assignment& a) {
    check_choices("union_plan", a);
    experts_.clear();
    tokens_.clear();
    choices_.clear();
    first_.assign(1, 0);
    const auto words = static_cast<std::size_t>(resident_view::words_of(a.experts()));
    bits_.assign(words, 0);
    if (place_.size() < static_cast<std::size_t>(a.experts()))
      place_.resize(static_cast<std::size_t>(a.experts()));
    const auto used = [&](index_t c) {
      return a.ids()[static_cast<std::size_t>(c)] != no_expert && a.kept(c);
    };
    for (index_t c = 0; c < a.choices(); ++c) {
      if (!used(c)) continue;
      const auto e = static_cast<std::size_t>(a.ids()[static_cast<std::size_t>(c)]);
      const std::uint64_t bit = std::uint64_t{1} << (e & 63);
      if ((bits_[e >> 6] & bit) == 0) place_[e] = 0;
      bits_[e >> 6] |= bit;
      ++place_[e];
    }
    for_each_resident({bits_.data(), a.experts()}, [&](expert_id e) {
      experts_.push_back(e);
      const std::int32_t n = std::exchange(place_[static_cast<std::size_t>(e)], first_.back());
      first_.push_back(first_.back() + n);
    });
    tokens_.resize(static_cast<std::size_t>(first_.back()));
    choices_.resize(tokens_.size());
    for (index_t t = 0; t < a.tokens(); ++t)
      for (index_t c = a.first(t); c < a.first(t + 1); ++c) {
        if (!used(c)) continue;
        const auto at = static_cast<std::size_t>(
            place_[static_cast<std::size_t>(a.ids()[static_cast<std::size_t>(c)])]++);
        tokens_[at] = static_cast<std::int32_t>(t);
        choices_[at] = static_cast<std::int32_t>(c);
      }
  }

  /// The experts that the step reads.
  std::span<const expert_id> experts() const { return experts_; }
  /// Tokens of the i-th of them, ascending.
  std::span<const std::int32_t> tokens(index_t i) const { return part(tokens_, i); }
  /// Their choices in the assignment.
  std::span<const std::int32_t> choices(index_t i) const { return part(choices_, i); }

 private:
  std::span<const std::int32_t> part(const std::vector<std::int32_t>& list, index_t i) const {
    const auto at = static_cast<std::size_t>(i);
    return std::span(list).subspan(static_cast<std::size_t>(first_[at]),
                                   static_cast<std::size_t>(first_[at + 1] - first_[at]));
  }

  std::vector<expert_id> experts_;
  std::vector<std::int32_t> first_{0}, tokens_, choices_, place_;
  std::vector<std::uint64_t> bits_;
};

/// Time of a step: per distinct expert that it reads, per token, and whatever happens.
struct step_time {
  double expert = 1.0;
  double token = 0.0;
  double fixed = 0.0;  ///< what a step without a token costs
};

/// How many draft tokens are worth verifying in one batch.
///
/// Token i of the batch is draft i; token 0, the one that is certain, is always there. Draft i
/// comes through with acceptance[0] ... acceptance[i - 1]; it brings that much, and costs the
/// experts that its row adds to the union of the rows before. The depth is the number of drafts
/// after which tokens per time are most; the fewest among equals. Throws: error where acceptance
/// is longer than the batch less one or outside [0, 1], or a time is negative.
/// Source: marginal gain against marginal cost, after arXiv 2511.02237's model of a step's time.
inline index_t speculation_depth(const assignment& sets, std::span<const double> acceptance,
                                 const step_time& time) {
  constexpr const char* where = "speculation_depth";
  check_choices(where, sets);
  check_range(where, "acceptance.size()", static_cast<index_t>(acceptance.size()), 0,
              std::max<index_t>(sets.tokens() - 1, 0));
  if (!(time.expert >= 0.0 && time.token >= 0.0 && time.fixed >= 0.0))
    fail(where, "a time is negative, expected 0 or more");
  if (sets.tokens() == 0) return 0;
  std::vector<std::uint64_t> bits(
      static_cast<std::size_t>(resident_view::words_of(sets.experts())));
  double experts = 0.0;
  const auto join = [&](index_t t) {
    for (const expert_id e : sets.ids(t)) {
      if (e == no_expert) continue;
      std::uint64_t& word = bits[static_cast<std::size_t>(e >> 6)];
      experts += static_cast<double>((word >> (e & 63) & 1) == 0);
      word |= std::uint64_t{1} << (e & 63);
    }
  };
  const auto cost = [&](index_t tokens) {
    return time.fixed + time.expert * experts + time.token * static_cast<double>(tokens);
  };
  join(0);
  double gain = 1.0, through = 1.0, best_gain = 1.0, best_cost = cost(1);
  index_t depth = 0;
  for (index_t i = 1; i <= static_cast<index_t>(acceptance.size()); ++i) {
    const double p = acceptance[static_cast<std::size_t>(i - 1)];
    if (!(p >= 0.0 && p <= 1.0)) fail_value(where, "acceptance", p, "0 to 1");
    through *= p;
    gain += through;
    join(i);
    if (gain * best_cost > best_gain * cost(i + 1)) {
      depth = i;
      best_gain = gain;
      best_cost = cost(i + 1);
    }
  }
  return depth;
}

}  // namespace moeroute

// Routing by token id: tables of experts, and how to make them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <moeroute/base/rng.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/given_choice.hpp>
#include <moeroute/policy/parts/kinds.hpp>
#include <moeroute/policy/parts/logit_transform.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/policy/parts/weight.hpp>
#include <moeroute/simd/random.hpp>

namespace moeroute {

/// The experts of every token id, [vocabulary, k]; no_expert is allowed.
///
/// Source: Hash Layers (Roller et al. 2021); the first layers of DeepSeek-V4 (2026).
class expert_table {
 public:
  expert_table() = default;

  /// Throws: error where the size is not a multiple of k, an id is outside [0, experts), or an
  /// expert is repeated within a token.
  expert_table(std::vector<expert_id> ids, index_t k, index_t experts)
      : ids_(std::move(ids)), k_(k), experts_(experts) {
    check_range("expert_table", "experts", experts, 1, max_experts);
    check_range("expert_table", "k", k, 1, experts);
    const auto size = static_cast<index_t>(ids_.size());
    if (size % k != 0)
      fail("expert_table", "ids.size() is " + std::to_string(size) +
                               ", expected a multiple of k = " + std::to_string(k));
    for (index_t t = 0; t < vocabulary(); ++t) {
      const auto row = of(t);
      for (std::size_t r = 0; r < row.size(); ++r) {
        if (row[r] == no_expert) continue;
        if (row[r] < 0 || row[r] >= experts)
          fail("expert_table", "token id " + std::to_string(t) + " has expert " +
                                   std::to_string(row[r]) + ", expected -1 to " +
                                   std::to_string(experts - 1));
        if (std::find(row.begin(), row.begin() + static_cast<index_t>(r), row[r]) !=
            row.begin() + static_cast<index_t>(r))
          fail("expert_table", "token id " + std::to_string(t) + " has expert " +
                                   std::to_string(row[r]) + " twice, expected distinct experts");
      }
    }
  }

  index_t k() const { return k_; }
  index_t experts() const { return experts_; }
  index_t vocabulary() const { return static_cast<index_t>(ids_.size()) / k_; }
  std::span<const expert_id> of(index_t token_id) const {
    return {ids_.data() + token_id * k_, static_cast<std::size_t>(k_)};
  }

 private:
  std::vector<expert_id> ids_;
  index_t k_ = 1;
  index_t experts_ = 1;
};

/// k distinct random experts per token id; the same seed gives the same table. Source: Roller et
/// al. 2021.
inline expert_table random_table(index_t vocabulary, index_t k, index_t experts,
                                 std::uint64_t seed) {
  check_range("random_table", "vocabulary", vocabulary, 0, std::int32_t{0x7fffffff});
  check_range("random_table", "experts", experts, 1, max_experts);
  check_range("random_table", "k", k, 1, experts);
  std::vector<expert_id> ids;
  ids.reserve(static_cast<std::size_t>(vocabulary * k));
  for (index_t t = 0; t < vocabulary; ++t) {
    const auto first = static_cast<index_t>(ids.size());
    for (std::uint64_t draw = 0; static_cast<index_t>(ids.size()) - first < k; ++draw) {
      const auto e = static_cast<expert_id>(random_below(static_cast<std::uint32_t>(experts), seed,
                                                         static_cast<std::uint64_t>(t), draw));
      if (std::find(ids.begin() + first, ids.end(), e) == ids.end()) ids.push_back(e);
    }
  }
  return {std::move(ids), k, experts};
}

/// Token ids by descending frequency, each to the expert with the least frequency so far; equal
/// ones in ascending order. Source: Roller et al. 2021 ('balanced').
inline expert_table balanced_table(std::span<const std::int64_t> frequency, index_t experts) {
  check_range("balanced_table", "experts", experts, 1, max_experts);
  for (std::size_t t = 0; t < frequency.size(); ++t)
    if (frequency[t] < 0)
      fail("balanced_table", "frequency of token id " + std::to_string(t) + " is " +
                                 std::to_string(frequency[t]) + ", expected >= 0");
  std::vector<std::int32_t> order(frequency.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int32_t>(i);
  std::sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    const auto x = frequency[static_cast<std::size_t>(a)];
    const auto y = frequency[static_cast<std::size_t>(b)];
    return x > y || (x == y && a < b);
  });
  // A heap of (load, expert), the least on top.
  const auto after = [](const auto& a, const auto& b) { return b < a; };
  std::vector<std::pair<std::int64_t, expert_id>> heap;
  for (expert_id e = 0; e < experts; ++e) heap.emplace_back(0, e);
  std::vector<expert_id> ids(frequency.size());
  for (const std::int32_t t : order) {
    std::pop_heap(heap.begin(), heap.end(), after);
    ids[static_cast<std::size_t>(t)] = heap.back().second;
    heap.back().first += frequency[static_cast<std::size_t>(t)];
    std::push_heap(heap.begin(), heap.end(), after);
  }
  return {std::move(ids), 1, experts};
}

/// Each token id to the expert of its cluster: cluster c to expert c % E. Source: Roller et al.
/// 2021.
inline expert_table clustered_table(std::span<const std::int32_t> cluster, index_t experts) {
  check_range("clustered_table", "experts", experts, 1, max_experts);
  std::vector<expert_id> ids(cluster.size());
  for (std::size_t t = 0; t < ids.size(); ++t) {
    if (cluster[t] < 0)
      fail("clustered_table", "cluster of token id " + std::to_string(t) + " is " +
                                  std::to_string(cluster[t]) + ", expected >= 0");
    ids[t] = static_cast<expert_id>(cluster[t] % experts);
  }
  return {std::move(ids), 1, experts};
}

namespace detail {

// The experts of the block's rows, with their logits as values: the same code for every score.
template <class A>
MOEROUTE_OUT_OF_LINE void take_of_table(const expert_table& table, table_key key,
                                        const logit_block& z, choice_block& c) {
  if (z.side->token_ids.empty()) fail("table_router", "side_inputs::token_ids is missing");
  const auto id_of = [&](index_t token) {
    return z.side->token_ids[static_cast<std::size_t>(token)];
  };
  const expert_id* list[block_rows];
  if (key == table_key::bigram) {
    simd::random_lanes<A> hash;
    for (int i = 0; i < z.rows; ++i) {
      const index_t token = z.first_token + i;
      const std::int32_t before = token > 0 ? id_of(token - 1) : -1;
      hash.place(i, static_cast<std::uint32_t>(before), static_cast<std::uint32_t>(id_of(token)));
    }
    hash.draw(0, z.rows);
    for (int i = 0; i < z.rows; ++i)
      list[i] = table.of(hash.below(static_cast<std::uint32_t>(table.vocabulary()), i)).data();
  } else {
    for (int i = 0; i < z.rows; ++i) {
      // A masked token's id is nobody's: padding has what the tokeniser likes.
      list[i] = nullptr;
      if (z.side->masked(z.first_token + i)) continue;
      const std::int32_t id = id_of(z.first_token + i);
      check_range("table_router", "token id", id, 0, table.vocabulary() - 1);
      list[i] = table.of(id).data();
    }
  }
  take_given<A>(z, c, [&](int i, int r) { return list[i] == nullptr ? no_expert : list[i][r]; });
}

}  // namespace detail

/// A router whose experts come from a table, while the weights come from the gate's logits.
///
/// Needs side_inputs::token_ids in [0, vocabulary), those of masked tokens aside. With
/// uniform_score and a sum the weights are 1 / k. Cost: O(k) per row, plus a pass over the row
/// where the score needs it (softmax).
template <score_function Score>
struct table_router {
  const expert_table* table = nullptr;
  Score score{};
  weight_rule weight{};
  logit_transform transform{};
  table_key key = table_key::token;

  struct buffers {
    float* logits;
  };

  index_t k() const { return table == nullptr ? 1 : table->k(); }
  static index_t experts(index_t columns) { return columns; }
  side_use reads_side(index_t) const {
    return {.token_ids = true, .own_k = k(), .noise_logits = transform.noise.active()};
  }
  bool reads_logits() const { return !detail::is_uniform(score) || transform.active(); }

  /// Throws: error where there is no table, it is made for another E, or it has no rows to hash
  /// into.
  void check(index_t experts) const {
    if (table == nullptr) fail("table_router", "table is missing");
    check_size("table_router", "table experts", table->experts(), experts);
    if (key == table_key::bigram)  // there is no row to hash into
      check_range("table_router", "table rows", table->vocabulary(), 1, index_t{1} << 40);
    transform.check(experts);
    weight.check(experts);
  }

  buffers carve(scratch& tape, index_t experts) const {
    return {tape.take<float>(transform.active() ? block_rows * experts : 0)};
  }

  /// Throws: error where token ids are missing or outside the table.
  template <class A = simd::default_arch>
  void route_block(logit_block z, const buffers& memory, choice_block& c) const {
    if (transform.active()) z = transform.template apply<A>(z, memory.logits);
    detail::take_of_table<A>(*table, key, z, c);
    keep_own_k(z, c);
    score.template score_choices<A>(z, c, weight.needs());
    weight.template apply<A>(c);
  }

  /// Few rows come one by one.
  index_t rows_alone(index_t) const {
    return !transform.active() && k() <= detail::most_given ? detail::given_rows_alone : 0;
  }

  /// Throws: error where token ids are missing or outside the table.
  template <class A = simd::default_arch>
    requires row_score<Score>
  void route_row(const float* z, index_t experts, index_t token, const side_inputs& side,
                 expert_id* id, float* weights) const {
    if (side.token_ids.empty()) fail("table_router", "side_inputs::token_ids is missing");
    index_t row = side.token_ids[static_cast<std::size_t>(token)];
    if (key == table_key::bigram) {
      row = random_below(static_cast<std::uint32_t>(table->vocabulary()), 0, previous(side, token),
                         static_cast<std::uint32_t>(row));
    } else {
      check_range("table_router", "token id", row, 0, table->vocabulary() - 1);
    }
    detail::weigh_given<A>(score, weight, table->of(row).data(), static_cast<int>(table->k()), z,
                           experts, id, weights);
  }

 private:
  // A pair of ids is hashed to the words at (stream, counter) = (the one before, its own).
  static std::uint32_t previous(const side_inputs& side, index_t token) {
    return static_cast<std::uint32_t>(
        token > 0 ? side.token_ids[static_cast<std::size_t>(token - 1)] : -1);
  }
};
static_assert(row_router<table_router<sqrt_softplus>>);

}  // namespace moeroute

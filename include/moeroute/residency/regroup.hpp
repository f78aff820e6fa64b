// Which requests run together: batches that share experts, and places by two hashes.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include <moeroute/base/rng.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/data/resident_set.hpp>

namespace moeroute {

namespace detail {

// The experts of every row of an assignment as bits, [T][words].
inline std::vector<std::uint64_t> bits_of(const assignment& sets, index_t words) {
  std::vector<std::uint64_t> bits(static_cast<std::size_t>(sets.tokens() * words));
  for (index_t t = 0; t < sets.tokens(); ++t)
    for (const expert_id e : sets.ids(t))
      if (e != no_expert)
        bits[static_cast<std::size_t>(t * words + (e >> 6))] |= std::uint64_t{1} << (e & 63);
  return bits;
}

}  // namespace detail

/// Distinct experts of each batch of `batch` rows in that order, summed over batches.
inline index_t distinct_experts(const assignment& sets, std::span<const std::int32_t> order,
                                index_t batch) {
  check_choices("distinct_experts", sets);
  check_range("distinct_experts", "batch", batch, 1, std::int32_t{0x7fffffff});
  std::vector<std::uint64_t> seen(
      static_cast<std::size_t>(resident_view::words_of(sets.experts())));
  index_t sum = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    check_range("distinct_experts", "order", order[i], 0, sets.tokens() - 1);
    if (static_cast<index_t>(i) % batch == 0) std::fill(seen.begin(), seen.end(), 0);
    for (const expert_id e : sets.ids(order[i])) {
      if (e == no_expert) continue;
      std::uint64_t& word = seen[static_cast<std::size_t>(e >> 6)];
      sum += (word >> (e & 63) & 1) == 0;
      word |= std::uint64_t{1} << (e & 63);
    }
  }
  return sum;
}

/// An order of requests in which batches of `batch` share experts: each batch begins with the first
/// request that is left and takes the one that adds the fewest experts, the first among equals.
///
/// sets: a row of experts for each request (a token's, or the union of several). Ensures: a
/// permutation; never more distinct experts over all batches than the order as it was, which comes
/// back where this is no better. Throws: error where an id is outside [-1, E) or batch < 1. Cost:
/// O(T^2 E / 64) in the worst case. Determinism: exact.
inline std::vector<std::int32_t> regroup(const assignment& sets, index_t batch) {
  check_choices("regroup", sets);
  check_range("regroup", "batch", batch, 1, std::int32_t{0x7fffffff});
  const index_t words = resident_view::words_of(sets.experts());
  std::vector<std::uint64_t> bits = detail::bits_of(sets, words);
  std::vector<std::uint64_t> seen(static_cast<std::size_t>(words));
  std::vector<std::int32_t> given(static_cast<std::size_t>(sets.tokens())), left;
  std::iota(given.begin(), given.end(), 0);
  left = given;
  std::vector<std::int32_t> order;
  order.reserve(given.size());
  // The bits move with the list, so that a scan reads on in memory.
  const auto take = [&](std::size_t at) {
    order.push_back(left[at]);
    const auto w = static_cast<std::ptrdiff_t>(words);
    const auto from = bits.begin() + static_cast<std::ptrdiff_t>(at) * w;
    for (std::ptrdiff_t i = 0; i < w; ++i) seen[static_cast<std::size_t>(i)] |= from[i];
    std::copy(from + w, bits.begin() + static_cast<std::ptrdiff_t>(left.size()) * w, from);
    left.erase(left.begin() + static_cast<std::ptrdiff_t>(at));
  };
  while (!left.empty()) {
    std::fill(seen.begin(), seen.end(), 0);
    take(0);
    for (index_t in = 1; in < batch && !left.empty(); ++in) {
      std::size_t best = 0;
      int fewest = std::numeric_limits<int>::max();
      const std::uint64_t* row = bits.data();
      for (std::size_t i = 0; i < left.size() && fewest > 0; ++i, row += words) {
        int more = 0;
        for (index_t w = 0; w < words; ++w)
          more += std::popcount(row[w] & ~seen[static_cast<std::size_t>(w)]);
        if (more < fewest) {
          fewest = more;
          best = i;
        }
      }
      take(best);
    }
  }
  return distinct_experts(sets, order, batch) < distinct_experts(sets, given, batch) ? order
                                                                                     : given;
}

/// Where keys go: each to the less loaded of two places that its hash names, and there it stays.
///
/// Source: the power of two choices (Mitzenmacher 2001), as DualMap uses it for requests and
/// expert servers.
class two_choice_table {
 public:
  /// Throws: error where places < 1.
  explicit two_choice_table(index_t places, std::uint64_t seed = 0)
      : load_(checked(places)), seed_(seed) {}

  /// The two places of a key, which may be one.
  std::pair<index_t, index_t> places_of(std::uint64_t key) const {
    const auto n = static_cast<std::uint32_t>(load_.size());
    return {random_below(n, seed_, key, 0), random_below(n, seed_, key, 1)};
  }
  /// Adds a load to the less loaded of the key's places, the first among equals, and says which.
  index_t add(std::uint64_t key, double load = 1.0) {
    const auto [one, two] = places_of(key);
    const index_t to =
        load_[static_cast<std::size_t>(two)] < load_[static_cast<std::size_t>(one)] ? two : one;
    load_[static_cast<std::size_t>(to)] += load;
    return to;
  }
  std::span<const double> load() const { return load_; }

 private:
  static std::size_t checked(index_t places) {
    check_range("two_choice_table", "places", places, 1, std::int32_t{0x7fffffff});
    return static_cast<std::size_t>(places);
  }
  std::vector<double> load_;
  std::uint64_t seed_;
};

}  // namespace moeroute

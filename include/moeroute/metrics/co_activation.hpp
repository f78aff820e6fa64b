// Which experts a token uses together.
#pragma once

#include <cstdint>
#include <vector>

#include <moeroute/data/expert_load.hpp>

namespace moeroute {

/// Counts of pairs, fed batch by batch.
///
/// Cost: add O(T k^2), no allocation; memory E^2 counts. Source: OLMoE (2024), which divides by the
/// row's own count.
class co_activation {
 public:
  /// Throws: error where E is outside [1, 2^14].
  explicit co_activation(index_t experts) : experts_(experts) {
    check_range("co_activation", "experts", experts, 1, index_t{1} << 14);
    pairs_.assign(static_cast<std::size_t>(experts * experts), 0);
  }

  /// Throws: error where the assignment has another number of experts or the mask another length.
  template <class A = simd::default_arch>
  void add(const assignment& a, const count_options& what = {}) {
    check_size("co_activation", "experts", a.experts(), experts_);
    detail::check_counted<A>("co_activation", a, what);
    for (index_t t = 0; t < a.tokens(); ++t)
      detail::for_each_counted(a, what, t, [&](index_t i) {
        detail::for_each_counted(a, what, t, [&](index_t j) { ++pairs_[at(i, j)]; });
      });
  }

  /// Tokens that use both; of an expert with itself: its own. Throws: error where one is none.
  std::int64_t pairs(index_t i, index_t j) const {
    check_range("co_activation", "expert", i, 0, experts_ - 1);
    check_range("co_activation", "expert", j, 0, experts_ - 1);
    return pairs_[at(i, j)];
  }
  /// Share of i's tokens that use j too; 0 where i has none. Not symmetric.
  double rate(index_t i, index_t j) const {
    const std::int64_t own = pairs(i, i);
    return own == 0 ? 0.0 : static_cast<double>(pairs(i, j)) / static_cast<double>(own);
  }
  index_t experts() const { return experts_; }

 private:
  std::size_t at(index_t i, index_t j) const { return static_cast<std::size_t>(i * experts_ + j); }

  index_t experts_;
  std::vector<std::int64_t> pairs_;
};

}  // namespace moeroute

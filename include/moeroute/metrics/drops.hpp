// What was dropped: choices, tokens, and where in the batch they stood.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>

#include <moeroute/base/error.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>

namespace moeroute {

/// Counts of dropped choices, fed batch by batch.
///
/// Dropped is not missing: a pick that could not be made has no expert and is counted apart.
/// Cost: add O(T k), no allocation.
class drop_meter {
 public:
  static constexpr index_t places = 10;

  /// Shapes: mask [T] or empty, 0: the token does not count. Throws: error where it has another
  /// length.
  void add(const assignment& a, std::span<const std::uint8_t> mask = {}) {
    if (!mask.empty())
      check_size("drop_meter", "mask.size()", static_cast<index_t>(mask.size()), a.tokens());
    check_offsets("drop_meter", a);
    for (index_t t = 0; t < a.tokens(); ++t) {
      if (!mask.empty() && mask[static_cast<std::size_t>(t)] == 0) continue;
      const auto place = static_cast<std::size_t>(t * places / a.tokens());
      index_t made = 0, kept = 0;
      for (index_t c = a.first(t); c < a.first(t + 1); ++c) {
        if (a.ids()[static_cast<std::size_t>(c)] == no_expert) {
          ++missing_;
          continue;
        }
        ++made;
        kept += a.kept(c);
      }
      choices_ += made;
      dropped_ += made - kept;
      choices_at_[place] += made;
      dropped_at_[place] += made - kept;
      ++tokens_;
      lost_ += made > 0 && kept == 0;
    }
  }

  std::int64_t tokens() const { return tokens_; }
  std::int64_t choices() const { return choices_; }
  std::int64_t dropped() const { return dropped_; }
  std::int64_t missing() const { return missing_; }
  /// Tokens that lost all their choices.
  std::int64_t lost_tokens() const { return lost_; }
  /// Share of choices dropped; 0 where there are none.
  double rate() const { return share(dropped_, choices_); }
  /// The same among the tokens of one tenth of their batch.
  double rate_at(index_t tenth) const {
    check_range("drop_meter", "tenth", tenth, 0, places - 1);
    const auto i = static_cast<std::size_t>(tenth);
    return share(dropped_at_[i], choices_at_[i]);
  }

 private:
  static double share(std::int64_t part, std::int64_t all) {
    return all == 0 ? 0.0 : static_cast<double>(part) / static_cast<double>(all);
  }

  std::int64_t tokens_ = 0, choices_ = 0, dropped_ = 0, missing_ = 0, lost_ = 0;
  std::array<std::int64_t, places> choices_at_{}, dropped_at_{};
};

}  // namespace moeroute

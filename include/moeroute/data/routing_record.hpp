// Record and replay: the ids of a routing in as few bytes as E allows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <type_traits>

#include <moeroute/base/error.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>

namespace moeroute {

/// The expert ids of an assignment in the fixed form, kept as Id; no_expert is the largest value of
/// Id, so E may be at most that. Drops are not recorded: a replay decides them again.
template <class Id>
class routing_record {
  static_assert(std::is_same_v<Id, std::uint8_t> || std::is_same_v<Id, std::uint16_t> ||
                    std::is_same_v<Id, std::int32_t>,
                "[moeroute::routing_record] ids are kept as uint8_t, uint16_t or int32_t");

 public:
  static constexpr Id none = std::is_signed_v<Id> ? Id(-1) : std::numeric_limits<Id>::max();

  /// Throws: error where Id is too small for E, the assignment is ragged, or an id of it is outside
  /// [-1, E). Cost: O(T k), no
  /// allocation warm.
  template <class A = simd::default_arch>
  void record(const assignment& choices) {
    if (choices.ragged())
      fail("routing_record", "the assignment is ragged, expected the fixed form");
    if constexpr (!std::is_signed_v<Id>)
      check_range("routing_record", "E", choices.experts(), 1, static_cast<index_t>(none));
    check_ids<A>("routing_record", choices.ids(), choices.experts());
    tokens_ = choices.tokens();
    experts_ = choices.experts();
    k_ = choices.k();
    ids_.resize(choices.choices());
    std::transform(choices.ids().begin(), choices.ids().end(), ids_.data(),
                   [](expert_id e) { return e == no_expert ? none : static_cast<Id>(e); });
  }

  index_t tokens() const { return tokens_; }
  index_t experts() const { return experts_; }
  index_t k() const { return k_; }
  std::span<const Id> ids() const { return ids_; }
  expert_id id(index_t choice) const {
    return ids_[choice] == none ? no_expert : static_cast<expert_id>(ids_[choice]);
  }

 private:
  index_t tokens_ = 0;
  index_t experts_ = 0;
  index_t k_ = 0;
  buffer<Id> ids_;
};

}  // namespace moeroute

// How far two routings agree.
#pragma once

#include <algorithm>

#include <moeroute/base/error.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>

namespace moeroute {

/// Where two routings of the same tokens differ.
struct disagreement {
  index_t tokens = 0;            ///< compared
  index_t differing_tokens = 0;  ///< whose sets of experts differ
  index_t differing_choices =
      0;                ///< choices of the first that the second does not make for that token
  index_t choices = 0;  ///< of the first, without no_expert

  /// Share of tokens that go elsewhere.
  double token_rate() const {
    return tokens == 0 ? 0.0 : static_cast<double>(differing_tokens) / static_cast<double>(tokens);
  }
  /// Share of choices that the other routing does not make.
  double choice_rate() const {
    return choices == 0 ? 0.0
                        : static_cast<double>(differing_choices) / static_cast<double>(choices);
  }
};

/// Compares the sets of experts, token by token; order and weights do not matter. Throws: error
/// where the numbers of tokens differ. Cost: O(T k^2).
inline disagreement selection_disagreement(const assignment& a, const assignment& b) {
  check_size("selection_disagreement", "b.tokens", b.tokens(), a.tokens());
  check_offsets("selection_disagreement", a);
  check_offsets("selection_disagreement", b);
  disagreement out{.tokens = a.tokens()};
  for (index_t t = 0; t < a.tokens(); ++t) {
    const auto mine = a.ids(t), other = b.ids(t);
    index_t missing = 0, own = 0;
    for (const expert_id e : mine) {
      if (e == no_expert) continue;
      ++own;
      missing += std::find(other.begin(), other.end(), e) == other.end();
    }
    const auto theirs =
        std::count_if(other.begin(), other.end(), [](expert_id e) { return e != no_expert; });
    out.choices += own;
    out.differing_choices += missing;
    out.differing_tokens += missing != 0 || theirs != own;
  }
  return out;
}

}  // namespace moeroute

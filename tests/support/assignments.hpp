// Assignments that routers do not make: any ids, any number of choices, chosen flags.
#pragma once

#include <algorithm>
#include <cstdint>
#include <moeroute/data/assignment.hpp>
#include <vector>

#include "support/random.hpp"

namespace test {

using moeroute::assignment;
using moeroute::expert_id;
using moeroute::index_t;

/// Fixed form: k distinct experts per token, popularity as skewed as `skew` (0: uniform), one
/// choice in `none_in` without an expert (0: none).
inline assignment fixed_choices(random& rng, index_t tokens, index_t experts, index_t k,
                                int none_in = 0, double skew = 0.0) {
  assignment a;
  a.reset(tokens, experts, k);
  std::vector<expert_id> taken;
  for (index_t t = 0; t < tokens; ++t) {
    taken.clear();
    for (index_t r = 0; r < k; ++r) {
      expert_id e;
      do {
        const double u = static_cast<double>(rng.uniform());
        const double v = skew > 0.0 && rng.uniform() < 0.7f ? u * u * u * u : u;
        e = static_cast<expert_id>(v * static_cast<double>(experts));
      } while (std::find(taken.begin(), taken.end(), e) != taken.end());
      taken.push_back(e);
      const auto c = static_cast<std::size_t>(t * k + r);
      const bool none = none_in > 0 && rng.below(none_in) == 0;
      a.ids()[c] = none ? moeroute::no_expert : e;
      a.weights()[c] = none ? 0.0f : rng.uniform() + 0.01f;
    }
  }
  return a;
}

/// Ragged form: 0 to `most` distinct experts per token.
inline assignment ragged_choices(random& rng, index_t tokens, index_t experts, index_t most) {
  const assignment full = fixed_choices(rng, tokens, experts, most);
  assignment a;
  a.reset_ragged(tokens, experts, most);
  const assignment::parts p = a.to_fill();
  p.offsets[0] = 0;
  for (index_t t = 0; t < tokens; ++t) {
    const index_t n = rng.below(most + 1);
    for (index_t r = 0; r < n; ++r) {
      p.ids[p.offsets[t] + r] = full.ids(t)[static_cast<std::size_t>(r)];
      p.weights[p.offsets[t] + r] = full.weights(t)[static_cast<std::size_t>(r)];
    }
    p.offsets[t + 1] = p.offsets[t] + static_cast<std::int32_t>(n);
  }
  a.close();
  return a;
}

/// Drops one choice in `one_in`.
inline void drop_some(random& rng, assignment& a, int one_in) {
  for (std::uint8_t& kept : a.kept_to_change())
    if (rng.below(one_in) == 0) kept = 0;
  for (index_t c = 0; c < a.choices(); ++c)
    if (!a.kept(c)) a.weights()[static_cast<std::size_t>(c)] = 0.0f;
}

/// The token of every choice.
inline std::vector<std::int32_t> tokens_of(const assignment& a) {
  std::vector<std::int32_t> token;
  for (index_t t = 0; t < a.tokens(); ++t)
    token.insert(token.end(), static_cast<std::size_t>(a.count(t)), static_cast<std::int32_t>(t));
  return token;
}

}  // namespace test

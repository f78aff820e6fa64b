// What every router obeys. Each law takes a router of the list and returns the first break in
// words, with what it takes to see it again; empty where there is none.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <moeroute/data/assignment.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "laws/routers.hpp"
#include "support/allocations.hpp"
#include "support/compare.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"

namespace test::laws {

using moeroute::expert_id;
using moeroute::no_expert;

struct routed {
  std::vector<expert_id> ids;
  std::vector<float> weights;
};

// Choices of a varying number are filled up with no_expert to E of them.
inline routed copy_of(const assignment& a) {
  if (!a.ragged())
    return {{a.ids().begin(), a.ids().end()}, {a.weights().begin(), a.weights().end()}};
  routed all;
  for (index_t t = 0; t < a.tokens(); ++t) {
    const auto size = static_cast<std::size_t>((t + 1) * a.experts());
    all.ids.insert(all.ids.end(), a.ids(t).begin(), a.ids(t).end());
    all.weights.insert(all.weights.end(), a.weights(t).begin(), a.weights(t).end());
    all.ids.resize(size, no_expert);
    all.weights.resize(size, 0.0f);
  }
  return all;
}

template <class T>
routed route(subject& router, const std::vector<T>& z, index_t tokens, index_t experts) {
  assignment out;
  router.route(matrix_view<const T>(z.data(), tokens, experts), out);
  return copy_of(out);
}

/// Same ids, same weights to the last bit.
inline std::string difference(const routed& actual, const routed& expected) {
  const std::string ids = bit_difference(actual.ids, expected.ids);
  return ids.empty() ? bit_difference(actual.weights, expected.weights) : ids;
}

/// The cases of a law: shapes and sizes that a router takes, each with its logits.
struct the_case {
  reproducer how;
  std::vector<float> logits;
  std::unique_ptr<subject> router;
};

/// The logits of a case. Every law of every router asks for the same.
inline const std::vector<float>& made_once(shape s, std::uint64_t seed, index_t tokens,
                                           index_t experts) {
  static std::map<std::uint64_t, std::vector<float>> made;
  std::vector<float>& logits = made[seed];
  if (logits.empty()) logits = make_logits(s, seed, tokens, experts);
  return logits;
}

/// Calls f(case) for every shape with a few sizes, up to the first one that returns something.
template <class F>
std::string for_each_case(const listed_router& listed, F&& f) {
  struct size {
    index_t tokens, experts, k;
  };
  constexpr size sizes[] = {{1, 1, 1},   {3, 2, 2},   {17, 8, 2},    {16, 60, 6},
                            {5, 72, 10}, {33, 64, 8}, {2, 256, 100}, {7, 160, 17}};
  std::uint64_t seed = 10;
  for (const shape s : all_shapes)
    for (const size n : sizes) {
      ++seed;
      if (!listed.takes(n.k) || n.experts > sized(256, 60)) continue;
      the_case c{{s, seed, n.tokens, n.experts, listed.width(n.k, n.experts)},
                 made_once(s, seed, n.tokens, n.experts),
                 listed.make(n.k, n.experts)};
      const std::string broken = f(c);
      if (!broken.empty()) return listed.name + ", " + to_string(c.how) + ": " + broken;
    }
  return "";
}

/// Ids are in [0, E) and different within a row, or no_expert with weight 0 behind all others;
/// weights are finite.
inline std::string is_well_formed(const listed_router& listed) {
  return for_each_case(listed, [&](the_case& c) -> std::string {
    const routed r = route(*c.router, c.logits, c.how.tokens, c.how.experts);
    for (index_t t = 0; t < c.how.tokens; ++t) {
      std::vector<bool> seen(static_cast<std::size_t>(c.how.experts), false);
      bool ended = false;
      for (index_t i = t * c.how.k; i < (t + 1) * c.how.k; ++i) {
        const expert_id e = r.ids[static_cast<std::size_t>(i)];
        const float w = r.weights[static_cast<std::size_t>(i)];
        const std::string where = "token " + std::to_string(t) + ": ";
        if (!std::isfinite(w)) return where + "weight " + shown(w);
        if (e == no_expert) {
          ended = true;
          if (w != 0.0f) return where + "no expert with weight " + shown(w);
          continue;
        }
        if (ended && listed.compact) return where + "an expert behind no_expert";
        if (e < 0 || e >= c.how.experts) return where + "id " + std::to_string(e);
        if (seen[static_cast<std::size_t>(e)]) return where + std::to_string(e) + " twice";
        seen[static_cast<std::size_t>(e)] = true;
      }
    }
    return "";
  });
}

/// A NaN or -inf logit is never selected.
inline std::string never_selects_what_is_masked(const listed_router& listed) {
  return for_each_case(listed, [](the_case& c) -> std::string {
    const routed r = route(*c.router, c.logits, c.how.tokens, c.how.experts);
    for (index_t i = 0; i < c.how.tokens * c.how.k; ++i) {
      const expert_id e = r.ids[static_cast<std::size_t>(i)];
      if (e == no_expert) continue;
      const float z = c.logits[static_cast<std::size_t>(i / c.how.k * c.how.experts + e)];
      if (!(z > -infinity)) return "choice " + std::to_string(i) + " has logit " + shown(z);
    }
    return "";
  });
}

/// NaN counts as -inf: the same bits come out.
inline std::string takes_nan_for_minus_infinity(const listed_router& listed) {
  return for_each_case(listed, [](the_case& c) {
    std::vector<float> clean = c.logits;
    for (float& z : clean) z = z == z ? z : -infinity;
    return difference(route(*c.router, c.logits, c.how.tokens, c.how.experts),
                      route(*c.router, clean, c.how.tokens, c.how.experts));
  });
}

/// -0 is +0, and the sign makes no difference to anything.
inline std::string takes_both_zeros_alike(const listed_router& listed) {
  return for_each_case(listed, [](the_case& c) {
    std::vector<float> positive = c.logits;
    for (float& z : positive) z += 0.0f;
    return difference(route(*c.router, c.logits, c.how.tokens, c.how.experts),
                      route(*c.router, positive, c.how.tokens, c.how.experts));
  });
}

/// Experts with the same +inf logit share equally: the same weight.
inline std::string shares_among_infinities(const listed_router& listed) {
  return for_each_case(listed, [](the_case& c) -> std::string {
    const routed r = route(*c.router, c.logits, c.how.tokens, c.how.experts);
    for (index_t t = 0; t < c.how.tokens; ++t) {
      float share = not_a_number;
      for (index_t i = t * c.how.k; i < (t + 1) * c.how.k; ++i) {
        const expert_id e = r.ids[static_cast<std::size_t>(i)];
        if (e == no_expert || c.logits[static_cast<std::size_t>(t * c.how.experts + e)] < infinity)
          continue;
        const float w = r.weights[static_cast<std::size_t>(i)];
        if (w == 0.0f) return "token " + std::to_string(t) + ": a +inf expert with weight 0";
        if (share == share && w != share)
          return "token " + std::to_string(t) + ": " + shown(w) + " beside " + shown(share);
        share = w;
      }
    }
    return "";
  });
}

/// What the oracle decides: ids exactly, weights to 3e-6.
inline std::string agrees_with_the_oracle(const listed_router& listed) {
  return for_each_case(listed, [&](the_case& c) -> std::string {
    const routed r = route(*c.router, c.logits, c.how.tokens, c.how.experts);
    if (listed.verify)
      return listed.verify(c.logits, c.how.tokens, c.how.experts, c.how.k, r.ids, r.weights);
    const oracle::decision d = listed.reference(c.logits, c.how.tokens, c.how.experts, c.how.k);
    if (const std::string ids = bit_difference(r.ids, d.ids); !ids.empty()) return "ids " + ids;
    // exp gives 0 where its result would be denormal.
    const std::string weights =
        test::difference(r.weights, d.weights, 3e-6, 1.2e-38 * static_cast<double>(c.how.experts));
    return weights.empty() ? "" : "weights " + weights;
  });
}

/// The same decisions as the oracle's for every E and k of the promises.
inline std::string agrees_with_the_oracle_at_every_size(const listed_router& listed) {
  for (const index_t experts : {1, 2, 3, 7, 8, 16, 31, 60, 64, 72, 128, 160, 256, 257, 768, 2048}) {
    if (experts > sized(2048, 72)) break;
    constexpr index_t tokens = 3;
    const auto seed = static_cast<std::uint64_t>(experts);
    const std::vector<float> z = make_logits(shape::quantised, seed, tokens, experts);
    for (const index_t k : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 17, 32, 33, 64, 65, 100, 2048}) {
      if (k > experts || !listed.takes(k)) continue;
      const routed r = route(*listed.make(k, experts), z, tokens, experts);
      std::string broken;
      if (listed.verify) {
        broken = listed.verify(z, tokens, experts, k, r.ids, r.weights);
      } else {
        const oracle::decision d = listed.reference(z, tokens, experts, k);
        broken = bit_difference(r.ids, d.ids);
        // A divisor is a chain of k additions.
        const double rounding = std::max(3e-6, 1e-8 * static_cast<double>(k));
        if (broken.empty()) broken = test::difference(r.weights, d.weights, rounding, 1e-37);
      }
      const reproducer how{shape::quantised, seed, tokens, experts, k};
      if (!broken.empty()) return listed.name + ", " + to_string(how) + ": " + broken;
    }
  }
  return "";
}

/// Equal logits everywhere: the lowest ids, in order, with equal weights.
inline std::string gives_ties_to_the_lower_id(const listed_router& listed) {
  return for_each_case(listed, [](the_case& c) -> std::string {
    const std::vector<float> z(c.logits.size(), 0.75f);
    const routed r = route(*c.router, z, c.how.tokens, c.how.experts);
    for (index_t i = 0; i < c.how.tokens * c.how.k; ++i) {
      const auto at = static_cast<std::size_t>(i);
      if (r.ids[at] != i % c.how.k) return "choice " + std::to_string(i);
      if (r.weights[at] != r.weights[0]) return "weight of choice " + std::to_string(i);
    }
    return "";
  });
}

/// Any expert is chosen first where its logit is the largest by far.
inline std::string lets_every_expert_win(const listed_router& listed) {
  for (const index_t experts : {1, 3, 16, 60, 257}) {
    const index_t k = listed.near(std::min<index_t>(experts, 4));
    if (k > experts) continue;
    std::vector<float> z(static_cast<std::size_t>(experts * experts), -1.0f);
    for (index_t e = 0; e < experts; ++e) z[static_cast<std::size_t>(e * experts + e)] = 9.0f;
    const routed r = route(*listed.make(k, experts), z, experts, experts);
    for (index_t e = 0; e < experts; ++e)
      if (r.ids[static_cast<std::size_t>(e * listed.width(k, experts))] != e)
        return listed.name + ": expert " + std::to_string(e) + " of " + std::to_string(experts);
  }
  return "";
}

/// Adding a constant that keeps every difference changes no id, and weights by rounding only.
inline std::string ignores_a_shift(const listed_router& listed) {
  return for_each_case(listed, [](the_case& c) -> std::string {
    if (c.how.logits != shape::quantised && c.how.logits != shape::masked &&
        c.how.logits != shape::half_nan)
      return "";
    std::vector<float> z = c.logits, shifted;
    for (float& x : z) x = x > -infinity ? std::floor(x * 8.0f) / 8.0f : x;
    for (const float x : z) shifted.push_back(x + 24.5f);
    const routed a = route(*c.router, z, c.how.tokens, c.how.experts);
    const routed b = route(*c.router, shifted, c.how.tokens, c.how.experts);
    return difference(a, b);
  });
}

/// A token's choices have the same bits alone, among others, and wherever it stands in the batch.
inline std::string routes_each_row_by_itself(const listed_router& listed) {
  return for_each_case(listed, [](the_case& c) -> std::string {
    const routed together = route(*c.router, c.logits, c.how.tokens, c.how.experts);
    for (index_t t = 0; t < c.how.tokens; ++t) {
      const std::vector<float> row(c.logits.begin() + t * c.how.experts,
                                   c.logits.begin() + (t + 1) * c.how.experts);
      const routed alone = route(*c.router, row, 1, c.how.experts);
      const auto first = t * c.how.k, last = first + c.how.k;
      const routed among{{together.ids.begin() + first, together.ids.begin() + last},
                         {together.weights.begin() + first, together.weights.begin() + last}};
      const std::string broken = difference(alone, among);
      if (!broken.empty()) return "token " + std::to_string(t) + " alone: " + broken;
    }
    return "";
  });
}

/// A masked token has no choice, and where rows are apart the others' are what they were.
inline std::string leaves_masked_tokens_out(const listed_router& listed) {
  return for_each_case(listed, [&](the_case& c) -> std::string {
    std::vector<std::uint8_t> mask;
    for (index_t t = 0; t < c.how.tokens; ++t) mask.push_back(t % 3 != 1);
    assignment out;
    c.router->route(matrix_view<const float>(c.logits.data(), c.how.tokens, c.how.experts),
                    moeroute::side_inputs{.mask = mask}, out);
    const routed masked = copy_of(out);
    const routed all = route(*c.router, c.logits, c.how.tokens, c.how.experts);
    for (index_t i = 0; i < c.how.tokens * c.how.k; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const bool in = mask[static_cast<std::size_t>(i / c.how.k)] != 0;
      if (!in && (masked.ids[at] != no_expert || masked.weights[at] != 0.0f))
        return "choice " + std::to_string(i) + " of a masked token";
      if (in && listed.rows_apart &&
          (masked.ids[at] != all.ids[at] || masked.weights[at] != all.weights[at]))
        return "choice " + std::to_string(i) + " differs beside masked tokens";
    }
    return "";
  });
}

/// Permuting tokens permutes the choices.
inline std::string follows_a_permutation_of_tokens(const listed_router& listed) {
  return for_each_case(listed, [](the_case& c) -> std::string {
    const index_t n = c.how.tokens;
    const routed straight = route(*c.router, c.logits, n, c.how.experts);
    std::vector<float> reversed;
    routed expected;
    for (index_t t = n - 1; t >= 0; --t) {
      const auto copy = [t](const auto& from, auto& to, index_t length) {
        to.insert(to.end(), from.begin() + t * length, from.begin() + (t + 1) * length);
      };
      copy(c.logits, reversed, c.how.experts);
      copy(straight.ids, expected.ids, c.how.k);
      copy(straight.weights, expected.weights, c.how.k);
    }
    return difference(route(*c.router, reversed, n, c.how.experts), expected);
  });
}

/// Renumbering the experts renumbers the choices, where no two logits of a row are equal.
inline std::string follows_a_renumbering_of_experts(const listed_router& listed) {
  random rng(77);
  for (const index_t experts : {2, 16, 60, 257}) {
    const index_t tokens = 19, k = listed.near(std::min<index_t>(experts, 6));
    std::vector<std::size_t> to(static_cast<std::size_t>(experts));
    std::iota(to.begin(), to.end(), std::size_t{0});
    for (std::size_t i = to.size(); i > 1; --i)
      std::swap(to[i - 1], to[static_cast<std::size_t>(rng.below(static_cast<std::int64_t>(i)))]);
    std::vector<float> z(static_cast<std::size_t>(tokens * experts)), renumbered(z);
    for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t)
      for (std::size_t e = 0; e < to.size(); ++e) {
        // Different by construction: 1/64 apart in an order that differs from token to token.
        const float x = static_cast<float>((e * 7 + t * 3) % to.size()) / 64.0f + 0.25f;
        z[t * to.size() + e] = x;
        renumbered[t * to.size() + to[e]] = x;
      }
    if (experts % 7 == 0) continue;  // e * 7 would repeat
    const auto router = listed.make(k, experts);
    routed expected = route(*router, z, tokens, experts);
    for (expert_id& e : expected.ids) e = static_cast<expert_id>(to[static_cast<std::size_t>(e)]);
    const routed got = route(*router, renumbered, tokens, experts);
    std::string broken = bit_difference(got.ids, expected.ids);
    // The row's sum runs in another order.
    if (broken.empty()) broken = test::difference(got.weights, expected.weights, 1e-6);
    if (!broken.empty()) return listed.name + ", E=" + std::to_string(experts) + ": " + broken;
  }
  return "";
}

/// Any number of threads gives the serial bits, also where the batch is cut into pieces.
inline std::string does_not_depend_on_threads(const listed_router& listed) {
  struct size {
    index_t tokens, experts;
  };
  // Several pieces each, the last one shorter.
  for (const auto& [tokens, experts] :
       {size{140, 256}, size{600, 256}, size{2000, 60}, size{5000, 8}}) {
    if (tokens > sized(5000, 140)) break;
    const index_t k = listed.near(4);
    const reproducer how{shape::quantised, 3, tokens, experts, k};
    const std::vector<float> z = make_logits(how.logits, how.seed, tokens, experts);
    const auto router = listed.make(k, experts);
    const routed serial = route(*router, z, tokens, experts);
    for (const int threads : {4, 2, 1}) {
      if (threads < sized(1, 4)) break;
      assignment out;
      router->route(matrix_view<const float>(z.data(), tokens, experts), threads, out);
      const std::string broken = difference(copy_of(out), serial);
      if (!broken.empty())
        return listed.name + ", " + to_string(how) + ", " + std::to_string(threads) +
               " threads: " + broken;
    }
  }
  return "";
}

/// 16-bit logits are routed as the floats they widen to.
template <class T>
std::string widens_logits_once(const listed_router& listed) {
  return for_each_case(listed, [](the_case& c) -> std::string {
    if (!c.router->narrow()) return "";
    std::vector<T> narrow;
    std::vector<float> wide;
    for (const float z : c.logits) {
      narrow.push_back(static_cast<T>(z));
      wide.push_back(static_cast<float>(narrow.back()));
    }
    return difference(route(*c.router, narrow, c.how.tokens, c.how.experts),
                      route(*c.router, wide, c.how.tokens, c.how.experts));
  });
}

/// Rows that lie further apart than they are long are routed like packed ones.
inline std::string reads_rows_by_their_stride(const listed_router& listed) {
  return for_each_case(listed, [](the_case& c) {
    const index_t stride = c.how.experts + 5;
    std::vector<float> apart(static_cast<std::size_t>(c.how.tokens * stride), 1e9f);
    for (index_t t = 0; t < c.how.tokens; ++t)
      std::copy_n(c.logits.begin() + t * c.how.experts, c.how.experts, apart.begin() + t * stride);
    assignment out;
    c.router->route(matrix_view<const float>(apart.data(), c.how.tokens, c.how.experts, stride),
                    out);
    return difference(copy_of(out), route(*c.router, c.logits, c.how.tokens, c.how.experts));
  });
}

/// After the first call nothing is allocated, for the same and for fewer tokens, in every storage
/// type.
inline std::string allocates_nothing_when_warm(const listed_router& listed) {
  return for_each_case(listed, [](the_case& c) -> std::string {
    std::vector<bfloat16> bf16;
    std::vector<float16> fp16;
    for (const float z : c.logits) {
      bf16.push_back(static_cast<bfloat16>(z));
      fp16.push_back(static_cast<float16>(z));
    }
    assignment out;
    const auto call = [&](index_t tokens) {
      const index_t n = c.how.experts;
      c.router->route(matrix_view<const float>(c.logits.data(), tokens, n), out);
      if (!c.router->narrow()) return;
      c.router->route(matrix_view<const bfloat16>(bf16.data(), tokens, n), out);
      c.router->route(matrix_view<const float16>(fp16.data(), tokens, n), out);
    };
    call(c.how.tokens);
    const long count = allocations_during([&] {
      call(c.how.tokens);
      call(1);
      call(0);
    });
    return count == 0 ? "" : std::to_string(count) + " allocations";
  });
}

/// No tokens: no choices, and no complaint.
inline std::string takes_no_tokens(const listed_router& listed) {
  const index_t k = listed.near(2);
  assignment out;
  listed.make(k, 8)->route(matrix_view<const float>(nullptr, 0, 8), out);
  const bool fits = out.ragged() || out.k() == k;
  return out.tokens() == 0 && fits && out.ids().empty() ? "" : listed.name;
}

}  // namespace test::laws

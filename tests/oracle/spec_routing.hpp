// Whether a decision is the one that a router_spec describes, recomputed in double from the logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <moeroute/policy/parts/selection.hpp>
#include <moeroute/policy/router_spec.hpp>
#include <span>
#include <string>
#include <vector>

#include "oracle/routing.hpp"

namespace oracle {

using moeroute::router_spec;

/// What a spec needs beside itself, one token.
struct token_inputs {
  const float* logits;                 ///< [columns]
  std::span<const float> bias{};       ///< [E], or empty
  std::span<const float> scale{};      ///< [E], or empty
  std::span<const expert_id> table{};  ///< [k], the token's row
};

namespace detail {

inline constexpr double never = -std::numeric_limits<double>::infinity();

inline double transformed(const router_spec& s, float logit) {
  if (!(logit > -std::numeric_limits<float>::infinity())) return never;
  const double z = static_cast<double>(logit) / static_cast<double>(s.temperature);
  const double cap = static_cast<double>(s.softcap);
  return cap == 0 ? z : cap * std::tanh(z / cap);
}

inline double elementwise(moeroute::score_kind kind, double z) {
  using enum moeroute::score_kind;
  switch (kind) {
    case sigmoid: return z == never ? 0 : 1 / (1 + std::exp(-z));
    case sqrt_softplus: return std::sqrt(std::log1p(std::exp(-std::abs(z))) + std::max(z, 0.0));
    case relu: return std::max(z, 0.0);
    case uniform: return 1;
    default: return z;
  }
}

// The logits that experts have: those of the row, or the float sums of product keys.
inline std::vector<float> expert_logits(const router_spec& s, const float* row) {
  if (s.selection != moeroute::selection_kind::product_keys) return {row, row + s.experts};
  const index_t n = s.columns() / 2;
  std::vector<float> sums;
  for (index_t i = 0; i < n; ++i)
    for (index_t j = 0; j < n; ++j) sums.push_back(row[i] + row[n + j]);
  return sums;
}

// Softmax in double over the experts of the list.
inline std::vector<double> softmax_of(const std::vector<double>& z,
                                      const std::vector<expert_id>& over) {
  std::vector<double> p(z.size(), 0.0);
  double max = never, sum = 0;
  for (const expert_id e : over)
    if (e >= 0) max = std::max(max, z[static_cast<std::size_t>(e)]);
  for (const expert_id e : over)
    if (const auto at = static_cast<std::size_t>(e); e >= 0 && z[at] > never)
      sum += p[at] = z[at] == max ? 1.0 : std::exp(z[at] - max);
  for (double& x : p) x = sum > 0 ? x / sum : 0;
  return p;
}

inline std::string told(const char* what, double got, double expected) {
  char text[96];
  std::snprintf(text, sizeof text, "%s %.9g, expected %.9g", what, got, expected);
  return text;
}

// The best a group can be worth, in double.
inline double group_worth(const router_spec& s, std::vector<double> choice) {
  std::sort(choice.begin(), choice.end(), std::greater<>{});
  std::size_t n = 1;
  if (s.group_score == moeroute::group_score::top2_sum) n = 2;
  if (s.group_score == moeroute::group_score::top_sum)
    n = std::max<std::size_t>(1, static_cast<std::size_t>(s.k / s.topk_group));
  double sum = choice[0];
  for (std::size_t i = 1; i < std::min(n, choice.size()); ++i)
    if (choice[i] > never) sum += choice[i];
  return sum;
}

// Where an expert stands to the groups that stay; either, where rounding decides.
enum group_status { in_group, out_of_group, either };

// What ids were chosen on, or why they are not the best ones. Values closer than rounding are not
// told apart, except where logit and bias are the same: there the lower id comes first.
inline std::string choice_break(const router_spec& s, const token_inputs& in,
                                const std::vector<double>& z, const std::vector<double>& score,
                                std::span<const expert_id> ids, std::vector<int>& status) {
  const auto n = static_cast<std::size_t>(s.experts);
  std::vector<double> choice(n, never), slack(n, 0.0);
  for (std::size_t e = 0; e < n; ++e) {
    if (z[e] == never) continue;
    const double b = in.bias.empty() ? 0 : static_cast<double>(in.bias[e]);
    choice[e] = score[e] + b;
    // Infinity is not rounded.
    if (std::isfinite(score[e])) slack[e] = 3e-6 * (std::abs(score[e]) + std::abs(b)) + 1e-36;
  }
  status.assign(n, in_group);
  if (s.groups > 1) {
    const std::size_t groups = static_cast<std::size_t>(s.groups), size = n / groups;
    std::vector<double> worth, room;
    for (std::size_t g = 0; g < groups; ++g) {
      const auto first = static_cast<std::ptrdiff_t>(g * size),
                 last = first + static_cast<std::ptrdiff_t>(size);
      worth.push_back(group_worth(s, {choice.begin() + first, choice.begin() + last}));
      room.push_back(*std::max_element(slack.begin() + first, slack.begin() + last) *
                     static_cast<double>(size));
    }
    for (std::size_t g = 0; g < groups; ++g) {
      index_t surely_before = 0, perhaps_before = 0;
      for (std::size_t h = 0; h < groups; ++h) {
        if (h == g) continue;
        surely_before += worth[h] > worth[g] + room[g] + room[h];
        perhaps_before += worth[h] >= worth[g] - room[g] - room[h];
      }
      const int kept = perhaps_before < s.topk_group   ? in_group
                       : surely_before >= s.topk_group ? out_of_group
                                                       : either;
      for (std::size_t e = g * size; e < (g + 1) * size; ++e) {
        status[e] = kept;
        if (kept != out_of_group || choice[e] == never) continue;
        choice[e] = static_cast<double>(s.group_fill);
        slack[e] = 0;
      }
    }
  }
  const auto same = [&](std::size_t a, std::size_t b) {
    return in.logits[a] == in.logits[b] && (in.bias.empty() || in.bias[a] == in.bias[b]) &&
           (s.groups == 1 || a / (n / static_cast<std::size_t>(s.groups)) ==
                                 b / (n / static_cast<std::size_t>(s.groups)));
  };
  std::vector<bool> taken(n, false);
  for (std::size_t r = 0; r < ids.size(); ++r) {
    if (ids[r] < 0) break;
    const auto e = static_cast<std::size_t>(ids[r]);
    if (!(choice[e] > never)) return "expert " + std::to_string(e) + " may not be chosen";
    taken[e] = true;
    if (r == 0 || status[e] == either) continue;
    const auto before = static_cast<std::size_t>(ids[r - 1]);
    if (status[before] == either) continue;
    if (choice[e] > choice[before] + slack[e] + slack[before])
      return "rank " + std::to_string(r) + ": " + told("choice", choice[e], choice[before]) +
             " at most";
    if (same(e, before) && e < before) return "equal experts out of order";
  }
  std::size_t last = 0, made = 0;
  for (const expert_id id : ids)
    if (id >= 0) last = static_cast<std::size_t>(id), ++made;
  const auto possible = static_cast<std::size_t>(
      std::count_if(choice.begin(), choice.end(), [](double c) { return c > never; }));
  const bool sure = std::count(status.begin(), status.end(), +either) == 0;
  if (sure && made != std::min(possible, ids.size()))
    return std::to_string(made) + " choices of " + std::to_string(possible) + " possible ones";
  for (std::size_t e = 0; e < n && made > 0; ++e) {
    if (taken[e] || status[e] == either || status[last] == either) continue;
    if (choice[e] > choice[last] + slack[e] + slack[last])
      return "expert " + std::to_string(e) +
             " was left out: " + told("choice", choice[e], choice[last]) + " at most";
    if (same(e, last) && e < last) return "a higher id was preferred among equals";
  }
  return "";
}

inline std::vector<double> weights_of(const router_spec& s, const token_inputs& in,
                                      const std::vector<double>& score,
                                      std::span<const expert_id> ids) {
  using moeroute::eps_mode;
  using moeroute::normalization;
  constexpr double infinite = std::numeric_limits<double>::infinity();
  std::vector<double> w;
  for (const expert_id e : ids) w.push_back(e < 0 ? 0 : score[static_cast<std::size_t>(e)]);
  if (s.normalize != normalization::none) {
    if (std::count(w.begin(), w.end(), infinite) > 0)
      for (double& x : w) x = x == infinite ? 1 : 0;
    double divisor = 0;
    const double p = s.normalize == normalization::lp ? static_cast<double>(s.lp_p) : 1;
    for (const double x : w) divisor += std::pow(x, p);
    divisor = std::pow(divisor, 1 / p);
    if (s.eps_where == eps_mode::add) divisor += static_cast<double>(s.eps);
    if (s.eps_where == eps_mode::clamp) divisor = std::max(divisor, static_cast<double>(s.eps));
    for (double& x : w) x = divisor > 0 ? x / divisor : 0;
  }
  for (std::size_t r = 0; r < w.size(); ++r) {
    if (s.divide_by_k) w[r] /= static_cast<double>(s.k);
    if (s.scale_where == moeroute::scale_place::weights) w[r] *= static_cast<double>(s.scale);
    if (!in.scale.empty() && ids[r] >= 0)
      w[r] *= static_cast<double>(in.scale[static_cast<std::size_t>(ids[r])]);
  }
  return w;
}

// Twice: the best that is left, weighted by the softmax over those close to it.
inline std::vector<double> sparsemixer_weights(const router_spec& s, std::vector<double> z,
                                               std::span<const expert_id> ids, bool& undecided) {
  std::vector<double> w;
  for (const expert_id id : ids) {
    w.push_back(0);
    if (id < 0) continue;
    const double m = z[static_cast<std::size_t>(id)], limit = 2 * static_cast<double>(s.jitter);
    double sum = 0;
    for (const double x : z) {
      const double gap = (m - x) / std::max(std::abs(x), m);
      undecided = undecided || std::abs(gap - limit) < 1e-5;
      if (!(gap > limit)) sum += x == m ? 1 : std::exp(x - m);
    }
    w.back() = 1 / sum;
    z[static_cast<std::size_t>(id)] = never;
  }
  return w;
}

}  // namespace detail

/// The first thing that is wrong with a token's choices; empty where they are what the spec
/// describes.
///
/// Ids are compared exactly where the choice is made on logits; else up to the rounding of float
/// scores. Capacity is not looked at: weights are those before anything is dropped.
inline std::string break_of(const router_spec& s, const token_inputs& in,
                            std::span<const expert_id> ids, std::span<const float> weights) {
  using moeroute::score_kind;
  using moeroute::selection_kind;
  const std::vector<float> logits = detail::expert_logits(s, in.logits);
  std::vector<double> z;
  for (const float x : logits) z.push_back(detail::transformed(s, x));
  std::vector<expert_id> all;
  for (std::size_t e = 0; e < z.size(); ++e) all.push_back(static_cast<expert_id>(e));

  // Divided by a norm, the probabilities of all experts are those among the selected: without
  // the underflow.
  const bool selected =
      s.domain == moeroute::score_domain::selected ||
      (s.selection == selection_kind::expert_table &&
       s.normalize != moeroute::normalization::none && s.eps_where == moeroute::eps_mode::none);
  const std::vector<expert_id> chosen(ids.begin(), ids.end());
  std::vector<double> score;
  if (s.score == score_kind::softmax && s.selection != selection_kind::sparsemixer)
    score = detail::softmax_of(z, selected ? chosen : all);
  else
    for (const double x : z) score.push_back(detail::elementwise(s.score, x));

  std::vector<expert_id> expected;
  if (s.selection == selection_kind::expert_table) {
    for (const expert_id e : in.table)
      expected.push_back(e >= 0 && z[static_cast<std::size_t>(e)] > detail::never ? e : -1);
  } else if (!s.selection_bias && s.groups == 1 && s.softcap == 0) {
    expected = top_k(logits.data(), s.experts, s.k);
  }
  if (!expected.empty()) {
    for (std::size_t r = 0; r < expected.size(); ++r)
      if (ids[r] != expected[r])
        return "rank " + std::to_string(r) + ": expert " + std::to_string(ids[r]) + ", expected " +
               std::to_string(expected[r]);
  } else {
    // The softmax over the selected experts is chosen on logits.
    const bool on_logits = s.domain == moeroute::score_domain::selected;
    std::vector<int> status;
    const std::string broken = detail::choice_break(s, in, z, on_logits ? z : score, ids, status);
    if (!broken.empty()) return broken;
    const moeroute::top_k rule{s.k,           s.groups,     s.topk_group,
                               s.group_score, s.group_fill, s.lost_weight};
    if (s.selection == selection_kind::top_k && rule.weighs_lost_with_0())
      for (const expert_id e : ids) {
        if (e < 0) continue;
        const auto at = static_cast<std::size_t>(e);
        if (status[at] == detail::either) return "";  // either weight is right
        if (status[at] == detail::out_of_group) score[at] = 0;
      }
  }

  bool undecided = false;
  const std::vector<double> w = s.selection == selection_kind::sparsemixer
                                    ? detail::sparsemixer_weights(s, z, ids, undecided)
                                    : detail::weights_of(s, in, score, ids);
  constexpr double most = static_cast<double>(std::numeric_limits<float>::max());
  // A divisor is a chain of k additions.
  const double rounding = std::max(3e-6, 1e-8 * static_cast<double>(s.k));
  // What exp would give as a denormal is 0 in float.
  const double flushed = 1.2e-38 * std::max(1.0, std::abs(static_cast<double>(s.scale)));
  for (std::size_t r = 0; r < w.size() && !undecided; ++r) {
    const double got = static_cast<double>(weights[r]), right = std::clamp(w[r], -most, most);
    if (!(std::abs(got - right) <= rounding * std::abs(right) + flushed))
      return "rank " + std::to_string(r) + ": " + detail::told("weight", got, right);
  }
  return "";
}

}  // namespace oracle

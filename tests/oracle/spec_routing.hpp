// Whether a decision is the one that a router_spec describes, recomputed in double from the logits.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <moeroute/policy/parts/row_transform.hpp>
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
  moeroute::steering steer{};          ///< of a spec with steering
};

namespace detail {

inline constexpr double never = -std::numeric_limits<double>::infinity();

inline double transformed(const router_spec& s, double logit) {
  if (!(logit > never)) return never;
  const double z = logit / static_cast<double>(s.temperature);
  const double cap = static_cast<double>(s.softcap);
  return cap == 0 ? z : cap * std::tanh(z / cap);
}

inline double elementwise(moeroute::score_kind kind, double z) {
  using enum moeroute::score_kind;
  switch (kind) {
    case sigmoid: return z == never ? 0 : 1 / (1 + std::exp(-z));
    case sqrt_softplus: return std::sqrt(std::log1p(std::exp(-std::abs(z))) + std::max(z, 0.0));
    case softplus: return std::log1p(std::exp(-std::abs(z))) + std::max(z, 0.0);
    case relu: return std::max(z, 0.0);
    case uniform: return 1;
    default: return z;
  }
}

// The logits that experts have: those of the row, or the float sums of product keys.
inline std::vector<float> expert_logits(const router_spec& s, const float* row) {
  if (s.selection != moeroute::selection_kind::product_keys) return {row, row + s.experts};
  const index_t n = s.first_keys > 0 ? s.first_keys : s.columns() / 2, m = s.columns() - n;
  std::vector<float> sums;
  for (index_t i = 0; i < n; ++i)
    for (index_t j = 0; j < m; ++j) sums.push_back(row[i] + row[n + j]);
  return sums;
}

// What an expert's logit becomes before temperature and soft-cap, and how much of that may be
// rounding.
struct stepped {
  std::vector<double> z, slack;
};

inline stepped steps(const router_spec& s, const token_inputs& in) {
  using moeroute::logit_pairs;
  const auto n = static_cast<std::size_t>(s.experts);
  stepped out{std::vector<double>(n, never), std::vector<double>(n, 0.0)};
  const auto sigma = [](double x) { return 1 / (1 + std::exp(-x)); };
  const auto raw = [&](std::size_t column) {
    const float x = in.logits[column];
    return x > -std::numeric_limits<float>::infinity() ? static_cast<double>(x) : never;
  };
  constexpr double infinite = std::numeric_limits<double>::infinity();
  for (std::size_t e = 0; e < n; ++e) {
    if (s.second_logits == logit_pairs::sigmoid_sum) {
      if (raw(e) > never && raw(n + e) > never) out.z[e] = sigma(raw(e)) + sigma(raw(n + e));
      out.slack[e] = 1e-6;
    } else if (s.passes > 1) {
      double sum = 0, square = 0, size = 0;
      bool there = true;
      for (std::size_t p = 0; p < static_cast<std::size_t>(s.passes); ++p) {
        there = there && raw(p * n + e) > never;
        sum += raw(p * n + e);
        size = std::max(size, std::abs(raw(p * n + e)));
      }
      if (!there) continue;
      const double mean = sum / static_cast<double>(s.passes);
      for (std::size_t p = 0; p < static_cast<std::size_t>(s.passes); ++p)
        square += (raw(p * n + e) - mean) * (raw(p * n + e) - mean);
      double deviation = std::sqrt(square / static_cast<double>(s.passes));
      if (mean == infinite) deviation = 0;
      const double lambda = static_cast<double>(s.pass_lambda);
      if (s.pass_rule == moeroute::pass_rule::bound) {
        out.z[e] = mean - lambda * deviation;
        out.slack[e] = mean == infinite ? 0 : 2e-6 * size * (1 + std::abs(lambda));
      } else {
        const double by = std::max(deviation, 1e-6);
        out.z[e] = mean / by;
        // A deviation that is all rounding says nothing.
        out.slack[e] = deviation > 1e-4 * size ? 1e-2 * std::abs(out.z[e]) : infinite;
      }
    } else {
      out.z[e] = raw(e);
    }
  }
  const auto finite = [&](double x) { return std::isfinite(x); };
  const auto moments = [&] {
    double sum = 0, square = 0, count = 0, size = 0;
    for (const double x : out.z)
      if (finite(x)) sum += x, count += 1, size = std::max(size, std::abs(x));
    const double mean = count > 0 ? sum / count : 0;
    for (const double x : out.z)
      if (finite(x)) square += (x - mean) * (x - mean);
    return std::array<double, 3>{mean, count > 0 ? std::sqrt(square / count) : 0, size};
  };
  if (s.standardize != 0) {
    const auto [mean, deviation, size] = moments();
    const double lambda = static_cast<double>(s.standardize);
    for (std::size_t e = 0; e < n; ++e) {
      if (!finite(out.z[e])) continue;
      const bool rounding = deviation <= 1e-5 * size;
      const double by = deviation > 0 ? deviation : 1;
      out.z[e] = lambda * (out.z[e] - mean) / by;
      out.slack[e] = rounding ? infinite : lambda * (out.slack[e] + 4e-6 * size) / by;
    }
  }
  if (s.steering) {
    const auto [mean, deviation, size] = moments();
    double top = never;
    for (const double x : out.z) top = std::max(top, x);
    auto rank = static_cast<double>(in.steer.promote.size());
    const double step = std::max(1e-6, std::abs(top) * 0x1p-22);
    for (const expert_id id : in.steer.promote) {
      const auto e = static_cast<std::size_t>(id);
      if (in.steer.how == moeroute::promotion::soft) {
        out.z[e] += static_cast<double>(in.steer.lambda) * deviation;
        out.slack[e] += 4e-6 * (size + std::abs(out.z[e] == out.z[e] ? out.z[e] : 0));
      } else if (out.z[e] > never) {
        out.z[e] = top == infinite ? top : top + step * rank;
        out.slack[e] = 0.4 * step;
      }
      rank -= 1;
    }
    for (const expert_id id : in.steer.suppress) out.z[static_cast<std::size_t>(id)] = never;
  }
  return out;
}

// Whether two experts come from the same numbers: then they are equal on the way to a choice.
inline bool same_inputs(const router_spec& s, const token_inputs& in, std::size_t a,
                        std::size_t b) {
  const auto n = static_cast<std::size_t>(s.experts);
  for (std::size_t at = 0; at + n <= static_cast<std::size_t>(s.columns()); at += n)
    if (in.logits[at + a] != in.logits[at + b]) return false;
  const auto has = [](std::span<const expert_id> list, std::size_t e) {
    return std::find(list.begin(), list.end(), static_cast<expert_id>(e)) != list.end();
  };
  if (has(in.steer.promote, a) != has(in.steer.promote, b) ||
      has(in.steer.suppress, a) != has(in.steer.suppress, b))
    return false;
  if (has(in.steer.promote, a) && in.steer.how == moeroute::promotion::hard) return false;
  return in.bias.empty() || in.bias[a] == in.bias[b];
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
  if (s.group_score == moeroute::group_score::sum) n = choice.size();
  double sum = choice[0];
  for (std::size_t i = 1; i < std::min(n, choice.size()); ++i)
    if (choice[i] > never) sum += choice[i];
  return sum;
}

// Where an expert stands to the groups that stay; either, where rounding decides.
enum group_status { in_group, out_of_group, either };

// What ids were chosen on, or why they are not the best ones. Values closer than rounding are not
// told apart, except where logit and bias are the same: there the order of ties decides. `room` is
// the rounding of the scores themselves.
inline std::string choice_break(const router_spec& s, const token_inputs& in,
                                const std::vector<double>& z, const std::vector<double>& score,
                                const std::vector<double>& room, std::span<const expert_id> ids,
                                std::vector<int>& status) {
  const auto n = static_cast<std::size_t>(s.experts);
  const bool turned = s.ties == moeroute::tie_order::higher_id;
  const bool of_each = s.selection == moeroute::selection_kind::each_group;
  const auto before = [&](std::size_t a, std::size_t b) { return turned ? a > b : a < b; };
  std::vector<double> choice(n, never), slack(n, 0.0);
  for (std::size_t e = 0; e < n; ++e) {
    if (z[e] == never) continue;
    const double b = in.bias.empty() ? 0 : static_cast<double>(in.bias[e]);
    choice[e] = score[e] + b;
    // Infinity is not rounded.
    if (std::isfinite(score[e]))
      slack[e] = 3e-6 * (std::abs(score[e]) + std::abs(b)) + 1e-36 + room[e];
  }
  status.assign(n, in_group);
  const std::size_t groups = static_cast<std::size_t>(s.groups), size = n / groups;
  if (groups > 1 && !of_each) {
    std::vector<double> worth, gap;
    for (std::size_t g = 0; g < groups; ++g) {
      const auto first = static_cast<std::ptrdiff_t>(g * size),
                 last = first + static_cast<std::ptrdiff_t>(size);
      worth.push_back(group_worth(s, {choice.begin() + first, choice.begin() + last}));
      gap.push_back(*std::max_element(slack.begin() + first, slack.begin() + last) *
                    static_cast<double>(size));
    }
    for (std::size_t g = 0; g < groups; ++g) {
      index_t surely_before = 0, perhaps_before = 0;
      for (std::size_t h = 0; h < groups; ++h) {
        if (h == g) continue;
        surely_before += worth[h] > worth[g] + gap[g] + gap[h];
        perhaps_before += worth[h] >= worth[g] - gap[g] - gap[h];
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
    return same_inputs(s, in, a, b) && (s.groups == 1 || a / size == b / size);
  };
  const bool sure = std::count(status.begin(), status.end(), +either) == 0;
  // All experts, or one group after the other with its own ranks.
  const std::size_t parts = of_each ? groups : 1, each = ids.size() / parts;
  for (std::size_t part = 0; part < parts; ++part) {
    const std::size_t first = part * (n / parts), end = first + n / parts;
    const std::span<const expert_id> own = ids.subspan(part * each, each);
    std::vector<bool> taken(n, false);
    for (std::size_t r = 0; r < own.size(); ++r) {
      if (own[r] < 0) break;
      const auto e = static_cast<std::size_t>(own[r]);
      if (e < first || e >= end) return "expert " + std::to_string(e) + " is of another group";
      if (!(choice[e] > never)) return "expert " + std::to_string(e) + " may not be chosen";
      taken[e] = true;
      if (r == 0 || status[e] == either) continue;
      const auto above = static_cast<std::size_t>(own[r - 1]);
      if (status[above] == either) continue;
      if (choice[e] > choice[above] + slack[e] + slack[above])
        return "rank " + std::to_string(r) + ": " + told("choice", choice[e], choice[above]) +
               " at most";
      if (same(e, above) && before(e, above)) return "equal experts out of order";
    }
    std::size_t last = 0, made = 0;
    for (const expert_id id : own)
      if (id >= 0) last = static_cast<std::size_t>(id), ++made;
    const auto possible = static_cast<std::size_t>(std::count_if(
        choice.begin() + static_cast<std::ptrdiff_t>(first),
        choice.begin() + static_cast<std::ptrdiff_t>(end), [](double c) { return c > never; }));
    if (sure && made != std::min(possible, own.size()))
      return std::to_string(made) + " choices of " + std::to_string(possible) + " possible ones";
    for (std::size_t e = first; e < end && made > 0; ++e) {
      if (taken[e] || status[e] == either || status[last] == either) continue;
      if (choice[e] > choice[last] + slack[e] + slack[last])
        return "expert " + std::to_string(e) +
               " was left out: " + told("choice", choice[e], choice[last]) + " at most";
      if (same(e, last) && before(e, last)) return "among equals the other order was preferred";
    }
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
  using moeroute::logit_pairs;
  using moeroute::score_kind;
  using moeroute::selection_kind;
  const bool keyed = s.selection == selection_kind::product_keys;
  const std::vector<float> logits = detail::expert_logits(s, in.logits);
  detail::stepped stepped;
  if (keyed) {
    stepped = {{logits.begin(), logits.end()}, std::vector<double>(logits.size(), 0.0)};
    // Weights of all experts are a product, which does not round the sum.
    const std::size_t n = static_cast<std::size_t>(s.first_keys > 0 ? s.first_keys
                                                                    : s.columns() / 2),
                      m = logits.size() / n;
    if (s.domain == moeroute::score_domain::all)
      for (std::size_t e = 0; e < logits.size(); ++e)
        if (std::isfinite(logits[e]))
          stepped.z[e] =
              static_cast<double>(in.logits[e / m]) + static_cast<double>(in.logits[n + e % m]);
  } else {
    stepped = detail::steps(s, in);
  }
  const bool moved = s.second_logits == logit_pairs::sigmoid_sum || s.passes > 1 ||
                     s.standardize != 0 || s.steering;
  std::vector<double> z;
  for (const double x : stepped.z) z.push_back(detail::transformed(s, x));
  // How far rounding may carry a logit, and with it its weight.
  double farthest = 0;
  for (double& x : stepped.slack) {
    x = x / static_cast<double>(s.temperature);
    farthest = std::max(farthest, x);
  }
  std::vector<expert_id> all;
  for (std::size_t e = 0; e < z.size(); ++e) all.push_back(static_cast<expert_id>(e));

  // Divided by a norm, the probabilities of all experts are those among the selected: without
  // the underflow.
  const bool selected =
      s.domain == moeroute::score_domain::selected ||
      (s.selection == selection_kind::expert_table &&
       s.normalize != moeroute::normalization::none && s.eps_where == moeroute::eps_mode::none);
  const std::vector<expert_id> chosen(ids.begin(), ids.end());
  const auto scored = [&](score_kind kind, bool among_chosen, const std::vector<double>& of) {
    std::vector<double> score;
    if (kind == score_kind::softmax && s.selection != selection_kind::sparsemixer)
      score = detail::softmax_of(of, among_chosen ? chosen : all);
    else
      for (const double x : of) score.push_back(detail::elementwise(kind, x));
    return score;
  };
  const bool pairs = s.second_logits == logit_pairs::sigmoid_sum;
  std::vector<double> score = scored(pairs ? score_kind::identity : s.score, selected, z);

  std::vector<expert_id> expected;
  if (s.selection == selection_kind::expert_table) {
    for (const expert_id e : in.table)
      expected.push_back(e >= 0 && z[static_cast<std::size_t>(e)] > detail::never ? e : -1);
  } else if (!s.selection_bias && s.groups == 1 && s.softcap == 0 && !moved &&
             s.ties == moeroute::tie_order::lower_id) {
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
    std::vector<double> room(stepped.slack);
    // A step of a logit moves no score by more, but a soft-capped one and probabilities less.
    const std::string broken =
        detail::choice_break(s, in, z, on_logits ? z : score, room, ids, status);
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

  // As above: divided by a norm, those of all are those of the selected.
  const bool divided =
      s.normalize != moeroute::normalization::none && s.eps_where == moeroute::eps_mode::none;
  if (s.weight_apart)
    score =
        scored(s.weight_score, divided || s.weight_domain == moeroute::score_domain::selected, z);
  if (s.second_logits == logit_pairs::weigh) {
    std::vector<double> second;
    for (std::size_t e = 0; e < z.size(); ++e) {
      const float x = in.logits[z.size() + e];
      second.push_back(x > -std::numeric_limits<float>::infinity() ? static_cast<double>(x)
                                                                   : detail::never);
    }
    const bool among =
        divided || (s.weight_apart ? s.weight_domain == moeroute::score_domain::selected
                                   : s.domain == moeroute::score_domain::selected);
    score = scored(s.weight_apart ? s.weight_score : s.score, among, second);
  }
  if (!(farthest < 0.01)) return "";  // weights are rounding
  bool undecided = false;
  const std::vector<double> w = s.selection == selection_kind::sparsemixer
                                    ? detail::sparsemixer_weights(s, z, ids, undecided)
                                    : detail::weights_of(s, in, score, ids);
  constexpr double most = static_cast<double>(std::numeric_limits<float>::max());
  // A divisor is a chain of k additions.
  const double rounding = std::max(3e-6, 1e-8 * static_cast<double>(s.k)) + 4 * farthest;
  // What exp would give as a denormal is 0 in float.
  const double flushed =
      4 * farthest + 1.2e-38 * std::max(1.0, std::abs(static_cast<double>(s.scale)));
  for (std::size_t r = 0; r < w.size() && !undecided; ++r) {
    const double got = static_cast<double>(weights[r]), right = std::clamp(w[r], -most, most);
    if (!(std::abs(got - right) <= rounding * std::abs(right) + flushed))
      return "rank " + std::to_string(r) + ": " + detail::told("weight", got, right);
  }
  return "";
}

}  // namespace oracle

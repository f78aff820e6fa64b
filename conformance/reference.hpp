// What a router decides, in double and one row at a time, read rightly or with one known mistake.
// Scores are rounded to float where they decide, as the library's promise says.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <string_view>
#include <vector>

#include "oracle/spec_routing.hpp"

namespace conformance {

using moeroute::expert_id;
using moeroute::index_t;
using moeroute::router_spec;

/// How a router was read. What a field of the spec says is changed there; the rest stands here.
struct reading {
  bool higher_id = false;          ///< among equals the higher id wins
  bool order_of_bits = false;      ///< -0 stands below +0
  bool nan_is_largest = false;     ///< as a sort or torch.topk has it
  bool takes_minus_inf = false;    ///< experts at -inf are chosen where nothing else is left
  bool ignores_mask = false;       ///< tokens that take no part are routed
  bool ignores_bias = false;       ///< no bias on the choice
  bool weighs_bias = false;        ///< weights are the biased scores
  bool bias_on_logits = false;     ///< the bias is inside the score
  bool bias_in_16_bits = false;    ///< bfloat16
  bool scores_in_16_bits = false;  ///< bfloat16
  bool no_maximum = false;         ///< softmax without subtracting the largest logit
  int bits_of_ids = 0;             ///< 8: bytes, -8: signed bytes
  bool worst_first = false;        ///< ranks from the last to the first
};

/// A mistake that engines have made: what is different in the spec and in how it is read.
struct mistake {
  std::string_view name;
  std::string_view sentence;
  /// Changes both; false where the spec has nothing to make it with.
  bool (*plant)(router_spec&, reading&);
};

namespace detail {

inline bool set(bool& flag, bool possible = true) {
  flag = true;
  return possible;
}

}  // namespace detail

inline constexpr mistake mistakes[] = {
    {"bias_in_weights", "the weights are taken from the biased scores",
     [](router_spec& s, reading& r) { return detail::set(r.weighs_bias, s.selection_bias); }},
    {"bias_ignored", "the choice is made without the bias",
     [](router_spec& s, reading& r) { return detail::set(r.ignores_bias, s.selection_bias); }},
    {"bias_on_logits", "the bias is added to the logits, not to the scores",
     [](router_spec& s, reading& r) {
       return detail::set(r.bias_on_logits,
                          s.selection_bias && s.domain == moeroute::score_domain::all);
     }},
    {"bias_in_16_bits", "the bias is stored as bfloat16",
     [](router_spec& s, reading& r) { return detail::set(r.bias_in_16_bits, s.selection_bias); }},
    {"scores_in_16_bits", "the scores are rounded to bfloat16 before the choice",
     [](router_spec&, reading& r) { return detail::set(r.scores_in_16_bits); }},
    {"eps_missing", "the divisor of the weights is without its eps",
     [](router_spec& s, reading&) {
       const bool there = s.eps_where != moeroute::eps_mode::none;
       s.eps_where = moeroute::eps_mode::none;
       s.eps = 0;
       return there;
     }},
    {"raw_weights", "weights that were to be divided by their sum are not",
     [](router_spec& s, reading&) {
       const bool there = s.normalize != moeroute::normalization::none;
       s.normalize = moeroute::normalization::none;
       s.lp_p = 1;
       return there;
     }},
    {"divided_weights", "weights that were to stay as they are are divided by their sum",
     [](router_spec& s, reading&) {
       const bool raw =
           s.normalize == moeroute::normalization::none && s.score != moeroute::score_kind::softmax;
       s.normalize = moeroute::normalization::sum;
       return raw;
     }},
    {"softmax_over_all", "the softmax is over all experts, not over those selected",
     [](router_spec& s, reading&) {
       const bool there = s.score == moeroute::score_kind::softmax &&
                          s.domain == moeroute::score_domain::selected && !s.weight_apart &&
                          s.normalize == moeroute::normalization::none;
       s.domain = moeroute::score_domain::all;
       return there;
     }},
    {"softmax_over_selected", "the softmax is over the selected experts, not over all",
     [](router_spec& s, reading&) {
       const bool there = s.score == moeroute::score_kind::softmax &&
                          s.domain == moeroute::score_domain::all && !s.weight_apart &&
                          s.normalize == moeroute::normalization::none;
       s.normalize = moeroute::normalization::sum;  // which comes to the same
       return there;
     }},
    {"sigmoid_for_softmax", "sigmoid scores in place of softmax",
     [](router_spec& s, reading&) {
       const bool there = s.score == moeroute::score_kind::softmax && !s.weight_apart;
       s.score = moeroute::score_kind::sigmoid;
       return there;
     }},
    {"softmax_for_sigmoid", "softmax scores in place of sigmoid or sqrt-softplus",
     [](router_spec& s, reading&) {
       const bool there = s.score != moeroute::score_kind::softmax && !s.weight_apart;
       s.score = moeroute::score_kind::softmax;
       return there;
     }},
    {"softmax_without_maximum", "the softmax does not subtract the largest logit and overflows",
     [](router_spec& s, reading& r) {
       return detail::set(r.no_maximum, s.score == moeroute::score_kind::softmax);
     }},
    {"groups_ignored", "the choice is among all groups",
     [](router_spec& s, reading&) {
       const bool there = s.groups > 1;
       s.groups = s.topk_group = 1;
       s.selection = moeroute::selection_kind::top_k;
       return there;
     }},
    {"groups_by_maximum", "a group is worth its best expert, not the sum of its best two",
     [](router_spec& s, reading&) {
       const bool there = s.groups > 1 && s.selection == moeroute::selection_kind::top_k &&
                          s.group_score != moeroute::group_score::max;
       s.group_score = moeroute::group_score::max;
       return there;
     }},
    {"groups_by_two", "a group is worth the sum of its best two experts, not its best one",
     [](router_spec& s, reading&) {
       const bool there = s.groups > 1 && s.selection == moeroute::selection_kind::top_k &&
                          s.group_score == moeroute::group_score::max;
       s.group_score = moeroute::group_score::top2_sum;
       return there;
     }},
    {"groups_filled_with_zero", "experts of other groups get the score 0, not -inf",
     [](router_spec& s, reading&) {
       const bool there =
           s.groups > 1 && s.selection == moeroute::selection_kind::top_k && s.group_fill != 0;
       s.group_fill = 0;
       s.lost_weight = moeroute::lost_weight::own;
       return there;
     }},
    {"scale_twice", "the factor of the weights is applied twice",
     [](router_spec& s, reading&) {
       const bool there = s.scale != 1;
       s.scale = s.scale_where == moeroute::scale_place::weights ? s.scale * s.scale : s.scale;
       s.scale_where = moeroute::scale_place::weights;
       return there;
     }},
    {"scale_missing", "the factor of the weights is left out",
     [](router_spec& s, reading&) {
       const bool there = s.scale != 1 && s.scale_where == moeroute::scale_place::weights;
       s.scale = 1;
       return there;
     }},
    {"expert_scale_missing", "the factor that every expert has is left out",
     [](router_spec& s, reading&) {
       const bool there = s.per_expert_scale;
       s.per_expert_scale = false;
       return there;
     }},
    {"softcap_missing", "the logits are not soft-capped",
     [](router_spec& s, reading&) {
       const bool there = s.softcap != 0;
       s.softcap = 0;
       return there;
     }},
    {"higher_id", "among equals the higher id wins",
     [](router_spec&, reading& r) { return detail::set(r.higher_id); }},
    {"order_of_bits", "-0 stands below +0",
     [](router_spec&, reading& r) { return detail::set(r.order_of_bits); }},
    {"nan_is_largest", "a NaN logit is chosen first and makes weights NaN",
     [](router_spec&, reading& r) { return detail::set(r.nan_is_largest); }},
    {"takes_minus_inf", "experts at -inf or NaN are chosen where nothing else is left",
     [](router_spec&, reading& r) { return detail::set(r.takes_minus_inf); }},
    {"mask_ignored", "tokens that take no part are routed",
     [](router_spec&, reading& r) { return detail::set(r.ignores_mask); }},
    {"ids_of_8_bits", "ids are cast to bytes",
     [](router_spec& s, reading& r) {
       r.bits_of_ids = 8;
       return s.experts > 256;
     }},
    {"ids_of_signed_8_bits", "ids are cast to signed bytes",
     [](router_spec& s, reading& r) {
       r.bits_of_ids = -8;
       return s.experts > 128;
     }},
    {"worst_first", "the ranks are in ascending order of score",
     [](router_spec& s, reading& r) { return detail::set(r.worst_first, s.k > 1); }},
};

/// What is decided for one token, and whether rounding could decide otherwise.
struct decision {
  std::vector<expert_id> ids;
  std::vector<float> weights;
  bool decided = true;
  bool tied = false;         ///< equal choice scores at the k-th place
  bool groups_tied = false;  ///< equal groups at the last place
};

namespace detail {

using oracle::detail::never;

inline float bfloat16_of(float x) {
  if (!std::isfinite(x)) return x;
  auto bits = std::bit_cast<std::uint32_t>(x);
  bits += 0x7fffu + (bits >> 16 & 1u);
  return std::bit_cast<float>(bits & 0xffff0000u);
}

// Two deciding values: equal, or so far apart that no float arithmetic can turn them.
inline bool told_apart(float a, float b, double exact_a, double exact_b) {
  if (!(a > -std::numeric_limits<float>::infinity()) ||
      !(b > -std::numeric_limits<float>::infinity()))
    return true;
  const double size = std::max(std::abs(exact_a), std::abs(exact_b));
  if (!std::isfinite(size)) return true;
  const double ulp = std::max(size * 0x1p-23, 0x1p-149), gap = std::abs(exact_a - exact_b);
  return a == b ? gap < 0.01 * ulp : gap > 16 * ulp || size < 1e-37;
}

inline int order_of(float x) {
  const auto bits = std::bit_cast<std::int32_t>(x);
  return bits >= 0 ? bits : std::numeric_limits<std::int32_t>::min() - bits - 1;
}

inline bool nan_free(double x) { return x == x; }

}  // namespace detail

/// The decision of a router of the rules that published models have. `in` as the oracle takes it;
/// `takes_part` is the token's mask.
inline decision decide(const router_spec& s, const reading& r, oracle::token_inputs in,
                       bool takes_part = true) {
  using moeroute::selection_kind;
  using oracle::detail::never;
  decision out;
  const auto n = static_cast<std::size_t>(s.experts), k = static_cast<std::size_t>(s.k);
  if (!takes_part && !r.ignores_mask) {
    out.ids.assign(k, moeroute::no_expert);
    out.weights.assign(k, 0.0f);
    return out;
  }
  std::vector<float> bias(in.bias.begin(), in.bias.end()), row(in.logits, in.logits + s.columns()),
      scale(in.scale.begin(), in.scale.end());
  if (r.bias_in_16_bits)
    for (float& b : bias) b = detail::bfloat16_of(b);
  if (r.bias_on_logits) {
    for (std::size_t e = 0; e < n; ++e) row[e] += bias[e];
    bias.clear();
  }
  if (r.ignores_bias) bias.clear();
  if (!s.per_expert_scale) scale.clear();
  in.logits = row.data();
  in.bias = bias;
  in.scale = scale;

  const bool keyed = s.selection == selection_kind::product_keys;
  const std::vector<float> logits = oracle::detail::expert_logits(s, row.data());
  std::vector<double> z =
      keyed ? std::vector<double>(logits.begin(), logits.end()) : oracle::detail::steps(s, in).z;
  std::vector<bool> nan(n);
  for (std::size_t e = 0; e < n; ++e) {
    nan[e] = logits[e] != logits[e];
    if (nan[e]) z[e] = never;
    z[e] = oracle::detail::transformed(s, z[e]);
  }
  std::vector<expert_id> all(n);
  std::iota(all.begin(), all.end(), 0);

  const auto scored = [&](moeroute::score_kind kind, const std::vector<expert_id>& over) {
    std::vector<double> score;
    if (kind != moeroute::score_kind::softmax) {
      for (const double x : z) score.push_back(oracle::detail::elementwise(kind, x));
    } else if (r.no_maximum) {
      float sum = 0;
      for (const double x : z)
        score.push_back(static_cast<double>(static_cast<float>(std::exp(x))));
      for (const expert_id e : over)
        if (e >= 0) sum += static_cast<float>(score[static_cast<std::size_t>(e)]);
      for (double& x : score) x = static_cast<double>(static_cast<float>(x) / sum);
    } else {
      score = oracle::detail::softmax_of(z, over);
    }
    if (r.scores_in_16_bits)
      for (double& x : score) x = static_cast<double>(detail::bfloat16_of(static_cast<float>(x)));
    return score;
  };
  std::vector<double> score = scored(s.score, all);

  // The choice: on logits where the score is monotone and nothing is added, else on scores.
  const bool each = s.selection == selection_kind::each_group;
  const bool plain = bias.empty() && (s.groups == 1 || each);
  const bool on_logits = s.domain == moeroute::score_domain::selected || keyed ||
                         s.selection == selection_kind::sparsemixer ||
                         (plain && !r.scores_in_16_bits);
  std::vector<double> exact(n, never);
  std::vector<float> choice(n, -std::numeric_limits<float>::infinity());
  for (std::size_t e = 0; e < n; ++e) {
    if (z[e] == never) continue;
    double c = on_logits && plain && !keyed && s.softcap == 0 && s.standardize == 0 && s.passes == 1
                   ? static_cast<double>(logits[e])
               : on_logits ? z[e]
                           : score[e];
    // What exp gives below the normal numbers is 0.
    if (!on_logits && std::abs(c) < 1.2e-38) c = 0;
    choice[e] = static_cast<float>(c);
    if (!bias.empty()) {
      choice[e] += bias[e];
      c += static_cast<double>(bias[e]);
    }
    exact[e] = c;
    if (!detail::nan_free(c)) choice[e] = -std::numeric_limits<float>::infinity();
  }
  const auto before = [&](std::size_t a, std::size_t b) {
    if (r.nan_is_largest && nan[a] != nan[b]) return static_cast<bool>(nan[a]);
    if (choice[a] != choice[b]) return choice[a] > choice[b];
    if (r.order_of_bits && detail::order_of(choice[a]) != detail::order_of(choice[b]))
      return detail::order_of(choice[a]) > detail::order_of(choice[b]);
    return r.higher_id != (s.ties == moeroute::tie_order::higher_id) ? a > b : a < b;
  };
  const auto possible = [&](std::size_t e) {
    return choice[e] > -std::numeric_limits<float>::infinity() || r.takes_minus_inf ||
           (r.nan_is_largest && nan[e]);
  };

  // Groups that lose keep no expert.
  std::vector<bool> lost(n, false);
  const auto groups = static_cast<std::size_t>(s.groups), size = n / groups;
  if (groups > 1 && !each) {
    std::vector<float> worth;
    std::vector<double> exact_worth;
    for (std::size_t g = 0; g < groups; ++g) {
      std::vector<double> float_choice, exact_choice;
      for (std::size_t e = g * size; e < (g + 1) * size; ++e) {
        float_choice.push_back(static_cast<double>(choice[e]));
        exact_choice.push_back(exact[e]);
      }
      worth.push_back(static_cast<float>(oracle::detail::group_worth(s, float_choice)));
      exact_worth.push_back(oracle::detail::group_worth(s, exact_choice));
    }
    std::vector<std::size_t> by_worth(groups);
    std::iota(by_worth.begin(), by_worth.end(), 0u);
    std::stable_sort(by_worth.begin(), by_worth.end(), [&](std::size_t a, std::size_t b) {
      return worth[a] != worth[b] ? worth[a] > worth[b] : r.higher_id && a > b;
    });
    const auto last = static_cast<std::size_t>(s.topk_group);
    for (std::size_t i = 0; i + 1 < groups; ++i)
      out.decided = out.decided &&
                    (i + 1 != last ||
                     detail::told_apart(worth[by_worth[i]], worth[by_worth[i + 1]],
                                        exact_worth[by_worth[i]], exact_worth[by_worth[i + 1]]));
    out.groups_tied = last < groups && worth[by_worth[last - 1]] == worth[by_worth[last]];
    for (std::size_t i = last; i < groups; ++i)
      for (std::size_t e = by_worth[i] * size; e < (by_worth[i] + 1) * size; ++e) {
        lost[e] = true;
        if (!possible(e)) continue;
        choice[e] = s.group_fill;
        exact[e] = static_cast<double>(s.group_fill);
      }
  }

  if (s.selection == selection_kind::expert_table) {
    for (const expert_id e : in.table)
      out.ids.push_back(e >= 0 && possible(static_cast<std::size_t>(e)) ? e : moeroute::no_expert);
  } else {
    const std::size_t parts = each ? groups : 1;
    for (std::size_t part = 0; part < parts; ++part) {
      std::vector<std::size_t> order;
      for (std::size_t e = part * (n / parts); e < (part + 1) * (n / parts); ++e)
        if (possible(e)) order.push_back(e);
      const std::size_t most = k / parts;
      std::partial_sort(
          order.begin(),
          order.begin() + static_cast<std::ptrdiff_t>(std::min(order.size(), most + 1)),
          order.end(), before);
      for (std::size_t i = 0; i + 1 < order.size() && i < most; ++i)
        out.decided = out.decided && detail::told_apart(choice[order[i]], choice[order[i + 1]],
                                                        exact[order[i]], exact[order[i + 1]]);
      out.tied =
          out.tied || (order.size() > most && choice[order[most - 1]] == choice[order[most]]);
      for (std::size_t i = 0; i < most; ++i)
        out.ids.push_back(i < order.size() ? static_cast<expert_id>(order[i])
                                           : moeroute::no_expert);
    }
  }

  // The weights.
  std::vector<double> w;
  if (s.selection == selection_kind::sparsemixer) {
    bool undecided = false;
    w = oracle::detail::sparsemixer_weights(s, z, out.ids, undecided);
    out.decided = out.decided && !undecided;
  } else {
    const bool divided =
        s.normalize != moeroute::normalization::none && s.eps_where == moeroute::eps_mode::none;
    if (s.weight_apart)
      score =
          scored(s.weight_score,
                 divided || s.weight_domain == moeroute::score_domain::selected ? out.ids : all);
    else if (s.domain == moeroute::score_domain::selected)
      score = scored(s.score, out.ids);
    else if (keyed)
      score = scored(s.score, all);
    // Divided by a norm, the probabilities of all experts are those among the selected.
    else if (divided && s.score == moeroute::score_kind::softmax && !r.scores_in_16_bits &&
             !r.no_maximum && !r.weighs_bias)
      score = scored(s.score, out.ids);
    for (std::size_t e = 0; e < n; ++e) {
      if (r.weighs_bias && !in.bias.empty()) score[e] += static_cast<double>(in.bias[e]);
      if (lost[e] &&
          moeroute::top_k{s.k, s.groups, s.topk_group, s.group_score, s.group_fill, s.lost_weight}
              .weighs_lost_with_0())
        score[e] = 0;
    }
    w = oracle::detail::weights_of(s, in, score, out.ids);
  }
  bool has_nan = false;
  for (const expert_id e : out.ids)
    has_nan = has_nan || (e >= 0 && nan[static_cast<std::size_t>(e)]);
  const bool spreads =
      s.score == moeroute::score_kind::softmax || s.normalize != moeroute::normalization::none;
  constexpr double most = static_cast<double>(std::numeric_limits<float>::max());
  for (std::size_t i = 0; i < w.size(); ++i) {
    const expert_id e = out.ids[i];
    if (e >= 0 && has_nan && (spreads || nan[static_cast<std::size_t>(e)]))
      w[i] = std::numeric_limits<double>::quiet_NaN();
    out.weights.push_back(static_cast<float>(w[i] == w[i] ? std::clamp(w[i], -most, most) : w[i]));
  }

  if (r.worst_first) {
    std::reverse(out.ids.begin(), out.ids.end());
    std::reverse(out.weights.begin(), out.weights.end());
  }
  for (expert_id& e : out.ids) {
    if (e >= 0 && r.bits_of_ids == 8) e &= 0xff;
    if (e >= 0 && r.bits_of_ids == -8) e = static_cast<std::int8_t>(e & 0xff);
  }
  return out;
}

}  // namespace conformance

// From a description with rare words to a router of parts that are picked at run time.
#pragma once

#include <utility>

#include <moeroute/policy/make_router.hpp>
#include <moeroute/policy/parts/any_parts.hpp>
#include <moeroute/policy/row/counted.hpp>
#include <moeroute/policy/row/explore.hpp>
#include <moeroute/policy/row/transformed.hpp>

namespace moeroute {

namespace detail {

// What the rare words of a description share: parts that are picked at run time, in one router.
using rare_router = weighed_by_second<
    transformed<any_row_transform, router<rare_score, class_bias<ordered_ties<any_selection>>>>,
    any_score>;
using rare_counted = transformed<any_row_transform, counted<rare_score>>;

}  // namespace detail

/// One of the routers of rare words that a router_spec can describe. route() takes it like any
/// other.
///
/// Apart from any_router, so that a program that describes common routers carries nothing of it.
/// Cost: a switch per row and step; each rule has a template of its own for who knows it.
class any_rare_router
    : public detail::router_of_kinds<detail::rare_router, detail::rare_counted, dense_if,
                                     product_keys<softmax>, explore<router<any_score>>> {
 public:
  using router_of_kinds::router_of_kinds;
};

namespace detail {

inline rare_score scores_of(const router_spec& s) {
  const any_score score(s.score, s.domain);
  return {.choice = score,
          .weight = s.weight_apart ? any_score(s.weight_score, s.weight_domain) : score,
          .on_logits = s.domain == score_domain::selected};
}

inline any_row_transform steps_of(const router_spec& s, const router_tensors& tensors) {
  return {.sums_sigmoids = s.second_logits == logit_pairs::sigmoid_sum,
          .passes = {.passes = s.passes, .rule = s.pass_rule, .lambda = s.pass_lambda},
          .standardize = s.standardize,
          .steer = tensors.steer,
          .lot = {.active = s.candidates, .scope = s.candidate_scope}};
}

inline rare_router make_rare(const router_spec& s, const router_tensors& tensors) {
  rare_router made;
  const bool second = s.second_logits == logit_pairs::weigh;
  made.active = second;
  made.weight = weight_rule_of(s, tensors);
  made.score = scores_of(s).weight;
  made.router.transform = steps_of(s, tensors);
  auto& choice = made.router.router;
  choice.score = scores_of(s);
  if (!second) choice.weight = made.weight;
  choice.transform = transform_of(s);
  auto& by_class = choice.selection;
  by_class.rule.order = s.ties;
  by_class.rule.rule = {best_of(s), s.selection == selection_kind::each_group};
  if (s.class_bias) {
    by_class.of[0] = selection_bias(tensors.bias);
    by_class.of[1] = selection_bias(tensors.second_bias);
  } else {
    choice.bias = selection_bias(tensors.bias);
  }
  return made;
}

inline row_count count_of(const router_spec& s) {
  return {.rule = s.count,
          .quantile = s.quantile,
          .ratio = s.ratio,
          .low = s.entropy_low,
          .high = s.entropy_high,
          .mid_k = s.mid_k,
          .min_k = s.min_k,
          .max_k = s.max_k};
}

}  // namespace detail

/// The router of a spec with rare words (router_spec::has_rare_words()).
///
/// Throws: as make_router().
inline any_rare_router make_rare_router(const router_spec& s, const router_tensors& tensors = {}) {
  check(s);
  detail::check_maker("make_rare_router", s, s.sees_batch() || !s.has_rare_words());
  detail::check_tensors(s, tensors);
  const weight_rule weight = detail::weight_rule_of(s, tensors);
  if (s.explore != 0.0f) {
    const router<any_score> chosen{any_score(s.score, s.domain), detail::best_of(s), weight,
                                   selection_bias(tensors.bias), detail::transform_of(s)};
    return {s, explore<router<any_score>>{chosen, s.explore,
                                          s.explore_scope == row_scope::batch
                                              ? exploration_scope::batch
                                              : exploration_scope::token}};
  }
  if (s.selection == selection_kind::product_keys)
    return {s, product_keys<softmax>{.choices = s.k, .first_keys = s.first_keys, .weight = weight}};
  if (s.selection != selection_kind::counted) return {s, detail::make_rare(s, tensors)};
  const logit_transform transform = detail::transform_of(s);
  if (s.count == count_rule::tsallis)
    return {s, dense_if{{s.top_p, s.crossing, s.min_k, s.max_k, weight, transform},
                        s.tsallis_q,
                        s.dense_above}};
  return {s, detail::rare_counted{detail::steps_of(s, tensors),
                                  {detail::count_of(s), detail::scores_of(s), weight, transform}}};
}

}  // namespace moeroute

// A router as data: the fields that real model configurations have, checked and printed.
#pragma once

#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <string_view>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/policy/parts/capacity.hpp>
#include <moeroute/policy/parts/kinds.hpp>

namespace moeroute {

enum class selection_kind {
  top_k,
  top_p,
  threshold,
  expert_table,
  product_keys,
  sparsemixer,
  top2,  ///< first by probability, second by logit without the first (GShard, NLLB)
  random,
};

/// Where a scale or a weight acts.
enum class weight_place {
  output,  ///< the expert's output
  input,   ///< the expert's input (Llama 4)
};
enum class scale_place {
  weights,
  output,  ///< the routed sum: weights are left alone, multiply the combined row by `scale`
};

/// A router described at run time. Defaults are the plain softmax top-k; names and meanings are
/// those of docs/models.md.
struct router_spec {
  index_t experts = 8;  ///< E, zero experts included
  index_t k = 2;
  score_kind score = score_kind::softmax;
  score_domain domain = score_domain::all;
  selection_kind selection = selection_kind::top_k;
  bool selection_bias = false;  ///< a float per expert is added to the scores for the choice
  index_t groups = 1;
  index_t topk_group = 1;
  moeroute::group_score group_score = moeroute::group_score::top2_sum;
  float group_fill = -std::numeric_limits<float>::infinity();
  moeroute::lost_weight lost_weight = moeroute::lost_weight::as_published;
  normalization normalize = normalization::none;
  float lp_p = 1.0f;
  eps_mode eps_where = eps_mode::none;
  float eps = 0.0f;
  float scale = 1.0f;
  scale_place scale_where = scale_place::weights;
  bool divide_by_k = false;       ///< weights / k after everything else
  float output_scale = 1.0f;      ///< of the routed sum
  bool per_expert_scale = false;  ///< a learned factor per expert, after normalising
  bool gate_bias = false;         ///< the gate has a bias; it is part of the logits
  float softcap = 0.0f;
  float temperature = 1.0f;
  float jitter = 0.01f;  ///< sparsemixer: half its threshold
  float top_p = 0.0f;
  moeroute::crossing crossing = moeroute::crossing::include;
  index_t min_k = 1;
  index_t max_k = 0;
  float threshold = 0.0f;
  threshold_norm row_norm = threshold_norm::none;
  index_t zero_experts = 0;    ///< identity experts, the last ids
  index_t shared_experts = 0;  ///< always on, outside the routing
  weight_place weight_on = weight_place::output;
  index_t capacity = 0;  ///< tokens per expert, 0: no limit
  moeroute::drop_order drop_order = moeroute::drop_order::choice_major;
  bool normalize_before_drop = true;  ///< false: over the choices that were kept

  bool operator==(const router_spec&) const = default;

  /// Columns of the logits: E, or 2 sqrt(E) for product keys.
  index_t columns() const {
    if (selection != selection_kind::product_keys) return experts;
    index_t n = 1;
    while (n * n < experts) ++n;
    return 2 * n;
  }

  /// Factor that the combined row must be multiplied by.
  float routed_scale() const {
    return output_scale * (scale_where == scale_place::output ? scale : 1.0f);
  }
};

constexpr std::string_view to_string(score_kind s) {
  switch (s) {
    case score_kind::softmax: return "softmax";
    case score_kind::sigmoid: return "sigmoid";
    case score_kind::sqrt_softplus: return "sqrtsoftplus";
    case score_kind::relu: return "relu";
    case score_kind::identity: return "identity";
    case score_kind::uniform: return "uniform";
  }
  return "?";
}

constexpr std::string_view to_string(selection_kind s) {
  switch (s) {
    case selection_kind::top_k: return "top_k";
    case selection_kind::top_p: return "top_p";
    case selection_kind::threshold: return "threshold";
    case selection_kind::expert_table: return "hash_table";
    case selection_kind::product_keys: return "product_keys";
    case selection_kind::sparsemixer: return "sparsemixer";
    case selection_kind::top2: return "top2_second_by_logit";
    case selection_kind::random: return "random";
  }
  return "?";
}

constexpr std::string_view to_string(drop_order o) {
  switch (o) {
    case drop_order::choice_major: return "position_slot_major";
    case drop_order::token_major: return "token_major";
    case drop_order::by_weight: return "by_weight";
    case drop_order::batch_priority: return "batch_priority_slot_major";
    case drop_order::random: return "random";
  }
  return "?";
}

namespace detail {

inline std::string number(float x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", static_cast<double>(x));
  return text;
}

// A field as messages show it, put into words only when one is written.
struct shown_field {
  const char* name;
  std::string_view word{};
  double number = 0.0;
  bool numeric = false;

  shown_field(const char* n) : name(n) {}
  shown_field(const char* n, std::string_view w) : name(n), word(w) {}
  shown_field(const char* n, float x) : name(n), number(static_cast<double>(x)), numeric(true) {}
  shown_field(const char* n, index_t x) : name(n), number(static_cast<double>(x)), numeric(true) {}

  std::string text() const {
    return name + (numeric ? detail::number(static_cast<float>(number)) : std::string(word));
  }
};

[[noreturn]] MOEROUTE_COLD inline void clash(const shown_field& a, const shown_field& b,
                                             const char* why) {
  fail("router_spec", a.text() + " clashes with " + b.text() + ": " + why);
}

[[noreturn]] MOEROUTE_COLD inline void fail_field(const char* name, float value,
                                                  const char* expected) {
  fail_value("router_spec", name, number(value), expected);
}

}  // namespace detail

/// One line that names every field that differs from the plain softmax top-k.
inline std::string to_string(const router_spec& s) {
  const router_spec plain;
  std::string out = "E=" + std::to_string(s.experts) + " k=" + std::to_string(s.k) +
                    " score=" + std::string(to_string(s.score));
  const auto add = [&](const std::string& text) { out += " " + text; };
  if (s.domain == score_domain::selected) add("score_domain=selected");
  if (s.selection != plain.selection) add("selection=" + std::string(to_string(s.selection)));
  if (s.selection_bias) add("bias=selection");
  if (s.groups != 1) {
    add("groups=" + std::to_string(s.groups) + " topk_group=" + std::to_string(s.topk_group));
    add(s.group_score == group_score::max        ? "group_score=max"
        : s.group_score == group_score::top2_sum ? "group_score=top2_sum"
                                                 : "group_score=top_sum");
    add("group_fill=" + detail::number(s.group_fill));
    if (s.lost_weight != plain.lost_weight)
      add(s.lost_weight == lost_weight::zero ? "lost_weight=zero" : "lost_weight=own");
  }
  if (s.normalize == normalization::sum) add("normalize=sum");
  if (s.normalize == normalization::lp) add("normalize=lp lp_p=" + detail::number(s.lp_p));
  if (s.eps_where != eps_mode::none)
    add("eps=" + detail::number(s.eps) +
        (s.eps_where == eps_mode::add ? " eps_mode=add" : " eps_mode=clamp"));
  if (s.scale != 1.0f)
    add("scale=" + detail::number(s.scale) +
        (s.scale_where == scale_place::output ? " scale_where=output" : ""));
  if (s.divide_by_k) add("post_divide_by_k");
  if (s.output_scale != 1.0f) add("output_scale=" + detail::number(s.output_scale));
  if (s.per_expert_scale) add("per_expert_scale");
  if (s.gate_bias) add("gate_bias");
  if (s.softcap != 0.0f) add("logit_softcap=" + detail::number(s.softcap));
  if (s.temperature != 1.0f) add("temperature=" + detail::number(s.temperature));
  if (s.selection == selection_kind::sparsemixer) add("jitter_eps=" + detail::number(s.jitter));
  if (s.selection == selection_kind::top_p) {
    add("p=" + detail::number(s.top_p));
    if (s.crossing != plain.crossing)
      add(s.crossing == crossing::exclude ? "crossing=exclude" : "crossing=include_strict");
    if (s.min_k != 1) add("min_k=" + std::to_string(s.min_k));
    if (s.max_k != 0) add("max_k=" + std::to_string(s.max_k));
  }
  if (s.selection == selection_kind::threshold) {
    add("threshold=" + detail::number(s.threshold));
    if (s.row_norm != threshold_norm::none)
      add(s.row_norm == threshold_norm::sum ? "row_norm=sum" : "row_norm=rms");
  }
  if (s.zero_experts != 0) add("zero_experts=" + std::to_string(s.zero_experts));
  if (s.shared_experts != 0) add("shared_experts=" + std::to_string(s.shared_experts));
  if (s.weight_on == weight_place::input) add("weight_on=input");
  if (s.capacity != 0)
    add("capacity=" + std::to_string(s.capacity) +
        " drop_order=" + std::string(to_string(s.drop_order)) +
        (s.normalize_before_drop ? "" : " norm_before_drop=false"));
  return out;
}

/// Throws: error that names the field and both values, or the two fields that clash.
MOEROUTE_COLD inline void check(const router_spec& s) {
  using detail::clash;
  check_range("router_spec", "experts", s.experts, 1, max_experts);
  check_range("router_spec", "k", s.k, 1, s.experts);
  const detail::shown_field selection("selection=", to_string(s.selection));
  const detail::shown_field score("score=", to_string(s.score));
  const bool ranked = s.selection == selection_kind::top_k;
  if (s.groups != 1 && !ranked) clash({"groups=", s.groups}, selection, "only top_k limits groups");
  if (ranked) detail::check_top_k(s.experts, s.k, s.groups, s.topk_group, s.group_fill);
  if (s.selection_bias && !ranked)
    clash("bias=selection", selection, "only top_k adds a selection bias");
  // The softmax over the selected experts is chosen on logits (+ bias, by groups); other scores
  // look at one logit and are the same in both domains, but for the choice that a bias or a group
  // moves.
  if (s.domain == score_domain::selected && s.score != score_kind::softmax) {
    if (s.selection_bias)
      clash("bias=selection", "score_domain=selected",
            "a bias on scores needs the scores of all experts");
    if (s.groups != 1)
      clash({"groups=", s.groups}, "score_domain=selected",
            "group limits need the scores of all experts");
  }
  if (s.normalize != normalization::lp && s.lp_p != 1.0f)
    clash({"lp_p=", s.lp_p}, "normalize", "only normalize=lp has a p");
  if (!(s.eps >= 0.0f)) detail::fail_field("eps", s.eps, ">= 0");
  if (s.selection == selection_kind::top_p) {
    if (s.score != score_kind::softmax || s.domain != score_domain::all)
      clash(selection, score, "top_p needs probabilities: softmax over all experts");
    detail::check_top_p(s.experts, s.top_p, s.min_k, s.max_k);
  } else if (s.top_p != 0.0f) {
    clash({"p=", s.top_p}, selection, "only top_p has a mass");
  }
  if (s.selection == selection_kind::threshold) {
    if (s.score != score_kind::relu && s.score != score_kind::sigmoid &&
        s.score != score_kind::identity)
      clash(selection, score, "threshold takes relu, sigmoid or identity");
    if (s.normalize != normalization::none)
      clash(selection, "normalize", "threshold routers divide by row_norm");
  } else if (s.row_norm != threshold_norm::none) {
    clash("row_norm", selection, "only threshold routers have it");
  }
  if (s.selection == selection_kind::sparsemixer) {
    check_size("router_spec", "k of sparsemixer", s.k, 2);
    if (s.normalize != normalization::none || s.scale != 1.0f)
      clash(selection, "normalize or scale", "its two weights come from two softmaxes");
  }
  if (s.selection == selection_kind::top2) {
    check_size("router_spec", "k of top2_second_by_logit", s.k, 2);
    if (s.score != score_kind::softmax || s.domain != score_domain::all)
      clash(selection, score, "top2 weighs by the softmax over all experts");
  }
  if (s.selection == selection_kind::product_keys) {
    if (s.score != score_kind::softmax || s.domain != score_domain::selected)
      clash(selection, score, "product keys weigh by the softmax over the selected sums");
    const index_t n = s.columns() / 2;
    if (n * n != s.experts)
      fail_value("router_spec", "experts", s.experts, "a square for product_keys");
  }
  if (s.score == score_kind::uniform && s.selection != selection_kind::expert_table &&
      s.selection != selection_kind::random)
    clash(score, selection, "equal scores choose nothing");
  const bool of_rows =
      ranked || s.selection == selection_kind::expert_table || s.selection == selection_kind::top_p;
  if (!of_rows && s.selection != selection_kind::threshold &&
      (s.softcap != 0.0f || s.temperature != 1.0f))
    clash("logit_softcap or temperature", selection, "it takes logits as they are");
  if (!of_rows && (s.divide_by_k || s.per_expert_scale) &&
      s.selection != selection_kind::product_keys && s.selection != selection_kind::top2)
    clash("post_divide_by_k or per_expert_scale", selection, "it has weights of its own");
  if (s.selection == selection_kind::random &&
      (s.normalize != normalization::none || s.scale != 1.0f))
    clash("normalize or scale", selection, "every choice weighs 1 / k");
  const auto finite = [](float x, const char* field) {
    if (!std::isfinite(x)) detail::fail_field(field, x, "a finite number");
  };
  finite(s.scale, "scale");
  finite(s.output_scale, "output_scale");
  finite(s.eps, "eps");
  finite(s.softcap, "logit_softcap");
  finite(s.temperature, "temperature");
  finite(s.threshold, "threshold");
  finite(s.jitter, "jitter_eps");
  if (!(s.softcap >= 0.0f)) detail::fail_field("logit_softcap", s.softcap, ">= 0");
  if (!(s.temperature > 0.0f)) detail::fail_field("temperature", s.temperature, "> 0");
  if (!(s.jitter >= 0.0f)) detail::fail_field("jitter_eps", s.jitter, ">= 0");
  check_range("router_spec", "zero_experts", s.zero_experts, 0, s.experts - 1);
  check_range("router_spec", "capacity", s.capacity, 0, std::int32_t{0x7fffffff});
  if (s.capacity == 0 && s.drop_order != drop_order::choice_major)
    clash({"drop_order=", to_string(s.drop_order)}, "capacity=0",
          "without a capacity nothing is dropped");
  if (s.capacity != 0 && !s.normalize_before_drop) {
    // The stage that drops then divides by the sum of what is left, and by nothing else.
    if (s.normalize == normalization::lp || s.eps_where == eps_mode::add)
      clash("norm_before_drop=false", "normalize=lp or eps_mode=add",
            "after dropping weights are divided by max(sum, eps)");
    if (s.scale != 1.0f || s.per_expert_scale || s.divide_by_k)
      clash("norm_before_drop=false", "scale, per_expert_scale or post_divide_by_k",
            "after dropping weights are divided by their sum, which takes a factor away");
  }
}

/// The capacity of a spec, for apply_capacity(). NLLB and V-MoE rank tokens by their largest
/// probability: set `priority` where the weights are not probabilities.
inline capacity_policy capacity_of(const router_spec& s) {
  using enum renormalization;
  if (s.capacity == 0) return {};
  const bool after = !s.normalize_before_drop && s.normalize == normalization::sum;
  return {.rule = {.formula = capacity_formula::fixed, .count = s.capacity},
          .order = s.drop_order,
          .renormalize = after ? after_drop : none,
          .eps = after && s.eps_where == eps_mode::clamp ? s.eps : 0.0f};
}

}  // namespace moeroute

// A router as data: the fields that real model configurations have, checked and printed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <iterator>
#include <limits>
#include <string>
#include <string_view>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/policy/parts/batch_kinds.hpp>
#include <moeroute/policy/parts/capacity.hpp>
#include <moeroute/policy/parts/gate_spec.hpp>
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
  each_group,  ///< k / groups of each group
  counted,     ///< as many of the best as `count` says
  // Rules that see the whole batch.
  expert_choice,
  sinkhorn,
  selective_sinkhorn,
  sinkhorn_expert_choice,
  base,
  sparse_transport,
  sparse_transport_tokens,
  soft,  ///< no choice: layer/soft_moe.hpp
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
/// Example:
///
///     const router_spec s{.experts = 64, .k = 6, .normalize = normalization::sum, .scale = 2.5f};
///     const auto r = make_router(s);
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
  gate_spec gate{};               ///< what makes the logits
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

  // Of the choice. What is rare shares one router, made of parts that are picked at run time.
  tie_order ties = tie_order::lower_id;
  bool class_bias = false;    ///< a second selection bias, for tokens of side_inputs::modality 1
  bool weight_apart = false;  ///< another score weighs than the one that chooses
  score_kind weight_score = score_kind::softmax;  ///< with weight_apart
  score_domain weight_domain = score_domain::all;
  second_expert second = second_expert::best;  ///< of top2
  moeroute::table_key table_key = moeroute::table_key::token;
  index_t first_keys = 0;  ///< of product keys: n of n x m; 0: the square root of E

  // Of the logits, in this order, before temperature and soft-cap.
  logit_pairs second_logits = logit_pairs::none;
  index_t passes = 1;  ///< of logits, whose mean and deviation are taken
  moeroute::pass_rule pass_rule = moeroute::pass_rule::bound;
  float pass_lambda = 1.0f;
  float standardize = 0.0f;  ///< lambda (z - mean) / deviation; 0: off
  bool steering = false;     ///< experts promoted and suppressed
  index_t candidates = 0;    ///< experts that can be chosen, by lot; 0: all
  row_scope candidate_scope = row_scope::token;
  noise_kind noise = noise_kind::none;
  float noise_sigma = 1.0f;
  float noise_floor = 0.01f;

  float explore = 0.0f;  ///< experts drawn instead of chosen, now and then: how often
  row_scope explore_scope = row_scope::token;

  // Of selection=counted; min_k and max_k bound it.
  count_rule count = count_rule::ratio;
  row_scope count_scope = row_scope::token;  ///< of percentile
  float quantile = 0.5f;
  float ratio = 0.5f;
  float entropy_low = 0.5f;
  float entropy_high = 1.5f;
  index_t mid_k = 2;
  float tsallis_q = 1.1f;
  float dense_above = 0.9f;  ///< the normalised entropy from which on every expert is taken

  // Of rules that see the whole batch.
  tokens_per_expert take{};  ///< tokens that an expert chooses
  index_t sequence = 0;      ///< tokens that compete with one another; 0: all
  routing_phase phase = routing_phase::training;
  moeroute::plan_weights plan_weights = moeroute::plan_weights::by_k;
  sinkhorn_scaling plan{};
  bool shares = false;        ///< experts have unequal shares of the load
  float probability = 1e-3f;  ///< of a balanced step
  assignment_solver solver = assignment_solver::auction;
  index_t rounds = 2000;  ///< of the auction
  index_t support = 0;    ///< most tokens per expert in a sparse plan; 0: as many as it takes
  float plan_gamma = 1.0f;
  float plan_rate = 1e-2f;

  // Of a soft mixture.
  index_t slots_per_expert = 1;
  soft_logits slot_logits = soft_logits::normalized;

  bool operator==(const router_spec&) const = default;

  /// Columns of the logits: E; n + m for product keys; more where several logits become one.
  index_t columns() const {
    if (selection == selection_kind::soft) return experts * slots_per_expert;
    if (selection != selection_kind::product_keys)
      return experts * (second_logits != logit_pairs::none ? 2 : passes);
    if (first_keys > 0) return first_keys + experts / first_keys;
    index_t n = 1;
    while (n * n < experts) ++n;
    return 2 * n;
  }

  /// Whether the rule sees the whole batch: make_batch_router() makes it, others make_router().
  bool sees_batch() const {
    return (selection >= selection_kind::expert_choice && selection < selection_kind::soft) ||
           (selection == selection_kind::counted && count == count_rule::percentile &&
            count_scope == row_scope::batch);
  }

  /// Whether it has words that the common routers do not know: make_rare_router() makes it.
  bool has_rare_words() const { return explore != 0.0f || has_rare_rule(); }

  /// The same without exploration, which goes with a common choice alone.
  bool has_rare_rule() const {
    const bool counts = selection == selection_kind::counted && !sees_batch();
    return counts || selection == selection_kind::each_group || ties != tie_order::lower_id ||
           class_bias || weight_apart || second_logits != logit_pairs::none || passes != 1 ||
           standardize != 0.0f || steering || candidates != 0 ||
           (domain == score_domain::selected && score != score_kind::softmax &&
            (selection_bias || groups != 1)) ||
           (domain == score_domain::all && selection == selection_kind::product_keys);
  }

  /// Factor that the combined row must be multiplied by.
  float routed_scale() const {
    return output_scale * (scale_where == scale_place::output ? scale : 1.0f);
  }
};

namespace detail {

// The words of an enumeration, in its order.
template <class E>
struct enum_words;
template <>
struct enum_words<score_kind> {
  static constexpr std::string_view list[] = {"softmax",  "sigmoid", "sqrtsoftplus", "relu",
                                              "identity", "uniform", "softplus"};
};
template <>
struct enum_words<score_domain> {
  static constexpr std::string_view list[] = {"all", "selected"};
};
template <>
struct enum_words<selection_kind> {
  static constexpr std::string_view list[] = {"top_k",
                                              "top_p",
                                              "threshold",
                                              "hash_table",
                                              "product_keys",
                                              "sparsemixer",
                                              "top2_second_by_logit",
                                              "random",
                                              "each_group",
                                              "counted",
                                              "expert_choice",
                                              "sinkhorn",
                                              "selective_sinkhorn",
                                              "sinkhorn_expert_choice",
                                              "base",
                                              "sparse_transport",
                                              "sparse_transport_tokens",
                                              "soft"};
};
template <>
struct enum_words<gate_kind> {
  static constexpr std::string_view list[] = {"linear", "cosine",   "low_rank_cosine", "rms",
                                              "mlp",    "codebook", "mixing",          "none"};
};
template <>
struct enum_words<gate_activation> {
  static constexpr std::string_view list[] = {"relu", "tanh", "silu"};
};
template <>
struct enum_words<group_score> {
  static constexpr std::string_view list[] = {"max", "top2_sum", "top_sum", "sum"};
};
template <>
struct enum_words<lost_weight> {
  static constexpr std::string_view list[] = {"as_published", "zero", "own"};
};
template <>
struct enum_words<normalization> {
  static constexpr std::string_view list[] = {"none", "sum", "lp"};
};
template <>
struct enum_words<eps_mode> {
  static constexpr std::string_view list[] = {"none", "add", "clamp"};
};
template <>
struct enum_words<weight_place> {
  static constexpr std::string_view list[] = {"output", "input"};
};
template <>
struct enum_words<scale_place> {
  static constexpr std::string_view list[] = {"weights", "output"};
};
template <>
struct enum_words<crossing> {
  static constexpr std::string_view list[] = {"include", "include_strict", "exclude"};
};
template <>
struct enum_words<threshold_norm> {
  static constexpr std::string_view list[] = {"none", "sum", "rms"};
};
template <>
struct enum_words<drop_order> {
  static constexpr std::string_view list[] = {"position_slot_major", "token_major", "by_weight",
                                              "batch_priority_slot_major", "random"};
};
template <>
struct enum_words<tie_order> {
  static constexpr std::string_view list[] = {"lower_id", "higher_id"};
};
template <>
struct enum_words<second_expert> {
  static constexpr std::string_view list[] = {"best", "sampling", "random"};
};
template <>
struct enum_words<table_key> {
  static constexpr std::string_view list[] = {"token", "bigram"};
};
template <>
struct enum_words<logit_pairs> {
  static constexpr std::string_view list[] = {"none", "sigmoid_sum", "weigh"};
};
template <>
struct enum_words<pass_rule> {
  static constexpr std::string_view list[] = {"bound", "ratio"};
};
template <>
struct enum_words<row_scope> {
  static constexpr std::string_view list[] = {"token", "batch"};
};
template <>
struct enum_words<noise_kind> {
  static constexpr std::string_view list[] = {"none", "gaussian", "gumbel"};
};
template <>
struct enum_words<count_rule> {
  static constexpr std::string_view list[] = {"percentile", "ratio", "entropy", "tsallis"};
};
template <>
struct enum_words<capacity_rounding> {
  static constexpr std::string_view list[] = {"down", "nearest", "up"};
};
template <>
struct enum_words<routing_phase> {
  static constexpr std::string_view list[] = {"training", "evaluation"};
};
template <>
struct enum_words<plan_weights> {
  static constexpr std::string_view list[] = {"by_k", "sigmoid", "softmax", "plan"};
};
template <>
struct enum_words<plan_mass> {
  static constexpr std::string_view list[] = {"one", "tokens"};
};
template <>
struct enum_words<scaling_order> {
  static constexpr std::string_view list[] = {"rows_then_columns", "columns_then_rows"};
};
template <>
struct enum_words<sinkhorn_domain> {
  static constexpr std::string_view list[] = {"exponential", "logarithm"};
};
template <>
struct enum_words<sinkhorn_stop> {
  static constexpr std::string_view list[] = {"mean_change", "column_error"};
};
template <>
struct enum_words<plan_similarity> {
  static constexpr std::string_view list[] = {"logits", "softmax"};
};
template <>
struct enum_words<assignment_solver> {
  static constexpr std::string_view list[] = {"auction", "optimal"};
};
template <>
struct enum_words<soft_logits> {
  static constexpr std::string_view list[] = {"product", "normalized"};
};

template <class E>
concept worded = requires { enum_words<E>::list; };

}  // namespace detail

/// The word of a description for a kind of part.
template <detail::worded E>
constexpr std::string_view to_string(E e) {
  const auto at = static_cast<std::size_t>(e);
  return at < std::size(detail::enum_words<E>::list) ? detail::enum_words<E>::list[at] : "?";
}

/// A description with no word but its selection: the defaults of that rule.
constexpr router_spec plain_spec(selection_kind selection = selection_kind::top_k) {
  router_spec s;
  s.selection = selection;
  if (selection == selection_kind::selective_sinkhorn) s.plan = selective_scaling;
  if (selection == selection_kind::sparse_transport ||
      selection == selection_kind::sparse_transport_tokens)
    s.plan.most_iterations = 20;
  if (selection == selection_kind::sinkhorn_expert_choice ||
      selection == selection_kind::sparse_transport ||
      selection == selection_kind::sparse_transport_tokens)
    s.plan_weights = moeroute::plan_weights::softmax;
  return s;
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

  /// What stands after the name; a number is written to `digits`.
  std::string_view value(char (&digits)[32]) const {
    if (!numeric) return word;
    std::snprintf(digits, sizeof digits, "%.9g", static_cast<double>(static_cast<float>(number)));
    return digits;
  }
};

[[noreturn]] MOEROUTE_COLD inline void clash(const shown_field& a, const shown_field& b,
                                             const char* why) {
  char of_a[32], of_b[32];
  fail("router_spec", {a.name, a.value(of_a), " clashes with ", b.name, b.value(of_b), ": ", why});
}

[[noreturn]] MOEROUTE_COLD inline void fail_field(const char* name, float value,
                                                  const char* expected) {
  char digits[32];
  fail("router_spec",
       {name, " is ", shown_field("", value).value(digits), ", expected ", expected});
}

}  // namespace detail

namespace detail {

// Which fields mean something in a spec: the others are dropped when it is printed.
struct spec_uses {
  bool top_k, top_p, counted, by_percentile, threshold, product_keys, batch, takes, plan, phase,
      sparse, divides, k;

  constexpr explicit spec_uses(const router_spec& s) {
    using kind = selection_kind;
    top_k = s.selection == kind::top_k;
    counted = s.selection == kind::counted;
    top_p = s.selection == kind::top_p || (counted && s.count == count_rule::tsallis);
    by_percentile = counted && s.count == count_rule::percentile;
    threshold = s.selection == kind::threshold;
    product_keys = s.selection == kind::product_keys;
    batch = s.selection >= kind::expert_choice;
    sparse = s.selection == kind::sparse_transport || s.selection == kind::sparse_transport_tokens;
    takes =
        s.selection == kind::expert_choice || s.selection == kind::sinkhorn_expert_choice || sparse;
    plan = s.selection == kind::sinkhorn || s.selection == kind::selective_sinkhorn ||
           s.selection == kind::sinkhorn_expert_choice;
    phase = s.selection == kind::sinkhorn || s.selection == kind::selective_sinkhorn ||
            s.selection == kind::base;
    divides = threshold ? s.row_norm != threshold_norm::none : s.normalize != normalization::none;
    k = s.selection != kind::expert_choice && s.selection != kind::sinkhorn_expert_choice &&
        s.selection != kind::base && s.selection != kind::sparse_transport &&
        s.selection != kind::soft;
  }
};

// Every word of a description: f.number(name, field, shown), f.flag(...), f.one_of(...) and
// f.pick(name, words, which, set, shown), in the order in which they are printed.
template <class F>
constexpr void each_word(router_spec& s, F&& f) {
  using enum selection_kind;
  const spec_uses use(s);
  const router_spec plain = plain_spec(s.selection);
  constexpr std::string_view biases[] = {"none", "selection", "by_class"};
  constexpr std::string_view truth[] = {"false", "true"};
  f.number("E", s.experts, true);
  f.number("k", s.k, use.k);
  f.one_of("score", s.score, true);
  f.one_of("score_domain", s.domain, s.domain != plain.domain);
  f.one_of("selection", s.selection, s.selection != top_k);
  f.pick(
      "bias", biases, s.class_bias ? 2u : s.selection_bias,
      [&](std::size_t i) {
        s.selection_bias = i > 0;
        s.class_bias = i == 2;
      },
      s.selection_bias);
  const bool groups = s.groups != 1;
  f.number("groups", s.groups, groups);
  f.number("topk_group", s.topk_group, groups && use.top_k);
  f.one_of("group_score", s.group_score, groups && use.top_k);
  f.number("group_fill", s.group_fill, groups && use.top_k);
  f.one_of("lost_weight", s.lost_weight, groups && use.top_k && s.lost_weight != plain.lost_weight);
  f.one_of("ties", s.ties, s.ties != plain.ties);
  if (f.one_of("weight_score", s.weight_score, s.weight_apart)) s.weight_apart = true;
  f.one_of("weight_domain", s.weight_domain,
           s.weight_apart && s.weight_domain != plain.weight_domain);
  f.one_of("normalize", s.normalize, s.normalize != plain.normalize);
  f.number("lp_p", s.lp_p, s.normalize == normalization::lp);
  f.number("eps", s.eps,
           use.divides &&
               (use.threshold || s.selection == expert_choice ? s.eps != plain.eps
                                                              : s.eps_where != eps_mode::none));
  f.one_of("eps_mode", s.eps_where,
           use.divides && !use.threshold && s.selection != expert_choice &&
               s.eps_where != eps_mode::none);
  f.number("scale", s.scale, s.scale != plain.scale);
  f.one_of("scale_where", s.scale_where,
           s.scale != plain.scale && s.scale_where != plain.scale_where);
  f.flag("post_divide_by_k", s.divide_by_k);
  f.number("output_scale", s.output_scale, s.output_scale != plain.output_scale);
  f.flag("per_expert_scale", s.per_expert_scale);
  f.flag("gate_bias", s.gate_bias);
  const gate_spec gate{};
  f.one_of("gate", s.gate.kind, s.gate.kind != gate.kind);
  f.number("gate_d", s.gate.d, s.gate.d != gate.d);
  f.number("gate_width", s.gate.width, s.gate.has_width());
  f.one_of("gate_activation", s.gate.activation,
           s.gate.kind == gate_kind::mlp && s.gate.activation != gate.activation);
  f.number("gate_temperature", s.gate.temperature,
           s.gate.has_temperature() && s.gate.temperature != gate.temperature);
  const bool rms = s.gate.kind == gate_kind::rms;
  f.number("gate_scale", s.gate.scale, rms && s.gate.scale != gate.scale);
  f.number("gate_eps", s.gate.eps, rms && s.gate.eps != gate.eps);
  f.one_of("second_logits", s.second_logits, s.second_logits != plain.second_logits);
  f.number("passes", s.passes, s.passes != plain.passes);
  f.one_of("pass_rule", s.pass_rule, s.passes != 1 && s.pass_rule != plain.pass_rule);
  f.number("pass_lambda", s.pass_lambda,
           s.passes != 1 && s.pass_rule == pass_rule::bound && s.pass_lambda != plain.pass_lambda);
  f.number("standardize", s.standardize, s.standardize != plain.standardize);
  f.flag("steering", s.steering);
  f.number("candidates", s.candidates, s.candidates != plain.candidates);
  f.one_of("candidate_scope", s.candidate_scope,
           s.candidates != 0 && s.candidate_scope != plain.candidate_scope);
  f.number("logit_softcap", s.softcap, s.softcap != plain.softcap);
  f.number("temperature", s.temperature, s.temperature != plain.temperature);
  f.number("explore", s.explore, s.explore != plain.explore);
  f.one_of("explore_scope", s.explore_scope,
           s.explore != 0.0f && s.explore_scope != plain.explore_scope);
  const bool noisy = s.noise != noise_kind::none;
  f.one_of("noise", s.noise, noisy);
  f.number("noise_sigma", s.noise_sigma, noisy && s.noise_sigma != plain.noise_sigma);
  f.number("noise_floor", s.noise_floor, noisy && s.noise_floor != plain.noise_floor);
  f.number("jitter_eps", s.jitter, s.selection == sparsemixer);
  f.one_of("second", s.second, s.selection == top2 && s.second != plain.second);
  f.one_of("table_key", s.table_key, s.selection == expert_table && s.table_key != plain.table_key);
  f.number("first_keys", s.first_keys, use.product_keys && s.first_keys != plain.first_keys);
  f.one_of("count", s.count, use.counted);
  f.number("quantile", s.quantile, use.by_percentile);
  f.one_of("count_scope", s.count_scope, use.by_percentile && s.count_scope != plain.count_scope);
  f.number("ratio", s.ratio, use.counted && s.count == count_rule::ratio);
  const bool entropy = use.counted && s.count == count_rule::entropy;
  f.number("entropy_low", s.entropy_low, entropy);
  f.number("entropy_high", s.entropy_high, entropy);
  const bool tsallis = use.counted && s.count == count_rule::tsallis;
  f.number("tsallis_q", s.tsallis_q, tsallis);
  f.number("dense_above", s.dense_above, tsallis);
  f.number("p", s.top_p, use.top_p);
  f.one_of("crossing", s.crossing, use.top_p && s.crossing != plain.crossing);
  f.number("min_k", s.min_k, (use.top_p || use.counted) && s.min_k != plain.min_k);
  f.number("mid_k", s.mid_k, entropy);
  f.number("max_k", s.max_k,
           (use.top_p || use.counted || s.selection == expert_choice) && s.max_k != plain.max_k);
  f.number("threshold", s.threshold, use.threshold);
  f.one_of("row_norm", s.row_norm, use.threshold && s.row_norm != plain.row_norm);
  f.number("take_factor", s.take.factor, use.takes && s.take.fixed == 0);
  f.one_of("take_rounding", s.take.rounding,
           use.takes && s.take.fixed == 0 && s.take.rounding != plain.take.rounding);
  f.number("take_multiple", s.take.multiple_of,
           use.takes && s.take.fixed == 0 && s.take.multiple_of != plain.take.multiple_of);
  f.number("take_at_least", s.take.at_least,
           use.takes && s.take.fixed == 0 && s.take.at_least != plain.take.at_least);
  f.number("take", s.take.fixed, use.takes && s.take.fixed != plain.take.fixed);
  f.number("sequence", s.sequence, s.selection == expert_choice && s.sequence != plain.sequence);
  f.one_of("phase", s.phase, use.phase && s.phase != plain.phase);
  f.flag("shares", s.shares);
  f.number("probability", s.probability, s.selection == selective_sinkhorn);
  f.one_of("plan_weights", s.plan_weights,
           (use.sparse || (use.plan && s.selection != selective_sinkhorn)) &&
               s.plan_weights != plain.plan_weights);
  f.one_of("plan_mass", s.plan.mass, use.plan && s.plan.mass != plain.plan.mass);
  f.one_of("plan_order", s.plan.order, use.plan && s.plan.order != plain.plan.order);
  f.one_of("plan_domain", s.plan.domain, use.plan && s.plan.domain != plain.plan.domain);
  f.one_of("plan_stop", s.plan.stop, use.plan && s.plan.stop != plain.plan.stop);
  f.one_of("plan_similarity", s.plan.similarity,
           use.plan && s.plan.similarity != plain.plan.similarity);
  f.number("plan_temperature", s.plan.temperature,
           use.plan && s.plan.temperature != plain.plan.temperature);
  f.number("plan_eps", s.plan.eps, use.plan && s.plan.eps != plain.plan.eps);
  f.number("plan_tolerance", s.plan.tolerance,
           use.plan && s.plan.tolerance != plain.plan.tolerance);
  f.number("plan_iterations", s.plan.most_iterations,
           (use.plan || use.sparse) && s.plan.most_iterations != plain.plan.most_iterations);
  f.number("support", s.support, use.sparse && s.support != plain.support);
  f.number("plan_gamma", s.plan_gamma, use.sparse && s.plan_gamma != plain.plan_gamma);
  f.number("plan_rate", s.plan_rate, use.sparse && s.plan_rate != plain.plan_rate);
  f.one_of("solver", s.solver, s.selection == base && s.solver != plain.solver);
  f.number("rounds", s.rounds, s.selection == base && s.rounds != plain.rounds);
  f.number("slots_per_expert", s.slots_per_expert,
           s.selection == soft && s.slots_per_expert != plain.slots_per_expert);
  f.one_of("slot_logits", s.slot_logits, s.selection == soft && s.slot_logits != plain.slot_logits);
  f.number("zero_experts", s.zero_experts, s.zero_experts != 0);
  f.number("shared_experts", s.shared_experts, s.shared_experts != 0);
  f.one_of("weight_on", s.weight_on, s.weight_on != plain.weight_on);
  f.number("capacity", s.capacity, s.capacity != 0);
  f.one_of("drop_order", s.drop_order, s.capacity != 0);
  f.pick(
      "norm_before_drop", truth, std::size_t{s.normalize_before_drop},
      [&](std::size_t i) { s.normalize_before_drop = i == 1; },
      s.capacity != 0 && !s.normalize_before_drop);
}

// Prints the words that are shown.
struct word_printer {
  std::string out{};

  void add(std::string_view name, std::string_view value) {
    if (!out.empty()) out += ' ';
    out += name;
    if (!value.empty()) (out += '=') += value;
  }
  void number(std::string_view name, index_t x, bool shown) {
    if (shown) add(name, std::to_string(x));
  }
  void number(std::string_view name, float x, bool shown) {
    if (shown) add(name, detail::number(x));
  }
  void number(std::string_view name, double x, bool shown) {
    char text[32];
    std::snprintf(text, sizeof text, "%.17g", x);
    if (static_cast<double>(static_cast<float>(x)) == x)
      return number(name, static_cast<float>(x), shown);
    if (shown) add(name, text);
  }
  void flag(std::string_view name, bool set) {
    if (set) add(name, {});
  }
  template <class E>
  bool one_of(std::string_view name, E e, bool shown) {
    if (shown) add(name, to_string(e));
    return false;
  }
  template <std::size_t N, class Set>
  void pick(std::string_view name, const std::string_view (&words)[N], std::size_t which,
            const Set&, bool shown) {
    if (shown) add(name, words[which]);
  }
};

}  // namespace detail

/// One line that names every field that means something and differs from the default of its rule;
/// what is inert is left out.
inline std::string to_string(const router_spec& s) {
  router_spec copy = s;
  detail::word_printer printer;
  detail::each_word(copy, printer);
  return printer.out;
}

namespace detail {

// The words of one kind of rule on a rule of another kind.
MOEROUTE_COLD inline void check_words_apart(const router_spec& s, const spec_uses& use,
                                            const shown_field& selection) {
  using enum selection_kind;
  const auto only = [&](bool set, bool fits, const char* word, const char* why) {
    if (set && !fits) clash(word, selection, why);
  };
  const bool picks = use.top_k || s.selection == each_group;
  only(s.explore != 0.0f, use.top_k && !s.has_rare_rule(), "explore",
       "only a common top_k explores");
  if (!(s.explore >= 0.0f && s.explore <= 1.0f)) fail_field("explore", s.explore, "0 to 1");
  only(s.shares, s.selection == sinkhorn || s.selection == selective_sinkhorn, "shares",
       "only sinkhorn and selective_sinkhorn have shares per expert");
  const bool ranks = picks || (use.counted && s.count != count_rule::tsallis && !s.sees_batch());
  only(s.ties != tie_order::lower_id, picks, "ties=higher_id",
       "only top_k and each_group turn ties");
  only(s.weight_apart, picks || use.counted, "weight_score",
       "only top_k, each_group and counted weigh by another score");
  only(s.second_logits == logit_pairs::sigmoid_sum, ranks, "second_logits=sigmoid_sum",
       "only top_k, each_group and counted take two logits per expert");
  only(s.second_logits == logit_pairs::weigh, picks, "second_logits=weigh",
       "only top_k and each_group take two logits per expert");
  only(s.passes != 1, ranks, "passes", "only top_k, each_group and counted take logits of passes");
  only(s.standardize != 0.0f, ranks, "standardize",
       "only top_k, each_group and counted have steps before them");
  only(s.steering, ranks, "steering", "only top_k, each_group and counted have steps before them");
  only(s.candidates != 0, ranks, "candidates",
       "only top_k, each_group and counted have steps before them");
  if (s.second_logits == logit_pairs::sigmoid_sum && s.score != score_kind::identity)
    clash("second_logits=sigmoid_sum", {"score=", to_string(s.score)},
          "the sum is the score: score=identity");
  if (!std::isfinite(s.pass_lambda)) fail_field("pass_lambda", s.pass_lambda, "a finite number");
  if (!(s.standardize >= 0.0f) || !std::isfinite(s.standardize))
    fail_field("standardize", s.standardize, ">= 0");
  check_range("router_spec", "passes", s.passes, 1, index_t{1} << 16);
  if (s.candidates != 0)
    check_range("router_spec", "candidates", s.candidates, use.counted ? 1 : s.k, s.experts);
  if (s.second_logits != logit_pairs::none && s.passes != 1)
    clash({"second_logits=", to_string(s.second_logits)}, {"passes=", s.passes},
          "columns are read one way");
}

MOEROUTE_COLD inline void check_gate(const router_spec& s, const shown_field& selection) {
  const shown_field gate("gate=", to_string(s.gate.kind));
  if (s.selection == selection_kind::soft) {
    if (s.gate != gate_spec{}) clash(gate, selection, "its slots are its gate");
    return;
  }
  check_range("router_spec", "gate_d", s.gate.d, 0, index_t{1} << 31);
  if (s.gate.has_width())
    check_range("router_spec", "gate_width", s.gate.width,
                s.gate.kind == gate_kind::codebook ? s.columns() : 1, index_t{1} << 31);
  if (!(s.gate.temperature > 0.0f) || !std::isfinite(s.gate.temperature))
    fail_field("gate_temperature", s.gate.temperature, "> 0");
  if (!std::isfinite(s.gate.scale)) fail_field("gate_scale", s.gate.scale, "a finite number");
  if (!(s.gate.eps >= 0.0f) || !std::isfinite(s.gate.eps))
    fail_field("gate_eps", s.gate.eps, ">= 0");
  if (s.gate_bias && !s.gate.has_bias()) clash("gate_bias", gate, "it has none");
  if (s.gate.kind == gate_kind::mixing && s.score != score_kind::identity)
    clash(gate, {"score=", to_string(s.score)}, "its columns are probabilities: score=identity");
}

MOEROUTE_COLD inline void check_batch_words(const router_spec& s, const spec_uses& use,
                                            const shown_field& selection) {
  using enum selection_kind;
  using moeroute::plan_weights;
  if (use.takes) s.take.check();
  if (use.plan) s.plan.check("router_spec");
  const shown_field score("score=", to_string(s.score));
  if (s.domain != score_domain::all)
    clash("score_domain=selected", selection, "it scores every expert");
  if (s.selection == expert_choice) {
    if (s.normalize == normalization::lp || s.eps_where == eps_mode::clamp)
      clash("normalize=lp or eps_mode=clamp", selection,
            "a token's weights are divided by sum + eps");
    check_range("router_spec", "sequence", s.sequence, 0, index_t{1} << 31);
    check_range("router_spec", "max_k", s.max_k, 0, s.experts);
  } else if (!use.counted) {
    if (s.score != score_kind::softmax) clash(score, selection, "its scores are its own");
    if (s.normalize != normalization::none)
      clash("normalize", selection, "its weights are its own");
    if (s.selection != soft && s.scale != 1.0f && s.scale_where == scale_place::weights)
      clash({"scale=", s.scale}, selection, "its weights are its own: scale_where=output");
  }
  if (s.noise != noise_kind::none && s.selection != selective_sinkhorn)
    clash({"noise=", to_string(s.noise)}, selection, "it takes logits as they are");
  if (s.per_expert_scale || s.divide_by_k)
    clash("per_expert_scale or post_divide_by_k", selection, "its weights are its own");
  if (s.softcap != 0.0f || s.temperature != 1.0f)
    clash("logit_softcap or temperature", selection, "it takes logits as they are");
  if (s.selection == sinkhorn && s.phase == routing_phase::evaluation &&
      s.plan_weights == plan_weights::plan)
    clash("plan_weights=plan", "phase=evaluation", "evaluation has no plan");
  if ((s.selection == sinkhorn_expert_choice || use.sparse) &&
      s.plan_weights != plan_weights::softmax && s.plan_weights != plan_weights::plan)
    clash({"plan_weights=", to_string(s.plan_weights)}, selection, "it weighs by softmax or plan");
  if (!(s.probability >= 0.0f && s.probability <= 1.0f))
    fail_field("probability", s.probability, "0 to 1");
  if (use.sparse) {
    check_range("router_spec", "support", s.support, 0, index_t{1} << 30);
    check_range("router_spec", "plan_iterations", s.plan.most_iterations, 0, index_t{1} << 30);
    if (!(s.plan_gamma > 0.0f) || !std::isfinite(s.plan_gamma))
      fail_field("plan_gamma", s.plan_gamma, "> 0");
    if (!(s.plan_rate > 0.0f) || !std::isfinite(s.plan_rate))
      fail_field("plan_rate", s.plan_rate, "> 0");
  }
  check_range("router_spec", "rounds", s.rounds, 1, index_t{1} << 30);
  check_range("router_spec", "slots_per_expert", s.slots_per_expert, 1, max_experts);
}

MOEROUTE_COLD inline void check_count(const router_spec& s) {
  check_counts("router_spec", s.experts, s.min_k, s.max_k);
  if (s.count == count_rule::tsallis) {
    if (s.score != score_kind::softmax || s.domain != score_domain::all || s.weight_apart)
      clash("count=tsallis", {"score=", to_string(s.score)},
            "it needs probabilities: softmax over all experts");
    check_top_p(s.experts, s.top_p, s.min_k, s.max_k);
    check_dense_if(s.tsallis_q, s.dense_above);
  }
  if (s.count == count_rule::entropy)
    check_entropy_counts(s.entropy_low, s.entropy_high, s.min_k, s.mid_k, s.max_k);
  if (!(s.quantile >= 0.0f && s.quantile <= 1.0f)) fail_field("quantile", s.quantile, "0 to 1");
  if (!(s.ratio >= 0.0f && s.ratio <= 1.0f)) fail_field("ratio", s.ratio, "0 to 1");
  if (s.count_scope == row_scope::batch && s.count != count_rule::percentile)
    clash("count_scope=batch", {"count=", to_string(s.count)},
          "only a percentile is taken among all tokens");
}

// What there is to check of a spec without rare words and batch rules.
MOEROUTE_COLD inline void check_common(const router_spec& s) {
  check_range("router_spec", "experts", s.experts, 1, max_experts);
  const detail::spec_uses use(s);
  if (use.k) check_range("router_spec", "k", s.k, 1, s.experts);
  const detail::shown_field selection("selection=", to_string(s.selection));
  const detail::shown_field score("score=", to_string(s.score));
  const bool ranked = s.selection == selection_kind::top_k;
  const bool each = s.selection == selection_kind::each_group;
  if (s.groups != 1 && !ranked && !each)
    clash({"groups=", s.groups}, selection, "only top_k and each_group know groups");
  if (each) detail::check_top_of_each_group(s.experts, s.k, s.groups);
  if (ranked) detail::check_top_k(s.experts, s.k, s.groups, s.topk_group, s.group_fill);
  if (s.selection_bias && !ranked && !each)
    clash("bias=selection", selection, "only top_k and each_group add a selection bias");
  if (s.class_bias && !s.selection_bias)
    clash("bias=by_class", "bias=none", "the second bias stands beside the first");
  if (s.normalize != normalization::lp && s.lp_p != 1.0f)
    clash({"lp_p=", s.lp_p}, "normalize", "only normalize=lp has a p");
  if (!(s.eps >= 0.0f)) detail::fail_field("eps", s.eps, ">= 0");
  if (s.selection == selection_kind::top_p) {
    if (s.score != score_kind::softmax || s.domain != score_domain::all)
      clash(selection, score, "top_p needs probabilities: softmax over all experts");
    detail::check_top_p(s.experts, s.top_p, s.min_k, s.max_k);
  } else if (s.top_p != 0.0f && !use.top_p) {
    clash({"p=", s.top_p}, selection, "only top_p and count=tsallis have a mass");
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
    if (s.score != score_kind::softmax)
      clash(selection, score, "product keys weigh by a softmax of the sums");
    if (s.first_keys != 0) {
      check_range("router_spec", "first_keys", s.first_keys, 1, s.experts);
      if (s.experts % s.first_keys != 0)
        fail_value("router_spec", "experts", s.experts,
                   "a multiple of first_keys = ", s.first_keys);
    } else if (const index_t n = s.columns() / 2; n * n != s.experts) {
      fail_value("router_spec", "experts", s.experts, "a square for product_keys");
    }
  }
  if (s.score == score_kind::uniform && s.selection != selection_kind::expert_table &&
      s.selection != selection_kind::random)
    clash(score, selection, "equal scores choose nothing");
  const bool of_rows = ranked || each || use.counted || use.top_p || use.batch ||
                       s.selection == selection_kind::expert_table;
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
  finite(s.noise_sigma, "noise_sigma");
  finite(s.noise_floor, "noise_floor");
  if (!(s.noise_sigma >= 0.0f)) detail::fail_field("noise_sigma", s.noise_sigma, ">= 0");
  if (!(s.noise_floor >= 0.0f)) detail::fail_field("noise_floor", s.noise_floor, ">= 0");
  if (s.noise != noise_kind::none && !of_rows && s.selection != selection_kind::threshold)
    clash({"noise=", to_string(s.noise)}, selection, "it takes logits as they are");
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

}  // namespace detail

/// Throws: error that names the field and both values, or the two fields that clash.
MOEROUTE_COLD inline void check(const router_spec& s) {
  detail::check_common(s);
  const detail::spec_uses use(s);
  const detail::shown_field selection("selection=", to_string(s.selection));
  detail::check_words_apart(s, use, selection);
  detail::check_gate(s, selection);
  if (use.batch || s.sees_batch()) detail::check_batch_words(s, use, selection);
  if (use.counted) detail::check_count(s);
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

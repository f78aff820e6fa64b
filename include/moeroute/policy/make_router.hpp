// From a description to the kernels that carry it out, picked once.
#pragma once

#include <span>
#include <utility>
#include <variant>

#include <moeroute/base/lasting_span.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/policy/router_spec.hpp>
#include <moeroute/policy/row/product_keys.hpp>
#include <moeroute/policy/row/random_choice.hpp>
#include <moeroute/policy/row/sparsemixer.hpp>
#include <moeroute/policy/row/table.hpp>
#include <moeroute/policy/row/threshold.hpp>
#include <moeroute/policy/row/top_p.hpp>

namespace moeroute {

/// What a described router needs beside its fields. The caller keeps it alive.
struct router_tensors {
  lasting_span<const float> bias{};              ///< [E], where selection_bias
  lasting_span<const float> per_expert_scale{};  ///< [E], where per_expert_scale
  lasting_span<const float> gamma{};             ///< [E], row_norm rms; may be left out
  const expert_table* table = nullptr;           ///< where selection is expert_table
};

/// One of the routers that a router_spec can describe. route() takes it like any other.
///
/// Cost: the kind is looked up once per call of route(), not per token.
class any_router {
  // Comparisons and no table of functions: f is inlined, and what it captures stays in registers.
  template <std::size_t i, class F>
  MOEROUTE_INLINE decltype(auto) visit_from(F&& f) const {
    if constexpr (i + 1 == std::variant_size_v<kinds>) {
      return f(*std::get_if<i>(&kind_));
    } else {
      if (kind_.index() == i) return f(*std::get_if<i>(&kind_));
      return this->template visit_from<i + 1>(std::forward<F>(f));
    }
  }

 public:
  using kinds = std::variant<
      router<softmax>, router<softmax_selected>, router<sigmoid>, router<sqrt_softplus>,
      router<relu>, router<identity_score>, table_router<softmax>, table_router<softmax_selected>,
      table_router<sigmoid>, table_router<sqrt_softplus>, table_router<uniform_score>, top_p,
      threshold_router<relu>, threshold_router<sigmoid>, threshold_router<identity_score>,
      product_keys<softmax_selected>, sparsemixer, gshard_top2, random_choice>;

  any_router(router_spec spec, kinds kind) : spec_(spec), kind_(std::move(kind)) {}

  const router_spec& spec() const { return spec_; }
  /// Columns of the logits that it takes.
  index_t columns() const { return spec_.columns(); }

  /// f(the router), whatever its type.
  template <class F>
  decltype(auto) visit(F&& f) const {
    return this->template visit_from<0>(std::forward<F>(f));
  }

  /// What it reads of the side inputs.
  side_use reads_side(index_t columns) const {
    return visit([&](const auto& kind) { return side_use_of(kind, columns); });
  }

 private:
  router_spec spec_;
  kinds kind_;
};

/// The router that a spec describes.
///
/// Throws: error where the spec contradicts itself, or a tensor that it needs is missing or has
/// another length than E. The spec's capacity is applied by the stage of that name, not by the
/// router.
inline any_router make_router(const router_spec& s, const router_tensors& tensors = {}) {
  check(s);
  const auto needed = [&](std::span<const float> list, bool wanted, const std::string& name) {
    const index_t expected = wanted ? s.experts : 0;
    check_size("make_router", (name + ".size()").c_str(), static_cast<index_t>(list.size()),
               expected);
    for (std::size_t i = 0; i < list.size(); ++i)
      if (std::isnan(list[i]))
        fail("make_router", name + ": value " + std::to_string(i) + " is NaN, expected a number");
  };
  needed(tensors.bias, s.selection_bias, "bias");
  needed(tensors.per_expert_scale, s.per_expert_scale, "per_expert_scale");
  if (!tensors.gamma.empty())
    check_size("make_router", "gamma.size()", static_cast<index_t>(tensors.gamma.size()),
               s.experts);

  weight_rule weight{.normalize = s.normalize,
                     .p = s.lp_p,
                     .eps_where = s.eps_where,
                     .eps = s.eps,
                     .divide = s.divide_by_k ? static_cast<float>(s.k) : 1.0f,
                     .scale = s.scale_where == scale_place::weights ? s.scale : 1.0f,
                     .expert_scale = tensors.per_expert_scale};
  // What is normalised after dropping is normalised by the capacity stage.
  if (s.capacity != 0 && !s.normalize_before_drop) weight = raw_weights;
  const logit_transform transform{.temperature = s.temperature, .softcap = s.softcap};
  const bool selected = s.domain == score_domain::selected;

  switch (s.selection) {
    case selection_kind::top_k: {
      const top_k rule{s.k, s.groups, s.topk_group, s.group_score, s.group_fill, s.lost_weight};
      const auto with = [&](auto score) {
        return any_router(s, router(score, rule, weight, selection_bias(tensors.bias), transform));
      };
      switch (s.score) {
        case score_kind::softmax: return selected ? with(softmax_selected{}) : with(softmax{});
        case score_kind::sigmoid: return with(sigmoid{});
        case score_kind::sqrt_softplus: return with(sqrt_softplus{});
        case score_kind::relu: return with(relu{});
        default: return with(identity_score{});
      }
    }
    case selection_kind::expert_table: {
      if (tensors.table == nullptr)
        fail("make_router", "table is missing, expected one of k ids per token");
      check_size("make_router", "table k", tensors.table->k(), s.k);
      check_size("make_router", "table experts", tensors.table->experts(), s.experts);
      const auto with = [&]<class Score>(Score score) {
        return any_router(s, table_router<Score>{tensors.table, score, weight, transform});
      };
      switch (s.score) {
        case score_kind::softmax: return selected ? with(softmax_selected{}) : with(softmax{});
        case score_kind::sigmoid: return with(sigmoid{});
        case score_kind::sqrt_softplus: return with(sqrt_softplus{});
        case score_kind::uniform: return with(uniform_score{});
        default:
          detail::clash("selection=hash_table", "score=" + std::string(to_string(s.score)),
                        "tables are weighted by softmax, sigmoid, sqrtsoftplus or uniform");
      }
    }
    case selection_kind::top_p:
      return {s, top_p{s.top_p, s.crossing, s.min_k, s.max_k, weight, transform}};
    case selection_kind::threshold: {
      const auto with = [&]<class Score>(Score score) {
        return any_router(s, threshold_router<Score>{.threshold = s.threshold,
                                                     .score = score,
                                                     .norm = s.row_norm,
                                                     .eps = s.eps,
                                                     .scale = weight.scale,
                                                     .gamma = tensors.gamma,
                                                     .transform = transform});
      };
      if (s.score == score_kind::relu) return with(relu{});
      if (s.score == score_kind::sigmoid) return with(sigmoid{});
      return with(identity_score{});
    }
    case selection_kind::product_keys: return {s, product_keys<>{.choices = s.k, .weight = weight}};
    case selection_kind::sparsemixer: return {s, sparsemixer{s.jitter}};
    case selection_kind::top2:
      return {s, gshard_top2{.policy = second_expert::best, .weight = weight}};
    case selection_kind::random: break;
  }
  return {s, random_choice{s.k}};
}

}  // namespace moeroute

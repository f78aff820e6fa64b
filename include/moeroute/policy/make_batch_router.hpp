// From a description to a router that sees the whole batch.
#pragma once

#include <cstddef>
#include <string>
#include <utility>
#include <variant>

#include <moeroute/policy/batch/base_assignment.hpp>
#include <moeroute/policy/batch/batch_percentile.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/policy/batch/sparse_transport.hpp>
#include <moeroute/policy/make_rare_router.hpp>

namespace moeroute {

/// One of the batch rules that a router_spec can describe. route() takes it like any other.
///
/// A type of its own, not a kind of any_router: a program that picks among token routers would
/// carry Sinkhorn's and the auction's code for nothing, and the two run in different places of
/// route(). with_router() hides the difference from who takes any spec.
class any_batch_router {
 public:
  using kinds =
      std::variant<expert_choice<softmax>, expert_choice<any_score>, sinkhorn, selective_sinkhorn,
                   sinkhorn_expert_choice, base_assignment, sparse_transport,
                   sparse_transport_token_choice, batch_percentile<rare_score>>;

  any_batch_router(router_spec spec, kinds kind) : spec_(spec), kind_(std::move(kind)) {}

  const router_spec& spec() const { return spec_; }
  /// Columns of the logits that it takes.
  index_t columns() const { return spec_.columns(); }

  /// f(the router), whatever its type.
  template <std::size_t i = 0, class F>
  decltype(auto) visit(F&& f) const {
    if constexpr (i + 1 == std::variant_size_v<kinds>) {
      return f(*std::get_if<i>(&kind_));
    } else {
      if (kind_.index() == i) return f(*std::get_if<i>(&kind_));
      return this->template visit<i + 1>(std::forward<F>(f));
    }
  }

  side_use reads_side(index_t columns) const {
    return visit([&](const auto& r) { return side_use_of(r, columns); });
  }

  /// Throws: error where the columns are not the spec's, or the tokens do not fit the rule.
  void check(index_t tokens, index_t experts) const {
    check_size("route", "logits.cols", experts, columns());
    visit([&](const auto& r) { r.check(tokens, experts); });
  }

  template <executor Exec, class A = simd::default_arch>
  void route_batch(matrix_view<const float> z, const side_inputs& side, workspace& ws,
                   assignment& out, const Exec& exec) const {
    visit([&](const auto& r) { r.template route_batch<Exec, A>(z, side, ws, out, exec); });
  }

 private:
  router_spec spec_;
  kinds kind_;
};
static_assert(batch_router<any_batch_router>);

/// The batch rule that a spec describes: selection=expert_choice, sinkhorn, selective_sinkhorn,
/// sinkhorn_expert_choice, base, sparse_transport, sparse_transport_tokens, or counted by a
/// percentile of the batch.
///
/// Throws: error where the spec contradicts itself or describes a token's own choice, or a tensor
/// is given that it does not name.
inline any_batch_router make_batch_router(const router_spec& s,
                                          const router_tensors& tensors = {}) {
  check(s);
  detail::check_maker("make_batch_router", s, !s.sees_batch());
  detail::check_tensors(s, tensors);
  const float scale = s.scale_where == scale_place::weights ? s.scale : 1.0f;
  const auto transport = [&] {
    return sparse_transport{.capacity = s.take,
                            .support = s.support,
                            .weights = s.plan_weights == plan_weights::plan
                                           ? transport_weights::plan
                                           : transport_weights::softmax,
                            .gamma = s.plan_gamma,
                            .learning_rate = s.plan_rate,
                            .steps = s.plan.most_iterations};
  };
  switch (s.selection) {
    case selection_kind::expert_choice: {
      const auto with = [&]<class Score>(Score score) {
        return any_batch_router(
            s, expert_choice<Score>{.score = score,
                                    .capacity = s.take,
                                    .normalize = s.normalize == normalization::sum
                                                     ? token_renormalization::sum
                                                     : token_renormalization::none,
                                    .eps = s.normalize == normalization::sum ? s.eps : 0.0f,
                                    .scale = scale,
                                    .sequence_length = s.sequence,
                                    .most_experts = s.max_k});
      };
      if (s.score == score_kind::softmax) return with(softmax{});
      return with(any_score(s.score));
    }
    case selection_kind::sinkhorn:
      return {s, sinkhorn{.k = s.k,
                          .phase = s.phase,
                          .weights = s.plan_weights,
                          .scaling = s.plan,
                          .share = tensors.share}};
    case selection_kind::selective_sinkhorn:
      return {s, selective_sinkhorn{.k = s.k,
                                    .probability = s.probability,
                                    .phase = s.phase,
                                    .scaling = s.plan,
                                    .noise = detail::transform_of(s).noise,
                                    .share = tensors.share}};
    case selection_kind::sinkhorn_expert_choice:
      return {s, sinkhorn_expert_choice{
                     .capacity = s.take, .weights = s.plan_weights, .scaling = s.plan}};
    case selection_kind::base:
      return {s, base_assignment{.phase = s.phase, .solver = s.solver, .most_rounds = s.rounds}};
    case selection_kind::sparse_transport: return {s, transport()};
    case selection_kind::sparse_transport_tokens:
      return {s, sparse_transport_token_choice{.k = s.k, .transport = transport()}};
    default: break;
  }
  return {s, batch_percentile<rare_score>{.quantile = s.quantile,
                                          .min_k = s.min_k,
                                          .max_k = s.max_k,
                                          .score = detail::scores_of(s),
                                          .weight = detail::weight_rule_of(s, tensors)}};
}

/// Calls f(router) with the any_router, any_rare_router or any_batch_router that a spec describes,
/// for programs that take any description.
///
/// Throws: what the makers throw, and what f throws.
template <class F>
decltype(auto) with_router(const router_spec& s, const router_tensors& tensors, F&& f) {
  if (s.sees_batch()) return f(make_batch_router(s, tensors));
  if (s.has_rare_words()) return f(make_rare_router(s, tensors));
  return f(make_router(s, tensors));
}

}  // namespace moeroute

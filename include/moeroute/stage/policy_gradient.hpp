// Routers as policies: draws of experts, their probability, advantages without a baseline to learn,
// and how far a router has moved since it drew.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <type_traits>

#include <moeroute/base/gradient.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/probability/softmax_row.hpp>

namespace moeroute {

/// The policy gradient of experts that were drawn, in order and without putting back, from
/// softmax(z): one draw (RL-R) or k (ReMix).
///
/// log pi(t) = the sum over draws of z_e - log of the sum of exp(z_j) over what was left then, so
/// that of k = 1 is log p_e. Value: - 1 / T sum over t of advantage[t] log pi(t), whose gradient is
/// that of the expected reward with its sign turned:
///   dz_j (+)= - advantage[t] / T * sum over draws of (1[j = e] - p_j of what was left).
/// Gumbel noise before a top-k draws this way: router<softmax> with transform.noise of kind gumbel
/// and no bias; z here are the logits without the noise, and weights that do not depend on z
/// (ReMix: 1 / k) leave no other gradient. Draws that are no expert end a token's list.
///
/// Shapes: logits, dlogits [T, E], apart; draws of T tokens and E experts; advantage [T], 0 where a
/// token takes no part; log_probability [T], written, or empty. tokens: T of the whole where this
/// call is a part, 0: its own. Throws: error where a size differs or an id is no expert's. Cost: T
/// E k exponentials, 2 E numbers of scratch; no allocation once ws is warm. Source: Clark et al.
/// 2022 (RL-R), ReMix 2026; Williams 1992.
template <class F, class A = simd::default_arch>
double policy_gradient(std::type_identity_t<matrix_view<const F>> logits, const assignment& draws,
                       std::type_identity_t<std::span<const F>> advantage, gradient_to to,
                       matrix_view<F> dlogits, workspace& ws,
                       std::type_identity_t<std::span<F>> log_probability = {},
                       double tokens = 0.0) {
  constexpr const char* where = "policy_gradient";
  constexpr F never = -std::numeric_limits<F>::infinity();
  const index_t n = logits.cols;
  check_stride(where, "logits", logits);
  check_size(where, "draws.tokens()", draws.tokens(), logits.rows);
  check_size(where, "draws.experts()", draws.experts(), n);
  check_offsets(where, draws);
  check_size(where, "advantage.size()", static_cast<index_t>(advantage.size()), logits.rows);
  if (!log_probability.empty())
    check_size(where, "log_probability.size()", static_cast<index_t>(log_probability.size()),
               logits.rows);
  if (to != gradient_to::nowhere) {
    check_size(where, "dlogits.rows", dlogits.rows, logits.rows);
    check_size(where, "dlogits.cols", dlogits.cols, n);
    check_stride(where, "dlogits", dlogits);
    check_apart(where, "logits", logits, "dlogits", dlogits);
  }
  struct memory {
    F *left, *p;
  };
  const memory m =
      ws.carve([&](scratch& tape) { return memory{tape.take<F>(n), tape.take<F>(n)}; });
  const double whole = tokens > 0.0 ? tokens : static_cast<double>(logits.rows);
  double value = 0.0;
  for (index_t t = 0; t < logits.rows; ++t) {
    F* const dz = to == gradient_to::nowhere ? nullptr : dlogits.row(t);
    if (to == gradient_to::write) std::fill_n(dz, n, F(0));
    std::copy_n(logits.row(t), n, m.left);
    const double pull = static_cast<double>(advantage[static_cast<std::size_t>(t)]) / whole;
    double log_pi = 0.0;
    for (const expert_id e : draws.ids(t)) {
      if (e < 0) break;
      check_range(where, "an id", e, no_expert, n - 1);
      const double lse = static_cast<double>(simd::softmax_row<A>(m.left, n, m.p));
      log_pi += static_cast<double>(m.left[e]) - lse;
      for (index_t j = 0; dz != nullptr && pull != 0.0 && j < n; ++j)
        if (m.left[j] > never)
          dz[j] -= static_cast<F>(pull * ((j == e ? 1.0 : 0.0) - static_cast<double>(m.p[j])));
      m.left[e] = never;
    }
    if (!log_probability.empty())
      log_probability[static_cast<std::size_t>(t)] = static_cast<F>(log_pi);
    if (pull != 0.0) value -= pull * log_pi;
  }
  return value;
}

/// advantage[s, t] = reward[s, t] - the mean reward of the other draws of t: a baseline that biases
/// no gradient, without a network that learns it.
///
/// The policy gradient of t is then the mean over its draws: give policy_gradient() each draw with
/// `tokens` = samples * T. Shapes: reward and advantage [samples, T] row by row; they may be one.
/// Throws: error where sizes differ or samples < 2. Source: Kool et al. 2019, ReMix 2026.
template <class F>
void leave_one_out(index_t samples, std::type_identity_t<std::span<const F>> reward,
                   std::span<F> advantage) {
  constexpr const char* where = "leave_one_out";
  check_range(where, "samples", samples, 2, index_t{1} << 40);
  const auto all = static_cast<index_t>(reward.size()), tokens = all / samples;
  check_size(where, "reward.size() % samples", all % samples, 0);
  check_size(where, "advantage.size()", static_cast<index_t>(advantage.size()), all);
  for (index_t t = 0; t < tokens; ++t) {
    double sum = 0.0;
    for (index_t s = 0; s < samples; ++s)
      sum += static_cast<double>(reward[static_cast<std::size_t>(s * tokens + t)]);
    for (index_t s = 0; s < samples; ++s) {
      const auto at = static_cast<std::size_t>(s * tokens + t);
      const double own = static_cast<double>(reward[at]);
      advantage[at] = static_cast<F>(own - (sum - own) / static_cast<double>(samples - 1));
    }
  }
}

/// shift[t] += 1 / K of the sum over the K experts that the old router chose of |log p_new - log
/// p_old|, p = softmax of a layer's logits: how far the router of that layer has moved for t.
///
/// 0 iff they weigh those experts alike. An expert that one of the two gives no probability counts
/// as infinitely far, one that both give none as not at all. Shapes: logits [T, E], choices those
/// of the old router, shift [T]. Throws: error where a size differs or an id is no expert's. Cost:
/// 2 T E exponentials, E numbers of scratch.
template <class F, class A = simd::default_arch>
void add_router_shift(std::type_identity_t<matrix_view<const F>> new_logits,
                      std::type_identity_t<matrix_view<const F>> old_logits,
                      const assignment& old_choices, std::span<F> shift, workspace& ws) {
  constexpr const char* where = "add_router_shift";
  const index_t n = new_logits.cols;
  check_size(where, "old_logits.rows", old_logits.rows, new_logits.rows);
  check_size(where, "old_logits.cols", old_logits.cols, n);
  check_stride(where, "new_logits", new_logits);
  check_stride(where, "old_logits", old_logits);
  check_size(where, "old_choices.tokens()", old_choices.tokens(), new_logits.rows);
  check_size(where, "old_choices.experts()", old_choices.experts(), n);
  check_offsets(where, old_choices);
  check_size(where, "shift.size()", static_cast<index_t>(shift.size()), new_logits.rows);
  F* const p = ws.carve([&](scratch& tape) { return tape.take<F>(n); });
  const auto log_p = [](F z, double lse) {
    return z == -std::numeric_limits<F>::infinity() ? static_cast<double>(z)
                                                    : static_cast<double>(z) - lse;
  };
  for (index_t t = 0; t < new_logits.rows; ++t) {
    const auto ids = old_choices.ids(t);
    const double now = static_cast<double>(simd::softmax_row<A>(new_logits.row(t), n, p)),
                 then = static_cast<double>(simd::softmax_row<A>(old_logits.row(t), n, p));
    double sum = 0.0;
    index_t active = 0;
    for (const expert_id e : ids) {
      if (e < 0) continue;
      check_range(where, "an id", e, no_expert, n - 1);
      ++active;
      const double a = log_p(new_logits(t, e), now), b = log_p(old_logits(t, e), then);
      if (a != b) sum += std::abs(a - b);  // infinities less themselves are not 0
    }
    if (active > 0)
      shift[static_cast<std::size_t>(t)] += static_cast<F>(sum / static_cast<double>(active));
  }
}

/// ratio[t] = max(exp(-shift[t] / layers), least): what a token's importance ratio is multiplied
/// with, as a constant, where its experts were drawn by an older router.
///
/// Ensures: in [least, 1], 1 iff no layer's router has moved for t. ratio may be shift. Throws:
/// error where sizes differ, layers < 1 or least is outside [0, 1]. Source: RSPO 2025 (arXiv
/// 2510.23027); its least is not published, 0 cuts nothing.
template <class F>
void router_shift_ratio(std::type_identity_t<std::span<const F>> shift, index_t layers,
                        double least, std::span<F> ratio) {
  constexpr const char* where = "router_shift_ratio";
  check_size(where, "ratio.size()", static_cast<index_t>(ratio.size()),
             static_cast<index_t>(shift.size()));
  check_range(where, "layers", layers, 1, index_t{1} << 40);
  if (!(least >= 0.0 && least <= 1.0)) fail_value(where, "least", least, "0 to 1");
  for (std::size_t t = 0; t < shift.size(); ++t)
    ratio[t] = static_cast<F>(
        std::max(std::exp(-static_cast<double>(shift[t]) / static_cast<double>(layers)), least));
}

}  // namespace moeroute

// The weights of choices that were made, and the gradient of logits from theirs.
#pragma once

#include <algorithm>
#include <concepts>
#include <span>
#include <type_traits>

#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/exec/worker_slots.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/policy/weigh/router.hpp>

namespace moeroute {

namespace detail {

// Tokens per piece of parallel work: about 2^14 logits.
inline index_t weigh_grain(index_t columns) {
  return std::clamp<index_t>((index_t{1} << 14) / std::max<index_t>(columns, 1), 16, 1024);
}

// What weigh and its backward ask of their arguments.
inline void check_weigh(const char* where, const weight_maps& maps, index_t tokens, index_t columns,
                        const side_inputs& side, const assignment& choices, index_t weights) {
  check_size(where, "logits.rows", tokens, choices.tokens());
  check_offsets(where, choices);
  if (maps.first.layout == logit_layout::product_keys) {
    check_range(where, "logits.cols", columns, 2, 2 * max_experts);
    if (maps.first.first_keys != 0)
      check_range(where, "first_keys", maps.first.first_keys, 1, columns - 1);
    else
      check_size(where, "logits.cols % 2", columns % 2, 0);
  }
  const index_t experts = maps.first.experts(columns);
  check_size(where, "choices.experts()", choices.experts(), experts + maps.shared);
  check_size(where, "weights.size()", weights, choices.choices());
  if (maps.first_columns > 0) {
    check_range(where, "first_experts", maps.first_columns, 1, columns - 1);
    check_size(where, "modality.size()", static_cast<index_t>(side.modality.size()), tokens);
  }
  if (maps.shared > 0 && !side.shared_weight.empty())
    check_size(where, "shared_weight.size()", static_cast<index_t>(side.shared_weight.size()),
               tokens);
  for (const weight_map* m : {&maps.first, &maps.second}) {
    if (m == &maps.second && maps.first_columns == 0) continue;
    const index_t own = m == &maps.second        ? columns - maps.first_columns
                        : maps.first_columns > 0 ? maps.first_columns
                                                 : columns;
    if (!m->expert_factor.empty())
      check_size(where, "factors of experts", static_cast<index_t>(m->expert_factor.size()),
                 m->layout == logit_layout::product_keys ? experts : own);
    if (!m->transform.add.empty())
      check_size(where, "transform.add.size()", static_cast<index_t>(m->transform.add.size()), own);
    if (m->transform.noise.active() && side.noise_logits.data != nullptr) {
      check_size(where, "noise_logits.rows", side.noise_logits.rows, tokens);
      check_size(where, "noise_logits.cols", side.noise_logits.cols, columns);
      check_stride(where, "noise_logits", side.noise_logits);
    }
  }
}

// Ids come from outside: they name a column.
template <class A>
void check_ids(const char* where, std::span<const expert_id> id, index_t experts) {
  expert_id least = no_expert, greatest = no_expert;
  for (const expert_id e : id) {
    least = std::min(least, e);
    greatest = std::max(greatest, e);
  }
  if (least < no_expert || greatest >= experts) [[unlikely]]
    fail_range(where, "an id", least < no_expert ? least : greatest, no_expert, experts - 1);
}

// f(token, its row of logits, its choices, its map, first column, columns, modality) for every
// token that takes part.
template <class A, std::floating_point F, executor Exec, class Each>
void for_each_weighed(const char* where, const weight_maps& maps, const matrix_view<const F>& z,
                      const side_inputs& side, const assignment& choices, workspace& ws,
                      const Exec& exec, Each&& each) {
  const bool transforms = maps.first.transform.active() || maps.second.transform.active();
  const int workers = z.rows <= weigh_grain(z.cols) ? 1 : worker_slots::count(exec.concurrency());
  const weigh_memory<F>* memories = ws.carve([&](scratch& tape) {
    return weigh_memory<F>::carve(tape, z.cols, choices.k(), transforms, workers);
  });
  worker_slots slots(workers);
  exec.parallel_for(z.rows, weigh_grain(z.cols), [&](index_t begin, index_t end) {
    const worker_slots::held worker(slots);
    for (index_t t = begin; t < end; ++t) {
      const token_choices<F> row{z.row(t), z.cols, t, choices.ids(t), &side};
      check_ids<A>(where, row.id, choices.experts());
      const bool second = maps.first_columns > 0 && side.modality[static_cast<std::size_t>(t)] != 0;
      const index_t first = second ? maps.first_columns : 0;
      const index_t columns = maps.first_columns == 0 ? z.cols
                              : second                ? z.cols - first
                                                      : maps.first_columns;
      each(t, row,
           weigh_token<F, A>(second ? maps.second : maps.first, row, first, columns,
                             memories[worker]),
           first, second ? std::size_t{1} : std::size_t{0});
    }
  });
}

}  // namespace detail

/// weights[c] = the weight that the router gives to choice c: what route() writes, in float or
/// double, for experts that are given.
///
/// Flags of choices that were dropped are not looked at: capacity comes after (stage/capacity.hpp).
/// Shapes: logits [T, columns], weights [choices.choices()]. Requires: the header of policy/weigh/
/// that knows the router. Throws: error where sizes do not fit or an id is no expert's. Cost: T E
/// exponentials for an undivided softmax, else T k; no allocation once ws is warm. Determinism: the
/// same bits for every executor and thread count. Float differs from the weights of route() by at
/// most 3e-6 of each.
template <differentiable_router Router, std::floating_point F, executor Exec = serial,
          class A = simd::default_arch>
void weigh(const Router& router, std::type_identity_t<matrix_view<const F>> logits,
           const side_inputs& side, const assignment& choices, std::span<F> weights, workspace& ws,
           const Exec& exec = {}) {
  const weight_maps maps = weight_maps_of(router, side);
  check_stride("weigh", "logits", logits);
  detail::check_weigh("weigh", maps, logits.rows, logits.cols, side, choices,
                      static_cast<index_t>(weights.size()));
  const index_t own = choices.experts() - maps.shared;
  detail::for_each_weighed<A, F>(
      "weigh", maps, logits, side, choices, ws, exec,
      [&](index_t t, const token_choices<F>& row, const auto& token, index_t, std::size_t) {
        F* const w = weights.data() + choices.first(t);
        for (std::size_t c = 0; c < row.id.size(); ++c)
          w[c] = row.id[c] < own              ? F(0)
                 : side.shared_weight.empty() ? F(maps.shared_weight)
                                              : F(side.shared_weight[static_cast<std::size_t>(t)]);
        token.weigh(w);
      });
}

/// dlogits (+)= (dweights / dlogits)^T dweights, the derivative of weigh(): ids are constants, so
/// are a selection bias, capacity and the seed of noise.
///
/// A NaN in dweights stays in its token's row. A logit that is NaN or infinite has no gradient.
/// With k = 1 and a sum, or a softmax over the selected, the gradient is 0. Shapes: logits and
/// dlogits [T, columns], apart; dweights [choices.choices()]; nothing happens with
/// gradient_to::nowhere. `own` is added to; sums over tokens are made by the calling thread in
/// token order. Throws: error where sizes do not
/// fit, dlogits shares memory with logits, or an id is no expert's. Cost: as weigh() and the
/// gradient of the row; no allocation once ws is warm. Determinism: the same bits for every
/// executor and thread count. Source: the softmax rules of docs/training.md.
template <differentiable_router Router, std::floating_point F, executor Exec = serial,
          class A = simd::default_arch>
void weigh_backward(const Router& router, std::type_identity_t<matrix_view<const F>> logits,
                    const side_inputs& side, const assignment& choices,
                    std::type_identity_t<std::span<const F>> dweights, gradient_to to,
                    matrix_view<F> dlogits, workspace& ws, const Exec& exec = {},
                    const std::type_identity_t<router_gradients<F>>& own = {}) {
  constexpr const char* where = "weigh_backward";
  const weight_maps maps = weight_maps_of(router, side);
  check_stride(where, "logits", logits);
  detail::check_weigh(where, maps, logits.rows, logits.cols, side, choices,
                      static_cast<index_t>(dweights.size()));
  if (to == gradient_to::nowhere) return;
  check_size(where, "dlogits.rows", dlogits.rows, logits.rows);
  check_size(where, "dlogits.cols", dlogits.cols, logits.cols);
  check_stride(where, "dlogits", dlogits);
  check_apart(where, "logits", logits, "dlogits", dlogits);
  const auto sized = [&](const auto& list, const char* name, index_t n) {
    if (!list.empty()) check_size(where, name, static_cast<index_t>(list.size()), n);
  };
  const index_t experts = choices.experts() - maps.shared;
  sized(own.expert_factor, "own.expert_factor.size()", experts);
  sized(own.add, "own.add.size()", logits.cols);
  sized(own.temperature, "own.temperature.size()", maps.first_columns > 0 ? 2 : 1);
  sized(own.shared_weight, "own.shared_weight.size()", logits.rows);
  if (own.noise_logits.data != nullptr) {
    check_size(where, "own.noise_logits.rows", own.noise_logits.rows, logits.rows);
    check_size(where, "own.noise_logits.cols", own.noise_logits.cols, side.noise_logits.cols);
  }
  const auto run = [&](const auto& executor) {
    detail::for_each_weighed<A, F>(where, maps, logits, side, choices, ws, executor,
                                   [&](index_t t, const token_choices<F>& row, const auto& token,
                                       index_t first, std::size_t modality) {
                                     const F* const dw = dweights.data() + choices.first(t);
                                     F* const dz = dlogits.row(t);
                                     if (to == gradient_to::write)
                                       std::fill_n(dz, dlogits.cols, F(0));
                                     if (!own.shared_weight.empty())
                                       for (std::size_t c = 0; c < row.id.size(); ++c)
                                         if (row.id[c] >= experts)
                                           own.shared_weight[static_cast<std::size_t>(t)] += dw[c];
                                     token.pull(dw, dz + first, modality, own);
                                   });
  };
  if (own.sums()) {
    run(serial{});
  } else {
    run(exec);
  }
}

}  // namespace moeroute

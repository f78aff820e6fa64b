// Backward of combine: from the gradient of the output to those of the experts' rows and the
// weights.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <type_traits>

#include <moeroute/matrix/check.hpp>
#include <moeroute/simd/rows/row_dot.hpp>
#include <moeroute/stage/combine.hpp>

namespace moeroute {

/// Rows of gradients: what a stage reads, or double.
template <class M>
concept gradient_rows = requires(const M& m) { const_view(m); } &&
                        (readable_rows<M> || std::is_same_v<element_of<const M>, double>);

/// What combine_backward computes; what is empty is not wanted. V is the type of rows: float,
/// bfloat16, float16 or double; F what sums are made in: double with double, else float.
template <class V = float, class F = std::conditional_t<std::is_same_v<V, double>, double, float>>
struct combine_gradients {
  matrix_view<V> slots{};        ///< [slots, d], written; padding becomes 0
  std::span<F> weights{};        ///< [choices], written; 0 for a choice that adds nothing
  matrix_view<F> x{};            ///< [T, d], added to: identity experts, a lost token's residual
  matrix_view<F> shared{};       ///< [T, d], written
  std::span<F> shared_weight{};  ///< [T], written
};

namespace detail {

// out = factor * row and, where wanted, the dot of row and other; in pieces that stay in the
// first-level cache, past which whole rows are streamed.
template <class A, class F, class U, class T, class V>
F scale_and_dot(const U* row, const T* other, F factor, index_t n, V* out, bool stream) {
  constexpr index_t chunk = 4096;
  alignas(alignment) V made[chunk];
  F dot = 0;
  for (index_t c = 0; c < n; c += chunk) {
    const index_t m = std::min(chunk, n - c);
    if (other != nullptr) dot += simd::row_dot<A>(other + c, row + c, m);
    if (out == nullptr) continue;
    simd::scale_row<A>(row + c, factor, m, stream ? made : out + c);
    if (stream)
      simd::stream_bytes<A>(reinterpret_cast<const std::byte*>(made),
                            m * static_cast<index_t>(sizeof(V)),
                            reinterpret_cast<std::byte*>(out + c));
  }
  return dot;
}

// a . b in float as kernels make it, in double one by one.
template <class A, class F, class S, class U>
F dot_of(const S* a, const U* b, index_t n) {
  if constexpr (std::is_same_v<F, float>) {
    return simd::row_dot<A>(a, b, n);
  } else {
    F sum = 0;
    for (index_t i = 0; i < n; ++i) {
      const auto x = static_cast<float>(a[i]);  // storage, which no double is
      sum += static_cast<F>(x) * static_cast<F>(b[i]);
    }
    return sum;
  }
}

// The choices first, first + 1, ... of a token that have slots, R at a time from `at` on, pulled
// back in one pass each; returns how many of the list are done.
template <class A, int R, class U, class T, class V>
index_t pull_together(const U* row, const matrix_view<const T>& slots, const matrix_view<V>& dslots,
                      const slot_id* slot, const float* weights, const index_t* list, index_t done,
                      index_t count, index_t n, bool stream, float* dweights) {
  for (; done + R <= count; done += R) {
    const T* from[R];
    V* to[R];
    float factor[R], dot[R];
    for (int r = 0; r < R; ++r) {
      const index_t c = list[done + r];
      from[r] = slots.data + slot[c] * slots.stride;
      to[r] = dslots.data + slot[c] * dslots.stride;
      factor[r] = weights[c];
    }
    simd::scale_and_dot_rows<A, R>(row, from, factor, n, to, stream, dot);
    for (int r = 0; r < R; ++r) dweights[list[done + r]] = dot[r];
  }
  return done;
}

}  // namespace detail

/// dslots[s] = w dy[t] and dw = dy[t] . slots[s] for the choice of slot s with weight w, the
/// derivative of combine(): y[t] = sum of w slots[s].
///
/// A choice without a slot has dw = 0, and no row. Identity experts: dx[t] += w dy[t], dw = dy[t] .
/// x[t]. A token that was lost: dx[t] += dy[t]. Shared rows: dshared[t] = shared_weight dy[t],
/// dshared_weight = dy[t] . shared[t]. With combine_output::accumulate the gradient of what y held
/// is dy itself. With combine_weight::one weights count as 1 and have gradient 0 here, but for
/// those of identity experts. Shapes: as combine(); dy [T, d]. slots may be without rows where
/// gradients.weights is empty. Throws: error where the shapes do not fit, rows run into one
/// another, or a gradient shares memory with what is read. Cost: reads slots and dy once, writes
/// dslots once; no allocation. Determinism: the same bits for every executor, thread count and
/// (float) ISA. 16-bit dslots are rounded once.
template <gradient_rows X, gradient_rows Y, class V, class F, executor Exec = serial,
          class A = simd::default_arch, storage H = float, storage S = float>
void combine_backward(const X& slot_rows, const dispatch_plan& plan,
                      std::type_identity_t<std::span<const F>> weights, const Y& dy_rows,
                      const combine_gradients<V, F>& gradients, const Exec& exec = {},
                      const combine_options<H, S>& options = {},
                      const assignment* choices = nullptr) {
  constexpr const char* where = "combine_backward";
  const auto slots = const_view(slot_rows);
  const auto dy = const_view(dy_rows);
  const matrix_view<V>& dslots = gradients.slots;
  const bool ones = options.weight == combine_weight::one;
  const bool wants_slots = dslots.data != nullptr, wants_weights = !gradients.weights.empty();
  check_size(where, "dy.rows()", dy.rows, plan.tokens());
  check_stride(where, "dy", dy);
  const bool identity = options.identity_first < options.identity_end;
  if (!ones || (identity && !weights.empty()))
    check_size(where, "weights.size()", static_cast<index_t>(weights.size()), plan.choices());
  if (wants_slots) {
    check_size(where, "gradients.slots.rows()", dslots.rows, plan.slots());
    check_size(where, "gradients.slots.cols()", dslots.cols, dy.cols);
    check_stride(where, "gradients.slots", dslots);
    check_apart(where, "slots", slots, "gradients.slots", dslots);
    check_apart(where, "dy", dy, "gradients.slots", dslots);
  }
  if (wants_weights) {
    check_size(where, "gradients.weights.size()", static_cast<index_t>(gradients.weights.size()),
               plan.choices());
    if (!ones) {
      check_size(where, "slots.rows()", slots.rows, plan.slots());
      check_size(where, "slots.cols()", slots.cols, dy.cols);
      check_stride(where, "slots", slots);
    }
  }
  if (identity) {
    check_range(where, "identity_first", options.identity_first, 0, max_experts);
    if (choices == nullptr)
      fail(where, "choices are missing: identity experts are told by their ids");
    check_size(where, "choices.choices()", choices->choices(), plan.choices());
    if (wants_weights) {
      check_size(where, "x.rows()", options.x.rows, dy.rows);
      check_size(where, "x.cols()", options.x.cols, dy.cols);
      check_stride(where, "x", options.x);
    }
  }
  const bool mixes = options.lost == lost_token::mix;
  if (mixes && ones) fail(where, "lost_token::mix needs the weights of the choices");
  if (mixes && wants_weights) {
    check_size(where, "x.rows()", options.x.rows, dy.rows);
    check_size(where, "x.cols()", options.x.cols, dy.cols);
    check_stride(where, "x", options.x);
  }
  const matrix_view<F>&dx = gradients.x, &dshared = gradients.shared;
  if (dx.data != nullptr) {
    check_size(where, "gradients.x.rows()", dx.rows, dy.rows);
    check_size(where, "gradients.x.cols()", dx.cols, dy.cols);
    check_stride(where, "gradients.x", dx);
    check_apart(where, "dy", dy, "gradients.x", dx);
  }
  if (dshared.data != nullptr) {
    check_size(where, "gradients.shared.rows()", dshared.rows, dy.rows);
    check_size(where, "gradients.shared.cols()", dshared.cols, dy.cols);
    check_stride(where, "gradients.shared", dshared);
    check_apart_or_same(where, "dy", dy, "gradients.shared", dshared);
  }
  if (!gradients.shared_weight.empty()) {
    check_size(where, "gradients.shared_weight.size()",
               static_cast<index_t>(gradients.shared_weight.size()), dy.rows);
    check_size(where, "shared.rows()", options.shared.rows, dy.rows);
    check_size(where, "shared.cols()", options.shared.cols, dy.cols);
    check_stride(where, "shared", options.shared);
  }
  if (!options.shared_weight.empty())
    check_size(where, "shared_weight.size()", static_cast<index_t>(options.shared_weight.size()),
               dy.rows);

  const slot_id* const slot = plan.slot_of_choice().data();
  const bool stream = wants_slots && detail::streams(dslots, store_path::automatic);
  const index_t terms = std::max<index_t>(1, plan.k());
  exec.parallel_for(dy.rows, detail::row_grain(dy.cols * terms), [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      const auto* const row = dy.data + t * dy.stride;
      bool lost = true;
      F rest = 1;
      const F of_x = mixes && wants_weights
                         ? detail::dot_of<A, F>(options.x.data + t * options.x.stride, row, dy.cols)
                         : F(0);
      index_t together = plan.first(t);  // choices that are done
      if constexpr (std::is_same_v<F, float>) {
        constexpr index_t most = 64;
        index_t list[most], count = 0;
        const index_t begins = plan.first(t), ends = plan.first(t + 1);
        if (wants_slots && wants_weights && !ones && !mixes && ends - begins <= most) {
          for (index_t c = begins; c < ends; ++c)
            if (slot[c] != no_slot) list[count++] = c;
          if (count == ends - begins) {
            const auto pull = [&]<int rows_at_once>(std::integral_constant<int, rows_at_once>,
                                                    index_t done) {
              return detail::pull_together<A, rows_at_once>(
                  row, slots, dslots, slot, weights.data(), list, done, count, dy.cols, stream,
                  gradients.weights.data());
            };
            const index_t done =
                pull(std::integral_constant<int, 2>{}, pull(std::integral_constant<int, 4>{}, 0));
            together += done;
            lost = done == 0;
          }
        }
      }
      for (index_t c = together; c < plan.first(t + 1); ++c) {
        const F w = ones ? F(1) : weights[static_cast<std::size_t>(c)];
        F dot = 0;
        if (slot[c] != no_slot) {
          lost = false;
          dot = detail::scale_and_dot<A>(
              row, wants_weights && !ones ? slots.data + slot[c] * slots.stride : nullptr, w,
              dy.cols, wants_slots ? dslots.data + slot[c] * dslots.stride : nullptr, stream);
          dot -= of_x;
          rest -= w;
        } else if (identity) {
          const expert_id e = choices->ids()[static_cast<std::size_t>(c)];
          if (e >= options.identity_first && e < options.identity_end && choices->kept(c)) {
            lost = false;
            // Where weights are not applied to outputs they still are to identity experts.
            const F own = weights.empty() ? F(1) : weights[static_cast<std::size_t>(c)];
            if (dx.data != nullptr)
              simd::add_scaled_row<A>(row, own, dy.cols, dx.data + t * dx.stride);
            if (wants_weights)
              dot =
                  detail::dot_of<A, F>(options.x.data + t * options.x.stride, row, dy.cols) - of_x;
            rest -= own;
          }
        }
        if (wants_weights) gradients.weights[static_cast<std::size_t>(c)] = dot;
      }
      if ((mixes || (lost && options.lost == lost_token::residual)) && dx.data != nullptr)
        simd::add_scaled_row<A>(row, rest, dy.cols, dx.data + t * dx.stride);
      if (!gradients.shared_weight.empty())
        gradients.shared_weight[static_cast<std::size_t>(t)] =
            detail::dot_of<A, F>(options.shared.data + t * options.shared.stride, row, dy.cols);
      if (dshared.data != nullptr)
        simd::scale_row<A>(row,
                           options.shared_weight.empty()
                               ? F(1)
                               : F(options.shared_weight[static_cast<std::size_t>(t)]),
                           dy.cols, dshared.data + t * dshared.stride);
    }
    if (stream) simd::stream_fence();
  });
  if (!wants_slots || plan.padding() == 0) return;
  for (index_t e = 0; e < plan.experts(); ++e)
    for (index_t s = plan.offsets()[static_cast<std::size_t>(e)] + plan.load(e);
         s < plan.offsets()[static_cast<std::size_t>(e) + 1]; ++s)
      std::fill_n(dslots.data + s * dslots.stride, dslots.cols, V{});
}

/// The same with the weights of an assignment, and its ids for identity experts.
template <gradient_rows X, gradient_rows Y, class V, executor Exec = serial,
          class A = simd::default_arch, storage H = float, storage S = float>
void combine_backward(const X& slots, const dispatch_plan& plan, const assignment& choices,
                      const Y& dy, const combine_gradients<V, float>& gradients,
                      const Exec& exec = {}, const combine_options<H, S>& options = {}) {
  check_size("combine_backward", "choices.choices()", choices.choices(), plan.choices());
  combine_backward<X, Y, V, float, Exec, A, H, S>(slots, plan, choices.weights(), dy, gradients,
                                                  exec, options, &choices);
}

}  // namespace moeroute

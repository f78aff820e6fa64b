// Backward of dispatch: from the gradients of the experts' inputs to that of the hidden states.
#pragma once

#include <algorithm>
#include <array>
#include <span>
#include <type_traits>

#include <moeroute/base/gradient.hpp>
#include <moeroute/stage/combine_backward.hpp>
#include <moeroute/stage/dispatch.hpp>

namespace moeroute {

/// What goes back where choices have a scale (weights on the experts' input).
template <class F = float>
struct dispatch_scale {
  std::span<const F> scale{};  ///< [choices], what dispatch multiplied with; empty: 1
  matrix_view<const F> x{};    ///< [T, d], for the gradient of the scale
  std::span<F> dscale{};       ///< [choices], written: x[t] . dslots[s], 0 without a slot; or empty
};

/// dx[t] (+)= the sum over t's choices, in rank order, of scale * dslots[slot of the choice], the
/// derivative of dispatch(): slots[s] = scale x[t].
///
/// Padding is not read. Sums are made in float (in double with double) and rounded once.
/// Shapes: dslots [slots, d], dx [T, d], apart. Throws: error where the shapes do not fit, rows run
/// into one another or memory is shared, or for gradient_to::add to 16 bits: each addition would
/// round. Cost: reads dslots once, as combine; a second time, from cache, for
/// dscale; no allocation. Determinism: the same bits for every executor, thread count and (float)
/// ISA.
template <gradient_rows X, class D, executor Exec = serial, class A = simd::default_arch>
  requires gradient_rows<D>
void dispatch_backward(
    const X& dslot_rows, const dispatch_plan& plan, gradient_to to, D&& dx_rows,
    const Exec& exec = {},
    const std::type_identity_t<dispatch_scale<
        std::conditional_t<std::is_same_v<element_of<D>, double>, double, float>>>& how = {}) {
  constexpr const char* where = "dispatch_backward";
  const auto dslots = const_view(dslot_rows);
  const auto dx = view(dx_rows);
  using V = element_of<D>;
  using F = std::conditional_t<std::is_same_v<V, double>, double, float>;
  if (to == gradient_to::nowhere) return;
  check_size(where, "dslots.rows()", dslots.rows, plan.slots());
  check_size(where, "dx.rows()", dx.rows, plan.tokens());
  check_size(where, "dx.cols()", dx.cols, dslots.cols);
  check_stride(where, "dslots", dslots);
  check_stride(where, "dx", dx);
  check_apart(where, "dslots", dslots, "dx", dx);
  if (sizeof(V) == 2 && to == gradient_to::add)
    fail(where, "dx is kept in 16 bits and added to, which rounds every time: expected float");
  if (!how.scale.empty())
    check_size(where, "scale.size()", static_cast<index_t>(how.scale.size()), plan.choices());
  if (!how.dscale.empty()) {
    check_size(where, "dscale.size()", static_cast<index_t>(how.dscale.size()), plan.choices());
    check_size(where, "x.rows()", how.x.rows, plan.tokens());
    check_size(where, "x.cols()", how.x.cols, dslots.cols);
    check_stride(where, "x", how.x);
    check_apart(where, "x", how.x, "dx", dx);
  }
  const slot_id* const slot = plan.slot_of_choice().data();
  const index_t terms = std::max<index_t>(1, plan.k());
  // As combine(): rows in the second cache come by themselves, of others the next token's are
  // fetched.
  const bool cold = dslots.rows * dslots.cols * static_cast<index_t>(sizeof(*dslots.data)) >
                    2 * simd::machine_caches().second;
  exec.parallel_for(dx.rows, detail::row_grain(dx.cols * terms), [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      const index_t first = plan.first(t), count = plan.count(t);
      V* const out = dx.data + t * dx.stride;
      const auto factor = [&](index_t c) {
        return how.scale.empty() ? F(1) : how.scale[static_cast<std::size_t>(c)];
      };
      if constexpr (std::is_same_v<V, double>) {
        if (to == gradient_to::write) std::fill_n(out, dx.cols, 0.0);
        for (index_t c = first; c < first + count; ++c)
          if (slot[c] != no_slot)
            simd::add_scaled_row<A>(dslots.data + slot[c] * dslots.stride, factor(c), dx.cols, out);
      } else {
        constexpr index_t few = 64;
        static constexpr auto ones = [] {
          std::array<float, few> list{};
          list.fill(1.0f);
          return list;
        }();
        if (to == gradient_to::write && (count <= few || !how.scale.empty())) {
          const bool fetch = cold && t + 1 < dx.rows && plan.count(t + 1) >= count;
          simd::weighted_sum_of_rows<A>(dslots.data, dslots.stride, slot + first,
                                        how.scale.empty() ? ones.data() : how.scale.data() + first,
                                        count, dx.cols, out,
                                        fetch ? slot + first + count : nullptr);
        } else {
          simd::sum_of_rows<A>(
              dx.cols, out,
              to == gradient_to::write ? simd::sum_start::zero : simd::sum_start::output,
              [&](auto& sum) {
                for (index_t c = first; c < first + count; ++c)
                  if (slot[c] != no_slot) sum(dslots.data + slot[c] * dslots.stride, factor(c));
              });
        }
      }
      for (index_t c = first; !how.dscale.empty() && c < first + count; ++c)
        how.dscale[static_cast<std::size_t>(c)] =
            slot[c] == no_slot
                ? F(0)
                : static_cast<F>(simd::row_dot<A>(how.x.data + t * how.x.stride,
                                                  dslots.data + slot[c] * dslots.stride, dx.cols));
    }
  });
}

}  // namespace moeroute

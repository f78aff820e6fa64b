// Backward of soft_moe, from its tape.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include <moeroute/layer/soft_moe.hpp>
#include <moeroute/stage/expert_backward.hpp>
#include <moeroute/stage/gate_backward.hpp>
#include <moeroute/stage/soft_backward.hpp>

namespace moeroute {

/// What backward() of a soft layer computes; what is empty is not wanted.
struct soft_gradients {
  gradient_to to = gradient_to::write;
  matrix_view<float> x{};   ///< [T, d]
  matrix_view<float> mu{};  ///< [slots, d]
  float* scale = nullptr;   ///< of the normalised logits; added to
};

/// The gradients of a soft layer's forward call, from that of y.
///
/// mu: the slots' vectors as they are trained; experts runs the experts backwards (an
/// expert_gradient, with or without scratch) and adds to gradients of its own.
/// Shapes: x as in that call (y was not x), dy [T, d], mu [slots, d]. Throws: error where the tape
/// is empty or of another shape, a shape does not fit, or a gradient shares memory with what is
/// read. Cost: about twice the forward's; memory of the tape: no allocation once it is warm.
/// Determinism: the same bits for every executor and thread count. Source: Puigcerver et al. 2023.
template <class Experts, class A, readable_rows X, readable_rows DY, class ExpertGradient,
          executor Exec = serial>
void backward(const soft_moe<Experts, A>& layer, const X& x_rows, soft_tape& tape,
              const DY& dy_rows, const matrix_view<const float>& mu, ExpertGradient&& experts,
              const soft_gradients& gradients, const Exec& exec = {}) {
  constexpr const char* where = "backward";
  constexpr float eps = 1e-6f;  // of a unit vector
  using T = element_of<const X>;
  using rows = matrix_view<const float>;
  const auto x = const_view(x_rows);
  const auto dy = const_view(dy_rows);
  if (tape.tokens < 0) fail(where, "the tape is empty: it comes from forward()");
  const index_t tokens = tape.tokens, slots = layer.slots(), d = layer.d();
  check_size(where, "x.rows()", x.rows, tokens);
  check_size(where, "x.cols()", x.cols, d);
  check_size(where, "dy.rows()", dy.rows, tokens);
  check_size(where, "dy.cols()", dy.cols, d);
  check_size(where, "tape.plan.slots()", tape.plan.slots(), slots);
  check_size(where, "mu.rows()", mu.rows, slots);
  check_size(where, "mu.cols()", mu.cols, d);
  const matrix_view<float> dx =
      gradients.to == gradient_to::nowhere ? matrix_view<float>() : gradients.x;
  const bool unit = layer.options().logits == soft_logits::normalized;
  constexpr bool with_scratch =
      expert_gradient_with_scratch<std::remove_reference_t<ExpertGradient>, float, float, float>;
  index_t floats = 0;
  if constexpr (with_scratch)
    floats = experts.scratch_floats() * worker_slots::count(exec.concurrency());
  struct memory {
    float *x, *dy, *dout, *din, *ddispatch, *dcombine, *dlogits, *experts, *unit_x, *unit_mu, *dx,
        *dmu;
  };
  const memory m = tape.backward.carve([&](scratch& s) {
    const index_t wide_x = std::is_same_v<T, float> ? 0 : tokens * d;
    const index_t wide_dy = std::is_same_v<element_of<const DY>, float> ? 0 : tokens * d;
    const index_t of_x = unit ? tokens * d : 0, of_mu = unit ? slots * d : 0;
    return memory{
        s.take<float>(wide_x),         s.take<float>(wide_dy),        s.take<float>(slots * d),
        s.take<float>(slots * d),      s.take<float>(slots * tokens), s.take<float>(tokens * slots),
        s.take<float>(tokens * slots), s.take<float>(floats),         s.take<float>(of_x),
        s.take<float>(of_mu),          s.take<float>(of_x),           s.take<float>(of_mu)};
  });
  const auto widened = [&]<class U>(const matrix_view<const U>& from, float* to) -> rows {
    if constexpr (std::is_same_v<U, float>) {
      return from;
    } else {
      for (index_t t = 0; t < from.rows; ++t)
        simd::convert_row<A>(from.data + t * from.stride, d, to + t * d);
      return {to, from.rows, d};
    }
  };
  const rows states = widened(x, m.x), up = widened(dy, m.dy);
  const matrix_view<float> dout(m.dout, slots, d), din(m.din, slots, d);
  const matrix_view<float> ddispatch(m.ddispatch, slots, tokens),
      dcombine(m.dcombine, tokens, slots), dlogits(m.dlogits, tokens, slots);
  const rows dispatch = std::as_const(tape.plan).dispatch(),
             combine = std::as_const(tape.plan).combine();

  mix_backward(combine, rows(tape.out), up, dcombine, gradient_to::write, dout, exec);
  const index_t own = layer.options().slots_per_expert;
  worker_slots workers(exec.concurrency());
  exec.parallel_for(slots / own, 1, [&](index_t begin, index_t end) {
    for (index_t e = begin; e < end; ++e) {
      const rows in = tape.in.middle_rows(e * own, own), back = dout.middle_rows(e * own, own);
      const matrix_view<float> to = din.middle_rows(e * own, own);
      if constexpr (with_scratch) {
        const worker_slots::held worker(workers);
        experts(static_cast<expert_id>(e), in, back, to,
                m.experts + worker * experts.scratch_floats());
      } else {
        experts(static_cast<expert_id>(e), in, back, to);
      }
    }
  });
  mix_backward(dispatch, states, rows(din), ddispatch, gradients.to, gradients.x, exec);
  plan_soft_backward(dispatch, combine, rows(ddispatch), rows(dcombine), gradient_to::write,
                     dlogits, tape.sums, exec);
  if (!unit) {
    gate_backward(states, mu, dlogits, gate_gradients<float>{gradient_to::add, dx}, exec);
    gate_backward(states, mu, dlogits, gate_gradients<float>{gradients.to, {}, gradients.mu}, exec);
    return;
  }
  const auto directions = [&](const rows& from, float* to) {
    for (index_t r = 0; r < from.rows; ++r) {
      const float* const row = from.data + r * from.stride;
      simd::scale_row<A>(row, 1.0f / std::sqrt(simd::row_dot<A>(row, row, d) + eps), d, to + r * d);
    }
    return rows(to, from.rows, d);
  };
  const rows ux = directions(states, m.unit_x), umu = directions(mu, m.unit_mu);
  const matrix_view<float> dux(m.dx, tokens, d), dumu(m.dmu, slots, d);
  gate_backward(ux, umu, dlogits, gate_gradients<float>{gradient_to::write, dux, dumu}, exec);
  if (gradients.scale != nullptr)
    for (index_t t = 0; t < tokens; ++t)
      *gradients.scale += simd::row_dot<A>(ux.row(t), dux.row(t), d);
  const float scale = layer.options().scale;
  for (index_t i = 0; i < tokens * d; ++i) m.dx[i] *= scale;
  for (index_t i = 0; i < slots * d; ++i) m.dmu[i] *= scale;
  if (dx.data != nullptr) unit_rows_backward(states, rows(dux), gradient_to::add, dx, exec, eps);
  if (gradients.mu.data != nullptr)
    unit_rows_backward(mu, rows(dumu), gradients.to, gradients.mu, exec, eps);
}

}  // namespace moeroute

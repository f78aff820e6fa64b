// Backward of moe_layer, from its tape.
#pragma once

#include <algorithm>
#include <span>
#include <type_traits>

#include <moeroute/layer/moe_layer.hpp>
#include <moeroute/stage/capacity_backward.hpp>
#include <moeroute/stage/combine_backward.hpp>
#include <moeroute/stage/dispatch_backward.hpp>
#include <moeroute/stage/expert_backward.hpp>
#include <moeroute/stage/gate_backward.hpp>
#include <moeroute/stage/weigh.hpp>

namespace moeroute {

/// The layer's own weights as they are trained, not packed.
template <storage W = float>
struct layer_weights {
  matrix_view<const W> gate{};           ///< [columns, d], where the layer has a gate
  std::span<const float> shared_gate{};  ///< [d], where shared experts have a gate
};

/// What backward() computes; what is empty is not wanted.
struct layer_gradients {
  gradient_to to = gradient_to::write;  ///< of x, gate, gate_bias and shared_gate
  matrix_view<float> x{};               ///< [T, d]
  matrix_view<float> gate{};            ///< [columns, d]
  std::span<float> gate_bias{};         ///< [columns]
  std::span<float> shared_gate{};       ///< [d]
  /// [T, columns]: with logits_to add it holds what losses put there (balance/), and their
  /// gradients go through the gate with the layer's own. Empty: scratch. Where the logits were not
  /// the gate's of x, all ends here: the caller hands them on to what made them.
  matrix_view<float> logits{};
  gradient_to logits_to = gradient_to::write;
  router_gradients<float> router{};  ///< added to
};

namespace detail {

template <class F>
concept has_scratch_floats = requires(const F& f) {
  { f.scratch_floats() } -> std::convertible_to<index_t>;
};

template <class F>
index_t scratch_of(const F& f) {
  if constexpr (has_scratch_floats<F>) {
    return f.scratch_floats();
  } else {
    return 0;
  }
}

// Expert gradients that are handed the rows of `kept` beside those of dout.
template <class F>
struct kept_gradient {
  F* f;
  matrix_view<const float> kept;
  const float* dout;

  index_t scratch_floats() const { return f->scratch_floats(); }
  void operator()(expert_id e, matrix_view<const float> in, matrix_view<const float> dy,
                  matrix_view<float> din, float* memory) const {
    const index_t first = (dy.data - dout) / dy.stride;
    (*f)(e, in, dy, din,
         kept.data == nullptr ? matrix_view<const float>{} : kept.middle_rows(first, dy.rows),
         memory);
  }
};

inline void check_tape(const layer_tape& tape, index_t tokens, index_t d, index_t experts) {
  if (tape.tokens < 0) fail("backward", "the tape is empty: it comes from forward()");
  check_size("backward", "x.rows()", tokens, tape.tokens);
  check_size("backward", "x.cols()", d, tape.in.cols);
  check_size("backward", "tape.plan.experts()", tape.plan.experts(), experts);
}

}  // namespace detail

/// The gradients of a layer's forward call, from that of y.
///
/// experts runs the experts backwards (an expert_gradient, with or without scratch, e.g.
/// swiglu_backward), shared the shared ones, called once with all tokens: both add to gradients of
/// their own. Choices, drops, bias and noise seeds are constants.
/// The gate's gradient is what gate_backward(gate, x, weight, dlogits, gradients, ws, exec)
/// does (stage/gate_backward.hpp), which a gate of one's own may offer beside its type; without one
/// the gradients end at the logits.
/// Shapes: x and side as in that call (x must still hold what it held: y was not x), dy [T, d_out].
/// Throws: error where the tape is empty or of another shape, a shape does not fit, gate weights
/// are missing, a gradient of the gate's is wanted where the logits were not its, or a gradient
/// shares memory with what is read. Cost: twice the experts' forward
/// cost and more (swiglu_backward), 2 T E d multiply-adds for the gate, three passes over the
/// slots; memory of the tape: no allocation once it is warm. Determinism: the same bits for every
/// executor and thread count.
template <class Router, class Experts, class Shared, class Gate, class A, readable_rows X,
          readable_rows DY, storage W, class ExpertGradient, executor Exec = serial,
          class SharedGradient = no_shared_experts>
  requires differentiable_router<Router>
void backward(const moe_layer<Router, Experts, Shared, Gate, A>& layer, const X& x_rows,
              const side_inputs& side, layer_tape& tape, const DY& dy_rows,
              const layer_weights<W>& weights, ExpertGradient&& experts,
              const layer_gradients& gradients, const Exec& exec = {},
              SharedGradient&& shared = {}) {
  constexpr const char* where = "backward";
  constexpr bool with_shared = !std::is_same_v<Shared, no_shared_experts>;
  static_assert(
      with_shared == !std::is_same_v<std::remove_cvref_t<SharedGradient>, no_shared_experts>,
      "[moeroute::backward] shared experts need a gradient, and only they");
  using T = element_of<const X>;
  const auto x = const_view(x_rows);
  const auto dy = const_view(dy_rows);
  const moe_layer_options& options = layer.options();
  detail::check_tape(tape, x.rows, x.cols, layer.experts());
  check_size(where, "dy.rows()", dy.rows, x.rows);
  check_size(where, "dy.cols()", dy.cols, tape.out.cols);
  const index_t tokens = x.rows, d = x.cols, d_out = dy.cols, slots = tape.plan.slots(),
                columns = tape.logits.cols;
  const index_t choices = tape.choices.choices();
  const bool on_input = options.weights == weight_on::input;
  const bool identity = options.special.identity_first < options.special.identity_end;
  const bool shares = options.capacity && options.capacity->renormalize != renormalization::none;
  if (gradients.logits.data != nullptr) {
    check_size(where, "gradients.logits.rows()", gradients.logits.rows, tokens);
    check_size(where, "gradients.logits.cols()", gradients.logits.cols, columns);
  }
  constexpr bool gate_offers =
      requires(workspace& ws, const matrix_view<const float>& z, const gate_gradients<float>& g) {
        gate_backward(layer.gate(), x, weights.gate, z, g, ws, exec);
      };
  const bool through_gate = gate_offers && tape.gated;
  if (through_gate) {
    check_size(where, "weights.gate.rows()", weights.gate.rows, columns);
    check_size(where, "weights.gate.cols()", weights.gate.cols, d);
  } else if (gradients.gate.data != nullptr || !gradients.gate_bias.empty()) {
    fail(where,
         "a gradient of the gate is wanted, but the logits were not the gate's of x, or it "
         "offers no gate_backward: take gradients.logits to what made them");
  }
  if (gradients.x.data != nullptr) {
    check_size(where, "gradients.x.rows()", gradients.x.rows, tokens);
    check_size(where, "gradients.x.cols()", gradients.x.cols, d);
    check_apart(where, "x", x, "gradients.x", gradients.x);
    check_apart(where, "dy", dy, "gradients.x", gradients.x);
  }

  const int workers = worker_slots::count(exec.concurrency());
  const bool wide_x = (with_shared || on_input) && !std::is_same_v<T, float>;
  struct memory {
    float *dout, *din, *dweights, *before, *identities, *dlogits, *experts, *x, *dshared,
        *dshared_in, *shared, *dshared_weight;
  };
  // The gate's gradients need those of the logits, wanted or not.
  const bool own_logits =
      gradients.logits.data == nullptr || gradients.logits_to == gradient_to::nowhere;
  // By the room for choices, as the forward pass: their number may vary. Or for rows of tokens,
  // which stand there where only the weights' gradient is wanted.
  const index_t room = std::max({tape.choices.room(), slots, tokens});
  const memory m = tape.backward.carve([&](scratch& s) {
    const index_t of_shared = with_shared ? tokens : 0;
    return memory{s.take<float>(room * std::max(d, d_out)),
                  s.take<float>(room * d),
                  s.take<float>(room),
                  s.take<float>(shares ? room : 0),
                  s.take<float>(on_input && identity ? room : 0),
                  s.take<float>(own_logits ? tokens * columns : 0),
                  s.take<float>(detail::scratch_of(experts) * workers),
                  s.take<float>(wide_x ? tokens * d : 0),
                  s.take<float>(of_shared * d_out),
                  s.take<float>(of_shared * d),
                  s.take<float>(detail::scratch_of(shared)),
                  s.take<float>(2 * of_shared)};
  });
  const matrix_view<float> dout(m.dout, slots, d_out), din(m.din, slots, d);
  const std::span<float> dw(m.dweights, static_cast<std::size_t>(choices));
  const matrix_view<float> dlogits =
      own_logits ? matrix_view<float>(m.dlogits, tokens, columns) : gradients.logits;
  matrix_view<const float> x_float;
  if constexpr (std::is_same_v<T, float>) {
    x_float = x;
  } else if (wide_x) {
    for (index_t t = 0; t < tokens; ++t)
      simd::convert_row<A>(x.data + t * x.stride, d, m.x + t * d);
    x_float = {m.x, tokens, d};
  }
  // What the forward pass read of up to decode_tokens tokens was x itself.
  if (!tape.has_inputs) dispatch(x, tape.plan, tape.in, exec);

  // y = the sum of the terms of combine.
  const matrix_view<float>& dx = gradients.x;
  const bool wants_x = dx.data != nullptr && gradients.to != gradient_to::nowhere;
  const bool dx_first = wants_x && (identity || options.lost != lost_token::zero);
  if (dx_first && gradients.to == gradient_to::write)
    for (index_t t = 0; t < tokens; ++t) std::fill_n(dx.data + t * dx.stride, d, 0.0f);
  combine_options<T, float> combining;
  if (on_input) combining.weight = combine_weight::one;
  combining.lost = options.lost;
  combining.identity_first = options.special.identity_first;
  combining.identity_end = options.special.identity_end;
  combining.x = x;
  combine_gradients<float> terms{.slots = dout};
  if (!on_input)
    terms.weights = dw;
  else if (identity)
    terms.weights = {m.identities, static_cast<std::size_t>(choices)};
  if (dx_first) terms.x = dx;
  if constexpr (with_shared) {
    combining.shared = matrix_view<const float>(tape.shared_out);
    combining.shared_weight = tape.shared_weight;
    terms.shared = {m.dshared, tokens, d_out};
    terms.shared_weight = {m.dshared_weight, static_cast<std::size_t>(tokens)};
  }
  combine_backward(tape.out, tape.plan, tape.choices, dy, terms, exec, combining);

  if constexpr (requires { experts.kept_floats(); }) {
    if (tape.kept.data != nullptr)
      check_size(where, "tape.kept.cols()", tape.kept.cols, experts.kept_floats());
    const detail::kept_gradient<std::remove_reference_t<ExpertGradient>> with_kept{
        &experts, tape.kept, dout.data};
    for_each_expert_backward(tape.plan, tape.in, dout, din, with_kept, m.experts, exec);
  } else if constexpr (detail::has_scratch_floats<std::remove_cvref_t<ExpertGradient>>) {
    for_each_expert_backward(tape.plan, tape.in, dout, din, experts, m.experts, exec);
  } else {
    for_each_expert_backward(tape.plan, tape.in, dout, din, experts, exec);
  }

  dispatch_scale<float> scale;
  if (on_input) scale = {.scale = tape.choices.weights(), .x = x_float, .dscale = dw};
  if (wants_x) {
    dispatch_backward(din, tape.plan, dx_first ? gradient_to::add : gradients.to, dx, exec, scale);
  } else if (on_input) {
    // Only the gradient of the weights is wanted: what goes to x is made where din was.
    dispatch_backward(din, tape.plan, gradient_to::write, matrix_view<float>(m.dout, tokens, d),
                      exec, scale);
  }
  for (index_t c = 0; on_input && identity && c < choices; ++c) m.dweights[c] += m.identities[c];

  // From the weights to the logits, against the order in which they were made.
  // Without logits the weights are constants.
  const bool has_logits = tape.logits.data != nullptr || tokens == 0;
  if (shares && has_logits) {
    const std::span<float> before(m.before, static_cast<std::size_t>(choices));
    weigh(layer.router(), tape.logits, side, tape.choices, before, tape.router, exec);
    renormalize_backward(*options.capacity, tape.choices, before, dw);
  }
  if (!has_logits) {
    if (gradients.logits.data != nullptr)
      fail(where, "gradients.logits is given, but the call had no logits");
  } else
    weigh_backward(layer.router(), tape.logits, side, tape.choices, dw,
                   own_logits ? gradient_to::write : gradients.logits_to, dlogits, tape.router,
                   exec, gradients.router);

  const gate_gradients<float> to_x{gradient_to::add, dx};
  if constexpr (with_shared) {
    const matrix_view<float> dshared(m.dshared, tokens, d_out), dshared_in(m.dshared_in, tokens, d);
    if (tokens > 0) {
      if constexpr (detail::has_scratch_floats<std::remove_cvref_t<SharedGradient>>) {
        shared(expert_id{0}, x_float, matrix_view<const float>(dshared), dshared_in, m.shared);
      } else {
        shared(expert_id{0}, x_float, matrix_view<const float>(dshared), dshared_in);
      }
    }
    if (wants_x)
      for (index_t t = 0; t < tokens; ++t)
        simd::add_scaled_row<A>(dshared_in.data + t * d, 1.0f, d, dx.data + t * dx.stride);
    if (!weights.shared_gate.empty()) {
      check_size(where, "weights.shared_gate.size()",
                 static_cast<index_t>(weights.shared_gate.size()), d);
      const matrix_view<const float> row(weights.shared_gate.data(), 1, d);
      const std::span<const float> dweight(m.dshared_weight, static_cast<std::size_t>(tokens));
      if (!gradients.shared_gate.empty())
        check_size(where, "gradients.shared_gate.size()",
                   static_cast<index_t>(gradients.shared_gate.size()), d);
      if (wants_x)
        shared_gate_backward(x, row, options.shared.scale, tape.shared_weight, dweight, to_x,
                             tape.router, exec);
      if (!gradients.shared_gate.empty())
        shared_gate_backward(
            x, row, options.shared.scale, tape.shared_weight, dweight,
            gate_gradients<float>{gradients.to, {}, {gradients.shared_gate.data(), 1, d}},
            tape.router, exec);
    }
  }
  if constexpr (gate_offers) {
    if (!through_gate) return;
    if (wants_x)
      gate_backward(layer.gate(), x, weights.gate, matrix_view<const float>(dlogits), to_x,
                    tape.router, exec);
    gate_backward(layer.gate(), x, weights.gate, matrix_view<const float>(dlogits),
                  gate_gradients<float>{gradients.to, {}, gradients.gate, gradients.gate_bias},
                  tape.router, exec);
  }
}

}  // namespace moeroute

// A whole mixture-of-experts layer: gate, route, plan, dispatch, experts, combine, with one workspace.
#pragma once

#include <utility>

#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/expert.hpp>
#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/route.hpp>

namespace moeroute {

/// The steps of a layer, as a probe hears of them.
enum class layer_step { gate, route, plan, dispatch, experts, combine, done };

/// Hears of nothing and costs nothing.
struct no_probe {
  void operator()(layer_step) const {}
};

/// y = the weighted sum over each token's chosen experts of expert(x).
///
/// Router is a token_router; Experts an expert_function (float rows in, float rows out), with or without
/// scratch. A layer is used by one caller at a time: it owns the workspace, the assignment and the plan.
template <token_router Router, class Experts, class A = simd::default_arch>
class moe_layer {
 public:
  /// gate: weights [E, d], packed, with the bias if the gate has one.
  ///
  /// Throws: error where router or experts do not fit the gate.
  moe_layer(simd::packed_matrix<A> gate, Router router, Experts experts)
      : gate_(std::move(gate)), router_(std::move(router)), experts_(std::move(experts)) {
    router_.check(gate_.rows());
    // Experts that say how many they are must be as many as the gate's outputs: ids index them unchecked.
    if constexpr (requires { experts_.experts(); })
      check_size("moe_layer", "experts.experts()", experts_.experts(), gate_.rows());
    if constexpr (requires { experts_.d(); })
      check_size("moe_layer", "experts.d()", experts_.d(), gate_.cols());
  }

  /// Runs the layer.
  ///
  /// Shapes: x and y [T, d], each in float, bfloat16 or float16; they may be the same memory.
  /// Throws: error where the shapes do not fit.
  /// Cost: allocates only where T (or the executor's concurrency) exceeds every earlier one, and then at the
  /// start of the call. probe(step) is called as each step begins.
  /// Determinism: the same bits for every executor and thread count.
  template <readable_rows X, writable_rows Y, executor Exec = serial, class Probe = no_probe>
  void forward(const X& x_rows, Y&& y_rows, const Exec& exec = {}, Probe&& probe = {}) {
    const auto x = const_view(x_rows);
    const auto y = view(y_rows);
    check_size("moe_layer", "x.cols()", x.cols, gate_.cols());
    check_size("moe_layer", "y.rows()", y.rows, x.rows);
    check_size("moe_layer", "y.cols()", y.cols, x.cols);
    const int workers = detail::route_workers(exec, x.rows, experts());
    const memory m = reserve(x.rows, workers, exec.concurrency());
    logits_ = matrix_view<float>(m.logits, x.rows, gate_.rows());

    probe(layer_step::gate);
    gate(x, gate_, logits_, exec);
    probe(layer_step::route);
    detail::route_with<A>(router_, const_view(logits_), side_inputs{}, m.route, workers, choices_, exec);
    probe(layer_step::plan);
    moeroute::plan(choices_, plan_);
    const index_t slots = plan_.slots();
    const matrix_view<float> in(m.in, slots, x.cols), out(m.out, slots, x.cols);
    probe(layer_step::dispatch);
    dispatch(x, plan_, in, exec);
    probe(layer_step::experts);
    if constexpr (with_scratch) {
      for_each_expert(plan_, in, out, experts_, m.experts, exec);
    } else {
      for_each_expert(plan_, in, out, experts_, exec);
    }
    probe(layer_step::combine);
    combine(out, plan_, choices_, y, exec);
    probe(layer_step::done);
  }

  index_t experts() const { return gate_.rows(); }
  index_t d() const { return gate_.cols(); }
  const Router& router() const { return router_; }

  /// Of the last call: logits [T, E], valid until the next one.
  matrix_view<const float> logits() const { return logits_; }
  /// Of the last call: every token's experts and weights.
  const assignment& choices() const { return choices_; }
  /// Of the last call: slots and load of every expert.
  const dispatch_plan& plan() const { return plan_; }

 private:
  static constexpr bool with_scratch = expert_function_with_scratch<Experts, float, float>;
  static_assert(with_scratch || expert_function<Experts, float, float>,
                "[moeroute::moe_layer] Experts must be callable as f(expert, in, out)");

  struct memory {
    float* logits;
    float* in;
    float* out;
    float* experts;
    const detail::route_memory<Router, float>* route;
  };

  memory reserve(index_t tokens, int route_workers, int concurrency) {
    const index_t slots = tokens * router_.k();
    index_t expert_scratch = 0;
    if constexpr (with_scratch)
      expert_scratch = experts_.scratch_floats() * worker_slots::count(concurrency);
    choices_.reset(tokens, experts(), router_.k());
    plan_.reset(tokens, experts(), router_.k());
    return workspace_.carve([&](scratch& tape) {
      return memory{tape.take<float>(tokens * experts()), tape.take<float>(slots * d()),
                    tape.take<float>(slots * d()), tape.take<float>(expert_scratch),
                    detail::route_memory<Router, float>::carve(tape, router_, experts(),
                                                               route_workers)};
    });
  }

  simd::packed_matrix<A> gate_;
  Router router_;
  Experts experts_;
  matrix_view<float> logits_;
  assignment choices_;
  dispatch_plan plan_;
  workspace workspace_;
};

}  // namespace moeroute

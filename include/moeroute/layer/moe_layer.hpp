// A whole mixture-of-experts layer: gate, route, capacity, plan, dispatch, experts, combine, with
// memory of its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include <moeroute/layer/layer_tape.hpp>
#include <moeroute/stage/capacity.hpp>
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

/// A layer without shared experts.
struct no_shared_experts {};

/// Experts that are not networks. Ids outside of both ranges belong to the layer's Experts; a
/// constant expert is an expert function like any other.
struct special_experts {
  /// Their output is the token itself: weight * x[t] enters the sum in rank order.
  expert_id identity_first = 0;
  expert_id identity_end = 0;
  /// Their output is zero: the token spends a choice and nothing else.
  expert_id zero_first = 0;
  expert_id zero_end = 0;

  bool any() const { return identity_first < identity_end || zero_first < zero_end; }
  bool contains(index_t e) const {
    return (e >= identity_first && e < identity_end) || (e >= zero_first && e < zero_end);
  }
};

/// Where a choice's weight is applied.
enum class weight_on {
  output,  ///< to what the expert gives
  input,   ///< to what the expert gets (Llama 4)
};

/// What the output of shared experts is multiplied with.
struct shared_expert_weight {
  float scale = 1.0f;
  /// [d], the shared experts' own gate: times sigmoid(x[t] . gate) (Qwen2-MoE, Qwen3-Next). Empty:
  /// the scale alone. The layer keeps a copy.
  std::span<const float> gate{};
};

struct moe_layer_options {
  std::optional<capacity_policy> capacity{};
  special_experts special{};
  weight_on weights = weight_on::output;
  lost_token lost = lost_token::zero;
  shared_expert_weight shared{};
  /// Most rows that an expert is called with at once, 0: all that it has.
  index_t rows_per_call = 0;
};

/// Tokens up to which a layer runs experts on the rows of x itself instead of gathered copies.
inline constexpr index_t decode_tokens = 8;

/// y = the weighted sum over each token's chosen experts of expert(x), plus what shared experts
/// give.
///
/// Router is of any kind; Experts an expert_function (float rows in, float rows out), with or
/// without scratch; Shared one that is called with expert 0 and all tokens, its output is added
/// last, with the weight that options give it. A layer is used by one caller at a time: it owns the
/// workspaces, the assignment and the plan. After an exception it can be used as before.
template <any_kind_of_router Router, class Experts, class Shared = no_shared_experts,
          storage Gate = float, class A = simd::default_arch>
class moe_layer {
 public:
  /// gate: weights [columns, d], packed, with the bias if the gate has one.
  ///
  /// Throws: error where router, experts or options do not fit the gate.
  moe_layer(simd::packed_matrix<Gate, A> gate, Router router, Experts experts,
            const moe_layer_options& options = {}, Shared shared = {})
      : gate_(std::move(gate)),
        router_(std::move(router)),
        experts_(std::move(experts)),
        shared_(std::move(shared)),
        options_(options) {
    if constexpr (!batch_router<Router>) router_.check(gate_.rows());
    const special_experts& s = options_.special;
    const auto total = static_cast<expert_id>(this->experts());
    check_range("moe_layer", "identity_first", s.identity_first, 0, s.identity_end);
    check_range("moe_layer", "identity_end", s.identity_end, 0, total);
    check_range("moe_layer", "zero_first", s.zero_first, 0, s.zero_end);
    check_range("moe_layer", "zero_end", s.zero_end, 0, total);
    if (std::max(s.identity_first, s.zero_first) < std::min(s.identity_end, s.zero_end))
      fail("moe_layer", "identity experts [" + std::to_string(s.identity_first) + ", " +
                            std::to_string(s.identity_end) + ") and zero experts [" +
                            std::to_string(s.zero_first) + ", " + std::to_string(s.zero_end) +
                            ") overlap, expected ranges of their own");
    index_t networks = total;
    if (s.any()) {
      owned_.resize(total);
      networks = 0;
      for (index_t e = 0; e < total; ++e) {
        owned_[e] = s.contains(e) ? 0 : 1;
        if (owned_[e] != 0) networks = e + 1;
      }
    }
    if (options_.capacity) options_.capacity->rule.check();
    const shared_expert_weight& weight = options_.shared;
    if (!with_shared && (weight.scale != 1.0f || !weight.gate.empty()))
      fail("moe_layer", "shared experts have a weight, but there are none");
    if (!std::isfinite(weight.scale))
      fail_value("moe_layer", "shared.scale", weight.scale, "a finite number");
    if (!weight.gate.empty()) {
      check_size("moe_layer", "shared.gate.size()", static_cast<index_t>(weight.gate.size()), d());
      shared_gate_ =
          simd::packed_matrix<float, A>(matrix_view<const float>(weight.gate.data(), 1, d()));
    }
    options_.shared.gate = {};  // ours from here on
    // Experts that say how many they are must cover every id that reaches them: it is not checked.
    if constexpr (requires { experts_.experts(); }) {
      if (s.any()) {
        check_range("moe_layer", "experts.experts()", experts_.experts(), networks, total);
      } else {
        check_size("moe_layer", "experts.experts()", experts_.experts(), total);
      }
    }
    if constexpr (requires { experts_.d(); })
      check_size("moe_layer", "experts.d()", experts_.d(), gate_.cols());
  }

  /// Runs the layer.
  ///
  /// Shapes: x and y [T, d], each in float, bfloat16 or float16; they may be the same memory.
  /// Throws: error where the shapes do not fit; what an expert throws.
  /// Cost: allocates only where T (or the executor's concurrency) exceeds every earlier one, and
  /// then at the start of the call; where the router sees the whole batch, also when it has run. Up
  /// to decode_tokens tokens are not copied. probe(step) is called as each step begins.
  /// Determinism: the same bits for every executor and thread count; the same bits with and without
  /// copies where an expert's rows do not depend on one another.
  template <readable_rows X, writable_rows Y, executor Exec = serial, class Probe = no_probe>
  void forward(const X& x, Y&& y, const Exec& exec = {}, Probe&& probe = {}) {
    forward(x, y, side_inputs{}, exec, std::forward<Probe>(probe));
  }

  /// The same with side inputs: a token mask, ids for tables, a seed.
  template <readable_rows X, writable_rows Y, executor Exec = serial, class Probe = no_probe>
  void forward(const X& x_rows, Y&& y_rows, const side_inputs& side, const Exec& exec = {},
               Probe&& probe = {}) {
    using T = element_of<const X>;
    const matrix_view<const T> x = const_view(x_rows);
    const auto y = view(y_rows);
    check_size("moe_layer", "x.cols()", x.cols, gate_.cols());
    check_size("moe_layer", "y.rows()", y.rows, x.rows);
    check_size("moe_layer", "y.cols()", y.cols, x.cols);
    check_stride("moe_layer", "x", x);
    check_stride("moe_layer", "y", y);
    check_apart_or_same("moe_layer", "x", x, "y", y);
    const index_t tokens = x.rows, columns = gate_.rows();
    const int workers = detail::route_workers(exec, tokens, columns);
    const early_memory early = reserve_early(tokens, workers);
    memory& m = last_;
    if constexpr (!batch_router<Router>) m = reserve(tokens, exec.concurrency());
    logits_.resize(tokens * columns);
    const matrix_view<float> logits(logits_.data(), tokens, columns);
    logit_rows_ = tokens;

    probe(layer_step::gate);
    gate(x, gate_, logits, exec);
    probe(layer_step::route);
    if constexpr (batch_router<Router>) {
      route(router_, logits, side, batch_workspace_, choices_, exec);
      m = reserve(tokens, exec.concurrency());
    } else {
      detail::check_side(side, tokens, columns, side_use_of(router_, columns));
      detail::route_with<A>(router_, const_view(logits), side, early, workers, choices_, exec);
    }
    if (options_.capacity) apply_capacity(choices_, *options_.capacity, capacity_workspace_);
    probe(layer_step::plan);
    plan_options planning;
    if (options_.special.any()) planning.owned = owned_;
    moeroute::plan<A>(choices_, plan_, planning);

    const index_t slots = plan_.slots();
    const matrix_view<float> in(m.in, slots, x.cols), out(m.out, slots, x.cols);
    const bool copied = tokens > decode_tokens || options_.weights == weight_on::input;
    probe(layer_step::dispatch);
    matrix_view<const float> rows(m.in, tokens, x.cols);
    if (copied) {
      dispatch_options moving;
      if (options_.weights == weight_on::input) moving.scale = choices_.weights();
      dispatch(x, plan_, in, exec, moving);
    } else if constexpr (std::is_same_v<T, float>) {
      rows = x;
    } else {
      for (index_t t = 0; t < tokens; ++t)
        simd::convert_row<A>(x.data + t * x.stride, x.cols, m.in + t * x.cols);
    }
    probe(layer_step::experts);
    if (copied) {
      run_copies(in, out, m.experts, exec);
    } else {
      run_in_place(rows, out, m.experts, exec);
    }
    if constexpr (with_shared) {
      run_shared(x, m, exec);
      const std::span<float> weights(m.shared_weight, static_cast<std::size_t>(tokens));
      if (shared_gate_.rows() > 0)
        shared_gate(x, shared_gate_, options_.shared.scale, weights, exec);
      else
        std::fill(weights.begin(), weights.end(), options_.shared.scale);
    }
    probe(layer_step::combine);
    combine_options<T, float> combining;
    if (options_.weights == weight_on::input) combining.weight = combine_weight::one;
    combining.lost = options_.lost;
    combining.identity_first = options_.special.identity_first;
    combining.identity_end = options_.special.identity_end;
    combining.x = x;
    if constexpr (with_shared) {
      combining.shared = matrix_view<const float>(m.shared_out, tokens, x.cols);
      combining.shared_weight = {m.shared_weight, static_cast<std::size_t>(tokens)};
    }
    combine(out, plan_, choices_, y, exec, combining);
    probe(layer_step::done);
  }

  /// The same, and the tape keeps what backward() needs (layer/moe_layer_backward.hpp). The call's
  /// logits, choices and plan are the tape's then; the layer's accessors have none.
  template <readable_rows X, writable_rows Y, executor Exec = serial, class Probe = no_probe>
  void forward(const X& x, Y&& y, const side_inputs& side, const Exec& exec, layer_tape& tape,
               Probe&& probe = {}) {
    forward(x, y, side, exec, probe);
    const index_t tokens = logit_rows_, slots = plan_.slots();
    std::swap(choices_, tape.choices);
    std::swap(plan_, tape.plan);
    std::swap(logits_, tape.logit_values);
    std::swap(workspace_, tape.memory);
    tape.tokens = tokens;
    tape.logits = {tape.logit_values.data(), tokens, gate_.rows()};
    logit_rows_ = 0;
    tape.in = {last_.in, slots, d()};
    tape.out = {last_.out, slots, d()};
    tape.has_inputs = tokens > decode_tokens || options_.weights == weight_on::input;
    tape.shared_out = {};
    tape.shared_weight = {};
    if constexpr (with_shared) {
      tape.shared_out = {last_.shared_out, tokens, d()};
      tape.shared_weight = {last_.shared_weight, static_cast<std::size_t>(tokens)};
    }
    last_ = {};
  }

  index_t experts() const {
    if constexpr (requires { router_.experts(index_t{}); }) {
      return router_.experts(gate_.rows());
    } else {
      return gate_.rows();
    }
  }
  index_t d() const { return gate_.cols(); }
  const Router& router() const { return router_; }
  /// The gate's weights after a step of training, [columns, d]. Throws: error where the shape
  /// differs.
  void set_gate(matrix_view<const Gate> w) {
    check_size("moe_layer", "w.rows()", w.rows, gate_.rows());
    gate_.set_rows(0, w);
  }
  const moe_layer_options& options() const { return options_; }

  /// Of the last call: logits [T, columns of the gate], valid until the next one.
  matrix_view<const float> logits() const { return {logits_.data(), logit_rows_, gate_.rows()}; }
  /// Of the last call: every token's experts and weights.
  const assignment& choices() const { return choices_; }
  /// Of the last call: slots and load of every expert.
  const dispatch_plan& plan() const { return plan_; }

 private:
  static constexpr bool with_scratch = expert_function_with_scratch<Experts, float, float>;
  static_assert(with_scratch || expert_function<Experts, float, float>,
                "[moeroute::moe_layer] Experts must be callable as f(expert, in, out)");
  static constexpr bool with_shared = !std::is_same_v<Shared, no_shared_experts>;
  static constexpr bool shared_with_scratch = expert_function_with_scratch<Shared, float, float>;
  static_assert(!with_shared || shared_with_scratch || expert_function<Shared, float, float>,
                "[moeroute::moe_layer] Shared must be callable as f(0, in, out)");
  // Tokens that pass through the shared experts at a time.
  static constexpr index_t shared_tile = 96;

  template <class R>
  struct route_memory_of {
    using type = detail::route_memory<R, float>;
  };
  template <batch_router R>
  struct route_memory_of<R> {
    using type = std::byte;  // a batch router carves for itself
  };
  using early_memory = const typename route_memory_of<Router>::type*;
  struct memory {
    float* in;
    float* out;
    float* experts;
    float* shared_in;
    float* shared_out;
    float* shared_weight;
    float* shared;
  };

  // What is known before the router has run.
  early_memory reserve_early(index_t tokens, int workers) {
    const index_t columns = gate_.rows();
    if constexpr (ragged_router<Router>) {
      choices_.reset_ragged(tokens, experts(), router_.max_choices(columns));
    } else if constexpr (!batch_router<Router>) {
      choices_.reset(tokens, experts(), router_.k());
    }
    if constexpr (batch_router<Router>) {
      return nullptr;
    } else {
      return early_workspace_.carve([&](scratch& tape) -> early_memory {
        return detail::route_memory<Router, float>::carve(tape, router_, columns, workers);
      });
    }
  }

  // The rest, for as many choices as there is room for.
  memory reserve(index_t tokens, int concurrency) {
    const index_t slots = choices_.room();
    plan_.reset(tokens, experts(), choices_.k(), slots, slots);
    if (options_.capacity)
      capacity_workspace_.carve([&](scratch& tape) {
        return detail::capacity_memory::carve(tape, choices_, options_.capacity->order);
      });
    const index_t workers = worker_slots::count(concurrency);
    index_t expert_scratch = 0, shared_scratch = 0, shared_rows = 0;
    if constexpr (with_scratch) expert_scratch = experts_.scratch_floats() * workers;
    if constexpr (shared_with_scratch) shared_scratch = shared_.scratch_floats() * workers;
    if constexpr (with_shared) shared_rows = tokens;
    return workspace_.carve([&](scratch& tape) {
      return memory{tape.take<float>(std::max(slots, tokens) * d()),
                    tape.take<float>(slots * d()),
                    tape.take<float>(expert_scratch),
                    tape.take<float>(shared_rows > 0 ? workers * shared_tile * d() : 0),
                    tape.take<float>(shared_rows * d()),
                    tape.take<float>(shared_rows),
                    tape.take<float>(shared_scratch)};
    });
  }

  template <class Exec>
  void run_copies(const matrix_view<float>& in, const matrix_view<float>& out,
                  float* scratch_memory, const Exec& exec) {
    const expert_options cut{.rows_per_call = options_.rows_per_call};
    if constexpr (with_scratch) {
      for_each_expert(plan_, in, out, experts_, scratch_memory, exec, cut);
    } else {
      for_each_expert(plan_, in, out, experts_, exec, cut);
    }
  }

  template <class Exec>
  void run_in_place(const matrix_view<const float>& x, const matrix_view<float>& out,
                    float* scratch_memory, const Exec& exec) {
    if constexpr (with_scratch) {
      for_each_expert(plan_, choices_, x, out, experts_, scratch_memory, exec);
    } else {
      for_each_expert(plan_, choices_, x, out, experts_, exec);
    }
  }

  template <class T, class Exec>
  void run_shared(const matrix_view<const T>& x, const memory& m, const Exec& exec) {
    worker_slots workers(exec.concurrency());
    exec.parallel_for(x.rows, shared_tile, [&](index_t begin, index_t end) {
      const worker_slots::held worker(workers);
      matrix_view<const float> in;
      if constexpr (std::is_same_v<T, float>) {
        in = x.middle_rows(begin, end - begin);
      } else {
        float* const wide = m.shared_in + worker * shared_tile * d();
        for (index_t t = begin; t < end; ++t)
          simd::convert_row<A>(x.data + t * x.stride, x.cols, wide + (t - begin) * x.cols);
        in = matrix_view<const float>(wide, end - begin, x.cols);
      }
      const matrix_view<float> out(m.shared_out + begin * d(), end - begin, d());
      if constexpr (shared_with_scratch) {
        shared_(expert_id{0}, in, out, m.shared + worker * shared_.scratch_floats());
      } else {
        shared_(expert_id{0}, in, out);
      }
    });
  }

  simd::packed_matrix<Gate, A> gate_;
  simd::packed_matrix<float, A> shared_gate_;
  Router router_;
  Experts experts_;
  Shared shared_;
  moe_layer_options options_;
  buffer<std::uint8_t> owned_;
  buffer<float> logits_;  // a view would be the original's in a copy
  index_t logit_rows_ = 0;
  assignment choices_;
  dispatch_plan plan_;
  workspace early_workspace_;
  workspace batch_workspace_;
  workspace capacity_workspace_;
  workspace workspace_;
  memory last_{};  // of the last call, in workspace_
};

}  // namespace moeroute

// A whole mixture-of-experts layer: gate, route, capacity, plan, dispatch, experts, combine, with
// memory of its own.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>

#include <moeroute/layer/layer_tape.hpp>
#include <moeroute/layer/moe_layer_options.hpp>
#include <moeroute/stage/capacity.hpp>
#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/expert.hpp>
#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/route.hpp>

namespace moeroute {

namespace detail {

// Experts that can keep what their backward pass reads: kept_floats() for each of their rows.
template <class F>
concept expert_function_that_keeps = requires(F& f, expert_id e, matrix_view<const float> in,
                                              matrix_view<float> rows, float* memory) {
  { f.kept_floats() } -> std::convertible_to<index_t>;
  f(e, in, rows, rows, memory);
};

// Where a call's logits come from: rows that the gate reads, outside, or nowhere.
template <class T>
struct gated_rows {
  matrix_view<const T> rows;
};
struct given_logits {
  matrix_view<const float> logits;
};

}  // namespace detail

/// What a layer takes for a router: what route() takes.
template <class R>
concept router_of_a_layer = any_kind_of_router<R> || detail::run_time_router<R>;

/// y = the weighted sum over each token's chosen experts of expert(x), plus what shared experts
/// give.
///
/// Router is of any kind, picked at run time too; Experts an expert_function (float rows in, float
/// rows out), with or without scratch; Shared one that is called with expert 0 and all tokens, its
/// output is added last, with the weight that options give it; Gate a gate_function, a gate_ref to
/// one that others use too, or no_gate. A layer is used by one caller at a time: it owns the
/// workspaces, the assignment and the plan. After an exception it can be used as before.
/// Example:
///
///     const simd::packed_matrix<> w(view(gate_weight));
///     moe_layer layer(linear_gate<>(w), router{softmax{}, top_k{.k = 2}, sum_normalized},
///                     [&](expert_id e, auto rows, auto result) { run_expert(e, rows, result); });
///     layer.forward(x, y);
template <router_of_a_layer Router, class Experts, class Shared = no_shared_experts,
          class Gate = linear_gate<>, class A = simd::default_arch>
class moe_layer {
 public:
  /// gate: weights [columns, d], packed, with the bias if the gate has one; or any gate.
  ///
  /// Throws: error where router, experts or options do not fit the gate.
  moe_layer(Gate gate, Router router, Experts experts, const moe_layer_options& options = {},
            Shared shared = {})
      : gate_(std::move(gate)),
        router_(std::move(router)),
        experts_(std::move(experts)),
        shared_(std::move(shared)),
        options_(options) {
    check_router(router_);
    if constexpr (gated) {
      if (options_.d == 0) options_.d = gate_.d();
    } else if constexpr (requires { experts_.d(); }) {
      if (options_.d == 0) options_.d = experts_.d();
    }
    if (options_.d_out == 0) options_.d_out = options_.d;
    if constexpr (requires { experts_.d_out(); }) {
      if (options.d_out == 0) options_.d_out = experts_.d_out();
      check_size("moe_layer", "experts.d_out()", experts_.d_out(), options_.d_out);
    }
    const auto total = this->experts();
    detail::check_options(options_, total, with_shared);
    const special_experts& s = options_.special;
    index_t networks = total;
    if (s.any()) {
      owned_.resize(total);
      networks = 0;
      for (index_t e = 0; e < total; ++e) {
        owned_[e] = s.contains(e) ? 0 : 1;
        if (owned_[e] != 0) networks = e + 1;
      }
    }
    const shared_expert_weight& weight = options_.shared;
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
      check_size("moe_layer", "experts.d()", experts_.d(), d());
  }

  /// Runs the layer.
  ///
  /// Shapes: x [T, d] and y [T, d_out], each in float, bfloat16 or float16; they may be the same
  /// memory.
  /// Throws: error where the shapes do not fit, or the layer has no gate and a router that reads
  /// logits; what an expert throws.
  /// Cost: allocates only where T (or the executor's concurrency) exceeds every earlier one, and
  /// then at the start of the call; where the router sees the whole batch, also when it has run. Up
  /// to decode_tokens tokens are not copied. Without a gate there are no logits: no product, and no
  /// memory for any. probe(step) is called as each step begins.
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
    const auto x = const_view(x_rows);
    if constexpr (gated) {
      check_size("moe_layer", "x.cols()", x.cols, gate_.d());
      run(x, detail::gated_rows<element_of<const X>>{x}, view(y_rows), side, exec, probe);
    } else {
      check_unread();
      run(x, given_nothing{}, view(y_rows), side, exec, probe);
    }
  }

  /// The same with rows of its own for the router: the experts read x, the gate r.
  ///
  /// Shapes: r [T, d of the gate]; its type may be another than that of x. Example, a router that
  /// reads what attention read (SmallThinker): layer.forward(h, attention_input, y);
  template <readable_rows X, readable_rows R, writable_rows Y, executor Exec = serial,
            class Probe = no_probe>
    requires(!executor<Y>)
  void forward(const X& x, const R& r, Y&& y, const side_inputs& side = {}, const Exec& exec = {},
               Probe&& probe = {}) {
    run(const_view(x), own_rows(const_view(r)), view(y), side, exec, probe);
  }

  /// The same with logits that were made outside, [T, columns] in float. Any router may be in a
  /// layer with no_gate then; logits() has none.
  template <readable_rows X, readable_rows Z, writable_rows Y, executor Exec = serial,
            class Probe = no_probe>
  void forward_logits(const X& x, const Z& logits, Y&& y, const side_inputs& side = {},
                      const Exec& exec = {}, Probe&& probe = {}) {
    static_assert(std::is_same_v<element_of<const Z>, float>,
                  "[moeroute::moe_layer] logits from outside are float");
    run(const_view(x), detail::given_logits{const_view(logits)}, view(y), side, exec, probe);
  }

  /// forward(), and the tape keeps what backward() needs (layer/moe_layer_backward.hpp). The call's
  /// logits, choices and plan are the tape's then; the layer's accessors have none.
  template <readable_rows X, writable_rows Y, executor Exec = serial, class Probe = no_probe>
  void forward(const X& x, Y&& y, const side_inputs& side, const Exec& exec, layer_tape& tape,
               Probe&& probe = {}) {
    const keeping held(keep_, tape);
    forward(x, y, side, exec, probe);
    record(tape, gated);
  }

  /// The same with r: the gradients end at the logits (layer_gradients::logits).
  template <readable_rows X, readable_rows R, writable_rows Y, executor Exec = serial,
            class Probe = no_probe>
    requires(!executor<Y>)
  void forward(const X& x, const R& r, Y&& y, const side_inputs& side, const Exec& exec,
               layer_tape& tape, Probe&& probe = {}) {
    const keeping held(keep_, tape);
    forward(x, r, y, side, exec, probe);
    record(tape, false);
  }

  /// The same with logits, which must still be there when the layer is run backwards.
  template <readable_rows X, readable_rows Z, writable_rows Y, executor Exec = serial,
            class Probe = no_probe>
  void forward_logits(const X& x, const Z& logits, Y&& y, const side_inputs& side, const Exec& exec,
                      layer_tape& tape, Probe&& probe = {}) {
    const keeping held(keep_, tape);
    forward_logits(x, logits, y, side, exec, probe);
    record(tape, false);
    tape.logits = {const_cast<float*>(const_view(logits).data), tape.tokens, gate_.columns(),
                   const_view(logits).stride};
  }

  index_t experts() const { return experts_of(router_); }
  index_t d() const { return options_.d; }
  index_t d_out() const { return options_.d_out; }
  const Router& router() const { return router_; }
  /// Another router for the same gate and experts: after a step of training that moved a number of
  /// its own, or with another k. Tapes of earlier calls are run backwards before. With more choices
  /// the next call may allocate. Throws: error where it does not fit them.
  void set_router(Router other) {
    check_router(other);
    check_size("moe_layer", "router.experts()", experts_of(other), experts());
    router_ = std::move(other);
  }
  const Gate& gate() const { return gate_; }
  /// The gate's weights after a step of training, [columns, d]. Throws: error where the shape
  /// differs.
  template <class W>
    requires requires(Gate& g, matrix_view<const W> w) { g.set_weight(w); }
  void set_gate(matrix_view<W> w) {
    gate_.set_weight(matrix_view<const W>(w));
  }
  /// Another gate of the same shape. Throws: error where it is not.
  void set_gate(Gate other) {
    check_size("moe_layer", "gate.columns()", other.columns(), gate_.columns());
    if constexpr (gated) check_size("moe_layer", "gate.d()", other.d(), gate_.d());
    gate_ = std::move(other);
  }
  const moe_layer_options& options() const { return options_; }

  /// Of the last call: logits [T, columns of the gate], valid until the next one; no rows where it
  /// computed none.
  matrix_view<const float> logits() const { return {logits_.data(), logit_rows_, gate_.columns()}; }
  /// Of the last call: every token's experts and weights.
  const assignment& choices() const { return choices_; }
  /// Of the last call: slots and load of every expert.
  const dispatch_plan& plan() const { return plan_; }

 private:
  void check_router(const Router& r) const {
    if constexpr (detail::run_time_router<Router>) {
      check_size("moe_layer", "gate.columns()", gate_.columns(), r.columns());
    } else if constexpr (!batch_router<Router>) {
      r.check(gate_.columns());
    }
  }
  index_t experts_of(const Router& r) const {
    if constexpr (detail::run_time_router<Router>) {
      return r.as_ragged_router().experts(gate_.columns());
    } else if constexpr (requires { r.experts(index_t{}); }) {
      return r.experts(gate_.columns());
    } else {
      return gate_.columns();
    }
  }

  static constexpr bool with_scratch = expert_function_with_scratch<Experts, float, float>;
  static_assert(with_scratch || expert_function<Experts, float, float>,
                "[moeroute::moe_layer] Experts must be callable as f(expert, in, out)");
  static constexpr bool with_shared = !std::is_same_v<Shared, no_shared_experts>;
  static constexpr bool shared_with_scratch = expert_function_with_scratch<Shared, float, float>;
  static_assert(!with_shared || shared_with_scratch || expert_function<Shared, float, float>,
                "[moeroute::moe_layer] Shared must be callable as f(0, in, out)");
  static constexpr bool with_kept = with_scratch && detail::expert_function_that_keeps<Experts>;
  // Tokens that pass through the shared experts at a time.
  static constexpr index_t shared_tile = 96;

  static constexpr bool gated = !std::is_same_v<Gate, no_gate>;
  static constexpr bool gate_wants_scratch = gate_function_with_scratch<Gate>;
  static_assert(any_gate<Gate> || !gated,
                "[moeroute::moe_layer] Gate must say columns() and d() and be callable as "
                "gate(x, logits, exec)");

  struct given_nothing {};
  // Whether experts keep activations is the tape's to say, for one call.
  struct keeping {
    bool& flag;
    keeping(bool& f, const layer_tape& tape) : flag(f) { flag = tape.keep_activations; }
    ~keeping() { flag = false; }
  };
  // Experts that are handed the rows of `kept` beside those of their output.
  struct keeping_experts {
    Experts* experts;
    matrix_view<float> kept;
    const float* out;

    index_t scratch_floats() const { return experts->scratch_floats(); }
    void operator()(expert_id e, matrix_view<const float> in, matrix_view<float> y,
                    float* scratch_memory) const {
      const index_t first = (y.data - out) / y.stride;
      (*experts)(e, in, y,
                 kept.data == nullptr ? matrix_view<float>{} : kept.middle_rows(first, y.rows),
                 scratch_memory);
    }
  };
  struct memory {
    float* in;
    float* out;
    float* kept;
    float* experts;
    float* shared_in;
    float* shared_out;
    float* shared_weight;
    float* shared;
  };

  template <class T>
  detail::gated_rows<T> own_rows(const matrix_view<const T>& r) const {
    static_assert(gated, "[moeroute::moe_layer] a layer without a gate reads no rows for it");
    check_size("moe_layer", "r.cols()", r.cols, gate_.d());
    return {r};
  }

  void check_unread() const {
    if (moeroute::reads_logits(router_)) [[unlikely]]
      fail("moe_layer",
           "the router reads logits, and there is no gate: give it one, or take "
           "forward_logits");
  }

  // The logits of a call, which stay in the layer where it makes them.
  template <class Source, class Exec, class Probe>
  matrix_view<const float> make_logits(const Source& from, index_t tokens, const Exec& exec,
                                       Probe& probe) {
    const index_t columns = gate_.columns();
    if constexpr (std::is_same_v<Source, given_nothing>) {
      return {nullptr, tokens, columns, 0};
    } else if constexpr (std::is_same_v<Source, detail::given_logits>) {
      return from.logits;
    } else {
      const matrix_view<float> logits(logits_.data(), tokens, columns);
      logit_rows_ = tokens;
      probe(layer_step::gate);
      if constexpr (gate_wants_scratch) {
        float* const of_gate = gate_workspace_.carve(
            [&](scratch& tape) { return tape.take<float>(gate_.scratch_floats(tokens)); });
        gate_(from.rows, logits, of_gate, exec);
      } else {
        gate_(from.rows, logits, exec);
      }
      return logits;
    }
  }

  // Everything of a call up to its choices. What can be known before the router runs is reserved
  // before the gate does.
  template <class Kind, class Source, class Exec, class Probe>
  memory decide(const Kind& kind, const Source& from, index_t tokens, const side_inputs& side,
                const Exec& exec, Probe& probe) {
    const index_t columns = gate_.columns();
    logit_rows_ = 0;
    if constexpr (requires { from.rows; }) logits_.resize(tokens * columns);
    if constexpr (batch_router<Kind>) {
      const auto logits = make_logits(from, tokens, exec, probe);
      probe(layer_step::route);
      route(kind, logits, side, batch_workspace_, choices_, exec);
      return reserve(tokens, exec.concurrency());
    } else {
      const int workers = detail::route_workers(exec, tokens, columns);
      if constexpr (ragged_router<Kind>) {
        choices_.reset_ragged(tokens, experts(), kind.max_choices(columns));
      } else {
        choices_.reset(tokens, experts(), kind.k());
      }
      const auto* memories = early_workspace_.carve([&](scratch& tape) {
        return detail::route_memory<Kind, float>::carve(tape, kind, columns, workers);
      });
      const memory m = reserve(tokens, exec.concurrency());
      const auto logits = make_logits(from, tokens, exec, probe);
      probe(layer_step::route);
      detail::check_side(side, tokens, columns, side_use_of(kind, columns));
      detail::route_with<A>(kind, logits, side, memories, workers, choices_, exec);
      return m;
    }
  }

  template <class T, class Source, class U, class Exec, class Probe>
  void run(const matrix_view<const T>& x, const Source& from, const matrix_view<U>& y,
           const side_inputs& side, const Exec& exec, Probe& probe) {
    check_size("moe_layer", "x.cols()", x.cols, d());
    check_size("moe_layer", "y.rows()", y.rows, x.rows);
    check_size("moe_layer", "y.cols()", y.cols, d_out());
    check_stride("moe_layer", "x", x);
    check_stride("moe_layer", "y", y);
    check_apart_or_same("moe_layer", "x", x, "y", y);
    if constexpr (std::is_same_v<Source, detail::given_logits>) {
      check_size("moe_layer", "logits.rows()", from.logits.rows, x.rows);
      check_size("moe_layer", "logits.cols()", from.logits.cols, gate_.columns());
      check_stride("moe_layer", "logits", from.logits);
    } else if constexpr (requires { from.rows; }) {
      check_size("moe_layer", "r.rows()", from.rows.rows, x.rows);
      check_stride("moe_layer", "r", from.rows);
    }
    const index_t tokens = x.rows;
    memory& m = last_;
    if constexpr (detail::run_time_router<Router>) {
      if (router_.ragged()) {
        m = decide(router_.as_ragged_router(), from, tokens, side, exec, probe);
      } else {
        m = decide(router_.as_token_router(), from, tokens, side, exec, probe);
      }
    } else {
      m = decide(router_, from, tokens, side, exec, probe);
    }
    if (options_.capacity) apply_capacity<A>(choices_, *options_.capacity, capacity_workspace_);
    probe(layer_step::plan);
    plan_options planning;
    if (options_.special.any()) planning.owned = owned_;
    moeroute::plan<A>(choices_, plan_, planning);

    const index_t slots = plan_.slots();
    const matrix_view<float> in(m.in, slots, d()), out(m.out, slots, d_out());
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
    combining.output = options_.output;
    combining.lost = options_.lost;
    combining.identity_first = options_.special.identity_first;
    combining.identity_end = options_.special.identity_end;
    combining.x = x;
    if constexpr (with_shared) {
      combining.shared = matrix_view<const float>(m.shared_out, tokens, d_out());
      combining.shared_weight = {m.shared_weight, static_cast<std::size_t>(tokens)};
    }
    combine(out, plan_, choices_, y, exec, combining);
    probe(layer_step::done);
  }

  // Gives the last call's memory to a tape.
  void record(layer_tape& tape, bool from_gate) {
    const index_t tokens = choices_.tokens(), slots = plan_.slots();
    std::swap(choices_, tape.choices);
    std::swap(plan_, tape.plan);
    std::swap(logits_, tape.logit_values);
    std::swap(workspace_, tape.memory);
    tape.tokens = tokens;
    tape.gated = from_gate;
    tape.logits = {logit_rows_ > 0 ? tape.logit_values.data() : nullptr, tokens, gate_.columns()};
    logit_rows_ = 0;
    tape.in = {last_.in, slots, d()};
    tape.out = {last_.out, slots, d_out()};
    tape.kept = {};
    if (kept_floats() > 0) tape.kept = {last_.kept, slots, kept_floats()};
    tape.has_inputs = tokens > decode_tokens || options_.weights == weight_on::input;
    tape.shared_out = {};
    tape.shared_weight = {};
    if constexpr (with_shared) {
      tape.shared_out = {last_.shared_out, tokens, d_out()};
      tape.shared_weight = {last_.shared_weight, static_cast<std::size_t>(tokens)};
    }
    last_ = {};
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
                    tape.take<float>(slots * d_out()),
                    tape.take<float>(slots * kept_floats()),
                    tape.take<float>(expert_scratch),
                    tape.take<float>(shared_rows > 0 ? workers * shared_tile * d() : 0),
                    tape.take<float>(shared_rows * d_out()),
                    tape.take<float>(shared_rows),
                    tape.take<float>(shared_scratch)};
    });
  }

  // Of a slot, in this call.
  index_t kept_floats() const {
    if constexpr (with_kept) {
      return keep_ ? experts_.kept_floats() : 0;
    } else {
      return 0;
    }
  }

  // What runs the experts, and keeps what the call's tape wants of them.
  decltype(auto) running(const matrix_view<float>& out) {
    if constexpr (with_kept) {
      matrix_view<float> kept;
      if (kept_floats() > 0) kept = {last_.kept, out.rows, kept_floats()};
      return keeping_experts{&experts_, kept, out.data};
    } else {
      return (experts_);
    }
  }

  template <class Exec>
  void run_copies(const matrix_view<float>& in, const matrix_view<float>& out,
                  float* scratch_memory, const Exec& exec) {
    const expert_options cut{.rows_per_call = options_.rows_per_call};
    if constexpr (with_scratch) {
      for_each_expert(plan_, in, out, running(out), scratch_memory, exec, cut);
    } else {
      for_each_expert(plan_, in, out, experts_, exec, cut);
    }
  }

  template <class Exec>
  void run_in_place(const matrix_view<const float>& x, const matrix_view<float>& out,
                    float* scratch_memory, const Exec& exec) {
    if constexpr (with_scratch) {
      for_each_expert(plan_, choices_, x, out, running(out), scratch_memory, exec);
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
      const matrix_view<float> out(m.shared_out + begin * d_out(), end - begin, d_out());
      if constexpr (shared_with_scratch) {
        shared_(expert_id{0}, in, out, m.shared + worker * shared_.scratch_floats());
      } else {
        shared_(expert_id{0}, in, out);
      }
    });
  }

  Gate gate_;
  simd::packed_matrix<float, A> shared_gate_;
  Router router_;
  Experts experts_;
  Shared shared_;
  moe_layer_options options_;
  buffer<std::uint8_t> owned_;
  buffer<float> logits_;  // a view would be the original's in a copy
  index_t logit_rows_ = 0;
  bool keep_ = false;  // activations, in the call that runs
  assignment choices_;
  dispatch_plan plan_;
  workspace early_workspace_;
  workspace gate_workspace_;
  workspace batch_workspace_;
  workspace capacity_workspace_;
  workspace workspace_;
  memory last_{};  // of the last call, in workspace_
};

template <storage W, class A, class Router, class Experts, class Shared = no_shared_experts>
moe_layer(simd::packed_matrix<W, A>, Router, Experts, const moe_layer_options& = {}, Shared = {})
    -> moe_layer<Router, Experts, Shared, linear_gate<W, A>, A>;
template <class Gate, class Router, class Experts, class Shared = no_shared_experts>
moe_layer(Gate, Router, Experts, const moe_layer_options& = {}, Shared = {})
    -> moe_layer<Router, Experts, Shared, Gate>;

}  // namespace moeroute

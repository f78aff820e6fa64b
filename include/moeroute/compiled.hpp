// The compiled library for C++: the calls of moeroute.h with handles that free themselves, spans
// and exceptions. Needs moeroute::compiled to link; includes none of the other headers, and
// compiles under any flags, -ffast-math and -fno-exceptions among them.
#pragma once

#if !defined(__cpp_concepts) || __cpp_concepts < 201907L
#error \
    "[moeroute] this face is C++20: compile with -std=c++20 or later, or call moeroute.h, which is C"
#include <moeroute stops here: the error above says why>
#endif

#include <cstdint>
#include <span>

#include <moeroute.h>

namespace moeroute::compiled {

using spec = moeroute_spec;
using capacity = moeroute_capacity;
using capacity_result = moeroute_capacity_result;
using plan_options = moeroute_plan_options;
using expert_lists = moeroute_expert_lists;
using combine_options = moeroute_combine_options;
using losses = moeroute_losses;
using bias_options = moeroute_bias_options;

/// Throws std::invalid_argument, std::bad_alloc or std::runtime_error with moeroute_last_error().
/// It is in the library: what is compiled without exceptions may call it, and ends there.
[[noreturn]] MOEROUTE_API void fail(int status);
[[noreturn]] MOEROUTE_API void refuse(const char* sentence);

inline void check(int status) {
  if (status != MOEROUTE_OK) [[unlikely]]
    fail(status);
}

/// Rows to read, s elements apart (0: side by side): floats, or values of the type that is named.
struct const_rows : moeroute_const_matrix {
  const_rows() : moeroute_const_matrix{} {}
  const_rows(const float* first, std::int64_t r, std::int64_t c, std::int64_t s = 0)
      : const_rows(first, MOEROUTE_FLOAT, r, c, s) {}
  template <class T>
  const_rows(const T* first, moeroute_type of, std::int64_t r, std::int64_t c, std::int64_t s = 0)
      : moeroute_const_matrix{first, r, c, s, of} {}
  const_rows(const moeroute_matrix& m)
      : moeroute_const_matrix{m.data, m.rows, m.cols, m.stride, m.type} {}
};

/// Rows to write, likewise.
struct rows : moeroute_matrix {
  rows() : moeroute_matrix{} {}
  rows(float* first, std::int64_t r, std::int64_t c, std::int64_t s = 0)
      : rows(first, MOEROUTE_FLOAT, r, c, s) {}
  template <class T>
  rows(T* first, moeroute_type of, std::int64_t r, std::int64_t c, std::int64_t s = 0)
      : moeroute_matrix{first, r, c, s, of} {}
};

/// A pool of the caller's: run(n, grain, body) calls body(begin, end) for ranges that cover [0, n)
/// once and begin at multiples of grain, and returns when all have returned. Refers to run.
class executor {
 public:
  executor() = default;  ///< the calling thread
  template <class Run>
  executor(Run& run, int threads)
      : with_{[](void* pool, std::int64_t n, std::int64_t grain, moeroute_body body, void* loop) {
                (*static_cast<Run*>(pool))(
                    n, grain, [body, loop](std::int64_t b, std::int64_t e) { body(loop, b, e); });
              },
              &run, threads} {}

  const moeroute_executor* get() const { return with_.run == nullptr ? nullptr : &with_; }

 private:
  moeroute_executor with_{};
};

namespace detail {

/// A handle of the C face that is freed with its owner.
template <class Handle, int (*free_handle)(Handle*)>
class owned {
 public:
  owned() = default;
  owned(owned&& other) noexcept : handle_(other.handle_) { other.handle_ = nullptr; }
  owned& operator=(owned&& other) noexcept {
    Handle* const mine = handle_;
    handle_ = other.handle_;
    other.handle_ = mine;
    return *this;
  }
  ~owned() { free_handle(handle_); }

  Handle* get() const { return handle_; }
  Handle** place() { return &handle_; }

 private:
  Handle* handle_ = nullptr;
};

template <class T>
std::span<const T> list(const T* first, std::int64_t size) {
  return {first, static_cast<std::size_t>(first == nullptr ? 0 : size)};
}

}  // namespace detail

/// The plain softmax router over eight experts, k = 2: a description to change.
inline spec plain_spec() {
  spec s;
  check(moeroute_spec_init(&s));
  return s;
}

/// The router of a published model. Throws: std::invalid_argument where the catalogue has no such
/// name, or its rule has words that a description does not have.
inline spec spec_of_model(const char* name) {
  spec s;
  check(moeroute_spec_of_model(name, &s));
  return s;
}

namespace detail {

// A rule over the batch as a description names it; -1: it has no name for the rule.
template <class RouterSpec>
std::int32_t batch_selection(const RouterSpec& from) {
  using kind = decltype(from.selection);
  switch (from.selection) {
    case kind::expert_choice: return MOEROUTE_EXPERT_CHOICE;
    case kind::sinkhorn: return MOEROUTE_SINKHORN;
    case kind::sinkhorn_expert_choice: return MOEROUTE_SINKHORN_EXPERT_CHOICE;
    case kind::selective_sinkhorn: return MOEROUTE_SELECTIVE_SINKHORN;
    case kind::base: return MOEROUTE_BASE;
    default: return -1;
  }
}

// The number of its scaling, whose temperature, tolerance and iterations have fields of their own;
// -1: it has none.
template <class RouterSpec>
std::int32_t plan_scaling(const RouterSpec& from) {
  using kind = decltype(from.selection);
  const auto is = [&](auto scaling) {
    scaling.temperature = from.plan.temperature;
    scaling.tolerance = from.plan.tolerance;
    scaling.most_iterations = from.plan.most_iterations;
    return scaling == from.plan;
  };
  const auto megatron = plain_spec(kind::sinkhorn).plan;
  const auto selective = plain_spec(kind::selective_sinkhorn).plan;
  auto projection = selective;  // V-MoE's
  projection.stop = megatron.stop;
  if (is(from.selection == kind::selective_sinkhorn ? selective : megatron)) return 0;
  return is(projection) ? 1 : -1;
}

// Whether the spec says no more of a rule over the batch than a description can.
template <class RouterSpec>
bool can_describe_batch(const RouterSpec& from) {
  using kind = decltype(from.selection);
  if (batch_selection(from) < 0 || plan_scaling(from) < 0) return false;
  RouterSpec said = plain_spec(from.selection);
  said.experts = from.experts;
  said.k = from.k;
  said.gate_bias = from.gate_bias;
  said.plan = from.plan;
  if (from.selection == kind::expert_choice) {
    if (static_cast<int>(from.score) > MOEROUTE_SIGMOID ||
        static_cast<int>(from.normalize) > MOEROUTE_NORMALIZE_SUM)
      return false;
    said.score = from.score;
    said.normalize = from.normalize;
    said.eps_where = from.eps_where;
    said.eps = from.eps;
    said.scale = from.scale;
    said.sequence = from.sequence;
    said.max_k = from.max_k;
  }
  if (from.selection == kind::expert_choice || from.selection == kind::sinkhorn_expert_choice) {
    said.take = from.take;
    said.take.at_least = RouterSpec{}.take.at_least;
  } else {
    said.phase = from.phase;
  }
  said.plan_weights = from.plan_weights;
  said.probability = from.probability;
  said.solver = from.solver;
  said.rounds = from.rounds;
  return said == from;
}

// Writes the fields of a rule over the batch, behind those that all rules have.
template <class RouterSpec>
void describe_batch(const RouterSpec& from, spec& to) {
  if (batch_selection(from) >= 0) to.selection = batch_selection(from);
  if (to.selection == MOEROUTE_BASE) to.k = 1;
  if (to.normalize == MOEROUTE_NORMALIZE_NONE) to.eps = 0.0f;
  to.capacity = from.take.fixed;
  to.capacity_rounding = static_cast<std::int32_t>(from.take.rounding);
  to.capacity_factor = from.take.factor;
  to.capacity_multiple = from.take.multiple_of;
  to.sequence_length = from.sequence;
  to.most_experts = from.max_k;
  to.scaling = plan_scaling(from);
  to.plan_weights = static_cast<std::int32_t>(from.plan_weights);
  to.evaluation = from.phase != RouterSpec{}.phase;
  to.plan_temperature = from.plan.temperature;
  to.plan_tolerance = from.plan.tolerance;
  to.plan_iterations = from.plan.most_iterations;
  to.probability = from.probability;
  to.optimal = static_cast<std::int32_t>(from.solver);
  to.rounds = from.rounds;
}

}  // namespace detail

/// Whether a description has words for all that a moeroute::router_spec says of a choice. It has
/// none for rare words, for rules over a batch by fields that moeroute_spec lacks, and for the few
/// that are compared here.
template <class RouterSpec>
bool can_describe(const RouterSpec& from) {
  if (from.sees_batch()) return !from.has_rare_words() && detail::can_describe_batch(from);
  const RouterSpec plain{};
  return !from.has_rare_words() && from.noise == plain.noise &&
         from.lost_weight == plain.lost_weight && from.second == plain.second &&
         from.table_key == plain.table_key &&
         (from.first_keys == plain.first_keys ||
          from.first_keys * from.first_keys == from.experts) &&
         static_cast<int>(from.score) <= MOEROUTE_UNIFORM &&
         static_cast<int>(from.selection) <= MOEROUTE_RANDOM &&
         static_cast<int>(from.group_score) <= MOEROUTE_GROUP_TOP_SUM;
}

/// Writes the fields of a moeroute::router_spec over those of a description, as far as it has words
/// for them (can_describe says whether it has for all): whoever has the headers too can hand their
/// specs on.
template <class RouterSpec>
void describe(const RouterSpec& from, spec& to) {
  const auto number = [](auto field) { return static_cast<std::int32_t>(field); };
  to.size = sizeof to;
  to.score = number(from.score);
  to.experts = from.experts;
  to.k = from.k;
  to.score_selected = number(from.domain);
  to.selection = number(from.selection);
  to.selection_bias = from.selection_bias;
  to.group_score = number(from.group_score);
  to.groups = from.groups;
  to.topk_group = from.topk_group;
  to.group_fill = from.group_fill;
  to.normalize = number(from.normalize);
  to.lp_p = from.lp_p;
  to.eps_mode = number(from.eps_where);
  to.eps = from.eps;
  to.scale = from.scale;
  to.scale_on_output = number(from.scale_where);
  to.divide_by_k = from.divide_by_k;
  to.output_scale = from.output_scale;
  to.per_expert_scale = from.per_expert_scale;
  to.gate_bias = from.gate_bias;
  to.softcap = from.softcap;
  to.temperature = from.temperature;
  to.jitter = from.jitter;
  to.top_p = from.top_p;
  to.crossing = number(from.crossing);
  to.min_k = from.min_k;
  to.max_k = from.max_k;
  to.threshold = from.threshold;
  to.row_norm = number(from.row_norm);
  to.zero_experts = from.zero_experts;
  to.shared_experts = from.shared_experts;
  to.weight_on_input = number(from.weight_on);
  to.drop_order = number(from.drop_order);
  to.capacity = from.capacity;
  to.normalize_after_drop = !from.normalize_before_drop;
  if (from.sees_batch()) detail::describe_batch(from, to);
}

/// The same as a description of its own. Throws: std::invalid_argument unless can_describe(from).
template <class RouterSpec>
spec describe(const RouterSpec& from) {
  if (!can_describe(from))
    refuse("moeroute::describe: the spec has words that the compiled library does not have");
  spec to = plain_spec();
  describe(from, to);
  return to;
}

/// What a spec needs beside its fields. The router refers to the lists of floats, which may change
/// between calls; the table is copied.
struct tensors {
  std::span<const float> bias{};
  std::span<const float> per_expert_scale{};
  std::span<const float> gamma{};
  std::span<const std::int32_t> table{};
};

/// A router made from a spec, for the best instruction set of the machine.
///
///   router r(spec_of_model("deepseek_v3"), {.bias = correction});
///   assignment choices;
///   route(r, {logits, tokens, 256}, choices);   // choices.ids(), choices.weights(): [T, k]
class router {
 public:
  explicit router(const spec& s, const tensors& t = {}) {
    const moeroute_tensors given{t.bias.data(),
                                 std::ssize(t.bias),
                                 t.per_expert_scale.data(),
                                 std::ssize(t.per_expert_scale),
                                 t.gamma.data(),
                                 std::ssize(t.gamma),
                                 t.table.data(),
                                 std::ssize(t.table)};
    check(moeroute_router_new(&s, &given, handle_.place()));
    check(moeroute_router_get_shape(get(), &shape_));
  }

  std::int64_t columns() const { return shape_.columns; }
  std::int64_t experts() const { return shape_.experts; }
  std::int64_t k() const { return shape_.k; }
  bool ragged() const { return shape_.ragged != 0; }
  const moeroute_router* get() const { return handle_.get(); }

 private:
  detail::owned<moeroute_router, moeroute_router_free> handle_;
  moeroute_router_shape shape_{};
};

/// Side inputs: what routing may need beside the logits.
using side_inputs = moeroute_side;

/// Which experts each token goes to, with which weights; used by one caller at a time.
class assignment {
 public:
  assignment() { check(moeroute_assignment_new(handle_.place())); }

  /// After this, routing up to so many tokens allocates nothing, nor do capacity and losses.
  void reserve(const router& r, std::int64_t tokens, moeroute_type logits_type = MOEROUTE_FLOAT,
               int threads = 1) {
    refresh_after(moeroute_assignment_reserve(get(), r.get(), tokens, logits_type, threads));
    refresh();
  }
  /// Choices that somebody else made, k per token; copied. Refused are ids outside [-1, E) and
  /// weights that are not finite; an expert named twice by a token gets a slot for each.
  void set(std::span<const std::int32_t> ids, std::span<const float> weights, std::int64_t experts,
           std::int64_t k) {
    if (k < 1 || std::ssize(ids) % k != 0 || ids.size() != weights.size())
      refuse("moeroute::assignment_set: ids and weights are not two lists of T * k values");
    check(moeroute_assignment_set(get(), std::ssize(ids) / k, experts, k, ids.data(),
                                  weights.data()));
    refresh();
  }

  std::int64_t tokens() const { return view_.tokens; }
  std::int64_t experts() const { return view_.experts; }
  std::int64_t k() const { return view_.k; }
  std::int64_t choices() const { return view_.choices; }
  std::span<const std::int32_t> ids() const { return detail::list(view_.ids, view_.choices); }
  std::span<const float> weights() const { return detail::list(view_.weights, view_.choices); }
  /// First choice of every token, [T + 1]; empty where every token has k.
  std::span<const std::int32_t> offsets() const {
    return detail::list(view_.offsets, view_.tokens + 1);
  }
  /// 0 for choices that capacity dropped; empty where nothing was.
  std::span<const std::uint8_t> kept() const { return detail::list(view_.kept, view_.choices); }

  moeroute_assignment* get() const { return handle_.get(); }
  /// Reads where the choices are: for those who call the C face on get().
  void refresh() { check(moeroute_assignment_get(get(), &view_)); }
  /// The same behind a call that may have failed, whose error it throws.
  void refresh_after(int status) {
    moeroute_assignment_get(get(), &view_);
    check(status);
  }

 private:
  detail::owned<moeroute_assignment, moeroute_assignment_free> handle_;
  moeroute_assignment_view view_{};
};

inline void route(const router& r, const const_rows& logits, const side_inputs& side,
                  assignment& out, const executor& exec = {}) {
  const int status = moeroute_route(r.get(), logits, &side, exec.get(), out.get());
  out.refresh_after(status);
}
inline void route(const router& r, const const_rows& logits, assignment& out,
                  const executor& exec = {}) {
  route(r, logits, side_inputs{}, out, exec);
}

/// The same with copies of the result in memory of the caller's, ids and weights [T, k] with
/// r.k(); for routers whose k does not vary. Throws also where the lists have other sizes.
inline void route_to(const router& r, const const_rows& logits, const side_inputs& side,
                     assignment& out, std::span<std::int32_t> ids, std::span<float> weights,
                     const executor& exec = {}) {
  const std::int64_t size = std::ssize(ids), k = r.k();
  if (k < 1 || size % k != 0 || size / k != logits.rows || ids.size() != weights.size())
    refuse("moeroute::route_to: ids and weights are not two lists of T * k values");
  out.refresh_after(
      moeroute_route_to(r.get(), logits, &side, exec.get(), out.get(), ids.data(), weights.data()));
}
inline void route_to(const router& r, const const_rows& logits, assignment& out,
                     std::span<std::int32_t> ids, std::span<float> weights,
                     const executor& exec = {}) {
  route_to(r, logits, side_inputs{}, out, ids, weights, exec);
}

inline capacity_result apply_capacity(assignment& a, const capacity& policy) {
  capacity_result result;
  a.refresh_after(moeroute_apply_capacity(a.get(), &policy, &result));
  return result;
}
/// What the spec says about capacity.
inline capacity capacity_of(const spec& s) {
  capacity c;
  check(moeroute_spec_capacity(&s, &c));
  return c;
}

/// Slots in expert-major order, and the way back; used by one caller at a time.
class dispatch_plan {
 public:
  dispatch_plan() { check(moeroute_plan_new(handle_.place())); }

  void reserve(const assignment& a, const plan_options& options = {}) {
    refresh_after(moeroute_plan_reserve(get(), a.get(), &options));
  }

  const moeroute_plan_view& counts() const { return view_; }
  std::int64_t slots() const { return view_.slots; }
  /// Expert e owns the slots [offsets()[e], offsets()[e + 1]), the first loads()[e] are tokens.
  std::span<const std::int32_t> offsets() const {
    return detail::list(view_.offsets, view_.experts + 1);
  }
  std::span<const std::int32_t> loads() const { return detail::list(view_.loads, view_.experts); }
  std::span<const std::int32_t> token_of_slot() const {
    return detail::list(view_.token_of_slot, view_.slots);
  }
  std::span<const std::int32_t> slot_of_choice() const {
    return detail::list(view_.slot_of_choice, view_.choices);
  }

  moeroute_plan* get() const { return handle_.get(); }
  void refresh() { check(moeroute_plan_get(get(), &view_)); }
  /// The same behind a call that may have failed, whose error it throws.
  void refresh_after(int status) {
    moeroute_plan_get(get(), &view_);
    check(status);
  }

 private:
  detail::owned<moeroute_plan, moeroute_plan_free> handle_;
  moeroute_plan_view view_{};
};

inline void plan(const assignment& a, dispatch_plan& out, const plan_options& options = {}) {
  out.refresh_after(moeroute_plan_make(out.get(), a.get(), &options));
}

/// From lists that experts chose themselves; weights, if given, is [E * C], of which out.choices()
/// become the lists' in the order of the plan's choices.
inline void plan(const expert_lists& lists, dispatch_plan& out, const plan_options& options = {},
                 std::span<float> weights = {}) {
  if (!weights.empty() && std::ssize(weights) < lists.experts * lists.capacity)
    refuse("moeroute::plan_make_of_lists: weights has less than lists.experts * capacity values");
  out.refresh_after(moeroute_plan_make_of_lists(out.get(), &lists, &options,
                                                weights.empty() ? nullptr : weights.data()));
}

inline void dispatch(const const_rows& x, const dispatch_plan& p, const rows& slots,
                     const executor& exec = {}, std::span<const float> scale = {}) {
  check(moeroute_dispatch(p.get(), x, slots, scale.empty() ? nullptr : scale.data(), exec.get()));
}

inline void combine(const const_rows& slots, const dispatch_plan& p, const assignment& a,
                    const rows& y, const executor& exec = {}, const combine_options& options = {}) {
  check(moeroute_combine(slots, p.get(), a.get(), y, &options, exec.get()));
}

/// By weights in the order of the plan's choices, for a plan that was made of lists.
inline void combine(const const_rows& slots, const dispatch_plan& p, std::span<const float> weights,
                    const rows& y, const executor& exec = {}, const combine_options& options = {}) {
  check(moeroute_combine_weights(slots, p.get(), weights.data(), std::ssize(weights), y, &options,
                                 exec.get()));
}

/// From one row for every choice, as grouped products leave them.
inline void combine(const const_rows& choice_rows, const assignment& a, const rows& y,
                    const executor& exec = {}, const combine_options& options = {}) {
  check(moeroute_combine_choices(choice_rows, a.get(), y, &options, exec.get()));
}

/// Gate weights, packed once: weight [E, d] in any type, bias [E] or empty.
class gate_weight {
 public:
  explicit gate_weight(const const_rows& weight, std::span<const float> bias = {}) {
    check(moeroute_gate_new(weight, bias.data(), std::ssize(bias), handle_.place()));
  }
  const moeroute_gate* get() const { return handle_.get(); }

 private:
  detail::owned<moeroute_gate, moeroute_gate_free> handle_;
};

inline void gate(const const_rows& x, const gate_weight& w, const rows& logits,
                 const executor& exec = {}) {
  check(moeroute_gate_run(w.get(), x, logits, exec.get()));
}
inline void cosine_gate(const const_rows& x, const gate_weight& w, float scale, const rows& logits,
                        const executor& exec = {}) {
  check(moeroute_gate_cosine(w.get(), x, scale, logits, exec.get()));
}

/// The dense plan of a soft mixture.
class soft_plan {
 public:
  soft_plan() { check(moeroute_soft_plan_new(handle_.place())); }
  moeroute_soft_plan_view view() const {
    moeroute_soft_plan_view v;
    check(moeroute_soft_plan_get(get(), &v));
    return v;
  }
  moeroute_soft_plan* get() const { return handle_.get(); }

 private:
  detail::owned<moeroute_soft_plan, moeroute_soft_plan_free> handle_;
};

inline void plan_soft(const const_rows& logits, std::int64_t slots_per_expert, soft_plan& out,
                      const executor& exec = {}) {
  check(moeroute_soft_plan_make(out.get(), logits, slots_per_expert, exec.get()));
}
inline void dispatch(const const_rows& x, const soft_plan& p, const rows& slots,
                     const executor& exec = {}) {
  check(moeroute_soft_dispatch(p.get(), x, slots, exec.get()));
}
inline void combine(const const_rows& slots, const soft_plan& p, const rows& y,
                    const executor& exec = {}) {
  check(moeroute_soft_combine(p.get(), slots, y, exec.get()));
}

struct loss_values {
  double switch_loss;
  double z_loss;
  double sequence_loss;
};

/// The losses of a layer and, where dlogits has rows, their gradient.
inline loss_values balance_loss(const losses& what, const const_rows& logits, assignment& a,
                                const rows& dlogits = {}, const executor& exec = {}) {
  double v[3];
  check(moeroute_balance_loss(&what, logits, a.get(), dlogits, exec.get(), v));
  return {v[0], v[1], v[2]};
}

/// The bias of balancing without a loss: values() feeds tensors::bias and follows every update.
class bias {
 public:
  explicit bias(std::int64_t experts) {
    check(moeroute_bias_new(experts, nullptr, handle_.place()));
  }
  bias(std::int64_t experts, const bias_options& options) {
    check(moeroute_bias_new(experts, &options, handle_.place()));
  }
  void update(std::span<const double> counts) {
    check(moeroute_bias_update(handle_.get(), counts.data(), std::ssize(counts)));
  }
  std::span<float> values() const {
    float* first = nullptr;
    std::int64_t size = 0;
    check(moeroute_bias_get(handle_.get(), &first, &size));
    return {first, static_cast<std::size_t>(size)};
  }

 private:
  detail::owned<moeroute_bias, moeroute_bias_free> handle_;
};

}  // namespace moeroute::compiled

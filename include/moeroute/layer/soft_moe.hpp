// A soft mixture-of-experts layer: no token is dropped and no choice is made.
#pragma once

#include <cmath>
#include <string>
#include <utility>

#include <moeroute/exec/worker_slots.hpp>
#include <moeroute/layer/layer_tape.hpp>
#include <moeroute/policy/router_spec.hpp>
#include <moeroute/simd/rows/gemm.hpp>
#include <moeroute/stage/expert.hpp>
#include <moeroute/stage/soft.hpp>

namespace moeroute {

struct soft_moe_options {
  index_t slots_per_expert = 1;
  soft_logits logits = soft_logits::normalized;
  float scale = 1.0f;
};

/// The options of a described soft mixture, selection=soft.
///
/// Throws: error where the spec describes another router.
inline soft_moe_options soft_options_of(const router_spec& s) {
  check(s);
  if (s.selection != selection_kind::soft)
    fail("soft_options_of",
         "selection is " + std::string(to_string(s.selection)) + ", expected soft");
  return {.slots_per_expert = s.slots_per_expert, .logits = s.slot_logits, .scale = s.scale};
}

/// y[t] = sum over slots of combine(t, s) * expert of s (sum over tokens of dispatch(s, t) * x[t]).
///
/// Experts is an expert_function on float rows, with or without scratch; each is called once with
/// its slots_per_expert rows. Unit vectors are x / sqrt(x . x + 1e-6). A layer is used by one
/// caller at a time: it owns its memory. Source: Puigcerver et al. 2023.
template <class Experts, class A = simd::default_arch>
class soft_moe {
 public:
  /// mu: one row per slot, [E * slots_per_expert, d], the slots of an expert side by side.
  ///
  /// Throws: error where slots_per_expert does not divide the rows of mu, or scale is not finite.
  soft_moe(matrix_view<const float> mu, Experts experts, const soft_moe_options& options = {})
      : gate_(mu.rows, mu.cols), experts_(std::move(experts)), options_(options) {
    check_range("soft_moe", "slots_per_expert", options.slots_per_expert, 1, mu.rows);
    check_stride("soft_moe", "mu", mu);
    check_size("soft_moe", "mu.rows() % slots_per_expert", mu.rows % options.slots_per_expert, 0);
    if (!std::isfinite(options.scale))
      fail_value("soft_moe", "scale", options.scale, "a finite number");
    buffer<float> row(mu.cols);
    for (index_t s = 0; s < mu.rows; ++s) {
      const float factor = options.logits == soft_logits::product
                               ? 1.0f
                               : options.scale / length(mu.data + s * mu.stride, mu.cols);
      simd::scale_row<A>(mu.data + s * mu.stride, factor, mu.cols, row.data());
      gate_.set_rows(s, matrix_view<const float>(row.data(), 1, mu.cols));
    }
  }

  /// Runs the layer.
  ///
  /// Shapes: x and y [T, d], each in float, bfloat16 or float16; they may be the same memory.
  /// Throws: error where the shapes do not fit; what an expert throws.
  /// Cost: T S d multiply-adds three times, and the experts; allocates only where T (or the
  /// executor's concurrency) exceeds every earlier one.
  /// Determinism: the same bits for every executor and thread count.
  template <readable_rows X, writable_rows Y, executor Exec = serial>
  void forward(const X& x_rows, Y&& y_rows, const Exec& exec = {}) {
    const auto x = const_view(x_rows);
    const auto y = view(y_rows);
    check_size("soft_moe", "x.cols()", x.cols, gate_.cols());
    check_size("soft_moe", "y.rows()", y.rows, x.rows);
    check_size("soft_moe", "y.cols()", y.cols, x.cols);
    check_stride("soft_moe", "x", x);
    check_stride("soft_moe", "y", y);
    check_apart_or_same("soft_moe", "x", x, "y", y);
    const index_t tokens = x.rows, slots = gate_.rows(), d = gate_.cols();
    const bool unit = options_.logits == soft_logits::normalized;
    index_t floats = 0;
    if constexpr (with_scratch)
      floats = experts_.scratch_floats() * worker_slots::count(exec.concurrency());
    struct memory {
      float *logits, *in, *out, *experts;
    };
    const memory m = workspace_.carve([&](scratch& tape) {
      return memory{tape.take<float>(tokens * slots), tape.take<float>(slots * d),
                    tape.take<float>(slots * d), tape.take<float>(floats)};
    });
    plan_.reset(tokens, slots, options_.slots_per_expert);
    const matrix_view<float> logits(m.logits, tokens, slots);
    simd::gemm(x, gate_, logits, exec);
    // A row's length divides its logits instead of its columns: there are fewer of them.
    if (unit)
      for (index_t t = 0; t < tokens; ++t)
        simd::scale_row<A>(m.logits + t * slots, 1.0f / length(x.data + t * x.stride, d), slots,
                           m.logits + t * slots);
    plan_soft(logits, options_.slots_per_expert, plan_, exec);
    const matrix_view<float> in(m.in, slots, d), out(m.out, slots, d);
    in_ = in;
    out_ = out;
    dispatch(x, plan_, in, exec);
    const index_t own = options_.slots_per_expert;
    worker_slots workers(exec.concurrency());
    exec.parallel_for(slots / own, 1, [&](index_t begin, index_t end) {
      for (index_t e = begin; e < end; ++e) {
        const matrix_view<const float> rows = in.middle_rows(e * own, own);
        const matrix_view<float> results = out.middle_rows(e * own, own);
        if constexpr (with_scratch) {
          const worker_slots::held worker(workers);
          experts_(static_cast<expert_id>(e), rows, results,
                   m.experts + worker * experts_.scratch_floats());
        } else {
          experts_(static_cast<expert_id>(e), rows, results);
        }
      }
    });
    combine(out, plan_, y, exec);
  }

  /// The same, and the tape keeps what backward() needs (layer/soft_moe_backward.hpp), the plan
  /// among it.
  template <readable_rows X, writable_rows Y, executor Exec = serial>
  void forward(const X& x, Y&& y, const Exec& exec, soft_tape& tape) {
    forward(x, y, exec);
    tape.tokens = plan_.tokens();
    tape.in = in_;
    tape.out = out_;
    std::swap(plan_, tape.plan);
    std::swap(workspace_, tape.memory);
  }

  const soft_moe_options& options() const { return options_; }
  index_t slots() const { return gate_.rows(); }
  index_t d() const { return gate_.cols(); }

  /// Of the last call.
  const soft_plan& plan() const { return plan_; }

 private:
  static constexpr bool with_scratch = expert_function_with_scratch<Experts, float, float>;
  static_assert(with_scratch || expert_function<Experts, float, float>,
                "[moeroute::soft_moe] Experts must be callable as f(expert, in, out)");

  template <class T>
  static float length(const T* row, index_t n) {
    const float norm = simd::row_norm<A>(row, n);
    return std::sqrt(norm * norm + 1e-6f);
  }

  simd::packed_matrix<float, A> gate_;
  Experts experts_;
  soft_moe_options options_;
  soft_plan plan_;
  workspace workspace_;
  matrix_view<float> in_, out_;  // of the last call, in workspace_
};

}  // namespace moeroute

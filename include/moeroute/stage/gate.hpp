// The gate projection: hidden states to logits.
#pragma once

#include <algorithm>
#include <concepts>
#include <span>
#include <utility>

#include <moeroute/base/error.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/reduce.hpp>
#include <moeroute/simd/rows/gemm.hpp>

namespace moeroute {

namespace detail {

template <class W>
inline constexpr bool is_packed = false;
template <storage W, class A>
inline constexpr bool is_packed<simd::packed_matrix<W, A>> = true;

// The sizes alone: the product looks at strides and overlap.
MOEROUTE_OUT_OF_LINE inline void check_gate_sizes(const char* where, index_t tokens, index_t x_cols,
                                                  index_t d, index_t logits_rows,
                                                  index_t logits_cols, index_t experts) {
  check_size(where, "x.cols()", x_cols, d);
  check_size(where, "logits.rows()", logits_rows, tokens);
  check_size(where, "logits.cols()", logits_cols, experts);
}

}  // namespace detail

/// logits = x W^T + b, in float.
///
/// Shapes: x [T, d] in float, bfloat16 or float16, W [E, d] packed in any of them (with its bias),
/// logits [T, E].
/// Throws: error where the shapes do not fit. Cost: T E d multiply-adds, no allocation. One token
/// is bound by reading W, which takes half as long in 16 bits.
/// Determinism: a token's logits do not depend on other tokens or on threads; they may differ in
/// the last bits between ISAs.
/// Example:
///
///     const simd::packed_matrix<> w(view(gate_weight));
///     gate(x, w, logits);
template <readable_rows X, writable_rows Y, executor Exec = serial, storage W = float,
          class A = simd::default_arch>
void gate(const X& x_rows, const simd::packed_matrix<W, A>& weight, Y&& logit_rows,
          const Exec& exec = {}) {
  const auto x = const_view(x_rows);
  const matrix_view<float> logits = view(logit_rows);
  detail::check_gate_sizes("gate", x.rows, x.cols, weight.cols(), logits.rows, logits.cols,
                           weight.rows());
  simd::gemm(x, weight, logits, exec);
}

/// A gate: g(x, logits, exec) makes the logits [T, columns()] of the rows x [T, d()].
///
/// What it learns and keeps is its own; what it is called with fits. gate() and moe_layer check
/// shapes, by name, before they call one.
template <class G, class T = float>
concept gate_function =
    requires(const G& g, matrix_view<const T> x, matrix_view<float> logits, const serial& exec) {
      { g.columns() } -> std::convertible_to<index_t>;
      { g.d() } -> std::convertible_to<index_t>;
      g(x, logits, exec);
    };

/// A gate that wants scratch: g(x, logits, memory, exec) with scratch_floats(T) floats of its own.
template <class G, class T = float>
concept gate_function_with_scratch =
    requires(const G& g, matrix_view<const T> x, matrix_view<float> logits, float* memory,
             const serial& exec) {
      { g.columns() } -> std::convertible_to<index_t>;
      { g.d() } -> std::convertible_to<index_t>;
      { g.scratch_floats(index_t{}) } -> std::convertible_to<index_t>;
      g(x, logits, memory, exec);
    };

template <class G, class T = float>
concept any_gate = gate_function<G, T> || gate_function_with_scratch<G, T>;

/// logits = x W^T + b: the gate of nearly every model.
template <storage W = float, class A = simd::default_arch>
class linear_gate {
 public:
  /// weight: [columns, d], packed, with the bias if the gate has one.
  linear_gate(simd::packed_matrix<W, A> weight) : weight_(std::move(weight)) {}

  index_t columns() const { return weight_.rows(); }
  index_t d() const { return weight_.cols(); }
  const simd::packed_matrix<W, A>& weight() const { return weight_; }
  /// The weights after a step of training, [columns, d]. Throws: error where the shape differs.
  void set_weight(matrix_view<const W> w) {
    check_size("linear_gate", "w.rows()", w.rows, columns());
    weight_.set_rows(0, w);
  }

  template <readable_rows X, executor Exec = serial>
  void operator()(const X& x, const matrix_view<float>& logits, const Exec& exec = {}) const {
    simd::gemm(x, weight_, logits, exec);
  }

 private:
  simd::packed_matrix<W, A> weight_;
};

/// A gate that somebody else owns and several layers use (Omni-router): it must outlive them.
template <class G>
class gate_ref {
 public:
  explicit gate_ref(const G& gate) : gate_(&gate) {}
  explicit gate_ref(const G&&) = delete;

  index_t columns() const { return gate_->columns(); }
  index_t d() const { return gate_->d(); }
  const G& get() const { return *gate_; }
  index_t scratch_floats(index_t tokens) const
    requires gate_function_with_scratch<G>
  {
    return gate_->scratch_floats(tokens);
  }

  template <class X, class... Rest>
  auto operator()(const X& x, const matrix_view<float>& logits, Rest&&... rest) const
      -> decltype(std::declval<const G&>()(x, logits, rest...)) {
    return (*gate_)(x, logits, rest...);
  }

 private:
  const G* gate_;
};

/// Stands where a layer has no gate: tables, random choices and records look at no logit, and
/// logits may come from outside.
class no_gate {
 public:
  explicit no_gate(index_t columns) : columns_(columns) {
    check_range("no_gate", "columns", columns, 1, index_t{1} << 40);
  }
  index_t columns() const { return columns_; }

 private:
  index_t columns_;
};

namespace detail {

template <class T, class G>
void check_gate(const matrix_view<T>& x, const G& g, const matrix_view<float>& logits) {
  check_gate_sizes("gate", x.rows, x.cols, g.d(), logits.rows, logits.cols, g.columns());
  check_stride("gate", "x", x);
  check_stride("gate", "logits", logits);
  check_apart("gate", "x", x, "logits", logits);
}

}  // namespace detail

/// The logits of any gate. Shapes: x [T, g.d()], logits [T, g.columns()]. Throws: error where they
/// are not. Cost and determinism: as g's.
template <readable_rows X, class G, writable_rows Y, executor Exec = serial>
  requires gate_function<G, element_of<const X>>
void gate(const X& x_rows, const G& g, Y&& logit_rows, const Exec& exec = {}) {
  const auto x = const_view(x_rows);
  const matrix_view<float> logits = view(logit_rows);
  detail::check_gate(x, g, logits);
  g(x, logits, exec);
}

/// The same of a gate that wants scratch.
template <readable_rows X, class G, writable_rows Y, executor Exec = serial>
  requires gate_function_with_scratch<G, element_of<const X>>
void gate(const X& x_rows, const G& g, Y&& logit_rows, workspace& ws, const Exec& exec = {}) {
  const auto x = const_view(x_rows);
  const matrix_view<float> logits = view(logit_rows);
  detail::check_gate(x, g, logits);
  float* const memory =
      ws.carve([&](scratch& tape) { return tape.take<float>(g.scratch_floats(x.rows)); });
  g(x, logits, memory, exec);
}

// Calls that would end in a page about templates. They ask for what is ours, so that a function
// of the same name elsewhere keeps its calls.
template <class X, class G, class Y, class... Rest>
  requires((!readable_rows<X> || !writable_rows<Y>) &&
           (detail::is_packed<G> || gate_function<G, float> ||
            gate_function_with_scratch<G, float>))
void gate(const X&, const G&, Y&&, const Rest&...) {
  static_assert(readable_rows<X> && writable_rows<Y>,
                "[moeroute::gate] x and logits are rows, the logits not const: a pointer is handed "
                "in as matrix_view(pointer, rows, columns, stride)");
}

template <readable_rows X, readable_rows W, writable_rows Y, class... Rest>
void gate(const X&, const W&, Y&&, const Rest&...) {
  static_assert(!readable_rows<W>,
                "[moeroute::gate] the weight is packed once, [E, d]: simd::packed_matrix<>("
                "view(weight))");
}

/// logits = scale * cos(x, w_e): rows of x and of W count by their direction only.
///
/// Shapes: as gate(); weight holds rows of norm 1 (unit_rows), A zero row has zero
/// logits. Cost: T (E + 2) d multiply-adds, no allocation. Source: X-MoE (Chi et al. 2022).
template <readable_rows X, writable_rows Y, executor Exec = serial, storage W = float,
          class A = simd::default_arch>
void cosine_gate(const X& x_rows, const simd::packed_matrix<W, A>& weight, float scale,
                 Y&& logit_rows, const Exec& exec = {}) {
  const auto x = const_view(x_rows);
  const matrix_view<float> logits = view(logit_rows);
  detail::check_gate_sizes("cosine_gate", x.rows, x.cols, weight.cols(), logits.rows, logits.cols,
                           weight.rows());
  simd::gemm(x, weight, logits, exec);
  exec.parallel_for(x.rows, 64, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      const float norm = simd::row_norm<A>(x.row(t), x.cols);
      simd::scale_row<A>(logits.row(t), scale / std::max(norm, 1e-12f), logits.cols, logits.row(t));
    }
  });
}

/// weights[t] = scale * sigmoid(x[t] . w): the gate of shared experts that have one.
///
/// Shapes: x [T, d], weight [1, d], weights [T]. Throws: error where shapes do not fit.
/// Cost: T d multiply-adds, no allocation. Determinism: as gate(): the same bits for every executor
/// and thread count, but not on every ISA. Source: Qwen2-MoE (2024).
template <readable_rows X, executor Exec = serial, storage W = float, class A = simd::default_arch>
void shared_gate(const X& x_rows, const simd::packed_matrix<W, A>& weight, float scale,
                 std::span<float> weights, const Exec& exec = {}) {
  const auto x = const_view(x_rows);
  check_size("shared_gate", "weight.rows()", weight.rows(), 1);
  check_size("shared_gate", "weights.size()", static_cast<index_t>(weights.size()), x.rows);
  simd::gemm(x, weight, matrix_view<float>(weights.data(), x.rows, 1), exec);
  simd::map_row<A>(weights.data(), x.rows, weights.data(), [scale](simd::vfloat<A> z) {
    return simd::sigmoid<A>(z) * simd::vfloat<A>(scale);
  });
}

/// Divides every row by its norm; a zero row stays. For the weights of a cosine gate.
///
/// Throws: error where rows run into one another.
template <writable_rows W, class A = simd::default_arch>
void unit_rows(W&& weight_rows) {
  const auto w = view(weight_rows);
  check_stride("unit_rows", "weight", w);
  for (index_t r = 0; r < w.rows; ++r) {
    const float norm = std::max(simd::row_norm<A>(w.row(r), w.cols), 1e-12f);
    for (index_t c = 0; c < w.cols; ++c) w(r, c) /= norm;
  }
}

}  // namespace moeroute

// From a description to the gate that carries it out.
#pragma once

#include <span>
#include <utility>
#include <variant>

#include <moeroute/policy/router_spec.hpp>
#include <moeroute/stage/gates/codebook.hpp>
#include <moeroute/stage/gates/cosine.hpp>
#include <moeroute/stage/gates/mixing.hpp>
#include <moeroute/stage/gates/mlp.hpp>
#include <moeroute/stage/gates/normalized.hpp>

namespace moeroute {

/// What a described gate needs beside its fields; it keeps copies.
struct gate_tensors {
  matrix_view<const float> weight{};    ///< [columns, d], or [columns, width] behind `first`
  std::span<const float> bias{};        ///< [columns], where gate_bias
  matrix_view<const float> first{};     ///< [width, d]: projection, hidden layer or codes
  std::span<const float> first_bias{};  ///< [width], of a hidden layer; may be left out
  std::span<const float> gamma{};       ///< [d], of rms; may be left out
};

/// A gate that a description picked; gate() and moe_layer take it like any other.
template <class A = simd::default_arch>
class run_time_gate {
 public:
  using kinds = std::variant<linear_gate<float, A>, scaled_cosine_gate<float, A>,
                             low_rank_cosine_gate<float, A>, rms_gate<A>, mlp_gate<float, A>,
                             codebook_gate<A>, mixing_gate<linear_gate<float, A>, A>>;

  explicit run_time_gate(kinds kind) : kind_(std::move(kind)) {}

  index_t columns() const {
    return std::visit([](const auto& g) { return g.columns(); }, kind_);
  }
  index_t d() const {
    return std::visit([](const auto& g) { return g.d(); }, kind_);
  }
  index_t scratch_floats(index_t tokens) const {
    return std::visit(
        [&](const auto& g) -> index_t {
          if constexpr (requires { g.scratch_floats(tokens); })
            return g.scratch_floats(tokens);
          else
            return 0;
        },
        kind_);
  }
  /// The gate itself: a codebook is moved, a linear gate given new weights.
  kinds& kind() { return kind_; }

  template <readable_rows X, executor Exec = serial>
  void operator()(const X& x, const matrix_view<float>& logits, float* memory,
                  const Exec& exec = {}) const {
    std::visit(
        [&](const auto& g) {
          if constexpr (requires { g.scratch_floats(index_t{}); })
            g(x, logits, memory, exec);
          else
            g(x, logits, exec);
        },
        kind_);
  }

 private:
  kinds kind_;
};

/// The gate that a spec describes.
///
/// Shapes: those of gate_tensors, of the spec's columns(), gate_d and gate_width. Throws: error
/// where the spec contradicts itself or says gate=none, or a tensor has another shape.
///
///     const router_spec s = parse_spec("E=8 k=2 score=softmax gate=cosine gate_temperature=0.07");
///     moe_layer layer(make_gate(s, {.weight = w}), make_router(s), experts);
template <class A = simd::default_arch>
MOEROUTE_COLD run_time_gate<A> make_gate(const router_spec& s, const gate_tensors& tensors) {
  constexpr const char* who = "make_gate";
  using kinds = typename run_time_gate<A>::kinds;
  check(s);
  const gate_spec& g = s.gate;
  if (g.kind == gate_kind::none || s.selection == selection_kind::soft)
    fail(who, std::string("gate is ") +
                  (g.kind == gate_kind::none ? "none" : "that of a soft mixture") +
                  ", expected one with weights");
  const bool codes = g.kind == gate_kind::codebook, between = g.has_width();
  const auto shaped = [&](const matrix_view<const float>& m, const char* rows, index_t r,
                          const char* cols, index_t c) {
    check_size(who, rows, m.rows, r);
    if (c != 0 || m.rows == 0) check_size(who, cols, m.cols, c);
  };
  shaped(tensors.first, "first.rows", between ? g.width : 0, "first.cols", between ? g.d : 0);
  shaped(tensors.weight, "weight.rows", codes ? 0 : s.columns(), "weight.cols",
         codes     ? 0
         : between ? g.width
                   : g.d);
  const index_t d = between ? tensors.first.cols : tensors.weight.cols;
  check_range(who, "d", d, 1, index_t{1} << 31);
  const auto sized = [&](std::span<const float> list, const char* name, bool there, index_t n) {
    const auto size = static_cast<index_t>(list.size());
    if (there || size != 0) check_size(who, name, size, there ? n : 0);
  };
  sized(tensors.bias, "bias.size()", s.gate_bias, s.columns());
  sized(tensors.gamma, "gamma.size()", g.kind == gate_kind::rms && !tensors.gamma.empty(), d);
  sized(tensors.first_bias, "first_bias.size()",
        g.kind == gate_kind::mlp && !tensors.first_bias.empty(), g.width);
  const auto packed = [](const matrix_view<const float>& m, std::span<const float> bias) {
    simd::packed_matrix<float, A> p(m.rows, m.cols);
    p.set_rows(0, m);
    for (std::size_t i = 0; i < bias.size(); ++i) p.bias(static_cast<index_t>(i)) = bias[i];
    return p;
  };
  const auto linear = [&] { return linear_gate<float, A>(packed(tensors.weight, tensors.bias)); };
  const auto made = [&]() -> kinds {
    switch (g.kind) {
      case gate_kind::cosine: return scaled_cosine_gate<float, A>(tensors.weight, g.temperature);
      case gate_kind::low_rank_cosine:
        return low_rank_cosine_gate<float, A>(packed(tensors.first, {}), tensors.weight,
                                              g.temperature);
      case gate_kind::rms:
        return rms_gate<A>(tensors.weight, {tensors.gamma, g.scale, g.eps}, tensors.bias);
      case gate_kind::mlp:
        return mlp_gate<float, A>(packed(tensors.first, tensors.first_bias),
                                  packed(tensors.weight, tensors.bias), g.activation);
      case gate_kind::codebook: return codebook_gate<A>(tensors.first, s.columns());
      case gate_kind::mixing: return mixing_gate<linear_gate<float, A>, A>(linear(), g.temperature);
      default: return linear();
    }
  };
  return run_time_gate<A>(made());
}

}  // namespace moeroute

// Backward of the gates of stage/gates/: from the gradient of logits to those of hidden states and
// of everything that a gate is made of.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>

#include <moeroute/stage/gate_backward.hpp>
#include <moeroute/stage/gates/mlp.hpp>
#include <moeroute/stage/gates/normalized.hpp>

namespace moeroute {

/// What an mlp_gate is trained as: not packed.
template <class W, class F = float>
struct mlp_gate_weights {
  matrix_view<const W> first{};     ///< [h, d]
  std::span<const F> first_bias{};  ///< [h], or empty: zeros
  matrix_view<const W> second{};    ///< [E, h]
  gate_activation activation = gate_activation::relu;
};

/// The gradients of an mlp_gate; what is empty is not wanted.
template <class F = float>
struct mlp_gate_gradients {
  gradient_to to = gradient_to::write;
  matrix_view<F> x{};          ///< [T, d]
  matrix_view<F> first{};      ///< [h, d]
  std::span<F> first_bias{};   ///< [h]
  matrix_view<F> second{};     ///< [E, h]
  std::span<F> second_bias{};  ///< [E]
};

namespace detail {

// A gradient [rows, cols] that shares no memory with what is read.
template <class F, class... Read>
void check_gradient(const char* where, const char* name, const matrix_view<F>& g, index_t rows,
                    index_t cols, const Read&... read) {
  check_size(where, name, g.rows, rows);
  check_size(where, name, g.cols, cols);
  check_stride(where, name, g);
  (check_apart(where, "what is read", read, name, g), ...);
}

// f(v), and its slope there; relu's at 0 is 0.
template <class F>
F gate_value(gate_activation f, F v, F& slope) {
  if (f == gate_activation::relu) {
    slope = v > F(0) ? F(1) : F(0);
    return v > F(0) ? v : F(0);
  }
  if (f == gate_activation::tanh) {
    const F y = std::tanh(v);
    slope = 1 - y * y;
    return y;
  }
  const F s = 1 / (1 + std::exp(-v));
  slope = s * (1 + v * (1 - s));
  return v * s;
}

// Rows of p become p (g - the sum of p g): a softmax backwards. g may be p's gradient only.
template <class A, class F, class Exec>
void pull_softmax(const matrix_view<const F>& p, const matrix_view<F>& g, const Exec& exec) {
  exec.parallel_for(p.rows, 16, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      const F mean = simd::row_dot<A>(p.row(t), static_cast<const F*>(g.row(t)), p.cols);
      for (index_t e = 0; e < p.cols; ++e) g(t, e) = p(t, e) * (g(t, e) - mean);
    }
  });
}

// As softmax_rows(): NaN counts as -inf, and a row without a logit above -inf is all zeros.
template <class F>
void softmax_in_place(F* z, index_t n) {
  constexpr F never = -std::numeric_limits<F>::infinity();
  F top = never, sum = 0;
  for (index_t e = 0; e < n; ++e)
    if (z[e] > top) top = z[e];
  for (index_t e = 0; e < n; ++e)
    sum += z[e] = z[e] == top && top > never ? F(1) : z[e] > never ? std::exp(z[e] - top) : F(0);
  for (index_t e = 0; sum > F(0) && e < n; ++e) z[e] /= sum;
}

}  // namespace detail

/// The gradients of an mlp_gate: logits = W2 f(W1 x + b1) + b2.
///
/// The hidden values are computed again; relu has no gradient where its input is 0 or less.
/// Shapes: x [T, d], dlogits [T, E]. Throws: error where the shapes do not fit or a gradient shares
/// memory with what is read. Cost: T (3 d + 2 E) h multiply-adds, 2 T h of scratch; no allocation
/// once ws is warm. Determinism: the same bits for every executor and thread count.
template <class T, class W, class F, executor Exec = serial, class A = simd::default_arch>
void mlp_gate_backward(const matrix_view<T>& x, const mlp_gate_weights<W, F>& weights,
                       const std::type_identity_t<matrix_view<const F>>& dlogits,
                       const mlp_gate_gradients<F>& gradients, workspace& ws,
                       const Exec& exec = {}) {
  constexpr const char* where = "mlp_gate_backward";
  if (gradients.to == gradient_to::nowhere) return;
  const index_t tokens = x.rows, hidden = weights.first.rows;
  check_size(where, "weights.second.cols()", weights.second.cols, hidden);
  if (!weights.first_bias.empty())
    check_size(where, "weights.first_bias.size()", static_cast<index_t>(weights.first_bias.size()),
               hidden);
  struct memory {
    F *act, *slope;
  };
  const memory m = ws.carve([&](scratch& tape) {
    return memory{tape.take<F>(tokens * hidden), tape.take<F>(tokens * hidden)};
  });
  const matrix_view<F> act(m.act, tokens, hidden), dact(m.act, tokens, hidden);
  const gate_gradients<F> of_first{gradients.to, gradients.x, gradients.first,
                                   gradients.first_bias};
  const gate_gradients<F> of_second{gradients.to, {}, gradients.second, gradients.second_bias};
  detail::check_gate_gradients(where, matrix_view<const F>(act), weights.second, dlogits,
                               of_second);
  detail::check_gate_gradients(where, x, weights.first, matrix_view<const F>(dact), of_first);
  exec.parallel_for(tokens, 16, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t)
      for (index_t h = 0; h < hidden; ++h) {
        const F bias =
            weights.first_bias.empty() ? F(0) : weights.first_bias[static_cast<std::size_t>(h)];
        const F in = simd::row_dot<A>(x.row(t), weights.first.row(h), x.cols) + bias;
        act(t, h) = detail::gate_value(weights.activation, in, m.slope[t * hidden + h]);
      }
  });
  gate_backward<const F, const W, F, Exec, A>(matrix_view<const F>(act), weights.second, dlogits,
                                              of_second, exec);
  simd::multiply_rows<A>(dlogits, weights.second, dact, simd::sum_start::zero, exec);
  for (index_t i = 0; i < tokens * hidden; ++i) m.act[i] *= m.slope[i];
  gate_backward<T, const W, F, Exec, A>(x, weights.first, matrix_view<const F>(dact), of_first,
                                        exec);
}

/// The gradients of an rms_gate: logits = (scale gamma x / r) W^T + b, r = sqrt(mean(x^2) + eps).
///
/// Shapes: x [T, d], weight [E, d] as the caller trains it (without gamma and scale), dlogits [T,
/// E]; dgamma [d] is added to where it is not empty. Throws, Determinism: as gate_backward(). Cost:
/// 2 T E d multiply-adds and 2 T d of scratch; no allocation once ws is warm.
template <class T, class W, class F, executor Exec = serial, class A = simd::default_arch>
void rms_gate_backward(const matrix_view<T>& x, const matrix_view<W>& weight,
                       const rms_input& input,
                       const std::type_identity_t<matrix_view<const F>>& dlogits,
                       const gate_gradients<F>& gradients, workspace& ws, const Exec& exec = {},
                       std::type_identity_t<std::span<F>> dgamma = {}) {
  constexpr const char* where = "rms_gate_backward";
  if (gradients.to == gradient_to::nowhere && dgamma.empty()) return;
  detail::check_gate_gradients(where, x, weight, dlogits, gradients);
  const index_t tokens = x.rows, d = x.cols;
  if (!input.gamma.empty())
    check_size(where, "gamma.size()", static_cast<index_t>(input.gamma.size()), d);
  if (!dgamma.empty()) {
    check_size(where, "dgamma.size()", static_cast<index_t>(dgamma.size()), d);
    if (static_cast<const void*>(dgamma.data()) == static_cast<const void*>(input.gamma.data()))
      fail(where, "dgamma lies in the memory of gamma");
  }
  struct memory {
    F *in, *din, *root;
  };
  const memory m = ws.carve([&](scratch& tape) {
    return memory{tape.take<F>(tokens * d), tape.take<F>(tokens * d), tape.take<F>(tokens)};
  });
  const matrix_view<F> in(m.in, tokens, d), din(m.din, tokens, d);
  const auto factor = [&](index_t c) {
    const float gamma = input.gamma.empty() ? 1.0f : input.gamma[static_cast<std::size_t>(c)];
    return static_cast<F>(gamma) * static_cast<F>(input.scale);
  };
  exec.parallel_for(tokens, 16, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      const F square = simd::row_dot<A>(x.row(t), x.row(t), d) / static_cast<F>(d);
      const F root = m.root[t] = std::sqrt(square + static_cast<F>(input.eps));
      for (index_t c = 0; c < d; ++c)
        in(t, c) = root > F(0) ? factor(c) * static_cast<F>(x(t, c)) / root : F(0);
    }
  });
  gate_backward<const F, W, F, Exec, A>(
      matrix_view<const F>(in), weight, dlogits,
      gate_gradients<F>{gradients.to, {}, gradients.weight, gradients.bias}, exec);
  if (gradients.x.data == nullptr && dgamma.empty()) return;
  simd::multiply_rows<A>(dlogits, matrix_view<std::add_const_t<W>>(weight), din,
                         simd::sum_start::zero, exec);
  for (index_t t = 0; !dgamma.empty() && t < tokens; ++t)
    for (index_t c = 0; m.root[t] > F(0) && c < d; ++c)
      dgamma[static_cast<std::size_t>(c)] +=
          static_cast<F>(input.scale) * static_cast<F>(x(t, c)) / m.root[t] * din(t, c);
  if (gradients.x.data == nullptr || gradients.to == gradient_to::nowhere) return;
  exec.parallel_for(tokens, 16, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      for (index_t c = 0; c < d; ++c) din(t, c) *= factor(c);
      const F root = m.root[t];
      const F along = root > F(0)
                          ? simd::row_dot<A>(x.row(t), static_cast<const F*>(din.row(t)), d) /
                                (static_cast<F>(d) * root * root)
                          : F(0);
      for (index_t c = 0; c < d; ++c) {
        const F g = root > F(0) ? (din(t, c) - along * static_cast<F>(x(t, c))) / root : F(0);
        gradients.x(t, c) = gradients.to == gradient_to::write ? g : gradients.x(t, c) + g;
      }
    }
  });
}

/// The gradients of a codebook_gate, where codes are trained instead of moved: each logit is that
/// of one code, x . c - |c|^2 / 2, so dx = sum of dz c and dc = sum of dz (x - c). Which code is an
/// expert's nearest is a constant.
///
/// Shapes: x [T, d], codes [C, d], dlogits [T, E], gradients.weight [C, d]; bias is unused. Throws:
/// error where the shapes do not fit, C < E, or a gradient shares memory with what is read. Cost: T
/// (C + 2 E) d multiply-adds and T E integers of scratch; no allocation once ws is warm.
/// Determinism: the same bits for every executor and thread count.
template <class T, class W, class F, executor Exec = serial, class A = simd::default_arch>
void codebook_gate_backward(const matrix_view<T>& x, const matrix_view<W>& codes,
                            const matrix_view<const F>& dlogits, const gate_gradients<F>& gradients,
                            workspace& ws, const Exec& exec = {}) {
  constexpr const char* where = "codebook_gate_backward";
  if (gradients.to == gradient_to::nowhere) return;
  const index_t tokens = x.rows, d = x.cols, experts = dlogits.cols;
  check_range(where, "dlogits.cols()", experts, 1, codes.rows);
  check_size(where, "gradients.bias.size()", static_cast<index_t>(gradients.bias.size()), 0);
  check_size(where, "codes.cols()", codes.cols, d);
  check_size(where, "dlogits.rows()", dlogits.rows, tokens);
  check_stride(where, "x", x);
  check_stride(where, "codes", codes);
  check_stride(where, "dlogits", dlogits);
  const auto check = [&](const char* name, const matrix_view<F>& g, index_t rows) {
    if (g.data != nullptr) detail::check_gradient(where, name, g, rows, d, x, codes, dlogits);
  };
  check("gradients.x", gradients.x, tokens);
  check("gradients.weight", gradients.weight, codes.rows);
  struct memory {
    std::int32_t* code;
    F* half;
  };
  const memory m = ws.carve([&](scratch& tape) {
    return memory{tape.take<std::int32_t>(tokens * experts), tape.take<F>(codes.rows)};
  });
  for (index_t c = 0; c < codes.rows; ++c)
    m.half[c] = simd::row_dot<A>(codes.row(c), codes.row(c), d) / 2;
  const bool writes = gradients.to == gradient_to::write;
  exec.parallel_for(tokens, 16, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      if (gradients.x.data != nullptr && writes) std::fill_n(gradients.x.row(t), d, F(0));
      for (index_t e = 0; e < experts; ++e) {
        index_t best = e;
        F most = simd::row_dot<A>(x.row(t), codes.row(e), d) - m.half[e];
        for (index_t c = e + experts; c < codes.rows; c += experts) {
          const F z = simd::row_dot<A>(x.row(t), codes.row(c), d) - m.half[c];
          if (z > most) most = z, best = c;
        }
        m.code[t * experts + e] = static_cast<std::int32_t>(best);
        if (gradients.x.data != nullptr)
          simd::add_scaled_row<A>(codes.row(best), dlogits(t, e), d, gradients.x.row(t));
      }
    }
  });
  if (gradients.weight.data == nullptr) return;
  for (index_t c = 0; writes && c < codes.rows; ++c) std::fill_n(gradients.weight.row(c), d, F(0));
  for (index_t t = 0; t < tokens; ++t)
    for (index_t e = 0; e < experts; ++e) {
      const index_t c = m.code[t * experts + e];
      simd::add_scaled_row<A>(x.row(t), dlogits(t, e), d, gradients.weight.row(c));
      simd::add_scaled_row<A>(codes.row(c), -dlogits(t, e), d, gradients.weight.row(c));
    }
}

/// The gradients of a mixing_gate: of x by the similarities, and of the inner gate's logits, which
/// its own backward pass takes on (and adds to dx).
///
/// With S = softmax(x x^T / temperature) and P = softmax(z): dP = S^T dlogits, dS = dlogits P^T.
/// Shapes: x [T, d], z, dlogits and dz [T, E], dx [T, d] or empty. Throws: error where the shapes
/// do not fit, the temperature is not above 0, or a gradient shares memory with what is read. Cost:
/// T^2 (3 d + 2 E) multiply-adds, T (2 T + 2 E) of scratch; no allocation once ws is warm.
/// Determinism: the same bits for every executor and thread count.
template <class F, executor Exec = serial, class A = simd::default_arch>
void mixing_gate_backward(const matrix_view<const F>& x, const matrix_view<const F>& z,
                          float temperature, const matrix_view<const F>& dlogits, gradient_to to,
                          const matrix_view<F>& dx, const matrix_view<F>& dz, workspace& ws,
                          const Exec& exec = {}) {
  constexpr const char* where = "mixing_gate_backward";
  if (to == gradient_to::nowhere) return;
  if (!(temperature > 0.0f) || !std::isfinite(temperature))
    fail_value(where, "temperature", temperature, "a number above 0");
  const index_t tokens = x.rows, experts = z.cols;
  check_size(where, "z.rows()", z.rows, tokens);
  check_size(where, "dlogits.rows()", dlogits.rows, tokens);
  check_size(where, "dlogits.cols()", dlogits.cols, experts);
  check_stride(where, "x", x);
  check_stride(where, "z", z);
  check_stride(where, "dlogits", dlogits);
  detail::check_gradient(where, "dz", dz, tokens, experts, x, z, dlogits);
  if (dx.data != nullptr) {
    detail::check_gradient(where, "dx", dx, tokens, x.cols, x, z, dlogits);
    check_apart(where, "dz", dz, "dx", dx);
  }
  struct memory {
    F *s, *ds, *p, *dp;
  };
  const memory m = ws.carve([&](scratch& tape) {
    return memory{tape.take<F>(tokens * tokens), tape.take<F>(tokens * tokens),
                  tape.take<F>(tokens * experts), tape.take<F>(tokens * experts)};
  });
  const matrix_view<F> s(m.s, tokens, tokens), ds(m.ds, tokens, tokens);
  const matrix_view<F> p(m.p, tokens, experts), dp(m.dp, tokens, experts);
  const F heat = static_cast<F>(temperature);
  exec.parallel_for(tokens, 16, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      std::copy_n(z.row(t), experts, p.row(t));
      detail::softmax_in_place(p.row(t), experts);
      for (index_t u = 0; u < tokens; ++u)
        s(t, u) = simd::row_dot<A>(x.row(t), x.row(u), x.cols) / heat;
      detail::softmax_in_place(s.row(t), tokens);
    }
  });
  simd::multiply_transposed<A>(matrix_view<const F>(s), dlogits, dp, simd::sum_start::zero, exec);
  detail::pull_softmax<A>(matrix_view<const F>(p), dp, exec);
  const bool writes = to == gradient_to::write;
  for (index_t t = 0; t < tokens; ++t)
    for (index_t e = 0; e < experts; ++e) dz(t, e) = writes ? dp(t, e) : dz(t, e) + dp(t, e);
  if (dx.data == nullptr) return;
  exec.parallel_for(tokens, 16, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t)
      for (index_t u = 0; u < tokens; ++u)
        ds(t, u) =
            simd::row_dot<A>(dlogits.row(t), static_cast<const F*>(p.row(u)), experts) / heat;
  });
  detail::pull_softmax<A>(matrix_view<const F>(s), ds, exec);
  // Both tokens of a pair move it.
  const matrix_view<const F> pairs(ds);
  simd::multiply_rows<A>(pairs, x, dx, writes ? simd::sum_start::zero : simd::sum_start::output,
                         exec);
  simd::multiply_transposed<A>(pairs, x, dx, simd::sum_start::output, exec);
}

}  // namespace moeroute

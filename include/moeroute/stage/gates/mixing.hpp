// Decisions that neighbours share: rows of probabilities mixed over similar tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include <moeroute/simd/probability/softmax_row.hpp>
#include <moeroute/simd/rows/row_product.hpp>
#include <moeroute/stage/gate.hpp>

namespace moeroute {

/// mixed = S P: what is routed of a token is the S-weighted mean over tokens, with S from anywhere
/// (similarities, an attention map).
///
/// Shapes: S [T, U], P [U, E], mixed [T, E]. Throws: error where they do not fit or mixed shares
/// memory with the others. Cost: T U E multiply-adds, no allocation. Determinism: the same bits for
/// every executor. Source: graph-of-tokens routing (arXiv 2505.00792).
template <executor Exec = serial, class A = simd::default_arch>
void mix_probabilities(const matrix_view<const float>& s, const matrix_view<const float>& p,
                       const matrix_view<float>& mixed, const Exec& exec = {}) {
  check_stride("mix_probabilities", "s", s);
  check_stride("mix_probabilities", "p", p);
  check_stride("mix_probabilities", "mixed", mixed);
  simd::multiply_rows<A>(s, p, mixed, simd::sum_start::zero, exec);
}

/// The rows of z become their softmax: NaN counts as -inf, and a row without a logit above -inf is
/// all zeros.
template <executor Exec = serial, class A = simd::default_arch>
void softmax_rows(const matrix_view<float>& z, const Exec& exec = {}) {
  check_stride("softmax_rows", "z", z);
  exec.parallel_for(z.rows, 16, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) simd::softmax_row<A>(z.row(t), z.cols, z.row(t));
  });
}

/// What another gate decides, mixed over similar tokens of the same call:
/// softmax_u(x_t . x_u / temperature) times softmax(the gate's logits). Its columns are
/// probabilities: route them with identity_score. One sequence at a time; a token is similar to
/// itself, and sees those that follow.
///
/// Throws: error where the temperature is not above 0. Cost: T^2 (d + E) multiply-adds beside the
/// gate's own and T (T + 2 d + E) floats of scratch. Determinism: the same bits for every executor
/// and thread count. Source: as mix_probabilities.
template <gate_function G, class A = simd::default_arch>
class mixing_gate {
 public:
  mixing_gate(G gate, float temperature) : gate_(std::move(gate)), temperature_(temperature) {
    if (!(temperature > 0.0f) || !std::isfinite(temperature))
      fail_value("mixing_gate", "temperature", temperature, "a number above 0");
  }

  index_t columns() const { return gate_.columns(); }
  index_t d() const { return gate_.d(); }
  index_t scratch_floats(index_t tokens) const { return tokens * (tokens + 2 * d() + columns()); }

  template <readable_rows X, executor Exec = serial>
  void operator()(const X& x_rows, const matrix_view<float>& logits, float* memory,
                  const Exec& exec = {}) const {
    const auto x = const_view(x_rows);
    const index_t n = x.rows;
    const matrix_view<float> s(memory, n, n), turned(memory + n * n, d(), n);
    const matrix_view<float> p(turned.data + n * d(), n, columns());
    gate_(x, p, exec);
    softmax_rows<Exec, A>(p, exec);
    matrix_view<const float> rows;
    if constexpr (std::is_same_v<element_of<const X>, float>) {
      rows = x;
    } else {
      const matrix_view<float> wide(p.data + n * columns(), n, d());
      for (index_t t = 0; t < n; ++t) simd::convert_row<A>(x.row(t), d(), wide.row(t));
      rows = wide;
    }
    // Whole lines are written: 16 rows at a time.
    exec.parallel_for(ceil_div(d(), block_rows), 1, [&](index_t begin, index_t end) {
      for (index_t first = 0; first < n; first += block_rows)
        for (index_t c = begin * block_rows; c < std::min(d(), end * block_rows); ++c)
          for (index_t t = first; t < std::min(n, first + block_rows); ++t)
            turned(c, t) = rows(t, c);
    });
    // Similarity is mutual: a stripe of rows is multiplied with those from it on, and mirrored.
    constexpr index_t stripe = 64;
    for (index_t first = 0; first < n; first += stripe) {
      const index_t height = std::min(stripe, n - first);
      simd::multiply_rows<A>(rows.middle_rows(first, height),
                             matrix_view<const float>(turned.data + first, d(), n - first, n),
                             matrix_view<float>(s.row(first) + first, height, n - first, n),
                             simd::sum_start::zero, exec);
      for (index_t u = first + height; u < n; ++u)
        for (index_t t = first; t < first + height; ++t) s(u, t) = s(t, u);
    }
    exec.parallel_for(n, 16, [&](index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t)
        simd::scale_row<A>(s.row(t), 1.0f / temperature_, n, s.row(t));
    });
    softmax_rows<Exec, A>(s, exec);
    mix_probabilities<Exec, A>(s, p, logits, exec);
  }

 private:
  G gate_;
  float temperature_;
};

}  // namespace moeroute

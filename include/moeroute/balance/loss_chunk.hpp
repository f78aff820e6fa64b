// BlockFFN's losses of ReLU routing: few experts per chunk of tokens, the same ones for neighbours,
// and all of them in the end.
#pragma once

#include <moeroute/balance/loss.hpp>
#include <moeroute/simd/probability/locality_rows.hpp>
#include <moeroute/simd/probability/share_rows.hpp>

namespace moeroute {

struct share_balance_loss {
  double coefficient = 1.0;
  double eps = 1e-5;       ///< in the share's denominator and in that of the load, as published
  bool normalized = true;  ///< an RMS norm over experts comes before the share
  double norm_eps = 1e-6;  ///< of that norm
};

struct chunk_sparsity_loss {
  double coefficient = 1.0;
  index_t chunk = 64;      ///< consecutive tokens that are served together
  double eps = 1e-5;       ///< in the share's denominator and in the product, as published
  bool normalized = true;  ///< an RMS norm over experts comes before the share
  double norm_eps = 1e-6;  ///< of that norm
};

namespace detail {

// share_e = r_e / D with r = max(z, 0) and D = sum r + eps * rho; rho is the root mean square of r
// where the scores are normalised before, 1 where they are not.
template <class F>
struct relu_share {
  F scale;  // 1 / D; 0: the row has no shares
  F curve;  // dD/dr_e = 1 + curve * r_e

  template <class A = simd::default_arch, class Loss>
  static relu_share of(const F* z, index_t experts, const Loss& loss) {
    const F each = F{1} / static_cast<F>(experts), eps = static_cast<F>(loss.eps);
    const simd::rectified_sums<F> r = simd::sums_of_rectified(z, experts);
    const F rho =
        loss.normalized ? std::sqrt(r.squares * each + static_cast<F>(loss.norm_eps)) : F{1};
    const F scale = F{1} / (r.sum + eps * rho);
    return {std::isfinite(scale) ? scale : F{0}, loss.normalized ? eps * each / rho : F{0}};
  }
};

// The gradient of sum_e slope_e share_e by the logits, times `factor`, given mean = that sum.
template <class F, class A = simd::default_arch>
void share_gradient_to(gradient_to to, const F* z, const F* slope, const relu_share<F>& share,
                       F mean, F factor, index_t experts, F* out) {
  if (share.scale == F{0}) {
    if (to == gradient_to::write) std::fill_n(out, experts, F{0});
    return;
  }
  const simd::share_gradient<F> g{mean, mean * share.curve, factor * share.scale};
  if (to == gradient_to::add)
    simd::share_gradient_row<true>(z, slope, g, experts, out);
  else
    simd::share_gradient_row<false>(z, slope, g, experts, out);
}

}  // namespace detail

/// Chunk sparsity: coefficient * mean over chunks and experts of 1 - prod over the chunk's tokens
/// of (1 - share[t, e] + eps), the probability that the expert is needed, with share = r / (sum r +
/// eps), r = max(z, 0), RMS-normalised before where asked for.
///
/// Backward: G[t, e] = coefficient / (C E) * prod / (1 - share[t, e] + eps), and through the share
/// dz_i = [z_i > 0] (G_i - (sum_j G_j share_j) (1 + eps drho/dr_i)) / D, drho/dr_i = r_i / (E rho).
///
/// Shapes: logits, dlogits [T, E], chunk divides T. Ensures: in coefficient * [-chunk * eps, 1];
/// does not fall when chunks are merged. A masked token's shares are 0 and it has no gradient. A
/// NaN or -inf has no share; so have rows with a +inf. No token: 0. Throws: error where a size
/// differs, chunk does not divide T, or coefficient or an eps is negative. Cost: two sweeps, the
/// second over a chunk that is still in cache. Scratch: 2 E per worker and 2 numbers per token of
/// a chunk. No allocation once warm. Determinism: the same bits for every executor and thread
/// count. Source: Song et al. 2025 (BlockFFN).
template <class F, executor Exec, class A = simd::default_arch>
double chunk_sparsity(const chunk_sparsity_loss& loss, const token_options& how,
                      std::type_identity_t<matrix_view<const F>> z, matrix_view<F> dz,
                      workspace& ws, const Exec& exec) {
  constexpr const char* where = "chunk_sparsity";
  detail::check_loss_shapes(where, how.gradient, how.mask, z, dz);
  detail::check_coefficient(where, loss.coefficient);
  check_range(where, "chunk", loss.chunk, 1, index_t{1} << 40);
  check_size(where, "tokens % chunk", z.rows % loss.chunk, 0);
  if (!(loss.eps > 0.0) || !(loss.norm_eps >= 0.0)) fail(where, "an eps is not positive");
  const index_t experts = z.cols, chunks = z.rows / loss.chunk;
  worker_slots slots(exec.concurrency());
  const int workers = worker_slots::count(exec.concurrency());
  struct memory {
    F *product, *pull;
    double* value;
    detail::relu_share<F>* share;
  };
  const memory m = ws.carve([&](scratch& tape) {
    return memory{tape.take<F>(workers * experts), tape.take<F>(workers * experts),
                  tape.take<double>(chunks),
                  tape.take<detail::relu_share<F>>(chunks > 0 ? workers * loss.chunk : 0)};
  });
  const double unit =
      loss.coefficient / (static_cast<double>(chunks) * static_cast<double>(experts));
  const F eps = static_cast<F>(loss.eps);
  exec.parallel_for(chunks, 1, [&](index_t chunk, index_t) {
    const worker_slots::held worker(slots);
    F *const product = m.product + worker * experts, *const pull = m.pull + worker * experts;
    detail::relu_share<F>* const share = m.share + worker * loss.chunk;
    const index_t first = chunk * loss.chunk;
    std::fill_n(product, experts, F{1});
    double without = 1.0;  // the factor of the tokens that have no shares
    for (index_t i = 0; i < loss.chunk; ++i) {
      const F* const x = z.row(first + i);
      share[i] = how.masked(first + i) ? detail::relu_share<F>{}
                                       : detail::relu_share<F>::of(x, experts, loss);
      if (share[i].scale == F{0})
        without *= 1.0 + loss.eps;
      else
        simd::multiply_rest_row(x, share[i].scale, eps, experts, product);
    }
    m.value[chunk] = 0.0;
    for (index_t e = 0; e < experts; ++e) {
      product[e] *= static_cast<F>(without);
      m.value[chunk] += unit * (1.0 - static_cast<double>(product[e]));
    }
    if (how.gradient == gradient_to::nowhere) return;
    for (index_t i = 0; i < loss.chunk; ++i) {
      const F* const x = z.row(first + i);
      F mean = 0;
      if (share[i].scale != F{0})
        mean = simd::pull_row(x, share[i].scale, eps, product, experts, pull);
      detail::share_gradient_to(how.gradient, x, pull, share[i], mean, static_cast<F>(unit),
                                experts, dz.row(first + i));
    }
  });
  double value = 0.0;
  for (index_t c = 0; c < chunks; ++c) value += m.value[c];
  return value;
}

/// Soft balance of BlockFFN: coefficient * E * sum_e mean_t share[t, e] * f_e, f_e = load_e /
/// (sum load + eps), load_e the tokens with a positive share, a constant. Shares as chunk_sparsity.
///
/// Backward: G[t, e] = coefficient * E / T * f_e, and through the share as chunk_sparsity.
///
/// Shapes: logits, dlogits [T, E]. Ensures: about coefficient where shares and loads are equal;
/// masked tokens take no part; NaN, -inf and rows with a +inf as chunk_sparsity. No token: 0.
/// Throws: error where a size differs or coefficient or an eps is negative. Cost: two sweeps.
/// Scratch: 2 T / 64 rows, 2 numbers per token. No allocation once warm. Determinism: the
/// same bits for every executor and thread count. Source: Song et al. 2025 (BlockFFN).
template <class F, executor Exec, class A = simd::default_arch>
double share_balance(const share_balance_loss& loss, const token_options& how,
                     std::type_identity_t<matrix_view<const F>> z, matrix_view<F> dz, workspace& ws,
                     const Exec& exec) {
  constexpr const char* where = "share_balance";
  detail::check_loss_shapes(where, how.gradient, how.mask, z, dz);
  detail::check_coefficient(where, loss.coefficient);
  if (!(loss.eps > 0.0) || !(loss.norm_eps >= 0.0)) fail(where, "an eps is not positive");
  const index_t experts = z.cols, grain = detail::loss_grain(z.rows);
  const index_t pieces = ceil_div(z.rows, grain), live = detail::live_tokens(how, z.rows);
  struct memory {
    F *sum, *load, *slope;
    double* total;
    detail::relu_share<F>* share;
  };
  const memory m = ws.carve([&](scratch& tape) {
    return memory{tape.take<F>(pieces * experts), tape.take<F>(pieces * experts),
                  tape.take<F>(experts), tape.take<double>(2 * experts),
                  tape.take<detail::relu_share<F>>(z.rows)};
  });
  exec.parallel_for(z.rows, grain, [&](index_t begin, index_t end) {
    F* const sum = m.sum + begin / grain * experts;
    F* const load = m.load + begin / grain * experts;
    std::fill_n(sum, experts, F{0});
    std::fill_n(load, experts, F{0});
    for (index_t t = begin; t < end; ++t) {
      const F* const x = z.row(t);
      m.share[t] =
          how.masked(t) ? detail::relu_share<F>{} : detail::relu_share<F>::of(x, experts, loss);
      if (m.share[t].scale != F{0}) simd::add_share_row(x, m.share[t].scale, experts, sum, load);
    }
  });
  if (live == 0) {
    if (how.gradient == gradient_to::write)
      for (index_t t = 0; t < z.rows; ++t) std::fill_n(dz.row(t), experts, F{0});
    return 0.0;
  }
  double *const sum = m.total, *const load = m.total + experts;
  std::fill_n(m.total, 2 * experts, 0.0);
  for (index_t p = 0; p < pieces; ++p)
    for (index_t e = 0; e < experts; ++e) {
      sum[e] += static_cast<double>(m.sum[p * experts + e]);
      load[e] += static_cast<double>(m.load[p * experts + e]);
    }
  double all = loss.eps, value = 0.0;
  for (index_t e = 0; e < experts; ++e) all += load[e];
  const double unit = loss.coefficient * static_cast<double>(experts) / static_cast<double>(live);
  for (index_t e = 0; e < experts; ++e) {
    const double slope = unit * load[e] / all;
    m.slope[e] = static_cast<F>(slope);
    value += slope * sum[e];
  }
  if (how.gradient == gradient_to::nowhere) return value;
  exec.parallel_for(z.rows, grain, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      const F* const x = z.row(t);
      const detail::relu_share<F>& share = m.share[t];
      const F mean = share.scale != F{0} ? simd::share_dot(x, share.scale, m.slope, experts) : F{0};
      detail::share_gradient_to(how.gradient, x, m.slope, share, mean, F{1}, experts, dz.row(t));
    }
  });
  return value;
}

struct locality_loss {
  double coefficient = 1.0;
  double beta = 100.0;                        ///< steepness of the soft activation
  std::span<const std::int32_t> neighbour{};  ///< [T], the token to resemble, -1: none
};

/// Activation locality: coefficient * the mean over pairs (t, nb) and experts of the binary
/// cross-entropy softplus(a) - a y, a = beta z[nb], y = sigmoid(beta z[t]).
///
/// Backward, N = pairs * E: dz[nb] += coefficient beta (sigmoid(a) - y) / N,
/// dz[t] -= coefficient beta a y (1 - y) / N: the target is not detached, as published.
///
/// Shapes: logits, dlogits [T, E]. Ensures: pairs with a masked token take no part; elements that
/// are not finite add nothing; sigmoids beyond 40 in size count as 0 or 1, off by 4e-18. No pair:
/// 0. Throws: error where a size differs, a neighbour is outside [-1, T), or coefficient or beta <
/// 0. Cost: one sweep over the pairs. No allocation. Determinism: runs on the calling thread, since
/// tokens may share a neighbour. Source: Song et al. 2025 (BlockFFN).
template <class F, class A = simd::default_arch>
double activation_locality(const locality_loss& loss, const token_options& how,
                           std::type_identity_t<matrix_view<const F>> z, matrix_view<F> dz) {
  constexpr const char* where = "activation_locality";
  detail::check_loss_shapes(where, how.gradient, how.mask, z, dz);
  detail::check_coefficient(where, loss.coefficient);
  if (!(loss.beta >= 0.0) || std::isinf(loss.beta)) fail(where, "beta is not finite and >= 0");
  check_size(where, "neighbour.size", static_cast<index_t>(loss.neighbour.size()), z.rows);
  const auto neighbour = [&](index_t t) {
    return index_t{loss.neighbour[static_cast<std::size_t>(t)]};
  };
  const auto pairs_up = [&](index_t t) {
    return neighbour(t) >= 0 && !how.masked(t) && !how.masked(neighbour(t));
  };
  index_t pairs = 0;
  for (index_t t = 0; t < z.rows; ++t) {
    check_range(where, "neighbour", neighbour(t), -1, z.rows - 1);
    pairs += pairs_up(t);
  }
  if (how.gradient == gradient_to::write)
    for (index_t t = 0; t < z.rows; ++t) std::fill_n(dz.row(t), z.cols, F{0});
  if (pairs == 0) return 0.0;
  const double unit = loss.coefficient / (static_cast<double>(pairs) * static_cast<double>(z.cols));
  double value = 0.0;
  for (index_t t = 0; t < z.rows; ++t) {
    if (!pairs_up(t)) continue;
    const bool writes = how.gradient != gradient_to::nowhere;
    const index_t nb = neighbour(t);
    value +=
        unit * static_cast<double>(simd::locality_row(
                   z.row(nb), z.row(t), static_cast<F>(loss.beta), static_cast<F>(unit * loss.beta),
                   z.cols, writes ? dz.row(nb) : nullptr, writes ? dz.row(t) : nullptr));
  }
  return value;
}

}  // namespace moeroute

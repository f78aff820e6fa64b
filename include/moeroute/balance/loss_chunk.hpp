// BlockFFN's losses of ReLU routing: few experts per chunk of tokens, the same ones for neighbours,
// and all of them in the end.
#pragma once

#include <moeroute/balance/loss.hpp>

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
struct relu_share {
  double sum, rho, divisor;

  template <class F, class Loss>
  static relu_share of(const F* z, index_t experts, const Loss& loss) {
    double sum = 0.0, squares = 0.0;
    for (index_t e = 0; e < experts; ++e) {
      const double r = z[e] > F{0} ? static_cast<double>(z[e]) : 0.0;
      sum += r;
      squares += r * r;
    }
    const double rho =
        loss.normalized ? std::sqrt(squares / static_cast<double>(experts) + loss.norm_eps) : 1.0;
    return {sum, rho, sum + loss.eps * rho};
  }

  template <class F>
  double share(F z) const {
    return z > F{0} ? static_cast<double>(z) / divisor : 0.0;
  }
};

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
/// second over a chunk that is still in cache. Scratch: E per worker and 3 numbers per token of a
/// chunk. No allocation once warm. Determinism: the same bits for every executor and thread count.
/// Source: Song et al. 2025 (BlockFFN).
template <class F, executor Exec>
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
    double *product, *value;
    detail::relu_share* share;
  };
  const memory m = ws.carve([&](scratch& tape) {
    return memory{tape.take<double>(workers * experts), tape.take<double>(chunks),
                  tape.take<detail::relu_share>(chunks > 0 ? workers * loss.chunk : 0)};
  });
  const double unit =
      loss.coefficient / (static_cast<double>(chunks) * static_cast<double>(experts));
  exec.parallel_for(chunks, 1, [&](index_t chunk, index_t) {
    const worker_slots::held worker(slots);
    double* const product = m.product + worker * experts;
    detail::relu_share* const share = m.share + worker * loss.chunk;
    const index_t first = chunk * loss.chunk;
    const auto dead = [&](index_t i) {
      return how.masked(first + i) || !std::isfinite(share[i].divisor) || !(share[i].divisor > 0.0);
    };
    std::fill_n(product, experts, 1.0);
    for (index_t i = 0; i < loss.chunk; ++i) {
      const F* const x = z.row(first + i);
      share[i] = detail::relu_share::of(x, experts, loss);
      const bool none = dead(i);
      for (index_t e = 0; e < experts; ++e)
        product[e] *= 1.0 - (none ? 0.0 : share[i].share(x[e])) + loss.eps;
    }
    m.value[chunk] = 0.0;
    for (index_t e = 0; e < experts; ++e) m.value[chunk] += unit * (1.0 - product[e]);
    if (how.gradient == gradient_to::nowhere) return;
    for (index_t i = 0; i < loss.chunk; ++i) {
      const F* const x = z.row(first + i);
      F* const out = dz.row(first + i);
      if (how.gradient == gradient_to::write) std::fill_n(out, experts, F{0});
      if (dead(i)) continue;
      const detail::relu_share& s = share[i];
      const auto pull = [&](index_t e) {
        return unit * product[e] / (1.0 - s.share(x[e]) + loss.eps);
      };
      double mean = 0.0;
      for (index_t e = 0; e < experts; ++e) mean += pull(e) * s.share(x[e]);
      const double curve =
          loss.normalized ? loss.eps / (static_cast<double>(experts) * s.rho) : 0.0;
      for (index_t e = 0; e < experts; ++e)
        if (x[e] > F{0}) {
          const double along = 1.0 + curve * static_cast<double>(x[e]);
          out[e] += static_cast<F>((pull(e) - mean * along) / s.divisor);
        }
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
/// Scratch: 2 T / 64 rows of double, 3 numbers per token. No allocation once warm. Determinism: the
/// same bits for every executor and thread count. Source: Song et al. 2025 (BlockFFN).
template <class F, executor Exec>
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
    double *sum, *load, *slope;
    detail::relu_share* share;
  };
  const memory m = ws.carve([&](scratch& tape) {
    return memory{tape.take<double>(pieces * experts), tape.take<double>(pieces * experts),
                  tape.take<double>(experts), tape.take<detail::relu_share>(z.rows)};
  });
  const auto dead = [&](index_t t) {
    return how.masked(t) || !std::isfinite(m.share[t].divisor) || !(m.share[t].divisor > 0.0);
  };
  exec.parallel_for(z.rows, grain, [&](index_t begin, index_t end) {
    double* const sum = m.sum + begin / grain * experts;
    double* const load = m.load + begin / grain * experts;
    std::fill_n(sum, experts, 0.0);
    std::fill_n(load, experts, 0.0);
    for (index_t t = begin; t < end; ++t) {
      const F* const x = z.row(t);
      m.share[t] = detail::relu_share::of(x, experts, loss);
      if (dead(t)) continue;
      for (index_t e = 0; e < experts; ++e) {
        const double s = m.share[t].share(x[e]);
        sum[e] += s;
        load[e] += s > 0.0 ? 1.0 : 0.0;
      }
    }
  });
  for (index_t p = 1; p < pieces; ++p)
    for (index_t e = 0; e < experts; ++e) {
      m.sum[e] += m.sum[p * experts + e];
      m.load[e] += m.load[p * experts + e];
    }
  if (live == 0) {
    if (how.gradient == gradient_to::write)
      for (index_t t = 0; t < z.rows; ++t) std::fill_n(dz.row(t), experts, F{0});
    return 0.0;
  }
  double all = loss.eps, value = 0.0;
  for (index_t e = 0; e < experts; ++e) all += m.load[e];
  const double unit = loss.coefficient * static_cast<double>(experts) / static_cast<double>(live);
  for (index_t e = 0; e < experts; ++e) {
    m.slope[e] = unit * m.load[e] / all;
    value += m.slope[e] * m.sum[e];
  }
  if (how.gradient == gradient_to::nowhere) return value;
  exec.parallel_for(z.rows, grain, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      const F* const x = z.row(t);
      F* const out = dz.row(t);
      if (how.gradient == gradient_to::write) std::fill_n(out, experts, F{0});
      if (dead(t)) continue;
      const detail::relu_share& s = m.share[t];
      double mean = 0.0;
      for (index_t e = 0; e < experts; ++e) mean += m.slope[e] * s.share(x[e]);
      const double curve =
          loss.normalized ? loss.eps / (static_cast<double>(experts) * s.rho) : 0.0;
      for (index_t e = 0; e < experts; ++e)
        if (x[e] > F{0}) {
          const double along = 1.0 + curve * static_cast<double>(x[e]);
          out[e] += static_cast<F>((m.slope[e] - mean * along) / s.divisor);
        }
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
/// are not finite add nothing. No pair: 0. Throws: error where a size differs, a neighbour is
/// outside [-1, T), or coefficient or beta < 0. Cost: one sweep over the pairs. No allocation.
/// Determinism: runs on the calling thread, since tokens may share a neighbour. Source: Song et al.
/// 2025 (BlockFFN).
template <class F>
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
    const index_t nb = neighbour(t);
    for (index_t e = 0; e < z.cols; ++e) {
      const double a = loss.beta * static_cast<double>(z(nb, e));
      const double b = loss.beta * static_cast<double>(z(t, e));
      if (!std::isfinite(a) || !std::isfinite(b)) continue;
      const double y = 1.0 / (1.0 + std::exp(-b)), prediction = 1.0 / (1.0 + std::exp(-a));
      value += unit * (std::max(a, 0.0) + std::log1p(std::exp(-std::abs(a))) - a * y);
      if (how.gradient == gradient_to::nowhere) continue;
      dz(nb, e) += static_cast<F>(unit * loss.beta * (prediction - y));
      dz(t, e) -= static_cast<F>(unit * loss.beta * a * y * (1.0 - y));
    }
  }
  return value;
}

}  // namespace moeroute

// The load loss of noisy top-k: the expected number of tokens per expert, smooth in the logits.
#pragma once

#include <moeroute/balance/loss_sums.hpp>
#include <moeroute/simd/probability/noisy_load_rows.hpp>
#include <moeroute/simd/select/top_k.hpp>

namespace moeroute {

/// What a logit must exceed to be selected under fresh noise of its own.
enum class load_threshold {
  without_self,  ///< the k-th largest noisy logit of the others (Shazeer et al. 2017)
  kth,           ///< the k-th largest noisy logit, for every expert (Tutel, V-MoE)
};

struct load_loss {
  double coefficient = 0.01;
  index_t k = 1;
  load_threshold threshold = load_threshold::without_self;
  variance kind = variance::population;
  double eps = 1e-10;
};

namespace detail {

// What the k + 1 best of a block of rows are kept in, for one worker.
template <class F>
struct load_ranks {
  F* value;              // [k + 1][16]
  std::int32_t* column;  // [k + 1][16]
  std::uint64_t* key;

  static load_ranks take(scratch& tape, index_t workers, index_t experts, index_t ranks) {
    return {tape.take<F>(workers * ranks * block_rows),
            tape.take<std::int32_t>(workers * ranks * block_rows),
            tape.take<std::uint64_t>(workers * simd::top_k_scratch(experts, ranks))};
  }
  load_ranks of(index_t worker, index_t experts, index_t ranks) const {
    return {value + worker * ranks * block_rows, column + worker * ranks * block_rows,
            key + worker * simd::top_k_scratch(experts, ranks)};
  }
};

template <class A = simd::default_arch>
void best_of_rows(const float* rows, index_t stride, int n, index_t experts, index_t ranks,
                  const load_ranks<float>& to) {
  simd::top_k_block<A>(rows, stride, n, experts, static_cast<int>(ranks), to.value, to.column,
                       to.key);
}

// By insertion: for tests of gradients.
inline void best_of_rows(const double* rows, index_t stride, int n, index_t experts, index_t ranks,
                         const load_ranks<double>& to) {
  for (int i = 0; i < n; ++i) {
    double* const value = to.value + i;
    std::int32_t* const column = to.column + i;
    for (index_t r = 0; r < ranks; ++r) {
      value[r * block_rows] = -std::numeric_limits<double>::infinity();
      column[r * block_rows] = no_expert;
    }
    for (index_t e = 0; e < experts; ++e) {
      const double x = rows[i * stride + e];
      index_t at = ranks;
      for (; at > 0 && x > value[(at - 1) * block_rows]; --at)
        if (at < ranks) {
          value[at * block_rows] = value[(at - 1) * block_rows];
          column[at * block_rows] = column[(at - 1) * block_rows];
        }
      if (at == ranks) continue;
      value[at * block_rows] = x;
      column[at * block_rows] = static_cast<std::int32_t>(e);
    }
  }
}

}  // namespace detail

/// coefficient * CV^2 of Load_e = sum_t Phi((z[t, e] - th) / sigma[t, e]), th the threshold among
/// the noisy logits h = z + n * sigma, n a constant.
///
/// Backward, with u = (z - th) / sigma and w = coefficient * dCV2/dLoad_e * phi(u) / sigma:
///   dz[t, e] += w, dz[t, expert of th] -= w,
/// and where sigma is learned, th = z + n * sigma of its expert:
///   dsigma[t, e] -= w u, dsigma[t, expert of th] -= w n.
///
/// Shapes: logits, noisy, dlogits [T, E]; sigma [T, E] > 0, or [1, 1] for one value; dsigma [T, E],
/// or empty where it is not wanted. Ensures: a NaN
/// counts as -inf; where logit and threshold are both infinite the expert has no probability and no
/// gradient. No threshold (k = E): probability 1. Masked tokens take no part.
/// Throws: error where a size differs, k is outside [1, E], or coefficient or eps is negative.
/// Cost: a selection of k + 1, then two sweeps with an error function and an exponential per
/// element. Scratch: T / 64 rows, 2 thresholds per token. No allocation once warm. Determinism: the
/// same bits for every executor and thread count. Source: Shazeer et al. 2017; Tutel.
template <class F, executor Exec, class A = simd::default_arch>
double noisy_load_loss(const load_loss& loss, const token_options& how,
                       std::type_identity_t<matrix_view<const F>> z,
                       std::type_identity_t<matrix_view<const F>> noisy,
                       std::type_identity_t<matrix_view<const F>> sigma, matrix_view<F> dz,
                       std::type_identity_t<matrix_view<F>> dsigma, workspace& ws,
                       const Exec& exec) {
  constexpr const char* where = "load_loss";
  detail::check_loss_shapes(where, how.gradient, how.mask, z, dz);
  detail::check_coefficient(where, loss.coefficient);
  detail::check_eps(where, loss.eps);
  check_range(where, "k", loss.k, 1, z.cols);
  check_size(where, "noisy.rows", noisy.rows, z.rows);
  check_size(where, "noisy.cols", noisy.cols, z.cols);
  check_stride(where, "noisy", noisy);
  const bool constant = sigma.rows == 1 && sigma.cols == 1;
  if (!constant) {
    check_size(where, "sigma.rows", sigma.rows, z.rows);
    check_size(where, "sigma.cols", sigma.cols, z.cols);
    check_stride(where, "sigma", sigma);
  }
  const bool learned = dsigma.data != nullptr && how.gradient != gradient_to::nowhere;
  if (learned) {
    if (constant && (z.rows != 1 || z.cols != 1))
      fail(where, "dsigma is given, expected sigma of [T, E]");
    check_size(where, "dsigma.rows", dsigma.rows, z.rows);
    check_size(where, "dsigma.cols", dsigma.cols, z.cols);
    check_stride(where, "dsigma", dsigma);
    check_apart(where, "dlogits", dz, "dsigma", dsigma);
  }
  if (how.gradient != gradient_to::nowhere)
    for (const auto& from : {z, noisy, sigma}) {
      check_apart(where, "logits, noisy or sigma", from, "dlogits", dz);
      if (learned) check_apart(where, "logits, noisy or sigma", from, "dsigma", dsigma);
    }
  const index_t experts = z.cols, grain = detail::loss_grain(z.rows);
  const index_t pieces = ceil_div(z.rows, grain), ranks = std::min(loss.k + 1, experts);
  worker_slots slots(exec.concurrency());
  struct memory {
    F *sum, *slope;
    double *slope_of_total, *total;
    simd::load_bound<F>* bound;
    detail::load_ranks<F> best;
  };
  const memory m = ws.carve([&](scratch& tape) {
    return memory{
        tape.take<F>(pieces * experts),
        tape.take<F>(experts),
        tape.take<double>(experts),
        tape.take<double>(experts),
        tape.take<simd::load_bound<F>>(z.rows),
        detail::load_ranks<F>::take(tape, worker_slots::count(exec.concurrency()), experts, ranks)};
  });
  const auto row_at = [&](index_t t) {
    return simd::noisy_row<F>{z.row(t), noisy.row(t), constant ? nullptr : sigma.row(t),
                              constant ? sigma(0, 0) : F{1}};
  };
  exec.parallel_for(z.rows, grain, [&](index_t begin, index_t end) {
    const worker_slots::held worker(slots);
    const detail::load_ranks<F> best = m.best.of(worker, experts, ranks);
    F* const sum = m.sum + begin / grain * experts;
    std::fill_n(sum, experts, F{0});
    for (index_t first = begin; first < end; first += block_rows) {
      const int n = static_cast<int>(std::min<index_t>(block_rows, end - first));
      detail::best_of_rows(noisy.row(first), noisy.stride, n, experts, ranks, best);
      for (int i = 0; i < n; ++i) {
        if (how.masked(first + i)) continue;
        simd::load_bound<F>& bound = m.bound[first + i];
        for (index_t r = 0; r < 2; ++r) {
          const index_t rank = loss.threshold == load_threshold::kth ? loss.k - 1 : loss.k - 1 + r;
          const bool there = rank < ranks;
          bound.threshold[r] =
              there ? best.value[rank * block_rows + i] : -std::numeric_limits<F>::infinity();
          bound.column[r] = there ? best.column[rank * block_rows + i] : no_expert;
        }
        simd::add_load_row(row_at(first + i), bound, experts, sum);
      }
    }
  });
  std::fill_n(m.total, experts, 0.0);
  std::fill_n(m.slope_of_total, experts, 0.0);
  for (index_t p = 0; p < pieces; ++p)
    for (index_t e = 0; e < experts; ++e) m.total[e] += static_cast<double>(m.sum[p * experts + e]);
  const double value = detail::squared_variation(loss.coefficient, loss.kind, loss.eps, experts,
                                                 m.total, m.slope_of_total);
  if (how.gradient == gradient_to::nowhere) return value;
  for (index_t e = 0; e < experts; ++e) m.slope[e] = static_cast<F>(m.slope_of_total[e]);
  exec.parallel_for(z.rows, grain, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      F* const out = dz.row(t);
      F* const by_sigma = learned ? dsigma.row(t) : nullptr;
      if (how.gradient == gradient_to::write) {
        std::fill_n(out, experts, F{0});
        if (learned) std::fill_n(by_sigma, experts, F{0});
      }
      if (how.masked(t)) continue;
      const simd::load_bound<F>& bound = m.bound[t];
      const simd::threshold_push<F> push =
          simd::load_gradient_row(row_at(t), bound, m.slope, experts, out, by_sigma);
      for (int i = 0; i < 2; ++i) {
        const index_t th = bound.column[i];
        if (th < 0 || push.at[i] == F{0}) continue;
        out[th] -= push.at[i];
        if (learned) by_sigma[th] -= push.at[i] * (bound.threshold[i] - z(t, th)) / sigma(t, th);
      }
    }
  });
  return value;
}
template <class F, executor Exec, class A = simd::default_arch>
double noisy_load_loss(const load_loss& loss, const token_options& how,
                       std::type_identity_t<matrix_view<const F>> z,
                       std::type_identity_t<matrix_view<const F>> noisy,
                       std::type_identity_t<matrix_view<const F>> sigma, matrix_view<F> dz,
                       workspace& ws, const Exec& exec) {
  return noisy_load_loss<F>(loss, how, z, noisy, sigma, dz, {}, ws, exec);
}

/// From the gradient by sigma to that by the noise logits x of sigma = softplus(x) + floor, in
/// place: dx = dsigma * sigmoid(x), and sigmoid(x) = 1 - exp(floor - sigma).
///
/// Shapes: both [T, E]. Throws: error where a size differs. Source: Shazeer et al. 2017.
template <class F>
void noise_logit_gradient(std::type_identity_t<matrix_view<const F>> sigma, double floor,
                          matrix_view<F> dsigma) {
  constexpr const char* where = "noise_logit_gradient";
  check_size(where, "sigma.rows", sigma.rows, dsigma.rows);
  check_size(where, "sigma.cols", sigma.cols, dsigma.cols);
  check_stride(where, "sigma", sigma);
  check_stride(where, "dsigma", dsigma);
  check_apart(where, "sigma", sigma, "dsigma", dsigma);
  for (index_t t = 0; t < dsigma.rows; ++t)
    for (index_t e = 0; e < dsigma.cols; ++e)
      dsigma(t, e) = static_cast<F>(static_cast<double>(dsigma(t, e)) *
                                    -std::expm1(floor - static_cast<double>(sigma(t, e))));
}

}  // namespace moeroute

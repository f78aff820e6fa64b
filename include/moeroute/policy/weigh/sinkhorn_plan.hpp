// Weights that are entries of a balanced plan, which couples the tokens, and their gradient:
// through the iterations, or at the point where they end.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <span>
#include <string>
#include <type_traits>

#include <moeroute/base/gradient.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/policy/batch/sinkhorn_scaling.hpp>
#include <moeroute/simd/probability/sinkhorn_sweep.hpp>

namespace moeroute {

/// How a plan's gradient is found.
enum class plan_gradient {
  unrolled,  ///< back through every iteration: the derivative of what was computed
  implicit,  ///< of the plan that the iterations approach, by conjugate gradients: no iteration
             ///< kept
};

/// What weights of a plan are.
enum class plan_share {
  of_choices,  ///< entries divided by their sum over the token's choices (sinkhorn, SSR)
  entries,     ///< as they are (sinkhorn_expert_choice)
};

namespace detail {

// A plan P = u K v in double, and what its gradient needs. K = exp((x - the row's largest) /
// temperature), as the router's: eps counts beside it, what the router flushes is 0, and factors
// end where the router's do, in the log domain before they overflow.
template <class A = simd::default_arch>
class plan_of {
 public:
  index_t tokens, experts, iterations;
  double eps, most;                               // of a sum; a factor is at most that
  double *kernel, *similarity, *row_mass, *plan;  // [T, E], [T, E], [T], [T, E]
  double *u, *v;                                  // [n + 1, T], [n + 1, E]
  double* column_mass;                            // [E]
  double* spare;                                  // [2 T + 8 E]

  static plan_of carve(scratch& tape, index_t tokens, index_t experts,
                       const sinkhorn_scaling& how) {
    const index_t n = how.most_iterations;
    plan_of p{};
    p.tokens = tokens;
    p.experts = experts;
    p.iterations = n;
    const bool log = how.domain == sinkhorn_domain::logarithm;
    p.eps = log ? 0.0 : static_cast<double>(how.eps);
    p.most = log ? 1e280 : static_cast<double>(simd::sinkhorn_most);
    p.kernel = tape.take<double>(tokens * experts);
    p.similarity =
        tape.take<double>(how.similarity == plan_similarity::softmax ? tokens * experts : 0);
    p.row_mass = tape.take<double>(tokens);
    p.plan = tape.take<double>(tokens * experts);
    p.u = tape.take<double>((n + 1) * tokens);
    p.v = tape.take<double>((n + 1) * experts);
    p.column_mass = tape.take<double>(experts);
    p.spare = tape.take<double>(2 * tokens + 8 * experts);
    return p;
  }

  template <std::floating_point F>
  void run(const sinkhorn_scaling& how, const matrix_view<const F>& z, const side_inputs& side,
           std::span<const float> shares) {
    load(how, z, side, shares);
    const bool rows_first = how.order == scaling_order::rows_then_columns;
    std::fill_n(u, tokens, 1.0);
    std::fill_n(v, experts, 1.0);
    for (index_t i = 1; i <= iterations; ++i)
      for (const bool rows : {rows_first, !rows_first}) {
        if (rows)
          scale_rows(v + (rows_first ? i - 1 : i) * experts, u + i * tokens);
        else
          scale_columns(u + (rows_first ? i : i - 1) * tokens, v + i * experts);
      }
    const double *last_u = u + iterations * tokens, *last_v = v + iterations * experts;
    for (index_t t = 0; t < tokens; ++t)
      for (index_t e = 0; e < experts; ++e)
        plan[t * experts + e] = last_u[t] * kernel[t * experts + e] * last_v[e];
  }

  // dplan [T, E] becomes the gradient of the logits.
  void pull(const sinkhorn_scaling& how, plan_gradient by, double* dplan) const {
    if (by == plan_gradient::unrolled)
      unroll(how, dplan);
    else
      solve(dplan);
    for (index_t t = 0; t < tokens; ++t) {
      double* const row = dplan + t * experts;
      for (index_t e = 0; e < experts; ++e) row[e] /= static_cast<double>(how.temperature);
      if (how.similarity != plan_similarity::softmax) continue;
      const double* const p = similarity + t * experts;
      double mean = 0.0;
      for (index_t e = 0; e < experts; ++e) mean += p[e] * row[e];
      for (index_t e = 0; e < experts; ++e) row[e] = p[e] * (row[e] - mean);
    }
  }

 private:
  template <std::floating_point F>
  void load(const sinkhorn_scaling& how, const matrix_view<const F>& z, const side_inputs& side,
            std::span<const float> shares) {
    constexpr double never = -std::numeric_limits<double>::infinity();
    index_t live = 0;
    for (index_t t = 0; t < tokens; ++t) {
      double* const k = kernel + t * experts;
      double top = never;
      for (index_t e = 0; e < experts; ++e) {
        const auto x = static_cast<double>(z(t, e));
        k[e] = !side.masked(t) && x > never ? x : never;
        top = std::max(top, k[e]);
      }
      if (how.similarity == plan_similarity::softmax && top > never) {
        double* const p = similarity + t * experts;
        double sum = 0.0;
        for (index_t e = 0; e < experts; ++e)
          sum += p[e] = k[e] == top ? 1.0 : k[e] > never ? std::exp(k[e] - top) : 0.0;
        for (index_t e = 0; e < experts; ++e) {
          p[e] /= sum;
          if (k[e] > never) k[e] = p[e];
        }
        top = *std::max_element(k, k + experts);
      } else if (how.similarity == plan_similarity::softmax) {
        std::fill_n(similarity + t * experts, experts, 0.0);
      }
      const double heat = static_cast<double>(how.temperature);
      const double flush = how.domain == sinkhorn_domain::logarithm
                               ? 0.0
                               : static_cast<double>(simd::sinkhorn_flush);
      for (index_t e = 0; e < experts; ++e) {
        k[e] = !(k[e] > never) ? 0.0 : k[e] == top ? 1.0 : std::exp((k[e] - top) / heat);
        if (k[e] < flush) k[e] = 0.0;
      }
      const bool there = top > never;
      live += there;
      row_mass[t] = there ? 1.0 : 0.0;
    }
    const auto n = static_cast<double>(live), m = static_cast<double>(experts);
    for (index_t t = 0; t < tokens && how.mass == plan_mass::one; ++t) row_mass[t] /= n;
    const double all = how.mass == plan_mass::one ? 1.0 : n;
    std::fill_n(column_mass, experts, all / m);
    double sum = 0.0;
    for (const float s : shares) sum += static_cast<double>(s);
    for (std::size_t e = 0; e < shares.size(); ++e)
      column_mass[e] = all * (static_cast<double>(shares[e]) / sum);
  }

  void scale_rows(const double* from, double* to) const {
    for (index_t t = 0; t < tokens; ++t) {
      double sum = 0.0;
      for (index_t e = 0; e < experts; ++e) sum += kernel[t * experts + e] * from[e];
      to[t] = factor(row_mass[t], sum);
    }
  }
  void scale_columns(const double* from, double* to) const {
    std::fill_n(to, experts, 0.0);
    for (index_t t = 0; t < tokens; ++t)
      for (index_t e = 0; e < experts; ++e) to[e] += kernel[t * experts + e] * from[t];
    for (index_t e = 0; e < experts; ++e) to[e] = factor(column_mass[e], to[e]);
  }

  double factor(double mass, double sum) const {
    return sum > 0.0 ? std::min(mass / (sum + eps), most) : 0.0;
  }
  // What a sum's derivative is of its factor's: nothing moves a factor that has come to its end.
  double of_sum(double factor, double gradient, double mass) const {
    return mass > 0.0 && factor < most ? -gradient * factor * factor / mass : 0.0;
  }

  // u = r / (K v + eps) and v = c / (K^T u + eps), backwards: da = -du u^2 / r, db = -dv v^2 / c.
  void unroll(const sinkhorn_scaling& how, double* dplan) const {
    const bool rows_first = how.order == scaling_order::rows_then_columns;
    double *du = spare, *da = spare + tokens, *dv = spare + 2 * tokens, *db = dv + experts;
    std::fill_n(du, tokens, 0.0);
    std::fill_n(dv, experts, 0.0);
    const double *last_u = u + iterations * tokens, *last_v = v + iterations * experts;
    for (index_t t = 0; t < tokens; ++t)
      for (index_t e = 0; e < experts; ++e) {
        double& g = dplan[t * experts + e];
        const double flow = g * kernel[t * experts + e];
        du[t] += flow * last_v[e];
        dv[e] += flow * last_u[t];
        g = flow * last_u[t] * last_v[e];  // dK K: it stays finite where factors are huge
      }
    for (index_t i = iterations; i >= 1; --i)
      for (const bool rows : {!rows_first, rows_first}) {
        const double* const before_v = v + (rows_first ? i - 1 : i) * experts;
        const double* const before_u = u + (rows_first ? i : i - 1) * tokens;
        const double *ui = u + i * tokens, *vi = v + i * experts;
        if (rows) {
          for (index_t t = 0; t < tokens; ++t) da[t] = of_sum(ui[t], du[t], row_mass[t]);
          std::fill_n(du, tokens, 0.0);
          for (index_t t = 0; t < tokens; ++t)
            for (index_t e = 0; e < experts; ++e) {
              const double flow = kernel[t * experts + e] * da[t];
              dplan[t * experts + e] += flow * before_v[e];
              dv[e] += flow;
            }
        } else {
          for (index_t e = 0; e < experts; ++e) db[e] = of_sum(vi[e], dv[e], column_mass[e]);
          std::fill_n(dv, experts, 0.0);
          for (index_t t = 0; t < tokens; ++t)
            for (index_t e = 0; e < experts; ++e) {
              const double flow = kernel[t * experts + e] * db[e];
              dplan[t * experts + e] += flow * before_u[t];
              du[t] += flow;
            }
        }
      }
    for (index_t t = 0; t < tokens; ++t) {
      double* const g = dplan + t * experts;
      const double* const k = kernel + t * experts;
      double sum = 0.0;
      for (index_t e = 0; e < experts; ++e) sum += g[e];
      // Every entry moves against the row's largest: a constant added to the row moves nothing.
      g[std::max_element(k, k + experts) - k] -= sum;
    }
  }

  // ln P = x + f + g with the sums of rows and columns held: with G = dP P, solve
  //   r a + P b = G 1,  P^T a + c b = G^T 1   and take   dx = G - P (a + b).
  // What a leaves of the second is solved for b by conjugate gradients; it is singular along 1,
  // where its right side has nothing.
  void solve(double* dplan) const {
    double *row = spare, *a = spare + tokens, *column = spare + 2 * tokens, *b = column + experts;
    double *r = b + experts, *d = r + experts, *s = d + experts;
    std::fill_n(column, experts, 0.0);
    std::fill_n(r, experts, 0.0);
    for (index_t t = 0; t < tokens; ++t) {
      row[t] = a[t] = 0.0;
      for (index_t e = 0; e < experts; ++e) {
        const double p = plan[t * experts + e];
        double& g = dplan[t * experts + e];
        g *= p;
        row[t] += p;
        column[e] += p;
        a[t] += g;
        r[e] += g;
      }
      for (index_t e = 0; row[t] > 0.0 && e < experts; ++e)
        r[e] -= plan[t * experts + e] * a[t] / row[t];
    }
    const auto apply = [&](const double* x, double* y) {
      for (index_t e = 0; e < experts; ++e) y[e] = column[e] * x[e];
      for (index_t t = 0; t < tokens; ++t) {
        if (!(row[t] > 0.0)) continue;
        double sum = 0.0;
        for (index_t e = 0; e < experts; ++e) sum += plan[t * experts + e] * x[e];
        for (index_t e = 0; e < experts; ++e) y[e] -= plan[t * experts + e] * sum / row[t];
      }
    };
    const auto dot = [&](const double* x, const double* y) {
      double sum = 0.0;
      for (index_t e = 0; e < experts; ++e) sum += x[e] * y[e];
      return sum;
    };
    std::fill_n(b, experts, 0.0);
    std::copy_n(r, experts, d);
    double left = dot(r, r);
    const double enough = left * 1e-28;
    for (index_t i = 0; i < 2 * experts && left > enough; ++i) {
      apply(d, s);
      const double curve = dot(d, s);
      if (!(curve > 0.0)) break;
      const double step = left / curve;
      for (index_t e = 0; e < experts; ++e) {
        b[e] += step * d[e];
        r[e] -= step * s[e];
      }
      const double now = dot(r, r);
      for (index_t e = 0; e < experts; ++e) d[e] = r[e] + now / left * d[e];
      left = now;
    }
    for (index_t t = 0; t < tokens; ++t) {
      double* const g = dplan + t * experts;
      const double* const p = plan + t * experts;
      double own = a[t];
      for (index_t e = 0; e < experts; ++e) own -= p[e] * b[e];
      own = row[t] > 0.0 ? own / row[t] : 0.0;
      for (index_t e = 0; e < experts; ++e) g[e] -= p[e] * (own + b[e]);
    }
  }
};

template <std::floating_point F>
void check_plan(const char* where, const sinkhorn_scaling& how, const matrix_view<const F>& z,
                const side_inputs& side, std::span<const float> shares) {
  how.check(where);
  check_shares(where, shares, z.cols);
  check_stride(where, "logits", z);
  check_range(where, "experts", z.cols, 1, max_experts);
  if (how.tolerance != 0.0f)
    fail(where, "tolerance is " + std::to_string(how.tolerance) +
                    ", expected 0: gradients are of a fixed number of iterations");
  if (!side.mask.empty())
    check_size(where, "mask.size()", static_cast<index_t>(side.mask.size()), z.rows);
}

// f(choice, entry of the plan, sum over the token's choices or 1) for every choice that has one.
template <class F>
void for_each_plan_choice(const assignment& choices, const double* plan, plan_share share, F&& f) {
  for (index_t t = 0; t < choices.tokens(); ++t) {
    const auto ids = choices.ids(t);
    double sum = share == plan_share::of_choices ? 0.0 : 1.0;
    for (const expert_id e : ids) {
      check_range("weigh_plan", "an id", e, no_expert, choices.experts() - 1);
      if (share == plan_share::of_choices && e >= 0) sum += plan[t * choices.experts() + e];
    }
    for (std::size_t c = 0; c < ids.size(); ++c)
      if (ids[c] >= 0)
        f(choices.first(t) + static_cast<index_t>(c), t * choices.experts() + ids[c], sum);
  }
}

}  // namespace detail

/// dlogits (+)= the derivative of sinkhorn_plan() after most_iterations, from that of the plan.
///
/// Shapes: logits, dplan and dlogits [T, E]; dlogits may be dplan; shares as those of
/// sinkhorn_plan(). Throws: error where the shapes
/// do not fit, or tolerance is not 0: an early end would depend on the data. implicit is exact
/// where the iterations have converged and eps is 0. Cost: unrolled, four sweeps per iteration and
/// (T + E) doubles kept of each; implicit, one sweep per iteration and two per step of at most 2 E;
/// computed in double on the calling thread; no allocation once ws is warm. Source: Sinkhorn 1967;
/// implicit differentiation as in Luise et al. 2018.
template <std::floating_point F>
void sinkhorn_plan_backward(const sinkhorn_scaling& how,
                            std::type_identity_t<matrix_view<const F>> logits,
                            const side_inputs& side,
                            std::type_identity_t<matrix_view<const F>> dplan, plan_gradient by,
                            gradient_to to, matrix_view<F> dlogits, workspace& ws,
                            std::span<const float> shares = {}) {
  constexpr const char* where = "sinkhorn_plan_backward";
  detail::check_plan(where, how, logits, side, shares);
  if (to == gradient_to::nowhere) return;
  for (const auto* m : {&dplan.rows, &dlogits.rows}) check_size(where, "rows", *m, logits.rows);
  for (const auto* m : {&dplan.cols, &dlogits.cols}) check_size(where, "cols", *m, logits.cols);
  check_apart(where, "logits", logits, "dlogits", dlogits);
  struct memory {
    detail::plan_of<> plan;
    double* gradient;
  };
  memory m = ws.carve([&](scratch& tape) {
    return memory{detail::plan_of<>::carve(tape, logits.rows, logits.cols, how),
                  tape.take<double>(logits.rows * logits.cols)};
  });
  m.plan.run(how, logits, side, shares);
  for (index_t t = 0; t < logits.rows; ++t)
    for (index_t e = 0; e < logits.cols; ++e)
      m.gradient[t * logits.cols + e] = static_cast<double>(dplan(t, e));
  m.plan.pull(how, by, m.gradient);
  for (index_t t = 0; t < logits.rows; ++t)
    for (index_t e = 0; e < logits.cols; ++e) {
      const F g = static_cast<F>(m.gradient[t * logits.cols + e]);
      dlogits(t, e) = to == gradient_to::write ? g : dlogits(t, e) + g;
    }
}

/// weights[c] = the plan's entry for choice c, divided by the sum over its token's choices: what
/// sinkhorn with plan_weights::plan and a balanced step of selective_sinkhorn write; or the entry
/// as it is, which is what sinkhorn_expert_choice writes.
///
/// Shapes: logits [T, E], weights [choices.choices()]; shares as the router's share. Throws, Cost:
/// as sinkhorn_plan_backward().
template <std::floating_point F>
void weigh_plan(const sinkhorn_scaling& how, plan_share share,
                std::type_identity_t<matrix_view<const F>> logits, const side_inputs& side,
                const assignment& choices, std::span<F> weights, workspace& ws,
                std::span<const float> shares = {}) {
  constexpr const char* where = "weigh_plan";
  detail::check_plan(where, how, logits, side, shares);
  check_offsets(where, choices);
  check_size(where, "logits.rows", logits.rows, choices.tokens());
  check_size(where, "logits.cols", logits.cols, choices.experts());
  check_size(where, "weights.size()", static_cast<index_t>(weights.size()), choices.choices());
  auto plan = ws.carve(
      [&](scratch& tape) { return detail::plan_of<>::carve(tape, logits.rows, logits.cols, how); });
  plan.run(how, logits, side, shares);
  std::fill(weights.begin(), weights.end(), F(0));
  detail::for_each_plan_choice(choices, plan.plan, share, [&](index_t c, index_t at, double sum) {
    weights[static_cast<std::size_t>(c)] = sum > 0.0 ? static_cast<F>(plan.plan[at] / sum) : F(0);
  });
}

/// dlogits (+)= the derivative of weigh_plan(): every token's logits move every token's weights.
///
/// Shapes: as weigh_plan(), dweights [choices.choices()], dlogits [T, E], apart from logits.
/// Throws, Cost, Source: as sinkhorn_plan_backward().
template <std::floating_point F>
void weigh_plan_backward(const sinkhorn_scaling& how, plan_share share,
                         std::type_identity_t<matrix_view<const F>> logits, const side_inputs& side,
                         const assignment& choices,
                         std::type_identity_t<std::span<const F>> dweights, plan_gradient by,
                         gradient_to to, matrix_view<F> dlogits, workspace& ws,
                         std::span<const float> shares = {}) {
  constexpr const char* where = "weigh_plan_backward";
  detail::check_plan(where, how, logits, side, shares);
  check_offsets(where, choices);
  check_size(where, "logits.rows", logits.rows, choices.tokens());
  check_size(where, "logits.cols", logits.cols, choices.experts());
  check_size(where, "dweights.size()", static_cast<index_t>(dweights.size()), choices.choices());
  if (to == gradient_to::nowhere) return;
  check_size(where, "dlogits.rows", dlogits.rows, logits.rows);
  check_size(where, "dlogits.cols", dlogits.cols, logits.cols);
  check_apart(where, "logits", logits, "dlogits", dlogits);
  struct memory {
    detail::plan_of<> plan;
    double *gradient, *mean;
  };
  const index_t size = logits.rows * logits.cols;
  memory m = ws.carve([&](scratch& tape) {
    return memory{detail::plan_of<>::carve(tape, logits.rows, logits.cols, how),
                  tape.take<double>(size), tape.take<double>(logits.rows)};
  });
  m.plan.run(how, logits, side, shares);
  std::fill_n(m.gradient, size, 0.0);
  std::fill_n(m.mean, logits.rows, 0.0);
  const auto dw = [&](index_t c) {
    return static_cast<double>(dweights[static_cast<std::size_t>(c)]);
  };
  // dP = (dw - sum of dw w) / the sum, or dw.
  if (share == plan_share::of_choices)
    detail::for_each_plan_choice(choices, m.plan.plan, share,
                                 [&](index_t c, index_t at, double sum) {
                                   if (sum > 0.0)
                                     m.mean[at / logits.cols] += dw(c) * m.plan.plan[at] / sum;
                                 });
  detail::for_each_plan_choice(choices, m.plan.plan, share, [&](index_t c, index_t at, double sum) {
    if (sum > 0.0) m.gradient[at] += (dw(c) - m.mean[at / logits.cols]) / sum;
  });
  m.plan.pull(how, by, m.gradient);
  for (index_t t = 0; t < logits.rows; ++t)
    for (index_t e = 0; e < logits.cols; ++e) {
      const F g = static_cast<F>(m.gradient[t * logits.cols + e]);
      dlogits(t, e) = to == gradient_to::write ? g : dlogits(t, e) + g;
    }
}

}  // namespace moeroute

// Weights that are entries of a sparse transport plan, and their gradient by name: through the
// projection that makes the plan of its potentials, or none.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>

#include <moeroute/base/gradient.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/policy/batch/sparse_transport.hpp>

namespace moeroute {

/// What of a sparse transport plan counts as a function of the logits.
enum class transport_gradient {
  projection,  ///< each column's projection onto the simplex; the tokens' potentials are constants
  constant,    ///< nothing
};

namespace detail {

// A plan in double: the similarities plus constant potentials, projected column by column.
struct transport_columns {
  index_t tokens, experts;
  double *similarity, *plan, *row;  // [T, E], [T, E], [max(T, E)]
  std::int32_t* order;              // [T]

  static transport_columns carve(scratch& tape, index_t tokens, index_t experts) {
    return {tokens,
            experts,
            tape.take<double>(tokens * experts),
            tape.take<double>(tokens * experts),
            tape.take<double>(std::max(tokens, experts)),
            tape.take<std::int32_t>(tokens)};
  }

  template <std::floating_point F>
  void run(const sparse_transport& how, std::span<const float> potentials,
           const matrix_view<const F>& z, const side_inputs& side) {
    constexpr double never = -std::numeric_limits<double>::infinity();
    std::fill_n(plan, tokens * experts, 0.0);
    index_t live = 0;
    for (index_t t = 0; t < tokens; ++t) {
      double* const s = similarity + t * experts;
      double top = never, sum = 0.0;
      for (index_t e = 0; e < experts; ++e) {
        const auto x = static_cast<double>(z(t, e));
        s[e] = !side.masked(t) && x > never ? x : never;
        top = std::max(top, s[e]);
      }
      if (!(top > never)) continue;
      ++live;
      for (index_t e = 0; e < experts; ++e)
        if (s[e] > never) sum += s[e] = s[e] == top ? 1.0 : std::exp(s[e] - top);
      for (index_t e = 0; e < experts; ++e) s[e] /= sum;
    }
    const double mass =
        static_cast<double>(std::max<index_t>(live, 1)) / static_cast<double>(experts);
    const double scale = static_cast<double>(how.gamma) * mass;
    const index_t most = how.support > 0 ? how.support : how.capacity(tokens, experts);
    for (index_t e = 0; e < experts; ++e) {
      index_t n = 0;
      for (index_t t = 0; t < tokens; ++t) {
        const double s = similarity[t * experts + e];
        if (!(s > never)) continue;
        row[t] = (s + static_cast<double>(potentials[static_cast<std::size_t>(t)])) / scale;
        order[n++] = static_cast<std::int32_t>(t);
      }
      if (n > most)
        std::nth_element(order, order + most, order + n, [&](std::int32_t a, std::int32_t b) {
          return row[a] != row[b] ? row[a] > row[b] : a < b;
        });
      n = std::min(n, most);
      const double threshold = simplex_threshold([&](index_t i) { return row[order[i]]; }, n);
      for (index_t i = 0; i < n; ++i)
        plan[order[i] * experts + e] = std::max(row[order[i]] - threshold, 0.0) * mass;
    }
  }

  // dplan [T, E] becomes the gradient of the logits.
  void pull(const sparse_transport& how, double* dplan) const {
    for (index_t e = 0; e < experts; ++e) {
      double sum = 0.0, entries = 0.0;
      for (index_t at = e; at < tokens * experts; at += experts)
        if (plan[at] > 0.0) {
          sum += dplan[at];
          entries += 1.0;
        }
      for (index_t at = e; at < tokens * experts; at += experts)
        dplan[at] =
            plan[at] > 0.0 ? (dplan[at] - sum / entries) / static_cast<double>(how.gamma) : 0.0;
    }
    for (index_t t = 0; t < tokens; ++t) {
      double* const g = dplan + t * experts;
      const double* const p = similarity + t * experts;
      double mean = 0.0;
      for (index_t e = 0; e < experts; ++e) mean += std::max(p[e], 0.0) * g[e];
      for (index_t e = 0; e < experts; ++e) g[e] = std::max(p[e], 0.0) * (g[e] - mean);
    }
  }
};

template <std::floating_point F>
void check_transport(const char* where, const sparse_transport& how,
                     std::span<const float> potentials, const matrix_view<const F>& z,
                     const side_inputs& side, const assignment& choices) {
  how.check(z.rows, z.cols);
  check_stride(where, "logits", z);
  check_offsets(where, choices);
  check_size(where, "logits.rows", z.rows, choices.tokens());
  check_size(where, "logits.cols", z.cols, choices.experts());
  check_size(where, "potentials.size()", static_cast<index_t>(potentials.size()), z.rows);
  if (std::any_of(potentials.begin(), potentials.end(), [](float p) { return !std::isfinite(p); }))
    fail(where, "a potential is not finite");
  if (!side.mask.empty())
    check_size(where, "mask.size()", static_cast<index_t>(side.mask.size()), z.rows);
}

// f(choice, its place in the plan) for every choice that has an expert.
template <class F>
void for_each_transported(const char* where, const assignment& choices, F&& f) {
  for (index_t t = 0; t < choices.tokens(); ++t) {
    const auto ids = choices.ids(t);
    for (std::size_t c = 0; c < ids.size(); ++c) {
      check_range(where, "an id", ids[c], no_expert, choices.experts() - 1);
      if (ids[c] >= 0)
        f(static_cast<std::size_t>(choices.first(t)) + c, t * choices.experts() + ids[c]);
    }
  }
}

}  // namespace detail

/// weights[c] = the plan's entry for choice c: what sparse_transport and
/// sparse_transport_token_choice write with transport_weights::plan.
///
/// Shapes: potentials [T] of sparse_transport::potentials(), logits [T, E], weights
/// [choices.choices()]. Throws: error where the shapes do not fit or an id is none. Cost: T E
/// exponentials and a selection per column, in double on the calling thread; no allocation once ws
/// is warm. Source: Liu, Puigcerver, Blondel 2022.
template <std::floating_point F>
void weigh_transport(const sparse_transport& how, std::span<const float> potentials,
                     std::type_identity_t<matrix_view<const F>> logits, const side_inputs& side,
                     const assignment& choices, std::span<F> weights, workspace& ws) {
  constexpr const char* where = "weigh_transport";
  detail::check_transport(where, how, potentials, logits, side, choices);
  check_size(where, "weights.size()", static_cast<index_t>(weights.size()), choices.choices());
  auto columns = ws.carve([&](scratch& tape) {
    return detail::transport_columns::carve(tape, logits.rows, logits.cols);
  });
  columns.run(how, potentials, logits, side);
  std::fill(weights.begin(), weights.end(), F(0));
  detail::for_each_transported(where, choices, [&](std::size_t c, index_t at) {
    weights[c] = static_cast<F>(columns.plan[at]);
  });
}

/// dlogits (+)= the derivative of weigh_transport(), from that of the weights.
///
/// With P = (T / E) max((s + a) / scale - threshold, 0) by column, s = softmax(z) by row: the
/// entries above 0 of a column share what goes into their threshold, ds = (dP - mean of dP) /
/// gamma, dz = s (ds - sum of s ds). The potentials a, which tokens a column holds and how many
/// tokens live are constants.
/// Shapes: as weigh_transport(), dweights [choices.choices()], dlogits [T, E], apart from logits.
/// Throws, Cost, Source: as weigh_transport().
template <std::floating_point F>
void weigh_transport_backward(const sparse_transport& how, std::span<const float> potentials,
                              std::type_identity_t<matrix_view<const F>> logits,
                              const side_inputs& side, const assignment& choices,
                              std::type_identity_t<std::span<const F>> dweights,
                              transport_gradient by, gradient_to to, matrix_view<F> dlogits,
                              workspace& ws) {
  constexpr const char* where = "weigh_transport_backward";
  detail::check_transport(where, how, potentials, logits, side, choices);
  check_size(where, "dweights.size()", static_cast<index_t>(dweights.size()), choices.choices());
  if (to == gradient_to::nowhere) return;
  check_size(where, "dlogits.rows", dlogits.rows, logits.rows);
  check_size(where, "dlogits.cols", dlogits.cols, logits.cols);
  check_stride(where, "dlogits", dlogits);
  check_apart(where, "logits", logits, "dlogits", dlogits);
  if (to == gradient_to::write)
    for (index_t t = 0; t < dlogits.rows; ++t) std::fill_n(dlogits.row(t), dlogits.cols, F(0));
  if (by == transport_gradient::constant) return;
  struct memory {
    detail::transport_columns columns;
    double* gradient;
  };
  memory m = ws.carve([&](scratch& tape) {
    return memory{detail::transport_columns::carve(tape, logits.rows, logits.cols),
                  tape.take<double>(logits.rows * logits.cols)};
  });
  m.columns.run(how, potentials, logits, side);
  std::fill_n(m.gradient, logits.rows * logits.cols, 0.0);
  detail::for_each_transported(where, choices, [&](std::size_t c, index_t at) {
    m.gradient[at] += static_cast<double>(dweights[c]);
  });
  m.columns.pull(how, m.gradient);
  for (index_t t = 0; t < logits.rows; ++t)
    for (index_t e = 0; e < logits.cols; ++e)
      dlogits(t, e) += static_cast<F>(m.gradient[t * logits.cols + e]);
}

}  // namespace moeroute

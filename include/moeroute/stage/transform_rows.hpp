// What a transformed router sees, and the way back through its transform.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <span>
#include <type_traits>

#include <moeroute/base/gradient.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/policy/parts/row_transform.hpp>

namespace moeroute {

namespace detail {

template <std::floating_point F>
bool is_finite_logit(F x) {
  constexpr F most = std::numeric_limits<float>::max();
  return x <= most && x >= -most;
}

// Mean and population standard deviation of what is finite in a row.
template <std::floating_point F>
struct finite_moments {
  F mean = 0, deviation = 0, count = 0;

  finite_moments(const F* z, index_t n) {
    F square = 0, first = 0;
    bool equal = true;
    for (index_t e = 0; e < n; ++e)
      if (is_finite_logit(z[e])) {
        if (count == F(0)) first = z[e];
        equal = equal && z[e] == first;
        mean += z[e], count += 1;
      }
    if (count == F(0)) return;
    mean = equal ? first : mean / count;  // the mean of equals would round
    for (index_t e = 0; e < n; ++e)
      if (is_finite_logit(z[e])) square += (z[e] - mean) * (z[e] - mean);
    deviation = std::sqrt(square / count);
  }
};

// dz += the derivative of one row's transform, from that of its result.
template <std::floating_point F>
void pull_row(const sigmoid_sum&, const F* z, index_t columns, index_t, const side_inputs&,
              const F* dout, F* dz) {
  const index_t n = columns / 2;
  const auto slope = [](F x) {
    const F s = 1 / (1 + std::exp(-x));
    return s * (1 - s);
  };
  for (index_t e = 0; e < n; ++e) {
    constexpr F never = -std::numeric_limits<F>::infinity();
    if (!(z[e] > never && z[n + e] > never)) continue;  // the result is -inf
    if (is_finite_logit(z[e])) dz[e] += dout[e] * slope(z[e]);
    if (is_finite_logit(z[n + e])) dz[n + e] += dout[e] * slope(z[n + e]);
  }
}

template <std::floating_point F>
void pull_row(const pass_logits& how, const F* z, index_t columns, index_t, const side_inputs&,
              const F* dout, F* dz) {
  const index_t n = columns / how.passes;
  const F count = static_cast<F>(how.passes);
  for (index_t e = 0; e < n; ++e) {
    F mean = 0, square = 0;
    bool finite = true, equal = true;
    for (index_t p = 0; p < how.passes; ++p) {
      finite = finite && is_finite_logit(z[p * n + e]);
      equal = equal && z[p * n + e] == z[e];
      mean += z[p * n + e] / count;
    }
    if (!finite) continue;
    if (equal) mean = z[e];  // the mean of equals would round
    for (index_t p = 0; p < how.passes; ++p)
      square += (z[p * n + e] - mean) * (z[p * n + e] - mean) / count;
    const F deviation = std::sqrt(square), floor = F(1e-6f);
    // What the mean and the deviation carry.
    F of_mean = 1, of_deviation = -static_cast<F>(how.lambda);
    if (how.rule != pass_rule::bound) {
      const F wide = std::max(deviation, floor);
      of_mean = 1 / wide;
      of_deviation = deviation > floor ? -mean / (wide * wide) : F(0);
    }
    for (index_t p = 0; p < how.passes; ++p) {
      const F away = deviation > F(0) ? (z[p * n + e] - mean) / deviation : F(0);
      dz[p * n + e] += dout[e] * (of_mean + of_deviation * away) / count;
    }
  }
}

template <std::floating_point F>
void pull_row(const standardized& how, const F* z, index_t columns, index_t, const side_inputs&,
              const F* dout, F* dz) {
  const finite_moments<F> m(z, columns);
  if (!(m.deviation > F(0))) return;
  F mean = 0, along = 0;
  const auto away = [&](index_t e) { return (z[e] - m.mean) / m.deviation; };
  for (index_t e = 0; e < columns; ++e)
    if (is_finite_logit(z[e])) {
      mean += dout[e] / m.count;
      along += dout[e] * away(e) / m.count;
    }
  for (index_t e = 0; e < columns; ++e)
    if (is_finite_logit(z[e]))
      dz[e] += static_cast<F>(how.lambda) / m.deviation * (dout[e] - mean - away(e) * along);
}

template <std::floating_point F>
void pull_row(const steering& how, const F* z, index_t columns, index_t, const side_inputs&,
              const F* dout, F* dz) {
  const auto listed = [](std::span<const expert_id> list, index_t e) {
    return std::find(list.begin(), list.end(), static_cast<expert_id>(e)) != list.end();
  };
  const bool hard = how.how == promotion::hard;
  const finite_moments<F> m(z, columns);
  index_t top = 0;
  F promoted = 0;
  for (index_t e = 0; e < columns; ++e) {
    if (z[e] > z[top] || z[top] != z[top]) top = e;
    if (!is_finite_logit(z[e]) || listed(how.suppress, e)) continue;
    const bool raised = listed(how.promote, e);
    if (raised) promoted += dout[e];
    if (!raised || !hard) dz[e] += dout[e];
  }
  if (hard) {
    // The row's largest, whose distance to what is put above it is a constant.
    if (is_finite_logit(z[top])) dz[top] += promoted;
  } else if (m.deviation > F(0)) {
    for (index_t e = 0; e < columns; ++e)
      if (is_finite_logit(z[e]))
        dz[e] += promoted * static_cast<F>(how.lambda) * (z[e] - m.mean) / (m.count * m.deviation);
  }
}

template <std::floating_point F>
void pull_row(const candidates& how, const F* z, index_t columns, index_t token,
              const side_inputs& side, const F* dout, F* dz) {
  how.for_each(columns, token, side, [&](index_t e, bool drawn) {
    if (drawn && is_finite_logit(z[e])) dz[e] += dout[e];
  });
}

}  // namespace detail

/// out[t] = the transform of the logits of token t: what the router of a `transformed` one sees.
///
/// Shapes: logits [T, columns], out [T, experts(columns)], apart. Throws: error where the shapes or
/// the transform do not fit. Cost: the transform's, no allocation. Determinism: the same bits for
/// every executor.
template <row_transform Transform, executor Exec = serial>
void transform_rows(const Transform& transform, const matrix_view<const float>& logits,
                    const side_inputs& side, const matrix_view<float>& out, const Exec& exec = {}) {
  constexpr const char* where = "transform_rows";
  transform.check(logits.cols, 1);
  check_size(where, "out.rows()", out.rows, logits.rows);
  check_size(where, "out.cols()", out.cols, transform.experts(logits.cols));
  check_stride(where, "logits", logits);
  check_stride(where, "out", out);
  check_apart(where, "logits", logits, "out", out);
  exec.parallel_for(logits.rows, 64, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t)
      transform.apply_row(logits.row(t), logits.cols, t, side, out.row(t));
  });
}

/// dlogits (+)= the derivative of transform_rows(), from that of its result.
///
/// A logit that is NaN or infinite has no gradient, nor has a row without any deviation where that
/// is divided by; which experts are promoted, suppressed or drawn is a constant. Shapes: logits and
/// dlogits [T, columns], dout [T, experts(columns)], dlogits apart from both. Throws: error where
/// the shapes or the transform do not fit. Cost: a few passes over the row, no allocation.
/// Determinism: the same bits for every executor.
template <row_transform Transform, std::floating_point F, executor Exec = serial>
void transform_rows_backward(const Transform& transform,
                             const std::type_identity_t<matrix_view<const F>>& logits,
                             const side_inputs& side,
                             const std::type_identity_t<matrix_view<const F>>& dout, gradient_to to,
                             const matrix_view<F>& dlogits, const Exec& exec = {}) {
  constexpr const char* where = "transform_rows_backward";
  if (to == gradient_to::nowhere) return;
  transform.check(logits.cols, 1);
  check_size(where, "dout.rows()", dout.rows, logits.rows);
  check_size(where, "dout.cols()", dout.cols, transform.experts(logits.cols));
  check_size(where, "dlogits.rows()", dlogits.rows, logits.rows);
  check_size(where, "dlogits.cols()", dlogits.cols, logits.cols);
  check_stride(where, "logits", logits);
  check_stride(where, "dout", dout);
  check_stride(where, "dlogits", dlogits);
  check_apart(where, "logits", logits, "dlogits", dlogits);
  check_apart(where, "dout", dout, "dlogits", dlogits);
  exec.parallel_for(logits.rows, 64, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      if (to == gradient_to::write) std::fill_n(dlogits.row(t), dlogits.cols, F(0));
      detail::pull_row(transform, logits.row(t), logits.cols, t, side, dout.row(t), dlogits.row(t));
    }
  });
}

}  // namespace moeroute

// Updates of a router that leave its logits alone where they are to stay: the null space of inputs
// that are kept.
#pragma once

#include <algorithm>
#include <cmath>

#include <moeroute/base/workspace.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>

namespace moeroute {

/// The span of hidden states whose logits an update must not change, as an orthonormal basis U.
///
/// One for all rows of a gate (SAME), or one for each expert, of the states that chose it (GRIP):
/// what is projected is that expert's row. The basis is Gram and Schmidt's, twice over, in double;
/// the papers take the singular vectors with sigma^2 above a bound, which spans less: states that
/// matter little in all may move there, none does here by more than the root of `tolerance` times
/// the update. Example:
///
///     retained_inputs kept(x.cols(), 256);
///     kept.retain_choices(const_view(x), choices, 3, 1e-2);    // what expert 3 has seen
///     kept.project(view(dgate).middle_rows(3, 1));
///
/// Source: GRIP 2026 (arXiv 2601.16905), SAME 2026 (arXiv 2602.01990): the projector alone.
class retained_inputs {
 public:
  /// Room for so many directions; with d of them nothing moves any more. Throws: error where d < 0
  /// or most is outside [0, d].
  retained_inputs(index_t d, index_t most) : d_(d), most_(most) {
    check_range("retained_inputs", "d", d, 0, index_t{1} << 40);
    check_range("retained_inputs", "most", most, 0, d);
    basis_.resize(size_product(most, d));
    rest_.resize(d);
  }

  index_t d() const { return d_; }
  /// Directions so far.
  index_t rank() const { return rank_; }

  /// Adds a state; false where what U does not span of it has a square of at most `tolerance`, and
  /// nothing was added. Throws: error where x is not [1, d], or the room is used up. Cost: O(rank
  /// d), no allocation.
  template <storage T>
  bool retain(const matrix_view<const T>& x, double tolerance = 1e-2) {
    check_size("retained_inputs", "x.rows", x.rows, 1);
    check_size("retained_inputs", "x.cols", x.cols, d_);
    for (index_t c = 0; c < d_; ++c) rest_[c] = static_cast<double>(static_cast<float>(x(0, c)));
    double square = 0.0;
    for (int pass = 0; pass < 2; ++pass) {
      for (index_t r = 0; r < rank_; ++r) {
        const double* const u = basis_.data() + r * d_;
        double dot = 0.0;
        for (index_t c = 0; c < d_; ++c) dot += u[c] * rest_[c];
        for (index_t c = 0; c < d_; ++c) rest_[c] -= dot * u[c];
      }
      square = 0.0;
      for (index_t c = 0; c < d_; ++c) square += rest_[c] * rest_[c];
    }
    if (!(square > tolerance) || !std::isfinite(square)) return false;
    if (rank_ == most_) fail_value("retained_inputs", "rank", rank_, "room for another direction");
    const double scale = 1.0 / std::sqrt(square);
    for (index_t c = 0; c < d_; ++c) basis_[rank_ * d_ + c] = scale * rest_[c];
    ++rank_;
    return true;
  }

  /// Adds the states of all tokens that chose expert e. Throws: as retain(), or where the choices
  /// are not those of x.
  template <storage T>
  void retain_choices(const matrix_view<const T>& x, const assignment& choices, expert_id e,
                      double tolerance = 1e-2) {
    check_size("retained_inputs", "choices.tokens()", choices.tokens(), x.rows);
    check_offsets("retained_inputs", choices);
    for (index_t t = 0; t < x.rows; ++t) {
      const auto ids = choices.ids(t);
      if (std::find(ids.begin(), ids.end(), e) != ids.end()) retain(x.middle_rows(t, 1), tolerance);
    }
  }

  /// Every row of delta becomes delta - (delta U) U^T: x . delta = 0 for every x that U spans.
  ///
  /// Shapes: delta [n, d], of updates or gradients. Throws: error where delta.cols() is not d.
  /// Cost: 2 n rank d multiply-adds, no allocation.
  template <class F>
  void project(const matrix_view<F>& delta) const {
    check_size("retained_inputs", "delta.cols", delta.cols, d_);
    check_stride("retained_inputs", "delta", delta);
    for (index_t n = 0; n < delta.rows; ++n)
      for (index_t r = 0; r < rank_; ++r) {
        const double* const u = basis_.data() + r * d_;
        double dot = 0.0;
        for (index_t c = 0; c < d_; ++c) dot += u[c] * static_cast<double>(delta(n, c));
        for (index_t c = 0; c < d_; ++c)
          delta(n, c) = static_cast<F>(static_cast<double>(delta(n, c)) - dot * u[c]);
      }
  }

 private:
  index_t d_, most_, rank_ = 0;
  buffer<double> basis_;  // [most, d]
  buffer<double> rest_;   // [d]
};

}  // namespace moeroute

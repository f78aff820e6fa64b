// Sinkhorn's iteration: factors for tokens and experts that make exp(logits) a transport plan.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>

#include <moeroute/exec/worker_slots.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/batch_kinds.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/simd/probability/sinkhorn_sweep.hpp>

namespace moeroute {

namespace detail {

inline void check_shares(const char* who, std::span<const float> share, index_t experts) {
  if (share.empty()) return;
  check_size(who, "share.size()", static_cast<index_t>(share.size()), experts);
  for (std::size_t e = 0; e < share.size(); ++e)
    if (!(share[e] > 0.0f) || !std::isfinite(share[e]))
      fail(who, "share of expert " + std::to_string(e) + " is " + std::to_string(share[e]) +
                    ", expected > 0");
}

// The kernel matrix and the factors of one batch. Rows are cut into pieces by (T, E) alone; each
// piece adds its own column sums, and the pieces are added in order.
struct sinkhorn_state {
  index_t tokens, experts, stride, grain;
  float* kernel;      ///< [T, stride]: exp(x), or x in the log domain
  float* u;           ///< [T]: token factors (exponential domain)
  float* v;           ///< [stride]: expert factors, or their logarithms
  float* column_sum;  ///< [stride]
  float* change;      ///< [stride]
  float* partial;     ///< [pieces, stride]
  std::int32_t* live_of_piece;
  float* block;  ///< [workers, 16, stride], scratch of the log domain
  int workers;
  float row_mass, column_mass;
  float* share;  ///< [stride], each expert's part of the load, then its mass; nullptr: equal parts

  index_t pieces() const { return ceil_div(tokens, grain); }

  static sinkhorn_state carve(scratch& tape, index_t tokens, index_t experts, int workers,
                              bool shares = false) {
    sinkhorn_state s{};
    s.tokens = tokens;
    s.experts = experts;
    s.stride = round_up(experts, block_rows);
    s.grain = std::clamp<index_t>(round_up((index_t{1} << 15) / s.stride, 4), 32, 2048);
    s.workers = workers;
    s.kernel = tape.take<float>(tokens * s.stride);
    s.u = tape.take<float>(tokens);
    s.v = tape.take<float>(s.stride);
    s.column_sum = tape.take<float>(s.stride);
    s.change = tape.take<float>(s.stride);
    s.partial = tape.take<float>(s.pieces() * s.stride);
    s.live_of_piece = tape.take<std::int32_t>(s.pieces());
    s.block = tape.take<float>(workers * block_rows * s.stride);
    s.share = shares ? tape.take<float>(s.stride) : nullptr;
    return s;
  }
};

template <class A>
class sinkhorn_engine {
 public:
  sinkhorn_engine(const sinkhorn_scaling& how, sinkhorn_state& s) : how_(how), s_(s) {}

  /// Scales the plan of z; returns the number of iterations, 0 where no token takes part. share:
  /// the parts of the load, where the state has room for them.
  template <executor Exec>
  index_t run(matrix_view<const float> z, const side_inputs& side, const Exec& exec,
              std::span<const float> share = {}) {
    const index_t live = load_kernel(z, side, exec);
    std::fill_n(s_.v, s_.stride, log_domain() ? 0.0f : 1.0f);  // the kernel is 0 past the experts
    std::fill_n(s_.u, s_.tokens, 0.0f);
    if (live == 0) return 0;
    const auto n = static_cast<float>(live), experts = static_cast<float>(s_.experts);
    s_.row_mass = how_.mass == plan_mass::one ? 1.0f / n : 1.0f;
    s_.column_mass = how_.mass == plan_mass::one ? 1.0f / experts : n / experts;
    // Equal shares are none: no rounding may tell them apart.
    if (std::all_of(share.begin(), share.end(), [&](float x) { return x == share[0]; }))
      s_.share = nullptr;
    if (s_.share != nullptr) {
      double sum = 0.0;
      for (const float x : share) sum += static_cast<double>(x);
      const double all = how_.mass == plan_mass::one ? 1.0 : static_cast<double>(live);
      std::fill_n(s_.share, s_.stride, s_.column_mass);
      for (std::size_t e = 0; e < share.size(); ++e)
        s_.share[e] = static_cast<float>(all * (static_cast<double>(share[e]) / sum));
    }
    if (how_.order == scaling_order::columns_then_rows) first_column_sums(exec);
    for (index_t iteration = 1;; ++iteration) {
      float measure = 0.0f;
      if (how_.order == scaling_order::columns_then_rows) {
        measure = update_columns(exec);
        sweep(exec);
        if (how_.stop == sinkhorn_stop::column_error) measure = column_error();
      } else {
        sweep(exec);
        if (how_.stop == sinkhorn_stop::column_error) measure = column_error();
        const float change = update_columns(exec);
        if (how_.stop == sinkhorn_stop::mean_change) measure = change;
      }
      if (measure <= how_.tolerance || iteration == how_.most_iterations) return iteration;
    }
  }

  /// Choice scores of a row, in the order of the plan's row: -inf for what may not be chosen. In
  /// the exponential domain the plan without its token factor, in the log domain its logarithm.
  void choice_row(index_t token, const float* z, float* choice) const {
    using F = simd::vfloat<A>;
    const float* k = s_.kernel + token * s_.stride;
    const F never(simd::minus_infinity), lowest(std::numeric_limits<float>::lowest());
    const bool log = log_domain();
    const auto one = [&](index_t e, F logit) {
      const F kernel = simd::load<A>(k + e), v = simd::load<A>(s_.v + e);
      // Beside a +inf logit a finite one is -inf below the maximum: it comes last, but it may be
      // chosen.
      const F value = log ? simd::larger<A>(kernel + v, lowest) : kernel * v;
      return simd::select<A>(logit > never, value, never);
    };
    index_t e = 0;
    for (; e + simd::width<A> <= s_.experts; e += simd::width<A>)
      one(e, simd::load<A>(z + e)).store_unaligned(choice + e);
    if (e < s_.experts)
      simd::store_first<A>(
          choice + e, s_.experts - e,
          one(e, simd::load_first<A>(z + e, s_.experts - e, simd::minus_infinity)));
  }

  /// One row of the plan.
  void plan_row(index_t token, float* plan) const {
    const float* k = s_.kernel + token * s_.stride;
    if (!log_domain()) {
      for (index_t e = 0; e < s_.experts; ++e) plan[e] = k[e] * s_.v[e] * s_.u[token];
      return;
    }
    // The token factor belongs to the expert factors that it was computed with: u holds its
    // logarithm.
    using F = simd::vfloat<A>;
    const F u(s_.u[token]);
    index_t e = 0;
    for (; e + simd::width<A> <= s_.experts; e += simd::width<A>)
      simd::exp<A>(simd::load<A>(k + e) + simd::load<A>(s_.v + e) + u).store_unaligned(plan + e);
    if (e < s_.experts)
      simd::store_first<A>(plan + e, s_.experts - e,
                           simd::exp<A>(simd::load<A>(k + e) + simd::load<A>(s_.v + e) + u));
  }

 private:
  bool log_domain() const { return how_.domain == sinkhorn_domain::logarithm; }

  template <executor Exec, class F>
  void over_pieces(const Exec& exec, const F& f) const {
    worker_slots slots(s_.workers);
    exec.parallel_for(s_.tokens, s_.grain, [&](index_t begin, index_t end) {
      const worker_slots::held worker(slots);
      f(begin / s_.grain, begin, end, s_.block + worker * block_rows * s_.stride);
    });
  }

  // Column sums of all pieces, in order.
  void join_pieces() const {
    std::fill_n(s_.column_sum, s_.stride, 0.0f);
    for (index_t piece = 0; piece < s_.pieces(); ++piece)
      for (index_t e = 0; e < s_.stride; ++e) s_.column_sum[e] += s_.partial[piece * s_.stride + e];
  }

  template <executor Exec>
  index_t load_kernel(matrix_view<const float> z, const side_inputs& side, const Exec& exec) const {
    over_pieces(exec, [&](index_t piece, index_t begin, index_t end, float*) {
      std::int32_t live = 0;
      for (index_t t = begin; t < end; t += block_rows) {
        const int n = static_cast<int>(std::min<index_t>(block_rows, end - t));
        float* const k = s_.kernel + t * s_.stride;
        const float* row[block_rows];
        for (int i = 0; i < n; ++i) {
          row[i] = side.masked(t + i) ? nullptr : z.row(t + i);
          if (how_.similarity == plan_similarity::softmax && row[i] != nullptr) {
            float* const similarity = k + i * s_.stride;
            softmax::score_row<A>(row[i], s_.experts, similarity);
            // A probability of 0 is still a similarity; a masked expert is none.
            for (index_t e = 0; e < s_.experts; ++e)
              if (!(row[i][e] > simd::minus_infinity)) similarity[e] = simd::minus_infinity;
            row[i] = similarity;
          }
        }
        live += simd::sinkhorn_kernel_block<A>(row, n, s_.experts, how_.temperature, log_domain(),
                                               k, s_.stride);
      }
      s_.live_of_piece[piece] = live;
    });
    index_t live = 0;
    for (index_t piece = 0; piece < s_.pieces(); ++piece) live += s_.live_of_piece[piece];
    return live;
  }

  // Column sums under token factors of 1.
  template <executor Exec>
  void first_column_sums(const Exec& exec) const {
    over_pieces(exec, [&](index_t piece, index_t begin, index_t end, float*) {
      float* const sum = s_.partial + piece * s_.stride;
      std::fill_n(sum, s_.stride, 0.0f);
      for (index_t t = begin; t < end; ++t)
        for (index_t e = 0; e < s_.stride; e += simd::width<A>) {
          auto k = simd::load<A>(s_.kernel + t * s_.stride + e);
          if (log_domain()) k = simd::exp_nonpositive<A>(k);
          (simd::load<A>(sum + e) + k).store_unaligned(sum + e);
        }
    });
    join_pieces();
  }

  // Token factors from the expert factors, and the column sums under both.
  template <executor Exec>
  void sweep(const Exec& exec) const {
    over_pieces(exec, [&](index_t piece, index_t begin, index_t end, float* block) {
      float* const sum = s_.partial + piece * s_.stride;
      std::fill_n(sum, s_.stride, 0.0f);
      const float* const k = s_.kernel + begin * s_.stride;
      if (!log_domain()) {
        simd::sinkhorn_sweep<A>(k, end - begin, s_.stride, s_.v, s_.stride, s_.row_mass, how_.eps,
                                s_.u + begin, sum);
        return;
      }
      for (index_t t = begin; t < end; t += block_rows)
        simd::sinkhorn_log_block<A>(s_.kernel + t * s_.stride, s_.stride,
                                    static_cast<int>(std::min<index_t>(block_rows, end - t)), s_.v,
                                    s_.stride, s_.row_mass, block, s_.u + t, sum);
    });
    join_pieces();
  }

  // Expert factors from the column sums; returns the mean change of a factor. A column without mass
  // has the factor 0, or keeps it in the log domain.
  template <executor Exec>
  float update_columns(const Exec& exec) const {
    using F = simd::vfloat<A>;
    const F zero(0.0f);
    bool lost = false;
    for (index_t e = 0; e < s_.stride; e += simd::width<A>) {
      const F sum = simd::load<A>(s_.column_sum + e), old = simd::load<A>(s_.v + e);
      F next;
      if (log_domain()) {
        // Sums in the log domain are of the plan itself: the factor moves by their distance to the
        // target.
        next = old + simd::log<A>(simd::divide<A>(mass_of(e), sum));
        next = simd::select<A>(sum > F(underflow), next, old);
      } else {
        next = simd::divide<A>(mass_of(e), sum + F(how_.eps));
        const F most(simd::sinkhorn_most);
        next = simd::select<A>(next < most, next, most);
        next = simd::select<A>(sum > zero, next, zero);
      }
      next.store_unaligned(s_.change + e);
    }
    if (log_domain()) {
      for (index_t e = 0; e < s_.experts; ++e) lost = lost || has_underflowed(e);
      if (lost) rescue_columns(exec);
    }
    for (index_t e = 0; e < s_.stride; e += simd::width<A>) {
      const F next = simd::load<A>(s_.change + e), old = simd::load<A>(s_.v + e);
      next.store_unaligned(s_.v + e);
      magnitude(log_domain() ? factor_of(next) - factor_of(old) : next - old)
          .store_unaligned(s_.change + e);
    }
    return simd::row_sum<A>(s_.change, s_.experts) / static_cast<float>(s_.experts);
  }

  // Columns whose sums underflowed, though they have logits: the new factor (in change) makes the
  // largest entry alone as large as the whole column should be.
  template <executor Exec>
  void rescue_columns(const Exec& exec) const {
    over_pieces(exec, [&](index_t piece, index_t begin, index_t end, float*) {
      float* const largest = s_.partial + piece * s_.stride;
      std::fill_n(largest, s_.stride, simd::minus_infinity);
      for (index_t t = begin; t < end; ++t)
        for (index_t e = 0; e < s_.stride; ++e)
          largest[e] = std::max(largest[e], s_.kernel[t * s_.stride + e] + s_.u[t]);
    });
    for (index_t e = 0; e < s_.experts; ++e) {
      if (!has_underflowed(e)) continue;
      const float target = simd::log<A>(simd::vfloat<A>(mass_at(e))).get(0);
      float largest = simd::minus_infinity;
      for (index_t piece = 0; piece < s_.pieces(); ++piece)
        largest = std::max(largest, s_.partial[piece * s_.stride + e]);
      // A column that no token can go to gets the factor 0, and is let alone from then on.
      s_.change[e] = largest > simd::minus_infinity ? target - largest : simd::minus_infinity;
    }
  }

  // What the column of an expert, or those of a register, are to sum to.
  float mass_at(index_t e) const { return s_.share == nullptr ? s_.column_mass : s_.share[e]; }
  simd::vfloat<A> mass_of(index_t e) const {
    return s_.share == nullptr ? simd::vfloat<A>(s_.column_mass) : simd::load<A>(s_.share + e);
  }

  static constexpr float underflow = 1e-37f;

  bool has_underflowed(index_t e) const {
    return !(s_.column_sum[e] > underflow) && s_.v[e] > simd::minus_infinity;
  }

  // exp of a logarithmic factor, bounded so that differences are numbers.
  static simd::vfloat<A> factor_of(simd::vfloat<A> g) {
    const simd::vfloat<A> most(80.0f);
    return simd::exp<A>(simd::select<A>(g < most, g, most));
  }

  static simd::vfloat<A> magnitude(simd::vfloat<A> x) {
    return simd::select<A>(x < simd::vfloat<A>(0.0f), -x, x);
  }

  float column_error() const {
    float largest = 0.0f;
    for (index_t e = 0; e < s_.experts; ++e) {
      // A column that no token can go to has no error.
      if (log_domain() ? s_.v[e] == simd::minus_infinity : !(s_.column_sum[e] > 0.0f)) continue;
      const float mass = log_domain() ? s_.column_sum[e] : s_.v[e] * s_.column_sum[e];
      largest = std::max(largest, std::abs(mass / mass_at(e) - 1.0f));
    }
    return largest;
  }

  const sinkhorn_scaling& how_;
  sinkhorn_state& s_;
};

}  // namespace detail

/// The transport plan of a batch, dense: for tests, metrics and training outside the router.
///
/// Shapes: z [T, E], plan [T, E]; shares [E], the share of the mass that each column is to have,
/// of any sum, or empty: equal. Rows of masked tokens and entries of NaN or -inf logits are 0.
/// Throws: error where the shapes do not fit, or an option is out of its range.
/// Ensures: rows (columns_then_rows) or columns (rows_then_columns) sum to their marginals up to
/// rounding and eps. T counts the tokens that take part. Cost: two reads of [T, E] and one
/// exponential per element, then one read per iteration (log domain: one exponential per element
/// and iteration). Returns the number of iterations. No allocation once ws is warm. Determinism:
/// the same bits on every ISA, executor and thread count. Source: Sinkhorn 1967; Cuturi 2013; Clark
/// et al. 2022 (S-BASE) in the form of Megatron-LM.
template <executor Exec = serial, class A = simd::default_arch>
index_t sinkhorn_plan(const sinkhorn_scaling& how, matrix_view<const float> z,
                      const side_inputs& side, workspace& ws, matrix_view<float> plan,
                      const Exec& exec = {}, std::span<const float> shares = {}) {
  how.check("sinkhorn_plan");
  check_range("sinkhorn_plan", "experts", z.cols, 1, max_experts);
  detail::check_shares("sinkhorn_plan", shares, z.cols);
  check_size("sinkhorn_plan", "plan.rows", plan.rows, z.rows);
  check_size("sinkhorn_plan", "plan.cols", plan.cols, z.cols);
  detail::sinkhorn_state s = ws.carve([&](scratch& tape) {
    return detail::sinkhorn_state::carve(tape, z.rows, z.cols,
                                         worker_slots::count(exec.concurrency()), !shares.empty());
  });
  detail::sinkhorn_engine<A> engine(how, s);
  const index_t iterations = engine.run(z, side, exec, shares);
  for (index_t t = 0; t < z.rows; ++t) engine.plan_row(t, plan.row(t));
  return iterations;
}

}  // namespace moeroute

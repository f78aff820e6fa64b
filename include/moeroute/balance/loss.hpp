// The engine of the balancing losses: any number of them share one softmax and one or two sweeps.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <type_traits>

#include <moeroute/balance/loss_term.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/exec/worker_slots.hpp>

namespace moeroute {

namespace detail {

// One call's memory.
template <class F>
struct loss_memory {
  F* block;                        // [workers][16 * (stride + 1)], twice that for powers
  F* coefficient;                  // [1, or one per sequence][stride], padded with 0
  F* piece_sum;                    // [pieces][2][stride]: sums, and what they round away
  F* run_sum;                      // [workers][2][stride], likewise
  F* block_sum;                    // [workers][2][stride], likewise
  double* run_slope;               // [workers][stride], of one loss in one sequence
  simd::row_function_sums* piece;  // [pieces]
  double* piece_value;             // [pieces][losses], of losses by sequence
  index_t* sequence_tokens;        // [sequences], without the masked ones
  double* sum;                     // [stride]
  double* slope;                   // [stride]

  static loss_memory carve(scratch& tape, index_t stride, index_t pieces, index_t sequences,
                           index_t losses, int workers) {
    return {tape.take<F>(workers * 2 * block_rows * (stride + 1)),
            tape.take<F>(std::max<index_t>(1, sequences) * stride),
            tape.take<F>(pieces * 2 * stride),
            tape.take<F>(workers * 2 * stride),
            tape.take<F>(workers * 2 * stride),
            tape.take<double>(workers * stride),
            tape.take<simd::row_function_sums>(pieces),
            tape.take<double>(pieces * losses),
            tape.take<index_t>(sequences),
            tape.take<double>(stride),
            tape.take<double>(stride)};
  }
};

// A names the instruction set that the engine is compiled for: its kernels take it by default.
template <class F, class Exec, class A, class... L>
class loss_engine {
 public:
  static constexpr index_t losses = sizeof...(L);
  static constexpr unsigned uses = (functions_of<L>() | ...);
  static constexpr bool by_sequence = (has_sequences<L> || ...);
  static constexpr bool by_sums = (has_sums<L> || ...);
  // What is a difference of nearly equal sums must not lose it to their rounding.
  static constexpr simd::column_sums sums =
      by_sums ? simd::column_sums::compensated : simd::column_sums::plain;
  static constexpr bool may_keep =
      std::is_same_v<F, float> && by_sums && !by_sequence && uses == simd::no_function;

  loss_engine(const loss_options& how, matrix_view<const F> z, matrix_view<F> dz, const Exec& exec,
              const L&... loss)
      : how_(how), z_(z), dz_(dz), exec_(exec), list_(loss...), slots_(exec.concurrency()) {
    constexpr const char* where = "balance_loss";
    check_loss_shapes(where, how.gradient, how.mask, z, dz);
    if (!(how.sigmoid_eps >= 0.0f)) fail(where, "sigmoid_eps is negative, expected >= 0");
    if (how.scores != probability::softmax && uses != simd::no_function)
      fail(where, "scores are divided by their sum, expected the softmax for losses of rows");
    if (by_sequence)
      check_range(where, "sequence_length", how.sequence_length, 1, index_t{1} << 40);
    sequence_length_ = by_sequence ? how.sequence_length : std::max<index_t>(1, z.rows);
    sequences_ = ceil_div(z.rows, sequence_length_);
    stride_ = round_up(z.cols, block_rows);
    grain_ = loss_grain(z.rows);
  }

  loss_values<sizeof...(L)> run(workspace& ws) {
    const index_t pieces = ceil_div(z_.rows, grain_);
    m_ = ws.carve([&](scratch& tape) {
      return loss_memory<F>::carve(tape, stride_, pieces, sequences_, losses,
                                   worker_slots::count(exec_.concurrency()));
    });
    count_tokens();
    each([&](index_t, const auto& loss) { loss.check(shape_); });
    if (shape_.tokens == 0) {
      if (how_.gradient == gradient_to::write) clear_rows(0, z_.rows);
      return {};
    }
    std::fill_n(m_.slope, stride_, 0.0);
    each([&](index_t, const auto& loss) {
      if constexpr (has_expert_slope<std::remove_cvref_t<decltype(loss)>>)
        loss.expert_slope(shape_, m_.slope);
    });
    set_functions();
    set_coefficients();
    if constexpr (may_keep) {
      if (how_.gradient == gradient_to::write && how_.scores == probability::softmax) {
        // The first sweep leaves p where the gradient will be: no second exponential.
        sweep<probability::softmax, simd::no_function, gradient_to::write, true>();
        add_slopes_of_sums();
        set_coefficients();
        finish_kept();
        return values();
      }
    }
    if (by_sums && how_.gradient != gradient_to::nowhere) {
      sweep_to<simd::no_function, gradient_to::nowhere>();
      add_slopes_of_sums();
      set_coefficients();
    }
    switch (how_.gradient) {
      case gradient_to::nowhere: sweep_to<uses, gradient_to::nowhere>(); break;
      case gradient_to::write: sweep_to<uses, gradient_to::write>(); break;
      case gradient_to::add: sweep_to<uses, gradient_to::add>(); break;
    }
    return values();
  }

 private:
  // f(number, loss) for every loss.
  template <class G>
  void each(G&& f) const {
    std::apply(
        [&](const L&... loss) {
          index_t i = 0;
          (f(i++, loss), ...);
        },
        list_);
  }

  void add_slopes_of_sums() {
    each([&](index_t, const auto& loss) {
      if constexpr (has_sums<std::remove_cvref_t<decltype(loss)>>)
        loss.from_sums(shape_, m_.sum, m_.slope);
    });
  }

  bool masked(index_t t) const {
    return !how_.mask.empty() && how_.mask[static_cast<std::size_t>(t)] == 0;
  }

  void count_tokens() {
    shape_ = {z_.cols, 0, 0, sequences_};
    for (index_t s = 0; s < sequences_; ++s) {
      const index_t end = std::min(z_.rows, (s + 1) * sequence_length_);
      index_t n = 0;
      for (index_t t = s * sequence_length_; t < end; ++t) n += !masked(t);
      m_.sequence_tokens[s] = n;
      shape_.tokens += n;
      shape_.sequences += n > 0;
    }
  }

  void set_functions() {
    functions_.eps = static_cast<F>(how_.sigmoid_eps);
    bool power = false;
    each([&](index_t, const auto& loss) {
      using loss_type = std::remove_cvref_t<decltype(loss)>;
      if constexpr (has_row_functions<loss_type>) {
        const simd::row_functions<double> w = loss.row_weights(shape_);
        functions_.square_lse += static_cast<F>(w.square_lse);
        functions_.entropy += static_cast<F>(w.entropy);
        functions_.power += static_cast<F>(w.power);
        functions_.inverse_norm += static_cast<F>(w.inverse_norm);
        if constexpr ((functions_of<loss_type>() & simd::power) != 0) {
          if (power && functions_.q != static_cast<F>(w.q))
            fail("balance_loss", "q is " + std::to_string(w.q) + ", expected " +
                                     std::to_string(functions_.q) + " as in the other loss");
          functions_.q = static_cast<F>(w.q);
          power = true;
        }
        if constexpr ((functions_of<loss_type>() & simd::inverse_norm) != 0)
          functions_.offset = static_cast<F>(w.offset);
      }
    });
  }

  // Slopes of all losses together, per sequence where there are losses by sequence.
  void set_coefficients() {
    for (index_t s = 0; s < (by_sequence ? sequences_ : index_t{1}); ++s) {
      F* const row = m_.coefficient + s * stride_;
      std::copy_n(m_.slope, z_.cols, m_.run_slope);
      if (m_.sequence_tokens[s] > 0)
        each([&](index_t, const auto& loss) {
          if constexpr (has_sequences<std::remove_cvref_t<decltype(loss)>>)
            loss.sequence_slope(shape_, s, m_.sequence_tokens[s], m_.run_slope);
        });
      for (index_t e = 0; e < stride_; ++e)
        row[e] = e < z_.cols ? static_cast<F>(m_.run_slope[e]) : F{0};
    }
  }

  void clear_rows(index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) std::fill_n(dz_.row(t), dz_.cols, F{0});
  }

  double sum_of(const F* sum, index_t e) const {
    return static_cast<double>(sum[e]) + static_cast<double>(sum[stride_ + e]);
  }

  template <unsigned functions, gradient_to to>
  void sweep_to() {
    if constexpr (uses == simd::no_function) {
      if (how_.scores == probability::normalized_sigmoid)
        return sweep<probability::normalized_sigmoid, functions, to>();
      if (how_.scores == probability::normalized_sqrt_softplus)
        return sweep<probability::normalized_sqrt_softplus, functions, to>();
    }
    sweep<probability::softmax, functions, to>();
  }

  template <probability scores, unsigned functions, gradient_to to, bool keep = false>
  void sweep() {
    exec_.parallel_for(z_.rows, grain_, [&](index_t begin, index_t end) {
      const worker_slots::held worker(slots_);
      const index_t piece = begin / grain_;
      F* const piece_sum = m_.piece_sum + piece * 2 * stride_;
      F* const run_sum = by_sequence ? m_.run_sum + worker * 2 * stride_ : piece_sum;
      m_.piece[piece] = {};
      std::fill_n(piece_sum, 2 * stride_, F{0});
      std::fill_n(m_.block_sum + worker * 2 * stride_, 2 * stride_, F{0});
      std::fill_n(m_.piece_value + piece * losses, losses, 0.0);
      for (index_t t = begin; t < end;) {
        const index_t s = t / sequence_length_;
        const index_t stop = std::min(end, (s + 1) * sequence_length_);
        const F* const coefficient = m_.coefficient + (by_sequence ? s * stride_ : 0);
        if (by_sequence) std::fill_n(run_sum, 2 * stride_, F{0});
        run_of_rows<scores, functions, to, keep>(t, stop, worker, coefficient, m_.piece[piece],
                                                 run_sum);
        if constexpr (by_sequence) close_run(s, worker, piece, run_sum, piece_sum);
        t = stop;
      }
    });
    // Joined in the order of the pieces, whoever ran them.
    std::fill_n(m_.sum, stride_, 0.0);
    for (index_t p = 0; p < ceil_div(z_.rows, grain_); ++p)
      for (index_t e = 0; e < z_.cols; ++e) m_.sum[e] += sum_of(m_.piece_sum + p * 2 * stride_, e);
  }

  template <probability scores, unsigned functions, gradient_to to, bool keep>
  void run_of_rows(index_t begin, index_t end, int worker, const F* coefficient,
                   simd::row_function_sums& total, F* column_sum) {
    simd::probability_block<F> block;
    block.unscaled = m_.block + worker * 2 * block_rows * (stride_ + 1);
    // Past one line more: stores a multiple of 4 KB apart wait for one another.
    block.powers = block.unscaled + block_rows * (stride_ + 1);
    block.stride = stride_;
    const F* row[block_rows];
    F* gradient[block_rows];
    F* const block_sum = m_.block_sum + worker * 2 * stride_;
    constexpr bool writes = to != gradient_to::nowhere;
    for (index_t t = begin; t < end;) {
      int n = 0;
      for (; t < end && n < block_rows; ++t) {
        if (masked(t)) {
          if constexpr (to == gradient_to::write) clear_rows(t, t + 1);
          continue;
        }
        row[n] = z_.row(t);
        gradient[n++] = writes ? dz_.row(t) : nullptr;
      }
      if (n == 0) continue;
      simd::open_probability_rows<scores, functions>(row, n, z_.cols, coefficient, functions_,
                                                     writes ? gradient : nullptr, block, total);
      if constexpr (keep) {
        simd::keep_probability_rows(block, n, z_.cols, gradient, block_sum);
      } else {
        simd::close_probability_rows<scores, functions, to, sums>(
            row, n, z_.cols, coefficient, functions_, block, gradient, block_sum);
      }
      simd::add_block_sum<sums>(block_sum, stride_, column_sum, column_sum + stride_);
    }
  }

  void finish_kept()
    requires may_keep
  {
    exec_.parallel_for(z_.rows, grain_, [&](index_t begin, index_t end) {
      float* kept[block_rows];
      int n = 0;
      for (index_t t = begin; t < end; ++t) {
        if (!masked(t)) kept[n++] = dz_.row(t);
        if (n < block_rows && t + 1 < end) continue;
        if (n > 0) simd::gradient_of_probability_rows(kept, n, z_.cols, m_.coefficient);
        n = 0;
      }
    });
  }

  // The values of one part of one sequence, whose slopes are its own.
  void close_run(index_t s, int worker, index_t piece, const F* run_sum, F* piece_sum) {
    double* const slope = m_.run_slope + worker * stride_;
    each([&](index_t i, const auto& loss) {
      if constexpr (has_sequences<std::remove_cvref_t<decltype(loss)>>) {
        if (m_.sequence_tokens[s] == 0) return;
        std::fill_n(slope, z_.cols, 0.0);
        loss.sequence_slope(shape_, s, m_.sequence_tokens[s], slope);
        double value = 0.0;
        for (index_t e = 0; e < z_.cols; ++e) value += slope[e] * sum_of(run_sum, e);
        m_.piece_value[piece * losses + i] += value;
      }
    });
    for (index_t e = 0; e < 2 * stride_; ++e) piece_sum[e] += run_sum[e];
  }

  loss_values<sizeof...(L)> values() {
    simd::row_function_sums row{};
    loss_values<sizeof...(L)> out;
    for (index_t p = 0; p < ceil_div(z_.rows, grain_); ++p) {
      row.square_lse += m_.piece[p].square_lse;
      row.entropy += m_.piece[p].entropy;
      row.power += m_.piece[p].power;
      row.inverse_norm += m_.piece[p].inverse_norm;
      for (std::size_t i = 0; i < sizeof...(L); ++i)
        out.value[i] += m_.piece_value[p * losses + static_cast<index_t>(i)];
    }
    each([&](index_t i, const auto& loss) {
      using loss_type = std::remove_cvref_t<decltype(loss)>;
      double& value = out.value[static_cast<std::size_t>(i)];
      if constexpr (has_expert_slope<loss_type>) {
        std::fill_n(m_.slope, z_.cols, 0.0);
        loss.expert_slope(shape_, m_.slope);
        for (index_t e = 0; e < z_.cols; ++e) value += m_.slope[e] * m_.sum[e];
      }
      if constexpr (has_sums<loss_type>) value += loss.from_sums(shape_, m_.sum, m_.slope);
      if constexpr (has_row_functions<loss_type>) {
        const simd::row_functions<double> w = loss.row_weights(shape_);
        value += w.square_lse * row.square_lse + w.entropy * row.entropy + w.power * row.power +
                 w.inverse_norm * row.inverse_norm;
      }
    });
    return out;
  }

  loss_options how_;
  matrix_view<const F> z_;
  matrix_view<F> dz_;
  const Exec& exec_;
  std::tuple<const L&...> list_;
  worker_slots slots_;
  index_t sequence_length_ = 1, sequences_ = 0, stride_ = 0, grain_ = 1;
  loss_shape shape_{};
  simd::row_functions<F> functions_{};
  loss_memory<F> m_{};
};

}  // namespace detail

/// The values of losses of logits and, added up, their gradient.
///
/// Forward: p = softmax(z), or s / (sum s + eps) with s = sigmoid(z) or s = sqrt(softplus(z));
/// value = sum over losses. Backward, with G[t, e] = d value / d p[t, e]:
///   softmax  dz[t, i] = p_i * (G_i - sum_j p_j G_j)
///   sigmoid  dz[t, i] = s_i (1 - s_i) / (sum s + eps) * (G_i - sum_j q_j G_j)
///   sqrt-softplus  the same with sigmoid(z_i) / 2 s_i in place of s_i (1 - s_i)
///
/// Shapes: logits, dlogits [T, E]; float, or double by plain loops. Requires: dlogits is its own
/// memory. Ensures: masked tokens have no gradient and are in no count and no mean. A NaN counts as
/// -inf. A row without a logit above -inf adds nothing and has no gradient, but stays among the
/// tokens; the gradient of a row with a +inf is 0. No token at all: every value is 0.
/// Throws: error where a size differs, a loss refuses, or the arguments contradict one another.
/// Cost: one sweep over [T, E], or two where a loss needs the sums first (importance_loss,
/// mean_importance_loss, batch_entropy_loss). Scratch: 17 rows per worker and T / 32 rows, plus one
/// row per sequence for losses by sequence. No allocation once warm.
/// Determinism: the same bits for every executor and thread count.
/// Example:
///
///     std::vector<double> counts(8);
///     count_choices(choices, {}, std::span(counts));
///     const auto values = balance_loss<float>({}, view(logits), view(dlogits), ws, serial{},
///                                             switch_loss{.coefficient = 0.01, .counts = counts},
///                                             router_z_loss{.coefficient = 1e-3});
template <class F, executor Exec, loss_term... L, class A = simd::default_arch>
  requires(sizeof...(L) > 0 && std::is_floating_point_v<F>)
loss_values<sizeof...(L)> balance_loss(const loss_options& how,
                                       std::type_identity_t<matrix_view<const F>> logits,
                                       matrix_view<F> dlogits, workspace& ws, const Exec& exec,
                                       const L&... losses) {
  detail::loss_engine<F, Exec, A, L...> engine(how, logits, dlogits, exec, losses...);
  return engine.run(ws);
}

/// The values alone, in one sweep; `how.gradient` is not used.
template <class F, executor Exec, loss_term... L, class A = simd::default_arch>
  requires(sizeof...(L) > 0 && std::is_floating_point_v<F>)
loss_values<sizeof...(L)> balance_loss_value(loss_options how, matrix_view<const F> logits,
                                             workspace& ws, const Exec& exec, const L&... losses) {
  how.gradient = gradient_to::nowhere;
  return balance_loss<F>(how, logits, matrix_view<F>{}, ws, exec, losses...);
}

}  // namespace moeroute

// Sparsity-constrained optimal transport: a plan with at most so many tokens per expert, and expert
// choice or token choice on it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>

#include <moeroute/policy/batch/column_choice.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/row_choice.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/batch_kinds.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/simd/adam.hpp>
#include <moeroute/simd/select/column_top_k.hpp>

namespace moeroute {

namespace detail {

// Similarity plus the tokens' potentials, never stored.
struct shifted_strip {
  stored_strip similarity;
  const float* potential;  ///< [T rounded up to 16]

  template <class A>
  MOEROUTE_INLINE simd::vfloat<A> values(index_t tile, int column, int lane) const {
    return similarity.values<A>(tile, column, lane) +
           simd::load<A>(potential + tile * simd::tile_size + lane);
  }
};

// The threshold of the Euclidean projection of n values onto the simplex: the theta for which
// max(value(i) - theta, 0) sum to 1. Values enter in row order, so the bits are fixed.
template <class Value>
double simplex_threshold(const Value& value, index_t n) {
  // Drop what lies below the threshold of what is left, until nothing does (Michelot 1986).
  double threshold = -std::numeric_limits<double>::infinity();
  for (index_t left = n + 1;;) {
    double sum = 0.0;
    index_t count = 0;
    for (index_t i = 0; i < n; ++i) {
      const double v = value(i);
      if (!(v > threshold)) continue;
      sum += v;
      ++count;
    }
    // Nothing lies above the threshold of values too large for a difference of 1.
    if (count == left || count == 0) return threshold;
    left = count;
    threshold = (sum - 1.0) / static_cast<double>(count);
  }
}

}  // namespace detail

/// Expert choice on a sparse transport plan: each expert takes the C tokens that the plan gives it
/// most of.
///
/// The plan transports tokens (1 each) to experts (T / E each) along softmax(z) with at most
/// `support` tokens per expert; it is found by descending the semi-dual in the tokens' potentials.
/// Shapes: logits [T, E]; the result is ragged, a token's experts in ascending id.
/// Ensures: after any number of steps each column of the plan has at most `support` entries and
/// sums to T / E (where that many tokens have a logit above -inf); rows sum to 1 only
/// approximately. Choice score: similarity plus potential, which has the plan's order and ranks the
/// entries that are 0 as well. Throws: error where an option is out of its range. Cost: one column
/// sweep per step over a [T, E] panel of scratch. No allocation once warm. Determinism: the same
/// ids and weights on every ISA, executor and thread count. Source: Liu, Puigcerver, Blondel 2022;
/// 20 steps of Adam as in V-MoE.
struct sparse_transport {
  tokens_per_expert capacity{};
  index_t support = 0;  ///< most tokens per expert in the plan; 0: as many as the capacity
  transport_weights weights = transport_weights::softmax;
  float gamma = 1.0f;  ///< strength of the quadratic regularisation
  float learning_rate = 1e-2f;
  index_t steps = 20;

  void check(index_t, index_t experts) const {
    capacity.check();
    check_range("sparse_transport", "experts", experts, 1, max_experts);
    check_range("sparse_transport", "support", support, 0, index_t{1} << 30);
    check_range("sparse_transport", "steps", steps, 0, index_t{1} << 30);
    if (!(gamma > 0.0f) || !std::isfinite(gamma))
      fail_value("sparse_transport", "gamma", gamma, "> 0");
    if (!(learning_rate > 0.0f) || !std::isfinite(learning_rate))
      fail_value("sparse_transport", "learning_rate", learning_rate, "> 0");
  }

  template <executor Exec, class A = simd::default_arch>
  void route_batch(matrix_view<const float> z, const side_inputs& side, workspace& ws,
                   assignment& out, const Exec& exec) const {
    const index_t tokens = z.rows, experts = z.cols;
    if (tokens == 0) return detail::no_rows(experts, experts, out);
    const index_t c = std::min(capacity(tokens, experts), tokens);
    // Where experts take more tokens than the plan has for them, its entries are told from others
    // by the last of each column's support: the least, and the later of equals.
    const bool beyond = weights == transport_weights::plan && support > 0 && c > support;
    std::int32_t *least = nullptr, *last = nullptr;
    const solver<A> s = this->template solve<A>(z, side, ws, exec, [&](scratch& tape) {
      least = tape.take<std::int32_t>(beyond ? experts : 0);
      last = tape.take<std::int32_t>(beyond ? experts : 0);
    });
    for (index_t e = 0; beyond && e < experts; ++e) {
      const index_t first = e * s.scopes.capacity;
      least[e] = std::numeric_limits<std::int32_t>::max();
      for (index_t i = first; i < first + s.picks.count[e]; ++i)
        if (s.picks.key[i] <= least[e]) least[e] = s.picks.key[i], last[e] = s.picks.row[i];
    }
    detail::column_scopes taken = s.scopes;
    taken.capacity = c;
    if (c != s.scopes.capacity) {
      detail::pick_columns<A>(taken, s.source(), s.columns, s.workers, s.picks, exec);
    }
    detail::rows_from_picks(
        taken, s.picks, s.cursor, experts, out, [&](index_t t, index_t e, std::int32_t key) {
          if (weights != transport_weights::plan) return s.similarity(t, e);
          const bool out_of_plan = beyond && (key < least[e] || (key == least[e] && t > last[e]));
          return out_of_plan ? 0.0f : s.mass(e, key);
        });
  }

  /// The plan, dense, for tests and metrics. Shapes: plan [T, E]. Cost: as routing.
  template <executor Exec = serial, class A = simd::default_arch>
  void plan(matrix_view<const float> z, const side_inputs& side, workspace& ws,
            matrix_view<float> plan, const Exec& exec = {}) const {
    check(z.rows, z.cols);
    check_size("sparse_transport", "plan.rows", plan.rows, z.rows);
    check_size("sparse_transport", "plan.cols", plan.cols, z.cols);
    for (index_t t = 0; t < z.rows; ++t) std::fill_n(plan.row(t), z.cols, 0.0f);
    if (z.rows == 0) return;
    const solver<A> s = this->template solve<A>(z, side, ws, exec, [](scratch&) {});
    for (index_t e = 0; e < z.cols; ++e)
      for (index_t i = 0; i < s.picks.count[e]; ++i) {
        const index_t at = e * s.scopes.capacity + i;
        plan(s.picks.row[at], e) = s.mass(e, s.picks.key[at]);
      }
  }

  /// The tokens' potentials [T] after the last step: the constants of the plan's gradient
  /// (policy/weigh/transport_plan.hpp). Cost: as routing.
  template <executor Exec = serial, class A = simd::default_arch>
  void potentials(matrix_view<const float> z, const side_inputs& side, workspace& ws,
                  std::span<float> list, const Exec& exec = {}) const {
    check(z.rows, z.cols);
    check_size("sparse_transport", "potentials.size()", static_cast<index_t>(list.size()), z.rows);
    if (z.rows == 0) return;
    const solver<A> s = this->template solve<A>(z, side, ws, exec, [](scratch&) {});
    std::copy_n(s.potential, z.rows, list.begin());
  }

 private:
  friend struct sparse_transport_token_choice;

  template <class A>
  struct solver {
    detail::column_scopes scopes;  ///< with the support as capacity
    int workers;
    float* panel;
    detail::choice_rows* rows;
    simd::column_top_k_buffers* columns;
    simd::column_picks picks;
    std::int32_t* cursor;
    float *potential, *gradient, *mean, *square;  ///< [T rounded up to 16]
    double* threshold;                            ///< [E]
    double column_mass, scale;

    // Whether the plan has the entry is decided by the support too, not by this alone.
    double over_threshold(index_t e, double shifted) const {
      return shifted / scale - threshold[e];
    }

    simd::panel_shape shape() const { return {scopes.tiles()}; }
    auto source() const {
      return [this](index_t, index_t strip) {
        return detail::shifted_strip{
            {panel + strip * scopes.tiles() * simd::tile_size * simd::tile_size}, potential};
      };
    }
    // What the plan gives expert e of a token whose similarity plus potential has this key.
    float mass(index_t e, std::int32_t key) const {
      const double over = over_threshold(e, static_cast<double>(simd::value_of_key(key)));
      return over > 0.0 ? static_cast<float>(over * column_mass) : 0.0f;
    }
    float similarity(index_t t, index_t e) const {
      return panel[shape().strip(e) +
                   simd::panel_shape::lanes(t / simd::tile_size,
                                            static_cast<int>(e % simd::tile_size)) +
                   t % simd::tile_size];
    }
  };

  // also(tape) carves what the caller needs beside the plan.
  template <class A, executor Exec, class Also>
  solver<A> solve(matrix_view<const float> z, const side_inputs& side, workspace& ws,
                  const Exec& exec, const Also& also) const {
    const index_t tokens = z.rows, experts = z.cols;
    const index_t c = capacity(tokens, experts);
    const index_t k = std::min(support > 0 ? support : c, tokens);
    const index_t padded = round_up(tokens, simd::tile_size);
    const int workers = worker_slots::count(exec.concurrency());
    solver<A> s = ws.carve([&](scratch& tape) {
      solver<A> r{};
      r.scopes = {tokens, experts, 1, tokens, k};
      r.workers = workers;
      r.panel = tape.take<float>(r.scopes.panel());
      r.rows = detail::choice_rows::carve(tape, experts, workers);
      r.columns = detail::carve_column_buffers(tape, tokens, workers);
      detail::column_scopes most = r.scopes;
      most.capacity = std::max(k, c);
      r.picks = detail::carve_picks(tape, most);
      r.cursor = tape.take<std::int32_t>(tokens + experts);
      r.potential = tape.take<float>(padded);
      r.gradient = tape.take<float>(padded);
      r.mean = tape.take<float>(padded);
      r.square = tape.take<float>(padded);
      r.threshold = tape.take<double>(experts);
      also(tape);
      return r;
    });
    detail::fill_panels<A>(softmax{}, z, side, s.scopes, s.rows, workers, s.panel, exec);
    index_t live = 0;
    for (index_t t = 0; t < tokens; ++t)
      live += !side.masked(t) && simd::row_max<A>(z.row(t), experts) > simd::minus_infinity;
    s.column_mass = static_cast<double>(std::max<index_t>(live, 1)) / static_cast<double>(experts);
    s.scale = static_cast<double>(gamma) * s.column_mass;
    for (float* p : {s.potential, s.mean, s.square}) std::fill_n(p, padded, 0.0f);
    simd::adam_steps adam;
    for (index_t step = 0;; ++step) {
      detail::pick_columns<A>(s.scopes, s.source(), s.columns, workers, s.picks, exec);
      for (index_t e = 0; e < experts; ++e)
        s.threshold[e] = detail::simplex_threshold(
            [&](index_t i) {
              return static_cast<double>(simd::value_of_key(s.picks.key[e * k + i])) / s.scale;
            },
            s.picks.count[e]);
      if (step == steps) return s;
      // The gradient of the semi-dual: what the plan gives away of each token, less the token.
      std::fill_n(s.gradient, padded, -1.0f);
      for (index_t e = 0; e < experts; ++e)
        for (index_t i = 0; i < s.picks.count[e]; ++i)
          s.gradient[s.picks.row[e * k + i]] += s.mass(e, s.picks.key[e * k + i]);
      adam.step<A>(learning_rate, s.gradient, padded, s.mean, s.square, s.potential);
    }
  }
};
static_assert(batch_router<sparse_transport>);

/// Token choice on a sparse transport plan: each token takes the k experts that the plan gives it
/// to most.
///
/// Shapes: logits [T, E]; the result is [T, k], best first. Choice score: similarity plus potential
/// over the expert's threshold, which has the order of the plan's row and ranks the entries that
/// are 0 behind it; those that reach the threshold and not the support are equal, the lowest expert
/// first. Nothing bounds an expert's tokens but the plan: a capacity is the stage of that name.
/// Throws: error where k is outside [1, E] or an option of the plan is out of its range. Cost: as
/// sparse_transport, a [T, E] matrix of scratch more and a top-k per row. No allocation once warm.
/// Determinism: as sparse_transport. Source: Liu, Puigcerver, Blondel 2022; V-MoE.
struct sparse_transport_token_choice {
  index_t k = 1;
  /// Its capacity is the plan's support where that is 0.
  sparse_transport transport{};

  side_use reads_side(index_t) const { return {.own_k = k}; }

  void check(index_t tokens, index_t experts) const {
    transport.check(tokens, experts);
    check_range("sparse_transport_token_choice", "k", k, 1, experts);
  }

  template <executor Exec, class A = simd::default_arch>
  void route_batch(matrix_view<const float> z, const side_inputs& side, workspace& ws,
                   assignment& out, const Exec& exec) const {
    const index_t tokens = z.rows, experts = z.cols;
    if (tokens == 0) return out.reset(0, experts, k);
    float* order = nullptr;
    double column_mass = 0.0;
    const detail::filled_rows rows{
        k,
        [&]<class B>(const logit_block& block, float* choice) {
          for (int i = 0; i < block.rows; ++i)
            std::copy_n(order + (block.first_token + i) * experts, experts, choice + i * experts);
        },
        [&]<class B>(const logit_block& block, choice_block& c, const float* choice) {
          if (transport.weights == transport_weights::softmax)
            return softmax::score_choices<B>(block, c, score_scale::exact);
          for (int r = 0; r < c.k; ++r)
            for (int i = 0; i < block.rows; ++i) {
              const expert_id e = c.id[r * block_rows + i];
              const float over = e == no_expert ? 0.0f : choice[i * experts + e];
              c.value[r * block_rows + i] =
                  over > 0.0f ? static_cast<float>(static_cast<double>(over) * column_mass) : 0.0f;
            }
        }};
    using memory = detail::row_memory<std::remove_const_t<decltype(rows)>>;
    const int workers = worker_slots::count(exec.concurrency());
    const memory* memories = nullptr;
    const auto s = transport.template solve<A>(z, side, ws, exec, [&](scratch& tape) {
      order = tape.take<float>(tokens * experts);
      memories = memory::carve(tape, rows, experts, workers);
    });
    column_mass = s.column_mass;
    // What the plan leaves out, then its entries over that.
    exec.parallel_for(tokens, 256, [&](index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t)
        for (index_t e = 0; e < experts; ++e) {
          const double over = s.over_threshold(
              e, static_cast<double>(s.similarity(t, e)) + static_cast<double>(s.potential[t]));
          order[t * experts + e] = z(t, e) > simd::minus_infinity
                                       ? std::min(static_cast<float>(over), 0.0f)
                                       : simd::minus_infinity;
        }
    });
    for (index_t e = 0; e < experts; ++e)
      for (index_t i = 0; i < s.picks.count[e]; ++i) {
        const index_t at = e * s.scopes.capacity + i;
        const double over =
            s.over_threshold(e, static_cast<double>(simd::value_of_key(s.picks.key[at])));
        if (over > 0.0)
          order[s.picks.row[at] * experts + e] =
              std::max(static_cast<float>(over), std::numeric_limits<float>::min());
      }
    detail::route_rows<A>(rows, z, side, memories, workers, out, exec);
  }
};
static_assert(batch_router<sparse_transport_token_choice>);

}  // namespace moeroute

// BASE layers: every token goes to one expert and every expert gets exactly T / E tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include <moeroute/policy/batch/column_choice.hpp>
#include <moeroute/policy/batch/row_choice.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/batch_kinds.hpp>
#include <moeroute/policy/parts/phase.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/simd/rows/panel.hpp>

namespace moeroute {

namespace detail {

// The affinities of a batch, cleaned for a solver that must place every token.
struct affinity {
  matrix_view<const float> z;
  const side_inputs* side;
  float least = 0.0f, most = 0.0f;  ///< of the finite logits

  affinity(matrix_view<const float> logits, const side_inputs& s) : z(logits), side(&s) {
    bool any = false;
    for (index_t t = 0; t < z.rows; ++t) {
      if (side->masked(t)) continue;
      for (index_t e = 0; e < z.cols; ++e) {
        const float x = z(t, e);
        if (!std::isfinite(x)) continue;
        least = any ? std::min(least, x) : x;
        most = any ? std::max(most, x) : x;
        any = true;
      }
    }
  }

  // As the published code: what is not finite counts as the least, +inf as the most; so do masked
  // tokens, which only fill places.
  float auction_value(index_t t, index_t e) const {
    if (side->masked(t) || !(z(t, e) > simd::minus_infinity)) return least;
    return std::min(z(t, e), most);
  }

  // Forbidden places cost more than everything else together; masked tokens are the same
  // everywhere.
  double optimal_value(index_t t, index_t e) const {
    if (side->masked(t)) return 0.0;
    const double range = static_cast<double>(most) - static_cast<double>(least) + 1.0;
    const double prohibitive = range * static_cast<double>(z.rows + 1);
    if (!(z(t, e) > simd::minus_infinity)) return static_cast<double>(least) - prohibitive;
    if (z(t, e) > most) return static_cast<double>(most) + prohibitive;
    return static_cast<double>(z(t, e));
  }
};

// What an expert bids on: affinity - price, but `held` for the token that it won last.
struct bidding_strip {
  const float* strip;
  const float* price;          ///< [T rounded up to 16]
  const std::int32_t* holder;  ///< [T rounded up to 16], the expert that won the token, or -1
  index_t first;               ///< expert of the strip's first column
  float held;
  bool held_is_raw;  ///< the won token has its affinity instead

  template <class A>
  MOEROUTE_INLINE simd::vfloat<A> values(index_t tile, int column, int lane) const {
    const simd::vfloat<A> a = simd::load<A>(strip + simd::panel_shape::lanes(tile, column) + lane);
    const index_t place = tile * simd::tile_size + lane;
    const auto mine = simd::lanes_equal<A>(simd::load<A>(holder + place),
                                           static_cast<std::int32_t>(first + column));
    // Rows past the last token are -inf, and nobody holds them.
    return simd::select<A>(mine, held_is_raw ? a : simd::vfloat<A>(held),
                           a - simd::load<A>(price + place));
  }
};

struct auction_memory {
  float* panel;
  float* row;  ///< [16, stride] on its way into the panel
  float* factor;
  float* price;
  float* best_bid;
  std::int32_t* holder;
  std::int32_t* bidder;
  simd::column_top_k_buffers* columns;
  simd::column_picks picks;

  static auction_memory carve(scratch& tape, const column_scopes& s, int workers) {
    const index_t padded = round_up(s.tokens, simd::tile_size);
    const index_t stride = round_up(s.experts, simd::tile_size);
    return {tape.take<float>(s.panel()),
            tape.take<float>(simd::tile_size * stride),
            tape.take<float>(simd::tile_size),
            tape.take<float>(padded),
            tape.take<float>(padded),
            tape.take<std::int32_t>(padded),
            tape.take<std::int32_t>(padded),
            carve_column_buffers(tape, s.length, workers),
            carve_picks(tape, s)};
  }
};

// Moves the worst of a column's picks to the end: the smallest key, the last token among equals.
inline void worst_last(std::int32_t* token, std::int32_t* key, index_t n) {
  index_t worst = 0;
  for (index_t i = 1; i < n; ++i)
    if (key[i] < key[worst] || (key[i] == key[worst] && token[i] > token[worst])) worst = i;
  std::swap(token[worst], token[n - 1]);
  std::swap(key[worst], key[n - 1]);
}

// Affinities into the panel.
template <class A>
void fill_auction_panel(const affinity& a, const auction_memory& m, const column_scopes& s) {
  const simd::panel_shape shape{s.tiles()};
  const index_t stride = round_up(s.experts, simd::tile_size);
  std::fill_n(m.factor, simd::tile_size, 1.0f);
  for (index_t tile = 0; tile < s.tiles(); ++tile) {
    std::fill_n(m.row, simd::tile_size * stride, simd::minus_infinity);
    for (index_t lane = 0; lane < simd::tile_size; ++lane) {
      const index_t t = tile * simd::tile_size + lane;
      if (t >= s.tokens) continue;
      for (index_t e = 0; e < s.experts; ++e) m.row[lane * stride + e] = a.auction_value(t, e);
    }
    simd::pack_tiles<A>(m.row, stride, m.factor, s.experts, m.panel, shape, tile);
  }
}

// The auction. Fills expert_of [T] and returns true, or false where it has not settled after
// `most_rounds`.
template <class A, executor Exec>
bool run_auction(const affinity& a, const auction_memory& m, const column_scopes& s, int workers,
                 index_t most_rounds, std::int32_t* expert_of, const Exec& exec) {
  // Up to here every bid keeps what it won cheaply; from here on prices alone decide, which settles
  // quickly.
  constexpr index_t patient_rounds = 100;
  const index_t jobs = s.tokens / s.experts, places = round_up(s.tokens, simd::tile_size);
  fill_auction_panel<A>(a, m, s);
  const float eps = std::max((a.most - a.least) / 50.0f, 1e-4f);
  std::fill_n(m.price, places, 0.0f);
  std::fill_n(m.holder, places, -1);
  for (index_t round = 0; round < most_rounds; ++round) {
    // What the last round won is worth most while the auction is patient.
    const bool raw = round > patient_rounds;
    pick_columns<A>(
        s,
        [&](index_t, index_t strip) {
          return bidding_strip{m.panel + strip * s.tiles() * simd::tile_size * simd::tile_size,
                               m.price,
                               m.holder,
                               strip * simd::tile_size,
                               a.most,
                               raw};
        },
        m.columns, workers, m.picks, exec);
    std::fill_n(m.best_bid, places, 0.0f);
    std::fill_n(m.bidder, places, -1);
    std::fill_n(expert_of, s.tokens, -1);
    const bool retains = round > 0 && round < patient_rounds;
    index_t placed = 0;
    for (index_t e = 0; e < s.experts; ++e) {
      std::int32_t* const token = m.picks.row + e * s.capacity;
      std::int32_t* const key = m.picks.key + e * s.capacity;
      worst_last(token, key, jobs + 1);
      const float next = simd::value_of_key(key[jobs]);
      for (index_t i = 0; i < jobs; ++i) {
        const std::int32_t at = token[i];
        std::int32_t& owner = expert_of[at];
        placed += owner < 0;
        owner = static_cast<std::int32_t>(e);
        if (retains && m.holder[at] == e) continue;
        const float bid = (simd::value_of_key(key[i]) - next) + eps;
        if (bid > m.best_bid[at]) {
          m.best_bid[at] = bid;
          m.bidder[at] = static_cast<std::int32_t>(e);
        }
      }
    }
    // Every expert lists T / E tokens, so all tokens are placed when none is listed twice.
    if (placed == s.tokens) return true;
    for (index_t at = 0; at < places; ++at) {
      // Whoever won a token last time bids the least for it; equal bids go to the lowest expert.
      const std::int32_t holder = retains ? m.holder[at] : -1;
      if (holder >= 0 &&
          (eps > m.best_bid[at] || (eps == m.best_bid[at] && holder < m.bidder[at]))) {
        m.best_bid[at] = eps;
        m.bidder[at] = holder;
      }
      m.price[at] += m.best_bid[at];
    }
    std::copy_n(m.bidder, places, m.holder);
  }
  return false;
}

struct optimal_memory {
  double* gain;          ///< [E, E]: best change when one of e's tokens moves to f
  std::int32_t* mover;   ///< [E, E]: that token
  double* reach;         ///< [E]
  std::int32_t* parent;  ///< [E]
  std::int32_t* load;    ///< [E]

  static optimal_memory carve(scratch& tape, index_t experts) {
    return {tape.take<double>(experts * experts), tape.take<std::int32_t>(experts * experts),
            tape.take<double>(experts), tape.take<std::int32_t>(experts),
            tape.take<std::int32_t>(experts)};
  }
};

// The balanced assignment with the largest sum: tokens enter one by one, each along the best chain
// of moves that ends at an expert with room (successive shortest paths on the experts). All places
// are filled in the end: which of them comes first changes no sum, but the nearest one asks for the
// fewest moves.
inline void run_optimal(const affinity& a, const optimal_memory& m, std::int32_t* expert_of) {
  const index_t tokens = a.z.rows, experts = a.z.cols, jobs = tokens / experts;
  constexpr double never = -std::numeric_limits<double>::infinity();
  std::fill_n(m.gain, experts * experts, never);
  std::fill_n(m.load, experts, 0);
  std::fill_n(expert_of, tokens, -1);
  const auto refresh = [&](index_t e, index_t entered) {
    double* const gain = m.gain + e * experts;
    std::int32_t* const mover = m.mover + e * experts;
    std::fill_n(gain, experts, never);
    for (index_t t = 0; t <= entered; ++t) {
      if (expert_of[t] != e) continue;
      const double here = a.optimal_value(t, e);
      for (index_t f = 0; f < experts; ++f) {
        const double change = a.optimal_value(t, f) - here;
        if (change <= gain[f]) continue;
        gain[f] = change;
        mover[f] = static_cast<std::int32_t>(t);
      }
    }
  };
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t e = 0; e < experts; ++e) {
      m.reach[e] = a.optimal_value(t, e);
      m.parent[e] = -1;
    }
    // Chains have at most E moves; rounding must not make them circle.
    bool better = true;
    for (index_t pass = 1; better && pass < experts; ++pass) {
      better = false;
      for (index_t e = 0; e < experts; ++e)
        for (index_t f = 0; f < experts; ++f) {
          const double through = m.reach[e] + m.gain[e * experts + f];
          if (!(through > m.reach[f])) continue;
          bool circle = false;
          for (index_t at = e; at >= 0 && !circle; at = m.parent[at]) circle = at == f;
          if (circle) continue;
          m.reach[f] = through;
          m.parent[f] = static_cast<std::int32_t>(e);
          better = true;
        }
    }
    index_t end = -1;
    for (index_t e = 0; e < experts; ++e)
      if (m.load[e] < jobs && (end < 0 || m.reach[e] > m.reach[end])) end = e;
    ++m.load[end];
    index_t at = end;
    for (; m.parent[at] >= 0; at = m.parent[at])
      expert_of[m.mover[m.parent[at] * experts + at]] = static_cast<std::int32_t>(at);
    expert_of[t] = static_cast<std::int32_t>(at);
    for (index_t e = end;; e = m.parent[e]) {
      refresh(e, t);
      if (m.parent[e] < 0) break;
    }
  }
}

}  // namespace detail

/// BASE: in training a balanced assignment, one expert per token and exactly T / E tokens per
/// expert; in evaluation each token's best expert. The weight is sigmoid of the logit.
///
/// Shapes: logits [T, E] (affinities of tokens and expert centroids); the result is [T, 1].
/// Ensures: with the auction the sum of logits is near the largest possible, with `optimal` it is
/// the largest. A place at a NaN or -inf logit is handed out only where nothing else is left; it
/// then becomes no_expert. Masked tokens fill places and get no expert. Throws: error in training
/// where E does not divide T. Cost: the auction reads a [T, E] panel once per round, some tens of
/// rounds; `optimal` is for small batches. An auction that has not settled after most_rounds
/// (affinities closer than their rounding) is handed to `optimal`. No allocation once warm.
/// Determinism: the same ids on every ISA, executor and thread count; equal bids go to the lowest
/// expert. Source: Lewis et al. 2021, the auction of its published code; Bertsekas 1988.
struct base_assignment {
  routing_phase phase = routing_phase::training;
  assignment_solver solver = assignment_solver::auction;
  index_t most_rounds = 2000;

  void check(index_t tokens, index_t experts) const {
    check_range("base_assignment", "experts", experts, 1, max_experts);
    check_range("base_assignment", "most_rounds", most_rounds, 1, index_t{1} << 30);
    if (phase == routing_phase::training && tokens % experts != 0)
      fail("base_assignment", "tokens is " + std::to_string(tokens) +
                                  ", expected a multiple of experts = " + std::to_string(experts));
  }

  template <executor Exec, class A = simd::default_arch>
  void route_batch(matrix_view<const float> z, const side_inputs& side, workspace& ws,
                   assignment& out, const Exec& exec) const {
    const index_t tokens = z.rows, experts = z.cols;
    const int workers = worker_slots::count(exec.concurrency());
    if (tokens == 0) return out.reset(0, experts, 1);
    if (phase == routing_phase::evaluation) {
      const router<sigmoid> plain{.selection = {.k = 1}};
      using memory = detail::row_memory<router<sigmoid>>;
      const memory* memories =
          ws.carve([&](scratch& tape) { return memory::carve(tape, plain, experts, workers); });
      return detail::route_rows<A>(plain, z, side, memories, workers, out, exec);
    }
    const index_t jobs = tokens / experts;
    // Experts bid with the value of their best alternative, so they list one token more than they
    // get.
    const detail::column_scopes s{tokens, experts, 1, tokens, std::min(jobs + 1, tokens)};
    struct memory {
      detail::auction_memory auction;
      detail::optimal_memory optimal;
      std::int32_t* expert_of;
    };
    const bool bids = solver == assignment_solver::auction && experts > 1;
    const memory m = ws.carve([&](scratch& tape) {
      memory r{};
      if (bids) r.auction = detail::auction_memory::carve(tape, s, workers);
      r.optimal = detail::optimal_memory::carve(tape, experts);
      r.expert_of = tape.take<std::int32_t>(tokens);
      return r;
    });
    const detail::affinity a(z, side);
    if (!bids || !detail::run_auction<A>(a, m.auction, s, workers, most_rounds, m.expert_of, exec))
      detail::run_optimal(a, m.optimal, m.expert_of);
    out.reset(tokens, experts, 1);
    for (index_t t = 0; t < tokens; ++t) {
      const float logit = z(t, m.expert_of[t]);
      const bool open = !side.masked(t) && logit > simd::minus_infinity;
      out.ids()[static_cast<std::size_t>(t)] = open ? m.expert_of[t] : no_expert;
      out.weights()[static_cast<std::size_t>(t)] =
          open ? simd::sigmoid<A>(simd::vfloat<A>(logit)).get(0) : 0.0f;
    }
  }
};
static_assert(batch_router<base_assignment>);

}  // namespace moeroute

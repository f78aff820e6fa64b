// Rectification of drops: dropped choices find another expert, and vacancies find tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <span>
#include <string>

#include <moeroute/base/error.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/stage/capacity.hpp>

namespace moeroute {

namespace detail {

inline bool chooses(const assignment& a, index_t token, expert_id e, bool kept_only) {
  const expert_id* id = a.ids().data();
  for (index_t c = a.first(token); c < a.first(token + 1); ++c)
    if (id[c] == e && (!kept_only || a.kept(c))) return true;
  return false;
}

}  // namespace detail

/// Intra-rank rectification: every dropped choice goes to the best expert of the token's own rank,
/// beyond its capacity, so that it crosses no wire and is not lost.
///
/// The best by score among the rank's experts that the token does not use yet; the weight is that
/// score. Expert e belongs to rank e / experts_per_rank. A choice stays dropped where the token
/// uses all of the rank's experts already, or has no finite score for the others. Shapes: scores
/// [T, E], rank_of_token [T]. Returns the number of choices that found an expert. Throws: error
/// where a shape does not fit, experts_per_rank is outside [1, E], or a rank has no experts. Cost:
/// O(dropped * (E per rank) * k), no allocation. Determinism: exact; ties go to the lower id.
/// Source: Zeng et al. 2024 (Rectify-Router, intra-GPU rectification).
template <readable_rows Scores, class A = simd::default_arch>
index_t rectify_within_rank(assignment& choices, const Scores& score_rows,
                            std::span<const std::int32_t> rank_of_token, index_t experts_per_rank) {
  const matrix_view<const float> scores = const_view(score_rows);
  const index_t experts = choices.experts();
  check_size("rectify_within_rank", "scores.rows()", scores.rows, choices.tokens());
  check_size("rectify_within_rank", "scores.cols()", scores.cols, experts);
  check_stride("rectify_within_rank", "scores", scores);
  check_choices<A>("rectify_within_rank", choices);
  check_size("rectify_within_rank", "rank_of_token.size()",
             static_cast<index_t>(rank_of_token.size()), choices.tokens());
  check_range("rectify_within_rank", "experts_per_rank", experts_per_rank, 1, experts);
  const index_t ranks = ceil_div(experts, experts_per_rank);
  for (const std::int32_t rank : rank_of_token)
    check_range("rectify_within_rank", "rank_of_token", rank, 0, ranks - 1);
  if (!choices.drops()) return 0;

  expert_id* id = choices.ids().data();
  float* weight = choices.weights().data();
  std::uint8_t* kept = choices.kept_to_change().data();
  index_t found = 0;
  for (index_t t = 0; t < choices.tokens(); ++t) {
    const index_t rank = rank_of_token[static_cast<std::size_t>(t)];
    const index_t begin = rank * experts_per_rank;
    const index_t end = std::min(experts, begin + experts_per_rank);
    for (index_t c = choices.first(t); c < choices.first(t + 1); ++c) {
      if (kept[c] != 0 || id[c] < 0) continue;
      float best = -std::numeric_limits<float>::infinity();
      index_t at = no_expert;
      for (index_t e = begin; e < end; ++e)
        if (scores(t, e) > best && !detail::chooses(choices, t, static_cast<expert_id>(e), true)) {
          best = scores(t, e);
          at = e;
        }
      if (at < 0) continue;
      id[c] = static_cast<expert_id>(at);
      weight[c] = best;
      kept[c] = 1;
      ++found;
    }
  }
  return found;
}

/// Fill-in rectification: places that stayed empty go to tokens that did not choose the expert, by
/// their (k+1)-th best expert, then their (k+2)-th and so on; among the tokens of one round those
/// with the highest score first.
///
/// `filled` becomes ragged: each token's choices as they are, without those that have no expert,
/// then those that it was given, with their score as weight. Nobody loses a place.
/// Shapes: scores [T, E]. Returns the number of choices that were added.
/// Ensures: no expert has more than max(capacity, its kept choices); after E - k rounds none has a
/// vacancy while a token with a finite score is left that does not choose it.
/// Throws: error where a shape does not fit, capacity < 0, choices and filled are the same, or a
/// token has more choices than filled has room for: it names an expert twice.
/// Cost: O(T E) per round, O(T + E) scratch; allocates only where filled or ws must grow.
/// Determinism: exact; ties go to the lower id, then to the lower token.
/// Source: Zeng et al. 2024 (Rectify-Router, fill-in rectification).
template <readable_rows Scores, class A = simd::default_arch>
index_t rectify_by_filling(const assignment& choices, const Scores& score_rows, index_t capacity,
                           index_t rounds, workspace& ws, assignment& filled) {
  const matrix_view<const float> scores = const_view(score_rows);
  const index_t tokens = choices.tokens(), experts = choices.experts();
  check_size("rectify_by_filling", "scores.rows()", scores.rows, tokens);
  check_size("rectify_by_filling", "scores.cols()", scores.cols, experts);
  check_stride("rectify_by_filling", "scores", scores);
  check_choices<A>("rectify_by_filling", choices);
  check_range("rectify_by_filling", "capacity", capacity, 0, std::int32_t{0x7fffffff});
  check_range("rectify_by_filling", "rounds", rounds, 0, experts);
  if (&choices == &filled)
    fail("rectify_by_filling", "choices and filled are the same, expected two assignments");

  struct memory {
    std::int32_t *vacancies, *last, *added, *order, *start, *given_token, *given_expert;
    std::uint32_t* key;
  };
  // At most what all experts lack is given away, and no token gets more than one per round.
  const index_t most_given =
      std::min(size_product(capacity, experts), size_product(tokens, rounds));
  const memory m = ws.carve([&](scratch& tape) {
    return memory{tape.take<std::int32_t>(experts),     tape.take<std::int32_t>(tokens),
                  tape.take<std::int32_t>(tokens),      tape.take<std::int32_t>(tokens),
                  tape.take<std::int32_t>(experts + 1), tape.take<std::int32_t>(most_given),
                  tape.take<std::int32_t>(most_given),  tape.take<std::uint32_t>(tokens)};
  });
  std::fill_n(m.vacancies, experts, static_cast<std::int32_t>(capacity));
  std::fill_n(m.last, tokens, no_expert);
  std::fill_n(m.added, tokens, 0);
  const expert_id* id = choices.ids().data();
  for (index_t c = 0; c < choices.choices(); ++c)
    if (id[c] >= 0 && choices.kept(c) && m.vacancies[id[c]] > 0) --m.vacancies[id[c]];
  index_t vacancies = 0, given = 0;
  for (index_t e = 0; e < experts; ++e) vacancies += m.vacancies[e];

  for (index_t round = 0; round < rounds && vacancies > 0; ++round) {
    // Each token names its next best expert; the names are grouped by expert.
    std::fill_n(m.start, experts + 1, 0);
    bool any = false;
    for (index_t t = 0; t < tokens; ++t) {
      const expert_id last = m.last[t];
      if (last == experts) continue;  // this token has named them all
      float best = -std::numeric_limits<float>::infinity();
      index_t at = experts;
      for (index_t e = 0; e < experts; ++e) {
        const float s = scores(t, e);
        const bool named =
            last >= 0 && (s > scores(t, last) || (s == scores(t, last) && e <= last));
        if (!named && s > best && !detail::chooses(choices, t, static_cast<expert_id>(e), false)) {
          best = s;
          at = e;
        }
      }
      m.last[t] = static_cast<expert_id>(at);
      if (at == experts) continue;
      any = true;
      m.key[t] = detail::ordered_bits(best);
      ++m.start[at + 1];
    }
    if (!any) break;
    for (index_t e = 0; e < experts; ++e) m.start[e + 1] += m.start[e];
    for (index_t t = 0; t < tokens; ++t)
      if (m.last[t] < experts && m.last[t] >= 0)
        m.order[m.start[m.last[t]]++] = static_cast<std::int32_t>(t);
    for (index_t e = 0, first = 0; e < experts; ++e) {
      const index_t end = m.start[e];
      const index_t n = std::min<index_t>(m.vacancies[e], end - first);
      std::partial_sort(m.order + first, m.order + first + n, m.order + end,
                        [&](std::int32_t x, std::int32_t y) {
                          return m.key[x] > m.key[y] || (m.key[x] == m.key[y] && x < y);
                        });
      for (index_t i = first; i < first + n; ++i) {
        m.given_token[given] = m.order[i];
        m.given_expert[given++] = static_cast<expert_id>(e);
        ++m.added[m.order[i]];
      }
      m.vacancies[e] -= static_cast<std::int32_t>(n);
      vacancies -= n;
      first = end;
    }
  }

  const index_t most = std::min(experts, choices.k() + rounds);
  const auto own = [&](index_t t) {
    const std::span<const expert_id> list = choices.ids(t);
    return std::ssize(list) - std::count(list.begin(), list.end(), no_expert);
  };
  for (index_t t = 0; t < tokens; ++t)
    if (own(t) + m.added[t] > most) [[unlikely]]
      fail("rectify_by_filling", {"token ", t, " has ", own(t), " choices and is given ",
                                  m.added[t], ", expected at most ", most, " distinct experts"});
  filled.reset_ragged(tokens, experts, most);
  const assignment::parts out = filled.to_fill();
  out.offsets[0] = 0;
  for (index_t t = 0; t < tokens; ++t) {
    std::int32_t at = out.offsets[t];
    for (index_t c = choices.first(t); c < choices.first(t + 1); ++c) {
      if (id[c] < 0) continue;
      out.ids[at] = id[c];
      out.weights[at++] = choices.weights()[static_cast<std::size_t>(c)];
    }
    out.offsets[t + 1] = at + m.added[t];
    m.added[t] = at;
  }
  filled.close();
  for (index_t i = 0; i < given; ++i) {
    const index_t t = m.given_token[i], at = m.added[t]++;
    out.ids[at] = m.given_expert[i];
    out.weights[at] = scores(t, m.given_expert[i]);
  }
  if (choices.drops()) {
    std::uint8_t* kept = filled.kept_to_fill().data();
    for (index_t t = 0; t < tokens; ++t)
      for (index_t c = choices.first(t), at = out.offsets[t]; c < choices.first(t + 1); ++c)
        if (id[c] >= 0) kept[at++] = choices.kept(c) ? 1 : 0;
  }
  return given;
}

}  // namespace moeroute

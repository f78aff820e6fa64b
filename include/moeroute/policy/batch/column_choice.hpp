// Column rules: experts pick tokens down the columns of a choice matrix; the picks become token
// rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include <moeroute/exec/worker_slots.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/simd/select/column_top_k.hpp>

namespace moeroute {

namespace detail {

// Whatever fills the panel of choice scores and reads the columns back: sizes of one batch in
// pieces (scopes) of equal length, each routed on its own.
struct column_scopes {
  index_t tokens, experts, scopes, length, capacity;

  index_t tiles() const { return ceil_div(length, simd::tile_size); }
  index_t strips() const { return ceil_div(experts, simd::tile_size); }
  index_t panel() const { return simd::panel_size(length, experts); }
  index_t columns() const { return scopes * experts; }
  index_t picks() const { return columns() * capacity; }
};

// The picks of all columns, [scope][expert][capacity].
inline simd::column_picks carve_picks(scratch& tape, const column_scopes& s) {
  return {tape.take<std::int32_t>(s.picks()), tape.take<std::int32_t>(s.picks()),
          tape.take<std::int32_t>(s.columns())};
}

// A panel in memory as a source of column_top_k.
struct stored_strip {
  const float* strip;

  template <class A>
  MOEROUTE_INLINE simd::vfloat<A> values(index_t tile, int column, int lane) const {
    return simd::load<A>(strip + simd::panel_shape::lanes(tile, column) + lane);
  }
};

// Runs column_top_k over every strip of every scope; make(scope, strip) is its source.
template <class A, class Make, executor Exec>
void pick_columns(const column_scopes& s, const Make& make,
                  const simd::column_top_k_buffers* memories, int workers,
                  const simd::column_picks& picks, const Exec& exec) {
  worker_slots slots(workers);
  exec.parallel_for(s.scopes * s.strips(), 1, [&](index_t begin, index_t end) {
    const worker_slots::held worker(slots);
    for (index_t piece = begin; piece < end; ++piece) {
      const index_t scope = piece / s.strips(), strip = piece % s.strips();
      const index_t first = strip * simd::tile_size, column = scope * s.experts + first;
      const auto width = static_cast<int>(std::min<index_t>(simd::tile_size, s.experts - first));
      simd::column_top_k<A>(
          make(scope, strip), s.length, width, s.capacity, memories[worker],
          {picks.row + column * s.capacity, picks.key + column * s.capacity, picks.count + column});
    }
  });
}

// Carves one column_top_k_buffers for each worker.
inline simd::column_top_k_buffers* carve_column_buffers(scratch& tape, index_t rows, int workers) {
  auto* const list = tape.take<simd::column_top_k_buffers>(workers);
  for (int w = 0; w < workers; ++w) {
    const auto memory = simd::column_top_k_buffers::carve(tape, rows);
    if (list != nullptr) std::construct_at(list + w, memory);
  }
  return list;
}

// Hands the picks [i, count) of expert e that are below row `end` to their tokens' rows and returns
// what is left. Not inlined: its few values stay in registers.
template <class Weight>
MOEROUTE_OUT_OF_LINE std::int32_t deal_picks(const std::int32_t* row, const std::int32_t* key,
                                             std::int32_t i, std::int32_t count, index_t end,
                                             index_t first_token, index_t e, std::int32_t* cursor,
                                             const assignment::parts& p, const Weight& weight) {
  expert_id* const ids = p.ids;
  float* const weights = p.weights;
  for (; i < count && row[i] < end; ++i) {
    const index_t token = first_token + row[i];
    const std::int32_t at = cursor[token]++;
    ids[at] = static_cast<expert_id>(e);
    weights[at] = weight(token, e, key[i]);
  }
  return i;
}

// The decision about no tokens.
inline void no_rows(index_t experts, index_t most, assignment& out) {
  out.reset_ragged(0, experts, most);
  out.to_fill().offsets[0] = 0;
  out.close();
}

// Turns columns of picks into token rows, experts in ascending order. weight(token, expert, key) is
// the weight. cursor is [tokens + experts].
template <class Weight>
void rows_from_picks(const column_scopes& s, const simd::column_picks& picks, std::int32_t* cursor,
                     index_t most, assignment& out, const Weight& weight) {
  out.reset_ragged(s.tokens, s.experts, most, s.picks());
  const assignment::parts p = out.to_fill();
  std::fill_n(p.offsets, s.tokens + 1, 0);
  for (index_t column = 0; column < s.columns(); ++column) {
    std::int32_t* const count_of = p.offsets + 1 + column / s.experts * s.length;
    const std::int32_t* const row = picks.row + column * s.capacity;
    for (index_t i = 0; i < picks.count[column]; ++i) ++count_of[row[i]];
  }
  for (index_t t = 0; t < s.tokens; ++t) {
    p.offsets[t + 1] += p.offsets[t];
    cursor[t] = p.offsets[t];
  }
  // A few tiles of tokens at a time: their rows stay in cache while the experts write to them.
  constexpr index_t cached_picks = 3072;
  const index_t places = round_up(
      std::max<index_t>(1, cached_picks * s.length / (s.capacity * s.experts)), simd::tile_size);
  std::int32_t* const done = cursor + s.tokens;
  for (index_t scope = 0; scope < s.scopes; ++scope) {
    std::fill_n(done, s.experts, 0);
    const index_t first = scope * s.length;
    for (index_t end = places; end < s.tiles() * simd::tile_size + places; end += places)
      for (index_t e = 0; e < s.experts; ++e) {
        const index_t column = scope * s.experts + e;
        const std::int32_t* const row = picks.row + column * s.capacity;
        const std::int32_t* const key = picks.key + column * s.capacity;
        done[e] =
            deal_picks(row, key, done[e], picks.count[column], end, first, e, cursor, p, weight);
      }
  }
  out.close();
}

// Gives back what a token has above its cap: the smallest weights first, the highest expert among
// equals.
template <class A = simd::default_arch>
void release_above_cap(const side_inputs& side, index_t cap, assignment& out) {
  const assignment::parts p = out.to_fill();
  std::int32_t to = 0, from = 0;
  for (index_t t = 0; t < out.tokens(); ++t) {
    const std::int32_t end = p.offsets[t + 1];
    index_t keep = cap;
    if (!side.k_of_token.empty())
      keep = std::min<index_t>(keep, side.k_of_token[static_cast<std::size_t>(t)]);
    const std::int32_t count = end - from;
    const std::int32_t start = to;
    for (std::int32_t i = from; i < end; ++i) {
      // Ranks are counted, not sorted: a token has few experts, and the row stays in expert order.
      index_t before = 0;
      if (count > keep)
        for (std::int32_t j = from; j < end; ++j)
          before += p.weights[j] > p.weights[i] || (p.weights[j] == p.weights[i] && j < i);
      if (before >= keep) p.ids[i] = no_expert;
    }
    for (std::int32_t i = from; i < end; ++i) {
      if (p.ids[i] < 0) continue;
      p.ids[to] = p.ids[i];
      p.weights[to++] = p.weights[i];
    }
    from = end;
    p.offsets[t] = start;
  }
  p.offsets[out.tokens()] = to;
  out.close();
}

}  // namespace detail

}  // namespace moeroute

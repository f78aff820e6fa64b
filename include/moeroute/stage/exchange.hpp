// Exchange: what a rank sends to every other, what it makes of what it received, and what goes
// back. Nothing here sends: between the phases somebody moves buffers.
//
//   home        plan_exchange, gather_rows of x, entries  ->  rows, entries_of_row, local_slot
//   receiver    plan_received, dispatch, experts, gather_rows                ->  a row per entry
//   home        combine with outer(): the sum of one rank, bit for bit
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>

#include <moeroute/base/error.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/data/exchange_plan.hpp>
#include <moeroute/data/placement.hpp>
#include <moeroute/simd/rows/counting_sort.hpp>
#include <moeroute/stage/dispatch.hpp>

namespace moeroute {

/// Sorts this rank's choices by the rank of their slot.
///
/// slot is what resolve() found. Ensures: entries >= rows; rows to a rank are the tokens with a
/// choice there, in token order; a row's entries are in choice order.
/// Shapes: slot [choices]. Throws: error where a size does not fit or a slot is outside [-1, P).
/// Cost: O(choices + R), no allocation once warm. Determinism: exact, stable.
template <class A = simd::default_arch>
void plan_exchange(const assignment& choices, std::span<const slot_id> slot,
                   const placement& where_experts, exchange_plan& out) {
  constexpr const char* where = "plan_exchange";
  const placement& p = where_experts;
  const index_t n = choices.choices(), ranks = p.ranks(), tokens = choices.tokens();
  check_offsets(where, choices);
  check_size(where, "slot.size()", static_cast<index_t>(slot.size()), n);
  const exchange_plan::parts to = out.writable();
  to.rows = 0;
  to.outer.reset(tokens, ranks, choices.k(), choices.room(), choices.room());
  to.outer.set_choices(n);
  to.key.resize(choices.room());
  to.row_offset.resize(ranks + 1);
  to.row_token.resize(choices.room());
  to.row_entries.resize(choices.room());
  to.local_slot.resize(choices.room());

  const std::int32_t* const rank_of = p.rank_of_slot().data();
  const auto slots = static_cast<std::uint32_t>(p.slots());
  std::int32_t* const key = to.key.data();
  for (index_t c = 0; c < n; ++c) {
    const slot_id s = slot[static_cast<std::size_t>(c)];
    if (static_cast<std::uint32_t>(s) + 1u > slots) [[unlikely]] {
      to.outer.reset(0, 0, 0);
      fail_value(where, "slot", index_t{s}, "-1 to ", p.slots() - 1);
    }
    key[c] = s < 0 ? -1 : rank_of[s];
  }
  simd::groups token{nullptr, choices.k()};
  if (choices.ragged()) {
    std::int32_t* const list = to.outer.token_of_choice();
    std::copy_n(choices.offsets().data(), tokens + 1, to.outer.first_to_fill());
    for (index_t t = 0; t < tokens; ++t)
      std::fill(list + choices.first(t), list + choices.first(t + 1), static_cast<slot_id>(t));
    token.list = list;
  }
  const dispatch_plan::parts outer = to.outer.writable();
  simd::rank_keys<A>(key, n, ranks, outer.offsets, outer.slot_of_choice);
  simd::exclusive_scan<A>(outer.offsets, ranks, outer.offsets);
  simd::place_keys<A>(key, n, token, outer.offsets, outer.slot_of_choice, outer.token_of_slot);

  // Stable and token-major: an entry begins a row where the token changes.
  const std::int32_t* const first_slot = p.slot_offset().data();
  const slot_id* const entry = outer.slot_of_choice;
  std::int32_t* const local = to.local_slot.data();
  for (index_t c = 0; c < n; ++c)
    if (key[c] >= 0) local[entry[c]] = slot[static_cast<std::size_t>(c)] - first_slot[key[c]];
  // Written for every entry, the last stays: nobody can guess where a row ends.
  const slot_id* const token_of_entry = outer.token_of_slot;
  slot_id* const row_token = to.row_token.data();
  std::int32_t* const row_end = to.row_entries.data();
  index_t row = -1;
  for (index_t r = 0; r < ranks; ++r) {
    to.row_offset[r] = static_cast<std::int32_t>(row + 1);
    slot_id last = no_token;
    for (index_t i = outer.offsets[r], end = outer.offsets[r + 1]; i < end; ++i) {
      const slot_id t = token_of_entry[i];
      row += t != last ? 1 : 0;
      row_token[row] = last = t;
      row_end[row] = static_cast<std::int32_t>(i + 1);
    }
  }
  for (index_t i = row; i > 0; --i) row_end[i] -= row_end[i - 1];
  to.rows = row + 1;
  to.row_offset[ranks] = static_cast<std::int32_t>(to.rows);
}

/// rows_to_node[n] = tokens with a choice on node n, each once however many of its ranks it needs.
///
/// Shapes: rows_to_node [N]. Cost: O(entries + T).
inline void count_node_rows(const exchange_plan& plan, const placement& p, workspace& memory,
                            std::span<std::int32_t> rows_to_node) {
  check_size("count_node_rows", "rows_to_node.size()", static_cast<index_t>(rows_to_node.size()),
             p.nodes());
  check_size("count_node_rows", "plan.ranks()", plan.ranks(), p.ranks());
  std::fill(rows_to_node.begin(), rows_to_node.end(), 0);
  std::uint8_t* const there = memory.carve(
      [&](scratch& s) { return s.take<std::uint8_t>(size_product(plan.tokens(), p.nodes())); });
  std::fill_n(there, plan.tokens() * p.nodes(), std::uint8_t{0});
  for (index_t r = 0; r < plan.ranks(); ++r) {
    const index_t node = p.node_of_rank()[static_cast<std::size_t>(r)];
    for (index_t i = plan.row_offset()[static_cast<std::size_t>(r)];
         i < plan.row_offset()[static_cast<std::size_t>(r) + 1]; ++i) {
      std::uint8_t& seen = there[plan.row_token()[static_cast<std::size_t>(i)] * p.nodes() + node];
      rows_to_node[static_cast<std::size_t>(node)] += seen == 0 ? 1 : 0;
      seen = 1;
    }
  }
}

/// to[i] = from[index[i]], widened or narrowed where the types differ.
///
/// Shapes: index [n], to [n, d], from [*, d], apart. Requires: index within the rows of from (as in
/// a plan). Throws: error where the shapes do not fit. Cost: one read and one write of n rows, no
/// allocation. Determinism: exact.
template <readable_rows X, writable_rows Y, executor Exec = serial, class A = simd::default_arch>
void gather_rows(const X& from_rows, std::span<const slot_id> index, Y&& to_rows,
                 const Exec& exec = {}) {
  using From = element_of<const X>;
  using To = element_of<Y>;
  const matrix_view<const From> from = const_view(from_rows);
  const matrix_view<To> to = view(to_rows);
  constexpr const char* where = "gather_rows";
  check_size(where, "to.rows()", to.rows, static_cast<index_t>(index.size()));
  check_size(where, "to.cols()", to.cols, from.cols);
  check_stride(where, "from", from);
  check_stride(where, "to", to);
  check_apart(where, "from", from, "to", to);
  exec.parallel_for(to.rows, detail::row_grain(to.cols), [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) {
      const slot_id row = index[static_cast<std::size_t>(i)];
      MOEROUTE_EXPECTS(row >= 0 && row < from.rows);
      if constexpr (std::is_same_v<From, To>) {
        std::memcpy(to.data + i * to.stride, from.data + row * from.stride,
                    static_cast<std::size_t>(to.cols) * sizeof(To));
      } else {
        simd::convert_row<A>(from.data + row * from.stride, to.cols, to.data + i * to.stride);
      }
    }
  });
}

/// out = the choices of the tokens [first, first + count) of `all`, as an assignment of its own.
///
/// Throws: error where the range does not fit. Cost: a copy; no allocation once warm.
inline void copy_tokens(const assignment& all, index_t first, index_t count, assignment& out) {
  if (&out == &all) fail("copy_tokens", "out is all, expected an assignment of its own");
  check_offsets("copy_tokens", all);
  check_range("copy_tokens", "first", first, 0, all.tokens());
  check_range("copy_tokens", "count", count, 0, all.tokens() - first);
  const index_t begin = all.first(first), end = all.first(first + count);
  if (all.ragged()) {
    out.reset_ragged(count, all.experts(), all.k(), end - begin);
    const assignment::parts to = out.to_fill();
    for (index_t t = 0; t <= count; ++t)
      to.offsets[t] = static_cast<std::int32_t>(all.first(first + t) - begin);
    out.close();
  } else {
    out.reset(count, all.experts(), all.k());
  }
  std::copy_n(all.ids().data() + begin, end - begin, out.ids().data());
  std::copy_n(all.weights().data() + begin, end - begin, out.weights().data());
  if (all.drops()) {
    const std::span<std::uint8_t> kept = out.kept_to_fill();
    std::copy_n(all.kept().data() + begin, end - begin, kept.data());
  }
}

/// entry_weight[i] = the weight of the choice of entry i.
///
/// Shapes: weights [choices], entry_weight [entries]. Throws: error where a size does not fit.
inline void gather_entry_weights(const exchange_plan& plan, std::span<const float> weights,
                                 std::span<float> entry_weight) {
  const dispatch_plan& outer = plan.outer();
  check_size("gather_entry_weights", "weights.size()", static_cast<index_t>(weights.size()),
             outer.choices());
  check_size("gather_entry_weights", "entry_weight.size()",
             static_cast<index_t>(entry_weight.size()), plan.entries());
  const slot_id* const entry = outer.slot_of_choice().data();
  for (index_t c = 0; c < outer.choices(); ++c)
    if (entry[c] != no_slot)
      entry_weight[static_cast<std::size_t>(entry[c])] = weights[static_cast<std::size_t>(c)];
}

/// What a rank received, source after source: rank order, never the order of arrival.
struct received_entries {
  std::span<const std::int32_t> rows_from{};       ///< [R]
  std::span<const std::int32_t> entries_from{};    ///< [R]
  std::span<const std::int32_t> entries_of_row{};  ///< [rows of all sources]
  std::span<const std::int32_t> local_slot{};      ///< [entries of all sources]
  /// [rows], where each received row lies in the order (source, token), if buffers are in another
  /// order: order[i] is the row that comes i-th. Empty: as received.
  std::span<const std::int32_t> order{};
};

/// The plan of a receiver: tokens are the received rows, experts its S local slots, choices the
/// entries. Slots are in (local slot, source, token, choice) order, which is that of one rank with
/// all tokens.
///
/// Throws: error where counts do not fit one another, a row has no entry or a slot is outside
/// [0, S). Cost: O(entries + rows + S + R), no allocation once warm. Determinism: exact.
inline void plan_received(const received_entries& got, index_t slots, dispatch_plan& out) {
  constexpr const char* where = "plan_received";
  const auto sources = static_cast<index_t>(got.rows_from.size());
  const auto rows = static_cast<index_t>(got.entries_of_row.size());
  const auto entries = static_cast<index_t>(got.local_slot.size());
  check_size(where, "entries_from.size()", static_cast<index_t>(got.entries_from.size()), sources);
  check_range(where, "rows", rows, 0, std::int32_t{0x7fffffff});
  check_range(where, "entries", entries, 0, std::int32_t{0x7fffffff});
  out.reset(0, 0, 0);  // what is refused is no plan
  index_t row = 0, entry = 0, most = 0;
  for (index_t s = 0; s < sources; ++s) {
    const index_t n = got.rows_from[static_cast<std::size_t>(s)];
    check_range(where, "rows_from", n, 0, rows - row);
    index_t sum = 0;
    for (const index_t end = row + n; row < end; ++row) {
      const index_t m = got.entries_of_row[static_cast<std::size_t>(row)];
      check_range(where, "entries_of_row", m, 1, entries - entry - sum);
      sum += m;
      most = std::max(most, m);
    }
    check_size(where, "entries_from", got.entries_from[static_cast<std::size_t>(s)], sum);
    entry += sum;
  }
  check_size(where, "entries_of_row.size()", rows, row);
  check_size(where, "local_slot.size()", entries, entry);
  if (!got.order.empty())
    check_size(where, "order.size()", static_cast<index_t>(got.order.size()), rows);
  const auto bound = static_cast<std::uint32_t>(slots);
  for (const std::int32_t s : got.local_slot)
    if (static_cast<std::uint32_t>(s) >= bound) [[unlikely]]
      fail_value(where, "local_slot", index_t{s}, "0 to ", slots - 1);

  out.reset(rows, slots, most, entries, entries);
  std::int32_t* const first = out.first_to_fill();
  const dispatch_plan::parts p = out.writable();
  first[0] = 0;
  for (index_t r = 0; r < rows; ++r)
    first[r + 1] = first[r] + got.entries_of_row[static_cast<std::size_t>(r)];
  std::fill_n(p.offsets, slots + 1, 0);
  for (const std::int32_t s : got.local_slot) ++p.offsets[s + 1];
  for (index_t s = 0; s < slots; ++s) p.offsets[s + 1] += p.offsets[s];
  // Offsets are cursors for a while: each ends where the next begins.
  const auto place = [&](index_t r) {
    for (index_t i = first[r]; i < first[r + 1]; ++i) {
      const slot_id at = p.offsets[got.local_slot[static_cast<std::size_t>(i)]]++;
      p.slot_of_choice[i] = at;
      p.token_of_slot[at] = static_cast<slot_id>(r);
    }
  };
  if (got.order.empty()) {
    for (index_t r = 0; r < rows; ++r) place(r);
  } else {
    std::fill_n(p.slot_of_choice, entries, no_slot);
    for (const std::int32_t r : got.order) {
      const bool there = r >= 0 && r < rows;
      if (!there || p.slot_of_choice[first[r]] != no_slot) {
        out.reset(0, 0, 0);  // what is refused is no plan
        check_range(where, "order", r, 0, rows - 1);
        fail(where, "order names row " + std::to_string(r) + " twice");
      }
      place(r);
    }
  }
  for (index_t s = slots; s > 0; --s) p.offsets[s] = p.offsets[s - 1];
  if (slots > 0) p.offsets[0] = 0;
}

/// The plan by which reduced rows are added up at home: every token's rows, one per destination,
/// in rank order.
///
/// Cost: O(rows + T), no allocation once warm.
inline void plan_reduced(const exchange_plan& plan, dispatch_plan& out) {
  const index_t tokens = plan.tokens(), rows = plan.rows(), ranks = plan.ranks();
  out.reset(tokens, ranks, std::min(ranks, std::max<index_t>(rows, 1)), rows, rows);
  std::int32_t* const first = out.first_to_fill();
  const dispatch_plan::parts p = out.writable();
  std::fill_n(first, tokens + 1, 0);
  const std::span<const slot_id> token = plan.row_token();
  for (const slot_id t : token) ++first[t + 1];
  for (index_t t = 0; t < tokens; ++t) first[t + 1] += first[t];
  // Rows lie by rank: each token meets its own in rank order.
  for (index_t i = 0; i < rows; ++i) {
    const slot_id t = token[static_cast<std::size_t>(i)];
    p.slot_of_choice[first[t]++] = static_cast<slot_id>(i);
    p.token_of_slot[i] = t;
  }
  for (index_t t = tokens; t > 0; --t) first[t] = first[t - 1];
  if (tokens > 0) first[0] = 0;
  std::copy_n(plan.row_offset().data(), ranks + 1, p.offsets);
}

}  // namespace moeroute

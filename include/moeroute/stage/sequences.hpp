// Decisions for whole sequences: rows pooled, decisions spread to tokens, blocks run as often as
// decided.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>

#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/rows/rows.hpp>

namespace moeroute {

namespace detail {

[[noreturn]] MOEROUTE_COLD inline void fail_sequence(const char* where, index_t s, index_t first,
                                                     index_t end) {
  fail(where, "sequence " + std::to_string(s) + " is [" + std::to_string(first) + ", " +
                  std::to_string(end) + "), expected offsets that ascend from 0 to T");
}

}  // namespace detail

/// Throws error where offsets [S + 1] do not cut T tokens into sequences. Cost: O(S).
inline void check_sequences(const char* where, std::span<const std::int32_t> offsets,
                            index_t tokens) {
  if (offsets.empty()) fail(where, "offsets are empty, expected one more than sequences");
  if (offsets.front() != 0 || offsets.back() != tokens) [[unlikely]]
    detail::fail_sequence(where, 0, offsets.front(), offsets.back());
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
    if (offsets[s + 1] < offsets[s]) [[unlikely]]
      detail::fail_sequence(where, static_cast<index_t>(s), offsets[s], offsets[s + 1]);
}

/// Which rows of a sequence pool_rows() takes the mean of.
struct pooling {
  index_t last = 0;  ///< so many of its last; 0: all
};

/// pooled[s] = the mean of the rows of sequence s, zeros where it has none.
///
/// Means of windows instead of whole sequences: offsets of the windows (window_offsets()).
/// Shapes: x [T, d] in float, bfloat16 or float16, offsets [S + 1], pooled [S, d] in float. Throws:
/// error where they do not fit. Cost: reads the rows once, no allocation. Determinism: the same
/// bits for every executor and ISA: a sum in the order of rows, times the rounded reciprocal of
/// their number.
template <readable_rows X, writable_rows Y, executor Exec = serial, class A = simd::default_arch>
void pool_rows(const X& x_rows, std::span<const std::int32_t> offsets, Y&& pooled_rows,
               const pooling& rule = {}, const Exec& exec = {}) {
  const auto x = const_view(x_rows);
  const matrix_view<float> pooled = view(pooled_rows);
  check_sequences("pool_rows", offsets, x.rows);
  check_range("pool_rows", "last", rule.last, 0, index_t{1} << 40);
  check_size("pool_rows", "pooled.rows()", pooled.rows, static_cast<index_t>(offsets.size()) - 1);
  check_size("pool_rows", "pooled.cols()", pooled.cols, x.cols);
  check_stride("pool_rows", "x", x);
  check_stride("pool_rows", "pooled", pooled);
  check_apart("pool_rows", "x", x, "pooled", pooled);
  exec.parallel_for(pooled.rows, 1, [&](index_t begin, index_t end) {
    for (index_t s = begin; s < end; ++s) {
      const index_t until = offsets[static_cast<std::size_t>(s) + 1];
      index_t from = offsets[static_cast<std::size_t>(s)];
      if (rule.last > 0) from = std::max(from, until - rule.last);
      const float share = until > from ? 1.0f / static_cast<float>(until - from) : 0.0f;
      simd::sum_of_rows<A>(pooled.cols, pooled.row(s), simd::sum_start::zero, [&](auto& sum) {
        for (index_t t = from; t < until; ++t) sum(x.row(t), share);
      });
    }
  });
}

/// Cuts every sequence into windows of `window` rows, the last of a sequence the shorter: writes
/// the windows' offsets and returns how many windows there are. A sequence without rows has none.
///
/// Shapes: windows has room for 1 + the number of windows, at most 1 + S + T / window. Throws:
/// error where it has not.
inline index_t window_offsets(std::span<const std::int32_t> offsets, index_t window,
                              std::span<std::int32_t> windows) {
  check_sequences("window_offsets", offsets, offsets.empty() ? 0 : offsets.back());
  check_range("window_offsets", "window", window, 1, index_t{1} << 30);
  index_t count = 0, needed = 0;
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
    needed += ceil_div(index_t{offsets[s + 1]} - offsets[s], window);
  check_range("window_offsets", "windows.size()", static_cast<index_t>(windows.size()), needed + 1,
              index_t{1} << 40);
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
    for (index_t t = offsets[s]; t < offsets[s + 1]; t += window)
      windows[static_cast<std::size_t>(count++)] = static_cast<std::int32_t>(t);
  windows[static_cast<std::size_t>(count)] = offsets.back();
  return count;
}

/// Tokens get the choices of their sequences: token t those of sequence sequence_of_token[t].
///
/// For a prompt and, with the same decisions, for every token decoded after it: what was decided
/// for a sequence once holds until somebody decides again. Drops are taken over. Shapes: decisions
/// of S sequences, sequence_of_token [T]; out becomes [T, k], or ragged where the decisions are.
/// Throws: error where a sequence is none or out is the decisions themselves. Cost: O(choices), no
/// allocation once out is warm. Example:
///
///     assignment decisions;
///     route(r, logits, ws, decisions);                            // one row per sequence
///     spread_to_tokens(decisions, sequence_of_token, choices);    // plan(choices, slots), as ever
inline void spread_to_tokens(const assignment& decisions,
                             std::span<const std::int32_t> sequence_of_token, assignment& out) {
  const auto tokens = static_cast<index_t>(sequence_of_token.size());
  if (&out == &decisions)
    fail("spread_to_tokens", "out is decisions, expected an assignment of its own");
  check_offsets("spread_to_tokens", decisions);
  index_t choices = 0;
  for (const std::int32_t s : sequence_of_token) {
    check_range("spread_to_tokens", "sequence_of_token", s, 0, decisions.tokens() - 1);
    choices += decisions.count(s);
  }
  if (decisions.ragged())
    out.reset_ragged(tokens, decisions.experts(), decisions.k(), choices);
  else
    out.reset(tokens, decisions.experts(), decisions.k());
  const assignment::parts p = out.to_fill();
  index_t at = 0;
  if (decisions.ragged()) p.offsets[0] = 0;
  for (index_t t = 0; t < tokens; ++t) {
    const index_t s = sequence_of_token[static_cast<std::size_t>(t)];
    const index_t first = decisions.first(s), n = decisions.count(s);
    std::copy_n(decisions.ids().data() + first, n, p.ids + at);
    std::copy_n(decisions.weights().data() + first, n, p.weights + at);
    at += n;
    if (decisions.ragged()) p.offsets[t + 1] = static_cast<std::int32_t>(at);
  }
  if (decisions.ragged()) out.close();
  if (!decisions.drops()) return;
  const std::span<std::uint8_t> kept = out.kept_to_fill();
  at = 0;
  for (index_t t = 0; t < tokens; ++t) {
    const index_t s = sequence_of_token[static_cast<std::size_t>(t)];
    for (index_t c = decisions.first(s); c < decisions.first(s + 1); ++c, ++at)
      kept[static_cast<std::size_t>(at)] = decisions.kept(c) ? 1 : 0;
  }
}

/// The sequence of every token: what spread_to_tokens() takes for a prompt. Shapes: offsets [S +
/// 1], sequence_of_token [T]. Throws: error where they do not fit.
inline void sequences_of_tokens(std::span<const std::int32_t> offsets,
                                std::span<std::int32_t> sequence_of_token) {
  check_sequences("sequences_of_tokens", offsets, static_cast<index_t>(sequence_of_token.size()));
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
    std::fill(sequence_of_token.begin() + offsets[s], sequence_of_token.begin() + offsets[s + 1],
              static_cast<std::int32_t>(s));
}

/// Skip, execute, repeat: runs a block on the rows of every sequence as often as its decision says.
///
/// Expert e of the decisions' first choice means times[e] runs, one after the other, of
/// block(sequence, rows) on the sequence's rows of y in place; a sequence without a choice is left
/// as it is, and so are the bits of those that are skipped.
/// Shapes: decisions of S sequences in either form, offsets [S + 1], times [E], y [T, d].
/// Throws: error where they do not fit or a time is negative; what the block throws. Cost: the
/// blocks'. Source: Dr.LLM (2025).
template <writable_rows Y, class Block, executor Exec = serial>
void repeat_block(const assignment& decisions, std::span<const std::int32_t> offsets,
                  std::span<const std::int32_t> times, Y&& y_rows, Block&& block,
                  const Exec& exec = {}) {
  const auto y = view(y_rows);
  check_sequences("repeat_block", offsets, y.rows);
  check_offsets("repeat_block", decisions);
  check_size("repeat_block", "decisions.tokens()", decisions.tokens(),
             static_cast<index_t>(offsets.size()) - 1);
  check_size("repeat_block", "times.size()", static_cast<index_t>(times.size()),
             decisions.experts());
  check_stride("repeat_block", "y", y);
  for (const std::int32_t n : times) check_range("repeat_block", "times", n, 0, 1 << 20);
  for (index_t s = 0; s < decisions.tokens(); ++s)
    if (decisions.count(s) > 0)
      check_range("repeat_block", "an id", decisions.ids(s)[0], no_expert, decisions.experts() - 1);
  exec.parallel_for(decisions.tokens(), 1, [&](index_t begin, index_t end) {
    for (index_t s = begin; s < end; ++s) {
      const index_t first = offsets[static_cast<std::size_t>(s)];
      const index_t n = offsets[static_cast<std::size_t>(s) + 1] - first;
      if (n == 0 || decisions.count(s) == 0 || !decisions.kept(decisions.first(s))) continue;
      const expert_id e = decisions.ids(s)[0];
      for (std::int32_t i = 0; e != no_expert && i < times[static_cast<std::size_t>(e)]; ++i)
        block(s, y.middle_rows(first, n));
    }
  });
}

}  // namespace moeroute

// What a router and its parts must offer. Policies see blocks of up to 16 token rows, or the whole
// batch.
#pragma once

#include <concepts>
#include <cstdint>
#include <span>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/rows/rows.hpp>

namespace moeroute {

/// What routing may need beside the logits. Empty spans are "not given".
struct side_inputs {
  std::span<const std::int32_t> token_ids{};   ///< [T], for tables by token id
  std::span<const std::uint8_t> mask{};        ///< [T], 0: the token takes no part (padding)
  std::span<const std::int32_t> k_of_token{};  ///< [T], at most the router's k: each token's own k
  std::span<const std::uint8_t> modality{};  ///< [T], 0 or 1: which of two routers serves the token
  std::span<const float> shared_weight{};    ///< [T], of shared experts with a gate of their own
  matrix_view<const float> noise_logits{};   ///< [T, E], the noise gate of noisy top-k
  std::uint64_t seed = 0;                    ///< of everything random; the same seed replays
  std::uint64_t step = 0;                    ///< training step or call number, mixed into the seed

  bool masked(index_t token) const {
    return !mask.empty() && mask[static_cast<std::size_t>(token)] == 0;
  }
};

/// Up to 16 rows of logits, one per token.
struct logit_block {
  const float* logits;  ///< row i at logits + i * stride
  index_t stride;
  int rows;             ///< 1 to 16
  index_t experts;      ///< columns
  index_t first_token;  ///< the token of row 0
  const side_inputs* side;

  const float* row(int i) const { return logits + i * stride; }
};

/// Up to 16 rows of logits that are kept in 16 bits, not widened yet.
template <storage T>
struct narrow_block {
  const T* logits;  ///< row i at logits + i * stride
  index_t stride;
  int rows;             ///< 1 to 16
  index_t experts;      ///< columns
  index_t first_token;  ///< the token of row 0
  const side_inputs* side;
  float* wide;  ///< simd::widened_block(experts) floats of scratch

  /// The block as floats, in `wide`.
  template <class A = simd::default_arch>
  logit_block widened() const {
    for (int i = 0; i < rows; ++i)
      simd::convert_row<A>(logits + i * stride, experts, wide + i * experts);
    return {wide, experts, rows, experts, first_token, side};
  }
};

/// The choices of a block, rank-major with one token per lane: rank r of row i is at [r * 16 + i].
struct choice_block {
  int k;
  expert_id* id;             ///< [k][16], no_expert where a row has no rank r
  float* value;              ///< [k][16], what was selected on, then scores, then weights
  bool has_row_max = false;  ///< the values are logits, and each row's largest is among them
};

/// Token choice with a fixed k: the stage hands it one block after the other, possibly from several
/// threads at once, each with scratch of its own.
template <class R>
concept token_router = requires(const R& r, const logit_block& z, choice_block& c, scratch& s) {
  { r.k() } -> std::convertible_to<index_t>;
  { r.experts(index_t{}) } -> std::convertible_to<index_t>;  // E, from the columns of the logits
  { r.check(index_t{}) };     // throws error where the router does not fit that many columns
  { r.carve(s, index_t{}) };  // scratch of one running block
  { r.route_block(z, r.carve(s, index_t{}), c) };
};

/// A token router that takes bfloat16 logits as they are, where it need not widen all of them.
template <class R>
concept bfloat16_router = token_router<R> && requires(const R& r, const narrow_block<bfloat16>& z,
                                                      choice_block& c, scratch& s) {
  { r.route_block(z, r.carve(s, index_t{}), c) };
};

/// Token choice with a varying k: a row's choices are written one after the other.
template <class R>
concept ragged_router = requires(const R& r, const logit_block& z, scratch& s, expert_id* id,
                                 float* weight, std::int32_t* count) {
  { r.max_choices(index_t{}) } -> std::convertible_to<index_t>;
  { r.experts(index_t{}) } -> std::convertible_to<index_t>;
  { r.check(index_t{}) };
  { r.carve(s, index_t{}) };
  // Row i's count[i] choices follow those of row i - 1; returns the sum of the counts.
  { r.route_block(z, r.carve(s, index_t{}), id, weight, count) } -> std::convertible_to<index_t>;
};

/// Rules that see the whole batch: expert choice, optimal transport, auctions.
template <class R>
concept batch_router = requires(const R& r, matrix_view<const float> z, const side_inputs& side,
                                workspace& ws, assignment& out, const serial& exec) {
  { r.check(index_t{}, index_t{}) };  // tokens, experts
  { r.route_batch(z, side, ws, out, exec) };
};

/// Anything that route() takes.
template <class R>
concept any_kind_of_router = token_router<R> || ragged_router<R> || batch_router<R>;

}  // namespace moeroute

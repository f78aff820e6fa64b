// What a router and its parts must offer. Policies see blocks of up to 16 token rows, or the whole
// batch.
#pragma once

#include <algorithm>
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

/// Which side inputs a router reads; what it does not read is refused, never ignored. Everybody
/// honours the mask.
struct side_use {
  bool token_ids = false;
  index_t own_k = 0;  ///< the most that k_of_token may ask for; 0: it is not read
  bool modality = false;
  bool shared_weight = false;
  bool noise_logits = false;
};

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

  /// Without what a router does not read, for callers that hand the same to many kinds of router:
  /// route(router, z, side.only(side_use_of(router, z.cols)), ...).
  side_inputs only(const side_use& use) const {
    side_inputs out = *this;
    if (!use.token_ids) out.token_ids = {};
    if (use.own_k == 0) out.k_of_token = {};
    if (!use.modality) out.modality = {};
    if (!use.shared_weight) out.shared_weight = {};
    if (!use.noise_logits) out.noise_logits = {};
    return out;
  }
};

/// What a router reads of the side inputs, from its columns of logits: what its
/// reads_side(columns) says, nothing where it has none.
template <class R>
side_use side_use_of(const R& router, [[maybe_unused]] index_t columns) {
  if constexpr (requires { router.reads_side(columns); }) {
    return router.reads_side(columns);
  } else {
    return {};
  }
}

/// Whether a router looks at logits, or only at their shape: what its reads_logits() says, true
/// where it has none. Where it looks at none those of a block may be null.
template <class R>
bool reads_logits(const R& router) {
  if constexpr (requires { router.reads_logits(); }) {
    return router.reads_logits();
  } else {
    return true;
  }
}

/// No side input at all: what route() takes where none is given.
inline constexpr side_inputs no_side_inputs{};

/// Up to 16 rows of logits, one per token.
template <storage T>
struct logit_rows {
  const T* logits;  ///< row i at logits + i * stride
  index_t stride;
  int rows;             ///< 1 to 16
  index_t experts;      ///< columns
  index_t first_token;  ///< the token of row 0
  const side_inputs* side;

  const T* row(int i) const { return logits + i * stride; }
};

/// What most routers see.
using logit_block = logit_rows<float>;

/// Rows of logits that are kept in 16 bits, not widened yet.
template <storage T>
struct narrow_block : logit_rows<T> {
  float* wide;  ///< simd::widened_block(experts) floats of scratch

  /// The block as floats, in `wide`.
  template <class A = simd::default_arch>
  logit_block widened() const {
    for (int i = 0; i < this->rows; ++i)
      simd::convert_row<A>(this->row(i), this->experts, wide + i * this->experts);
    return {wide, this->experts, this->rows, this->experts, this->first_token, this->side};
  }
};

/// The choices of a block, rank-major with one token per lane: rank r of row i is at [r * 16 + i].
struct choice_block {
  int k;
  expert_id* id;             ///< [k][16], no_expert where a row has no rank r
  float* value;              ///< [k][16], what was selected on, then scores, then weights
  bool has_row_max = false;  ///< the values are logits, and each row's largest is among them
};

/// Takes away what a block's tokens have chosen beyond their own k, where side_inputs::k_of_token
/// is given.
///
/// A router that reads it calls this between choosing and weighing, so that weights are those of
/// the choices that stay.
template <class Block>
void keep_own_k(const Block& z, choice_block& c) {
  if (z.side->k_of_token.empty()) return;
  for (int i = 0; i < z.rows; ++i) {
    const int own = z.side->k_of_token[static_cast<std::size_t>(z.first_token + i)];
    for (int at = own * block_rows + i; at < c.k * block_rows; at += block_rows) {
      c.id[at] = no_expert;
      c.value[at] = 0.0f;
    }
  }
}

/// Gives the lanes without a row of a short block a value, before a router sees it: registers are
/// read whole, and what nobody wrote has none.
inline void clear_lanes(const choice_block& c, int rows) {
  if (rows == block_rows) return;
  std::fill_n(c.id, c.k * block_rows, no_expert);
  std::fill_n(c.value, c.k * block_rows, 0.0f);
}

/// Token choice with a fixed k: the stage hands it one block after the other, possibly from several
/// threads at once, each with scratch of its own. A router that reads side inputs beside the mask
/// says so in `side_use reads_side(index_t columns) const`.
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

/// A token router with a way for single rows: without scratch and without the layout of a block,
/// with the bits of route_block.
template <class R>
concept row_router =
    token_router<R> && requires(const R& r, const float* row, index_t token,
                                const side_inputs& side, expert_id* id, float* weight) {
      // So many rows at most are routed sooner one by one than as a block; 0 where none may be.
      { r.rows_alone(index_t{}) } -> std::convertible_to<index_t>;
      { r.route_row(row, index_t{}, token, side, id, weight) };  // writes k ids and weights
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

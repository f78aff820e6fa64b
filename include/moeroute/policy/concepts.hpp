// What a router and its parts must offer. Policies see blocks of up to 16 token rows, never a single row.
#pragma once

#include <concepts>
#include <cstdint>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/simd/batch.hpp>

namespace moeroute {

/// Up to 16 rows of logits, one per token.
struct logit_block {
  const float* logits;  ///< row i at logits + i * stride
  index_t stride;
  int rows;             ///< 1 to 16
  index_t experts;
  index_t first_token;  ///< the token of row 0

  const float* row(int i) const { return logits + i * stride; }
};

/// The choices of a block, rank-major with one token per lane: rank r of row i is at [r * 16 + i].
struct choice_block {
  int k;
  expert_id* id;  ///< [k][16], no_expert where a row has no rank r
  float* value;   ///< [k][16], what was selected on, then scores, then weights
};

/// The stage asks a router for its k and its scratch, then hands it one block after the other, possibly from
/// several threads at once (each with its own scratch).
template <class R>
concept token_router = requires(const R& r, const logit_block& z, choice_block& c, scratch& s) {
  { r.k() } -> std::convertible_to<index_t>;
  { r.check(index_t{}) };            // throws error where the router does not fit E experts
  { r.carve(s, index_t{}) };         // scratch of one running block of E experts
  { r.route_block(z, r.carve(s, index_t{}), c) };
};

}  // namespace moeroute

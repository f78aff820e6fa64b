// Runs balancing losses on vectors, and makes batches for them.
#pragma once

#include <moeroute/balance/loss.hpp>
#include <vector>

#include "oracle/losses.hpp"
#include "support/random.hpp"

namespace test {

using moeroute::index_t;

/// Normal logits, every third token masked where asked for; the others have any number but 0.
inline oracle::batch random_batch(std::uint64_t seed, index_t tokens, index_t experts,
                                  bool with_mask = false) {
  random rng(seed);
  oracle::batch b{tokens, experts, {}, {}};
  for (index_t i = 0; i < tokens * experts; ++i)
    b.logits.push_back(1.5 * static_cast<double>(rng.normal()));
  for (index_t t = 0; with_mask && t < tokens; ++t)
    b.mask.push_back(static_cast<std::uint8_t>(t % 3 == 1 ? 0 : 1 + t % 255));
  return b;
}

/// Counts as a router could have made them: unequal, in all k per token.
inline oracle::row random_counts(std::uint64_t seed, index_t tokens, index_t experts, index_t k) {
  random rng(seed);
  oracle::row counts(static_cast<std::size_t>(experts), 0.0);
  for (index_t i = 0; i < tokens * k; ++i) {
    const float u = rng.uniform();
    counts[static_cast<std::size_t>(u * u * static_cast<float>(experts))] += 1.0;
  }
  return counts;
}

template <class F, std::size_t n>
struct loss_run {
  moeroute::loss_values<n> values;
  std::vector<F> gradient;
};

/// The losses of a batch in float or double, the batch's mask in the options.
template <class F, class... L>
loss_run<F, sizeof...(L)> run_losses(const oracle::batch& b, moeroute::loss_options how,
                                     const L&... losses) {
  const std::vector<F> z(b.logits.begin(), b.logits.end());
  loss_run<F, sizeof...(L)> out;
  out.gradient.assign(z.size(), F(7));
  how.mask = b.mask;
  moeroute::workspace ws;
  out.values =
      moeroute::balance_loss(how, moeroute::matrix_view<const F>(z.data(), b.tokens, b.experts),
                             moeroute::matrix_view<F>(out.gradient.data(), b.tokens, b.experts), ws,
                             moeroute::serial{}, losses...);
  return out;
}

}  // namespace test

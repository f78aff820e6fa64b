// Four ways to have adapters as experts, on one page: LoRA-Mixer (adapters that a router chooses),
// MHR and SMEAR (parameters mixed before they are used), FlyLoRA (ranks that a token chooses).
#include <algorithm>
#include <cmath>
#include <iostream>
#include <vector>

#include <moeroute/base/rng.hpp>
#include <moeroute/layer/lora_experts.hpp>
#include <moeroute/layer/moe_layer.hpp>
#include <moeroute/policy/router.hpp>

using namespace moeroute;

namespace {

constexpr index_t tokens = 64, d = 32, experts = 4, rank = 8;

std::vector<float> drawn(index_t n, std::uint64_t seed) {
  std::vector<float> list(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < list.size(); ++i) list[i] = random_u01(seed, 0, i) - 0.5f;
  return list;
}

double length(const std::vector<float>& x) {
  double sum = 0;
  for (const float v : x) sum += static_cast<double>(v) * static_cast<double>(v);
  return std::sqrt(sum);
}

}  // namespace

int main() {
  const std::vector<float> x = drawn(tokens * d, 1);
  const matrix_view<const float> in(x.data(), tokens, d);
  std::vector<float> a(experts * rank * d), b(experts * d * rank);
  lora_experts<> adapters(experts, d, d, rank, 16.0f);
  for (expert_id e = 0; e < experts; ++e) {
    const auto seed = static_cast<std::uint64_t>(e);
    const std::vector<float> ae = drawn(rank * d, 10 + seed), be = drawn(d * rank, 20 + seed);
    std::copy(ae.begin(), ae.end(), a.begin() + e * rank * d);
    std::copy(be.begin(), be.end(), b.begin() + e * d * rank);
    adapters.set_a(e, {ae.data(), rank, d});
    adapters.set_b(e, {be.data(), d, rank});
  }

  // LoRA-Mixer: a gate chooses the best three adapters of each token and weighs what they say.
  const std::vector<float> gate = drawn(experts * d, 3);
  std::vector<float> y(x.size());
  moe_layer mixer(simd::packed_matrix<>(matrix_view<const float>(gate.data(), experts, d)),
                  router<softmax>{.score = {}, .selection = {.k = 3}, .weight = sum_normalized},
                  adapters);
  mixer.forward(in, matrix_view<float>(y.data(), tokens, d));
  std::cout << "LoRA-Mixer, 3 of 4 adapters per token: |y| = " << length(y) << '\n';

  // SMEAR: one mixture of all parameters per sequence; MHR: one for each of four blocks of them.
  std::vector<float> mixed(static_cast<std::size_t>(rank * d));
  const std::vector<float> share = {0.4f, 0.3f, 0.2f, 0.1f};
  mix_parameters({share.data(), 1, experts}, {a.data(), experts, rank * d}, 1,
                 {mixed.data(), 1, rank * d});
  std::cout << "SMEAR, one A for the sequence: |A| = " << length(mixed) << '\n';
  std::vector<float> shares;
  for (int block = 0; block < 4; ++block) {
    shares.insert(shares.end(), share.begin(), share.end());
    std::rotate(shares.end() - experts, shares.end() - experts + block, shares.end());
  }
  mix_parameters({shares.data(), 4, experts}, {a.data(), experts, rank * d}, 4,
                 {mixed.data(), 1, rank * d});
  std::cout << "MHR, four blocks with shares of their own: |A| = " << length(mixed) << '\n';
  // A and B mixed apart are another function than the mixture of what adapters say: the product of
  // two sums has the products of all pairs.

  // FlyLoRA: a frozen sparse A, two of eight ranks per token, and a bias that levels their use.
  const std::vector<float> fly = fly_projection(rank, d, 2, 5);
  std::vector<float> bias(rank);
  lora_experts<> masked(1, d, d, rank, 16.0f, {.keep = 2, .bias = bias});
  masked.set_a(0, {fly.data(), rank, d});
  masked.set_b(0, {b.data(), d, rank});
  std::vector<float> memory(static_cast<std::size_t>(masked.scratch_floats()));
  masked(0, in, {y.data(), tokens, d}, memory.data());
  std::cout << "FlyLoRA, 2 of 8 ranks per token: |y| = " << length(y) << '\n';
  return 0;
}

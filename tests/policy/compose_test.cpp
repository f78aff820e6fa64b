#include <moeroute/policy/row/compose.hpp>

#include <catch2/catch_test_macros.hpp>
#include <moeroute/policy/router.hpp>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"

using namespace moeroute;
using test::routed;

namespace {

// Columns [first, first + n) of rows of `columns`.
std::vector<float> part_of(const std::vector<float>& rows, index_t columns, index_t first,
                           index_t n) {
  std::vector<float> out;
  for (index_t at = first; at < static_cast<index_t>(rows.size()); at += columns)
    out.insert(out.end(), rows.begin() + at, rows.begin() + at + n);
  return out;
}

using plain = router<softmax>;
const plain top_two{.selection = {.k = 2}, .weight = sum_normalized};

}  // namespace

TEST_CASE("each token is routed by its modality's router, with ids of its own range") {
  const index_t tokens = 33;
  const std::vector<float> logits = test::make_logits(test::shape::normal, 5, tokens, 13);
  std::vector<std::uint8_t> modality;
  for (index_t t = 0; t < tokens; ++t) modality.push_back(t % 3 == 0 ? 1 : 0);
  side_inputs side;
  side.modality = modality;
  const by_modality<plain> both{top_two, top_two, 5};
  const assignment a = routed(both, logits, 13, side);
  const assignment text = routed(top_two, part_of(logits, 13, 0, 5), 5);
  const assignment image = routed(top_two, part_of(logits, 13, 5, 8), 8);
  for (index_t t = 0; t < tokens; ++t) {
    const bool second = modality[static_cast<std::size_t>(t)] == 1;
    const assignment& own = second ? image : text;
    for (std::size_t r = 0; r < 2; ++r) {
      CHECK(a.ids(t)[r] == own.ids(t)[r] + (second ? 5 : 0));
      CHECK(a.weights(t)[r] == own.weights(t)[r]);
    }
  }
}

TEST_CASE("a pick that the second modality cannot make stays no_expert") {
  const std::vector<std::uint8_t> modality{1};
  side_inputs side;
  side.modality = modality;
  const assignment a = routed(by_modality<plain>{top_two, top_two, 2},
                              {0.0f, 0.0f, -test::infinity, 1.0f, -test::infinity}, 5, side);
  CHECK(test::listed(a.ids()) == std::vector<expert_id>{3, no_expert});
}

TEST_CASE("two routers need modalities, columns for both and one k") {
  const std::vector<float> row(6, 0.0f);
  CHECK(test::refusal([&] { routed(by_modality<plain>{top_two, top_two, 3}, row, 6); }) ==
        "moeroute::by_modality: side_inputs::modality is missing");
  CHECK(test::refusal([&] { routed(by_modality<plain>{top_two, top_two, 6}, row, 6); }) ==
        "moeroute::by_modality: first_experts is 6, expected 1 to 5");
  const plain three{.selection = {.k = 3}};
  CHECK(test::refusal([&] { routed(by_modality<plain>{top_two, three, 3}, row, 6); }) ==
        "moeroute::by_modality: second.k is 3, expected 2");
}

TEST_CASE("shared experts follow the routed ones with ids from E on and a weight of their own") {
  const std::vector<float> logits = test::make_logits(test::shape::normal, 6, 18, 7);
  const assignment own = routed(top_two, logits, 7);
  const assignment a = routed(with_shared<plain>{top_two, 2, 0.25f}, logits, 7);
  CHECK(a.experts() == 9);
  CHECK(a.k() == 4);
  for (index_t t = 0; t < 18; ++t) {
    for (std::size_t r = 0; r < 2; ++r) {
      CHECK(a.ids(t)[r] == own.ids(t)[r]);
      CHECK(a.weights(t)[r] == own.weights(t)[r]);
    }
    CHECK(a.ids(t)[2] == 7);
    CHECK(a.ids(t)[3] == 8);
    CHECK(a.weights(t)[3] == 0.25f);
  }
}

TEST_CASE("a gated shared expert takes its weight from the token's gate") {
  std::vector<float> gate;
  for (int t = 0; t < 37; ++t) gate.push_back(0.5f + 0.25f * static_cast<float>(t));
  side_inputs side;
  side.shared_weight = gate;
  const assignment a =
      routed(with_shared<plain>{top_two, 1}, std::vector<float>(37 * 3, 1.0f), 3, side);
  for (std::size_t t = 0; t < 37; ++t) CHECK(a.weights(static_cast<index_t>(t))[2] == gate[t]);
}

TEST_CASE("routers made of routers refuse what one of them refuses, and each number has two ends") {
  const auto refused = [](const auto& rule, index_t columns = 6) {
    return test::refusal([&] { rule.check(columns); });
  };
  CHECK(refused(by_modality<plain>{top_two, top_two, 0}) ==
        "moeroute::by_modality: first_experts is 0, expected 1 to 5");
  for (const index_t first : {2, 3, 4})
    CHECK(refused(by_modality<plain>{top_two, top_two, first}) == "accepted");
  CHECK(refused(by_modality<plain>{top_two, top_two, 1}) ==
        "moeroute::top_k: k is 2, expected 1 to 1");
  CHECK(refused(by_modality<plain>{top_two, top_two, 5}) ==
        "moeroute::top_k: k is 2, expected 1 to 1");
  CHECK(by_modality<plain>{}.first_experts == 1);
  CHECK(refused(with_shared<plain>{top_two, 0}) ==
        "moeroute::with_shared: shared is 0, expected 1 to 1048570");
  CHECK(refused(with_shared<plain>{top_two, max_experts - 6}) == "accepted");
  CHECK(refused(with_shared<plain>{top_two, max_experts - 5}) ==
        "moeroute::with_shared: shared is 1048571, expected 1 to 1048570");
  CHECK(refused(with_shared<plain>{top_two, 1}, 1) == "moeroute::top_k: k is 2, expected 1 to 1");
  CHECK((with_shared<plain>{}.shared == 1 && with_shared<plain>{}.weight == 1.0f));
  // What both read is read; no more of an own k than the lesser of both may ask for.
  const plain three{.selection = {.k = 3}};
  const side_use use = by_modality<plain>{top_two, three, 3}.reads_side(6);
  CHECK((use.own_k == 2 && use.modality && !use.token_ids && !use.noise_logits));
  plain noisy = top_two;
  noisy.transform.noise.kind = noise_kind::gumbel;
  CHECK(by_modality<plain>{noisy, top_two, 3}.reads_side(6).noise_logits);
  CHECK(by_modality<plain>{top_two, noisy, 3}.reads_side(6).noise_logits);
  CHECK(with_shared<plain>{noisy}.reads_side(6).noise_logits);
}

TEST_CASE(
    "with every option at once each token is its modality's, and shared experts stand behind") {
  test::random rng(71);
  for (index_t round = 0; round < 120; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t n = 1 + rng.below(20), m = 1 + rng.below(20), columns = n + m;
    const index_t tokens = 1 + rng.below(50), k = 1 + rng.below(std::min(n, m));
    router<softmax> first{.selection = {.k = k}};
    router<sigmoid> second{.selection = {.k = k}};
    const bool both_noisy = coin();
    if (both_noisy || coin()) first.transform.noise.kind = noise_kind::gaussian;
    if (both_noisy || coin()) second.transform.noise.kind = noise_kind::gumbel;
    const std::uint64_t seed = rng.bits() % 1000;
    const auto z = test::make_logits(coin() ? test::shape::normal : test::shape::half_nan, seed,
                                     tokens, columns);
    const auto widths = test::make_logits(test::shape::normal, seed + 1, tokens, columns + 3);
    std::vector<std::uint8_t> modality;
    std::vector<std::int32_t> own_k;
    std::vector<float> gate;
    const index_t run = 1 + rng.below(40);  // blocks of one modality, and of both
    for (index_t t = 0; t < tokens; ++t) {
      const bool turn = t == 0 || rng.below(run) == 0;
      modality.push_back(turn ? static_cast<std::uint8_t>(rng.below(2)) : modality.back());
      own_k.push_back(static_cast<std::int32_t>(rng.below(k + 1)));
      gate.push_back(rng.uniform());
    }
    side_inputs side{.seed = seed, .step = 3};
    if (coin()) side.k_of_token = own_k;
    side_inputs of_first = side, of_second = side;
    const auto width_of = [&](index_t at, index_t count) {
      return matrix_view<const float>(widths.data() + at, tokens, count, columns + 3);
    };
    const bool learned = coin(), gated = coin();
    const auto active = [](const auto& part) { return part.transform.noise.active(); };
    if (learned && active(first)) of_first.noise_logits = width_of(0, n);
    if (learned && active(second)) of_second.noise_logits = width_of(n, m);
    if (learned && (active(first) || active(second))) side.noise_logits = width_of(0, columns);
    side.modality = modality;
    if (gated) side.shared_weight = gate;
    using both = by_modality<router<softmax>, router<sigmoid>>;
    const with_shared<both> all{{first, second, n}, 1 + rng.below(3), 0.75f};
    const assignment a = routed(all, z, columns, side);
    const assignment one = routed(first, part_of(z, columns, 0, n), n, of_first);
    const assignment two = routed(second, part_of(z, columns, n, m), m, of_second);
    std::vector<expert_id> ids;
    std::vector<float> weights;
    for (index_t t = 0; t < tokens; ++t) {
      const auto at = static_cast<std::size_t>(t);
      const assignment& own = modality[at] == 0 ? one : two;
      for (std::size_t r = 0; r < static_cast<std::size_t>(k); ++r) {
        const expert_id e = own.ids(t)[r];
        ids.push_back(e == no_expert || modality[at] == 0 ? e : e + static_cast<expert_id>(n));
        weights.push_back(own.weights(t)[r]);
      }
      for (index_t i = 0; i < all.shared; ++i) {
        ids.push_back(static_cast<expert_id>(columns + i));
        weights.push_back(gated ? gate[at] : 0.75f);
      }
    }
    INFO("round " << round << " columns " << n << " + " << m << " T=" << tokens << " k=" << k);
    CHECK(test::listed(a.ids()) == ids);
    CHECK(test::bit_difference(a.weights(), weights) == "");
    CHECK(a.experts() == columns + all.shared);
  }
}

// What comes from outside is checked by whoever reads it first, in every build: ids and offsets of
// assignments, shapes, strides and overlaps of views.
#include <moeroute/data/check_choices.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <functional>
#include <moeroute/balance/loss_load.hpp>
#include <moeroute/balance/loss_router.hpp>
#include <moeroute/balance/loss_selected.hpp>
#include <moeroute/balance/quantile.hpp>
#include <moeroute/data/expert_load.hpp>
#include <moeroute/data/routing_record.hpp>
#include <moeroute/metrics/agreement.hpp>
#include <moeroute/metrics/cache.hpp>
#include <moeroute/metrics/co_activation.hpp>
#include <moeroute/metrics/committee.hpp>
#include <moeroute/metrics/drops.hpp>
#include <moeroute/metrics/entropy.hpp>
#include <moeroute/metrics/load.hpp>
#include <moeroute/metrics/saturation.hpp>
#include <moeroute/metrics/segment.hpp>
#include <moeroute/metrics/sparsity.hpp>
#include <moeroute/metrics/specialisation.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/capacity.hpp>
#include <moeroute/stage/expert.hpp>
#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/plan_layouts.hpp>
#include <moeroute/stage/rectify.hpp>
#include <moeroute/stage/route.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "support/refusal.hpp"

using namespace moeroute;

namespace from_outside {

namespace {

constexpr index_t tokens = 5, experts = 8;

assignment fixed_form(expert_id bad) {
  assignment a;
  a.reset(tokens, experts, 2);
  for (std::size_t c = 0; c < 10; ++c) {
    a.ids()[c] = static_cast<expert_id>(c % 7);
    a.weights()[c] = 0.5f;
  }
  a.ids()[9] = bad;
  return a;
}

assignment ragged_form(std::vector<std::int32_t> offsets, std::vector<expert_id> ids, index_t most,
                       index_t room) {
  assignment a;
  a.reset_ragged(static_cast<index_t>(offsets.size()) - 1, experts, most, room);
  const auto fill = a.to_fill();
  std::fill_n(fill.ids, room, 0);
  std::fill_n(fill.weights, room, 0.5f);
  std::copy(ids.begin(), ids.end(), fill.ids);
  std::copy(offsets.begin(), offsets.end(), fill.offsets);
  a.close();
  return a;
}

using reader = std::pair<std::string, std::function<void(const assignment&)>>;

// Whoever reads offsets, by the name that it refuses with; those that index by ids are in front.
std::vector<reader> readers(std::size_t& of_ids) {
  std::vector<reader> list;
  list.emplace_back("count_choices", [](const assignment& a) {
    std::vector<int> counts(experts);
    count_choices(a, {}, std::span(counts));
  });
  list.emplace_back("count_choices_by_sequence", [](const assignment& a) {
    std::vector<int> counts(5 * experts);
    count_choices_by_sequence(a, {}, 1, matrix_view<int>(counts.data(), a.tokens(), experts));
  });
  list.emplace_back("count_device_tokens", [](const assignment& a) {
    std::vector<int> counts(2);
    count_device_tokens(a, {}, std::span(counts));
  });
  list.emplace_back("apply_capacity", [](const assignment& a) {
    workspace ws;
    assignment copy = a;
    apply_capacity(copy, {}, ws);
  });
  list.emplace_back("plan", [](const assignment& a) {
    dispatch_plan p;
    plan(a, p);
  });
  list.emplace_back("export_once_counts", [](const assignment& a) {
    std::vector<std::int32_t> each(experts), ranks(2);
    std::vector<std::uint8_t> in_rank(static_cast<std::size_t>(a.tokens() * 2));
    export_once_counts(a, {each, ranks, in_rank});
  });
  list.emplace_back("rectify_within_rank", [](const assignment& a) {
    assignment copy = a;
    const std::vector<float> scores(40, 0.5f);
    const std::vector<std::int32_t> rank(static_cast<std::size_t>(a.tokens()), 0);
    rectify_within_rank(copy, matrix_view<const float>(scores.data(), a.tokens(), experts), rank,
                        4);
  });
  list.emplace_back("rectify_by_filling", [](const assignment& a) {
    workspace ws;
    assignment filled;
    const std::vector<float> scores(40, 0.5f);
    rectify_by_filling(a, matrix_view<const float>(scores.data(), a.tokens(), experts), 2, 1, ws,
                       filled);
  });
  list.emplace_back("selected_importance_loss", [](const assignment& a) {
    workspace ws;
    const std::vector<float> z(40, 0.5f);
    selected_importance_loss<float>({}, drop_stage::before_drop, {.gradient = gradient_to::nowhere},
                                    a, {z.data(), a.tokens(), experts}, {}, ws, serial{});
  });
  list.emplace_back("stable_moe_loss", [](const assignment& a) {
    const std::vector<float> z(40, 0.5f);
    const std::vector<double> counts(experts, 1.0);
    stable_moe_loss<float>(0.3, counts, drop_stage::before_drop, {.gradient = gradient_to::nowhere},
                           a, {z.data(), a.tokens(), experts}, {});
  });
  list.emplace_back("expert_trace", [](const assignment& a) { expert_trace(experts).add(a); });
  list.emplace_back("co_activation", [](const assignment& a) { co_activation(experts).add(a); });
  list.emplace_back("segment_meter", [](const assignment& a) { segment_meter(experts, 2).add(a); });
  list.emplace_back("sparsity_meter",
                    [](const assignment& a) { sparsity_meter(experts, 2).add(a); });
  list.emplace_back("count_choices",
                    [](const assignment& a) { specialisation_meter(2, experts).add(0, a); });
  list.emplace_back("count_choices", [](const assignment& a) { load_meter(experts).add(a); });
  of_ids = list.size();
  list.emplace_back("drops_by_position", [](const assignment& a) {
    std::vector<std::int64_t> chosen(2), dropped(2);
    drops_by_position(a, chosen, dropped);
  });
  list.emplace_back("drop_meter", [](const assignment& a) { drop_meter().add(a); });
  list.emplace_back("selection_disagreement",
                    [](const assignment& a) { selection_disagreement(a, a); });
  list.emplace_back("saturation_meter", [](const assignment& a) { saturation_meter().add(a, a); });
  list.emplace_back("fluctuation_meter", [](const assignment& a) { fluctuation_meter().add(a); });
  return list;
}

// A view with another stride, which its constructor would refuse in debug builds.
template <class T>
matrix_view<T> strided(T* data, index_t rows, index_t cols, index_t stride) {
  matrix_view<T> v(data, rows, cols);
  v.stride = stride;
  return v;
}

// What stands between what a refusal begins and ends with; all of it where it is another one.
std::string between(std::string_view front, const std::string& said, std::string_view back) {
  return said.starts_with(front) && said.ends_with(back)
             ? said.substr(front.size(), said.size() - front.size() - back.size())
             : said;
}

}  // namespace

TEST_CASE("ids outside [-1, E) are refused by whoever reads an assignment, wherever they stand") {
  std::size_t of_ids = 0;
  const auto list = readers(of_ids);
  for (std::size_t i = 0; i < of_ids; ++i) {
    INFO(list[i].first);
    for (const expert_id bad : {8, -2, 1 << 30})
      CHECK(test::refusal([&] { list[i].second(fixed_form(bad)); }) ==
            "moeroute::" + list[i].first + ": the id of choice 9 is " + std::to_string(bad) +
                ", expected -1 to 7");
    CHECK(test::refusal([&] { list[i].second(fixed_form(7)); }) == "accepted");
    CHECK(test::refusal([&] { list[i].second(fixed_form(no_expert)); }) == "accepted");
  }
  routing_record<std::int32_t> record;
  routing_record<std::uint8_t> bytes;
  CHECK(test::refusal([&] { record.record(fixed_form(8)); }) ==
        "moeroute::routing_record: the id of choice 9 is 8, expected -1 to 7");
  CHECK(test::refusal([&] { bytes.record(fixed_form(-3)); }) ==
        "moeroute::routing_record: the id of choice 9 is -3, expected -1 to 7");
}

TEST_CASE("ragged offsets that do not ascend from 0, or exceed k or the room, are refused") {
  std::size_t of_ids = 0;
  for (const auto& [name, read] : readers(of_ids)) {
    INFO(name);
    const auto refused = [&](std::vector<std::int32_t> offsets, index_t room) {
      return test::refusal([&] { read(ragged_form(offsets, {0, 1, 2, 3}, 3, room)); });
    };
    CHECK(refused({0, 2, 4}, 4) == "accepted");
    CHECK(refused({0, 0, 0}, 4) == "accepted");
    const std::string of = "moeroute::" + name + ": token ",
                      all = "moeroute::" + name + ": the choices of a ragged assignment are ",
                      most = ", expected 0 to k = 3 of them, from 0 on",
                      room = " on, expected at most 4 from 0 on";
    CHECK(refused({0, 3, 2}, 4) == of + "1 has the choices from 3 to 2" + most);
    CHECK(refused({0, -1, 2}, 4) == of + "0 has the choices from 0 to -1" + most);
    CHECK(refused({0, 0, 4}, 4) == of + "1 has the choices from 0 to 4" + most);
    CHECK(refused({1, 2, 4}, 4) == all + "4 from 1" + room);
    CHECK(refused({0, 3, 6}, 4) == all + "6 from 0" + room);
  }
}

TEST_CASE("a token of a ragged assignment, or a list, that names an expert twice is no plan") {
  dispatch_plan p;
  for (const plan_options& how : {plan_options{}, plan_options{.block = 4}}) {
    CHECK(test::refusal([&] { plan(ragged_form({0, 1, 4}, {3, 5, 0, 5}, 3, 8), p, how); }) ==
          "moeroute::plan: token 1 has expert 5 twice, expected distinct experts");
    // The last token of one expert may be the first of the next.
    CHECK(test::refusal([&] { plan(ragged_form({0, 2, 4}, {3, 4, 4, 3}, 2, 4), p, how); }) ==
          "accepted");
    const std::vector<std::int32_t> twice{2, 0, 1, 1}, once{2, 0, 0, 2};
    CHECK(test::refusal([&] {
            plan({.tokens = 3, .experts = 2, .capacity = 2, .token = twice}, p, how);
          }) == "moeroute::plan: token 1 has expert 1 twice, expected distinct experts");
    CHECK(test::refusal([&] {
            plan({.tokens = 3, .experts = 2, .capacity = 2, .token = once}, p, how);
          }) == "accepted");
    // Who has no slot has none twice.
    const std::uint8_t masked[] = {1, 0, 1}, owned[] = {1, 0};
    for (const bool by_mask : {true, false}) {
      plan_options aside = how;
      (by_mask ? aside.mask : aside.owned) =
          by_mask ? std::span<const std::uint8_t>(masked) : std::span<const std::uint8_t>(owned);
      plan({.tokens = 3, .experts = 2, .capacity = 2, .token = twice}, p, aside);
      CHECK((p.choices() == 4 && p.load(0) == 2 && p.load(1) == 0));
    }
  }
}

TEST_CASE("views whose rows run into one another are refused by every entry that takes them") {
  std::vector<float> a(64, 0.5f), b(64, 0.5f), c(64, 0.5f);
  std::vector<double> counts(64, 1.0);
  const auto bad = [](std::vector<float>& v) { return strided<float>(v.data(), 4, 8, 7); };
  const auto read = [](std::vector<float>& v) {
    return matrix_view<const float>(strided<float>(v.data(), 4, 8, 7));
  };
  const auto good = [](std::vector<float>& v) { return matrix_view<float>(v.data(), 4, 8); };
  const auto good_read = [](std::vector<float>& v) {
    return matrix_view<const float>(v.data(), 4, 8);
  };
  workspace ws;
  assignment out;
  const auto refused = [](auto&& f) {
    return between("moeroute::", test::refusal(f), ".stride is 7, expected at least 8");
  };
  const router<softmax> plain{.selection = {.k = 2}};
  router<softmax> noisy = plain;
  noisy.transform.noise.kind = noise_kind::gaussian;
  CHECK(refused([&] { route(plain, read(a), ws, out); }) == "route: logits");
  CHECK(refused([&] {
          route(noisy, good_read(a), side_inputs{.noise_logits = read(b)}, ws, out);
        }) == "route: noise_logits");
  CHECK(refused([&] { jitter_rows(read(a), 0.1f, {}, good(b)); }) == "jitter_rows: x");
  CHECK(refused([&] { jitter_rows(good_read(a), 0.1f, {}, bad(b)); }) == "jitter_rows: out");
  CHECK(refused([&] { unit_rows(bad(a)); }) == "unit_rows: weight");
  CHECK(refused([&] { simd::packed_matrix<>(read(a)); }) == "packed_matrix::set_rows: w");
  CHECK(refused([&] { committee_meter(2, 8).add(0, read(a)); }) == "committee_meter: logits");
  CHECK(refused([&] { entropy_meter().add(read(a)); }) == "entropy_meter: logits");
  CHECK(refused([&] { quantile_balancer(8, {.k = 2}).observe(read(a), {}, ws); }) ==
        "quantile_balancer: scores");
  std::vector<int> ints(64);
  const assignment four = ragged_form({0, 0, 0, 0, 0}, {}, 2, 4);
  CHECK(refused([&] {
          count_choices_by_sequence(four, {}, 1, strided<int>(ints.data(), 4, 8, 7));
        }) == "count_choices_by_sequence: counts");
  const auto load = [&](auto z, auto with_noise, auto sigma, auto dz, auto dsigma) {
    noisy_load_loss<float>({.k = 2}, {}, z, with_noise, sigma, dz, dsigma, ws, serial{});
  };
  std::vector<float> e(64), f(64);
  CHECK(refused([&] { load(good_read(a), read(b), good_read(c), good(e), good(f)); }) ==
        "load_loss: noisy");
  CHECK(refused([&] { load(good_read(a), good_read(b), read(c), good(e), good(f)); }) ==
        "load_loss: sigma");
  CHECK(refused([&] { load(good_read(a), good_read(b), good_read(c), good(e), bad(f)); }) ==
        "load_loss: dsigma");
  CHECK(refused([&] { noise_logit_gradient<float>(read(a), 0.0, good(b)); }) ==
        "noise_logit_gradient: sigma");
  CHECK(refused([&] { fill_router_noise<float>(read(a), 1, 2, good(b)); }) ==
        "fill_router_noise: router");
  CHECK(refused([&] { fill_router_noise<float>(good_read(a), 1, 2, bad(b)); }) ==
        "fill_router_noise: delta");
  const auto couple = [&](auto router, auto delta, auto expert, auto drouter, auto dexpert) {
    expert_router_coupling<float>({}, gradient_to::write, router, delta, expert, drouter, dexpert,
                                  ws, serial{});
  };
  CHECK(refused([&] { couple(read(a), good_read(b), good_read(c), good(e), good(f)); }) ==
        "expert_router_coupling: router");
  CHECK(refused([&] { couple(good_read(a), read(b), good_read(c), good(e), good(f)); }) ==
        "expert_router_coupling: delta");
  CHECK(refused([&] { couple(good_read(a), good_read(b), read(c), good(e), good(f)); }) ==
        "expert_router_coupling: expert");
  CHECK(refused([&] { couple(good_read(a), good_read(b), good_read(c), bad(e), good(f)); }) ==
        "expert_router_coupling: drouter");
  CHECK(refused([&] { couple(good_read(a), good_read(b), good_read(c), good(e), bad(f)); }) ==
        "expert_router_coupling: dexpert");
}

TEST_CASE("outputs that overlap what is read, or one another, are refused") {
  std::vector<float> a(64, 0.5f), b(64, 0.5f), c(64, 0.5f), e(64), f(64);
  const auto at = [](std::vector<float>& v, index_t from = 0) {
    return matrix_view<float>(v.data() + from, 4, 8);
  };
  const auto read = [](std::vector<float>& v) { return matrix_view<const float>(v.data(), 4, 8); };
  workspace ws;
  const auto refused = [](auto&& call) {
    return between("moeroute::", test::refusal(call), " overlap, expected memory of their own");
  };
  CHECK(refused([&] { jitter_rows(read(a), 0.1f, {}, at(a, 3)); }) == "jitter_rows: x and out");
  CHECK(test::refusal([&] { jitter_rows(read(a), 0.1f, {}, at(a)); }) == "accepted");
  const auto load = [&](auto dz, auto dsigma) {
    noisy_load_loss<float>({.k = 2}, {}, read(a), read(b), read(c), dz, dsigma, ws, serial{});
  };
  CHECK(refused([&] { load(at(b), at(f)); }) == "load_loss: logits, noisy or sigma and dlogits");
  CHECK(refused([&] { load(at(c), at(f)); }) == "load_loss: logits, noisy or sigma and dlogits");
  CHECK(refused([&] { load(at(e), at(a)); }) == "load_loss: logits, noisy or sigma and dsigma");
  CHECK(refused([&] { load(at(e), at(e)); }) == "load_loss: dlogits and dsigma");
  CHECK(test::refusal([&] { load(at(e), at(f)); }) == "accepted");
  const auto couple = [&](auto drouter, auto dexpert) {
    expert_router_coupling<float>({}, gradient_to::write, read(a), read(b), read(c), drouter,
                                  dexpert, ws, serial{});
  };
  CHECK(refused([&] { couple(at(a), at(f)); }) ==
        "expert_router_coupling: router, delta or expert and drouter");
  CHECK(refused([&] { couple(at(e), at(c)); }) ==
        "expert_router_coupling: router, delta or expert and dexpert");
  CHECK(refused([&] { couple(at(e), at(e, 8)); }) == "expert_router_coupling: drouter and dexpert");
  CHECK(test::refusal([&] { couple(at(e), at(f)); }) == "accepted");
  dispatch_plan p;
  plan(ragged_form({0, 2, 4}, {0, 1, 1, 0}, 2, 4), p);
  const auto copy = [](expert_id, matrix_view<const float>, matrix_view<float>) {};
  CHECK(refused([&] { for_each_expert(p, read(a), at(a, 8), copy); }) ==
        "for_each_expert: in and out");
  CHECK(test::refusal([&] { for_each_expert(p, read(a), at(a), copy); }) == "accepted");
}

TEST_CASE("noise logits must have a column for every logit") {
  const std::vector<float> z(120, 0.0f), noise(120, 0.0f);
  router<softmax> r{.selection = {.k = 1}};
  r.transform.noise.kind = noise_kind::gaussian;
  workspace ws;
  assignment out;
  const matrix_view<const float> logits(z.data(), 3, 40);
  const auto refused = [&](index_t rows, index_t cols) {
    return test::refusal([&] {
      route(r, logits, {.noise_logits = matrix_view<const float>(noise.data(), rows, cols)}, ws,
            out);
    });
  };
  CHECK(refused(3, 2) == "moeroute::route: noise_logits.cols is 2, expected 40");
  CHECK(refused(2, 40) == "moeroute::route: noise_logits.rows is 2, expected 3");
  CHECK(refused(3, 40) == "accepted");
}

}  // namespace from_outside

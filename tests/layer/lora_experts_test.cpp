#include <moeroute/layer/lora_experts.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <moeroute/layer/lora_backward.hpp>
#include <moeroute/stage/plan.hpp>
#include <string>
#include <vector>

#include "support/assignments.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

namespace lora_experts_test {

using namespace moeroute;

namespace {

std::vector<float> some(test::random& rng, index_t n) {
  std::vector<float> list(static_cast<std::size_t>(n));
  for (float& x : list) x = rng.normal();
  return list;
}

}  // namespace

TEST_CASE(
    "an adapter is B times what a mask leaves of A x, in plain loops, alone or added to a base") {
  test::random rng(1);
  for (int round = 0; round < 60; ++round) {
    const index_t d = 1 + rng.below(24), d_out = 1 + rng.below(12), rank = 1 + rng.below(7),
                  rows = rng.below(round % 4 == 0 ? 70 : 4), keep = rng.below(rank + 1),
                  of_x = d + rng.below(3), of_y = d_out + rng.below(3);
    const auto e = static_cast<expert_id>(rng.below(2));
    const float alpha = 3.0f * rng.normal();
    const std::vector<float> bias = some(rng, round % 3 == 0 ? 0 : rank);
    INFO(rows << " rows, " << keep << " of " << rank << " ranks kept, bias " << bias.size());
    lora_experts<> lora(2, d, d_out, rank, alpha, {.keep = keep, .bias = bias});
    CHECK(lora.masks() == (keep > 0 && keep < rank));
    CHECK(lora.scale() == alpha / static_cast<float>(rank));
    std::vector<float> a[2], b[2];
    for (expert_id i = 0; i < 2; ++i) {
      a[i] = some(rng, rank * d);
      b[i] = some(rng, d_out * rank);
      lora.set_a(i, {a[i].data(), rank, d});
      lora.set_b(i, {b[i].data(), d_out, rank});
    }
    const std::vector<float> x = some(rng, rows * of_x), base = some(rng, rows * of_y);
    std::vector<float> y = base, sum = base,
                       memory(static_cast<std::size_t>(lora.scratch_floats()));
    const matrix_view<const float> in(x.data(), rows, d, of_x);
    lora(e, in, {y.data(), rows, d_out, of_y}, memory.data());
    lora.add_to(e, in, {sum.data(), rows, d_out, of_y}, memory.data());
    index_t wrong = 0;
    for (index_t t = 0; t < rows; ++t) {
      std::vector<double> low(static_cast<std::size_t>(rank));
      for (index_t i = 0; i < rank; ++i)
        for (index_t c = 0; c < d; ++c)
          low[static_cast<std::size_t>(i)] +=
              double(a[e][static_cast<std::size_t>(i * d + c)]) * double(in(t, c));
      std::vector<std::size_t> order(low.size());
      for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
      const auto size = [&](std::size_t i) {
        return std::abs(low[i] + (bias.empty() ? 0.0 : double(bias[i])));
      };
      std::sort(order.begin(), order.end(),
                [&](std::size_t i, std::size_t j) { return size(i) > size(j); });
      for (auto i = static_cast<std::size_t>(keep == 0 ? rank : keep); i < order.size(); ++i)
        low[order[i]] = 0;
      for (index_t c = 0; c < of_y; ++c) {
        const auto at = static_cast<std::size_t>(t * of_y + c);
        double want = 0;  // of what is between rows: nothing, and it stays
        for (std::size_t i = 0; c < d_out && i < low.size(); ++i)
          want += double(b[e][static_cast<std::size_t>(c) * low.size() + i]) * low[i] *
                  double(alpha) / double(rank);
        wrong += !(std::abs(double(y[at]) - (c < d_out ? want : double(base[at]))) < 1e-3);
        wrong += !(std::abs(double(sum[at]) - (want + double(base[at]))) < 1e-3);
      }
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("tokens of one adapter and expert stand together in the plan of virtual experts") {
  test::random rng(2);
  const assignment a = test::fixed_choices(rng, 30, 5, 2, 4);
  std::vector<std::int32_t> adapter(30);
  for (auto& x : adapter) x = static_cast<std::int32_t>(rng.below(3));
  assignment v;
  virtual_experts(a, adapter, 3, v);
  dispatch_plan p;
  plan(v, p);
  CHECK(p.experts() == 15);
  for (index_t e = 0; e < 15; ++e)
    for (index_t s = p.offsets()[static_cast<std::size_t>(e)];
         s < p.offsets()[static_cast<std::size_t>(e + 1)]; ++s)
      CHECK(adapter[static_cast<std::size_t>(p.token_of_slot()[static_cast<std::size_t>(s)])] ==
            e / 5);
  for (std::size_t c = 0; c < a.ids().size(); ++c) {
    CHECK(v.weights()[c] == a.weights()[c]);
    CHECK((a.ids()[c] == no_expert ? v.ids()[c] == no_expert : v.ids()[c] % 5 == a.ids()[c]));
  }
  assignment cut = a;
  cut.kept_to_fill()[7] = 0;
  virtual_experts(cut, adapter, 3, v);
  CHECK(!v.kept(7));
  CHECK(v.kept(8));
  CHECK(test::refusal([&] { virtual_experts(v, adapter, 3, v); }) ==
        "moeroute::virtual_experts: out is choices, expected an assignment of its own");
  CHECK(test::refusal([&] { virtual_experts(assignment{}, {}, 3, v); }) ==
        "moeroute::virtual_experts: choices.experts() is 0, expected 1 to 1048576");
  assignment ragged;
  ragged.reset_ragged(2, 5, 2);
  std::fill_n(ragged.to_fill().offsets, 3, 0);
  ragged.close();
  CHECK(test::refusal([&] { virtual_experts(ragged, std::vector<std::int32_t>(2), 3, v); }) ==
        "moeroute::virtual_experts: the assignment is ragged, expected the fixed form");
}

TEST_CASE("a one-hot mixture is its expert to the bit; blocks mix apart; products do not mix") {
  test::random rng(3);
  constexpr index_t experts = 3, n = 12, blocks = 4;
  const std::vector<float> theta = some(rng, experts * n);
  const matrix_view<const float> parameters(theta.data(), experts, n);
  std::vector<float> w(2 * blocks * experts), out(2 * n);
  for (index_t r = 0; r < 2 * blocks; ++r)
    w[static_cast<std::size_t>(r * experts + r % experts)] = 1;
  mix_parameters({w.data(), 2 * blocks, experts}, parameters, blocks, {out.data(), 2, n});
  for (index_t s = 0; s < 2; ++s)
    for (index_t c = 0; c < n; ++c)
      CHECK(out[static_cast<std::size_t>(s * n + c)] ==
            parameters((s * blocks + c / 3) % experts, c));
  // Adapters of one rank: (w1 A1 + w2 A2)(w1 B1 + w2 B2) has cross terms.
  const float a[] = {1, 2}, b[] = {3, 5}, half[] = {0.5f, 0.5f};
  float mixed_a = 0, mixed_b = 0;
  mix_parameters({half, 1, 2}, {a, 2, 1}, 1, {&mixed_a, 1, 1});
  mix_parameters({half, 1, 2}, {b, 2, 1}, 1, {&mixed_b, 1, 1});
  CHECK(mixed_a * mixed_b == 6.0f);
  CHECK(0.5f * a[0] * b[0] + 0.5f * a[1] * b[1] == 6.5f);
}

TEST_CASE("each row of a FlyLoRA projection has as many entries as it keeps; its bias levels use") {
  const auto a = fly_projection(8, 40, 2, 7);
  CHECK(a == fly_projection(8, 40, 2, 7));
  CHECK(a != fly_projection(8, 40, 2, 8));
  for (index_t i = 0; i < 8; ++i)
    CHECK(std::count_if(a.begin() + i * 40, a.begin() + (i + 1) * 40,
                        [](float x) { return x != 0; }) == 10);
  // Where less than one is kept of a row, one is.
  const auto sparse = fly_projection(8, 2, 3, 7);
  for (index_t i = 0; i < 8; ++i)
    CHECK((sparse[static_cast<std::size_t>(2 * i)] == 0) !=
          (sparse[static_cast<std::size_t>(2 * i + 1)] == 0));
  // The numbers of a seed are the same on every machine.
  CHECK(fly_projection(3, 6, 1, 7) ==
        std::vector<float>{0, 0, -0x1.3e4dd6p-6f, 0, 0, -0x1.35c88ap-3f,  //
                           0, 0, 0x1.6db4bap-4f, 0, 0, 0x1.6aea3p-2f,     //
                           0, 0, 0, 0x1.2a2e3ap-2f, 0, 0x1.c5d546p-4f});
  // Twelve uniforms that add up to 6 would be an entry of 0, which there is none of.
  CHECK(fly_projection(1, 1, 1, 42631824) == std::vector<float>{1.0f});
  double sum = 0.0, squares = 0.0;
  const auto many = fly_projection(4, 3000, 2, 9);
  for (const float x : many) {
    sum += double(x);
    squares += double(x) * double(x);
  }
  CHECK(std::abs(sum / 6000) < 4 * 0.25 / std::sqrt(6000.0));
  CHECK(std::abs(squares / 6000 - 0.0625) < 0.0625 * 0.08);
  std::vector<float> bias = {0, 0, 0};
  update_rank_bias(std::vector<std::int64_t>{1, 2, 3}, 0.5f, bias);
  CHECK(bias == std::vector<float>{0.5f, 0, -0.5f});
}

TEST_CASE("of ranks of one size the lowest stay, whatever their sign") {
  const std::vector<float> bias{0.0f, 0.0f, 0.0f, 0.0f, 2.0f};
  const lora_experts<> lora(1, 3, 3, 5, 1.0f, {.keep = 3, .bias = bias});
  const float row[] = {-1.0f, 1.0f, 1.0f, -1.0f, -1.0f};
  bool dropped[lora_experts<>::most_masked];
  lora.dropped_ranks(row, dropped);
  for (const std::size_t i : {0u, 1u, 2u}) CHECK_FALSE(dropped[i]);
  for (const std::size_t i : {3u, 4u}) CHECK(dropped[i]);
}

TEST_CASE("adapters that do not fit are refused by name") {
  CHECK(test::refusal([] { lora_experts<>(1, 4, 4, 0, 1); }) ==
        "moeroute::lora_experts: rank is 0, expected 1 to 1048576");
  CHECK(test::refusal([] { lora_experts<>(1, 4, 4, 2, 1, {.keep = 3}); }) ==
        "moeroute::lora_experts: mask.keep is 3, expected 0 to 2");
  const std::vector<float> w(16);
  std::vector<float> low(2);
  for (const expert_id e : {-1, 1})
    CHECK(test::refusal([&] {
            lora_experts<>(1, 4, 4, 2, 1).low_rank(e, {w.data(), 1, 4}, {low.data(), 1, 2});
          }) == "moeroute::lora_experts: expert is " + std::to_string(e) + ", expected 0 to 0");
  CHECK(test::refusal([&] { lora_experts<>(1, 4, 4, 2, 1).set_a(0, {w.data(), 4, 4}); }) ==
        "moeroute::lora_experts: a.rows is 4, expected 2");
  test::random rng(4);
  const assignment a = test::fixed_choices(rng, 2, 4, 1);
  assignment out;
  CHECK(test::refusal([&] { virtual_experts(a, std::vector<std::int32_t>{0, 2}, 2, out); }) ==
        "moeroute::virtual_experts: adapter is 2, expected 0 to 1");
  assignment strange = a;
  strange.ids()[1] = 4;
  CHECK(test::refusal([&] { virtual_experts(strange, std::vector<std::int32_t>(2), 2, out); }) ==
        "moeroute::virtual_experts: the id of choice 1 is 4, expected -1 to 3");
  std::vector<float> mixed(4);
  CHECK(test::refusal([&] {
          mix_parameters({w.data(), 3, 2}, {w.data(), 2, 4}, 3, {mixed.data(), 1, 4});
        }) == "moeroute::mix_parameters: parameters.cols % blocks is 1, expected 0");
}

TEST_CASE("gradients of an adapter that is not there, or of other shapes, are refused by name") {
  const lora_experts<> lora(2, 4, 3, 2, 1);
  std::vector<float> a(16), b(12), da(16), db(12), rows(8), up(6);
  const lora_matrices<const float> factors{{a.data(), 4, 4}, {b.data(), 6, 2}};
  const lora_backward<> back(lora, factors, {{da.data(), 4, 4}, {db.data(), 6, 2}});
  std::vector<float> memory(static_cast<std::size_t>(back.scratch_floats()));
  const auto refused = [&](expert_id e, index_t out_cols) {
    return test::refusal([&] {
      back(e, {rows.data(), 2, 4}, {up.data(), 2, out_cols}, {rows.data(), 2, 4}, memory.data());
    });
  };
  CHECK(refused(2, 3) == "moeroute::lora_backward: expert is 2, expected 0 to 1");
  CHECK(refused(-1, 3) == "moeroute::lora_backward: expert is -1, expected 0 to 1");
  CHECK(refused(1, 2) == "moeroute::lora_backward: dout.cols() is 2, expected 3");
  CHECK(test::refusal(
            [&] { lora_backward<>(lora, factors, {{da.data(), 4, 4}, {a.data(), 6, 2}}); }) ==
        "moeroute::lora_backward: factors.a and gradients.b overlap, expected memory of their own");
}

TEST_CASE("gradients of an adapter are those of plain loops, of what its mask leaves") {
  test::random rng(7);
  constexpr index_t d = 9, d_out = 5, rank = 6;
  const std::vector<float> bias = some(rng, rank);
  for (const index_t rows : {0, 1, 200})
    for (const index_t keep : {0, 2}) {
      INFO(rows << " rows, " << keep << " ranks kept");
      lora_experts<> lora(2, d, d_out, rank, 3.0f, {.keep = keep, .bias = bias});
      const std::vector<float> a = some(rng, 2 * rank * d), b = some(rng, 2 * d_out * rank);
      const lora_matrices<const float> factors{{a.data(), 2 * rank, d},
                                               {b.data(), 2 * d_out, rank}};
      for (expert_id e = 0; e < 2; ++e) {
        lora.set_a(e, factors.a.middle_rows(e * rank, rank));
        lora.set_b(e, factors.b.middle_rows(e * d_out, d_out));
      }
      std::vector<float> x = some(rng, rows * d);
      const std::vector<float> dy = some(rng, rows * d_out);
      if (rows > 0) std::fill_n(x.begin(), d, 0.0f);  // a row whose ranks are all 0
      std::vector<float> dx(x.size(), 7.0f), da(a.size(), 1.0f), db(b.size(), 1.0f);
      const lora_backward<> back(lora, factors,
                                 {{da.data(), 2 * rank, d}, {db.data(), 2 * d_out, rank}});
      std::vector<float> memory(static_cast<std::size_t>(back.scratch_floats()));
      const matrix_view<const float> in(x.data(), rows, d), up(dy.data(), rows, d_out);
      const matrix_view<float> din(dx.data(), rows, d);
      back(1, in, up, din, memory.data());
      std::vector<double> slow_a(a.size(), 1.0), slow_b(b.size(), 1.0);
      for (index_t t = 0; t < rows; ++t) {
        double low[rank] = {}, dlow[rank] = {};
        for (index_t i = 0; i < rank; ++i) {
          for (index_t c = 0; c < d; ++c)
            low[i] += double(factors.a(rank + i, c)) * double(in(t, c));
          for (index_t c = 0; c < d_out; ++c)
            dlow[i] += double(up(t, c)) * double(factors.b(d_out + c, i)) * 3.0 / rank;
        }
        for (index_t i = 0, larger; i < rank; ++i) {
          larger = 0;
          const auto size = [&](index_t j) {
            return std::abs(low[j] + double(bias[std::size_t(j)]));
          };
          for (index_t j = 0; j < rank; ++j) larger += size(j) > size(i);
          const bool kept = keep == 0 || larger < keep;
          for (index_t c = 0; kept && c < d_out; ++c)
            slow_b[std::size_t((d_out + c) * rank + i)] += double(up(t, c)) * low[i] * 3.0 / rank;
          for (index_t c = 0; kept && c < d; ++c)
            slow_a[std::size_t((rank + i) * d + c)] += dlow[i] * double(in(t, c));
          if (!kept) dlow[i] = 0.0;
        }
        for (index_t c = 0; c < d; ++c) {
          double want = 0.0;
          for (index_t i = 0; i < rank; ++i) want += dlow[i] * double(factors.a(rank + i, c));
          REQUIRE(std::abs(want - double(din(t, c))) < 1e-4);
        }
      }
      for (std::size_t i = 0; i < da.size(); ++i)
        REQUIRE(std::abs(slow_a[i] - double(da[i])) < 1e-3);
      for (std::size_t i = 0; i < db.size(); ++i)
        REQUIRE(std::abs(slow_b[i] - double(db[i])) < 1e-3);
    }
  const lora_experts<> lora(2, d, d_out, rank, 3.0f);
  std::vector<float> list(200);
  CHECK(test::refusal([&] {
          lora_backward<>(lora, {{list.data(), 2 * rank, d}, {list.data(), 2 * d_out, rank - 1}},
                          {});
        }) == "moeroute::lora_backward: factors.b.cols() is 5, expected 6");
}

TEST_CASE("adapters refuse by name every size and number that does not fit") {
  std::vector<float> in(64), out(64), other(64), memory(4096);
  using rows = matrix_view<const float>;
  using results = matrix_view<float>;
  lora_experts<> experts(2, 4, 3, 2, 1);
  const rows x(in.data(), 5, 4);
  const results y(out.data(), 5, 3);
  const auto made = [](index_t n, index_t d, index_t d_out, index_t rank, float alpha,
                       const rank_mask& mask = {}) {
    return [=] { lora_experts<>(n, d, d_out, rank, alpha, mask); };
  };
  const std::vector<float> three(3);
  const auto called = [&](rows from, results to) {
    return [&, from, to] { experts(0, from, to, memory.data()); };
  };
  test::random rng(1);
  const assignment a = test::fixed_choices(rng, 4, 8, 2);
  const std::vector<std::int32_t> adapter{0, 1, 0, 1}, below{0, -1, 0, 1};
  const auto told = [&](std::span<const std::int32_t> of, index_t adapters) {
    return [&a, of, adapters] {
      assignment to;
      virtual_experts(a, of, adapters, to);
    };
  };
  const auto mixed = [](rows w, rows p, index_t blocks, results to) {
    return [=] { mix_parameters(w, p, blocks, to); };
  };
  // Two sequences of two blocks, three experts of four parameters.
  const rows w(in.data(), 4, 3), p(other.data(), 3, 4);
  const results mixture(out.data(), 2, 4);
  const lora_matrices<const float> factors{{in.data(), 4, 4}, {in.data(), 6, 2}};
  std::vector<float> da(16), db(12);
  const results of_a(da.data(), 4, 4), of_b(db.data(), 6, 2);
  const lora_backward<> backward(experts, factors, {of_a, of_b});
  const auto pulled = [&](rows from, rows d, results to) {
    return [&, from, d, to] { backward(0, from, d, to, memory.data()); };
  };
  const rows dy(other.data(), 5, 3);
  const results dx(out.data(), 5, 4);
  const auto trained = [&](const lora_matrices<const float>& f, results ga, results gb) {
    return [&experts, f, ga, gb] { lora_backward<>(experts, f, {ga, gb}); };
  };
  const rows on_a(da.data(), 4, 4), on_b(db.data(), 6, 2);
  const std::string own = " overlap, expected memory of their own";
  const test::refusals all{
      {made(0, 4, 3, 2, 1), "lora_experts: experts is 0, expected 1 to 1048576"},
      {made(2, 0, 3, 2, 1), "lora_experts: d is 0, expected 1 to 1099511627776"},
      {made(2, 4, 0, 2, 1), "lora_experts: d_out is 0, expected 1 to 1099511627776"},
      {made(max_experts + 1, 4, 3, 2, 1),
       "lora_experts: experts is 1048577, expected 1 to 1048576"},
      {made(2, (index_t{1} << 40) + 1, 3, 2, 1),
       "lora_experts: d is 1099511627777, expected 1 to 1099511627776"},
      {made(2, 4, (index_t{1} << 40) + 1, 2, 1),
       "lora_experts: d_out is 1099511627777, expected 1 to 1099511627776"},
      {made(2, 4, 3, (1 << 20) + 1, 1), "lora_experts: rank is 1048577, expected 1 to 1048576"},
      {[] { fly_projection((1 << 20) + 1, 4, 1, 0); },
       "fly_projection: r is 1048577, expected 1 to 1048576"},
      {[] { fly_projection(2, (1 << 30) + 1, 1, 0); },
       "fly_projection: n is 1073741825, expected 1 to 1073741824"},
      {made(2, 4, 3, 2, INFINITY), "lora_experts: alpha is inf, expected a finite number"},
      {made(2, 4, 3, 2, 1, {.keep = -1}), "lora_experts: mask.keep is -1, expected 0 to 2"},
      {made(1, 1, 1, 257, 1, {.keep = 1}),
       "lora_experts: rank of a mask is 257, expected 1 to 256"},
      {made(2, 4, 3, 2, 1, {.keep = 1, .bias = three}),
       "lora_experts: mask.bias.size() is 3, expected 2"},
      {[&] { experts.set_a(0, {in.data(), 2, 5}); }, "lora_experts: a.cols is 5, expected 4"},
      {[&] { experts.set_b(0, {in.data(), 2, 2}); }, "lora_experts: b.rows is 2, expected 3"},
      {[&] { experts.set_b(0, {in.data(), 3, 3}); }, "lora_experts: b.cols is 3, expected 2"},
      {called({in.data(), 5, 3}, y), "lora_experts: x.cols is 3, expected 4"},
      {called(x, {out.data(), 4, 3}), "lora_experts: y.rows is 4, expected 5"},
      {called(x, {out.data(), 5, 4}), "lora_experts: y.cols is 4, expected 3"},
      {called({in.data(), 5, 4, 3}, y), "lora_experts: x.stride is 3, expected at least 4"},
      {called(x, {out.data(), 5, 3, 2}), "lora_experts: y.stride is 2, expected at least 3"},
      {called({out.data(), 5, 4}, y), "lora_experts: x and y" + own},
      {[&] { experts.add_to(0, {in.data(), 5, 3}, y, memory.data()); },
       "lora_experts: x.cols is 3, expected 4"},
      {[&] { update_rank_bias(std::vector<std::int64_t>{1}, 1.0f, std::span(other).first(2)); },
       "update_rank_bias: counts.size() is 1, expected 2"},
      {told(std::span(adapter).first(3), 2), "virtual_experts: adapter.size() is 3, expected 4"},
      {told(below, 2), "virtual_experts: adapter is -1, expected 0 to 1"},
      {told(adapter, 0), "virtual_experts: adapters is 0, expected 1 to 131072"},
      {told(adapter, 131073), "virtual_experts: adapters is 131073, expected 1 to 131072"},
      {mixed(w, p, 0, mixture), "mix_parameters: blocks is 0, expected 1 to 4"},
      {mixed(w, p, 5, mixture), "mix_parameters: blocks is 5, expected 1 to 4"},
      {mixed(w, p, 1, mixture), "mix_parameters: weights.rows is 4, expected 2"},
      {mixed({in.data(), 4, 2}, p, 2, mixture), "mix_parameters: weights.cols is 2, expected 3"},
      {mixed(w, p, 2, {out.data(), 2, 3}), "mix_parameters: out.cols is 3, expected 4"},
      {mixed({in.data(), 4, 3, 2}, p, 2, mixture),
       "mix_parameters: weights.stride is 2, expected at least 3"},
      {mixed(w, {other.data(), 3, 4, 3}, 2, mixture),
       "mix_parameters: parameters.stride is 3, expected at least 4"},
      {mixed(w, p, 2, {out.data(), 2, 4, 3}),
       "mix_parameters: out.stride is 3, expected at least 4"},
      {mixed({out.data(), 4, 3}, p, 2, mixture), "mix_parameters: weights and out" + own},
      {mixed(w, {out.data(), 3, 4}, 2, mixture), "mix_parameters: parameters and out" + own},
      {[] { fly_projection(0, 4, 1, 0); }, "fly_projection: r is 0, expected 1 to 1048576"},
      {[] { fly_projection(2, 0, 1, 0); }, "fly_projection: n is 0, expected 1 to 1073741824"},
      {[] { fly_projection(2, 4, 0, 0); }, "fly_projection: keep is 0, expected 1 to 2"},
      {[] { fly_projection(2, 4, 3, 0); }, "fly_projection: keep is 3, expected 1 to 2"},
      {pulled({in.data(), 5, 3}, dy, dx), "lora_backward: in.cols() is 3, expected 4"},
      {pulled(x, {other.data(), 4, 3}, dx), "lora_backward: dout.rows() is 4, expected 5"},
      {pulled(x, dy, {out.data(), 4, 4}), "lora_backward: din.rows() is 4, expected 5"},
      {pulled(x, dy, {out.data(), 5, 3}), "lora_backward: din.cols() is 3, expected 4"},
      {trained({{in.data(), 3, 4}, factors.b}, of_a, of_b),
       "lora_backward: factors.a.rows() is 3, expected 4"},
      {trained({{in.data(), 4, 3}, factors.b}, of_a, of_b),
       "lora_backward: factors.a.cols() is 3, expected 4"},
      {trained({factors.a, {in.data(), 5, 2}}, of_a, of_b),
       "lora_backward: factors.b.rows() is 5, expected 6"},
      {trained(factors, of_a, {db.data(), 6, 1}),
       "lora_backward: gradients.b.cols() is 1, expected 2"},
      {trained({on_a, factors.b}, of_a, of_b), "lora_backward: factors.a and gradients.a" + own},
      {trained({on_b, factors.b}, of_a, of_b), "lora_backward: factors.a.rows() is 6, expected 4"},
      {trained({factors.a, on_b}, of_a, of_b), "lora_backward: factors.b and gradients.b" + own},
      {trained({factors.a, {da.data(), 6, 2}}, of_a, of_b),
       "lora_backward: factors.b and gradients.a" + own},
      {trained({{out.data(), 4, 4}, factors.b}, of_a, {out.data(), 6, 2}),
       "lora_backward: factors.a and gradients.b" + own},
      {trained(factors, {out.data(), 4, 4}, {out.data(), 6, 2}),
       "lora_backward: gradients.a and gradients.b" + own}};
  for (const auto& [call, message] : all) CHECK(test::refusal(call) == "moeroute::" + message);
}

}  // namespace lora_experts_test

// What only several processes show: messages, agreement, deadlines. Run by mpirun with 1 to 4
// ranks; every rank runs the same list, the verdict is all ranks'.
#include <moeroute/mpi/expert_parallel.hpp>
//
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch_session.hpp>
#include <catch2/catch_test_macros.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <moeroute/exec/openmp.hpp>
#include <moeroute/layer/swiglu_experts.hpp>
#include <moeroute/mpi/expert_parallel_layer.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/plan.hpp>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "support/assignments.hpp"
#include "support/column_experts.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

using namespace moeroute;

namespace {

using rows = std::vector<float>;
using test::column_experts;

int world_rank() {
  int r = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &r);
  return r;
}
int world_size() {
  int n = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &n);
  return n;
}

rows random_rows(index_t n, std::uint64_t seed) {
  test::random rng(seed);
  rows v(static_cast<std::size_t>(n));
  for (float& x : v) x = rng.normal();
  return v;
}

// All ranks know all tokens, and what one rank makes of them; each serves its own.
struct scene {
  assignment choices;
  index_t d;
  rows x, dy, y, dx, dweights, dw;
  rows shared, shared_weight;      // [T, d] and [T] where tokens have a side of their own
  std::vector<std::uint8_t> mask;  // [T] likewise
  exchange_options how;

  scene(assignment a, index_t cols, bool with_side = false, const exchange_options& o = {})
      : choices(std::move(a)),
        d(cols),
        x(random_rows(choices.tokens() * d, 1)),
        dy(random_rows(choices.tokens() * d, 2)),
        how(o) {
    const index_t tokens = choices.tokens();
    if (with_side) {
      test::random rng(7);
      shared = random_rows(tokens * d, 5);
      shared_weight = random_rows(tokens, 6);
      for (index_t t = 0; t < tokens; ++t)
        mask.push_back(static_cast<std::uint8_t>(rng.below(4) != 0));
    }
    column_experts experts(choices.experts(), d);
    dispatch_plan plan;
    std::vector<std::uint8_t> owned;
    for (index_t e = 0; e < choices.experts(); ++e) owned.push_back(o.special.contains(e) ? 0 : 1);
    moeroute::plan(choices, plan, {.owned = owned, .mask = mask});
    rows in(static_cast<std::size_t>(plan.slots() * d)), out = in, din = in, dout = in;
    const auto as = [&](rows& v) { return matrix_view<float>(v.data(), plan.slots(), d); };
    const auto seen = [&](const rows& v, index_t n) {
      return matrix_view<const float>(v.data(), n, d);
    };
    const bool on_input = o.weights == weight_on::input;
    dispatch_options moving;
    if (on_input) moving.scale = choices.weights();
    dispatch(seen(x, tokens), plan, as(in), moving);
    for_each_expert(plan, as(in), as(out),
                    [&](expert_id e, matrix_view<const float> p, matrix_view<float> q) {
                      experts.forward(e, p, q);
                    });
    y.resize(x.size());
    dx.resize(x.size());
    dweights.resize(static_cast<std::size_t>(choices.choices()));
    combine_options<float> whole;
    if (on_input) whole.weight = combine_weight::one;
    whole.lost = o.lost_token_gets;
    whole.identity_first = o.special.identity_first;
    whole.identity_end = o.special.identity_end;
    whole.x = seen(x, tokens);
    combine_options<float> own = whole;
    if (with_side) whole.shared = seen(shared, tokens);
    whole.shared_weight = shared_weight;
    combine(as(out), plan, choices, matrix_view<float>(y.data(), tokens, d), whole);
    const bool identity = o.special.identity_first < o.special.identity_end;
    rows identities(dweights.size());
    combine_gradients<float> terms{.slots = as(dout),
                                   .weights = on_input ? identities : dweights,
                                   .x = {dx.data(), tokens, d}};
    combine_backward(as(out), plan, choices, seen(dy, tokens), terms, serial{}, own);
    for_each_expert_backward(
        plan, seen(in, plan.slots()), seen(dout, plan.slots()), as(din),
        [&](expert_id e, matrix_view<const float> p, matrix_view<const float> q,
            matrix_view<float> o) { experts.backward(e, p, q, o); });
    dispatch_scale<float> scale;
    if (on_input) scale = {.scale = choices.weights(), .x = seen(x, tokens), .dscale = dweights};
    const bool first = identity || o.lost_token_gets == lost_token::residual;
    dispatch_backward(as(din), plan, first ? gradient_to::add : gradient_to::write,
                      matrix_view<float>(dx.data(), tokens, d), serial{}, scale);
    for (std::size_t c = 0; on_input && identity && c < dweights.size(); ++c)
      dweights[c] += identities[c];
    dw = experts.gradient;
  }
};

// The first token and the number of tokens of a rank: rank 0 has none where there are several, the
// rest is uneven.
std::pair<index_t, index_t> tokens_of_rank(index_t tokens, index_t rank) {
  const index_t ranks = world_size();
  const auto edge = [&](index_t i) {
    return i <= (ranks > 1 ? 1 : 0) ? 0 : i == ranks ? tokens : tokens * i * i / (ranks * ranks);
  };
  return {edge(rank), edge(rank + 1) - edge(rank)};
}

struct own_part {
  index_t first, n;
  assignment choices;
  rows y, dx, dweights;
  rows apart[3];  // x, dy and shared, whose rows lie apart
  matrix_view<const float> x, dy, shared;
  std::span<const float> shared_weight;
  std::span<const std::uint8_t> mask;

  explicit own_part(const scene& s) {
    std::tie(first, n) = tokens_of_rank(s.choices.tokens(), world_rank());
    copy_tokens(s.choices, first, n, choices);
    y.resize(static_cast<std::size_t>(n * s.d));
    dx.resize(y.size());
    dweights.resize(static_cast<std::size_t>(choices.choices()));
    const auto spread = [&](const rows& all, std::size_t which) {
      const index_t stride = s.d + 1 + static_cast<index_t>(which);
      apart[which].assign(static_cast<std::size_t>(n * stride), 9.0f);
      for (index_t t = 0; t < n; ++t)
        std::copy_n(all.begin() + (first + t) * s.d, s.d, apart[which].begin() + t * stride);
      return matrix_view<const float>(apart[which].data(), n, s.d, stride);
    };
    x = spread(s.x, 0);
    dy = spread(s.dy, 1);
    if (s.mask.empty()) return;
    const auto from = static_cast<std::size_t>(first), count = static_cast<std::size_t>(n);
    shared = spread(s.shared, 2);
    shared_weight = std::span(s.shared_weight).subspan(from, count);
    mask = std::span(s.mask).subspan(from, count);
  }
  matrix_view<float> out(index_t d) { return {y.data(), n, d}; }
};

std::string slice_difference(const rows& got, const rows& all, index_t first) {
  return test::bit_difference(std::span(got),
                              std::span(all).subspan(static_cast<std::size_t>(first), got.size()));
}

// Contiguous experts, and one more slot on every rank.
placement with_replicas(index_t experts, index_t ranks) {
  std::vector<std::int32_t> offset{0};
  std::vector<expert_id> slots;
  const placement flat = placement::contiguous(experts, ranks);
  for (index_t r = 0; r < ranks; ++r) {
    for (const expert_id e : flat.experts_of_rank(r)) slots.push_back(e);
    slots.push_back(static_cast<expert_id>((r * 3 + experts / 2) % experts));
    offset.push_back(static_cast<std::int32_t>(slots.size()));
  }
  return placement({.experts = experts, .slot_offset = offset, .expert_of_slot = slots});
}

template <class P>
auto forward_of(const column_experts& experts, const P& p) {
  return [&experts, &p](expert_id slot, matrix_view<const float> in, matrix_view<float> out) {
    experts.forward(p.experts().experts_of_rank(p.rank())[static_cast<std::size_t>(slot)], in, out);
  };
}

// An expert's gradients told apart: its input's at once, its weights' when all rows are there.
struct gradient_in_two {
  column_experts& experts;
  std::span<const expert_id> of_slot;

  std::size_t first(expert_id slot) const {
    return static_cast<std::size_t>(of_slot[static_cast<std::size_t>(slot)] * experts.d);
  }
  void operator()(expert_id slot, matrix_view<const float>, matrix_view<const float> dout,
                  matrix_view<float> din) const {
    for (index_t r = 0; r < dout.rows; ++r)
      for (index_t j = 0; j < dout.cols; ++j)
        din(r, j) = experts.weight[first(slot) + static_cast<std::size_t>(j)] * dout(r, j);
  }
  void weights(expert_id slot, matrix_view<const float> in, matrix_view<const float> dout) const {
    for (index_t r = 0; r < dout.rows; ++r)
      for (index_t j = 0; j < dout.cols; ++j)
        experts.gradient[first(slot) + static_cast<std::size_t>(j)] += dout(r, j) * in(r, j);
  }
};

// What differs from one rank, "" where nothing does.
std::string run(const scene& s, const placement& where, mpi::parallel_options options,
                bool in_two = false) {
  column_experts experts(s.choices.experts(), s.d);
  own_part own(s);
  const replica_rule rule = options.exchange.rule;
  options.exchange = s.how;
  options.exchange.rule = rule;
  mpi::expert_parallel<> p(MPI_COMM_WORLD, where, options);
  // Of the results the rows lie apart too.
  const index_t stride = s.d + 2;
  rows y_apart(static_cast<std::size_t>(own.n * stride), 9.0f), dx_apart = y_apart;
  const auto together = [&](const rows& from, rows& to) {
    for (index_t t = 0; t < own.n; ++t) {
      std::copy_n(from.begin() + t * stride, s.d, to.begin() + t * s.d);
      for (index_t j = s.d; j < stride; ++j)
        if (from[static_cast<std::size_t>(t * stride + j)] != 9.0f) to[0] = NAN;
    }
  };
  p.forward(own.x, own.choices, matrix_view<float>(y_apart.data(), own.n, s.d, stride),
            forward_of(experts, p), serial{}, own.mask, own.shared, own.shared_weight);
  together(y_apart, own.y);
  if (const std::string d = slice_difference(own.y, s.y, own.first * s.d); !d.empty())
    return "y " + d;
  const mpi::parallel_counts& n = p.counts();
  if (n.tokens != own.n || n.lost != 0) return "counts of tokens";
  if (options.chunks == 1 &&
      (n.rows_sent != p.plan().rows() || n.entries_sent != p.plan().entries() ||
       n.entries_received != p.received().slots()))
    return "counts of rows";
  const std::span<const expert_id> of_slot = where.experts_of_rank(p.rank());
  const matrix_view<float> dx(dx_apart.data(), own.n, s.d, stride);
  if (in_two)
    p.backward(own.x, own.choices, own.dy, dx, own.dweights, gradient_in_two{experts, of_slot});
  else
    p.backward(own.x, own.choices, own.dy, dx, own.dweights,
               [&](expert_id slot, matrix_view<const float> in, matrix_view<const float> dout,
                   matrix_view<float> din) {
                 experts.backward(of_slot[static_cast<std::size_t>(slot)], in, dout, din);
               });
  together(dx_apart, own.dx);
  if (const std::string d = slice_difference(own.dx, s.dx, own.first * s.d); !d.empty())
    return "dx " + d;
  if (const std::string d = slice_difference(own.dweights, s.dweights, s.choices.first(own.first));
      !d.empty())
    return "dweights " + d;
  for (const expert_id e : where.experts_of_rank(p.rank()))
    if (where.replicas(e) == 1) {
      const auto at = static_cast<std::size_t>(e * s.d), n = static_cast<std::size_t>(s.d);
      if (const std::string d = test::bit_difference(std::span(experts.gradient).subspan(at, n),
                                                     std::span(s.dw).subspan(at, n));
          !d.empty())
        return "dw " + d;
    }
  // Gradients that are not wanted: the others are the same.
  const auto again = [&](const matrix_view<float>& to, std::span<float> weights) {
    p.backward(own.x, own.choices, own.dy, to, weights, gradient_in_two{experts, of_slot});
  };
  std::fill(own.dweights.begin(), own.dweights.end(), 9.0f);
  again({}, own.dweights);
  if (const std::string d = slice_difference(own.dweights, s.dweights, s.choices.first(own.first));
      !d.empty())
    return "dweights alone " + d;
  std::fill(dx_apart.begin(), dx_apart.end(), 9.0f);
  again(dx, {});
  together(dx_apart, own.dx);
  if (const std::string d = slice_difference(own.dx, s.dx, own.first * s.d); !d.empty())
    return "dx alone " + d;
  return "";
}

std::vector<scene> scenes() {
  test::random rng(3);
  std::vector<scene> list;
  list.emplace_back(test::fixed_choices(rng, 60, 8, 3, 5), 5);
  list.emplace_back(test::ragged_choices(rng, 33, 12, 9), 3);
  list.emplace_back(test::fixed_choices(rng, 9, 8, 8), 4);
  list.emplace_back(test::fixed_choices(rng, 0, 4, 2), 6);
  assignment one = test::fixed_choices(rng, 20, 6, 1);
  std::fill(one.ids().begin(), one.ids().end(), 4);
  list.emplace_back(one, 2);
  // Tokens with shared rows, weights of these and a mask, each its own.
  list.emplace_back(test::fixed_choices(rng, 60, 8, 3, 5), 5, true);
  list.emplace_back(test::ragged_choices(rng, 33, 12, 9), 3, true);
  // Identity and zero experts, tokens that lost every choice, weights on inputs.
  for (const weight_on weights : {weight_on::output, weight_on::input}) {
    const exchange_options special{
        .weights = weights,
        .special = {.identity_first = 4, .identity_end = 6, .zero_first = 6, .zero_end = 8},
        .lost_token_gets = lost_token::residual};
    list.emplace_back(test::fixed_choices(rng, 50, 8, 2, 2), 4, false, special);
    list.emplace_back(test::fixed_choices(rng, 50, 8, 2, 2), 4, true, special);
  }
  return list;
}

}  // namespace

TEST_CASE("outputs and gradients of all ranks are one rank's, bit for bit") {
  for (const scene& s : scenes())
    for (const mpi::dispatcher how : {mpi::dispatcher::rank_to_rank, mpi::dispatcher::all_gather}) {
      CHECK(run(s, placement::contiguous(s.choices.experts(), world_size()), {.dispatch = how}) ==
            "");
      for (const replica_rule rule :
           {replica_rule::nearest, replica_rule::even, replica_rule::shares})
        CHECK(run(s, with_replicas(s.choices.experts(), world_size()),
                  {.exchange = {.rule = rule}, .dispatch = how}) == "");
    }
}

TEST_CASE("replicas share what all ranks have of their expert") {
  const scene s = std::move(scenes()[0]);
  const placement where = with_replicas(s.choices.experts(), world_size());
  column_experts experts(s.choices.experts(), s.d);
  own_part own(s);
  mpi::expert_parallel<> p(MPI_COMM_WORLD, where, {.exchange = {.rule = replica_rule::even}});
  p.forward(own.x, own.choices, own.out(s.d), forward_of(experts, p));
  // What a rank decides that sees everybody's choices.
  const index_t e = s.choices.experts();
  std::vector<std::int32_t> counts(static_cast<std::size_t>(world_size() * e), 0);
  for (int r = 0; r < world_size(); ++r) {
    const auto [first, n] = tokens_of_rank(s.choices.tokens(), r);
    assignment part;
    copy_tokens(s.choices, first, n, part);
    count_choices(part, std::span(counts).subspan(static_cast<std::size_t>(r * e),
                                                  static_cast<std::size_t>(e)));
  }
  std::vector<slot_id> slot(static_cast<std::size_t>(own.choices.choices()));
  workspace memory;
  resolve(own.choices, where, world_rank(), {.rule = replica_rule::even, .counts = counts}, memory,
          slot);
  exchange_plan expected;
  plan_exchange(own.choices, slot, where, expected);
  CHECK(std::ranges::equal(p.plan().entry_offset(), expected.entry_offset()));
  CHECK(std::ranges::equal(p.plan().local_slot(), expected.local_slot()));
}

TEST_CASE("neither chunks nor the size of messages change a bit") {
  const std::vector<scene> all = scenes();
  for (const scene& s : all) {
    const placement p = placement::contiguous(s.choices.experts(), world_size());
    for (const index_t chunks : {1, 2, 5})
      for (const bool in_two : {false, true})
        CHECK(run(s, p, {.chunks = chunks, .dispatch = mpi::dispatcher::rank_to_rank}, in_two) ==
              "");
    for (const index_t bytes : {s.d * 4, index_t{7}})
      CHECK(run(s, p,
                {.transport = {.bytes_per_message = bytes},
                 .dispatch = mpi::dispatcher::rank_to_rank}) == "");
  }
}

TEST_CASE("few tokens go to all ranks where that costs little, by every rank's numbers alike") {
  test::random rng(4);
  const index_t ranks = world_size();
  const auto gathers = [&](index_t tokens, const mpi::parallel_options& o) {
    const scene s(test::fixed_choices(rng, tokens, 8, 2), 64);
    column_experts experts(8, 64);
    own_part own(s);
    mpi::expert_parallel<> p(MPI_COMM_WORLD, placement::contiguous(8, ranks), o);
    p.forward(own.x, own.choices, own.out(s.d), forward_of(experts, p));
    CHECK(slice_difference(own.y, s.y, own.first * s.d) == "");
    return p.counts().gathered;
  };
  CHECK(gathers(4, {}) == (ranks > 1));
  CHECK(!gathers(400, {}));
  CHECK(gathers(400, {.gather_bytes = 1 << 20}) == (ranks > 1));
  CHECK(!gathers(4, {.gather_bytes = 0}));
  CHECK(!gathers(4, {.chunks = 2}));
  CHECK(gathers(400, {.dispatch = mpi::dispatcher::all_gather}));
  CHECK(!gathers(4, {.dispatch = mpi::dispatcher::rank_to_rank}));
}

TEST_CASE("reduced results are close, and the same every time") {
  const scene s = std::move(scenes()[0]);
  column_experts experts(s.choices.experts(), s.d);
  own_part own(s);
  mpi::expert_parallel<> p(MPI_COMM_WORLD, placement::contiguous(s.choices.experts(), world_size()),
                           {.exchange = {.result = exchange_result::reduced}});
  p.forward(own.x, own.choices, own.out(s.d), forward_of(experts, p));
  const rows first = own.y;
  p.forward(own.x, own.choices, own.out(s.d), forward_of(experts, p));
  CHECK(test::bit_difference(own.y, first) == "");
  CHECK(test::difference(
            std::span(own.y),
            std::span(s.y).subspan(static_cast<std::size_t>(own.first * s.d), own.y.size()), 1e-5,
            1e-5) == "");
}

TEST_CASE("calls of any size follow one another, and memory stays what it was") {
  constexpr index_t experts = 8, d = 4;
  column_experts e(experts, d);
  // The first half rank to rank, the second as few tokens go.
  mpi::expert_parallel<> p(MPI_COMM_WORLD, placement::contiguous(experts, world_size()),
                           {.dispatch = mpi::dispatcher::rank_to_rank});
  const auto pages = [] {
    std::ifstream in("/proc/self/statm");
    long size = 0, resident = 0;
    in >> size >> resident;
    return resident;
  };
  long before = 0;
  test::random rng(100 + static_cast<std::uint64_t>(world_rank()));
  const int calls = world_size() == 2 ? 10000 : 1000;
  bool right = true;
  assignment a;
  for (int call = 0; call < calls; ++call) {
    const index_t n = rng.below(9);
    if (call == calls / 2)
      p = mpi::expert_parallel<>(MPI_COMM_WORLD, placement::contiguous(experts, world_size()));
    a = test::fixed_choices(rng, n, experts, 2);
    const rows x = random_rows(n * d, static_cast<std::uint64_t>(call));
    rows y(x.size());
    p.forward({x.data(), n, d}, a, matrix_view<float>(y.data(), n, d), forward_of(e, p));
    for (index_t t = 0; t < n; ++t)
      for (index_t j = 0; j < d; ++j) {
        float want = 0.0f;
        for (std::size_t c = 0; c < 2; ++c)
          want = std::fma(a.weights(t)[c],
                          e.weight[static_cast<std::size_t>(a.ids(t)[c] * d + j)] *
                              x[static_cast<std::size_t>(t * d + j)],
                          want);
        right = right && y[static_cast<std::size_t>(t * d + j)] == want;
      }
    if (call == calls / 10 || call == calls * 6 / 10) before = pages();
    if (call == calls / 2 - 1 || call == calls - 1) CHECK(pages() - before < 256);  // a megabyte
  }
  CHECK(right);
}

TEST_CASE(
    "a rank that throws in any phase makes every rank throw, by name, and the next call is as "
    "ever") {
  const scene s = std::move(scenes()[0]);
  column_experts experts(s.choices.experts(), s.d);
  own_part own(s);
  const int bad = world_size() - 1;
  const bool mine = world_rank() == bad;
  const placement where = placement::contiguous(s.choices.experts(), world_size());
  mpi::expert_parallel<> p(MPI_COMM_WORLD, where, {.layer = 7});
  const auto right = [&] {
    std::fill(own.y.begin(), own.y.end(), 9.0f);
    p.forward(own.x, own.choices, own.out(s.d), forward_of(experts, p));
    return slice_difference(own.y, s.y, own.first * s.d);
  };
  const auto no_backward = [](expert_id, matrix_view<const float>, matrix_view<const float>,
                              matrix_view<float>) {};
  CHECK(right() == "");
  const std::string named =
      "moeroute::expert_parallel: rank " + std::to_string(bad) + " failed in ";

  // In the checks: y of another shape.
  rows wrong((own.y.size() + 5) * 2);
  std::string said = test::refusal([&] {
    p.forward(own.x, own.choices,
              mine ? matrix_view<float>(wrong.data(), own.n + 1, s.d) : own.out(s.d),
              forward_of(experts, p));
  });
  CHECK(said.find(mine ? "moeroute::expert_parallel: y.rows() is "
                       : named + "checks of layer 7: ") == 0);
  CHECK(right() == "");

  // Of several ranks that throw the others hear of the lowest.
  const bool one_of_two = world_rank() < 2;
  said = test::refusal([&] {
    p.forward(own.x, own.choices,
              one_of_two ? matrix_view<float>(wrong.data(), own.n + 1, s.d) : own.out(s.d),
              forward_of(experts, p));
  });
  CHECK(said.find(one_of_two
                      ? "moeroute::expert_parallel: y.rows() is "
                      : "moeroute::expert_parallel: rank 0 failed in checks of layer 7: ") == 0);
  CHECK(right() == "");

  // In the experts.
  said = "accepted";
  try {
    p.forward(own.x, own.choices, own.out(s.d),
              [&](expert_id slot, matrix_view<const float> in, matrix_view<float> out) {
                if (mine) throw std::runtime_error("no such luck");
                forward_of(experts, p)(slot, in, out);
              });
  } catch (const std::exception& e) {
    said = e.what();
  }
  CHECK(said == (mine ? "no such luck" : named + "experts of layer 7: no such luck"));
  CHECK(right() == "");

  // In the backward pass, before and while the experts run.
  said = test::refusal([&] {
    p.backward(own.x, own.choices,
               mine ? matrix_view<const float>(wrong.data(), own.n + 1, s.d) : own.dy,
               {own.dx.data(), own.n, s.d}, own.dweights, no_backward);
  });
  CHECK(said.find(mine ? "moeroute::expert_parallel: dy.rows() is "
                       : named + "pack of layer 7: ") == 0);
  CHECK(test::refusal([&] {
          p.backward(own.x, own.choices, own.dy, {own.dx.data(), own.n, s.d}, own.dweights,
                     no_backward);
        }).find("backward() without a forward() call before it") != std::string::npos);
  CHECK(right() == "");
  said = "accepted";
  try {
    p.backward(
        own.x, own.choices, own.dy, {own.dx.data(), own.n, s.d}, own.dweights,
        [&](expert_id, matrix_view<const float>, matrix_view<const float>, matrix_view<float>) {
          if (mine) throw std::runtime_error("backwards");
        });
  } catch (const std::exception& e) {
    said = e.what();
  }
  CHECK(said == (mine ? "backwards" : named + "experts of layer 7: backwards"));
  CHECK(right() == "");

  // In one chunk of several, and in the weights' part.
  {
    mpi::expert_parallel<> q(MPI_COMM_WORLD, where,
                             {.layer = 8, .chunks = 3, .dispatch = mpi::dispatcher::rank_to_rank});
    struct throws_at_weights : gradient_in_two {
      bool mine;
      void weights(expert_id, matrix_view<const float>, matrix_view<const float>) const {
        if (mine) throw std::runtime_error("weights");
      }
    };
    // The first call ever: there are no results of an earlier one.
    said = test::refusal([&] {
      int call = 0;
      q.forward(own.x, own.choices, own.out(s.d),
                [&](expert_id slot, matrix_view<const float> in, matrix_view<float> out) {
                  if (mine && ++call == 2) fail("an expert", "the second call");
                  forward_of(experts, q)(slot, in, out);
                });
    });
    CHECK(said.find("an expert: the second call") != std::string::npos);
    q.forward(own.x, own.choices, own.out(s.d), forward_of(experts, q));
    said = "accepted";
    try {
      q.backward(own.x, own.choices, own.dy, {own.dx.data(), own.n, s.d}, own.dweights,
                 throws_at_weights{{experts, where.experts_of_rank(q.rank())}, mine});
    } catch (const std::exception& e) {
      said = e.what();
    }
    CHECK(said.find("weights") != std::string::npos);
    CHECK((mine || said.find(" failed in weights of experts of layer 8: ") != std::string::npos));
    q.forward(own.x, own.choices, own.out(s.d), forward_of(experts, q));
    CHECK(slice_difference(own.y, s.y, own.first * s.d) == "");
  }

  // A lost expert on the way: whose tokens ask for it says so, everybody throws.
  std::vector<expert_id> less(where.expert_of_slot().begin(), where.expert_of_slot().end());
  less[0] = no_expert;
  const placement lost(
      {.experts = where.experts(), .slot_offset = where.slot_offset(), .expert_of_slot = less});
  p.adopt(lost);
  CHECK(test::refusal([&] {
          p.forward(own.x, own.choices, own.out(s.d), forward_of(experts, p));
        }).find("which has no live slot") != std::string::npos);
  p.adopt(where);
  CHECK(right() == "");
  CHECK(!p.broken());
}

TEST_CASE("more rows than a rank will take are refused on every rank before they move") {
  const scene s = std::move(scenes()[0]);
  column_experts experts(s.choices.experts(), s.d);
  own_part own(s);
  mpi::expert_parallel<> p(MPI_COMM_WORLD, placement::contiguous(s.choices.experts(), world_size()),
                           {.exchange = {.most_rows = 1}});
  CHECK(test::refusal([&] {
          p.forward(own.x, own.choices, own.out(s.d), forward_of(experts, p));
        }).find("received rows is ") != std::string::npos);
  CHECK(!p.broken());
}

TEST_CASE("an option or a side input that is wrong on one rank is refused on every rank") {
  const scene s = std::move(scenes()[0]);
  const placement where = placement::contiguous(s.choices.experts(), world_size());
  const bool mine = world_rank() == world_size() - 1;
  const auto made = [&](const mpi::parallel_options& o) {
    return test::refusal([&] { mpi::expert_parallel<>(MPI_COMM_WORLD, where, o); });
  };
  CHECK(made({.chunks = mine ? 99 : 1}).find("chunks is 99") != std::string::npos);
  CHECK(made({.chunks = 2, .dispatch = mpi::dispatcher::all_gather})
            .find("chunks is 2, expected 1 to 1") != std::string::npos);
  CHECK(made({.gather_bytes = mine ? -1 : 1}).find("gather_bytes is -1") != std::string::npos);
  CHECK(made({.transport = {.deadline = mine ? 0.0 : 60.0}})
            .find(mine ? "deadline is 0" : "options of another rank are out of range") !=
        std::string::npos);
  if (world_size() > 1)
    CHECK(made({.transport = {.bytes_per_message = mine ? 64 : 128}})
              .find("on other ranks from 64 to 128") != std::string::npos);

  column_experts experts(s.choices.experts(), s.d);
  own_part own(s);
  mpi::expert_parallel<> p(MPI_COMM_WORLD, where);
  const rows shared(static_cast<std::size_t>((own.n + 1) * s.d), 1.0f);
  const auto with = [&](const matrix_view<const float>& v, std::span<const float> weight) {
    return test::refusal([&] {
      p.forward(own.x, own.choices, own.out(s.d), forward_of(experts, p), serial{}, {}, v, weight);
    });
  };
  const matrix_view<const float> fits(shared.data(), own.n, s.d),
      longer(shared.data(), own.n + 1, s.d);
  CHECK(with(mine ? longer : fits, {}).find("shared.rows() is ") != std::string::npos);
  const std::span<const float> ones(shared.data(), static_cast<std::size_t>(own.n + 1));
  CHECK(with(fits, mine ? ones : std::span<const float>()).find("shared_weight.size() is ") !=
        std::string::npos);

  // Another placement has no forward() call before it, a new one has none either.
  const auto goes_back = [&] {
    return test::refusal([&] {
      p.backward(
          own.x, own.choices, own.dy, {own.dx.data(), own.n, s.d}, own.dweights,
          [](expert_id, matrix_view<const float>, matrix_view<const float>, matrix_view<float>) {});
    });
  };
  const std::string none = "backward() without a forward() call before it";
  CHECK(with(fits, {}) == "accepted");
  p.adopt(where);
  CHECK(goes_back().find(none) != std::string::npos);
  p = mpi::expert_parallel<>(MPI_COMM_WORLD, where);
  CHECK(goes_back().find(none) != std::string::npos);
  CHECK(with(fits, {}) == "accepted");
}

TEST_CASE("what does not fit on one rank every rank refuses, by the same sentence") {
  const scene s = std::move(scenes()[0]);
  column_experts experts(s.choices.experts(), s.d);
  own_part own(s);
  const int bad = world_size() - 1;
  const bool mine = world_rank() == bad;
  const placement where = placement::contiguous(s.choices.experts(), world_size());
  mpi::expert_parallel<> p(MPI_COMM_WORLD, where, {.layer = 7});
  const index_t d = s.d, n = own.n, of_bad = tokens_of_rank(s.choices.tokens(), bad).second,
                choices_of_bad = of_bad * 3;
  const std::string here = "moeroute::expert_parallel: ", number = std::to_string(of_bad),
                    more = std::to_string(of_bad + 1);
  const auto says = [&](const char* phase, const std::string& sentence, auto&& call) {
    INFO(sentence);
    CHECK(test::refusal(call) == here +
                                     (mine ? ""
                                           : "rank " + std::to_string(bad) + " failed in " + phase +
                                                 " of layer 7: " + here) +
                                     sentence);
  };
  // Rows, columns and strides of what is wrong here alone.
  rows memory(static_cast<std::size_t>((n + 2) * (d + 2)), 1.0f);
  const auto shaped = [&](index_t high, index_t wide, index_t stride) {
    return matrix_view<float>(memory.data(), high, wide, stride);
  };
  struct call {
    matrix_view<const float> x, shared;
    matrix_view<float> y;
    const assignment* choices;
    std::size_t of_mask, of_weight;
  };
  test::random rng(8);
  const assignment other = test::fixed_choices(rng, n, 9, 3);
  const std::vector<std::uint8_t> mask(static_cast<std::size_t>(n + 1), 1);
  const auto forward = [&](auto&& change) {
    return [&, change] {
      call c{own.x, {}, own.out(d), &own.choices, 0, 0};
      if (mine) change(c);
      p.forward(c.x, *c.choices, c.y, forward_of(experts, p), serial{},
                std::span(mask).first(c.of_mask), c.shared, std::span(memory).first(c.of_weight));
    };
  };
  const std::string columns = std::to_string(d), wider = std::to_string(d + 1);
  says("checks", "choices.tokens() is " + number + ", expected " + more,
       forward([&](call& c) { c.x = shaped(n + 1, d, d); }));
  says("checks", "choices.experts() is 9, expected 8",
       forward([&](call& c) { c.choices = &other; }));
  says("checks", "y.rows() is " + more + ", expected " + number,
       forward([&](call& c) { c.y = shaped(n + 1, d, d); }));
  says("checks", "y.cols() is " + wider + ", expected " + columns,
       forward([&](call& c) { c.y = shaped(n, d + 1, d + 1); }));
  says("checks", "x.stride is 4, expected at least 5",
       forward([&](call& c) { c.x = shaped(n, d, d - 1); }));
  says("checks", "y.stride is 4, expected at least 5",
       forward([&](call& c) { c.y = shaped(n, d, d - 1); }));
  says("checks", "mask.size() is " + more + ", expected " + number,
       forward([&](call& c) { c.of_mask = mask.size(); }));
  says("checks", "shared.rows() is " + more + ", expected " + number,
       forward([&](call& c) { c.shared = shaped(n + 1, d, d); }));
  says("checks", "shared.cols() is " + wider + ", expected " + columns,
       forward([&](call& c) { c.shared = shaped(n, d + 1, d + 1); }));
  says("checks", "shared.stride is 4, expected at least 5",
       forward([&](call& c) { c.shared = shaped(n, d, d - 1); }));
  says("checks", "shared_weight.size() is " + more + ", expected " + number,
       forward([&](call& c) { c.of_weight = static_cast<std::size_t>(n + 1); }));

  struct back {
    matrix_view<const float> x, dy;
    matrix_view<float> dx;
    const assignment* choices;
    std::span<float> dweights;
  };
  const assignment fewer = test::fixed_choices(rng, n, 8, 2);
  const auto backward = [&](auto&& change) {
    forward([](call&) {})();
    return [&, change] {
      back b{own.x, own.dy, {own.dx.data(), n, d}, &own.choices, own.dweights};
      if (mine) change(b);
      p.backward(
          b.x, *b.choices, b.dy, b.dx, b.dweights,
          [](expert_id, matrix_view<const float>, matrix_view<const float>, matrix_view<float>) {});
    };
  };
  says("pack", "dy.rows() is " + more + ", expected " + number,
       backward([&](back& b) { b.dy = shaped(n + 1, d, d); }));
  says("pack", "dy.cols() is " + wider + ", expected " + columns,
       backward([&](back& b) { b.dy = shaped(n, d + 1, d + 1); }));
  says("pack", "choices.tokens() is " + number + ", expected " + more, backward([&](back& b) {
         b.x = shaped(n + 1, d, d);
         b.dy = b.x;
       }));
  says("pack",
       "choices.choices() is " + std::to_string(of_bad * 2) + ", expected " +
           std::to_string(choices_of_bad),
       backward([&](back& b) { b.choices = &fewer; }));
  says("pack", "dx.rows() is " + more + ", expected " + number,
       backward([&](back& b) { b.dx = shaped(n + 1, d, d); }));
  says("pack",
       "dweights.size() is " + std::to_string(choices_of_bad - 1) + ", expected " +
           std::to_string(choices_of_bad),
       backward([&](back& b) { b.dweights = b.dweights.first(b.dweights.size() - 1); }));
  CHECK(test::refusal([&] { p.adopt(placement::contiguous(8, world_size() + 1)); }) ==
        here + "placement.ranks() is " + std::to_string(world_size() + 1) + ", expected " +
            std::to_string(world_size()));
  CHECK(test::refusal([&] { p.adopt(placement::contiguous(9, world_size())); }) ==
        here + "placement.experts() is 9, expected 8");
  CHECK(!p.broken());

  // Options of a layer's exchange.
  const auto made = [&](const std::string& sentence, mpi::parallel_options o) {
    o.layer = 7;
    says("options", sentence, [&] {
      mpi::expert_parallel<>(MPI_COMM_WORLD, where, mine ? o : mpi::parallel_options{.layer = 7});
    });
  };
  const auto gathering = mpi::dispatcher::all_gather;
  made("chunks is 0, expected 1 to 16", {.chunks = 0});
  made("chunks is 17, expected 1 to 16", {.chunks = 17});
  made("chunks is 0, expected 1 to 1", {.chunks = 0, .dispatch = gathering});
  made("chunks is 2, expected 1 to 1", {.chunks = 2, .dispatch = gathering});
  made("gather_bytes is -1, expected 0 to 2147483647", {.gather_bytes = -1});
  made("gather_bytes is 2147483648, expected 0 to 2147483647", {.gather_bytes = index_t{1} << 31});
  for (const mpi::parallel_options& o :
       {mpi::parallel_options{.chunks = 16, .gather_bytes = 0x7fffffff},
        mpi::parallel_options{.dispatch = gathering, .gather_bytes = 0}})
    CHECK(test::refusal([&] { mpi::expert_parallel<>(MPI_COMM_WORLD, where, o); }) == "accepted");
  mpi::expert_parallel<> cut(MPI_COMM_WORLD, where,
                             {.exchange = {.rule = replica_rule::even}, .chunks = 2});
  CHECK(test::refusal([&] {
          cut.forward(own.x, own.choices, own.out(d), forward_of(experts, cut));
        }) == here + "chunks with a rule of counts is 2, expected 1");

  // And of messages.
  const auto carried = [&](const std::string& sentence, const mpi::transport_options& o) {
    INFO(sentence);
    CHECK(test::refusal([&] {
            mpi::transport(MPI_COMM_WORLD, mine ? o : mpi::transport_options{});
          }) == "moeroute::mpi: " +
                    (mine ? sentence : "transport options of another rank are out of range"));
  };
  for (const index_t bytes : {index_t{-1}, index_t{0}, index_t{1} << 31})
    carried("bytes_per_message is " + std::to_string(bytes) + ", expected 1 to 2147483647",
            {.bytes_per_message = bytes});
  carried("deadline is 0.000000, expected > 0", {.deadline = 0.0});
  carried("deadline is -1.000000, expected > 0", {.deadline = -1.0});
  carried("deadline is nan, expected > 0", {.deadline = std::nan("")});
  for (const index_t bytes : {index_t{1}, index_t{0x7fffffff}})
    CHECK(test::refusal([&] {
            mpi::transport(MPI_COMM_WORLD, {.deadline = HUGE_VAL, .bytes_per_message = bytes});
          }) == "accepted");
  if (world_size() > 1)
    CHECK(test::refusal([&] {
            mpi::transport(MPI_COMM_WORLD, {.bytes_per_message = mine ? 64 : 128});
          }) == "moeroute::mpi: bytes_per_message is " + std::string(mine ? "64" : "128") +
                    " here, on other ranks from 64 to 128: expected the same on all");
  const mpi::parallel_options usual;
  CHECK((usual.layer == 0 && usual.chunks == 1 && usual.gather_bytes == 8192 &&
         usual.dispatch == mpi::dispatcher::automatic && usual.transport.deadline == 300.0 &&
         usual.transport.bytes_per_message == index_t{1} << 29));
}

TEST_CASE("all ranks hear the greatest number and a rank's text, its first 200 characters") {
  mpi::transport t(MPI_COMM_WORLD);
  CHECK((t.rank() == world_rank() && t.ranks() == world_size() && !t.broken()));
  const std::int64_t me = world_rank(), last = world_size() - 1, large = std::int64_t{1} << 60;
  CHECK(t.max_of_all(me, {"numbers"}) == last);
  CHECK(t.max_of_all(-large - me, {"numbers"}) == -large);
  std::string all;
  for (int i = 0; i < 300; ++i) all += static_cast<char>('a' + i * 7 % 26);
  for (index_t root = 0; root <= last; ++root)
    for (const std::size_t n : {0, 1, 199, 200, 201, 300}) {
      const std::string own = world_rank() == root ? all.substr(0, n) : "not this";
      CHECK(t.text_of(root, own, {"text"}) == all.substr(0, std::min<std::size_t>(n, 200)));
    }
}

TEST_CASE("every field of a header that must agree is named where it differs") {
  const mpi::rank_header mine;
  CHECK(mpi::disagreement(mine, mine) == "");
  const auto said = [&](auto field) {
    mpi::rank_header other;
    ++(other.*field);
    return mpi::disagreement(mine, other);
  };
  using header = mpi::rank_header;
  CHECK(said(&header::magic) == "its messages are of another version");
  CHECK(said(&header::version) == "its messages are of another version");
  CHECK(said(&header::layer) == "the layer is 1 there and 0 here");
  CHECK(said(&header::sequence) == "the number of the call is 1 there and 0 here");
  CHECK(said(&header::phase).find("the phase ") == 0);
  CHECK(said(&header::d) == "d is 1 there and 0 here");
  CHECK(said(&header::type).find("the type of rows ") == 0);
  CHECK(said(&header::experts).find("the number of experts ") == 0);
  CHECK(said(&header::chunks).find("the number of chunks ") == 0);
  CHECK(said(&header::gather_bytes).find("gather_bytes ") == 0);
  CHECK(said(&header::flags).find("the rule, ") == 0);
  CHECK(said(&header::placement) == "its placement is another");
  CHECK(said(&header::machine) == "its instruction set is another");
  // What is each rank's own.
  CHECK(said(&header::tokens) == "");
  CHECK(said(&header::choices) == "");
}

TEST_CASE("ranks that disagree all refuse, by the name of what differs") {
  if (world_size() == 1) return;
  const scene s = std::move(scenes()[0]);
  column_experts experts(s.choices.experts(), s.d);
  own_part own(s);
  const bool mine = world_rank() == 0;
  const index_t e = s.choices.experts();
  const auto said = [&](const placement& where, const mpi::parallel_options& o, index_t d) {
    mpi::expert_parallel<> p(MPI_COMM_WORLD, where, o);
    rows x(static_cast<std::size_t>(own.n * d)), y = x;
    return test::refusal([&] {
      p.forward({x.data(), own.n, d}, own.choices, matrix_view<float>(y.data(), own.n, d),
                [](expert_id, matrix_view<const float>, matrix_view<float>) {});
    });
  };
  const placement flat = placement::contiguous(e, world_size());
  CHECK(said(flat, {}, mine ? 3 : 4).find(": d is ") != std::string::npos);
  CHECK(said(mine ? flat : placement::round_robin(e, world_size()), {}, 3)
            .find("its placement is another") != std::string::npos);
  CHECK(said(flat, {.layer = mine ? 1 : 2}, 3).find(": the layer is ") != std::string::npos);
  CHECK(said(flat, {.chunks = mine ? 1 : 2}, 3).find(": the number of chunks is ") !=
        std::string::npos);
  CHECK(said(flat, {.exchange = {.rule = mine ? replica_rule::nearest : replica_rule::only}}, 3)
            .find(": the rule, result, place of weights or dispatcher is ") != std::string::npos);
  CHECK(said(flat, {.dispatch = mine ? mpi::dispatcher::all_gather : mpi::dispatcher::automatic}, 3)
            .find("or dispatcher is ") != std::string::npos);
  CHECK(said(flat, {.gather_bytes = mine ? 1 : 2}, 3).find(": gather_bytes is ") !=
        std::string::npos);
  CHECK(said(flat, {.exchange = {.rule = mine ? replica_rule::nearest : replica_rule::even}}, 3)
            .find(": the phase ") != std::string::npos);
  // One forward, the others backward; and after it all go on.
  mpi::expert_parallel<> p(MPI_COMM_WORLD, flat);
  p.forward(own.x, own.choices, own.out(s.d), forward_of(experts, p));
  const std::string order = test::refusal([&] {
    if (mine)
      p.forward(own.x, own.choices, own.out(s.d), forward_of(experts, p));
    else
      p.backward(
          own.x, own.choices, own.dy, {own.dx.data(), own.n, s.d}, own.dweights,
          [](expert_id, matrix_view<const float>, matrix_view<const float>, matrix_view<float>) {});
  });
  CHECK(order.find(": the phase ") != std::string::npos);
  p.forward(own.x, own.choices, own.out(s.d), forward_of(experts, p));
  CHECK(slice_difference(own.y, s.y, own.first * s.d) == "");
  CHECK(test::refusal([&] {
          mpi::expert_parallel<>(MPI_COMM_WORLD, placement::contiguous(e, world_size() + 1));
        }).find("moeroute::expert_parallel: placement.ranks() is ") == 0);
}

TEST_CASE("two exchanges and two threads per rank do not mix") {
  const std::vector<scene> all = scenes();
  const scene &s = all[0], &t = all[1];
  column_experts of_s(s.choices.experts(), s.d), of_t(t.choices.experts(), t.d);
  own_part a(s), b(t);
  mpi::expert_parallel<> p(MPI_COMM_WORLD, placement::contiguous(s.choices.experts(), world_size()),
                           {.layer = 1, .chunks = 2});
  mpi::expert_parallel<> q(MPI_COMM_WORLD, placement::contiguous(t.choices.experts(), world_size()),
                           {.layer = 2});
  for (int i = 0; i < 4; ++i) {
    p.forward(a.x, a.choices, a.out(s.d), forward_of(of_s, p), openmp{2});
    q.forward(b.x, b.choices, b.out(t.d), forward_of(of_t, q), openmp{2});
  }
  CHECK(slice_difference(a.y, s.y, a.first * s.d) == "");
  CHECK(slice_difference(b.y, t.y, b.first * t.d) == "");
}

TEST_CASE("a layer over ranks gives the bits of a layer on one") {
  constexpr index_t experts = 8, d = 16, ff = 8, k = 2, tokens = 40;
  const index_t ranks = world_size();
  const rows gate = random_rows(experts * d, 1), w = random_rows(experts * 3 * d * ff, 2),
             x = random_rows(tokens * d, 3);
  const auto fill = [&](swiglu_experts<>& net, index_t slot, index_t e) {
    const float* const own = w.data() + e * 3 * d * ff;
    net.set_gate(static_cast<expert_id>(slot), {own, ff, d});
    net.set_up(static_cast<expert_id>(slot), {own + d * ff, ff, d});
    net.set_down(static_cast<expert_id>(slot), {own + 2 * d * ff, d, ff});
  };
  const router<softmax> r{.selection = {.k = k}};
  rows expected(x.size()), y;
  {
    swiglu_experts<> net(experts, d, ff);
    for (index_t e = 0; e < experts; ++e) fill(net, e, e);
    moe_layer<router<softmax>, swiglu_experts<>> one(
        simd::packed_matrix<float>(matrix_view<const float>(gate.data(), experts, d)), r,
        std::move(net));
    one.forward(matrix_view<const float>(x.data(), tokens, d),
                matrix_view<float>(expected.data(), tokens, d));
  }
  const placement where = placement::contiguous(experts, ranks);
  swiglu_experts<> own(std::max<index_t>(1, where.slots(world_rank())), d, ff);
  for (index_t s = 0; s < where.slots(world_rank()); ++s)
    fill(own, s, where.experts_of_rank(world_rank())[static_cast<std::size_t>(s)]);
  mpi::expert_parallel_layer<router<softmax>, swiglu_experts<>> layer(
      MPI_COMM_WORLD, simd::packed_matrix<float>(matrix_view<const float>(gate.data(), experts, d)),
      r, std::move(own), where);
  const index_t first = tokens * world_rank() / ranks,
                n = tokens * (world_rank() + 1) / ranks - first;
  y.resize(static_cast<std::size_t>(n * d));
  layer.forward(matrix_view<const float>(x.data() + first * d, n, d),
                matrix_view<float>(y.data(), n, d));
  CHECK(slice_difference(y, expected, first * d) == "");
}

TEST_CASE("ranks whose rows are of different types are refused on all of them") {
  if (world_size() == 1) return;
  const placement where = placement::contiguous(world_size(), world_size());
  const auto said = [&]<class T>(T) {
    mpi::expert_parallel<T> p(MPI_COMM_WORLD, where);
    const std::vector<T> x{T(1.0f)};
    rows y(1);
    assignment next;
    next.reset(1, world_size(), 1);
    next.ids()[0] = static_cast<expert_id>((world_rank() + 1) % world_size());
    next.weights()[0] = 1.0f;
    return test::refusal([&] {
      p.forward(matrix_view<const T>(x.data(), 1, 1), next, matrix_view<float>(y.data(), 1, 1),
                [](expert_id, auto, auto) {});
    });
  };
  const std::string sentence = world_rank() == 0 ? said(bfloat16{}) : said(float16{});
  CHECK(sentence.find("the type of rows is ") != std::string::npos);
}

TEST_CASE("what a rank's router refuses is refused on every rank, also by one without tokens") {
  const int ranks = world_size(), bad = ranks - 1;
  const rows one(1, 1.0f), gate(static_cast<std::size_t>(ranks), 0.5f);
  const std::vector<std::uint8_t> mask(1, 1);
  swiglu_experts<> own(1, 1, 1);
  const matrix_view<const float> w(one.data(), 1, 1);
  own.set_gate(0, w);
  own.set_up(0, w);
  own.set_down(0, w);
  mpi::expert_parallel_layer<router<softmax>, swiglu_experts<>> layer(
      MPI_COMM_WORLD, simd::packed_matrix<float>(matrix_view<const float>(gate.data(), ranks, 1)),
      router<softmax>{.selection = {.k = 1}}, std::move(own), placement::contiguous(ranks, ranks));
  const index_t tokens = world_rank() == bad ? 0 : 1;
  rows y(1);
  CHECK(test::refusal([&] {
          layer.forward(matrix_view<const float>(one.data(), tokens, 1),
                        matrix_view<float>(y.data(), tokens, 1),
                        world_rank() == bad ? side_inputs{.mask = mask} : side_inputs{});
        }) != "accepted");
}

// Last: what is broken stays broken.
TEST_CASE("a rank that stops is named after the deadline, and the exchange is broken") {
  if (world_size() == 1) return;
  const scene s = std::move(scenes()[0]);
  column_experts experts(s.choices.experts(), s.d);
  own_part own(s);
  mpi::expert_parallel<> p(MPI_COMM_WORLD, placement::contiguous(s.choices.experts(), world_size()),
                           {.transport = {.deadline = 2.0}, .layer = 3});
  p.forward(own.x, own.choices, own.out(s.d), forward_of(experts, p));
  const int bad = world_size() - 1;
  const int mine = static_cast<int>(getpid());
  std::vector<int> pid(static_cast<std::size_t>(world_size()));
  MPI_Allgather(&mine, 1, MPI_INT, pid.data(), 1, MPI_INT, MPI_COMM_WORLD);
  if (world_rank() == bad) raise(SIGSTOP);
  if (world_rank() == 0) usleep(300000);  // the child has stopped
  const auto began = std::chrono::steady_clock::now();
  const std::string said =
      test::refusal([&] { p.forward(own.x, own.choices, own.out(s.d), forward_of(experts, p)); });
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  if (world_rank() != bad) {
    CHECK(said == "moeroute::expert_parallel: rank " + std::to_string(bad) +
                      " did not arrive within 2.0 s (layer 3, forward, header)");
    CHECK(seconds < 60.0);  // it did not wait for the rank that stopped
    CHECK(p.broken());
    CHECK(test::refusal(
              [&] { p.forward(own.x, own.choices, own.out(s.d), forward_of(experts, p)); }) ==
          "moeroute::expert_parallel: broken: an earlier call of MPI failed or a rank did not "
          "arrive");
  }
  if (world_rank() == 0) kill(pid[static_cast<std::size_t>(bad)], SIGCONT);
  MPI_Barrier(MPI_COMM_WORLD);
}

TEST_CASE("a rank that stops to take part is waited for until the deadline, no longer") {
  if (world_size() == 1) return;
  mpi::transport t(MPI_COMM_WORLD, {.deadline = 2.0});
  const int bad = world_size() - 1;
  // What may still arrive.
  static std::byte room[8];
  if (world_rank() != bad) {
    // Where there are others rank 0 waits for messages of all of them, lost twice each.
    mpi::transport::pending p;
    std::string who;
    for (int turn = 0; turn < 2 && world_rank() == 0 && bad > 1; ++turn)
      for (int r = bad; r > 0; --r)
        t.receive(p, std::span(room).subspan(static_cast<std::size_t>(2 * r + turn), 1), r,
                  1 + turn);
    for (int r = 1; r <= bad; ++r) who += (r > 1 ? ", " : "") + std::to_string(r);
    const bool messages = !p.done();
    CHECK(test::refusal([&] {
            if (messages)
              t.wait(p, {"rows", "forward", 5});
            else
              t.max_of_all(1, {"meeting"});
          }) == "moeroute::expert_parallel: " +
                    (messages
                         ? "ranks " + who + " did not arrive within 2.0 s (layer 5, forward, rows)"
                         : std::string("a rank did not arrive within 2.0 s (meeting)")));
    CHECK(t.broken());
    const std::string broken =
        "moeroute::mpi: the communicator is broken: an earlier call of MPI failed or a rank did "
        "not arrive";
    mpi::transport::pending none;
    const std::span<std::byte> one(room, 1);
    CHECK(test::refusal([&] { t.max_of_all(1, {}); }) == broken);
    CHECK(test::refusal([&] { t.text_of(0, "", {}); }) == broken);
    CHECK(test::refusal([&] { t.all_gather(one, {1}, {0}, one, {}); }) == broken);
    CHECK(test::refusal([&] { t.send(none, one, 0, 1); }) == broken);
    CHECK(test::refusal([&] { t.receive(none, one, 0, 1); }) == broken);
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

// Run alone, where mpirun lets the others live on: nothing else of MPI works afterwards.
TEST_CASE("a rank that is killed is named after the deadline", "[.killed]") {
  if (world_size() == 1) return;
  const scene s = std::move(scenes()[0]);
  column_experts experts(s.choices.experts(), s.d);
  own_part own(s);
  mpi::expert_parallel<> p(MPI_COMM_WORLD, placement::contiguous(s.choices.experts(), world_size()),
                           {.transport = {.deadline = 2.0}, .layer = 3});
  p.forward(own.x, own.choices, own.out(s.d), forward_of(experts, p));
  if (world_rank() == world_size() - 1) raise(SIGKILL);
  const std::string said =
      test::refusal([&] { p.forward(own.x, own.choices, own.out(s.d), forward_of(experts, p)); });
  std::printf("rank %d says: %s, broken %d\n", world_rank(), said.c_str(), p.broken() ? 1 : 0);
  std::fflush(stdout);
  std::_Exit(0);
}

// Before MPI runs and after.
bool refuses_without_mpi() {
  return test::refusal([] { mpi::transport(MPI_COMM_WORLD, {}); }) ==
         "moeroute::mpi: MPI is not running: call MPI_Init first";
}

int main(int argc, char** argv) {
  int given = 0;
  const bool before = refuses_without_mpi();
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &given);
  int verdict = before ? 0 : 1;
  if (!before) std::fprintf(stderr, "a transport was made before MPI_Init\n");
  {
    Catch::Session session;
    if (session.applyCommandLine(argc, argv) != 0) verdict = 1;
    // Rank 0 speaks; another rank only where it has something to complain about.
    if (world_rank() != 0) session.configData().defaultOutputFilename = "%debug";
    if (verdict == 0) verdict = session.run() == 0 ? 0 : 1;
  }
  if (verdict != 0) std::fprintf(stderr, "rank %d of %d: failed\n", world_rank(), world_size());
  int all = 0;
  MPI_Allreduce(&verdict, &all, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  if (world_rank() == 0)
    std::printf("%d ranks: %s\n", world_size(), all == 0 ? "passed" : "FAILED");
  MPI_Finalize();
  return all == 0 && refuses_without_mpi() ? 0 : 1;
}

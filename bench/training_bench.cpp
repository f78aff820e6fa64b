// Backward passes: the moves of rows, the gate, the way back through routing, and a whole layer.
#include <cmath>
#include <string>
#include <vector>

#include <moeroute/layer/moe_layer_backward.hpp>
#include <moeroute/layer/swiglu_backward.hpp>
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/route.hpp>

#include "support/contest.hpp"
#include "support/floors.hpp"
#include "support/moving.hpp"

namespace {

using bench::index_t;
using matrix = moeroute::row_matrix<float>;
using moeroute::const_view;
using moeroute::gradient_to;
using moeroute::matrix_view;
using softmax_router = moeroute::router<moeroute::softmax>;

std::string part(const char* letter, index_t n) {
  return std::string("/") + letter + ":" + std::to_string(n);
}

// Turns of whole calls.
template <class F>
bench::turn whole(index_t tokens, F call) {
  return [=](bench::stopwatch& watch) { watch.time(tokens, call); };
}

// Turns in pieces of about a quarter megabyte of slots, as the moves forward are measured.
template <class F>
bench::turn by_tokens(index_t tokens, index_t bytes_per_token, F f) {
  const auto piece = std::max<index_t>(1, (index_t{1} << 18) / bytes_per_token);
  return
      [=](bench::stopwatch& watch) { bench::timed_pieces{&watch}.parallel_for(tokens, piece, f); };
}

// --- combine and dispatch --------------------------------------------------------------------

template <class T>
struct moved {
  index_t tokens, d, k;
  moeroute::assignment choices;
  moeroute::dispatch_plan plan;
  moeroute::buffer<T> x, slots, dy;
  moeroute::buffer<T> dslots;

  moved(index_t t, index_t width, index_t experts, index_t best)
      : tokens(t), d(width), k(best), choices(bench::make_assignment("normal", t, experts, best)) {
    moeroute::plan(choices, plan);
    x = bench::hidden_states<T>(tokens, d);
    slots = bench::hidden_states<T>(tokens * k, d);
    dy = bench::hidden_states<T>(tokens, d);
    dslots = bench::hidden_states<T>(tokens * k, d);
  }
  matrix_view<T> x_rows() { return {x.data(), tokens, d}; }
  matrix_view<T> dy_rows() { return {dy.data(), tokens, d}; }
  matrix_view<T> slot_rows() { return {slots.data(), tokens * k, d}; }
  matrix_view<T> dslot_rows() { return {dslots.data(), tokens * k, d}; }
  index_t slot_bytes() const { return d * static_cast<index_t>(sizeof(T)) * k; }
};

// The floor reads slots and dy and writes dslots, in order: a memcpy and a read.
template <class T>
void combine_backward(benchmark::State& state, index_t tokens, index_t d) {
  constexpr index_t experts = 64, k = 8;
  moved<T> rows(tokens, d, experts, k);
  std::vector<float> dweights(static_cast<std::size_t>(tokens * k));
  std::int32_t kept = 0;
  std::vector<bench::competitor> list;
  list.push_back({"ours", bench::in_pieces(tokens, [&](const auto& exec) {
                    moeroute::combine_backward(
                        rows.slot_rows(), rows.plan, rows.choices, rows.dy_rows(),
                        moeroute::combine_gradients<T, float>{rows.dslot_rows(), dweights}, exec);
                  })});
  list.push_back({"floor", by_tokens(tokens, rows.slot_bytes(), [&](index_t first, index_t end) {
                    std::memcpy(static_cast<void*>(rows.dslots.data() + first * k * d),
                                rows.slots.data() + first * k * d,
                                static_cast<std::size_t>((end - first) * rows.slot_bytes()));
                    kept |= bench::read_pass(rows.dy.data() + first * d,
                                             (end - first) * rows.slot_bytes() / k);
                    benchmark::DoNotOptimize(kept);
                  })});
  bench::compete(state, 2.0 * static_cast<double>(rows.slot_bytes()), std::move(list));
}

template <class T>
void dispatch_backward(benchmark::State& state, index_t tokens, index_t d) {
  constexpr index_t experts = 64, k = 8;
  moved<T> rows(tokens, d, experts, k);
  moeroute::buffer<T> dx = bench::hidden_states<T>(tokens, d);
  std::int32_t kept = 0;
  std::vector<bench::competitor> list;
  list.push_back({"ours", bench::in_pieces(tokens, [&](const auto& exec) {
                    moeroute::dispatch_backward(rows.dslot_rows(), rows.plan, gradient_to::write,
                                                matrix_view<T>{dx.data(), tokens, d}, exec);
                  })});
  list.push_back({"floor", by_tokens(tokens, rows.slot_bytes(), [&](index_t first, index_t end) {
                    kept |= bench::read_pass(rows.dslots.data() + first * k * d,
                                             (end - first) * rows.slot_bytes());
                    benchmark::DoNotOptimize(kept);
                  })});
  bench::compete(state, static_cast<double>(rows.slot_bytes()), std::move(list));
}

// --- the way back through routing ------------------------------------------------------------

// combine, dispatch and weigh backward beside route, dispatch and combine.
template <class T>
void routing_backward(benchmark::State& state, index_t tokens, index_t d) {
  constexpr index_t experts = 64, k = 8;
  moved<T> rows(tokens, d, experts, k);
  const softmax_router router{{}, {.k = k}, moeroute::sum_normalized};
  const matrix logits = matrix::Random(tokens, experts);
  matrix dlogits(tokens, experts);
  moeroute::workspace ws;
  moeroute::route(router, const_view(logits), ws, rows.choices);
  moeroute::plan(rows.choices, rows.plan);
  std::vector<float> dweights(static_cast<std::size_t>(tokens * k));
  moeroute::buffer<T> dx = bench::hidden_states<T>(tokens, d),
                      y = bench::hidden_states<T>(tokens, d);
  std::vector<bench::competitor> list;
  list.push_back({"ours", whole(tokens, [&] {
                    moeroute::combine_backward(
                        rows.slot_rows(), rows.plan, rows.choices, rows.dy_rows(),
                        moeroute::combine_gradients<T, float>{rows.dslot_rows(), dweights});
                    moeroute::dispatch_backward(rows.dslot_rows(), rows.plan, gradient_to::write,
                                                matrix_view<T>{dx.data(), tokens, d});
                    moeroute::weigh_backward<softmax_router, float>(
                        router, const_view(logits), {}, rows.choices, dweights, gradient_to::write,
                        moeroute::view(dlogits), ws);
                  })});
  list.push_back({"forward", whole(tokens, [&] {
                    moeroute::route(router, const_view(logits), ws, rows.choices);
                    moeroute::dispatch(rows.x_rows(), rows.plan, rows.slot_rows());
                    moeroute::combine(rows.slot_rows(), rows.plan, rows.choices,
                                      matrix_view<T>{y.data(), tokens, d});
                  })});
  bench::compete(state, 4.0 * static_cast<double>(rows.slot_bytes()), std::move(list));
}

// weigh_backward beside route: softmax over all, or over the selected.
void weigh_backward(benchmark::State& state, index_t tokens, index_t experts, bool divided) {
  constexpr index_t k = 8;
  softmax_router router{{}, {.k = k}};
  if (divided) router.weight = moeroute::sum_normalized;
  const matrix logits = matrix::Random(tokens, experts);
  matrix dlogits(tokens, experts);
  moeroute::workspace ws, routing;
  moeroute::assignment choices;
  moeroute::route(router, const_view(logits), routing, choices);
  const std::vector<float> dweights(static_cast<std::size_t>(tokens * k), 0.5f);
  std::vector<bench::competitor> list;
  list.push_back({"ours", whole(tokens, [&] {
                    moeroute::weigh_backward<softmax_router, float>(
                        router, const_view(logits), {}, choices, dweights, gradient_to::write,
                        moeroute::view(dlogits), ws);
                  })});
  list.push_back({"forward", whole(tokens, [&] {
                    moeroute::route(router, const_view(logits), routing, choices);
                  })});
  bench::compete(state, 8.0 * static_cast<double>(experts), std::move(list));
}

// --- gate ------------------------------------------------------------------------------------

void gate_backward(benchmark::State& state, index_t tokens, index_t d, index_t experts) {
  const matrix x = matrix::Random(tokens, d), weight = matrix::Random(experts, d),
               dlogits = matrix::Random(tokens, experts);
  const moeroute::simd::packed_matrix<> packed(const_view(weight));
  matrix dx(tokens, d), dweight(experts, d), logits(tokens, experts), plain_dx(tokens, d),
      plain_dweight(experts, d);
  std::vector<bench::competitor> list;
  list.push_back({"ours", whole(tokens, [&] {
                    moeroute::gate_backward(
                        const_view(x), const_view(weight), const_view(dlogits),
                        moeroute::gate_gradients<>{gradient_to::write, moeroute::view(dx),
                                                   moeroute::view(dweight)});
                  })});
  list.push_back({"gemms", whole(tokens, [&] {
                    moeroute::simd::gemm(const_view(x), packed, moeroute::view(logits));
                    benchmark::DoNotOptimize(logits.data());
                    moeroute::simd::gemm(const_view(x), packed, moeroute::view(logits));
                  })});
  list.push_back({"baseline", whole(tokens, [&] {
                    plain_dx.noalias() = dlogits * weight;
                    plain_dweight.noalias() = dlogits.transpose() * x;
                  })});
  bench::compete(state, static_cast<double>(8 * d), std::move(list));
  state.counters["gflops"] =
      4.0 * static_cast<double>(experts * d) / static_cast<double>(state.counters["ns_per_token"]);
  if (!(dx - plain_dx).isZero(1e-3f) || !(dweight - plain_dweight).isZero(1e-3f))
    state.SkipWithError("differs from Eigen's products");
}

// --- layer -----------------------------------------------------------------------------------

// Forward and backward of a layer in Eigen's words: a loop over experts that gathers rows,
// multiplies, and adds up. Activations are kept between the two.
struct plain_layer {
  index_t tokens, d, ff, experts, k;
  matrix gate, up, down, router;  // [E ff, d] twice, [E d, ff], [E, d]
  matrix dgate, dup, ddown, drouter;
  struct kept {
    std::vector<index_t> choice;
    matrix in, g, u, h, out;
  };
  std::vector<kept> tape;
  matrix dlogits;

  void step(const matrix& x, const matrix& dy, matrix& y, matrix& dx) {
    const matrix logits = x * router.transpose();
    std::vector<index_t> id(static_cast<std::size_t>(tokens * k)), order;
    std::vector<float> weight(id.size()), dweight(id.size());
    tape.resize(static_cast<std::size_t>(experts));
    for (kept& one : tape) one.choice.clear();
    for (index_t t = 0; t < tokens; ++t) {
      order.resize(static_cast<std::size_t>(experts));
      for (index_t e = 0; e < experts; ++e) order[static_cast<std::size_t>(e)] = e;
      std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](index_t a, index_t b) {
        return logits(t, a) != logits(t, b) ? logits(t, a) > logits(t, b) : a < b;
      });
      float sum = 0.0f;
      for (index_t c = 0; c < k; ++c) {
        const auto at = static_cast<std::size_t>(t * k + c);
        id[at] = order[static_cast<std::size_t>(c)];
        sum += weight[at] = std::exp(logits(t, id[at]) - logits(t, order[0]));
        tape[static_cast<std::size_t>(id[at])].choice.push_back(t * k + c);
      }
      for (index_t c = 0; c < k; ++c) weight[static_cast<std::size_t>(t * k + c)] /= sum;
    }
    y.setZero();
    for (index_t e = 0; e < experts; ++e) {
      kept& one = tape[static_cast<std::size_t>(e)];
      const auto n = static_cast<index_t>(one.choice.size());
      one.in.resize(n, d);
      for (index_t r = 0; r < n; ++r)
        one.in.row(r) = x.row(one.choice[static_cast<std::size_t>(r)] / k);
      one.g.noalias() = one.in * gate.middleRows(e * ff, ff).transpose();
      one.u.noalias() = one.in * up.middleRows(e * ff, ff).transpose();
      one.h = one.g.array() / (1.0f + (-one.g.array()).exp()) * one.u.array();
      one.out.noalias() = one.h * down.middleRows(e * d, d).transpose();
      for (index_t r = 0; r < n; ++r) {
        const index_t c = one.choice[static_cast<std::size_t>(r)];
        y.row(c / k) += weight[static_cast<std::size_t>(c)] * one.out.row(r);
      }
    }
    dx.setZero();
    matrix dout, dh, dg, du, din;
    for (index_t e = 0; e < experts; ++e) {
      kept& one = tape[static_cast<std::size_t>(e)];
      const auto n = static_cast<index_t>(one.choice.size());
      dout.resize(n, d);
      for (index_t r = 0; r < n; ++r) {
        const index_t c = one.choice[static_cast<std::size_t>(r)];
        dout.row(r) = weight[static_cast<std::size_t>(c)] * dy.row(c / k);
        dweight[static_cast<std::size_t>(c)] = dy.row(c / k).dot(one.out.row(r));
      }
      dh.noalias() = dout * down.middleRows(e * d, d);
      ddown.middleRows(e * d, d).noalias() += dout.transpose() * one.h;
      const auto s = (1.0f / (1.0f + (-one.g.array()).exp())).eval();
      du = dh.array() * one.g.array() * s;
      dg = dh.array() * one.u.array() * (s + one.g.array() * s * (1.0f - s));
      dgate.middleRows(e * ff, ff).noalias() += dg.transpose() * one.in;
      dup.middleRows(e * ff, ff).noalias() += du.transpose() * one.in;
      din.noalias() = dg * gate.middleRows(e * ff, ff);
      din.noalias() += du * up.middleRows(e * ff, ff);
      for (index_t r = 0; r < n; ++r)
        dx.row(one.choice[static_cast<std::size_t>(r)] / k) += din.row(r);
    }
    dlogits.setZero(tokens, experts);
    for (index_t t = 0; t < tokens; ++t) {
      float mean = 0.0f;
      for (index_t c = t * k; c < (t + 1) * k; ++c)
        mean += weight[static_cast<std::size_t>(c)] * dweight[static_cast<std::size_t>(c)];
      for (index_t c = t * k; c < (t + 1) * k; ++c)
        dlogits(t, id[static_cast<std::size_t>(c)]) =
            weight[static_cast<std::size_t>(c)] * (dweight[static_cast<std::size_t>(c)] - mean);
    }
    dx.noalias() += dlogits * router;
    drouter.noalias() += dlogits.transpose() * x;
  }
};

// An expert function that leaves the weights where they are.
struct expert_function {
  const moeroute::swiglu_experts<>* list;
  index_t scratch_floats() const { return list->scratch_floats(); }
  index_t kept_floats() const { return list->kept_floats(); }
  void operator()(moeroute::expert_id e, matrix_view<const float> in, matrix_view<float> out,
                  float* memory) const {
    (*list)(e, in, out, memory);
  }
  void operator()(moeroute::expert_id e, matrix_view<const float> in, matrix_view<float> out,
                  matrix_view<float> kept, float* memory) const {
    (*list)(e, in, out, kept, memory);
  }
};

void layer_step(benchmark::State& state, index_t tokens, index_t d, index_t ff, index_t experts,
                index_t k) {
  plain_layer plain{.tokens = tokens, .d = d, .ff = ff, .experts = experts, .k = k};
  plain.gate = 0.05f * matrix::Random(experts * ff, d);
  plain.up = 0.05f * matrix::Random(experts * ff, d);
  plain.down = 0.05f * matrix::Random(experts * d, ff);
  plain.router = matrix::Random(experts, d);
  plain.dgate = plain.dup = matrix::Zero(experts * ff, d);
  plain.ddown = matrix::Zero(experts * d, ff);
  plain.drouter = matrix::Zero(experts, d);
  const matrix x = matrix::Random(tokens, d), dy = matrix::Random(tokens, d);
  matrix y(tokens, d), dx(tokens, d), plain_y(tokens, d), plain_dx(tokens, d);
  matrix dgate = plain.dgate, dup = plain.dup, ddown = plain.ddown, drouter = plain.drouter;

  moeroute::swiglu_experts<> ffn(experts, d, ff);
  for (index_t e = 0; e < experts; ++e) {
    const auto id = static_cast<moeroute::expert_id>(e);
    ffn.set_gate(id, const_view(plain.gate).middle_rows(e * ff, ff));
    ffn.set_up(id, const_view(plain.up).middle_rows(e * ff, ff));
    ffn.set_down(id, const_view(plain.down).middle_rows(e * d, d));
  }
  moeroute::moe_layer<softmax_router, expert_function> layer(
      moeroute::simd::packed_matrix<>(const_view(plain.router)),
      softmax_router{{}, {.k = k}, moeroute::sum_normalized}, expert_function{&ffn});
  const moeroute::swiglu_matrices<const float> weights{const_view(plain.gate), const_view(plain.up),
                                                       const_view(plain.down)};
  const moeroute::swiglu_matrices<float> gradients{moeroute::view(dgate), moeroute::view(dup),
                                                   moeroute::view(ddown)};
  moeroute::layer_tape tape, again;
  tape.keep_activations = true;
  const auto step = [&](moeroute::layer_tape& with) {
    layer.forward(x, y, {}, moeroute::serial{}, with);
    moeroute::backward(
        layer, x, {}, with, dy, moeroute::layer_weights<>{const_view(plain.router)},
        moeroute::swiglu_backward<>(ffn, weights, gradients),
        moeroute::layer_gradients{
            .to = gradient_to::add, .x = moeroute::view(dx), .gate = moeroute::view(drouter)});
  };
  const auto ours = [&] { step(tape); };
  ours();
  plain.step(x, dy, plain_y, plain_dx);
  const auto near = [](const matrix& a, const matrix& b) {
    return (a - b).cwiseAbs().maxCoeff() <= 1e-3f * (1.0f + b.cwiseAbs().maxCoeff());
  };
  dx.setZero();
  ours();
  if (!near(y, plain_y) || !near(dx, plain_dx)) state.SkipWithError("differs from Eigen's loops");
  std::vector<bench::competitor> list;
  list.push_back({"ours", whole(tokens, ours)});
  list.push_back({"baseline", whole(tokens, [&] { plain.step(x, dy, plain_y, plain_dx); })});
  list.push_back({"again", whole(tokens, [&] { step(again); })});
  bench::compete(state, static_cast<double>(8 * d), std::move(list));
  // Three products of each size: the activations that are computed again do not count.
  const double flops = 6.0 * static_cast<double>(experts * d + 3 * k * d * ff);
  state.counters["gflops"] = flops / static_cast<double>(state.counters["ns_per_token"]);
  state.counters["baseline_gflops"] =
      flops / static_cast<double>(state.counters["baseline_ns_per_token"]);
}

// --- the list --------------------------------------------------------------------------------

template <class T>
void add_moves(index_t tokens, index_t d) {
  const std::string shape = part("T", tokens) + part("d", d) + "/k:8/dtype:" + bench::name_of<T>();
  bench::entry("combine_backward" + shape,
               [=](benchmark::State& state) { combine_backward<T>(state, tokens, d); });
  bench::entry("dispatch_backward" + shape,
               [=](benchmark::State& state) { dispatch_backward<T>(state, tokens, d); });
  bench::entry("routing_backward" + shape,
               [=](benchmark::State& state) { routing_backward<T>(state, tokens, d); });
}

const bool registered = [] {
  for (const index_t d : {2048, 7168})
    for (const index_t tokens : {64, 1024}) {
      add_moves<float>(tokens, d);
      add_moves<moeroute::bfloat16>(tokens, d);
    }
  for (const index_t experts : {64, 256})
    for (const bool divided : {true, false})
      bench::entry(std::string("weigh_backward/") + (divided ? "selected" : "all") +
                       part("T", 1024) + part("E", experts) + "/k:8",
                   [=](benchmark::State& state) { weigh_backward(state, 1024, experts, divided); });
  for (const index_t experts : {64, 256})
    bench::entry("gate_backward" + part("T", 1024) + part("d", 2048) + part("E", experts),
                 [=](benchmark::State& state) { gate_backward(state, 1024, 2048, experts); });
  for (const index_t tokens : {64, 1024})
    bench::entry("layer_step" + part("T", tokens) + part("d", 1024) + part("ff", 512) +
                     part("E", 64) + part("k", 8),
                 [=](benchmark::State& state) { layer_step(state, tokens, 1024, 512, 64, 8); });
  return true;
}();

}  // namespace

// Gates beside the linear one, each beside the same by Eigen's products; and a layer of a router
// that looks at no logit, without a gate beside with one.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <moeroute/layer/moe_layer.hpp>
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/policy/row/random_choice.hpp>
#include <moeroute/stage/gates/codebook.hpp>
#include <moeroute/stage/gates/cosine.hpp>
#include <moeroute/stage/gates/mixing.hpp>
#include <moeroute/stage/gates/mlp.hpp>
#include <moeroute/stage/gates/normalized.hpp>

#include "support/contest.hpp"
#include "support/floors.hpp"

namespace {

using bench::index_t;
using matrix = moeroute::row_matrix<float>;

constexpr index_t d = 2048, experts = 64;

std::string part(const char* letter, index_t n) {
  return std::string("/") + letter + ":" + std::to_string(n);
}
moeroute::simd::packed_matrix<> packed(const matrix& w) {
  return moeroute::simd::packed_matrix<>(moeroute::const_view(w));
}

// plain(x, logits) is the same by Eigen; products are the multiply-adds per token.
template <class G, class Plain>
void compare(benchmark::State& state, index_t tokens, const G& gate, Plain&& plain,
             index_t products, float tolerance) {
  const matrix x = matrix::Random(tokens, d);
  matrix logits(tokens, gate.columns()), expected(tokens, gate.columns());
  moeroute::workspace ws;
  const auto whole = [tokens](auto call) -> bench::turn {
    return [=](bench::stopwatch& watch) {
      for (int i = 0; i < 3; ++i) watch.time(tokens, call);
    };
  };
  std::vector<bench::competitor> list;
  list.push_back({"ours", whole([&] {
                    if constexpr (moeroute::gate_function<G>) {
                      moeroute::gate(x, gate, logits);
                    } else {
                      moeroute::gate(x, gate, logits, ws);
                    }
                  })});
  list.push_back(
      {"floor", whole([&] { benchmark::DoNotOptimize(bench::multiply_adds(tokens * products)); })});
  list.push_back({"baseline", whole([&] { plain(x, expected); })});
  bench::compete(state, static_cast<double>(d * 4), std::move(list));
  if (!(logits - expected).isZero(tolerance)) state.SkipWithError("differs from Eigen's");
}

void normalize(matrix& rows) {
  for (index_t r = 0; r < rows.rows(); ++r) rows.row(r) /= rows.row(r).norm();
}
void softmax(matrix& z) {
  for (index_t r = 0; r < z.rows(); ++r) {
    z.row(r) = (z.row(r).array() - z.row(r).maxCoeff()).exp().matrix();
    z.row(r) /= z.row(r).sum();
  }
}

void low_rank_cosine(benchmark::State& state, index_t tokens) {
  constexpr index_t rank = 128;
  const matrix p = matrix::Random(rank, d), w = matrix::Random(experts, rank);
  matrix unit = w, h;
  normalize(unit);
  compare(
      state, tokens, moeroute::low_rank_cosine_gate<>(packed(p), moeroute::const_view(w), 0.07f),
      [&](const matrix& x, matrix& z) {
        h.noalias() = x * p.transpose();
        normalize(h);
        z.noalias() = h * unit.transpose();
        z *= 1.0f / 0.07f;
      },
      rank * (d + experts), 1e-2f);
}

void mlp(benchmark::State& state, index_t tokens) {
  constexpr index_t hidden = 128;
  const matrix first = matrix::Random(hidden, d), second = matrix::Random(experts, hidden);
  matrix h;
  compare(
      state, tokens, moeroute::mlp_gate<>(packed(first), packed(second)),
      [&](const matrix& x, matrix& z) {
        h.noalias() = x * first.transpose();
        h = h.cwiseMax(0.0f);
        z.noalias() = h * second.transpose();
      },
      hidden * (d + experts), 1.0f);
}

void rms(benchmark::State& state, index_t tokens) {
  const matrix w = matrix::Random(experts, d);
  matrix r;
  compare(
      state, tokens, moeroute::rms_gate<>(moeroute::const_view(w)),
      [&](const matrix& x, matrix& z) {
        r = x;
        for (index_t t = 0; t < r.rows(); ++t)
          r.row(t) *= 1.0f / std::sqrt(r.row(t).squaredNorm() / float(d) + 1e-6f);
        z.noalias() = r * w.transpose();
      },
      experts * d, 1e-2f);
}

void codebook(benchmark::State& state, index_t tokens) {
  constexpr index_t codes = 512;
  const matrix c = matrix::Random(codes, d);
  const Eigen::VectorXf half = 0.5f * c.rowwise().squaredNorm();
  matrix s;
  compare(
      state, tokens, moeroute::codebook_gate<>(moeroute::const_view(c), experts),
      [&](const matrix& x, matrix& z) {
        s.noalias() = x * c.transpose();
        s.rowwise() -= half.transpose();
        z = s.leftCols(experts);
        for (index_t first = experts; first < codes; first += experts)
          z = z.cwiseMax(s.middleCols(first, experts));
      },
      codes * d, 1e-1f);
}

void mixing(benchmark::State& state, index_t tokens) {
  const matrix w = 0.1f * matrix::Random(experts, d);
  matrix p, s;
  const float temperature = 100.0f;
  compare(
      state, tokens, moeroute::mixing_gate(moeroute::linear_gate<>(packed(w)), temperature),
      [&](const matrix& x, matrix& z) {
        p.noalias() = x * w.transpose();
        softmax(p);
        s.noalias() = x * x.transpose();
        s *= 1.0f / temperature;
        softmax(s);
        z.noalias() = s * p;
      },
      experts * d + tokens * (d + experts), 1e-3f);
}

// Experts that pass their rows on: what is left is the layer, and what a gate adds to it.
void without_gate(benchmark::State& state, index_t tokens) {
  const matrix w = matrix::Random(experts, d), x = matrix::Random(tokens, d);
  matrix y(tokens, d);
  const auto pass = [](moeroute::expert_id, auto in, auto out) {
    for (index_t r = 0; r < in.rows; ++r) std::copy_n(in.row(r), in.cols, out.row(r));
  };
  moeroute::moe_layer none(moeroute::no_gate(experts), moeroute::random_choice{8}, pass, {.d = d});
  moeroute::moe_layer one(packed(w), moeroute::random_choice{8}, pass);
  std::vector<bench::competitor> list;
  list.push_back(
      {"ours", [&](bench::stopwatch& watch) { watch.time(tokens, [&] { none.forward(x, y); }); }});
  list.push_back({"baseline", [&](bench::stopwatch& watch) {
                    watch.time(tokens, [&] { one.forward(x, y); });
                  }});
  list.push_back({"gate", [&](bench::stopwatch& watch) {
                    watch.time(tokens, [&] {
                      benchmark::DoNotOptimize(bench::multiply_adds(tokens * experts * d));
                    });
                  }});
  bench::compete(state, static_cast<double>(2 * 9 * d * 4), std::move(list));
}

const bool registered = [] {
  for (const index_t tokens : {1, 64}) {
    const std::string shape = part("T", tokens) + part("d", d) + part("E", experts);
    const auto add = [&](const char* name, void (*run)(benchmark::State&, index_t)) {
      bench::entry("gates/" + std::string(name) + shape,
                   [=](benchmark::State& state) { run(state, tokens); });
    };
    add("low_rank_cosine/r:128", low_rank_cosine);
    add("mlp/h:128", mlp);
    add("rms", rms);
    add("codebook/C:512", codebook);
  }
  bench::entry("gates/mixing/T:256/d:2048/E:64",
               [](benchmark::State& state) { mixing(state, 256); });
  for (const index_t tokens : {16, 256})
    bench::entry("layer/without_gate" + part("T", tokens) + part("d", d) + part("E", experts),
                 [=](benchmark::State& state) { without_gate(state, tokens); });
  return true;
}();

}  // namespace

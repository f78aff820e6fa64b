#include "support/own_gates.hpp"
#include "support/float_rows.hpp"

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <numeric>
#include <vector>

#include "oracle/layer.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"

namespace own_gates_test {

using namespace example;
using moeroute::serial;
using test::as_rows;
using test::floats;
using test::into_rows;
using test::random_floats;
using test::wide;

namespace {

constexpr index_t d = 14, experts = 7, tokens = 21;

packed pack(const floats& x, index_t cols) { return packed(as_rows(x, cols)); }
double sigmoid(double v) { return 1.0 / (1.0 + std::exp(-v)); }
std::vector<double> softmax(const std::vector<double>& z) {
  std::vector<double> p = z;
  double sum = 0.0;
  for (double& v : p) sum += v = std::exp(v - *std::max_element(z.begin(), z.end()));
  for (double& v : p) v /= sum;
  return p;
}
std::vector<double> row(const oracle::matrix& m, index_t r, index_t first, index_t n) {
  const auto at = m.value.begin() + r * m.cols + first;
  return {at, at + n};
}
const floats& states() {
  static const floats x = random_floats(tokens * d, 1);
  return x;
}
template <class G>
floats logits_of(const G& g, const floats& x = states()) {
  moeroute::workspace ws;
  floats z(x.size() / d * static_cast<std::size_t>(g.columns()));
  moeroute::gate(as_rows(x, d), g, into_rows(z, g.columns()), ws);
  return z;
}
// The k best by value, the lower one first among equals.
std::vector<index_t> best(const std::vector<double>& z, std::size_t k) {
  std::vector<index_t> order(z.size());
  std::iota(order.begin(), order.end(), index_t{0});
  std::stable_sort(order.begin(), order.end(), [&](index_t a, index_t b) {
    return z[static_cast<std::size_t>(a)] > z[static_cast<std::size_t>(b)];
  });
  order.resize(k);
  return order;
}

}  // namespace

TEST_CASE("an attention router is softmax(q k^T) v, and permutes with its experts") {
  const floats w = random_floats(3 * experts * d, 2, 0.6f);
  const oracle::matrix qkv = oracle::linear(wide(states(), d), wide(w, d));
  std::vector<double> expected;
  for (index_t t = 0; t < tokens; ++t)
    for (index_t i = 0; i < experts; ++i) {
      std::vector<double> a;
      for (index_t j = 0; j < experts; ++j) a.push_back(qkv(t, i) * qkv(t, experts + j));
      a = softmax(a);
      double z = 0.0;
      for (index_t j = 0; j < experts; ++j)
        z += a[static_cast<std::size_t>(j)] * qkv(t, 2 * experts + j);
      expected.push_back(z);
    }
  const floats z = logits_of(attention_gate{pack(w, d)});
  CHECK(test::difference(z, expected, 2e-5, 2e-5) == "");
  floats turned = w;  // expert e becomes expert (e + 1) % E
  for (index_t part = 0; part < 3; ++part)
    for (index_t e = 0; e < experts; ++e)
      std::copy_n(w.begin() + (part * experts + e) * d, d,
                  turned.begin() + (part * experts + (e + 1) % experts) * d);
  const floats of_turned = logits_of(attention_gate{pack(turned, d)});
  for (index_t t = 0; t < tokens; ++t)
    for (index_t e = 0; e < experts; ++e)
      CHECK(std::abs(of_turned[static_cast<std::size_t>(t * experts + (e + 1) % experts)] -
                     z[static_cast<std::size_t>(t * experts + e)]) < 2e-5f);
}

TEST_CASE("a recurrent router's logits are G h, and h goes on from layer to layer") {
  constexpr index_t p = 5;
  floats state = random_floats(tokens * p, 3);
  oracle::matrix h = wide(state, p);
  for (std::uint64_t layer = 0; layer < 3; ++layer) {
    const floats wi = random_floats(3 * p * d, 10 + layer, 0.4f),
                 wh = random_floats(3 * p * p, 20 + layer, 0.4f),
                 g = random_floats(experts * p, 30 + layer);
    const floats x = random_floats(tokens * d, 40 + layer);
    const oracle::matrix i = oracle::linear(wide(x, d), wide(wi, d)),
                         m = oracle::linear(h, wide(wh, p));
    for (index_t t = 0; t < tokens; ++t)
      for (index_t c = 0; c < p; ++c) {
        const double reset = sigmoid(i(t, c) + m(t, c)), u = sigmoid(i(t, p + c) + m(t, p + c));
        const double fresh = std::tanh(i(t, 2 * p + c) + reset * m(t, 2 * p + c));
        h(t, c) = (1.0 - u) * fresh + u * h(t, c);
      }
    const recurrent_gate gate{pack(wi, d), pack(wh, p), pack(g, p), state.data()};
    CHECK(test::difference(logits_of(gate, x), oracle::linear(h, wide(g, p)).value, 1e-5, 1e-5) ==
          "");
    CHECK(test::difference(state, h.value, 1e-5, 1e-5) == "");
  }
}

TEST_CASE("a multi-head router averages its heads' products") {
  constexpr index_t heads = 3, width = 4;
  const floats q = random_floats(heads * width * d, 50),
               k = random_floats(experts * heads * width, 51);
  const oracle::matrix query = oracle::linear(wide(states(), d), wide(q, d)),
                       key = wide(k, heads * width);
  std::vector<double> expected;
  for (index_t t = 0; t < tokens; ++t)
    for (index_t e = 0; e < experts; ++e) {
      double z = 0.0;
      for (index_t head = 0; head < heads; ++head) {
        double product = 0.0;
        for (index_t c = head * width; c < (head + 1) * width; ++c)
          product += query(t, c) * key(e, c);
        z += product / std::sqrt(double{width}) / double{heads};
      }
      expected.push_back(z);
    }
  CHECK(test::difference(logits_of(multi_head_gate{pack(q, d), pack(k, heads * width), heads}),
                         expected, 1e-5, 1e-5) == "");
}

TEST_CASE("a mixture of routers is a distribution: the main router's mean of the others'") {
  constexpr index_t routers = 3;
  const floats w = random_floats((routers * experts + routers) * d, 60, 0.5f);
  const oracle::matrix z = oracle::linear(wide(states(), d), wide(w, d));
  std::vector<double> expected;
  for (index_t t = 0; t < tokens; ++t) {
    const auto a = softmax(row(z, t, routers * experts, routers));
    std::vector<double> mixed(experts);
    for (index_t i = 0; i < routers; ++i) {
      const auto p = softmax(row(z, t, i * experts, experts));
      for (std::size_t e = 0; e < experts; ++e) mixed[e] += a[static_cast<std::size_t>(i)] * p[e];
    }
    CHECK(std::abs(std::accumulate(mixed.begin(), mixed.end(), 0.0) - 1.0) < 1e-12);
    expected.insert(expected.end(), mixed.begin(), mixed.end());
  }
  CHECK(test::difference(logits_of(mixture_of_routers{pack(w, d), routers}), expected, 1e-5,
                         1e-6) == "");
}

TEST_CASE("a hyper-router is the linear gate that its network makes of the embedding") {
  constexpr index_t p = 6, h = 9;
  const floats embedding = random_floats(p, 70), first = random_floats(h * p, 71),
               second = random_floats(experts * d * h, 72, 0.3f);
  oracle::matrix hidden = oracle::linear(wide(embedding, p), wide(first, p));
  for (double& v : hidden.value) v = std::max(v, 0.0);
  oracle::matrix w = oracle::linear(hidden, wide(second, h));
  w.rows = experts, w.cols = d;
  const auto gate = hyper_gate(as_rows(embedding, p), pack(first, p), pack(second, h), experts);
  floats z(tokens * experts);
  moeroute::gate(as_rows(states(), d), gate, into_rows(z, experts));
  CHECK(test::difference(z, oracle::linear(wide(states(), d), w).value, 2e-5, 2e-5) == "");
}

TEST_CASE("decisions mixed by attention change less under noise than each token's own") {
  // Clusters of like tokens: neighbours in attention are those of the same cluster.
  constexpr index_t many = 96, clusters = 8;
  floats z(many * experts), attention(many * many);
  const floats centre = random_floats(clusters * experts, 80, 2.0f),
               noise = random_floats(many * experts, 81), more = random_floats(many * experts, 82);
  floats moved = z;
  for (index_t t = 0; t < many; ++t) {
    for (index_t e = 0; e < experts; ++e) {
      const auto at = static_cast<std::size_t>(t * experts + e);
      z[at] = centre[static_cast<std::size_t>(t % clusters * experts + e)] + noise[at];
      moved[at] = z[at] + more[at];
    }
    for (index_t u = t % clusters; u < many; u += clusters)
      attention[static_cast<std::size_t>(t * many + u)] = float(clusters) / float(many);
  }
  const auto mixed_of = [&](floats p) {
    floats out(p.size());
    attend_to_decisions(as_rows(attention, many), into_rows(p, experts), into_rows(out, experts));
    return out;
  };
  const floats before = mixed_of(z), after = mixed_of(moved);
  const auto first_of = [](const floats& p, index_t t) {
    const auto at = p.begin() + t * experts;
    return std::max_element(at, at + experts) - at;
  };
  index_t flips = 0, mixed_flips = 0;
  std::vector<double> expected;
  for (index_t t = 0; t < many; ++t) {
    flips += first_of(z, t) != first_of(moved, t);
    mixed_flips += first_of(before, t) != first_of(after, t);
    std::vector<double> sum(experts);
    for (index_t u = t % clusters; u < many; u += clusters) {
      const auto p = softmax(row(wide(z, experts), u, 0, experts));
      for (std::size_t e = 0; e < experts; ++e) sum[e] += p[e] * double{clusters} / double{many};
    }
    expected.insert(expected.end(), sum.begin(), sum.end());
  }
  CHECK(test::difference(before, expected, 1e-5, 1e-6) == "");
  CHECK(2 * mixed_flips < flips);
}

TEST_CASE("autonomous experts rank by the norm of what they computed, and go on from it") {
  constexpr index_t r = 3, f = 8;
  constexpr std::size_t k = 2;
  const floats narrow = random_floats(experts * r * d, 90, 0.5f);
  autonomous_experts layer{.narrow = pack(narrow, d), .router = {.selection = {.k = 2}}};
  std::vector<floats> up, value, down;
  for (std::uint64_t e = 0; e < experts; ++e) {
    up.push_back(random_floats(f * r, 100 + e));
    value.push_back(random_floats(f * d, 200 + e));
    down.push_back(random_floats(d * f, 300 + e));
    layer.up.push_back(pack(up.back(), r));
    layer.value.push_back(pack(value.back(), d));
    layer.down.push_back(pack(down.back(), f));
  }
  floats y(states().size());
  layer.forward(as_rows(states(), d), into_rows(y, d));
  const oracle::matrix x = wide(states(), d), a = oracle::linear(x, wide(narrow, d));
  std::vector<double> expected(states().size());
  for (index_t t = 0; t < tokens; ++t) {
    std::vector<double> norms;
    for (index_t e = 0; e < experts; ++e) {
      const auto part = row(a, t, e * r, r);
      norms.push_back(std::sqrt(std::inner_product(part.begin(), part.end(), part.begin(), 0.0)));
    }
    const auto weights = softmax(norms);
    for (const index_t e : best(norms, k)) {
      const auto at = static_cast<std::size_t>(e);
      // Everything again from x: what was kept must be what would be computed.
      oracle::matrix token(1, d), part(1, r);
      token.value = row(x, t, 0, d);
      part.value = row(oracle::linear(token, wide(narrow, d)), 0, e * r, r);
      oracle::matrix h = oracle::linear(part, wide(up[at], r));
      const oracle::matrix v = oracle::linear(token, wide(value[at], d));
      for (index_t i = 0; i < f; ++i) h(0, i) *= sigmoid(h(0, i)) * v(0, i);
      const oracle::matrix out = oracle::linear(h, wide(down[at], f));
      for (index_t c = 0; c < d; ++c)
        expected[static_cast<std::size_t>(t * d + c)] += weights[at] * out(0, c);
    }
  }
  CHECK(test::difference(y, expected, 3e-5, 3e-5) == "");
  // Twice the narrow part of an expert: its rank rises.
  floats louder = narrow;
  for (index_t i = 3 * r * d; i < 4 * r * d; ++i) louder[static_cast<std::size_t>(i)] *= 2.0f;
  const auto times = [&] {
    const auto ids = layer.choices.ids();
    return std::count(ids.begin(), ids.end(), 3);
  };
  const auto before = times();
  layer.narrow = pack(louder, d);
  layer.forward(as_rows(states(), d), into_rows(y, d));
  CHECK(times() > before);
}

TEST_CASE("in competition the experts with the largest outputs win, and the gate learns who") {
  constexpr std::size_t k = 2;
  floats outputs = random_floats(tokens * experts * d, 400);
  for (std::size_t i = 0; i < outputs.size(); ++i) outputs[i] *= 0.2f + float(i / d % 5) * 0.3f;
  floats logits = random_floats(tokens * experts, 401);
  competition c{.router = {.selection = {.k = 2}, .weight = moeroute::sum_normalized}};
  floats y(tokens * d), dlogits(logits.size());
  const double loss = c.run(as_rows(outputs, d), as_rows(logits, experts), into_rows(y, d),
                            into_rows(dlogits, experts));
  const oracle::matrix out = wide(outputs, d);
  std::vector<double> expected(y.size());
  double expected_loss = 0.0;
  for (index_t t = 0; t < tokens; ++t) {
    std::vector<double> norms;
    for (index_t e = 0; e < experts; ++e) {
      const auto o = row(out, t * experts + e, 0, d);
      norms.push_back(std::sqrt(std::inner_product(o.begin(), o.end(), o.begin(), 0.0)));
    }
    const auto winners = best(norms, k);
    double sum = 0.0;
    for (const index_t e : winners) sum += norms[static_cast<std::size_t>(e)];
    for (const index_t e : winners)
      for (index_t i = 0; i < d; ++i)
        expected[static_cast<std::size_t>(t * d + i)] +=
            norms[static_cast<std::size_t>(e)] / sum * out(t * experts + e, i);
    const auto target = softmax(norms), p = softmax(row(wide(logits, experts), t, 0, experts));
    for (std::size_t e = 0; e < experts; ++e)
      expected_loss += (p[e] - target[e]) * (p[e] - target[e]) / double{tokens};
  }
  CHECK(test::difference(y, expected, 1e-5, 1e-5) == "");
  CHECK(std::abs(loss - expected_loss) < 1e-6);
  for (const std::size_t i : {std::size_t{0}, std::size_t{17}, logits.size() - 1}) {
    const auto at = [&](float h) {
      floats z = logits, dz(z.size());
      z[i] += h;
      return c.run(as_rows(outputs, d), as_rows(z, experts), into_rows(y, d),
                   into_rows(dz, experts));
    };
    const double slope = (at(0x1p-6f) - at(-0x1p-6f)) / 0x1p-5;
    CHECK(std::abs(slope - double{dlogits[i]}) < 1e-5 + 1e-2 * std::abs(slope));
  }
  double last = loss;
  for (int step = 0; step < 50; ++step) {
    for (std::size_t i = 0; i < logits.size(); ++i) logits[i] -= 20.0f * dlogits[i];
    last = c.run(as_rows(outputs, d), as_rows(logits, experts), into_rows(y, d),
                 into_rows(dlogits, experts));
  }
  CHECK(last < 0.1 * loss);
}

}  // namespace own_gates_test

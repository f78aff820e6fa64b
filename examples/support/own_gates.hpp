// Routers of the field whose gate is not x W^T, each as a gate of one's own or as the few calls
// that make it. Written to be read and copied: plain loops around the library's products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <moeroute/layer/moe_layer.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/gates/mixing.hpp>
#include <utility>
#include <vector>

namespace example {

using moeroute::expert_id;
using moeroute::index_t;
using moeroute::matrix_view;
using packed = moeroute::simd::packed_matrix<>;

/// Yuan 2.0-M32's attention router: each expert has a query, a key and a value for the token, and
/// z = softmax_row(q k^T) v, so that experts are chosen for how they go together.
struct attention_gate {
  packed qkv;  ///< [3 E, d]: queries, then keys, then values

  [[nodiscard]] index_t columns() const { return qkv.rows() / 3; }
  [[nodiscard]] index_t d() const { return qkv.cols(); }
  [[nodiscard]] index_t scratch_floats(index_t tokens) const { return tokens * qkv.rows(); }

  template <class X, class Exec>
  void operator()(const X& x, const matrix_view<float>& logits, float* memory,
                  const Exec& exec) const {
    const index_t n = columns();
    moeroute::gate(x, qkv, matrix_view<float>(memory, x.rows, 3 * n), exec);
    exec.parallel_for(x.rows, 16, [&](index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t) {
        const float* const q = memory + t * 3 * n;
        const float* const k = q + n;
        const float* const v = k + n;
        const auto [least, most] = std::minmax_element(k, k + n);
        for (index_t i = 0; i < n; ++i) {
          const float top = q[i] * (q[i] > 0 ? *most : *least);  // of the row's products
          float sum = 0.0f, mixed = 0.0f;
          for (index_t j = 0; j < n; ++j) {
            const float share = std::exp(q[i] * k[j] - top);
            sum += share;
            mixed += share * v[j];
          }
          logits(t, i) = mixed / sum;
        }
      }
    });
  }
};

/// RMoE's recurrent router: a GRU carries a token's state from layer to layer, and the state is
/// what the gate reads. One recurrent_gate per layer, one state [T, p] for all of them.
struct recurrent_gate {
  packed input;            ///< [3 p, d]: reset, update, candidate
  packed hidden;           ///< [3 p, p]
  packed gate;             ///< [E, p]
  float* state = nullptr;  ///< [T, p], the caller's: read and replaced by every call

  [[nodiscard]] index_t columns() const { return gate.rows(); }
  [[nodiscard]] index_t d() const { return input.cols(); }
  [[nodiscard]] index_t scratch_floats(index_t tokens) const { return 2 * tokens * input.rows(); }

  template <class X, class Exec>
  void operator()(const X& x, const matrix_view<float>& logits, float* memory,
                  const Exec& exec) const {
    const index_t p = gate.cols();
    const matrix_view<float> h(state, x.rows, p), i(memory, x.rows, 3 * p),
        m(memory + x.rows * 3 * p, x.rows, 3 * p);
    moeroute::gate(x, input, i, exec);
    moeroute::gate(h, hidden, m, exec);
    const auto sigmoid = [](float v) { return 1.0f / (1.0f + std::exp(-v)); };
    for (index_t t = 0; t < x.rows; ++t)
      for (index_t c = 0; c < p; ++c) {
        const float reset = sigmoid(i(t, c) + m(t, c));
        const float update = sigmoid(i(t, p + c) + m(t, p + c));
        const float fresh = std::tanh(i(t, 2 * p + c) + reset * m(t, 2 * p + c));
        h(t, c) = (1.0f - update) * fresh + update * h(t, c);
      }
    moeroute::gate(h, gate, logits, exec);
  }
};

/// Router Upcycling: a token's queries of several heads against the experts' keys of each,
/// z_e = the mean over heads of q_h . k_e,h / sqrt(width of a head). (Whether the heads are summed
/// or averaged is not known: a factor for every logit.)
struct multi_head_gate {
  packed query;  ///< [heads * width, d]
  packed key;    ///< [E, heads * width]
  index_t heads = 1;

  [[nodiscard]] index_t columns() const { return key.rows(); }
  [[nodiscard]] index_t d() const { return query.cols(); }
  [[nodiscard]] index_t scratch_floats(index_t tokens) const { return tokens * query.rows(); }

  template <class X, class Exec>
  void operator()(const X& x, const matrix_view<float>& logits, float* memory,
                  const Exec& exec) const {
    const matrix_view<float> q(memory, x.rows, query.rows());
    moeroute::gate(x, query, q, exec);
    const auto width = static_cast<float>(query.rows() / heads);
    const float factor = 1.0f / (static_cast<float>(heads) * std::sqrt(width));
    for (index_t i = 0; i < x.rows * query.rows(); ++i) memory[i] *= factor;
    moeroute::gate(q, key, logits, exec);
  }
};

/// Mixture of Routers: a main router weighs what r sub-routers say, sum_i a_i softmax(x W_i). The
/// columns are probabilities: route them with identity_score.
struct mixture_of_routers {
  packed weight;  ///< [r E + r, d]: the sub-routers one after the other, then the main one
  index_t routers = 2;

  [[nodiscard]] index_t columns() const { return weight.rows() / routers - 1; }
  [[nodiscard]] index_t d() const { return weight.cols(); }
  [[nodiscard]] index_t scratch_floats(index_t tokens) const { return tokens * weight.rows(); }

  template <class X, class Exec>
  void operator()(const X& x, const matrix_view<float>& logits, float* memory,
                  const Exec& exec) const {
    const index_t n = columns(), all = weight.rows();
    moeroute::gate(x, weight, matrix_view<float>(memory, x.rows, all), exec);
    for (index_t i = 0; i <= routers; ++i)
      moeroute::softmax_rows(
          matrix_view<float>(memory + i * n, x.rows, i < routers ? n : routers, all), exec);
    for (index_t t = 0; t < x.rows; ++t) {
      const float* const row = memory + t * all;
      std::fill_n(logits.row(t), n, 0.0f);
      for (index_t i = 0; i < routers; ++i)
        for (index_t e = 0; e < n; ++e) logits(t, e) += row[routers * n + i] * row[i * n + e];
    }
  }
};

/// HyperRouter: a fixed random network makes the gate's weights from an embedding, which alone is
/// trained. In inference that is a linear gate, made once.
///
/// Shapes: embedding [1, p], first [h, p], second [E d, h].
inline moeroute::linear_gate<> hyper_gate(matrix_view<const float> embedding, const packed& first,
                                          const packed& second, index_t experts) {
  moeroute::buffer<float> h(first.rows()), w(second.rows());
  moeroute::gate(embedding, first, matrix_view<float>(h.data(), 1, h.size()));
  for (index_t i = 0; i < h.size(); ++i) h[i] = std::max(h[i], 0.0f);
  moeroute::gate(matrix_view<const float>(h.data(), 1, h.size()), second,
                 matrix_view<float>(w.data(), 1, w.size()));
  return packed(matrix_view<const float>(w.data(), experts, w.size() / experts));
}

/// Graph of Tokens, in the form that reads the attention map: a token's probabilities are the mean
/// of all tokens', by how much it attends to them. p [T, E] becomes what is routed, in `mixed`.
inline void attend_to_decisions(matrix_view<const float> attention, matrix_view<float> p,
                                matrix_view<float> mixed) {
  moeroute::softmax_rows(p);
  moeroute::mix_probabilities(attention, p, mixed);
}

/// Autonomy of Experts: no router at all. Every expert computes the first, narrow part of itself,
/// a_e = W_e x; those with the largest norms win, with the softmax over all norms as weights, and
/// go on from the a_e that they have.
struct autonomous_experts {
  packed narrow{};                            ///< [E r, d]
  std::vector<packed> up{}, value{}, down{};  ///< of each expert: [f, r], [f, d], [d, f]
  moeroute::router<moeroute::softmax> router{};

  template <class X, class Y>
  void forward(const X& x, Y&& y) {
    const auto experts = static_cast<index_t>(up.size());
    const index_t r = narrow.rows() / experts, f = down[0].cols(), tokens = x.rows;
    cached.resize(tokens * narrow.rows());
    norms.resize(tokens * experts);
    moeroute::gate(x, narrow, matrix_view<float>(cached.data(), tokens, narrow.rows()));
    for (index_t i = 0; i < tokens * experts; ++i)
      norms[i] = moeroute::simd::row_norm(cached.data() + i * r, r);
    moeroute::route(router, matrix_view<const float>(norms.data(), tokens, experts), ws, choices);
    moeroute::plan(choices, plan);
    const index_t slots = plan.slots();
    in.resize(slots * x.cols), out.resize(slots * x.cols), hidden.resize(2 * slots * f + slots * r);
    const matrix_view<float> rows(in.data(), slots, x.cols), results(out.data(), slots, x.cols);
    moeroute::dispatch(x, plan, rows);
    moeroute::for_each_expert(plan, rows, results, [&](expert_id e, auto block, auto result) {
      const index_t first = (block.data - rows.data) / x.cols, n = block.rows;
      const auto at = static_cast<std::size_t>(e);
      const matrix_view<float> a(hidden.data(), n, r), h(a.data + n * r, n, f),
          v(h.data + n * f, n, f);
      for (index_t s = 0; s < n; ++s) {
        const index_t t = plan.token_of_slot()[static_cast<std::size_t>(first + s)];
        std::copy_n(cached.data() + (t * experts + e) * r, r, a.row(s));
      }
      moeroute::gate(a, up[at], h);
      moeroute::gate(block, value[at], v);
      for (index_t i = 0; i < n * f; ++i)
        h.data[i] *= v.data[i] / (1.0f + std::exp(-h.data[i]));  // silu
      moeroute::gate(h, down[at], result);
    });
    moeroute::combine(results, plan, choices, y);
  }

  moeroute::buffer<float> cached{}, norms{}, in{}, out{}, hidden{};
  moeroute::workspace ws{};
  moeroute::assignment choices{};
  moeroute::dispatch_plan plan{};
};

/// CompeteSMoE: in competition all experts run, and those with the largest outputs win; between
/// competitions a plain gate decides, which learns to foretell the winners.
///
/// outputs [T E, d] are all experts' of all tokens, expert after expert of a token. y is the
/// winners' sum, weighted by their share of the norms; the loss is the mean over tokens of the
/// squared distance of the gate's probabilities to the competition's, dlogits its gradient.
struct competition {
  moeroute::router<moeroute::identity_score> router{.weight = moeroute::sum_normalized};

  double run(matrix_view<const float> outputs, matrix_view<const float> gate_logits,
             matrix_view<float> y, matrix_view<float> dlogits) {
    const index_t tokens = gate_logits.rows, n = gate_logits.cols;
    norms.resize(2 * tokens * n);
    const matrix_view<float> norm(norms.data(), tokens, n), p(norm.data + tokens * n, tokens, n);
    for (index_t i = 0; i < tokens * n; ++i)
      norm.data[i] = moeroute::simd::row_norm(outputs.row(i), outputs.cols);
    moeroute::route(router, norm, ws, choices);
    winners.resize(choices.choices() * outputs.cols);
    const index_t k = choices.k();
    for (index_t c = 0; c < choices.choices(); ++c)
      std::copy_n(outputs.row(c / k * n + choices.ids()[static_cast<std::size_t>(c)]), outputs.cols,
                  winners.data() + c * outputs.cols);
    moeroute::combine(matrix_view<const float>(winners.data(), choices.choices(), outputs.cols),
                      choices, y);
    for (index_t t = 0; t < tokens; ++t) std::copy_n(gate_logits.row(t), n, p.row(t));
    moeroute::softmax_rows(norm);
    moeroute::softmax_rows(p);
    double loss = 0.0;
    for (index_t t = 0; t < tokens; ++t) {
      float along = 0.0f;
      for (index_t e = 0; e < n; ++e) {
        const float apart = p(t, e) - norm(t, e);
        loss += static_cast<double>(apart * apart);
        along += apart * p(t, e);
      }
      for (index_t e = 0; e < n; ++e)
        dlogits(t, e) =
            2.0f * p(t, e) * (p(t, e) - norm(t, e) - along) / static_cast<float>(tokens);
    }
    return loss / static_cast<double>(tokens);
  }

  moeroute::buffer<float> norms{}, winners{};
  moeroute::workspace ws{};
  moeroute::assignment choices{};
};

}  // namespace example

// The forward pass: tokens in, logits out, keys and values kept.
#pragma once

#include "attention.hpp"
#include "model.hpp"
#include "norm_rope.hpp"
#include "stopwatch.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <moeroute/base/workspace.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/rows/gemm.hpp>

namespace example {

static_assert(static_cast<int>(moeroute::layer_step::done) == static_cast<int>(part::combine) + 1,
              "parts begin with the layer's steps, in their order");

/// What one layer's router did with a run of tokens.
struct layer_routing {
  std::size_t layer;
  index_t first_position;
  matrix_view<const moeroute::expert_id> ids;  // [T, k]
  matrix_view<const float> weights;            // [T, k]
  matrix_view<const float> logits;             // [T, E]
  matrix_view<const float> inputs;             // [T, hidden], what the layer got
};

/// Of which tokens the logits are wanted.
enum class wanted_logits { last, all };

/// Runs a model over one context. Allocates once, when it is made.
template <class Exec>
class decoder {
 public:
  /// Tokens that go through the layers together; longer prompts take several rounds.
  static constexpr index_t most_rows = 256;

  decoder(model& weights, index_t positions, const Exec& exec)
      : model_(&weights),
        exec_(exec),
        positions_(positions),
        rotation_(weights.config.rope_theta, weights.config.head_dim, positions) {
    const model_config& c = weights.config;
    const index_t rows = std::min(most_rows, positions);
    for (std::size_t i = 0; i < weights.layers.size(); ++i) {
      caches_.emplace_back(c.kv_heads, c.head_dim, positions);
    }
    hidden_.resize(rows * c.hidden);
    normed_.resize(rows * c.hidden);
    added_.resize(rows * c.hidden);
    projected_.resize(rows * (c.query_width() + 2 * c.kv_width()));
    attended_.resize(rows * c.query_width());
  }

  /// Tokens seen so far; the next one stands at this position.
  [[nodiscard]] index_t position() const { return position_; }
  /// Starts a fresh context.
  void reset() { position_ = 0; }

  [[nodiscard]] stopwatch& watch() { return watch_; }

  /// Runs the tokens after those seen so far and returns the last one's logits,
  /// or everyone's. `see` is called with every layer's routing.
  ///
  /// Requires: at least one token, ids within the vocabulary, and
  /// position() + tokens.size() within the positions asked for.
  template <class See>
  matrix_view<const float> run(std::span<const std::int32_t> tokens, wanted_logits wanted,
                               See&& see) {
    const auto count = static_cast<index_t>(tokens.size());
    const index_t vocab = model_->config.vocab;
    const bool all = wanted == wanted_logits::all;
    logits_.resize(all ? count * vocab : vocab);
    watch_.start();
    for (index_t first = 0; first < count; first += most_rows) {
      const index_t rows = std::min(most_rows, count - first);
      embed(tokens.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(rows)));
      for (std::size_t layer = 0; layer < model_->layers.size(); ++layer) {
        attention(layer, rows);
        experts(layer, rows, see);
      }
      position_ += rows;
      if (all) {
        head(0, rows, logits_.data() + first * vocab);
      } else if (first + rows == count) {
        head(rows - 1, 1, logits_.data());
      }
      watch_.lap(part::rest);
    }
    return {logits_.data(), all ? count : 1, vocab};
  }
  matrix_view<const float> run(std::span<const std::int32_t> tokens,
                               wanted_logits wanted = wanted_logits::last) {
    return run(tokens, wanted, [](const layer_routing&) {});
  }

 private:
  using rows_view = matrix_view<float>;

  [[nodiscard]] rows_view view(moeroute::buffer<float>& memory, index_t rows, index_t cols) {
    return {memory.data(), rows, cols};
  }

  void embed(std::span<const std::int32_t> tokens) {
    const index_t d = model_->config.hidden;
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      model_->embed(tokens[t], hidden_.data() + static_cast<index_t>(t) * d);
    }
  }

  void norm_rows(index_t rows, std::span<const float> weight) {
    const auto d = static_cast<index_t>(weight.size());
    const auto eps = static_cast<float>(model_->config.norm_eps);
    exec_.parallel_for(rows, 64, [&](index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t) {
        rms_norm(hidden_.data() + t * d, weight, eps, normed_.data() + t * d);
      }
    });
  }

  void add_rows(index_t rows) {
    const index_t n = rows * model_->config.hidden;
    for (index_t i = 0; i < n; ++i) {
      hidden_[i] += added_[i];
    }
  }

  void attention(std::size_t index, index_t rows) {
    const model_config& c = model_->config;
    const decoder_layer& layer = model_->layers[index];
    norm_rows(rows, layer.attention_norm);
    const rows_view normed = view(normed_, rows, c.hidden);
    const rows_view projected = view(projected_, rows, c.query_width() + 2 * c.kv_width());
    moeroute::simd::gemm(normed, layer.query_key_value, projected, exec_);
    exec_.parallel_for(rows, 32, [&](index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t) {
        prepare_heads(layer, projected.row(t), position_ + t, caches_[index]);
      }
    });
    const matrix_view<const float> queries{projected.data, rows, c.query_width(), projected.stride};
    const rows_view attended = view(attended_, rows, c.query_width());
    attend(caches_[index], position_, queries, attended, exec_);
    moeroute::simd::gemm(attended, layer.attention_out, view(added_, rows, c.hidden), exec_);
    add_rows(rows);
    watch_.lap(part::attention);
  }

  /// One token's clipped, normed, rotated and scaled query; its key and value into the cache.
  void prepare_heads(const decoder_layer& layer, float* row, index_t position, kv_cache& cache) {
    const model_config& c = model_->config;
    float* key = row + c.query_width();
    float* value = key + c.kv_width();
    if (c.clip_qkv > 0) {
      const auto limit = static_cast<float>(c.clip_qkv);
      for (float* x = row; x != value + c.kv_width(); ++x) {
        *x = std::clamp(*x, -limit, limit);
      }
    }
    norm_parts(row, c.query_width(), layer.query_norm);
    norm_parts(key, c.kv_width(), layer.key_norm);
    const float scale = 1.0F / std::sqrt(static_cast<float>(c.head_dim));
    for (index_t h = 0; h < c.heads; ++h) {
      rotation_.rotate(row + h * c.head_dim, position);
    }
    for (index_t i = 0; i < c.query_width(); ++i) {
      row[i] *= scale;
    }
    for (index_t h = 0; h < c.kv_heads; ++h) {
      rotation_.rotate(key + h * c.head_dim, position);
      cache.store(h, position, key + h * c.head_dim, value + h * c.head_dim);
    }
  }

  /// Norms each stretch as wide as the weight: a head in Qwen3, the whole width in
  /// OLMoE, nothing where the family has no such norm.
  void norm_parts(float* row, index_t width, std::span<const float> weight) const {
    const auto eps = static_cast<float>(model_->config.norm_eps);
    if (!weight.empty()) {
      for (index_t i = 0; i < width; i += static_cast<index_t>(weight.size())) {
        rms_norm(row + i, weight, eps, row + i);
      }
    }
  }

  template <class See>
  void experts(std::size_t index, index_t rows, See& see) {
    const index_t d = model_->config.hidden;
    decoder_layer& layer = model_->layers[index];
    norm_rows(rows, layer.moe_norm);
    watch_.lap(part::rest);
    if (model_->ranks != nullptr) {
      const expert_ranks::routed made =
          model_->ranks->forward(index, view(normed_, rows, d), view(added_, rows, d));
      watch_.lap(part::experts);
      see(layer_routing{index,
                        position_,
                        {made.choices.ids().data(), rows, made.choices.k()},
                        {made.choices.weights().data(), rows, made.choices.k()},
                        made.logits,
                        view(normed_, rows, d)});
      add_rows(rows);
      watch_.lap(part::rest);
      return;
    }
    // The probe hears of a step as it begins: the one before it is done.
    layer.moe.forward(view(normed_, rows, d), view(added_, rows, d), exec_,
                      [&](moeroute::layer_step step) {
                        if (step != moeroute::layer_step::gate) {
                          watch_.lap(static_cast<part>(static_cast<int>(step) - 1));
                        }
                      });
    const moeroute::assignment& choices = layer.moe.choices();
    see(layer_routing{index,
                      position_,
                      {choices.ids().data(), rows, choices.k()},
                      {choices.weights().data(), rows, choices.k()},
                      layer.moe.logits(),
                      view(normed_, rows, d)});
    add_rows(rows);
    watch_.lap(part::rest);
  }

  void head(index_t row, index_t rows, float* out) {
    const model_config& c = model_->config;
    const auto eps = static_cast<float>(c.norm_eps);
    for (index_t t = 0; t < rows; ++t) {
      rms_norm(hidden_.data() + (row + t) * c.hidden, model_->final_norm, eps,
               normed_.data() + t * c.hidden);
    }
    moeroute::simd::gemm(view(normed_, rows, c.hidden), model_->head,
                         matrix_view<float>(out, rows, c.vocab), exec_);
  }

  model* model_;
  Exec exec_;
  index_t positions_;
  index_t position_ = 0;
  rotary_table rotation_;
  std::vector<kv_cache> caches_;
  moeroute::buffer<float> hidden_, normed_, added_, projected_, attended_, logits_;
  stopwatch watch_;
};

}  // namespace example

// The weights of a checkpoint, packed tensor by tensor while they are read.
#pragma once

#include "checkpoint.hpp"
#include "config.hpp"
#include "expert_ranks.hpp"
#include "steering.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/layer/moe_layer.hpp>
#include <moeroute/layer/swiglu_experts.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/simd/rows/gemm.hpp>

namespace example {

using moeroute::index_t;

/// All three families: softmax over all experts, the k largest, their weights
/// divided by their sum or not.
using moe_block = moeroute::moe_layer<steered_router, moeroute::swiglu_experts<>>;

struct decoder_layer {
  std::vector<float> attention_norm;
  std::vector<float> moe_norm;
  std::vector<float> query_norm;  // empty where the family has none
  std::vector<float> key_norm;
  moeroute::simd::packed_matrix<> query_key_value;  // three projections of one input
  moeroute::simd::packed_matrix<> attention_out;
  moe_block moe;
};

struct model {
  model_config config;
  std::vector<float> embedding;  // [vocab, hidden]
  std::vector<float> final_norm;
  moeroute::simd::packed_matrix<> head;
  std::vector<decoder_layer> layers;
  std::uint64_t parameters = 0;
  /// Who holds the experts where they are over ranks; the layers then have none.
  std::shared_ptr<expert_ranks> ranks;

  void embed(std::int32_t token, float* out) const {
    std::copy_n(embedding.data() + token * config.hidden, config.hidden, out);
  }
};

namespace detail {

/// The names that a family gives its tensors.
struct tensor_names {
  std::string gate, expert, gate_projection, up_projection, down_projection;

  explicit tensor_names(model_family family)
      : gate("mlp.gate"),
        expert("mlp.experts."),
        gate_projection(".gate_proj"),
        up_projection(".up_proj"),
        down_projection(".down_proj") {
    if (family == model_family::mixtral) {
      gate = "block_sparse_moe.gate";
      expert = "block_sparse_moe.experts.";
      gate_projection = ".w1";
      up_projection = ".w3";
      down_projection = ".w2";
    }
  }
};

class model_reader {
 public:
  model_reader(const std::filesystem::path& directory, model& into)
      : model_(into), tensors_(directory), names_(into.config.family) {}

  /// Calls seen(layers done) after each layer.
  template <class Seen>
  void read(Seen&& seen) {
    require_all();
    const model_config& c = model_.config;
    model_.embedding = values("model.embed_tokens", c.vocab * c.hidden);
    model_.final_norm = values("model.norm", c.hidden);
    model_.head = packed(c.tied_head ? "model.embed_tokens" : "lm_head", c.vocab, c.hidden);
    for (index_t i = 0; i < c.layers; ++i) {
      model_.layers.push_back(read_layer(i));
      seen(i + 1);
    }
  }

 private:
  static std::string prefix(index_t layer) { return "model.layers." + std::to_string(layer) + "."; }

  void require(const std::string& name, std::initializer_list<index_t> extents) {
    tensor_shape shape;
    std::uint64_t count = 1;
    for (const index_t extent : extents) {
      shape.push_back(static_cast<std::uint64_t>(extent));
      count *= shape.back();
    }
    tensors_.require(name + ".weight", shape);
    model_.parameters += count;
  }

  /// Every tensor's presence and shape, before memory is taken: a configuration
  /// may claim any size, a file that has the tensors cannot.
  void require_all() {
    const model_config& c = model_.config;
    require("model.embed_tokens", {c.vocab, c.hidden});
    require("model.norm", {c.hidden});
    if (!c.tied_head) {
      require("lm_head", {c.vocab, c.hidden});
    }
    for (index_t i = 0; i < c.layers; ++i) {
      const std::string layer = prefix(i);
      require(layer + "input_layernorm", {c.hidden});
      require(layer + "post_attention_layernorm", {c.hidden});
      require(layer + "self_attn.q_proj", {c.query_width(), c.hidden});
      require(layer + "self_attn.k_proj", {c.kv_width(), c.hidden});
      require(layer + "self_attn.v_proj", {c.kv_width(), c.hidden});
      require(layer + "self_attn.o_proj", {c.hidden, c.query_width()});
      if (c.family != model_family::mixtral) {
        require(layer + "self_attn.q_norm", {query_norm_width()});
        require(layer + "self_attn.k_norm", {key_norm_width()});
      }
      require(layer + names_.gate, {c.experts(), c.hidden});
      for (index_t e = 0; e < c.experts(); ++e) {
        const std::string expert = layer + names_.expert + std::to_string(e);
        require(expert + names_.gate_projection, {c.expert_width, c.hidden});
        require(expert + names_.up_projection, {c.expert_width, c.hidden});
        require(expert + names_.down_projection, {c.hidden, c.expert_width});
      }
    }
  }

  [[nodiscard]] index_t query_norm_width() const {
    const model_config& c = model_.config;
    return c.family == model_family::qwen3_moe ? c.head_dim : c.query_width();
  }
  [[nodiscard]] index_t key_norm_width() const {
    const model_config& c = model_.config;
    return c.family == model_family::qwen3_moe ? c.head_dim : c.kv_width();
  }

  decoder_layer read_layer(index_t index) {
    const model_config& c = model_.config;
    const std::string layer = prefix(index);
    const std::string attention = layer + "self_attn.";
    decoder_layer made{.attention_norm = values(layer + "input_layernorm", c.hidden),
                       .moe_norm = values(layer + "post_attention_layernorm", c.hidden),
                       .query_norm = {},
                       .key_norm = {},
                       .query_key_value = {c.query_width() + 2 * c.kv_width(), c.hidden},
                       .attention_out = packed(attention + "o_proj", c.hidden, c.query_width()),
                       .moe = read_experts(layer)};
    if (c.family != model_family::mixtral) {
      made.query_norm = values(attention + "q_norm", query_norm_width());
      made.key_norm = values(attention + "k_norm", key_norm_width());
    }
    pack(attention + "q_proj", c.query_width(), c.hidden, made.query_key_value, 0);
    pack(attention + "k_proj", c.kv_width(), c.hidden, made.query_key_value, c.query_width());
    pack(attention + "v_proj", c.kv_width(), c.hidden, made.query_key_value,
         c.query_width() + c.kv_width());
    return made;
  }

  moe_block read_experts(const std::string& layer) {
    const model_config& c = model_.config;
    const bool alone = model_.ranks == nullptr;
    const index_t from = alone ? 0 : model_.ranks->first(c.experts());
    const index_t to = alone ? c.experts() : model_.ranks->last(c.experts());
    moeroute::swiglu_experts<> experts(std::max<index_t>(to - from, 1), c.hidden, c.expert_width);
    for (index_t i = from; i < to; ++i) {
      const auto e = static_cast<moeroute::expert_id>(i - from);
      const std::string expert = layer + names_.expert + std::to_string(i);
      experts.set_gate(e, view(expert + names_.gate_projection, c.expert_width, c.hidden));
      experts.set_up(e, view(expert + names_.up_projection, c.expert_width, c.hidden));
      experts.set_down(e, view(expert + names_.down_projection, c.hidden, c.expert_width));
    }
    moeroute::router<moeroute::softmax> router;
    router.selection.k = c.experts_per_token();
    router.weight = c.router.normalize == moeroute::normalization::sum ? moeroute::sum_normalized
                                                                       : moeroute::raw_weights;
    if (!alone) {
      model_.ranks->take(packed(layer + names_.gate, c.experts(), c.hidden), router,
                         std::move(experts));
      // A layer without experts of its own: nobody calls it.
      experts = moeroute::swiglu_experts<>(c.experts(), c.hidden, 0);
    }
    return {packed(layer + names_.gate, c.experts(), c.hidden), steered_router(router),
            std::move(experts)};
  }

  /// Reads elements of a tensor; refuses one that is no number: routing would go on without the
  /// expert, and what is written looks like text.
  void read(const std::string& name, index_t first, std::span<float> out) const {
    const std::string tensor = name + ".weight";
    tensors_.read(tensor, static_cast<std::uint64_t>(first), out);
    for (std::size_t i = 0; i < out.size(); ++i) {
      if (!std::isfinite(out[i])) {
        refuse(tensors_.file_name(tensor), ": tensor '", tensor,
               "': expected finite numbers, element ", first + static_cast<index_t>(i), " is ",
               std::isnan(out[i]) ? "NaN" : "infinite");
      }
    }
  }

  [[nodiscard]] std::vector<float> values(const std::string& name, index_t count) {
    std::vector<float> made(static_cast<std::size_t>(count));
    read(name, 0, made);
    return made;
  }

  /// A tensor in memory that the next one reuses.
  [[nodiscard]] moeroute::matrix_view<const float> view(const std::string& name, index_t rows,
                                                        index_t cols) {
    memory_.resize(static_cast<std::size_t>(rows * cols));
    read(name, 0, memory_);
    return {memory_.data(), rows, cols};
  }

  /// Packs a tensor as rows of `into`, a stripe at a time: the largest tensors
  /// would otherwise lie in memory twice.
  void pack(const std::string& name, index_t rows, index_t cols,
            moeroute::simd::packed_matrix<>& into, index_t first) {
    const index_t stripe = std::max<index_t>(1, (index_t{1} << 16) / cols);
    for (index_t r = 0; r < rows; r += stripe) {
      const index_t count = std::min(stripe, rows - r);
      memory_.resize(static_cast<std::size_t>(count * cols));
      read(name, r * cols, memory_);
      into.set_rows(first + r, moeroute::matrix_view<const float>(memory_.data(), count, cols));
    }
  }

  [[nodiscard]] moeroute::simd::packed_matrix<> packed(const std::string& name, index_t rows,
                                                       index_t cols) {
    moeroute::simd::packed_matrix<> made(rows, cols);
    pack(name, rows, cols, made, 0);
    return made;
  }

  model& model_;
  checkpoint tensors_;
  tensor_names names_;
  std::vector<float> memory_;
};

}  // namespace detail

/// The configuration of the model in DIRECTORY.
[[nodiscard]] inline model_config read_model_config(const std::filesystem::path& directory) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(directory, ignored)) {
    refuse(directory.string(), ": expected the folder of a model, found ",
           std::filesystem::exists(directory, ignored) ? "something else" : "nothing");
  }
  return read_config(directory / "config.json");
}

/// Loads the weights in DIRECTORY; refuses what does not fit the configuration.
/// Calls seen(layers done) after each layer.
template <class Seen>
[[nodiscard]] model load_model(const std::filesystem::path& directory, const model_config& config,
                               Seen&& seen, std::shared_ptr<expert_ranks> ranks = nullptr) {
  model made;
  made.config = config;
  made.ranks = std::move(ranks);
  detail::model_reader(directory, made).read(seen);
  return made;
}

}  // namespace example

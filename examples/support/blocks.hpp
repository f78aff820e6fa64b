// What a byte model learns with: a mixture of experts behind any router, a soft mixture, or a dense
// layer of the size that is active in them.
#pragma once

#include "byte_model.hpp"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <moeroute/balance/bias_controller.hpp>
#include <moeroute/balance/bip.hpp>
#include <moeroute/balance/loss.hpp>
#include <moeroute/balance/loss_count.hpp>
#include <moeroute/balance/loss_relu.hpp>
#include <moeroute/balance/quantile.hpp>
#include <moeroute/balance/sparsity_controller.hpp>
#include <moeroute/data/expert_load.hpp>
#include <moeroute/layer/moe_layer_backward.hpp>
#include <moeroute/layer/soft_moe_backward.hpp>
#include <moeroute/layer/swiglu_backward.hpp>
#include <moeroute/metrics/entropy.hpp>
#include <moeroute/policy/weigh/batch_routers.hpp>
#include <moeroute/policy/weigh/row_routers.hpp>

namespace example {

inline constexpr index_t block_experts = 16, block_k = 2, block_ff = 32;

/// What a step showed of the routing.
struct block_figures {
  double max_violation = 0.0;  ///< the busiest expert's load over the mean, less 1
  double entropy = 0.0;        ///< of the router's probabilities, in bits
  double active = 0.0;         ///< experts per token
};

class block {
 public:
  virtual ~block() = default;
  /// y = the block of x [T, d]; ids: the bytes that the tokens end with.
  virtual void forward(const std::vector<float>& x, std::span<const std::int32_t> ids,
                       bool learning, std::vector<float>& y) = 0;
  /// dx += the gradient of x; after a forward() that learns.
  virtual void backward(const std::vector<float>& x, const std::vector<float>& dy,
                        std::vector<float>& dx) = 0;
  virtual void step(std::int64_t n, float rate) = 0;
  virtual void keep(archive& file) = 0;
  [[nodiscard]] const block_figures& figures() const { return figures_; }

 protected:
  block_figures figures_;
};

/// SwiGLU experts with what they learn.
class expert_set {
 public:
  expert_set(index_t experts, index_t ff, std::mt19937_64& random)
      : packed_(experts, byte_model::d, ff),
        gate_(experts * ff * byte_model::d, byte_model::d, random),
        up_(experts * ff * byte_model::d, byte_model::d, random),
        down_(experts * byte_model::d * ff, ff, random) {
    pack();
  }

  /// An expert function; the set outlives it.
  struct function {
    const moeroute::swiglu_experts<>* list;
    [[nodiscard]] index_t scratch_floats() const { return list->scratch_floats(); }
    [[nodiscard]] index_t experts() const { return list->experts(); }
    void operator()(moeroute::expert_id e, matrix_view<const float> in, matrix_view<float> out,
                    float* memory) const {
      (*list)(e, in, out, memory);
    }
  };
  [[nodiscard]] function forward() const { return {&packed_}; }

  moeroute::swiglu_backward<> backward() {
    const index_t wide = packed_.experts() * packed_.ff(), narrow = packed_.experts() * packed_.d();
    return {packed_,
            {gate_.rows(wide), up_.rows(wide), down_.rows(narrow)},
            {gate_.slope(wide), up_.slope(wide), down_.slope(narrow)}};
  }

  void step(std::int64_t n, float rate) {
    for (parameter* p : {&gate_, &up_, &down_}) p->step(n, rate);
    pack();
  }
  void keep(archive& file) {
    for (parameter* p : {&gate_, &up_, &down_}) file.add(*p);
    pack();
  }

 private:
  void pack() {
    const index_t n = packed_.experts(), ff = packed_.ff();
    for (index_t e = 0; e < n; ++e) {
      const auto id = static_cast<moeroute::expert_id>(e);
      packed_.set_gate(id, gate_.rows(n * ff).middle_rows(e * ff, ff));
      packed_.set_up(id, up_.rows(n * ff).middle_rows(e * ff, ff));
    }
    packed_.set_all_down(down_.rows(n * packed_.d()));
  }

  moeroute::swiglu_experts<> packed_;
  parameter gate_, up_, down_;
};

inline matrix_view<const float> states(const std::vector<float>& x) {
  return {x.data(), static_cast<index_t>(x.size()) / byte_model::d, byte_model::d};
}
inline matrix_view<float> states(std::vector<float>& x) {
  return {x.data(), static_cast<index_t>(x.size()) / byte_model::d, byte_model::d};
}

/// One expert that every token takes, as wide as block_k experts of the others.
class dense_block : public block {
 public:
  explicit dense_block(std::mt19937_64& random) : expert_(1, block_k * block_ff, random) {
    figures_.active = 1.0;
  }
  void forward(const std::vector<float>& x, std::span<const std::int32_t>, bool,
               std::vector<float>& y) override {
    const auto f = expert_.forward();
    memory_.resize(static_cast<std::size_t>(f.scratch_floats()));
    f(0, states(x), states(y), memory_.data());
  }
  void backward(const std::vector<float>& x, const std::vector<float>& dy,
                std::vector<float>& dx) override {
    const auto f = expert_.backward();
    memory_.resize(static_cast<std::size_t>(f.scratch_floats()));
    own_.resize(x.size());
    f(0, states(x), states(dy), states(own_), memory_.data());
    for (std::size_t i = 0; i < dx.size(); ++i) dx[i] += own_[i];
  }
  void step(std::int64_t n, float rate) override { expert_.step(n, rate); }
  void keep(archive& file) override { expert_.keep(file); }

 private:
  expert_set expert_;
  std::vector<float> memory_, own_;
};

/// Slots that mix all tokens: one for every two tokens of a batch.
class soft_block : public block {
 public:
  static constexpr index_t own = 8, slots = own * block_experts;

  explicit soft_block(std::mt19937_64& random)
      : mu_(slots * byte_model::d, byte_model::d, random),
        experts_(block_experts, block_ff, random) {
    figures_.active = block_experts;
  }
  void forward(const std::vector<float>& x, std::span<const std::int32_t>, bool,
               std::vector<float>& y) override {
    layer_.emplace(mu_.rows(slots), experts_.forward(),
                   moeroute::soft_moe_options{.slots_per_expert = own, .scale = 8.0f});
    layer_->forward(states(x), states(y), moeroute::serial{}, tape_);
  }
  void backward(const std::vector<float>& x, const std::vector<float>& dy,
                std::vector<float>& dx) override {
    moeroute::backward(*layer_, states(x), tape_, states(dy), mu_.rows(slots), experts_.backward(),
                       {moeroute::gradient_to::add, states(dx), mu_.slope(slots)});
  }
  void step(std::int64_t n, float rate) override {
    mu_.step(n, rate);
    experts_.step(n, rate);
  }
  void keep(archive& file) override {
    file.add(mu_);
    experts_.keep(file);
  }

 private:
  parameter mu_;
  expert_set experts_;
  std::optional<moeroute::soft_moe<expert_set::function>> layer_;
  moeroute::soft_tape tape_;
};

enum class balance_method { none, aux, bias, bip, quantile };

/// What holds the load of a mixture even: corrects a bias, or adds to the gradient of the logits.
class balancing {
 public:
  balancing(balance_method method, bool sigmoid)
      : method_(method),
        sigmoid_(sigmoid),
        bias_(static_cast<std::size_t>(block_experts)),
        controller_(block_experts, {.rule = moeroute::bias_rule::proportional, .step = 0.01f}),
        bip_(block_experts, {.k = block_k, .iterations = 4}),
        quantile_(block_experts, {.k = block_k, .ema = 0.9f}),
        counts_(bias_.size()) {}

  [[nodiscard]] std::span<const float> bias() const { return bias_; }

  /// Before a batch is routed.
  void before(matrix_view<const float> logits) {
    if (method_ != balance_method::bip) return;
    bip_.update(scores(logits), ws_);
    std::ranges::copy(bip_.bias(), bias_.begin());
  }
  /// After a batch was routed, and before the backward pass: dlogits is written, or not touched.
  bool after(matrix_view<const float> logits, const moeroute::assignment& choices,
             matrix_view<float> dlogits) {
    count_choices(choices, {}, std::span(counts_));
    switch (method_) {
      case balance_method::aux:
        moeroute::balance_loss<float>(
            {.scores = sigmoid_ ? moeroute::probability::normalized_sigmoid
                                : moeroute::probability::softmax},
            logits, dlogits, ws_, moeroute::serial{},
            moeroute::switch_loss::megatron(0.02, counts_, block_k));
        return true;
      case balance_method::bias:
        controller_.update(counts_);
        std::ranges::copy(std::as_const(controller_).bias(), bias_.begin());
        return false;
      case balance_method::quantile:
        quantile_.observe(scores(logits), ws_);
        quantile_.update();
        std::ranges::copy(std::as_const(quantile_).bias(), bias_.begin());
        return false;
      default: return false;
    }
  }
  void keep(archive& file) {
    file.list(bias_);
    std::ranges::copy(bias_, controller_.bias().begin());
    std::ranges::copy(bias_, quantile_.bias().begin());
  }

 private:
  // What the choice is made on, without the bias.
  matrix_view<const float> scores(matrix_view<const float> logits) {
    scores_.resize(static_cast<std::size_t>(logits.rows * logits.cols));
    for (index_t t = 0; t < logits.rows; ++t) {
      float* const row = scores_.data() + t * logits.cols;
      if (sigmoid_)
        moeroute::sigmoid::score_row(logits.row(t), logits.cols, row);
      else
        moeroute::softmax::score_row(logits.row(t), logits.cols, row);
    }
    return {scores_.data(), logits.rows, logits.cols};
  }

  balance_method method_;
  bool sigmoid_;
  std::vector<float> bias_, scores_;
  moeroute::bias_controller controller_;
  moeroute::bip_balancer bip_;
  moeroute::quantile_balancer quantile_;
  std::vector<double> counts_;
  moeroute::workspace ws_;
};

/// A mixture behind a router. make(balancing, learning) gives the router of a phase.
template <class Make>
class routed_block : public block {
 public:
  using router_type = decltype(std::declval<Make&>()(std::declval<balancing&>(), true));
  static constexpr bool by_threshold =
      std::is_same_v<router_type, moeroute::threshold_router<moeroute::relu>>;

  routed_block(Make make, balance_method method, bool sigmoid, std::mt19937_64& random)
      : gate_(block_experts * byte_model::d, byte_model::d, random),
        experts_(block_experts, block_ff, random),
        balance_(method, sigmoid),
        packed_(block_experts, byte_model::d),
        learning_(packed_, make(balance_, true), experts_.forward()),
        fixed_(packed_, make(balance_, false), experts_.forward()) {}

  void forward(const std::vector<float>& x, std::span<const std::int32_t> ids, bool learning,
               std::vector<float>& y) override {
    const moeroute::side_inputs side = side_of(ids);
    if (!learning) {
      fixed_.set_gate(gate_.rows(block_experts));
      return fixed_.forward(states(x), states(y), side);
    }
    ids_ = ids;
    packed_.set_rows(0, gate_.rows(block_experts));
    logits_.resize(states(x).rows * block_experts);
    const matrix_view<float> logits(logits_.data(), states(x).rows, block_experts);
    moeroute::gate(states(x), packed_, logits);
    balance_.before(logits);
    learning_.set_gate(gate_.rows(block_experts));
    learning_.forward(states(x), states(y), side, moeroute::serial{}, tape_);
  }

  void backward(const std::vector<float>& x, const std::vector<float>& dy,
                std::vector<float>& dx) override {
    const index_t tokens = tape_.tokens;
    dlogits_.resize(tokens * block_experts);
    const matrix_view<float> dlogits(dlogits_.data(), tokens, block_experts);
    observe();
    bool adds = balance_.after(tape_.logits, tape_.choices, dlogits);
    if constexpr (by_threshold) {
      moeroute::relu_balance_loss({.coefficient = lambda_.lambda(),
                                   .weighting = moeroute::relu_weighting::load,
                                   .k = block_k},
                                  {}, tape_.logits, dlogits, ws_, moeroute::serial{});
      lambda_.update(tape_.choices.choices(), tokens * block_experts);
      adds = true;
    }
    using enum moeroute::gradient_to;
    moeroute::backward(learning_, states(x), side_of(ids_), tape_, states(dy),
                       moeroute::layer_weights<>{gate_.rows(block_experts)}, experts_.backward(),
                       moeroute::layer_gradients{.to = add,
                                                 .x = states(dx),
                                                 .gate = gate_.slope(block_experts),
                                                 .logits = dlogits,
                                                 .logits_to = adds ? add : write});
  }

  void step(std::int64_t n, float rate) override {
    gate_.step(n, rate);
    experts_.step(n, rate);
  }
  void keep(archive& file) override {
    file.add(gate_);
    experts_.keep(file);
    balance_.keep(file);
    double lambda = lambda_.lambda();
    file.number(lambda);
    lambda_ = moeroute::lambda_controller(lambda_from(lambda));
  }

 private:
  // Only a table reads the tokens' ids, and what nobody reads is refused.
  static moeroute::side_inputs side_of(std::span<const std::int32_t> ids) {
    moeroute::side_inputs side;
    if constexpr (requires(const router_type& r) { r.table; }) side.token_ids = ids;
    return side;
  }

  static moeroute::lambda_options lambda_from(double start) {
    return {.experts = block_experts, .k = block_k, .start = start, .factor = 1.05, .floor = 1e-6};
  }

  void observe() {
    const moeroute::assignment& choices = tape_.choices;
    std::vector<double> load(static_cast<std::size_t>(block_experts));
    count_choices(choices, {}, std::span(load));
    const double sum = std::accumulate(load.begin(), load.end(), 0.0);
    figures_.max_violation =
        sum > 0.0 ? *std::ranges::max_element(load) * static_cast<double>(block_experts) / sum - 1.0
                  : 0.0;
    figures_.active = sum / static_cast<double>(choices.tokens());
    figures_.entropy = 0.0;
    for (index_t t = 0; t < choices.tokens(); ++t)
      figures_.entropy +=
          moeroute::token_entropy(std::span<const float>(tape_.logits.row(t), block_experts)) /
          std::log(2.0) / static_cast<double>(choices.tokens());
  }

  parameter gate_;
  expert_set experts_;
  balancing balance_;
  moeroute::simd::packed_matrix<> packed_;
  moeroute::moe_layer<router_type, expert_set::function> learning_, fixed_;
  moeroute::layer_tape tape_;
  moeroute::buffer<float> logits_, dlogits_;
  moeroute::workspace ws_;
  moeroute::lambda_controller lambda_{lambda_from(1e-4)};
  std::span<const std::int32_t> ids_;
};

/// The block of a name. Refuses a name or a balance that is none.
inline std::unique_ptr<block> make_block(const std::string& name, balance_method balance,
                                         std::mt19937_64& random) {
  using namespace moeroute;
  static const expert_table table = random_table(byte_model::bytes, block_k, block_experts, 5);
  const auto moe = [&](auto make, bool sigmoid = false) -> std::unique_ptr<block> {
    return std::make_unique<routed_block<decltype(make)>>(make, balance, sigmoid, random);
  };
  const bool takes_bias = name == "softmax" || name == "sigmoid";
  if (!takes_bias && balance != balance_method::none)
    refuse("--balance: only softmax and sigmoid are balanced, not ", name);
  const top_k best{.k = block_k};
  if (name == "dense") return std::make_unique<dense_block>(random);
  if (name == "soft") return std::make_unique<soft_block>(random);
  if (name == "softmax")
    return moe([best](const balancing& b, bool) {
      return router<softmax>{
          .selection = best, .weight = sum_normalized, .bias = selection_bias(b.bias())};
    });
  if (name == "sigmoid")
    return moe(
        [best](const balancing& b, bool) {
          return router<sigmoid>{
              .selection = best, .weight = sum_normalized, .bias = selection_bias(b.bias())};
        },
        true);
  if (name == "expert_choice")
    return moe([](const balancing&, bool) {
      return expert_choice<>{.capacity = {.factor = static_cast<double>(block_k)}};
    });
  if (name == "sinkhorn")
    return moe([](const balancing&, bool learning) {
      return sinkhorn{.k = block_k,
                      .phase = learning ? routing_phase::training : routing_phase::evaluation};
    });
  if (name == "relu") return moe([](const balancing&, bool) { return threshold_router<relu>{}; });
  if (name == "hash")
    return moe([](const balancing&, bool) {
      return table_router<uniform_score>{.table = &table, .score = {}, .weight = sum_normalized};
    });
  refuse("--router: '", name,
         "' is none of softmax, sigmoid, expert_choice, sinkhorn, relu, soft, hash, dense");
}

}  // namespace example

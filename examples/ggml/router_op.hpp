// Routing as one node of a ggml graph, on the C face of moeroute: what an engine built on ggml
// takes over as it is.
#pragma once

#include <ggml.h>
#include <moeroute.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

// What a router's node leaves for the graph, as views of it.
struct routed {
  ggml_tensor* ids;      // I32 [k, T]: what ggml_mul_mat_id takes
  ggml_tensor* weights;  // F32 [k, T]
};

// What a node that routes and plans leaves: the k * T choices as slots in expert-major order, so
// that each expert's rows lie side by side, and the way back.
struct planned {
  routed choices;
  ggml_tensor* token_of_slot;   // I32 [k * T]: ggml_get_rows of the tokens
  ggml_tensor* expert_of_slot;  // I32 [1, k * T]: ids for ggml_mul_mat_id of those rows
  ggml_tensor* slot_of_choice;  // I32 [k * T]: ggml_get_rows of what the experts made
};

// A router for graphs on the CPU: whatever the description says, its node is one. The router, its
// scratch and the bias that it was given outlive every graph that it has nodes in, and one graph at
// a time runs them. Computing a node allocates nothing for up to `most_tokens` tokens.
class router_op {
 public:
  router_op(const moeroute_spec& spec, const moeroute_tensors& tensors, std::int64_t most_tokens,
            int threads)
      : most_tokens_(most_tokens) {
    // Each thread routes some of the tokens: what is decided over all of them, or drawn by their
    // place among them, would differ with the number of threads.
    if (spec.selection >= MOEROUTE_RANDOM) {
      throw std::invalid_argument(
          "router_op: a rule over a batch, or a random one, is not one token's");
    }
    moeroute_router* router = nullptr;
    check(moeroute_router_new(&spec, &tensors, &router));
    router_.reset(router);
    check(moeroute_router_get_shape(router_.get(), &shape_));
    if (shape_.ragged || shape_.token_ids || spec.zero_experts > 0) {
      throw std::invalid_argument(
          "router_op: a graph wants k experts with weights for every token, by logits alone");
    }
    for (int i = 0; i < std::max(threads, 1); ++i) {
      moeroute_assignment* choices = nullptr;
      check(moeroute_assignment_new(&choices));
      choices_.emplace_back(choices);
      check(moeroute_assignment_reserve(choices, router, most_tokens, MOEROUTE_FLOAT, 1));
    }
    moeroute_plan* plan = nullptr;
    check(moeroute_plan_new(&plan));
    plan_.reset(plan);
    check(moeroute_plan_reserve(plan, choices_[0].get(), nullptr));
  }
  // Its nodes hold its address.
  router_op(const router_op&) = delete;
  router_op& operator=(const router_op&) = delete;

  // logits F32 [E, T], rows contiguous.
  routed route(ggml_context* context, ggml_tensor* logits) {
    ggml_tensor* node = append(context, logits, 2, run_route);
    return views(context, node);
  }

  planned route_and_plan(ggml_context* context, ggml_tensor* logits) {
    ggml_tensor* node = append(context, logits, 5, run_route_and_plan);
    const std::int64_t n = node->ne[0] * node->ne[1];
    const auto part = [&](std::size_t i) {
      return ggml_view_1d(context, node, n, i * node->nb[2]);
    };
    return {.choices = views(context, node),
            .token_of_slot = part(2),
            .expert_of_slot = ggml_view_2d(context, node, 1, n, node->nb[0], 3 * node->nb[2]),
            .slot_of_choice = part(4)};
  }

 private:
  static void check(int status) {
    if (status != MOEROUTE_OK) throw std::runtime_error(moeroute_last_error());
  }

  // A node has one type: weights are 32 bits among integers, and their view says what they are.
  ggml_tensor* append(ggml_context* context, ggml_tensor* logits, std::int64_t parts,
                      ggml_custom_op_t run) {
    if (logits->type != GGML_TYPE_F32 || logits->ne[0] != shape_.columns ||
        logits->ne[1] > most_tokens_ || logits->ne[2] != 1 || logits->ne[3] != 1 ||
        logits->nb[0] != sizeof(float) || logits->nb[1] % sizeof(float) != 0 ||
        (logits->ne[1] > 1 &&
         logits->nb[1] < logits->nb[0] * static_cast<std::size_t>(logits->ne[0]))) {
      throw std::invalid_argument(
          "router_op: logits are F32 [E, T], T at most what was reserved, rows contiguous");
    }
    const int tasks = parts == 2 ? static_cast<int>(choices_.size()) : 1;
    return ggml_custom_4d(context, GGML_TYPE_I32, shape_.k, logits->ne[1], parts, 1, &logits, 1,
                          run, tasks, this);
  }

  static routed views(ggml_context* context, ggml_tensor* node) {
    routed result = {
        .ids = ggml_view_2d(context, node, node->ne[0], node->ne[1], node->nb[1], 0),
        .weights = ggml_view_2d(context, node, node->ne[0], node->ne[1], node->nb[1], node->nb[2])};
    result.weights->type = GGML_TYPE_F32;
    return result;
  }

  // Tokens [begin, end) of a node, by one thread.
  void route_rows(ggml_tensor* node, std::int64_t begin, std::int64_t end,
                  moeroute_assignment* choices) const {
    const ggml_tensor* logits = node->src[0];
    const std::int64_t stride = static_cast<std::int64_t>(logits->nb[1] / sizeof(float));
    const moeroute_const_matrix rows = {
        .data = static_cast<const float*>(logits->data) + begin * stride,
        .rows = end - begin,
        .cols = shape_.columns,
        .stride = stride,
        .type = MOEROUTE_FLOAT};
    std::int32_t* ids = part(node, 0) + begin * shape_.k;
    float* weights = reinterpret_cast<float*>(part(node, 1)) + begin * shape_.k;
    if (moeroute_route_to(router_.get(), rows, nullptr, nullptr, choices, ids, weights) !=
        MOEROUTE_OK) {
      GGML_ABORT("%s", moeroute_last_error());
    }
    // A pick that could not be made has weight 0; ggml takes every id for an index.
    std::replace(ids, ids + (end - begin) * shape_.k, -1, 0);
  }

  static std::int32_t* part(ggml_tensor* node, int i) {
    return reinterpret_cast<std::int32_t*>(static_cast<char*>(node->data) +
                                           static_cast<std::size_t>(i) * node->nb[2]);
  }

  // ggml calls a node's function from all of its threads, whatever number of tasks was asked for.
  static void run_route(ggml_tensor* node, int thread, int threads, void* self) {
    const router_op& op = *static_cast<const router_op*>(self);
    const int pieces = std::min(threads, static_cast<int>(op.choices_.size()));
    if (thread >= pieces) return;
    const std::int64_t tokens = node->ne[1];
    const std::int64_t begin = tokens * thread / pieces, end = tokens * (thread + 1) / pieces;
    if (begin < end)
      op.route_rows(node, begin, end, op.choices_[static_cast<std::size_t>(thread)].get());
  }

  static void run_route_and_plan(ggml_tensor* node, int thread, int, void* self) {
    const router_op& op = *static_cast<const router_op*>(self);
    const std::int64_t tokens = node->ne[1], choices = tokens * op.shape_.k;
    if (thread != 0 || tokens == 0) return;
    op.route_rows(node, 0, tokens, op.choices_[0].get());
    moeroute_plan_view plan;
    if (moeroute_plan_make(op.plan_.get(), op.choices_[0].get(), nullptr) != MOEROUTE_OK ||
        moeroute_plan_get(op.plan_.get(), &plan) != MOEROUTE_OK) {
      GGML_ABORT("%s", moeroute_last_error());
    }
    // Picks that could not be made have no slot: what is left at the end reads token 0 for weight
    // 0.
    std::int32_t* token_of_slot = part(node, 2);
    std::fill(std::copy(plan.token_of_slot, plan.token_of_slot + plan.slots, token_of_slot),
              token_of_slot + choices, 0);
    std::int32_t* expert_of_slot = part(node, 3);
    std::fill(expert_of_slot, expert_of_slot + choices, 0);
    for (std::int32_t e = 0; e < plan.experts; ++e) {
      std::fill(expert_of_slot + plan.offsets[e], expert_of_slot + plan.offsets[e + 1], e);
    }
    std::transform(plan.slot_of_choice, plan.slot_of_choice + choices, part(node, 4),
                   [](std::int32_t slot) { return std::max(slot, 0); });
  }

  struct give_back {
    void operator()(moeroute_router* router) const { moeroute_router_free(router); }
    void operator()(moeroute_assignment* choices) const { moeroute_assignment_free(choices); }
    void operator()(moeroute_plan* plan) const { moeroute_plan_free(plan); }
  };

  std::unique_ptr<moeroute_router, give_back> router_;
  moeroute_router_shape shape_ = {};
  std::int64_t most_tokens_;
  std::vector<std::unique_ptr<moeroute_assignment, give_back>> choices_;  // one for each thread
  std::unique_ptr<moeroute_plan, give_back> plan_;
};

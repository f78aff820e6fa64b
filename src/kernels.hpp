// What one instruction set offers to the face: the table that is the only symbol of its object.
//
// route.cpp, rows.cpp and balance.cpp are compiled once per set, with MOEROUTE_SET as its name. An
// inline function that two objects share by name would be kept once by the linker, from whichever
// comes first, with instructions that the machine may lack; so each set is joined into one object
// and all of its symbols but the table are made local. Functions throw; the face turns that into a
// status.
#pragma once

#include <cstdint>

#include <moeroute.h>

namespace moeroute::sets {

/// What every handle begins with, so that one of another kind is refused.
enum class handle_kind : std::uint32_t {
  none = 0,
  router = 0x6d6f6501,
  assignment,
  plan,
  gate,
  soft_plan,
  bias,
};

struct kernels;

struct handle {
  handle_kind kind;
  const kernels* set = nullptr;  ///< of routers and gates: what they were made for
};

/// Everything that runs in the registers of one instruction set.
struct kernels {
  const char* name;

  moeroute_router* (*router_new)(const moeroute_spec&, const moeroute_tensors&);
  void (*router_free)(moeroute_router*);
  void (*router_shape)(const moeroute_router&, moeroute_router_shape&);
  void (*route)(const moeroute_router&, const moeroute_const_matrix&, const moeroute_side&,
                const moeroute_executor*, moeroute_assignment&);
  /// Routes zeros, on every way that a router may take; and room for losses.
  void (*route_reserve)(const moeroute_router&, const moeroute_const_matrix&, const moeroute_side&,
                        const moeroute_executor*, moeroute_assignment&);

  moeroute_gate* (*gate_new)(const moeroute_const_matrix&, const float* bias);
  void (*gate_free)(moeroute_gate*);
  void (*gate_run)(const moeroute_gate&, const moeroute_const_matrix&, const float* cosine_scale,
                   const moeroute_matrix&, const moeroute_executor*);

  void (*plan_make)(const moeroute_assignment&, const moeroute_plan_options&, moeroute_plan&);
  void (*plan_of_lists)(const moeroute_expert_lists&, const moeroute_plan_options&, float* weights,
                        moeroute_plan&);
  void (*plan_reserve)(const moeroute_assignment&, const moeroute_plan_options&, moeroute_plan&);
  void (*dispatch)(const moeroute_plan&, const moeroute_const_matrix&, const moeroute_matrix&,
                   const float* scale, const moeroute_executor*);
  /// Without a plan: rows in the order of their choices. Without an assignment: by the weights.
  void (*combine)(const moeroute_const_matrix&, const moeroute_plan*, const moeroute_assignment*,
                  const float* weights, std::int64_t weights_size, const moeroute_matrix&,
                  const moeroute_combine_options&, const moeroute_executor*);

  void (*soft_plan_make)(const moeroute_const_matrix&, std::int64_t slots_per_expert,
                         moeroute_soft_plan&, const moeroute_executor*);
  void (*soft_dispatch)(const moeroute_soft_plan&, const moeroute_const_matrix&,
                        const moeroute_matrix&, const moeroute_executor*);
  void (*soft_combine)(const moeroute_soft_plan&, const moeroute_const_matrix&,
                       const moeroute_matrix&, const moeroute_executor*);

  void (*balance_loss)(const moeroute_losses&, const moeroute_const_matrix& logits,
                       moeroute_assignment&, const moeroute_matrix& dlogits,
                       const moeroute_executor*, double* values);
};

/// What needs no registers, compiled once, for any machine of its kind.
struct plain_code {
  const char* (*model_name)(std::int32_t);
  bool (*spec_of_model)(const char* name, moeroute_spec&);
  void (*spec_capacity)(const moeroute_spec&, moeroute_capacity&);

  moeroute_assignment* (*assignment_new)();
  void (*assignment_free)(moeroute_assignment*);
  void (*assignment_set)(moeroute_assignment&, std::int64_t tokens, std::int64_t experts,
                         std::int64_t k, const std::int32_t* ids, const float* weights);
  void (*assignment_get)(const moeroute_assignment&, moeroute_assignment_view&);
  /// Room for what capacity needs beside the choices.
  void (*assignment_warm)(moeroute_assignment&);
  void (*apply_capacity)(moeroute_assignment&, const moeroute_capacity&, moeroute_capacity_result&);
  void (*count_choices)(const moeroute_assignment&, bool first_only, bool kept_only,
                        const std::uint8_t* mask, double* counts, std::int64_t size);
  void (*once_counts)(const moeroute_assignment&, std::int64_t ranks, std::int64_t ranks_per_node,
                      std::int32_t* per_expert, std::int32_t* per_rank, std::uint8_t* in_rank,
                      std::int32_t* per_node);

  moeroute_plan* (*plan_new)();
  void (*plan_free)(moeroute_plan*);
  void (*plan_get)(const moeroute_plan&, moeroute_plan_view&);
  void (*aligned_blocks)(const moeroute_plan&, std::int64_t block, std::int32_t tail_expert,
                         std::int32_t* sorted, std::int64_t sorted_size,
                         std::int32_t* block_experts, std::int32_t* block_starts,
                         std::int64_t blocks_size);
  void (*row_id_map)(const moeroute_plan&, std::int32_t* map, std::int64_t size);

  moeroute_soft_plan* (*soft_plan_new)();
  void (*soft_plan_free)(moeroute_soft_plan*);
  void (*soft_plan_reserve)(moeroute_soft_plan&, std::int64_t tokens, std::int64_t slots,
                            std::int64_t slots_per_expert);
  void (*soft_plan_get)(const moeroute_soft_plan&, moeroute_soft_plan_view&);

  moeroute_bias* (*bias_new)(std::int64_t experts, const moeroute_bias_options*);
  void (*bias_free)(moeroute_bias*);
  void (*bias_update)(moeroute_bias&, const double* counts, std::int64_t size);
  void (*bias_get)(moeroute_bias&, float*& values, std::int64_t& experts);
};

}  // namespace moeroute::sets

// The functions of one instruction set, by the file they are in, and its table.
#pragma once

#include "handles.hpp"

#define MOEROUTE_TEXT2(x) #x
#define MOEROUTE_TEXT(x) MOEROUTE_TEXT2(x)
#define MOEROUTE_JOIN2(a, b) a##b
#define MOEROUTE_JOIN(a, b) MOEROUTE_JOIN2(a, b)
#define MOEROUTE_TABLE MOEROUTE_JOIN(moeroute_kernels_, MOEROUTE_SET)

extern "C" const moeroute::sets::kernels MOEROUTE_TABLE;

namespace moeroute::sets {

// rows.cpp
moeroute_gate* gate_new(const moeroute_const_matrix&, const float* bias);
void gate_free(moeroute_gate*);
void gate_run(const moeroute_gate&, const moeroute_const_matrix&, const float* cosine_scale,
              const moeroute_matrix&, const moeroute_executor*);
void dispatch_rows(const moeroute_plan&, const moeroute_const_matrix&, const moeroute_matrix&,
                   const float* scale, const moeroute_executor*);
void combine_rows(const moeroute_const_matrix&, const moeroute_plan*, const moeroute_assignment*,
                  const float* weights, std::int64_t weights_size, const moeroute_matrix&,
                  const moeroute_combine_options&, const moeroute_executor*);
void soft_plan_make(const moeroute_const_matrix&, std::int64_t slots_per_expert,
                    moeroute_soft_plan&, const moeroute_executor*);
void soft_dispatch(const moeroute_soft_plan&, const moeroute_const_matrix&, const moeroute_matrix&,
                   const moeroute_executor*);
void soft_combine(const moeroute_soft_plan&, const moeroute_const_matrix&, const moeroute_matrix&,
                  const moeroute_executor*);

// balance.cpp
void reserve_losses(const moeroute_executor*, moeroute_assignment&);
void loss_of(const moeroute_losses&, const moeroute_const_matrix& logits, moeroute_assignment&,
             const moeroute_matrix& dlogits, const moeroute_executor*, double* values);

}  // namespace moeroute::sets

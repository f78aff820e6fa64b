// Gates, rows on their way to experts and back, and soft mixtures, on one instruction set.
#include "set.hpp"

#include <memory>
#include <variant>

#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/soft.hpp>

struct moeroute_gate : moeroute::sets::handle {
  std::variant<moeroute::simd::packed_matrix<float>,
               moeroute::simd::packed_matrix<moeroute::bfloat16>,
               moeroute::simd::packed_matrix<moeroute::float16>>
      weight;  // in the type that it was given in
};

namespace moeroute::sets {

moeroute_gate* gate_new(const moeroute_const_matrix& weight, const float* bias) {
  auto made = std::make_unique<moeroute_gate>();
  made->kind = handle_kind::gate;
  made->set = &MOEROUTE_TABLE;
  with_type(weight.type, [&]<class T>(T) {
    simd::packed_matrix<T> packed(rows_of<T>(weight));
    if (bias != nullptr)
      for (index_t e = 0; e < weight.rows; ++e) packed.bias(e) = bias[e];
    made->weight = std::move(packed);
  });
  return made.release();
}

void gate_free(moeroute_gate* gate) { delete gate; }

void gate_run(const moeroute_gate& gate, const moeroute_const_matrix& x, const float* cosine_scale,
              const moeroute_matrix& logits, const moeroute_executor* with) {
  const pool exec(with);
  with_type(x.type, [&]<class T>(T) {
    std::visit(
        [&](const auto& weight) {
          if (cosine_scale != nullptr)
            return cosine_gate(rows_of<T>(x), weight, *cosine_scale, rows_of<float>(logits), exec);
          moeroute::gate(rows_of<T>(x), weight, rows_of<float>(logits), exec);
        },
        gate.weight);
  });
}

void dispatch_rows(const moeroute_plan& plan, const moeroute_const_matrix& x,
                   const moeroute_matrix& slots, const float* scale,
                   const moeroute_executor* with) {
  const pool exec(with);
  if (plan.slots.tokens() == 0 && x.rows > 0)
    fail("dispatch", "the plan has no tokens, x has: make it of the assignment first");
  check_size("dispatch", "x.rows", x.rows, plan.slots.tokens());
  check_size("dispatch", "slots.rows", slots.rows, plan.slots.slots());
  check_size("dispatch", "slots.cols", slots.cols, x.cols);
  if (x.type == slots.type && scale == nullptr) {
    // Rows of one type are moved as bytes.
    const index_t size = x.type == MOEROUTE_BYTES ? 1 : x.type == MOEROUTE_FLOAT ? 4 : 2;
    const auto bytes = [&](const auto& m, auto* data) {
      return matrix_view(data, m.rows, m.cols * size, m.stride * size);
    };
    return dispatch_bytes(bytes(x, static_cast<const std::byte*>(x.data)), plan.slots,
                          bytes(slots, static_cast<std::byte*>(slots.data)), exec);
  }
  if (x.type == MOEROUTE_BYTES || slots.type == MOEROUTE_BYTES)
    fail("dispatch", "one side is MOEROUTE_BYTES, expected both, and no scale");
  with_types("dispatch", x.type, slots.type, [&]<class From, class To>(From, To) {
    dispatch(rows_of<From>(x), plan.slots, rows_of<To>(slots), exec,
             {.scale = span_of(scale, plan.slots.choices())});
  });
}

void combine_rows(const moeroute_const_matrix& rows, const moeroute_plan* plan,
                  const moeroute_assignment* assignment, const float* weights,
                  std::int64_t weights_size, const moeroute_matrix& y,
                  const moeroute_combine_options& o, const moeroute_executor* with) {
  const pool exec(with);
  if (o.x.data != nullptr) check_size("combine", "x.type", o.x.type, y.type);
  if (o.shared.data != nullptr) check_size("combine", "shared.type", o.shared.type, y.type);
  check_range("combine", "identity_first", o.identity_first, 0, max_experts);
  with_types("combine", rows.type, y.type, [&]<class From, class To>(From, To) {
    const combine_options<To, To> options{
        .weight = o.weights_applied != 0 ? combine_weight::one : combine_weight::of_choice,
        .output = o.accumulate != 0 ? combine_output::accumulate : combine_output::overwrite,
        .lost = o.lost_residual != 0 ? lost_token::residual : lost_token::zero,
        .identity_first = o.identity_first,
        .identity_end = o.identity_end,
        .x = rows_of<To>(o.x),
        .shared = rows_of<To>(o.shared),
        .shared_weight = span_of(o.shared_weight, y.rows)};
    if (plan == nullptr)
      return combine(rows_of<From>(rows), assignment->choices, rows_of<To>(y), exec, options);
    if (assignment == nullptr)
      return combine(rows_of<From>(rows), plan->slots, span_of(weights, weights_size),
                     rows_of<To>(y), exec, options);
    combine(rows_of<From>(rows), plan->slots, assignment->choices, rows_of<To>(y), exec, options);
  });
}

void soft_plan_make(const moeroute_const_matrix& logits, std::int64_t slots_per_expert,
                    moeroute_soft_plan& plan, const moeroute_executor* with) {
  with_type(logits.type, [&]<class T>(T) {
    plan_soft(rows_of<T>(logits), slots_per_expert, plan.slots, pool(with));
  });
}

void soft_dispatch(const moeroute_soft_plan& plan, const moeroute_const_matrix& x,
                   const moeroute_matrix& slots, const moeroute_executor* with) {
  with_types("dispatch", x.type, slots.type, [&]<class From, class To>(From, To) {
    dispatch(rows_of<From>(x), plan.slots, rows_of<To>(slots), pool(with));
  });
}

void soft_combine(const moeroute_soft_plan& plan, const moeroute_const_matrix& slots,
                  const moeroute_matrix& y, const moeroute_executor* with) {
  with_types("combine", slots.type, y.type, [&]<class From, class To>(From, To) {
    combine(rows_of<From>(slots), plan.slots, rows_of<To>(y), pool(with));
  });
}

}  // namespace moeroute::sets

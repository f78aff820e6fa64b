// README's step: gate, route, plan, dispatch, experts, combine.
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/expert.hpp>
#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/route.hpp>

void expert(int e, const float* in, float* out, moeroute::index_t rows);

struct memory {
  moeroute::workspace workspace;
  moeroute::assignment choices;
  moeroute::dispatch_plan plan;
  moeroute::buffer<float> in, out;
};

void run(const moeroute::simd::packed_matrix<>& gate, moeroute::matrix_view<const float> x,
         moeroute::matrix_view<float> logits, moeroute::matrix_view<float> y, memory& m) {
  const moeroute::router router{moeroute::softmax{}, moeroute::top_k_of<2>{},
                                moeroute::sum_normalized};
  moeroute::gate(x, gate, logits);
  moeroute::route(router, logits, m.workspace, m.choices);
  moeroute::plan(m.choices, m.plan);
  m.in.resize(m.plan.slots() * x.cols);
  m.out.resize(m.plan.slots() * x.cols);
  const moeroute::matrix_view<float> in(m.in.data(), m.plan.slots(), x.cols);
  const moeroute::matrix_view<float> out(m.out.data(), m.plan.slots(), x.cols);
  moeroute::dispatch(x, m.plan, in);
  moeroute::for_each_expert(m.plan, in, out, [](int e, auto block, auto result) {
    expert(e, block.data, result.data, block.rows);
  });
  moeroute::combine(out, m.plan, m.choices, y);
}

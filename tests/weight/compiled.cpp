// A routing file of an engine that links moeroute::compiled: route, plan, dispatch, combine.
#include <moeroute/compiled.hpp>

void expert(int e, const float* in, float* out, std::int64_t rows);

struct memory {
  moeroute::compiled::assignment choices;
  moeroute::compiled::dispatch_plan plan;
  float *in, *out;
};

void run(const moeroute::compiled::router& router, const float* x, const float* logits, float* y,
         std::int64_t tokens, std::int64_t width, memory& m) {
  using namespace moeroute::compiled;
  route(router, {logits, tokens, router.columns()}, m.choices);
  plan(m.choices, m.plan);
  const std::int64_t slots = m.plan.slots();
  dispatch({x, tokens, width}, m.plan, {m.in, slots, width});
  for (std::int64_t e = 0; e < router.experts(); ++e) {
    const std::int64_t first = m.plan.offsets()[static_cast<std::size_t>(e)];
    expert(static_cast<int>(e), m.in + first * width, m.out + first * width,
           m.plan.loads()[static_cast<std::size_t>(e)]);
  }
  combine({m.out, slots, width}, m.plan, m.choices, {y, tokens, width});
}

// An engine in C: one layer's step through the compiled library, with memory of its own, no
// allocation in the loop and a pool of threads of its own.
#include <moeroute.h>
#include <stdio.h>
#include <stdlib.h>
#include <threads.h>

enum { tokens = 64, experts = 8, k = 2, width = 32 };

// ---- a pool, as small as it gets ----------------------------------------------------------------

typedef struct half {
  moeroute_body body;
  void* loop;
  int64_t begin, end;
} half;

static int run_half(void* data) {
  half* h = data;
  if (h->begin < h->end) h->body(h->loop, h->begin, h->end);
  return 0;
}

// Pieces begin at multiples of the grain: the first half here, the second on another thread.
static void two_threads(void* pool, int64_t n, int64_t grain, moeroute_body body, void* loop) {
  const int64_t middle = (n / grain + 1) / 2 * grain;
  half rest = {body, loop, middle, n};
  thrd_t thread;
  (void)pool;
  if (middle >= n || thrd_create(&thread, run_half, &rest) != thrd_success) {
    body(loop, 0, n);
    return;
  }
  body(loop, 0, middle);
  thrd_join(thread, NULL);
}

// ---- the step -----------------------------------------------------------------------------------

static int failed(int status) {
  if (status != MOEROUTE_OK) fprintf(stderr, "from_c: %s\n", moeroute_last_error());
  return status != MOEROUTE_OK;
}

static float gate_weight[experts * width], x[tokens * width], logits[tokens * experts];
static float in[tokens * k * width], out[tokens * k * width], y[tokens * width];

int main(void) {
  moeroute_spec spec;
  moeroute_router* router = NULL;
  moeroute_gate* gate = NULL;
  moeroute_assignment* choices = NULL;
  moeroute_plan* plan = NULL;
  moeroute_plan_view slots;
  const moeroute_executor pool = {two_threads, NULL, 2};
  int step, i, e;

  for (i = 0; i < experts * width; ++i) gate_weight[i] = (float)rand() / RAND_MAX - 0.5f;

  // Once: Mixtral's router (softmax, the best two of eight, weights that sum to 1), and the memory.
  if (failed(moeroute_spec_of_model("mixtral", &spec)) ||
      failed(moeroute_router_new(&spec, NULL, &router)) ||
      failed(
          moeroute_gate_new((moeroute_const_matrix){gate_weight, experts, width, 0, MOEROUTE_FLOAT},
                            NULL, 0, &gate)) ||
      failed(moeroute_assignment_new(&choices)) || failed(moeroute_plan_new(&plan)) ||
      failed(moeroute_assignment_reserve(choices, router, tokens, MOEROUTE_FLOAT, 2)) ||
      failed(moeroute_plan_reserve(plan, choices, NULL)))
    return EXIT_FAILURE;

  // Every step of every layer.
  for (step = 0; step < 3; ++step) {
    const int64_t rows = step == 2 ? 1 : tokens;  // the last one decodes
    for (i = 0; i < rows * width; ++i) x[i] = (float)rand() / RAND_MAX - 0.5f;
    if (failed(moeroute_gate_run(gate, (moeroute_const_matrix){x, rows, width, 0, MOEROUTE_FLOAT},
                                 (moeroute_matrix){logits, rows, experts, 0, MOEROUTE_FLOAT},
                                 &pool)) ||
        failed(moeroute_route(router,
                              (moeroute_const_matrix){logits, rows, experts, 0, MOEROUTE_FLOAT},
                              NULL, &pool, choices)) ||
        failed(moeroute_plan_make(plan, choices, NULL)) ||
        failed(moeroute_plan_get(plan, &slots)) ||
        failed(moeroute_dispatch(plan, (moeroute_const_matrix){x, rows, width, 0, MOEROUTE_FLOAT},
                                 (moeroute_matrix){in, slots.slots, width, 0, MOEROUTE_FLOAT}, NULL,
                                 &pool)))
      return EXIT_FAILURE;
    // Expert e owns the rows [offsets[e], offsets[e + 1]): here it multiplies by e + 1.
    for (e = 0; e < experts; ++e)
      for (i = slots.offsets[e] * width; i < slots.offsets[e + 1] * width; ++i)
        out[i] = in[i] * (float)(e + 1);
    if (failed(moeroute_combine((moeroute_const_matrix){out, slots.slots, width, 0, MOEROUTE_FLOAT},
                                plan, choices, (moeroute_matrix){y, rows, width, 0, MOEROUTE_FLOAT},
                                NULL, &pool)))
      return EXIT_FAILURE;
    printf("step %d: %d tokens, %d rows for the first of %d experts (%s)\n", step, (int)rows,
           (int)slots.loads[0], experts, moeroute_isa());
  }

  moeroute_plan_free(plan);
  moeroute_assignment_free(choices);
  moeroute_gate_free(gate);
  moeroute_router_free(router);
  return EXIT_SUCCESS;
}

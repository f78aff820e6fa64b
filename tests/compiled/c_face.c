// The C face seen from C: what is refused is refused by a code, whatever the handle and the
// pointer.
#define _POSIX_C_SOURCE 200112L  // setenv
#include <moeroute.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

#define CHECK(condition)                                                     \
  do {                                                                       \
    if (!(condition)) {                                                      \
      printf("%s:%d: %s (last error: %s)\n", __FILE__, __LINE__, #condition, \
             moeroute_last_error());                                         \
      ++failures;                                                            \
    }                                                                        \
  } while (0)

// The sentence begins with the function of this call: moeroute_route(...) says moeroute::route.
static int named(const char* call) {
  const char* const said = moeroute_last_error();
  const size_t n = strcspn(call, "(");
  const size_t ours = strlen("moeroute_");
  return strncmp(said, "moeroute::", ours + 1) == 0 &&
         strncmp(said + ours + 1, call + ours, n - ours) == 0 &&
         strncmp(said + n + 1, ": ", 2) == 0 && strstr(said + n, "moeroute::") == NULL;
}

// The call is refused in these words behind its name, no more and no fewer.
#define REFUSED(call, text)                                            \
  do {                                                                 \
    CHECK((call) == MOEROUTE_INVALID);                                 \
    CHECK(named(#call));                                               \
    CHECK(strcmp(strstr(moeroute_last_error(), ": ") + 2, text) == 0); \
  } while (0)

static void in_order(void* pool, int64_t n, int64_t grain, moeroute_body body, void* loop) {
  (void)grain;
  ++*(int*)pool;
  body(loop, 0, n);
}

// What a spec of another version is told.
static const char* another_version(void) {
  static char text[96];
  snprintf(text, sizeof text, "spec.size is 12, expected %zu: fill it by moeroute_spec_init",
           sizeof(moeroute_spec));
  return text;
}

static void check_handles(void) {
  moeroute_spec spec;
  moeroute_router *router = NULL, *none = NULL;
  moeroute_assignment* choices = NULL;
  moeroute_plan* plan = NULL;
  moeroute_bias* bias = NULL;
  moeroute_router_shape shape;
  moeroute_assignment_view view;
  moeroute_plan_view slots;
  float z[32] = {0};
  int32_t ids[8] = {0};
  const moeroute_const_matrix logits = {z, 4, 8, 0, MOEROUTE_FLOAT};

  CHECK(moeroute_spec_init(&spec) == MOEROUTE_OK);
  CHECK(moeroute_router_new(&spec, NULL, &router) == MOEROUTE_OK);
  CHECK(moeroute_assignment_new(&choices) == MOEROUTE_OK);
  CHECK(moeroute_plan_new(&plan) == MOEROUTE_OK);
  CHECK(moeroute_bias_new(8, NULL, &bias) == MOEROUTE_OK);

  // null
  REFUSED(moeroute_spec_init(NULL), "the spec is null");
  REFUSED(moeroute_spec_of_model(NULL, &spec), "the name is null");
  REFUSED(moeroute_spec_of_model("mixtral", NULL), "the spec is null");
  none = router;
  REFUSED(moeroute_router_new(NULL, NULL, &none), "the spec is null");
  CHECK(none == NULL);
  REFUSED(moeroute_router_new(&spec, NULL, NULL), "the place for the handle is null");
  REFUSED(moeroute_router_get_shape(NULL, &shape), "the router is null");
  REFUSED(moeroute_router_get_shape(router, NULL), "the shape is null");
  REFUSED(moeroute_route(NULL, logits, NULL, NULL, choices), "the router is null");
  REFUSED(moeroute_route(router, logits, NULL, NULL, NULL), "the assignment is null");
  REFUSED(moeroute_route_to(router, logits, NULL, NULL, choices, NULL, z),
          "ids is null, expected 4 values");
  REFUSED(moeroute_route_to(router, logits, NULL, NULL, choices, ids, NULL),
          "weights is null, expected 4 values");
  REFUSED(moeroute_assignment_get(NULL, &view), "the assignment is null");
  REFUSED(moeroute_assignment_get(choices, NULL), "the view is null");
  REFUSED(moeroute_plan_make(plan, NULL, NULL), "the assignment is null");
  REFUSED(moeroute_plan_make(NULL, choices, NULL), "the plan is null");
  REFUSED(moeroute_plan_get(plan, NULL), "the view is null");
  {
    const int32_t tokens[4] = {0, 1, 1, 7}; /* of expert 0, of expert 1 */
    float weights[4] = {0};
    moeroute_expert_lists lists = {3, 2, 2, NULL, NULL};
    moeroute_matrix y = {z, 4, 8, 0, MOEROUTE_FLOAT};
    REFUSED(moeroute_plan_make_of_lists(NULL, &lists, NULL, NULL), "the plan is null");
    REFUSED(moeroute_plan_make_of_lists(plan, NULL, NULL, NULL), "the lists is null");
    REFUSED(moeroute_plan_make_of_lists((moeroute_plan*)(void*)bias, &lists, NULL, NULL),
            "a bias, expected a plan");
    REFUSED(moeroute_plan_make_of_lists(plan, &lists, NULL, NULL),
            "lists.token is null, expected 4 values");
    lists.token = tokens;
    REFUSED(moeroute_plan_make_of_lists(plan, &lists, NULL, weights),
            "weights is given and lists.weight is null, expected both");
    REFUSED(moeroute_plan_make_of_lists(plan, &lists, NULL, NULL),
            "place 3 of the lists has token 7, expected -1 to 2");
    lists.capacity = -1;
    REFUSED(moeroute_plan_make_of_lists(plan, &lists, NULL, NULL),
            "lists.capacity is -1, expected 0 to 1073741823");
    lists.capacity = INT64_MAX;
    REFUSED(moeroute_plan_make_of_lists(plan, &lists, NULL, NULL),
            "lists.capacity is 9223372036854775807, expected 0 to 1073741823");
    lists.experts = 0;
    REFUSED(moeroute_plan_make_of_lists(plan, &lists, NULL, NULL),
            "lists.experts is 0, expected 1 to 1048576");
    lists.tokens = -3;
    REFUSED(moeroute_plan_make_of_lists(plan, &lists, NULL, NULL),
            "lists.tokens is -3, expected 0 to 2147483647");
    REFUSED(moeroute_combine_weights(logits, NULL, weights, 4, y, NULL, NULL), "the plan is null");
    REFUSED(moeroute_combine_weights(logits, plan, NULL, 4, y, NULL, NULL),
            "weights is null, expected 4 values");
    REFUSED(moeroute_combine_weights(logits, plan, weights, -1, y, NULL, NULL),
            "weights is -1, expected 0 to 2147483647");
  }
  {
    moeroute_matrix y = {z, 4, 8, 0, MOEROUTE_FLOAT};
    REFUSED(moeroute_combine(logits, NULL, choices, y, NULL, NULL), "the plan is null");
    REFUSED(moeroute_combine(logits, plan, NULL, y, NULL, NULL), "the assignment is null");
    REFUSED(moeroute_combine_choices(logits, NULL, y, NULL, NULL), "the assignment is null");
    REFUSED(moeroute_combine_choices(logits, choices, y, NULL, NULL),
            "rows.rows() is 4, expected 0");
  }
  REFUSED(moeroute_apply_capacity(choices, NULL, NULL), "the capacity is null");
  REFUSED(moeroute_bias_update(bias, NULL, 8), "counts is null, expected 8 values");
  REFUSED(moeroute_bias_get(bias, NULL, NULL), "values is null");
  REFUSED(moeroute_use_isa(NULL), "the name is null");
  REFUSED(moeroute_use_isa("z80"), "'z80' is no instruction set of this machine");
  CHECK(moeroute_router_free(NULL) == MOEROUTE_OK);
  CHECK(moeroute_plan_free(NULL) == MOEROUTE_OK);

  // of another kind
  REFUSED(moeroute_route((const moeroute_router*)(const void*)plan, logits, NULL, NULL, choices),
          "a plan, expected a router");
  REFUSED(moeroute_route(router, logits, NULL, NULL, (moeroute_assignment*)(void*)router),
          "a router, expected an assignment");
  REFUSED(moeroute_plan_make((moeroute_plan*)(void*)bias, choices, NULL),
          "a bias, expected a plan");
  REFUSED(moeroute_plan_free((moeroute_plan*)(void*)router), "a router, expected a plan");
  REFUSED(moeroute_plan_free((moeroute_plan*)(void*)choices), "an assignment, expected a plan");
  {
    moeroute_soft_plan_view soft;
    REFUSED(moeroute_soft_plan_get((const moeroute_soft_plan*)(const void*)plan, &soft),
            "a plan, expected a soft plan");
  }
  {
    int64_t nothing[8] = {0};
    REFUSED(moeroute_router_free((moeroute_router*)(void*)nothing),
            "a handle that is none of ours, or was freed, expected a router");
  }

  // of another version
  spec.size = 12;
  REFUSED(moeroute_router_new(&spec, NULL, &none), another_version());

  // a plan that was not made, and one that does not fit
  CHECK(moeroute_plan_get(plan, &slots) == MOEROUTE_OK && slots.slots == 0);
  {
    float row[8] = {0};
    moeroute_const_matrix x = {row, 1, 8, 0, MOEROUTE_FLOAT};
    moeroute_matrix to = {row, 1, 8, 0, MOEROUTE_FLOAT};
    REFUSED(moeroute_dispatch(plan, x, to, NULL, NULL),
            "the plan has no tokens, x has: make it of the assignment first");
  }

  CHECK(moeroute_spec_init(&spec) == MOEROUTE_OK);
  CHECK(moeroute_router_free(router) == MOEROUTE_OK);
  CHECK(moeroute_assignment_free(choices) == MOEROUTE_OK);
  CHECK(moeroute_plan_free(plan) == MOEROUTE_OK);
  CHECK(moeroute_bias_free(bias) == MOEROUTE_OK);
}

static void check_sizes(void) {
  moeroute_spec spec;
  moeroute_router *router = NULL, *none = NULL;
  moeroute_assignment* choices = NULL;
  moeroute_plan* plan = NULL;
  moeroute_gate* gate = NULL;
  moeroute_soft_plan* soft = NULL;
  moeroute_bias* bias = NULL;
  moeroute_tensors tensors;
  float z[64] = {0};
  double counts[8] = {0};
  int32_t ids[16] = {0};
  int runs = 0;
  moeroute_executor pool;
  moeroute_const_matrix m = {z, 4, 8, 0, MOEROUTE_FLOAT};
  moeroute_side side;

  memset(&side, 0, sizeof side);
  CHECK(moeroute_spec_init(&spec) == MOEROUTE_OK);
  CHECK(moeroute_router_new(&spec, NULL, &router) == MOEROUTE_OK);
  CHECK(moeroute_assignment_new(&choices) == MOEROUTE_OK);
  CHECK(moeroute_plan_new(&plan) == MOEROUTE_OK);
  CHECK(moeroute_soft_plan_new(&soft) == MOEROUTE_OK);

  m.rows = -1;
  REFUSED(moeroute_route(router, m, NULL, NULL, choices),
          "logits.rows is -1, expected 0 to 2147483647");
  REFUSED(moeroute_gate_new(m, NULL, 0, &gate), "weight.rows is -1, expected 0 to 2147483647");
  m.rows = 4;
  m.cols = -8;
  REFUSED(moeroute_route(router, m, NULL, NULL, choices),
          "logits.cols is -8, expected 0 to 2147483647");
  m.cols = 8;
  m.stride = 7;
  REFUSED(moeroute_route(router, m, NULL, NULL, choices),
          "logits.stride is 7, expected at least 8");
  m.stride = -8;
  REFUSED(moeroute_route(router, m, NULL, NULL, choices),
          "logits.stride is -8, expected 0 to 1099511627776");
  m.stride = 0;
  m.type = 9;
  REFUSED(moeroute_route(router, m, NULL, NULL, choices), "logits.type is 9, expected 0 to 2");
  m.type = MOEROUTE_FLOAT;
  m.data = NULL;
  REFUSED(moeroute_route(router, m, NULL, NULL, choices), "logits.data is null, expected 4 rows");
  m.rows = 0;
  CHECK(moeroute_route(router, m, NULL, NULL, choices) == MOEROUTE_OK);
  m.data = z;
  m.rows = INT64_MAX;
  REFUSED(moeroute_route(router, m, NULL, NULL, choices),
          "logits.rows is 9223372036854775807, expected 0 to 2147483647");
  m.rows = 4;

  REFUSED(moeroute_assignment_reserve(choices, router, -1, MOEROUTE_FLOAT, 1),
          "tokens is -1, expected 0 to 2147483647");
  REFUSED(moeroute_assignment_reserve(choices, router, 1, 9, 1),
          "logits_type is 9, expected 0 to 2");
  REFUSED(moeroute_assignment_reserve(choices, router, 1, MOEROUTE_FLOAT, 0),
          "threads is 0, expected 1 to 1048576");
  REFUSED(moeroute_assignment_set(choices, -1, 8, 2, ids, z),
          "ids is -1, expected 0 to 2147483647");
  REFUSED(moeroute_assignment_set(choices, 2, 8, 0, ids, z), "k is 0, expected 1 to 8");
  REFUSED(moeroute_assignment_set(choices, 2, 0, 1, ids, z), "experts is 0, expected 1 to 1048576");
  ids[1] = -2;
  REFUSED(moeroute_assignment_set(choices, 2, 8, 2, ids, z), "ids[1] is -2, expected -1 to 7");
  ids[1] = 3;
  CHECK(moeroute_assignment_set(choices, 2, 8, 2, ids, z) == MOEROUTE_OK);
  z[2] = NAN;
  REFUSED(moeroute_assignment_set(choices, 2, 8, 2, ids, z),
          "weights[2] is nan, expected a finite number");
  z[2] = -INFINITY;
  REFUSED(moeroute_assignment_set(choices, 2, 8, 2, ids, z),
          "weights[2] is -inf, expected a finite number");
  ids[2] = -1;  // a pick that could not be made weighs nothing, whatever stands there
  CHECK(moeroute_assignment_set(choices, 2, 8, 2, ids, z) == MOEROUTE_OK);
  {
    moeroute_assignment_view view;
    CHECK(moeroute_assignment_get(choices, &view) == MOEROUTE_OK && view.weights[2] == 0.0f);
  }
  ids[2] = 0;
  z[2] = 0;
  {  // what was refused left the choices alone
    moeroute_assignment_view view;
    CHECK(moeroute_assignment_get(choices, &view) == MOEROUTE_OK && view.choices == 4);
  }
  {  // an expert that a token names twice has a slot for each, and both are added
    const int32_t twice[4] = {5, 5, 5, 2};
    const float weights[4] = {0.25f, 0.5f, 1.0f, -1.0f};
    float rows[4] = {2, 4, 8, 16}, y[2] = {0}; /* slot 0: token 1 of expert 2; then expert 5's */
    moeroute_plan_view view;
    const moeroute_const_matrix slots = {rows, 4, 1, 0, MOEROUTE_FLOAT};
    const moeroute_matrix out = {y, 2, 1, 0, MOEROUTE_FLOAT};
    CHECK(moeroute_assignment_set(choices, 2, 8, 2, twice, weights) == MOEROUTE_OK);
    CHECK(moeroute_plan_make(plan, choices, NULL) == MOEROUTE_OK);
    CHECK(moeroute_plan_get(plan, &view) == MOEROUTE_OK && view.slots == 4);
    CHECK(moeroute_combine(slots, plan, choices, out, NULL, NULL) == MOEROUTE_OK);
    CHECK(y[0] == 0.25f * 4 + 0.5f * 8 && y[1] == 16.0f - 2.0f);
    CHECK(moeroute_assignment_set(choices, 2, 8, 2, ids, z) == MOEROUTE_OK);
  }
  side.token_ids = ids;
  REFUSED(moeroute_route(router, m, &side, NULL, choices),
          "token_ids is given, which this router does not read: leave it out");
  m.cols = 7;
  REFUSED(moeroute_route(router, m, NULL, NULL, choices), "logits.cols is 7, expected 8");
  REFUSED(moeroute_route_to(router, m, NULL, NULL, choices, ids, z),
          "logits.cols is 7, expected 8");
  m.cols = 8;
  CHECK(moeroute_assignment_set(choices, 2, 8, 2, ids, z) == MOEROUTE_OK);
  REFUSED(moeroute_count_choices(choices, 0, 0, NULL, counts, 7), "counts.size is 7, expected 8");
  REFUSED(moeroute_count_choices(choices, 0, 0, NULL, counts, -8),
          "counts is -8, expected 0 to 2147483647");
  {
    moeroute_plan_options options;
    memset(&options, 0, sizeof options);
    options.block = -1;
    REFUSED(moeroute_plan_make(plan, choices, &options), "block is -1, expected 1 to 2147483647");
    REFUSED(moeroute_plan_reserve(plan, choices, &options),
            "block is -1, expected 1 to 2147483647");
  }
  CHECK(moeroute_plan_make(plan, choices, NULL) == MOEROUTE_OK);
  REFUSED(moeroute_plan_row_id_map(plan, ids, -3), "map is -3, expected 0 to 2147483647");
  REFUSED(moeroute_plan_row_id_map(plan, ids, 16),
          "export_row_id_map: map.size() is 16, expected 34");
  REFUSED(moeroute_plan_aligned_blocks(plan, 0, -1, ids, 16, ids, NULL, 16),
          "export_aligned_blocks: block is 0, expected 1 to 2147483647");
  REFUSED(moeroute_once_counts(choices, -2, 1, ids, ids, (uint8_t*)ids, NULL),
          "per_rank is -2, expected 0 to 2147483647");

  memset(&tensors, 0, sizeof tensors);
  tensors.bias = z;
  tensors.bias_size = -8;
  REFUSED(moeroute_router_new(&spec, &tensors, &none), "bias is -8, expected 0 to 2147483647");
  tensors.bias = NULL;
  tensors.bias_size = 8;
  REFUSED(moeroute_router_new(&spec, &tensors, &none), "bias is null, expected 8 values");
  tensors.bias_size = 0;
  REFUSED(moeroute_gate_new(m, z, 3, &gate), "bias_size is 3, expected weight.rows = 4");
  REFUSED(moeroute_soft_plan_make(soft, m, 3, NULL), "slots % slots_per_expert is 2, expected 0");
  REFUSED(moeroute_soft_plan_reserve(soft, -1, 8, 2), "tokens is -1, expected 0 to 2147483647");
  REFUSED(moeroute_bias_new(-8, NULL, &bias),
          "bias_controller: experts is -8, expected 1 to 1048576");
  CHECK(bias == NULL);

  CHECK(none == NULL);
  pool.pool = &runs;
  pool.threads = 0;
  pool.run = in_order;
  REFUSED(moeroute_route(router, m, NULL, &pool, choices),
          "executor.threads is 0, expected 1 to 1048576");
  pool.threads = 2;
  pool.run = NULL;
  REFUSED(moeroute_route(router, m, NULL, &pool, choices), "executor.run is null");

  CHECK(moeroute_router_free(router) == MOEROUTE_OK);
  CHECK(moeroute_assignment_free(choices) == MOEROUTE_OK);
  CHECK(moeroute_plan_free(plan) == MOEROUTE_OK);
  CHECK(moeroute_soft_plan_free(soft) == MOEROUTE_OK);
}

// Each pointer, each size and each type of each function, the second of a pair as the first.
static void check_every_argument(void) {
  moeroute_spec spec;
  moeroute_router *router = NULL, *none = NULL;
  moeroute_assignment* choices = NULL;
  moeroute_plan* plan = NULL;
  moeroute_gate* gate = NULL;
  moeroute_soft_plan* soft = NULL;
  moeroute_bias* bias = NULL;
  moeroute_tensors tensors;
  moeroute_side side;
  moeroute_capacity capacity;
  moeroute_capacity_result result;
  moeroute_plan_view slots;
  moeroute_soft_plan_view soft_view;
  moeroute_combine_options options;
  moeroute_losses losses;
  moeroute_bias_options steps;
  moeroute_executor pool;
  float z[64] = {0}, *values = NULL;
  double counts[8] = {0};
  int32_t ids[64] = {0};
  uint8_t flags[32] = {0};
  int64_t size = 0;
  int i;
  const moeroute_const_matrix logits = {z, 4, 8, 0, MOEROUTE_FLOAT};
  const moeroute_const_matrix x = {z, 4, 3, 0, MOEROUTE_FLOAT};
  const moeroute_const_matrix eight = {z, 8, 3, 0, MOEROUTE_FLOAT};
  float out[64] = {0};
  const moeroute_matrix to = {out, 8, 3, 0, MOEROUTE_FLOAT};
  const moeroute_matrix y = {out, 4, 3, 0, MOEROUTE_FLOAT};
  const moeroute_matrix dz = {out, 4, 8, 0, MOEROUTE_FLOAT};
  moeroute_const_matrix bad = logits;
  moeroute_matrix wrong = dz;

  memset(&tensors, 0, sizeof tensors);
  memset(&side, 0, sizeof side);
  memset(&capacity, 0, sizeof capacity);
  memset(&options, 0, sizeof options);
  memset(&losses, 0, sizeof losses);
  memset(&steps, 0, sizeof steps);
  for (i = 0; i < 8; ++i) ids[i] = i;
  CHECK(moeroute_spec_init(&spec) == MOEROUTE_OK);
  CHECK(moeroute_router_new(&spec, NULL, &router) == MOEROUTE_OK);
  CHECK(moeroute_assignment_new(&choices) == MOEROUTE_OK);
  CHECK(moeroute_plan_new(&plan) == MOEROUTE_OK);
  CHECK(moeroute_gate_new(eight, NULL, 0, &gate) == MOEROUTE_OK);
  CHECK(moeroute_soft_plan_new(&soft) == MOEROUTE_OK);
  CHECK(moeroute_bias_new(8, NULL, &bias) == MOEROUTE_OK);
  CHECK(moeroute_assignment_set(choices, 4, 8, 2, ids, z) == MOEROUTE_OK);
  CHECK(moeroute_plan_make(plan, choices, NULL) == MOEROUTE_OK);
  CHECK(moeroute_soft_plan_make(soft, logits, 2, NULL) == MOEROUTE_OK);

  // handles
  REFUSED(moeroute_assignment_new(NULL), "the place for the handle is null");
  REFUSED(moeroute_plan_new(NULL), "the place for the handle is null");
  REFUSED(moeroute_gate_new(eight, NULL, 0, NULL), "the place for the handle is null");
  REFUSED(moeroute_soft_plan_new(NULL), "the place for the handle is null");
  REFUSED(moeroute_bias_new(8, NULL, NULL), "the place for the handle is null");
  REFUSED(moeroute_assignment_set(NULL, 4, 8, 2, ids, z), "the assignment is null");
  REFUSED(moeroute_assignment_reserve(NULL, router, 1, MOEROUTE_FLOAT, 1),
          "the assignment is null");
  REFUSED(moeroute_assignment_reserve(choices, NULL, 1, MOEROUTE_FLOAT, 1), "the router is null");
  REFUSED(moeroute_route_to(NULL, logits, NULL, NULL, choices, ids, z), "the router is null");
  REFUSED(moeroute_route_to(router, logits, NULL, NULL, NULL, ids, z), "the assignment is null");
  REFUSED(moeroute_apply_capacity(NULL, &capacity, &result), "the assignment is null");
  REFUSED(moeroute_count_choices(NULL, 0, 0, NULL, counts, 8), "the assignment is null");
  REFUSED(moeroute_once_counts(NULL, 1, 1, ids, ids, flags, NULL), "the assignment is null");
  REFUSED(moeroute_plan_reserve(NULL, choices, NULL), "the plan is null");
  REFUSED(moeroute_plan_reserve(plan, NULL, NULL), "the assignment is null");
  REFUSED(moeroute_plan_get(NULL, &slots), "the plan is null");
  REFUSED(moeroute_plan_aligned_blocks(NULL, 1, -1, ids, 8, ids, NULL, 8), "the plan is null");
  REFUSED(moeroute_plan_row_id_map(NULL, ids, 64), "the plan is null");
  REFUSED(moeroute_dispatch(NULL, x, to, NULL, NULL), "the plan is null");
  REFUSED(moeroute_gate_run(NULL, x, dz, NULL), "the gate is null");
  REFUSED(moeroute_gate_cosine(NULL, x, 1.0f, dz, NULL), "the gate is null");
  REFUSED(moeroute_soft_plan_reserve(NULL, 4, 8, 2), "the soft plan is null");
  REFUSED(moeroute_soft_plan_make(NULL, logits, 2, NULL), "the soft plan is null");
  REFUSED(moeroute_soft_plan_get(NULL, &soft_view), "the soft plan is null");
  REFUSED(moeroute_soft_plan_get(soft, NULL), "the view is null");
  REFUSED(moeroute_soft_dispatch(NULL, x, to, NULL), "the soft plan is null");
  REFUSED(moeroute_soft_combine(NULL, eight, y, NULL), "the soft plan is null");
  REFUSED(moeroute_balance_loss(NULL, logits, choices, dz, NULL, counts), "the losses is null");
  REFUSED(moeroute_balance_loss(&losses, logits, NULL, dz, NULL, counts), "the assignment is null");
  REFUSED(moeroute_balance_loss(&losses, logits, choices, dz, NULL, NULL), "values is null");
  REFUSED(moeroute_bias_update(NULL, counts, 8), "the bias is null");
  REFUSED(moeroute_bias_get(NULL, &values, &size), "the bias is null");
  CHECK(moeroute_bias_get(bias, &values, NULL) == MOEROUTE_OK && values != NULL);
  CHECK(moeroute_bias_get(bias, &values, &size) == MOEROUTE_OK && size == 8);
  REFUSED(moeroute_assignment_free((moeroute_assignment*)(void*)plan),
          "a plan, expected an assignment");
  REFUSED(moeroute_gate_free((moeroute_gate*)(void*)plan), "a plan, expected a gate");
  REFUSED(moeroute_soft_plan_free((moeroute_soft_plan*)(void*)gate),
          "a gate, expected a soft plan");
  REFUSED(moeroute_bias_free((moeroute_bias*)(void*)soft), "a soft plan, expected a bias");
  REFUSED(moeroute_router_free((moeroute_router*)(void*)choices),
          "an assignment, expected a router");
  CHECK(moeroute_assignment_free(NULL) == MOEROUTE_OK && moeroute_gate_free(NULL) == MOEROUTE_OK);
  CHECK(moeroute_soft_plan_free(NULL) == MOEROUTE_OK && moeroute_bias_free(NULL) == MOEROUTE_OK);

  // specs and what they are given
  REFUSED(moeroute_spec_capacity(NULL, &capacity), "the spec is null");
  REFUSED(moeroute_spec_capacity(&spec, NULL), "the capacity is null");
  spec.size = 12;
  REFUSED(moeroute_spec_capacity(&spec, &capacity), another_version());
  CHECK(moeroute_spec_init(&spec) == MOEROUTE_OK);
  tensors.per_expert_scale_size = 8;
  REFUSED(moeroute_router_new(&spec, &tensors, &none),
          "per_expert_scale is null, expected 8 values");
  tensors.per_expert_scale_size = -1;
  REFUSED(moeroute_router_new(&spec, &tensors, &none),
          "per_expert_scale is -1, expected 0 to 2147483647");
  tensors.per_expert_scale_size = 0;
  tensors.gamma_size = 8;
  REFUSED(moeroute_router_new(&spec, &tensors, &none), "gamma is null, expected 8 values");
  tensors.gamma_size = -1;
  REFUSED(moeroute_router_new(&spec, &tensors, &none), "gamma is -1, expected 0 to 2147483647");
  tensors.gamma_size = 0;
  tensors.table_size = 8;
  REFUSED(moeroute_router_new(&spec, &tensors, &none), "table is null, expected 8 values");
  tensors.table_size = -1;
  REFUSED(moeroute_router_new(&spec, &tensors, &none), "table is -1, expected 0 to 2147483647");
  tensors.table_size = 0;
  spec.selection = MOEROUTE_SINKHORN; /* a rule over the batch takes no lists at all */
  tensors.bias = tensors.per_expert_scale = tensors.gamma = z;
  tensors.table = ids;
  tensors.bias_size = 8;
  REFUSED(moeroute_router_new(&spec, &tensors, &none), "router_spec: bias_size is 8, expected 0");
  tensors.bias_size = 0;
  tensors.per_expert_scale_size = 8;
  REFUSED(moeroute_router_new(&spec, &tensors, &none),
          "router_spec: per_expert_scale_size is 8, expected 0");
  tensors.per_expert_scale_size = 0;
  tensors.gamma_size = 8;
  REFUSED(moeroute_router_new(&spec, &tensors, &none), "router_spec: gamma_size is 8, expected 0");
  tensors.gamma_size = 0;
  tensors.table_size = 8;
  REFUSED(moeroute_router_new(&spec, &tensors, &none), "router_spec: table_size is 8, expected 0");
  tensors.table_size = 0;
  CHECK(moeroute_router_new(&spec, &tensors, &none) == MOEROUTE_OK);
  CHECK(moeroute_router_free(none) == MOEROUTE_OK);
  CHECK(moeroute_spec_init(&spec) == MOEROUTE_OK);

  // choices
  REFUSED(moeroute_assignment_set(choices, 4, 8, 2, NULL, z), "ids is null, expected 4 values");
  REFUSED(moeroute_assignment_set(choices, 4, 8, 2, ids, NULL),
          "weights is null, expected 4 values");
  REFUSED(moeroute_assignment_set(choices, INT64_C(1) << 31, 8, 2, ids, z),
          "tokens is 2147483648, expected 0 to 2147483647");
  REFUSED(moeroute_assignment_set(choices, 4, 0, 1, ids, z), "experts is 0, expected 1 to 1048576");
  REFUSED(moeroute_assignment_set(choices, 4, 8, 9, ids, z), "k is 9, expected 1 to 8");
  ids[7] = 8;
  REFUSED(moeroute_assignment_set(choices, 4, 8, 2, ids, z), "ids[7] is 8, expected -1 to 7");
  ids[7] = 7;
  z[7] = INFINITY;
  REFUSED(moeroute_assignment_set(choices, 4, 8, 2, ids, z),
          "weights[7] is inf, expected a finite number");
  z[7] = 0;
  CHECK(moeroute_assignment_set(choices, 4, 8, 2, ids, z) == MOEROUTE_OK);
  CHECK(moeroute_assignment_set(choices, 0, 8, 2, NULL, NULL) == MOEROUTE_OK);
  CHECK(moeroute_assignment_set(choices, 4, 8, 2, ids, z) == MOEROUTE_OK);
  REFUSED(moeroute_assignment_reserve(choices, router, INT64_C(1) << 31, MOEROUTE_FLOAT, 1),
          "tokens is 2147483648, expected 0 to 2147483647");
  REFUSED(moeroute_assignment_reserve(choices, router, 1, -1, 1),
          "logits_type is -1, expected 0 to 2");
  REFUSED(moeroute_assignment_reserve(choices, router, 1, MOEROUTE_BYTES, 1),
          "logits_type is 3, expected 0 to 2");
  REFUSED(moeroute_assignment_reserve(choices, router, 1, MOEROUTE_FLOAT, 0),
          "threads is 0, expected 1 to 1048576");
  REFUSED(moeroute_assignment_reserve(choices, router, 1, MOEROUTE_FLOAT, (1 << 20) + 1),
          "threads is 1048577, expected 1 to 1048576");

  // capacity and counts
  capacity.formula = 13;
  REFUSED(moeroute_apply_capacity(choices, &capacity, NULL), "formula is 13, expected 0 to 12");
  capacity.formula = -1;
  REFUSED(moeroute_apply_capacity(choices, &capacity, NULL), "formula is -1, expected 0 to 12");
  capacity.formula = MOEROUTE_CAPACITY_UNLIMITED;
  capacity.order = 5;
  REFUSED(moeroute_apply_capacity(choices, &capacity, NULL), "order is 5, expected 0 to 4");
  capacity.order = 0;
  capacity.renormalize = 3;
  REFUSED(moeroute_apply_capacity(choices, &capacity, NULL), "renormalize is 3, expected 0 to 2");
  REFUSED(moeroute_count_choices(choices, 0, 0, NULL, NULL, 8),
          "counts is null, expected 8 values");
  REFUSED(moeroute_count_choices(choices, 0, 0, NULL, counts, 9), "counts.size is 9, expected 8");
  REFUSED(moeroute_once_counts(choices, 2, 1, NULL, ids, flags, NULL),
          "per_expert is null, expected 1 values");
  REFUSED(moeroute_once_counts(choices, 2, 1, ids, NULL, flags, NULL),
          "per_rank is null, expected 2 values");
  REFUSED(moeroute_once_counts(choices, 2, 1, ids, ids, NULL, NULL),
          "in_rank is null, expected 2 values");
  REFUSED(moeroute_once_counts(choices, 0, 1, ids, ids, flags, NULL),
          "export_once_counts: ranks is 0, expected 1 to 8");
  REFUSED(moeroute_once_counts(choices, 9, 1, ids, ids, flags, NULL),
          "export_once_counts: ranks is 9, expected 1 to 8");
  REFUSED(moeroute_once_counts(choices, 2, 0, ids, ids, flags, ids),
          "export_once_counts: ranks_per_node is 0, expected 1 to 2");
  REFUSED(moeroute_once_counts(choices, 2, 3, ids, ids, flags, ids),
          "export_once_counts: ranks_per_node is 3, expected 1 to 2");

  // plans and their arrays
  REFUSED(moeroute_plan_aligned_blocks(plan, 1, -1, NULL, 8, ids, NULL, 8),
          "sorted is null, expected 8 values");
  REFUSED(moeroute_plan_aligned_blocks(plan, 1, -1, ids, -8, ids, NULL, 8),
          "sorted is -8, expected 0 to 2147483647");
  REFUSED(moeroute_plan_aligned_blocks(plan, 1, -1, ids, 8, NULL, NULL, 8),
          "block_experts is null, expected 8 values");
  REFUSED(moeroute_plan_aligned_blocks(plan, 1, -1, ids, 8, ids, NULL, -8),
          "block_experts is -8, expected 0 to 2147483647");
  REFUSED(moeroute_plan_row_id_map(plan, NULL, 68), "map is null, expected 68 values");
  {
    moeroute_expert_lists lists = {3, 2, 2, NULL, NULL};
    lists.token = ids;
    lists.tokens = INT64_C(1) << 31;
    REFUSED(moeroute_plan_make_of_lists(plan, &lists, NULL, NULL),
            "lists.tokens is 2147483648, expected 0 to 2147483647");
    lists.tokens = 3;
    lists.experts = (1 << 20) + 1;
    REFUSED(moeroute_plan_make_of_lists(plan, &lists, NULL, NULL),
            "lists.experts is 1048577, expected 1 to 1048576");
    lists.experts = 2;
    lists.capacity = INT64_C(1) << 30;
    REFUSED(moeroute_plan_make_of_lists(plan, &lists, NULL, NULL),
            "lists.capacity is 1073741824, expected 0 to 1073741823");
  }

  // rows, each side of each call
  CHECK(moeroute_plan_make(plan, choices, NULL) == MOEROUTE_OK);
  bad.data = NULL;
  wrong.data = NULL;
  REFUSED(moeroute_dispatch(plan, bad, to, NULL, NULL), "x.data is null, expected 4 rows");
  REFUSED(moeroute_dispatch(plan, x, wrong, NULL, NULL), "slots.data is null, expected 4 rows");
  REFUSED(moeroute_combine(bad, plan, choices, y, NULL, NULL),
          "slots.data is null, expected 4 rows");
  REFUSED(moeroute_combine(eight, plan, choices, wrong, NULL, NULL),
          "y.data is null, expected 4 rows");
  REFUSED(moeroute_combine_weights(bad, plan, z, 8, y, NULL, NULL),
          "slots.data is null, expected 4 rows");
  REFUSED(moeroute_combine_choices(bad, choices, y, NULL, NULL),
          "rows.data is null, expected 4 rows");
  CHECK(moeroute_gate_free(gate) == MOEROUTE_OK);
  REFUSED(moeroute_gate_new(bad, NULL, 0, &gate), "weight.data is null, expected 4 rows");
  CHECK(gate == NULL);
  CHECK(moeroute_gate_new(eight, NULL, 0, &gate) == MOEROUTE_OK);
  REFUSED(moeroute_gate_run(gate, bad, dz, NULL), "x.data is null, expected 4 rows");
  REFUSED(moeroute_gate_run(gate, x, wrong, NULL), "logits.data is null, expected 4 rows");
  REFUSED(moeroute_gate_cosine(gate, bad, 1.0f, dz, NULL), "x.data is null, expected 4 rows");
  REFUSED(moeroute_gate_cosine(gate, x, 1.0f, wrong, NULL), "logits.data is null, expected 4 rows");
  REFUSED(moeroute_soft_plan_make(soft, bad, 2, NULL), "logits.data is null, expected 4 rows");
  REFUSED(moeroute_soft_dispatch(soft, bad, to, NULL), "x.data is null, expected 4 rows");
  REFUSED(moeroute_soft_dispatch(soft, x, wrong, NULL), "slots.data is null, expected 4 rows");
  REFUSED(moeroute_soft_combine(soft, bad, y, NULL), "slots.data is null, expected 4 rows");
  REFUSED(moeroute_soft_combine(soft, eight, wrong, NULL), "y.data is null, expected 4 rows");
  REFUSED(moeroute_balance_loss(&losses, bad, choices, dz, NULL, counts),
          "logits.data is null, expected 4 rows");
  CHECK(moeroute_balance_loss(&losses, logits, choices, wrong, NULL, counts) == MOEROUTE_OK);
  options.x = bad;
  REFUSED(moeroute_combine(eight, plan, choices, y, &options, NULL),
          "x.data is null, expected 4 rows");
  options.x.rows = 0;
  options.shared = bad;
  REFUSED(moeroute_combine(eight, plan, choices, y, &options, NULL),
          "shared.data is null, expected 4 rows");
  options.shared = x;
  options.shared.type = MOEROUTE_BFLOAT16;
  REFUSED(moeroute_combine(eight, plan, choices, y, &options, NULL),
          "shared.type is 1, expected 0");
  options.shared.rows = 0;
  options.shared.data = NULL;
  options.x = x;
  options.x.type = MOEROUTE_FLOAT16;
  REFUSED(moeroute_combine(eight, plan, choices, y, &options, NULL), "x.type is 2, expected 0");
  options.x.type = MOEROUTE_FLOAT;
  options.identity_first = -1;
  REFUSED(moeroute_combine(eight, plan, choices, y, &options, NULL),
          "identity_first is -1, expected 0 to 1048576");

  // types
  bad = x;
  bad.type = MOEROUTE_BYTES + 1;
  wrong = to;
  wrong.type = MOEROUTE_BYTES + 1;
  REFUSED(moeroute_dispatch(plan, bad, to, NULL, NULL), "x.type is 4, expected 0 to 3");
  REFUSED(moeroute_dispatch(plan, x, wrong, NULL, NULL), "slots.type is 4, expected 0 to 3");
  bad.type = MOEROUTE_BYTES;
  wrong.type = MOEROUTE_BYTES;
  REFUSED(moeroute_dispatch(plan, bad, to, NULL, NULL),
          "one side is MOEROUTE_BYTES, expected both, and no scale");
  REFUSED(moeroute_dispatch(plan, x, wrong, NULL, NULL),
          "one side is MOEROUTE_BYTES, expected both, and no scale");
  REFUSED(moeroute_dispatch(plan, bad, wrong, z, NULL),
          "one side is MOEROUTE_BYTES, expected both, and no scale");
  REFUSED(moeroute_route(router, bad, NULL, NULL, choices), "logits.type is 3, expected 0 to 2");
  REFUSED(moeroute_route_to(router, bad, NULL, NULL, choices, ids, z),
          "logits.type is 3, expected 0 to 2");
  REFUSED(moeroute_combine(bad, plan, choices, y, NULL, NULL), "slots.type is 3, expected 0 to 2");
  REFUSED(moeroute_combine(eight, plan, choices, wrong, NULL, NULL),
          "y.type is 3, expected 0 to 2");
  REFUSED(moeroute_combine_weights(bad, plan, z, 8, y, NULL, NULL),
          "slots.type is 3, expected 0 to 2");
  REFUSED(moeroute_combine_choices(bad, choices, y, NULL, NULL), "rows.type is 3, expected 0 to 2");
  CHECK(moeroute_gate_free(gate) == MOEROUTE_OK);
  REFUSED(moeroute_gate_new(bad, NULL, 0, &gate), "weight.type is 3, expected 0 to 2");
  CHECK(moeroute_gate_new(eight, NULL, 0, &gate) == MOEROUTE_OK);
  REFUSED(moeroute_gate_run(gate, bad, dz, NULL), "x.type is 3, expected 0 to 2");
  REFUSED(moeroute_gate_cosine(gate, bad, 1.0f, dz, NULL), "x.type is 3, expected 0 to 2");
  REFUSED(moeroute_soft_plan_make(soft, bad, 2, NULL), "logits.type is 3, expected 0 to 2");
  REFUSED(moeroute_soft_dispatch(soft, bad, to, NULL), "x.type is 3, expected 0 to 2");
  REFUSED(moeroute_soft_dispatch(soft, x, wrong, NULL), "slots.type is 3, expected 0 to 2");
  REFUSED(moeroute_soft_combine(soft, bad, y, NULL), "slots.type is 3, expected 0 to 2");
  REFUSED(moeroute_soft_combine(soft, eight, wrong, NULL), "y.type is 3, expected 0 to 2");
  bad.type = wrong.type = MOEROUTE_BFLOAT16;
  REFUSED(moeroute_gate_run(gate, x, wrong, NULL), "logits.type is 1, expected 0 to 0");
  REFUSED(moeroute_gate_cosine(gate, x, 1.0f, wrong, NULL), "logits.type is 1, expected 0 to 0");
  REFUSED(moeroute_balance_loss(&losses, bad, choices, dz, NULL, counts),
          "logits.type is 1, expected 0 to 0");
  REFUSED(moeroute_balance_loss(&losses, logits, choices, wrong, NULL, counts),
          "dlogits.type is 1, expected 0 to 0");
  bad.type = MOEROUTE_FLOAT16;
  REFUSED(moeroute_dispatch(plan, bad, wrong, NULL, NULL),
          "rows are of two 16-bit types, expected one of them to be float, or both the same");
  wrong.rows = 4;
  wrong.type = MOEROUTE_FLOAT16;
  bad.rows = 8;
  bad.type = MOEROUTE_BFLOAT16;
  REFUSED(moeroute_combine(bad, plan, choices, wrong, NULL, NULL),
          "rows are of two 16-bit types, expected one of them to be float, or both the same");

  // sizes
  bad = logits;
  bad.stride = (INT64_C(1) << 40) + 1;
  REFUSED(moeroute_route(router, bad, NULL, NULL, choices),
          "logits.stride is 1099511627777, expected 0 to 1099511627776");
  bad.rows = 1; /* of one row nobody asks where the next one is */
  bad.stride = 3;
  CHECK(moeroute_route(router, bad, NULL, NULL, choices) == MOEROUTE_OK);
  bad.rows = 4;
  bad.stride = 0;
  bad.cols = INT64_C(1) << 31;
  REFUSED(moeroute_route(router, bad, NULL, NULL, choices),
          "logits.cols is 2147483648, expected 0 to 2147483647");
  CHECK(moeroute_assignment_set(choices, 4, 8, 2, ids, z) == MOEROUTE_OK);
  REFUSED(moeroute_balance_loss(&losses, x, choices, y, NULL, counts),
          "logits.cols is 3, expected 8");
  bad = logits;
  bad.rows = 3;
  REFUSED(moeroute_balance_loss(&losses, bad, choices, dz, NULL, counts),
          "logits.rows is 3, expected 4");
  losses.sequence_length = -1;
  REFUSED(moeroute_balance_loss(&losses, logits, choices, dz, NULL, counts),
          "sequence_length is -1, expected 0 to 2147483647");
  losses.sequence_length = 0;
  losses.scores = 3;
  REFUSED(moeroute_balance_loss(&losses, logits, choices, dz, NULL, counts),
          "scores is 3, expected 0 to 2");
  losses.scores = 1;
  losses.z_coefficient = 1.0;
  REFUSED(moeroute_balance_loss(&losses, logits, choices, dz, NULL, counts),
          "z_coefficient is not 0 and scores are divided by their sum, expected the softmax");
  losses.scores = 0;
  CHECK(moeroute_gate_free(gate) == MOEROUTE_OK);
  REFUSED(moeroute_gate_new(eight, z, -8, &gate), "bias is -8, expected 0 to 2147483647");
  REFUSED(moeroute_gate_new(eight, NULL, 8, &gate), "bias is null, expected 8 values");
  REFUSED(moeroute_bias_update(bias, counts, -8), "counts is -8, expected 0 to 2147483647");
  REFUSED(moeroute_bias_update(bias, counts, 7), "bias_controller: counts.size() is 7, expected 8");

  // No rows at all: nothing is read or written, and a loss of nothing is 0.
  {
    const moeroute_const_matrix no_x = {NULL, 0, 3, 0, MOEROUTE_FLOAT};
    const moeroute_const_matrix no_logits = {NULL, 0, 8, 0, MOEROUTE_FLOAT};
    const moeroute_matrix no_to = {NULL, 0, 3, 0, MOEROUTE_FLOAT};
    const moeroute_matrix no_dz = {NULL, 0, 8, 0, MOEROUTE_FLOAT};
    moeroute_assignment* nobody = NULL;
    CHECK(moeroute_assignment_new(&nobody) == MOEROUTE_OK);
    CHECK(moeroute_route_to(router, no_logits, NULL, NULL, nobody, NULL, NULL) == MOEROUTE_OK);
    CHECK(moeroute_plan_make(plan, nobody, NULL) == MOEROUTE_OK);
    CHECK(moeroute_dispatch(plan, no_x, no_to, NULL, NULL) == MOEROUTE_OK);
    CHECK(moeroute_combine(no_x, plan, nobody, no_to, NULL, NULL) == MOEROUTE_OK);
    CHECK(moeroute_combine_choices(no_x, nobody, no_to, NULL, NULL) == MOEROUTE_OK);
    CHECK(moeroute_gate_new(eight, NULL, 0, &gate) == MOEROUTE_OK);
    CHECK(moeroute_gate_run(gate, no_x, no_dz, NULL) == MOEROUTE_OK);
    counts[0] = counts[1] = counts[2] = -1;
    losses.switch_coefficient = losses.z_coefficient = losses.sequence_coefficient = 1.0;
    CHECK(moeroute_balance_loss(&losses, no_logits, nobody, no_dz, NULL, counts) == MOEROUTE_OK);
    CHECK(counts[0] == 0 && counts[1] == 0 && counts[2] == 0);
    losses.switch_coefficient = losses.z_coefficient = losses.sequence_coefficient = 0.0;
    counts[0] = counts[1] = counts[2] = -1;
    CHECK(moeroute_balance_loss(&losses, logits, choices, dz, NULL, counts) == MOEROUTE_OK);
    CHECK(counts[0] == 0 && counts[1] == 0 && counts[2] == 0);
    CHECK(moeroute_gate_free(gate) == MOEROUTE_OK);
    CHECK(moeroute_assignment_free(nobody) == MOEROUTE_OK);
    gate = NULL;
  }

  // a plan that is refused is none, and what is reserved is not made
  {
    const int32_t tokens[4] = {0, 1, 1, 7};
    moeroute_plan_options blocks;
    moeroute_expert_lists lists = {3, 2, 2, NULL, NULL};
    moeroute_plan_view none_left;
    memset(&blocks, 0, sizeof blocks);
    blocks.block = -1;
    lists.token = tokens;
    for (i = 0; i < 2; ++i) {
      CHECK(moeroute_plan_make(plan, choices, NULL) == MOEROUTE_OK);
      CHECK(moeroute_plan_get(plan, &none_left) == MOEROUTE_OK && none_left.slots == 8);
      if (i == 0)
        REFUSED(moeroute_plan_make(plan, choices, &blocks),
                "block is -1, expected 1 to 2147483647");
      else
        REFUSED(moeroute_plan_make_of_lists(plan, &lists, NULL, NULL),
                "place 3 of the lists has token 7, expected -1 to 2");
      CHECK(moeroute_plan_get(plan, &none_left) == MOEROUTE_OK && none_left.slots == 0);
    }
    CHECK(moeroute_soft_plan_reserve(soft, 4, 8, 2) == MOEROUTE_OK);
    CHECK(moeroute_soft_plan_get(soft, &soft_view) == MOEROUTE_OK && soft_view.tokens == 0);
    CHECK(moeroute_plan_make(plan, choices, NULL) == MOEROUTE_OK);
    CHECK(moeroute_soft_plan_make(soft, logits, 2, NULL) == MOEROUTE_OK);
  }

  // a rule over the batch: what its words may be, and what a description begins with
  CHECK(spec.probability == 1e-3f);
  spec.selection = MOEROUTE_EXPERT_CHOICE;
  spec.score = MOEROUTE_SIGMOID + 1;
  REFUSED(moeroute_router_new(&spec, NULL, &none),
          "router_spec: score of expert choice is 2, expected 0 to 1");
  spec.score = MOEROUTE_SOFTMAX;
  spec.normalize = MOEROUTE_NORMALIZE_SUM + 1;
  REFUSED(moeroute_router_new(&spec, NULL, &none), "router_spec: normalize is 2, expected 0 to 1");
  spec.normalize = MOEROUTE_NORMALIZE_NONE;
  spec.sequence_length = -1;
  REFUSED(moeroute_router_new(&spec, NULL, &none),
          "expert_choice: sequence_length is -1, expected 0 to 2147483648");
  spec.sequence_length = 3;
  CHECK(moeroute_router_new(&spec, NULL, &none) == MOEROUTE_OK);
  REFUSED(moeroute_route(none, logits, NULL, NULL, choices),
          "expert_choice: tokens is 4, expected a multiple of sequence_length = 3");
  CHECK(moeroute_router_free(none) == MOEROUTE_OK);
  CHECK(moeroute_assignment_set(choices, 4, 8, 2, ids, z) == MOEROUTE_OK);
  spec.scaling = 2;
  REFUSED(moeroute_router_new(&spec, NULL, &none), "router_spec: scaling is 2, expected 0 to 1");
  CHECK(moeroute_spec_init(&spec) == MOEROUTE_OK);

  // more logits than there can be are refused before memory is asked for
  spec.experts = 1 << 20;
  CHECK(moeroute_router_new(&spec, NULL, &none) == MOEROUTE_OK);
  REFUSED(moeroute_assignment_reserve(choices, none, INT32_MAX, MOEROUTE_FLOAT, 1),
          "tokens * columns is 2251799812636672, expected 0 to 281474976710656");
  CHECK(moeroute_router_free(none) == MOEROUTE_OK);
  CHECK(moeroute_spec_init(&spec) == MOEROUTE_OK);

  // a bias of no values is none; sequences of one token are not one sequence
  {
    float bias_list[8] = {1, 2, 3, 4, 5, 6, 7, 8}, given[32] = {0};
    const moeroute_const_matrix rising = {given, 4, 8, 0, MOEROUTE_FLOAT};
    double each[3], whole[3];
    moeroute_gate* plain = NULL;
    CHECK(moeroute_gate_new(eight, bias_list, 0, &plain) == MOEROUTE_OK);
    CHECK(moeroute_gate_run(plain, x, dz, NULL) == MOEROUTE_OK);
    for (i = 0; i < 32; ++i) CHECK(out[i] == 0.0f);
    CHECK(moeroute_gate_free(plain) == MOEROUTE_OK);
    for (i = 0; i < 32; ++i) given[i] = (float)(i * i % 7);
    wrong = dz;
    wrong.data = NULL;
    losses.sequence_coefficient = 1.0;
    losses.sequence_length = 1;
    CHECK(moeroute_balance_loss(&losses, rising, choices, wrong, NULL, each) == MOEROUTE_OK);
    losses.sequence_length = 0;
    CHECK(moeroute_balance_loss(&losses, rising, choices, wrong, NULL, whole) == MOEROUTE_OK);
    CHECK(each[2] != whole[2]);
    losses.sequence_coefficient = 0.0;
  }

  // options of a bias: `made` is null where they are refused
  {
    static const char* const names[] = {"rule", "error", "decay", "centre"};
    static const int last[] = {2, 2, 2, 1};
    for (i = 0; i < 8; ++i) {
      char text[64];
      moeroute_bias* refused = bias;
      const int value = i % 2 == 0 ? -1 : last[i / 2] + 1;
      steps.step = 0.5f;
      steps.rule = i / 2 == 0 ? value : 0;
      steps.error = i / 2 == 1 ? value : 0;
      steps.decay = i / 2 == 2 ? value : 0;
      steps.centre = i / 2 == 3 ? value : 0;
      snprintf(text, sizeof text, "bias_controller: %s is %d, expected 0 to %d", names[i / 2],
               value, last[i / 2]);
      REFUSED(moeroute_bias_new(8, &steps, &refused), text);
      CHECK(refused == NULL);
    }
  }

  // an executor, wherever there is one
  pool.pool = ids;
  pool.run = in_order;
  for (i = 0; i < 2; ++i) {
    const char* const text =
        i == 0 ? "executor.threads is 0, expected 1 to 1048576" : "executor.run is null";
    pool.threads = i;
    pool.run = i == 0 ? in_order : NULL;
    if (i == 0) CHECK(moeroute_gate_new(eight, NULL, 0, &gate) == MOEROUTE_OK);
    REFUSED(moeroute_route(router, logits, NULL, &pool, choices), text);
    REFUSED(moeroute_route_to(router, logits, NULL, &pool, choices, ids, z), text);
    REFUSED(moeroute_dispatch(plan, x, to, NULL, &pool), text);
    REFUSED(moeroute_combine(eight, plan, choices, y, NULL, &pool), text);
    REFUSED(moeroute_combine_weights(eight, plan, z, 8, y, NULL, &pool), text);
    REFUSED(moeroute_combine_choices(eight, choices, y, NULL, &pool), text);
    REFUSED(moeroute_gate_run(gate, x, dz, &pool), text);
    REFUSED(moeroute_gate_cosine(gate, x, 1.0f, dz, &pool), text);
    REFUSED(moeroute_soft_plan_make(soft, logits, 2, &pool), text);
    REFUSED(moeroute_soft_dispatch(soft, x, to, &pool), text);
    REFUSED(moeroute_soft_combine(soft, eight, y, &pool), text);
    REFUSED(moeroute_balance_loss(&losses, logits, choices, dz, &pool, counts), text);
  }
  pool.run = in_order;
  pool.threads = (1 << 20) + 1;
  REFUSED(moeroute_route(router, logits, NULL, &pool, choices),
          "executor.threads is 1048577, expected 1 to 1048576");

  CHECK(moeroute_router_free(router) == MOEROUTE_OK);
  CHECK(moeroute_assignment_free(choices) == MOEROUTE_OK);
  CHECK(moeroute_plan_free(plan) == MOEROUTE_OK);
  CHECK(moeroute_gate_free(gate) == MOEROUTE_OK);
  CHECK(moeroute_soft_plan_free(soft) == MOEROUTE_OK);
  CHECK(moeroute_bias_free(bias) == MOEROUTE_OK);
}

// Every function on every set once, on memory with guards of its own: what a sanitizer watches.
static void check_a_step(void) {
  enum { T = 600, E = 8, K = 2, D = 24 };
  float* x = calloc(T * D, sizeof *x);
  float* w = calloc(E * D, sizeof *w);
  float* z = calloc(T * E, sizeof *z);
  float* y = calloc(T * D, sizeof *y);
  float* slots = calloc(T * K * D, sizeof *slots);
  uint16_t* narrow = calloc(T * K * D, sizeof *narrow);
  int32_t* ids = calloc(T * K, sizeof *ids);
  float* weights = calloc(T * K, sizeof *weights);
  int i;
  for (i = 0; i < T * D; ++i) x[i] = (float)(i * 7 % 101) / 50.0f - 1.0f;
  for (i = 0; i < E * D; ++i) w[i] = (float)(i * 13 % 97) / 50.0f - 1.0f;
  for (i = 0; moeroute_isa_name(i) != NULL; ++i) {
    moeroute_spec spec;
    moeroute_router* router = NULL;
    moeroute_gate* gate = NULL;
    moeroute_assignment* choices = NULL;
    moeroute_plan* plan = NULL;
    moeroute_plan_view view;
    moeroute_combine_options options;
    int runs = 0, t;
    moeroute_executor pool;
    moeroute_const_matrix rows = {x, T, D, 0, MOEROUTE_FLOAT},
                          gate_weight = {w, E, D, 0, MOEROUTE_FLOAT};
    moeroute_matrix logits = {z, T, E, 0, MOEROUTE_FLOAT}, out = {y, T, D, 0, MOEROUTE_FLOAT};
    moeroute_const_matrix const_logits = {z, T, E, 0, MOEROUTE_FLOAT};
    moeroute_matrix in = {slots, 0, D, 0, MOEROUTE_FLOAT},
                    half = {narrow, 0, D, 0, MOEROUTE_BFLOAT16};
    moeroute_const_matrix const_half = {narrow, 0, D, 0, MOEROUTE_BFLOAT16};
    pool.run = in_order;
    pool.pool = &runs;
    pool.threads = 2;
    CHECK(moeroute_use_isa(moeroute_isa_name(i)) == MOEROUTE_OK);
    CHECK(moeroute_spec_init(&spec) == MOEROUTE_OK);
    CHECK(moeroute_router_new(&spec, NULL, &router) == MOEROUTE_OK);
    CHECK(moeroute_gate_new(gate_weight, w, E, &gate) == MOEROUTE_OK);
    CHECK(moeroute_assignment_new(&choices) == MOEROUTE_OK);
    CHECK(moeroute_plan_new(&plan) == MOEROUTE_OK);
    CHECK(moeroute_gate_run(gate, rows, logits, &pool) == MOEROUTE_OK);
    CHECK(moeroute_gate_cosine(gate, rows, 4.0f, logits, &pool) == MOEROUTE_OK);
    CHECK(moeroute_route_to(router, const_logits, NULL, &pool, choices, ids, weights) ==
          MOEROUTE_OK);
    for (t = 0; t < T; ++t)
      CHECK(fabsf(weights[t * K]) <= 1.0f && ids[t * K] >= 0 && ids[t * K] < E);
    CHECK(moeroute_plan_make(plan, choices, NULL) == MOEROUTE_OK);
    CHECK(moeroute_plan_get(plan, &view) == MOEROUTE_OK && view.slots == T * K);
    in.rows = half.rows = const_half.rows = view.slots;
    CHECK(moeroute_dispatch(plan, rows, in, weights, &pool) == MOEROUTE_OK);
    CHECK(moeroute_dispatch(plan, rows, half, NULL, &pool) == MOEROUTE_OK);
    memset(&options, 0, sizeof options);
    options.weights_applied = 1;
    options.lost_residual = 1;
    options.x = rows;
    CHECK(moeroute_combine(const_half, plan, choices, out, &options, &pool) == MOEROUTE_OK);
    half.type = MOEROUTE_FLOAT16;
    const_half.rows = T;
    REFUSED(moeroute_dispatch(plan, const_half, half, NULL, NULL),
            "rows are of two 16-bit types, expected one of them to be float, or both the same");
    CHECK(runs > 0);
    CHECK(moeroute_router_free(router) == MOEROUTE_OK);
    CHECK(moeroute_gate_free(gate) == MOEROUTE_OK);
    CHECK(moeroute_assignment_free(choices) == MOEROUTE_OK);
    CHECK(moeroute_plan_free(plan) == MOEROUTE_OK);
  }
  free(x);
  free(w);
  free(z);
  free(y);
  free(slots);
  free(narrow);
  free(ids);
  free(weights);
}

// What the environment names is used from the first call on, where this library has it.
static void check_environment(void) {
  int i, there = 0;
  CHECK(setenv("MOEROUTE_ISA", "baseline", 1) == 0);
  for (i = 0; moeroute_isa_name(i) != NULL; ++i)
    there = there || strcmp(moeroute_isa_name(i), "baseline") == 0;
  CHECK(i > 0 && i <= 8);
  CHECK(strcmp(moeroute_isa(), there ? "baseline" : moeroute_isa_name(0)) == 0);
  CHECK(moeroute_isa_name(-1) == NULL && moeroute_isa_name(8) == NULL);
  CHECK(moeroute_isa_name(INT32_MAX) == NULL && moeroute_isa_name(INT32_MIN) == NULL);
}

int main(void) {
  CHECK(moeroute_last_error()[0] == '\0');
  check_environment();
  check_handles();
  check_sizes();
  check_every_argument();
  check_a_step();
  if (failures == 0) puts("c_face: all refused that had to be");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}

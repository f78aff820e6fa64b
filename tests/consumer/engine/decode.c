/* A small engine in plain C: a model of two mixture-of-experts layers reads a prompt in one batch,
 * then writes token by token. Every number is compared with loops that know nothing of the library.
 */
#include <math.h>
#include <moeroute.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { layers = 2, vocabulary = 50, width = 24, inner = 16, experts = 8, k = 2 };
enum { prompt = 21, written = 40, most = prompt }; /* the largest batch is the prompt */

/* ---- the model: numbers that a checkpoint would bring ------------------------------------------
 */

typedef struct expert_weights {
  float up[inner][width], gate[inner][width], down[width][inner];
} expert_weights;

typedef struct layer_weights {
  float router[experts][width], bias[experts];
  expert_weights expert[experts];
} layer_weights;

static float embedding[vocabulary][width];
static layer_weights model[layers];

static float next_number(void) {
  static uint32_t bits = 7;
  bits = bits * 1664525u + 1013904223u;
  return (float)(bits >> 8) / 16777216.0f - 0.5f;
}

static void fill(float* to, size_t n, float size) {
  size_t i;
  for (i = 0; i < n; ++i) to[i] = size * next_number();
}

static void make_model(void) {
  int l;
  fill(&embedding[0][0], sizeof embedding / sizeof(float), 2.0f);
  for (l = 0; l < layers; ++l) {
    fill(&model[l].router[0][0], sizeof model[l].router / sizeof(float), 1.5f);
    fill(model[l].bias, experts, 0.2f);
    fill((float*)(void*)model[l].expert, sizeof model[l].expert / (sizeof(float)), 0.8f);
  }
}

/* One row through one expert: down(silu(gate x) * (up x)). */
static void run_expert(const expert_weights* e, const float* x, float* y) {
  float h[inner];
  int i, j;
  for (i = 0; i < inner; ++i) {
    float g = 0, u = 0;
    for (j = 0; j < width; ++j) {
      g += e->gate[i][j] * x[j];
      u += e->up[i][j] * x[j];
    }
    h[i] = g / (1.0f + expf(-g)) * u;
  }
  for (j = 0; j < width; ++j) {
    y[j] = 0;
    for (i = 0; i < inner; ++i) y[j] += e->down[j][i] * h[i];
  }
}

/* ---- what the engine keeps of the library -------------------------------------------------------
 */

typedef struct layer_state {
  moeroute_router* router;
  moeroute_gate* gate;
} layer_state;

static layer_state state[layers];
static moeroute_assignment* choices;
static moeroute_plan* plan;
static float logits[most * experts], in[most * k * width], out[most * k * width], y[most * width];

static void check(int status) {
  if (status == MOEROUTE_OK) return;
  fprintf(stderr, "decode: %s\n", moeroute_last_error());
  exit(EXIT_FAILURE);
}

static moeroute_const_matrix rows(const float* data, int64_t n, int64_t cols) {
  const moeroute_const_matrix m = {data, n, cols, 0, MOEROUTE_FLOAT};
  return m;
}
static moeroute_matrix to_rows(float* data, int64_t n, int64_t cols) {
  const moeroute_matrix m = {data, n, cols, 0, MOEROUTE_FLOAT};
  return m;
}

/* The first layer routes as Mixtral does, the second by sigmoids with a bias, as newer models do.
 */
static void open_model(void) {
  int l;
  for (l = 0; l < layers; ++l) {
    moeroute_spec spec;
    moeroute_tensors tensors;
    memset(&tensors, 0, sizeof tensors);
    check(moeroute_spec_of_model("mixtral", &spec));
    if (l == 1) {
      spec.score = MOEROUTE_SIGMOID;
      spec.selection_bias = 1;
      spec.eps_mode = MOEROUTE_EPS_ADD;
      spec.eps = 1e-20f;
      spec.scale = 1.5f;
      tensors.bias = model[l].bias;
      tensors.bias_size = experts;
    }
    check(moeroute_router_new(&spec, &tensors, &state[l].router));
    check(moeroute_gate_new(rows(&model[l].router[0][0], experts, width), NULL, 0, &state[l].gate));
  }
  check(moeroute_assignment_new(&choices));
  check(moeroute_plan_new(&plan));
  for (l = 0; l < layers; ++l)
    check(moeroute_assignment_reserve(choices, state[l].router, most, MOEROUTE_FLOAT, 1));
  check(moeroute_plan_reserve(plan, choices, NULL));
}

static void close_model(void) {
  int l;
  for (l = 0; l < layers; ++l) {
    check(moeroute_router_free(state[l].router));
    check(moeroute_gate_free(state[l].gate));
  }
  check(moeroute_assignment_free(choices));
  check(moeroute_plan_free(plan));
}

/* x += experts of the tokens' choice, for a batch of any size. */
static void run_layer(int l, float* x, int64_t tokens) {
  moeroute_plan_view slots;
  int64_t s, i;
  int e;
  check(moeroute_gate_run(state[l].gate, rows(x, tokens, width), to_rows(logits, tokens, experts),
                          NULL));
  check(moeroute_route(state[l].router, rows(logits, tokens, experts), NULL, NULL, choices));
  check(moeroute_plan_make(plan, choices, NULL));
  check(moeroute_plan_get(plan, &slots));
  check(
      moeroute_dispatch(plan, rows(x, tokens, width), to_rows(in, slots.slots, width), NULL, NULL));
  for (e = 0; e < experts; ++e)
    for (s = slots.offsets[e]; s < slots.offsets[e] + slots.loads[e]; ++s)
      run_expert(&model[l].expert[e], in + s * width, out + s * width);
  check(moeroute_combine(rows(out, slots.slots, width), plan, choices, to_rows(y, tokens, width),
                         NULL, NULL));
  for (i = 0; i < tokens * width; ++i) x[i] += y[i];
}

/* ---- the same by loops that know nothing of it --------------------------------------------------
 */

static void run_layer_plainly(int l, float* x) {
  float z[experts], score[experts], choice[experts], sum = 0, w[k], row[width], add[width];
  int best[k], e, r, j;
  for (e = 0; e < experts; ++e) {
    z[e] = 0;
    for (j = 0; j < width; ++j) z[e] += model[l].router[e][j] * x[j];
    score[e] = l == 0 ? expf(z[e]) : 1.0f / (1.0f + expf(-z[e]));
    choice[e] = l == 0 ? score[e] : score[e] + model[l].bias[e];
  }
  for (r = 0; r < k; ++r) {
    best[r] = -1;
    for (e = 0; e < experts; ++e)
      if ((r == 0 || e != best[0]) && (best[r] < 0 || choice[e] > choice[best[r]])) best[r] = e;
    sum += w[r] = score[best[r]];
  }
  memset(add, 0, sizeof add);
  for (r = 0; r < k; ++r) {
    run_expert(&model[l].expert[best[r]], x, row);
    for (j = 0; j < width; ++j) add[j] += (l == 0 ? 1.0f : 1.5f) * w[r] / sum * row[j];
  }
  for (j = 0; j < width; ++j) x[j] += add[j];
}

/* ---- reading and writing ------------------------------------------------------------------------
 */

/* What came before a token reaches it as a fading sum, in place of attention. */
static void read_token(float* memory, int token, float* x) {
  int j;
  for (j = 0; j < width; ++j) x[j] = memory[j] = 0.5f * memory[j] + embedding[token][j];
}

/* The token most like what the layers added. */
static int write_token(const float* x, const float* memory) {
  int token, j, best = 0;
  float most_alike = 0;
  for (token = 0; token < vocabulary; ++token) {
    float alike = 0;
    for (j = 0; j < width; ++j) alike += embedding[token][j] * (x[j] - memory[j]);
    if (token == 0 || alike > most_alike) {
      best = token;
      most_alike = alike;
    }
  }
  return best;
}

static void compare(const float* got, const float* expected, const char* what, int token) {
  int j;
  for (j = 0; j < width; ++j)
    if (fabsf(got[j] - expected[j]) > 1e-4f * (1.0f + fabsf(expected[j]))) {
      printf("decode: %s, token %d, column %d: %g, expected %g\n", what, token, j, (double)got[j],
             (double)expected[j]);
      exit(EXIT_FAILURE);
    }
}

int main(void) {
  static float x[prompt * width];
  float memory[width] = {0}, plain_memory[width] = {0}, plain[width];
  int text[prompt + written + 1], t, l, seen[vocabulary] = {0}, kinds = 0;

  make_model();
  open_model();
  for (t = 0; t < prompt; ++t) text[t] = (7 * t + t * t) % vocabulary;

  /* The prompt in one batch. */
  for (t = 0; t < prompt; ++t) read_token(memory, text[t], x + t * width);
  for (l = 0; l < layers; ++l) run_layer(l, x, prompt);
  for (t = 0; t < prompt; ++t) {
    read_token(plain_memory, text[t], plain);
    for (l = 0; l < layers; ++l) run_layer_plainly(l, plain);
    compare(x + t * width, plain, "prompt", t);
  }
  text[prompt] = write_token(x + (prompt - 1) * width, memory);

  /* Then one token after the other. */
  for (t = prompt; t < prompt + written; ++t) {
    read_token(memory, text[t], x);
    for (l = 0; l < layers; ++l) run_layer(l, x, 1);
    read_token(plain_memory, text[t], plain);
    for (l = 0; l < layers; ++l) run_layer_plainly(l, plain);
    compare(x, plain, "decoding", t);
    text[t + 1] = write_token(x, memory);
  }
  for (t = prompt; t < prompt + written; ++t) kinds += seen[text[t]]++ == 0;
  close_model();
  printf("decode: %d tokens read, %d written, %d of them different (%s)\n", prompt, written, kinds,
         moeroute_isa());
  return kinds > 1 ? EXIT_SUCCESS : EXIT_FAILURE;
}

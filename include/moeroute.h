// moeroute for C, and for whatever calls C: the face of the compiled library (moeroute::compiled in
// CMake, moeroute-compiled for pkg-config). Every instruction set is in it once; the best that the
// machine has is picked at run time.
//
//   Status     Functions return MOEROUTE_OK or an error code and leave what they would have written
//              alone where a shape is refused; moeroute_last_error() is the sentence, per thread.
//              No exception leaves the library.
//   Matrices   Row-major: element (r, c) is data[r * stride + c]; strides count elements; stride 0
//              is `cols`. 16-bit types are storage, widened once. Memory is the caller's.
//   Sizes      T tokens, E experts, k choices per token, d columns of a hidden state, S slots.
//   Ids        int32, in [0, E) or -1 where a pick could not be made; weights are finite.
//   Handles    Made by *_new, given back by *_free (null is allowed). Threads that only run routers
//              and gates may share them; assignments and plans are used by one at a time.
//   Memory     After *_reserve for the largest T, or once warm, running allocates nothing.
//   Threads    None of its own: an executor runs loops on a pool of the caller's; null is the
//              calling thread. Results have the same bits whatever the executor, and but for
//              matrix products whatever the instruction set.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__) || defined(__clang__)
#define MOEROUTE_API __attribute__((visibility("default")))
#else
#define MOEROUTE_API
#endif

// ---- status, version, instruction sets ----------------------------------------------------------

enum {
  MOEROUTE_OK = 0,
  MOEROUTE_INVALID = 1,    // a shape, a value or a handle does not fit, or an executor did not run
  MOEROUTE_NO_MEMORY = 2,  // an allocation failed
  MOEROUTE_FAILED = 3      // anything else
};

// What the last failed call of this thread refused, as "moeroute::route: logits.cols is 7, expected
// 8", its function first; "" before the first. Valid until the next call that fails.
MOEROUTE_API const char* moeroute_last_error(void);

// "0.2.0"
MOEROUTE_API const char* moeroute_version(void);

// The i-th instruction set that this machine can run, the fastest first, or null: "avx512", "avx2",
// "baseline".
MOEROUTE_API const char* moeroute_isa_name(int32_t i);

// The one in use: the fastest, or what the environment variable MOEROUTE_ISA names.
MOEROUTE_API const char* moeroute_isa(void);

// Uses another one from here on; routers and gates keep the one they were made with.
MOEROUTE_API int moeroute_use_isa(const char* name);

// ---- matrices, executors ------------------------------------------------------------------------

enum moeroute_type {
  MOEROUTE_FLOAT = 0,
  MOEROUTE_BFLOAT16 = 1,
  MOEROUTE_FLOAT16 = 2,
  MOEROUTE_BYTES = 3  // rows of plain bytes, for moeroute_dispatch
};

typedef struct moeroute_matrix {
  void* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;  // elements from row to row; 0: cols
  int32_t type;
} moeroute_matrix;

typedef struct moeroute_const_matrix {
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;
  int32_t type;
} moeroute_const_matrix;

// Runs a piece of a loop: body(loop, begin, end). From any thread; never throws.
typedef void (*moeroute_body)(void* loop, int64_t begin, int64_t end);

// A pool. run() calls body for ranges that cover [0, n) once and begin at multiples of grain, and
// returns when all have returned.
typedef struct moeroute_executor {
  void (*run)(void* pool, int64_t n, int64_t grain, moeroute_body body, void* loop);
  void* pool;
  int32_t threads;  // how many calls of body may run at once
} moeroute_executor;

// ---- routers ------------------------------------------------------------------------------------

enum {  // score
  MOEROUTE_SOFTMAX = 0,
  MOEROUTE_SIGMOID = 1,
  MOEROUTE_SQRT_SOFTPLUS = 2,
  MOEROUTE_RELU = 3,
  MOEROUTE_IDENTITY = 4,
  MOEROUTE_UNIFORM = 5
};
enum {  // selection
  MOEROUTE_TOP_K = 0,
  MOEROUTE_TOP_P = 1,
  MOEROUTE_THRESHOLD = 2,
  MOEROUTE_EXPERT_TABLE = 3,
  MOEROUTE_PRODUCT_KEYS = 4,
  MOEROUTE_SPARSEMIXER = 5,
  MOEROUTE_TOP2 = 6,
  MOEROUTE_RANDOM = 7,
  // These see the whole batch; of the fields below the first group they read those named for them.
  MOEROUTE_EXPERT_CHOICE = 100,
  MOEROUTE_SINKHORN = 101,
  MOEROUTE_SINKHORN_EXPERT_CHOICE = 102,
  MOEROUTE_SELECTIVE_SINKHORN = 103,  // balanced steps by the coin of side.seed and side.step
  MOEROUTE_BASE = 104                 // k = 1; T is a multiple of E, but in evaluation
};
enum { MOEROUTE_GROUP_MAX = 0, MOEROUTE_GROUP_TOP2_SUM = 1, MOEROUTE_GROUP_TOP_SUM = 2 };
enum { MOEROUTE_NORMALIZE_NONE = 0, MOEROUTE_NORMALIZE_SUM = 1, MOEROUTE_NORMALIZE_LP = 2 };
enum { MOEROUTE_EPS_NONE = 0, MOEROUTE_EPS_ADD = 1, MOEROUTE_EPS_CLAMP = 2 };
enum {  // drop order
  MOEROUTE_DROP_CHOICE_MAJOR = 0,
  MOEROUTE_DROP_TOKEN_MAJOR = 1,
  MOEROUTE_DROP_BY_WEIGHT = 2,
  MOEROUTE_DROP_BATCH_PRIORITY = 3,
  MOEROUTE_DROP_RANDOM = 4
};

// A router described: the fields of moeroute::router_spec, and what rules over a whole batch have
// on top. moeroute_spec_init() or moeroute_spec_of_model() fills it; change what differs.
typedef struct moeroute_spec {
  uint32_t size;  // sizeof(moeroute_spec), set by whoever fills it
  int32_t score;
  int64_t experts;  // E, zero experts included
  int64_t k;
  int32_t score_selected;  // 1: chosen on logits, then only the winners are scored
  int32_t selection;
  int32_t selection_bias;  // 1: tensors.bias is added to the scores for the choice
  int32_t group_score;
  int64_t groups;
  int64_t topk_group;
  float group_fill;
  int32_t normalize;
  float lp_p;
  int32_t eps_mode;
  float eps;
  float scale;
  int32_t scale_on_output;  // 1: weights stay; the combined row is to be multiplied by scale
  int32_t divide_by_k;
  float output_scale;
  int32_t per_expert_scale;  // 1: tensors.per_expert_scale
  int32_t gate_bias;         // 1: the gate has one; it is part of the logits
  float softcap;
  float temperature;
  float jitter;  // sparsemixer
  float top_p;
  int32_t crossing;  // top_p: 0 include, 1 include_strict, 2 exclude
  int64_t min_k;
  int64_t max_k;
  float threshold;
  int32_t row_norm;  // threshold: 0 none, 1 sum, 2 rms
  int64_t zero_experts;
  int64_t shared_experts;
  int32_t weight_on_input;
  int32_t drop_order;
  int64_t capacity;  // tokens per expert, 0: no limit; applied by moeroute_apply_capacity
  int32_t normalize_after_drop;

  // MOEROUTE_EXPERT_CHOICE, MOEROUTE_SINKHORN_EXPERT_CHOICE
  int32_t capacity_rounding;  // of T * capacity_factor / E: 0 down, 1 nearest, 2 up
  double capacity_factor;
  int64_t capacity_multiple;
  int64_t sequence_length;  // tokens that compete with one another, 0: all of the batch
  int64_t most_experts;     // per token, 0: no cap
  // MOEROUTE_SINKHORN, MOEROUTE_SELECTIVE_SINKHORN, MOEROUTE_SINKHORN_EXPERT_CHOICE
  int32_t scaling;       // 0: as Megatron-LM (selective: as published); 1: the projection of V-MoE
  int32_t plan_weights;  // 0: by k; 1: sigmoid; 2: softmax; 3: the plan's own entries
  int32_t evaluation;    // 1: Sinkhorn, selective or not, and BASE choose the largest logits
  float plan_temperature;   // 0: that of the scaling
  float plan_tolerance;     // < 0: that of the scaling
  int64_t plan_iterations;  // 0: as many as the scaling has
  // MOEROUTE_SELECTIVE_SINKHORN
  float probability;  // of a balanced step
  // MOEROUTE_BASE
  int32_t optimal;  // 0: the published auction; 1: the largest sum of logits, slow
  int64_t rounds;   // of the auction, 0: 2000
} moeroute_spec;

// What a spec needs beside its fields. Lists of floats stay the caller's and must outlive the
// router, so that a bias may change between calls; the table is copied. Absent: null and 0.
typedef struct moeroute_tensors {
  const float* bias;  // [E]
  int64_t bias_size;
  const float* per_expert_scale;  // [E]
  int64_t per_expert_scale_size;
  const float* gamma;  // [E], row_norm rms
  int64_t gamma_size;
  const int32_t* table;  // [vocabulary, k] experts by token id, -1 allowed
  int64_t table_size;    // vocabulary * k
} moeroute_tensors;

typedef struct moeroute_router moeroute_router;

typedef struct moeroute_router_shape {
  int64_t columns;  // of the logits
  int64_t experts;
  int64_t k;       // choices per token, or the most where it is ragged
  int32_t ragged;  // 1: the number of choices varies from token to token
  // 1: side.token_ids are needed; other routers refuse them, as every side input they do not read.
  int32_t token_ids;
} moeroute_router_shape;

// The plain softmax router: E = 8, k = 2.
MOEROUTE_API int moeroute_spec_init(moeroute_spec* spec);

// The router of a published model, by its name in the catalogue ("deepseek_v3"). A few newer ones
// have rules that a spec has no fields for: refused (MOEROUTE_INVALID), as an unknown name is.
MOEROUTE_API int moeroute_spec_of_model(const char* name, moeroute_spec* spec);

// The i-th name of moeroute::catalog, whose routers a moeroute_spec can describe whole, or null.
// moeroute_spec_of_model() takes those of newer_catalog too, as far as a spec has words for them;
// docs/models.md lists both.
MOEROUTE_API const char* moeroute_model_name(int32_t i);

// tensors may be null. *router is null where the spec is refused.
MOEROUTE_API int moeroute_router_new(const moeroute_spec* spec, const moeroute_tensors* tensors,
                                     moeroute_router** router);
MOEROUTE_API int moeroute_router_free(moeroute_router* router);
MOEROUTE_API int moeroute_router_get_shape(const moeroute_router* router,
                                           moeroute_router_shape* shape);

// ---- routing ------------------------------------------------------------------------------------

// What routing may need beside the logits; null and 0 are "not given".
typedef struct moeroute_side {
  const int32_t* token_ids;   // [T], for tables by token id
  const uint8_t* mask;        // [T], 0: the token takes no part
  const int32_t* k_of_token;  // [T], each token's own k
  uint64_t seed;              // of everything random; the same seed and step replay
  uint64_t step;
} moeroute_side;

// Which experts each token goes to, with which weights; and the scratch that routing needs.
typedef struct moeroute_assignment moeroute_assignment;

// Pointers into an assignment, valid until it is written again. Token t has the choices
// [first, next) of ids and weights: t * k and (t + 1) * k, or offsets[t] and offsets[t + 1].
typedef struct moeroute_assignment_view {
  int64_t tokens;
  int64_t experts;
  int64_t k;        // per token, at most that many where offsets are given
  int64_t choices;  // in all
  const int32_t* ids;
  const float* weights;
  const int32_t* offsets;  // [T + 1], or null where every token has k choices
  const uint8_t* kept;     // [choices], 0: capacity dropped it; or null where nothing was dropped
} moeroute_assignment_view;

MOEROUTE_API int moeroute_assignment_new(moeroute_assignment** assignment);
MOEROUTE_API int moeroute_assignment_free(moeroute_assignment* assignment);

// Room for routing up to `tokens` tokens by this router from logits of this type, for capacity and
// for losses: later calls allocate nothing. `threads` as the executor's.
MOEROUTE_API int moeroute_assignment_reserve(moeroute_assignment* assignment,
                                             const moeroute_router* router, int64_t tokens,
                                             int32_t logits_type, int32_t threads);

// logits [T, columns]. side and executor may be null.
MOEROUTE_API int moeroute_route(const moeroute_router* router, moeroute_const_matrix logits,
                                const moeroute_side* side, const moeroute_executor* executor,
                                moeroute_assignment* assignment);

// The same, and copies of the result in memory of the caller: ids and weights [T, k] with the k of
// moeroute_router_get_shape() (more than the spec's where experts are shared). For routers whose k
// does not vary.
MOEROUTE_API int moeroute_route_to(const moeroute_router* router, moeroute_const_matrix logits,
                                   const moeroute_side* side, const moeroute_executor* executor,
                                   moeroute_assignment* assignment, int32_t* ids, float* weights);

// Choices that somebody else made: ids and weights [T, k], copied. Refused are ids outside [-1, E)
// and weights of experts that are not finite. A token may name one expert twice: it gets a slot for
// each, and combine adds both.
MOEROUTE_API int moeroute_assignment_set(moeroute_assignment* assignment, int64_t tokens,
                                         int64_t experts, int64_t k, const int32_t* ids,
                                         const float* weights);
MOEROUTE_API int moeroute_assignment_get(const moeroute_assignment* assignment,
                                         moeroute_assignment_view* view);

// ---- capacity, counts ---------------------------------------------------------------------------

enum {  // formula, each named after the system whose rounding it has
  MOEROUTE_CAPACITY_UNLIMITED = 0,
  MOEROUTE_CAPACITY_FIXED = 1,
  MOEROUTE_CAPACITY_MEGATRON = 2,
  MOEROUTE_CAPACITY_DEEPSPEED = 3,
  MOEROUTE_CAPACITY_MEGABLOCKS = 4,
  MOEROUTE_CAPACITY_VMOE_CEIL = 5,
  MOEROUTE_CAPACITY_VMOE_ROUND = 6,
  MOEROUTE_CAPACITY_TUTEL = 7,
  MOEROUTE_CAPACITY_NLLB_TRAIN = 8,
  MOEROUTE_CAPACITY_NLLB_EVAL = 9,
  MOEROUTE_CAPACITY_STABLE_MOE = 10,
  MOEROUTE_CAPACITY_NUCLEUS = 11,
  MOEROUTE_CAPACITY_SOFT_MOE = 12
};

typedef struct moeroute_capacity {
  int32_t formula;
  int32_t order;  // who gets the places: MOEROUTE_DROP_*
  double factor;
  int64_t count;          // of the formula FIXED
  int64_t minimum;        // at least this many places
  int64_t multiple;       // rounded up to one; 0: 1
  int32_t renormalize;    // weights divided by their sum: 0 not, 1 before dropping, 2 after
  float eps;              // the sum is at least this
  const float* priority;  // [T] for BATCH_PRIORITY; null: a token's largest weight
  uint64_t seed;
  uint64_t step;
} moeroute_capacity;

typedef struct moeroute_capacity_result {
  int64_t capacity;
  int64_t kept;
  int64_t dropped;
  int64_t unrouted;  // kept + dropped + unrouted = choices
} moeroute_capacity_result;

// What the spec says about capacity.
MOEROUTE_API int moeroute_spec_capacity(const moeroute_spec* spec, moeroute_capacity* capacity);

// Drops every choice that finds its expert full: weight 0, kept 0, the id stays. result may be
// null.
MOEROUTE_API int moeroute_apply_capacity(moeroute_assignment* assignment,
                                         const moeroute_capacity* capacity,
                                         moeroute_capacity_result* result);

// counts[e] = choices of expert e. first_only: each token's best alone; kept_only: without those
// dropped. mask [T] may be null. counts [E].
MOEROUTE_API int moeroute_count_choices(const moeroute_assignment* assignment, int32_t first_only,
                                        int32_t kept_only, const uint8_t* mask, double* counts,
                                        int64_t counts_size);

// ---- plans and their layouts --------------------------------------------------------------------

// Slots in expert-major order, and the way back.
typedef struct moeroute_plan moeroute_plan;

typedef struct moeroute_plan_options {
  int64_t block;         // an expert's slots are rounded up to a multiple; 0: 1
  int64_t capacity;      // every expert gets exactly this many slots; 0: as many as it needs
  int32_t spare_tokens;  // 1: padding holds rows of other tokens; 0: zeros
  const uint8_t* owned;  // [E], 0: left to others; or null
  const uint8_t* mask;   // [T], 0: takes no part; or null
} moeroute_plan_options;

// Pointers into a plan, valid until it is made again. Expert e owns the slots
// [offsets[e], offsets[e + 1]), the first loads[e] of which are tokens, the rest padding.
typedef struct moeroute_plan_view {
  int64_t tokens;
  int64_t experts;
  int64_t k;
  int64_t choices;
  int64_t slots;
  int64_t kept;
  int64_t dropped;
  int64_t elsewhere;
  int64_t unrouted;               // kept + dropped + elsewhere + unrouted = choices
  const int32_t* offsets;         // [E + 1]
  const int32_t* loads;           // [E]
  const int32_t* token_of_slot;   // [slots], -1: empty
  const int32_t* slot_of_choice;  // [choices], -1: none
} moeroute_plan_view;

MOEROUTE_API int moeroute_plan_new(moeroute_plan** plan);
MOEROUTE_API int moeroute_plan_free(moeroute_plan* plan);

// Room for plans of assignments as large as this one, which may just have been reserved.
MOEROUTE_API int moeroute_plan_reserve(moeroute_plan* plan, const moeroute_assignment* assignment,
                                       const moeroute_plan_options* options);

// options may be null.
MOEROUTE_API int moeroute_plan_make(moeroute_plan* plan, const moeroute_assignment* assignment,
                                    const moeroute_plan_options* options);

// Each expert's tokens [E, C], as expert choice gives them: in any order, each at most once per
// expert, -1 where it has fewer than C. weight likewise, or null.
typedef struct moeroute_expert_lists {
  int64_t tokens;
  int64_t experts;
  int64_t capacity;  // C
  const int32_t* token;
  const float* weight;
} moeroute_expert_lists;

// The plan of such lists, without an assignment: a token's choices are its experts in ascending
// order. weights: null, or room for E * C, of which as many as the plan has choices become the
// lists' weights in their order: what moeroute_combine_weights takes.
MOEROUTE_API int moeroute_plan_make_of_lists(moeroute_plan* plan,
                                             const moeroute_expert_lists* lists,
                                             const moeroute_plan_options* options, float* weights);
MOEROUTE_API int moeroute_plan_get(const moeroute_plan* plan, moeroute_plan_view* view);

// The arrays of moe_align_block_size: choices in slot order (`choices` where a slot is padding),
// the expert of every block, tail_expert behind the last one, and, if not null, where each block
// starts without padding. sorted has room for sorted_size >= slots, the others for blocks_size >=
// slots / block. The plan was made with that block.
MOEROUTE_API int moeroute_plan_aligned_blocks(const moeroute_plan* plan, int64_t block,
                                              int32_t tail_expert, int32_t* sorted,
                                              int64_t sorted_size, int32_t* block_experts,
                                              int32_t* block_starts, int64_t blocks_size);

// The row-id map [T, 2 E + 1] of TransformerEngine.
MOEROUTE_API int moeroute_plan_row_id_map(const moeroute_plan* plan, int32_t* map,
                                          int64_t map_size);

// Who sends to whom over `ranks` ranks of E / ranks experts, a token counted once per rank and node
// (DeepEP): per_expert [E], per_rank [ranks], in_rank [T, ranks], per_node [ranks / ranks_per_node]
// or null.
MOEROUTE_API int moeroute_once_counts(const moeroute_assignment* assignment, int64_t ranks,
                                      int64_t ranks_per_node, int32_t* per_expert,
                                      int32_t* per_rank, uint8_t* in_rank, int32_t* per_node);

// ---- rows ---------------------------------------------------------------------------------------

// slots[s] = x[token of s], empty slots zeros. x [T, d], slots [S, d]; types may differ, but not
// one 16-bit type and the other; MOEROUTE_BYTES on both sides moves quantised rows as they are.
// scale: null, or [choices] that rows are multiplied with (weights on the expert's input).
MOEROUTE_API int moeroute_dispatch(const moeroute_plan* plan, moeroute_const_matrix x,
                                   moeroute_matrix slots, const float* scale,
                                   const moeroute_executor* executor);

typedef struct moeroute_combine_options {
  int32_t weights_applied;  // 1: rows are added as they are
  int32_t accumulate;       // 1: the sum starts from what y holds
  int32_t lost_residual;    // 1: a token without any term gets its row of x; 0: zeros
  int32_t identity_first;   // experts [first, end) give the token's row of x and need no slot
  int32_t identity_end;
  moeroute_const_matrix x;       // [T, d] in y's type, for the last two
  moeroute_const_matrix shared;  // [T, d] in y's type, added last; no rows: none
  const float* shared_weight;    // [T], what shared rows are multiplied with; null: 1
} moeroute_combine_options;

// y[t] = sum over t's choices, in rank order, of weight * slots[slot of the choice]; sums in float,
// rounded once. slots [S, d], y [T, d]; types as in moeroute_dispatch. options may be null.
MOEROUTE_API int moeroute_combine(moeroute_const_matrix slots, const moeroute_plan* plan,
                                  const moeroute_assignment* assignment, moeroute_matrix y,
                                  const moeroute_combine_options* options,
                                  const moeroute_executor* executor);

// The same with weights [choices] in the order of the plan's choices and no assignment, as after
// moeroute_plan_make_of_lists(). Identity experts need an assignment.
MOEROUTE_API int moeroute_combine_weights(moeroute_const_matrix slots, const moeroute_plan* plan,
                                          const float* weights, int64_t weights_size,
                                          moeroute_matrix y,
                                          const moeroute_combine_options* options,
                                          const moeroute_executor* executor);

// The same from one row for every choice, [T * k, d] where k is fixed: what grouped products leave.
MOEROUTE_API int moeroute_combine_choices(moeroute_const_matrix rows,
                                          const moeroute_assignment* assignment, moeroute_matrix y,
                                          const moeroute_combine_options* options,
                                          const moeroute_executor* executor);

// ---- gate ---------------------------------------------------------------------------------------

// Gate weights, packed for the matrix product.
typedef struct moeroute_gate moeroute_gate;

// weight [E, d], copied and kept in its type (16 bits: half of what one token has to read); bias
// [E], or null and 0.
MOEROUTE_API int moeroute_gate_new(moeroute_const_matrix weight, const float* bias,
                                   int64_t bias_size, moeroute_gate** gate);
MOEROUTE_API int moeroute_gate_free(moeroute_gate* gate);

// logits = x W^T + b, in float. x [T, d], logits [T, E] of type MOEROUTE_FLOAT.
MOEROUTE_API int moeroute_gate_run(const moeroute_gate* gate, moeroute_const_matrix x,
                                   moeroute_matrix logits, const moeroute_executor* executor);

// logits = scale * cos(x, w_e), for weights whose rows have norm 1.
MOEROUTE_API int moeroute_gate_cosine(const moeroute_gate* gate, moeroute_const_matrix x,
                                      float scale, moeroute_matrix logits,
                                      const moeroute_executor* executor);

// ---- soft mixtures ------------------------------------------------------------------------------

// Every token in every slot, every slot in every token.
typedef struct moeroute_soft_plan moeroute_soft_plan;

typedef struct moeroute_soft_plan_view {
  int64_t tokens;
  int64_t slots;
  int64_t slots_per_expert;
  const float* dispatch;  // [S, T], rows sum to 1
  const float* combine;   // [T, S], rows sum to 1
} moeroute_soft_plan_view;

MOEROUTE_API int moeroute_soft_plan_new(moeroute_soft_plan** plan);
MOEROUTE_API int moeroute_soft_plan_free(moeroute_soft_plan* plan);
MOEROUTE_API int moeroute_soft_plan_reserve(moeroute_soft_plan* plan, int64_t tokens, int64_t slots,
                                            int64_t slots_per_expert);

// logits [T, S], the slots of an expert side by side.
MOEROUTE_API int moeroute_soft_plan_make(moeroute_soft_plan* plan, moeroute_const_matrix logits,
                                         int64_t slots_per_expert,
                                         const moeroute_executor* executor);
MOEROUTE_API int moeroute_soft_plan_get(const moeroute_soft_plan* plan,
                                        moeroute_soft_plan_view* view);
// x [T, d], slots [S, d]; slots [S, d], y [T, d]; types as in moeroute_dispatch.
MOEROUTE_API int moeroute_soft_dispatch(const moeroute_soft_plan* plan, moeroute_const_matrix x,
                                        moeroute_matrix slots, const moeroute_executor* executor);
MOEROUTE_API int moeroute_soft_combine(const moeroute_soft_plan* plan, moeroute_const_matrix slots,
                                       moeroute_matrix y, const moeroute_executor* executor);

// ---- balance ------------------------------------------------------------------------------------

// Losses of one layer; a coefficient of 0 is a loss that is not there.
typedef struct moeroute_losses {
  double switch_coefficient;    // Switch / GShard as Megatron-LM has it, counts of all k choices
  double z_coefficient;         // ST-MoE's mean square of the log-sum-exp
  double sequence_coefficient;  // DeepSeek's by sequence
  int64_t sequence_length;      // of the last; 0: there is none
  int32_t scores;       // probabilities: 0 softmax, 1 sigmoid and 2 sqrt-softplus over their sum
  int32_t accumulate;   // 1: the gradient is added to what dlogits hold
  const uint8_t* mask;  // [T], 0: takes no part; or null
} moeroute_losses;

// values[0..2] = the three losses, dlogits [T, E] = the gradient of their sum; its data may be null
// for values alone. Counts are those of the assignment's choices before dropping. Float.
MOEROUTE_API int moeroute_balance_loss(const moeroute_losses* losses, moeroute_const_matrix logits,
                                       moeroute_assignment* assignment, moeroute_matrix dlogits,
                                       const moeroute_executor* executor, double* values);

// The bias of balancing without a loss.
typedef struct moeroute_bias moeroute_bias;

typedef struct moeroute_bias_options {
  int32_t rule;    // 0 sign, 1 proportional, 2 multiplicative
  int32_t error;   // 0 over the mean, 1 over the total, 2 in tokens
  int32_t decay;   // of the step: 0 none, 1 inverse root, 2 inverse
  int32_t centre;  // 1: the mean is subtracted after every update
  float step;
  float least_factor;  // of multiplicative factors
} moeroute_bias_options;

// options null: sign, step 0.001.
MOEROUTE_API int moeroute_bias_new(int64_t experts, const moeroute_bias_options* options,
                                   moeroute_bias** bias);
MOEROUTE_API int moeroute_bias_free(moeroute_bias* bias);
// counts [E] of one global batch.
MOEROUTE_API int moeroute_bias_update(moeroute_bias* bias, const double* counts,
                                      int64_t counts_size);
// *values: [E], for moeroute_tensors.bias; it follows every update and may be written
// (checkpoints).
MOEROUTE_API int moeroute_bias_get(moeroute_bias* bias, float** values, int64_t* experts);

#ifdef __cplusplus
}
#endif

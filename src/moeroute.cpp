// The C face: picks the instruction set, checks handles, pointers and shapes, and turns what is
// thrown into a status. Includes nothing of moeroute's headers, so that nothing of it is compiled
// twice.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <type_traits>

#include <moeroute/base/version.hpp>

#include <moeroute/compiled.hpp>

#include "kernels.hpp"

using moeroute::sets::handle;
using moeroute::sets::handle_kind;
using moeroute::sets::kernels;
using moeroute::sets::plain_code;

extern "C" {
extern const plain_code moeroute_plain;
#define MOEROUTE_SET(name) extern const kernels moeroute_kernels_##name;
MOEROUTE_SETS
#undef MOEROUTE_SET
}

namespace {

thread_local char last_error[512] = "";

constexpr std::int64_t most = 0x7fffffff;

// ---- which set ----------------------------------------------------------------------------------

#if defined(__x86_64__)
// clang 16's __builtin_cpu_supports does not know the name.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

// Each flag of compiled.cmake is asked for.
bool runs(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && has_f16c();
  if (std::strcmp(name, "avx2") == 0) return avx2;
  if (std::strcmp(name, "avx512") == 0)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd");
#endif
  return std::strcmp(name, "baseline") == 0;
}

struct set_list {
  const kernels* set[8] = {};  // the fastest first, then null
  std::atomic<const kernels*> used{nullptr};

  set_list() {
    int n = 0;
#define MOEROUTE_SET(name) \
  if (runs(#name)) set[n++] = &moeroute_kernels_##name;
    MOEROUTE_SETS
#undef MOEROUTE_SET
    used = set[0];
    // A name that this machine has not is not obeyed: a library does not end its program.
    if (const char* wanted = std::getenv("MOEROUTE_ISA")) use(wanted);
  }

  bool use(const char* name) {
    for (const kernels* k : set)
      if (k != nullptr && std::strcmp(k->name, name) == 0) {
        used = k;
        return true;
      }
    return false;
  }
};

set_list& sets() {
  static set_list list;
  return list;
}
const kernels& used() { return *sets().used.load(std::memory_order_relaxed); }

// ---- what is refused ----------------------------------------------------------------------------

class refusal : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

template <class... Args>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const char* format, Args... args) {
  char text[256];
  std::snprintf(text, sizeof text, format, args...);
  throw refusal(text);
}

const char* name_of(handle_kind kind) {
  switch (kind) {
    case handle_kind::none: break;
    case handle_kind::router: return "router";
    case handle_kind::assignment: return "assignment";
    case handle_kind::plan: return "plan";
    case handle_kind::gate: return "gate";
    case handle_kind::soft_plan: return "soft plan";
    case handle_kind::bias: return "bias";
  }
  return "handle that is none of ours, or was freed";
}

const char* article_of(handle_kind kind) { return kind == handle_kind::assignment ? "an" : "a"; }

// The handles of the face, and the kind that each has.
template <class Handle>
constexpr handle_kind kind_of = handle_kind::none;
template <>
constexpr handle_kind kind_of<moeroute_router> = handle_kind::router;
template <>
constexpr handle_kind kind_of<moeroute_assignment> = handle_kind::assignment;
template <>
constexpr handle_kind kind_of<moeroute_plan> = handle_kind::plan;
template <>
constexpr handle_kind kind_of<moeroute_gate> = handle_kind::gate;
template <>
constexpr handle_kind kind_of<moeroute_soft_plan> = handle_kind::soft_plan;
template <>
constexpr handle_kind kind_of<moeroute_bias> = handle_kind::bias;

/// The handle, which every struct of ours begins with.
template <class Handle>
const handle& base_of(const Handle* h) {
  return *reinterpret_cast<const handle*>(h);
}

template <class Handle>
Handle& given(const char* where, Handle* h) {
  constexpr handle_kind wanted = kind_of<std::remove_const_t<Handle>>;
  if (h == nullptr) refuse("moeroute::%s: the %s is null", where, name_of(wanted));
  if (const handle_kind kind = base_of(h).kind; kind != wanted)
    refuse("moeroute::%s: %s %s, expected %s %s", where, article_of(kind), name_of(kind),
           article_of(wanted), name_of(wanted));
  return *h;
}

template <class T>
T& pointed(const char* where, const char* what, T* p) {
  if (p == nullptr) refuse("moeroute::%s: %s is null", where, what);
  return *p;
}

void check_size(const char* where, const char* what, std::int64_t value, std::int64_t least,
                std::int64_t greatest) {
  if (value < least || value > greatest)
    refuse("moeroute::%s: %s is %lld, expected %lld to %lld", where, what,
           static_cast<long long>(value), static_cast<long long>(least),
           static_cast<long long>(greatest));
}

void check_list(const char* where, const char* what, const void* list, std::int64_t size) {
  if (size < 0) check_size(where, what, size, 0, most);
  if (size > 0 && list == nullptr)
    refuse("moeroute::%s: %s is null, expected %lld values", where, what,
           static_cast<long long>(size));
}

// A matrix as it is used from here on: its stride filled in, every field in its range.
template <class Matrix>
Matrix checked(const char* where, const char* what, Matrix m, std::int32_t last_type) {
  const auto field = [&](const char* name, std::int64_t value, std::int64_t greatest) {
    if (value < 0 || value > greatest)
      refuse("moeroute::%s: %s.%s is %lld, expected 0 to %lld", where, what, name,
             static_cast<long long>(value), static_cast<long long>(greatest));
  };
  field("type", m.type, last_type);
  field("rows", m.rows, most);
  field("cols", m.cols, most);
  field("stride", m.stride, std::int64_t{1} << 40);
  if (m.stride == 0) m.stride = m.cols;
  if (m.rows > 1 && m.stride < m.cols)
    refuse("moeroute::%s: %s.stride is %lld, expected at least %lld", where, what,
           static_cast<long long>(m.stride), static_cast<long long>(m.cols));
  if (m.data == nullptr && m.rows > 0 && m.cols > 0)
    refuse("moeroute::%s: %s.data is null, expected %lld rows", where, what,
           static_cast<long long>(m.rows));
  return m;
}

void check_executor(const char* where, const moeroute_executor* e) {
  if (e == nullptr) return;
  if (e->run == nullptr) refuse("moeroute::%s: executor.run is null", where);
  check_size(where, "executor.threads", e->threads, 1, 1 << 20);
}

void check_spec(const char* where, const moeroute_spec* s) {
  if (pointed(where, "the spec", s).size != sizeof(moeroute_spec))
    refuse("moeroute::%s: spec.size is %u, expected %zu: fill it by moeroute_spec_init", where,
           s->size, sizeof(moeroute_spec));
}

// The sentence begins with the function that was called: a stage of the headers that is part of its
// name gives way to it (plan to plan_make), any other stands behind it (router_new: top_k).
int failed(int status, const char* where, const char* message) {
  constexpr char ours[] = "moeroute::";
  constexpr std::size_t n = sizeof ours - 1;
  if (std::strncmp(message, ours, n) == 0) message += n;
  const std::size_t stage = std::strcspn(message, ": ");
  const bool part = std::strncmp(message, where, stage) == 0 &&
                    (where[stage] == '\0' || where[stage] == '_') &&
                    std::strncmp(message + stage, ": ", 2) == 0;
  std::snprintf(last_error, sizeof last_error, "%s%s: %s", ours, where,
                part ? message + stage + 2 : message);
  return status;
}

// Runs f; what it throws becomes the status and the sentence.
template <class F>
int guarded(const char* where, F&& f) noexcept {
  try {
    f();
    return MOEROUTE_OK;
  } catch (const std::bad_alloc&) {
    return failed(MOEROUTE_NO_MEMORY, where, "out of memory");
  } catch (const std::invalid_argument& e) {
    return failed(MOEROUTE_INVALID, where, e.what());
  } catch (const std::exception& e) {
    return failed(MOEROUTE_FAILED, where, e.what());
  } catch (...) {
    return failed(MOEROUTE_FAILED, where, "an exception of an unknown type");
  }
}

// Makes a handle; *out is null where that fails.
template <class Handle, class F>
int made(const char* where, Handle** out, F&& f) noexcept {
  return guarded(where, [&] {
    pointed(where, "the place for the handle", out) = nullptr;
    *out = f();
  });
}

template <class Handle, class F>
int freed(const char* where, Handle* h, F&& free_handle) noexcept {
  return guarded(where, [&] {
    if (h == nullptr) return;
    given(where, h);
    reinterpret_cast<handle*>(h)->kind = handle_kind::none;
    free_handle(h);
  });
}

void combine(const char* where, const char* what, const moeroute_const_matrix& rows,
             const moeroute_plan* plan, const moeroute_assignment* assignment, const float* weights,
             std::int64_t weights_size, const moeroute_matrix& y,
             const moeroute_combine_options* options, const moeroute_executor* executor) {
  check_executor(where, executor);
  moeroute_combine_options o = options == nullptr ? moeroute_combine_options{} : *options;
  o.x = checked(where, "x", o.x, MOEROUTE_FLOAT16);
  o.shared = checked(where, "shared", o.shared, MOEROUTE_FLOAT16);
  used().combine(checked(where, what, rows, MOEROUTE_FLOAT16), plan, assignment, weights,
                 weights_size, checked(where, "y", y, MOEROUTE_FLOAT16), o, executor);
}

}  // namespace

#define MOEROUTE_TEXT2(x) #x
#define MOEROUTE_TEXT(x) MOEROUTE_TEXT2(x)

extern "C" {

const char* moeroute_last_error(void) { return last_error; }

const char* moeroute_version(void) {
  return MOEROUTE_TEXT(MOEROUTE_VERSION_MAJOR) "." MOEROUTE_TEXT(
      MOEROUTE_VERSION_MINOR) "." MOEROUTE_TEXT(MOEROUTE_VERSION_PATCH);
}

const char* moeroute_isa_name(int32_t i) {
  const kernels* const k = i >= 0 && i < 8 ? sets().set[i] : nullptr;
  return k == nullptr ? nullptr : k->name;
}

const char* moeroute_isa(void) { return used().name; }

int moeroute_use_isa(const char* name) {
  return guarded("use_isa", [&] {
    pointed("use_isa", "the name", name);
    if (!sets().use(name))
      refuse("moeroute::use_isa: '%.32s' is no instruction set of this machine", name);
  });
}

// ---- routers ------------------------------------------------------------------------------------

int moeroute_spec_init(moeroute_spec* spec) {
  return guarded("spec_init",
                 [&] { moeroute_plain.spec_of_model("", pointed("spec_init", "the spec", spec)); });
}

int moeroute_spec_of_model(const char* name, moeroute_spec* spec) {
  return guarded("spec_of_model", [&] {
    pointed("spec_of_model", "the name", name);
    moeroute_spec found;
    if (!moeroute_plain.spec_of_model(name, found))
      refuse("moeroute::spec_of_model: '%.64s' is not in the catalogue", name);
    pointed("spec_of_model", "the spec", spec) = found;
  });
}

const char* moeroute_model_name(int32_t i) { return moeroute_plain.model_name(i); }

int moeroute_router_new(const moeroute_spec* spec, const moeroute_tensors* tensors,
                        moeroute_router** router) {
  constexpr const char* where = "router_new";
  return made(where, router, [&] {
    check_spec(where, spec);
    const moeroute_tensors t = tensors == nullptr ? moeroute_tensors{} : *tensors;
    check_list(where, "bias", t.bias, t.bias_size);
    check_list(where, "per_expert_scale", t.per_expert_scale, t.per_expert_scale_size);
    check_list(where, "gamma", t.gamma, t.gamma_size);
    check_list(where, "table", t.table, t.table_size);
    return used().router_new(*spec, t);
  });
}

int moeroute_router_free(moeroute_router* router) {
  return freed("router_free", router, [](moeroute_router* r) { base_of(r).set->router_free(r); });
}

int moeroute_router_get_shape(const moeroute_router* router, moeroute_router_shape* shape) {
  constexpr const char* where = "router_get_shape";
  return guarded(where, [&] {
    base_of(&given(where, router)).set->router_shape(*router, pointed(where, "the shape", shape));
  });
}

// ---- routing ------------------------------------------------------------------------------------

int moeroute_assignment_new(moeroute_assignment** assignment) {
  return made("assignment_new", assignment, moeroute_plain.assignment_new);
}

int moeroute_assignment_free(moeroute_assignment* assignment) {
  return freed("assignment_free", assignment, moeroute_plain.assignment_free);
}

int moeroute_route(const moeroute_router* router, moeroute_const_matrix logits,
                   const moeroute_side* side, const moeroute_executor* executor,
                   moeroute_assignment* assignment) {
  constexpr const char* where = "route";
  return guarded(where, [&] {
    const kernels& set = *base_of(&given(where, router)).set;
    given(where, assignment);
    check_executor(where, executor);
    set.route(*router, checked(where, "logits", logits, MOEROUTE_FLOAT16),
              side == nullptr ? moeroute_side{} : *side, executor, *assignment);
  });
}

int moeroute_route_to(const moeroute_router* router, moeroute_const_matrix logits,
                      const moeroute_side* side, const moeroute_executor* executor,
                      moeroute_assignment* assignment, int32_t* ids, float* weights) {
  constexpr const char* where = "route_to";
  return guarded(where, [&] {
    moeroute_router_shape shape;
    const kernels& set = *base_of(&given(where, router)).set;
    given(where, assignment);
    check_executor(where, executor);
    const moeroute_const_matrix z = checked(where, "logits", logits, MOEROUTE_FLOAT16);
    set.router_shape(*router, shape);
    if (shape.ragged != 0)
      refuse("moeroute::%s: the router's k varies, expected a fixed k: see moeroute_route", where);
    check_list(where, "ids", ids, z.rows);
    check_list(where, "weights", weights, z.rows);
    set.route(*router, z, side == nullptr ? moeroute_side{} : *side, executor, *assignment);
    moeroute_assignment_view v;
    moeroute_plain.assignment_get(*assignment, v);
    if (v.choices == 0) return;
    std::memcpy(ids, v.ids, static_cast<std::size_t>(v.choices) * sizeof *ids);
    std::memcpy(weights, v.weights, static_cast<std::size_t>(v.choices) * sizeof *weights);
  });
}

int moeroute_assignment_set(moeroute_assignment* assignment, int64_t tokens, int64_t experts,
                            int64_t k, const int32_t* ids, const float* weights) {
  constexpr const char* where = "assignment_set";
  return guarded(where, [&] {
    given(where, assignment);
    check_list(where, "ids", ids, tokens);
    check_list(where, "weights", weights, tokens);
    moeroute_plain.assignment_set(*assignment, tokens, experts, k, ids, weights);
  });
}

int moeroute_assignment_get(const moeroute_assignment* assignment, moeroute_assignment_view* view) {
  constexpr const char* where = "assignment_get";
  return guarded(where, [&] {
    moeroute_plain.assignment_get(given(where, assignment), pointed(where, "the view", view));
  });
}

int moeroute_assignment_reserve(moeroute_assignment* assignment, const moeroute_router* router,
                                int64_t tokens, int32_t logits_type, int32_t threads) {
  constexpr const char* where = "assignment_reserve";
  return guarded(where, [&] {
    const kernels& set = *base_of(&given(where, router)).set;
    given(where, assignment);
    check_size(where, "tokens", tokens, 0, most);
    check_size(where, "logits_type", logits_type, MOEROUTE_FLOAT, MOEROUTE_FLOAT16);
    check_size(where, "threads", threads, 1, 1 << 20);
    moeroute_router_shape shape;
    set.router_shape(*router, shape);
    // A dry run takes what a run takes: zeros for logits, 0 for every token's id.
    struct zeros {
      void* memory;
      explicit zeros(std::int64_t n) : memory(std::calloc(static_cast<std::size_t>(n) + 1, 4)) {
        if (memory == nullptr) throw std::bad_alloc();
      }
      ~zeros() { std::free(memory); }
    };
    check_size(where, "tokens * columns", tokens * shape.columns, 0, std::int64_t{1} << 48);
    const zeros logits(tokens * shape.columns), ids(tokens);
    moeroute_side side{};
    if (shape.token_ids != 0) side.token_ids = static_cast<const std::int32_t*>(ids.memory);
    moeroute_executor many{};
    many.threads = threads;
    many.run = [](void*, std::int64_t n, std::int64_t, moeroute_body body, void* loop) {
      body(loop, 0, n);
    };
    set.route_reserve(*router, {logits.memory, tokens, shape.columns, shape.columns, logits_type},
                      side, threads > 1 ? &many : nullptr, *assignment);
    moeroute_plain.assignment_warm(*assignment);
  });
}

// ---- capacity, counts ---------------------------------------------------------------------------

int moeroute_spec_capacity(const moeroute_spec* spec, moeroute_capacity* capacity) {
  constexpr const char* where = "spec_capacity";
  return guarded(where, [&] {
    check_spec(where, spec);
    moeroute_plain.spec_capacity(*spec, pointed(where, "the capacity", capacity));
  });
}

int moeroute_apply_capacity(moeroute_assignment* assignment, const moeroute_capacity* capacity,
                            moeroute_capacity_result* result) {
  constexpr const char* where = "apply_capacity";
  return guarded(where, [&] {
    given(where, assignment);
    moeroute_capacity_result r;
    moeroute_plain.apply_capacity(*assignment, pointed(where, "the capacity", capacity), r);
    if (result != nullptr) *result = r;
  });
}

int moeroute_count_choices(const moeroute_assignment* assignment, int32_t first_only,
                           int32_t kept_only, const uint8_t* mask, double* counts,
                           int64_t counts_size) {
  constexpr const char* where = "count_choices";
  return guarded(where, [&] {
    given(where, assignment);
    check_list(where, "counts", counts, counts_size);
    moeroute_plain.count_choices(*assignment, first_only != 0, kept_only != 0, mask, counts,
                                 counts_size);
  });
}

// ---- plans --------------------------------------------------------------------------------------

int moeroute_plan_new(moeroute_plan** plan) {
  return made("plan_new", plan, moeroute_plain.plan_new);
}

int moeroute_plan_free(moeroute_plan* plan) {
  return freed("plan_free", plan, moeroute_plain.plan_free);
}

int moeroute_plan_make(moeroute_plan* plan, const moeroute_assignment* assignment,
                       const moeroute_plan_options* options) {
  constexpr const char* where = "plan_make";
  return guarded(where, [&] {
    given(where, plan);
    used().plan_make(given(where, assignment),
                     options == nullptr ? moeroute_plan_options{} : *options, *plan);
  });
}

int moeroute_plan_make_of_lists(moeroute_plan* plan, const moeroute_expert_lists* lists,
                                const moeroute_plan_options* options, float* weights) {
  constexpr const char* where = "plan_make_of_lists";
  return guarded(where, [&] {
    given(where, plan);
    const moeroute_expert_lists& l = pointed(where, "the lists", lists);
    check_size(where, "lists.tokens", l.tokens, 0, most);
    check_size(where, "lists.experts", l.experts, 1, 1 << 20);
    check_size(where, "lists.capacity", l.capacity, 0, most / l.experts);
    check_list(where, "lists.token", l.token, l.experts * l.capacity);
    used().plan_of_lists(l, options == nullptr ? moeroute_plan_options{} : *options, weights,
                         *plan);
  });
}

int moeroute_plan_reserve(moeroute_plan* plan, const moeroute_assignment* assignment,
                          const moeroute_plan_options* options) {
  constexpr const char* where = "plan_reserve";
  return guarded(where, [&] {
    given(where, plan);
    used().plan_reserve(given(where, assignment),
                        options == nullptr ? moeroute_plan_options{} : *options, *plan);
  });
}

int moeroute_plan_get(const moeroute_plan* plan, moeroute_plan_view* view) {
  constexpr const char* where = "plan_get";
  return guarded(where, [&] {
    moeroute_plain.plan_get(given(where, plan), pointed(where, "the view", view));
  });
}

int moeroute_plan_aligned_blocks(const moeroute_plan* plan, int64_t block, int32_t tail_expert,
                                 int32_t* sorted, int64_t sorted_size, int32_t* block_experts,
                                 int32_t* block_starts, int64_t blocks_size) {
  constexpr const char* where = "plan_aligned_blocks";
  return guarded(where, [&] {
    given(where, plan);
    check_list(where, "sorted", sorted, sorted_size);
    check_list(where, "block_experts", block_experts, blocks_size);
    moeroute_plain.aligned_blocks(*plan, block, tail_expert, sorted, sorted_size, block_experts,
                                  block_starts, blocks_size);
  });
}

int moeroute_plan_row_id_map(const moeroute_plan* plan, int32_t* map, int64_t map_size) {
  constexpr const char* where = "plan_row_id_map";
  return guarded(where, [&] {
    given(where, plan);
    check_list(where, "map", map, map_size);
    moeroute_plain.row_id_map(*plan, map, map_size);
  });
}

int moeroute_once_counts(const moeroute_assignment* assignment, int64_t ranks,
                         int64_t ranks_per_node, int32_t* per_expert, int32_t* per_rank,
                         uint8_t* in_rank, int32_t* per_node) {
  constexpr const char* where = "once_counts";
  return guarded(where, [&] {
    given(where, assignment);
    check_list(where, "per_expert", per_expert, 1);
    check_list(where, "per_rank", per_rank, ranks);
    check_list(where, "in_rank", in_rank, ranks);
    moeroute_plain.once_counts(*assignment, ranks, ranks_per_node, per_expert, per_rank, in_rank,
                               per_node);
  });
}

// ---- rows ---------------------------------------------------------------------------------------

int moeroute_dispatch(const moeroute_plan* plan, moeroute_const_matrix x, moeroute_matrix slots,
                      const float* scale, const moeroute_executor* executor) {
  constexpr const char* where = "dispatch";
  return guarded(where, [&] {
    given(where, plan);
    check_executor(where, executor);
    used().dispatch(*plan, checked(where, "x", x, MOEROUTE_BYTES),
                    checked(where, "slots", slots, MOEROUTE_BYTES), scale, executor);
  });
}

int moeroute_combine(moeroute_const_matrix slots, const moeroute_plan* plan,
                     const moeroute_assignment* assignment, moeroute_matrix y,
                     const moeroute_combine_options* options, const moeroute_executor* executor) {
  return guarded("combine", [&] {
    given("combine", plan);
    combine("combine", "slots", slots, plan, &given("combine", assignment), nullptr, 0, y, options,
            executor);
  });
}

int moeroute_combine_weights(moeroute_const_matrix slots, const moeroute_plan* plan,
                             const float* weights, int64_t weights_size, moeroute_matrix y,
                             const moeroute_combine_options* options,
                             const moeroute_executor* executor) {
  constexpr const char* where = "combine_weights";
  return guarded(where, [&] {
    check_list(where, "weights", weights, weights_size);
    combine(where, "slots", slots, &given(where, plan), nullptr, weights, weights_size, y, options,
            executor);
  });
}

int moeroute_combine_choices(moeroute_const_matrix rows, const moeroute_assignment* assignment,
                             moeroute_matrix y, const moeroute_combine_options* options,
                             const moeroute_executor* executor) {
  return guarded("combine_choices", [&] {
    combine("combine_choices", "rows", rows, nullptr, &given("combine_choices", assignment),
            nullptr, 0, y, options, executor);
  });
}

// ---- gate ---------------------------------------------------------------------------------------

int moeroute_gate_new(moeroute_const_matrix weight, const float* bias, int64_t bias_size,
                      moeroute_gate** gate) {
  constexpr const char* where = "gate_new";
  return made(where, gate, [&] {
    check_list(where, "bias", bias, bias_size);
    if (bias_size != 0 && bias_size != weight.rows)
      refuse("moeroute::gate_new: bias_size is %lld, expected weight.rows = %lld",
             static_cast<long long>(bias_size), static_cast<long long>(weight.rows));
    return used().gate_new(checked(where, "weight", weight, MOEROUTE_FLOAT16),
                           bias_size > 0 ? bias : nullptr);
  });
}

int moeroute_gate_free(moeroute_gate* gate) {
  return freed("gate_free", gate, [](moeroute_gate* g) { base_of(g).set->gate_free(g); });
}

int moeroute_gate_run(const moeroute_gate* gate, moeroute_const_matrix x, moeroute_matrix logits,
                      const moeroute_executor* executor) {
  constexpr const char* where = "gate_run";
  return guarded(where, [&] {
    const kernels& set = *base_of(&given(where, gate)).set;
    check_executor(where, executor);
    set.gate_run(*gate, checked(where, "x", x, MOEROUTE_FLOAT16), nullptr,
                 checked(where, "logits", logits, MOEROUTE_FLOAT), executor);
  });
}

int moeroute_gate_cosine(const moeroute_gate* gate, moeroute_const_matrix x, float scale,
                         moeroute_matrix logits, const moeroute_executor* executor) {
  constexpr const char* where = "gate_cosine";
  return guarded(where, [&] {
    const kernels& set = *base_of(&given(where, gate)).set;
    check_executor(where, executor);
    set.gate_run(*gate, checked(where, "x", x, MOEROUTE_FLOAT16), &scale,
                 checked(where, "logits", logits, MOEROUTE_FLOAT), executor);
  });
}

// ---- soft mixtures ------------------------------------------------------------------------------

int moeroute_soft_plan_new(moeroute_soft_plan** plan) {
  return made("soft_plan_new", plan, moeroute_plain.soft_plan_new);
}

int moeroute_soft_plan_free(moeroute_soft_plan* plan) {
  return freed("soft_plan_free", plan, moeroute_plain.soft_plan_free);
}

int moeroute_soft_plan_reserve(moeroute_soft_plan* plan, int64_t tokens, int64_t slots,
                               int64_t slots_per_expert) {
  return guarded("soft_plan_reserve", [&] {
    moeroute_plain.soft_plan_reserve(given("soft_plan_reserve", plan), tokens, slots,
                                     slots_per_expert);
  });
}

int moeroute_soft_plan_make(moeroute_soft_plan* plan, moeroute_const_matrix logits,
                            int64_t slots_per_expert, const moeroute_executor* executor) {
  constexpr const char* where = "soft_plan_make";
  return guarded(where, [&] {
    given(where, plan);
    check_executor(where, executor);
    used().soft_plan_make(checked(where, "logits", logits, MOEROUTE_FLOAT16), slots_per_expert,
                          *plan, executor);
  });
}

int moeroute_soft_plan_get(const moeroute_soft_plan* plan, moeroute_soft_plan_view* view) {
  constexpr const char* where = "soft_plan_get";
  return guarded(where, [&] {
    moeroute_plain.soft_plan_get(given(where, plan), pointed(where, "the view", view));
  });
}

int moeroute_soft_dispatch(const moeroute_soft_plan* plan, moeroute_const_matrix x,
                           moeroute_matrix slots, const moeroute_executor* executor) {
  constexpr const char* where = "soft_dispatch";
  return guarded(where, [&] {
    given(where, plan);
    check_executor(where, executor);
    used().soft_dispatch(*plan, checked(where, "x", x, MOEROUTE_FLOAT16),
                         checked(where, "slots", slots, MOEROUTE_FLOAT16), executor);
  });
}

int moeroute_soft_combine(const moeroute_soft_plan* plan, moeroute_const_matrix slots,
                          moeroute_matrix y, const moeroute_executor* executor) {
  constexpr const char* where = "soft_combine";
  return guarded(where, [&] {
    given(where, plan);
    check_executor(where, executor);
    used().soft_combine(*plan, checked(where, "slots", slots, MOEROUTE_FLOAT16),
                        checked(where, "y", y, MOEROUTE_FLOAT16), executor);
  });
}

// ---- balance ------------------------------------------------------------------------------------

int moeroute_balance_loss(const moeroute_losses* losses, moeroute_const_matrix logits,
                          moeroute_assignment* assignment, moeroute_matrix dlogits,
                          const moeroute_executor* executor, double* values) {
  constexpr const char* where = "balance_loss";
  return guarded(where, [&] {
    pointed(where, "the losses", losses);
    pointed(where, "values", values);
    given(where, assignment);
    check_executor(where, executor);
    moeroute_matrix dz{};
    if (dlogits.data != nullptr) dz = checked(where, "dlogits", dlogits, MOEROUTE_FLOAT);
    used().balance_loss(*losses, checked(where, "logits", logits, MOEROUTE_FLOAT), *assignment, dz,
                        executor, values);
  });
}

int moeroute_bias_new(int64_t experts, const moeroute_bias_options* options, moeroute_bias** bias) {
  return made("bias_new", bias, [&] { return moeroute_plain.bias_new(experts, options); });
}

int moeroute_bias_free(moeroute_bias* bias) {
  return freed("bias_free", bias, moeroute_plain.bias_free);
}

int moeroute_bias_update(moeroute_bias* bias, const double* counts, int64_t counts_size) {
  constexpr const char* where = "bias_update";
  return guarded(where, [&] {
    given(where, bias);
    check_list(where, "counts", counts, counts_size);
    moeroute_plain.bias_update(*bias, counts, counts_size);
  });
}

int moeroute_bias_get(moeroute_bias* bias, float** values, int64_t* experts) {
  constexpr const char* where = "bias_get";
  return guarded(where, [&] {
    float* list;
    std::int64_t size;
    moeroute_plain.bias_get(given(where, bias), list, size);
    pointed(where, "values", values) = list;
    if (experts != nullptr) *experts = size;
  });
}

}  // extern "C"

// ---- for <moeroute/compiled.hpp> ----------------------------------------------------------------

namespace moeroute::compiled {

MOEROUTE_API void refuse(const char* sentence) { throw std::invalid_argument(sentence); }

MOEROUTE_API void fail(int status) {
  if (status == MOEROUTE_NO_MEMORY) throw std::bad_alloc();
  if (status == MOEROUTE_FAILED) throw std::runtime_error(last_error);
  throw std::invalid_argument(last_error);
}

}  // namespace moeroute::compiled

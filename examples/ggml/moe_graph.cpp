// Two MoE layers as a ggml graph, three times: routed by the nodes that an engine strings together,
// by one node, and by one node that plans too. The same experts are chosen; the table says with how
// many nodes and in what time.
#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "router_op.hpp"

namespace {

struct give_back {
  void operator()(ggml_context* context) const { ggml_free(context); }
  void operator()(ggml_gallocr* memory) const { ggml_gallocr_free(memory); }
  void operator()(ggml_backend* backend) const { ggml_backend_free(backend); }
  void operator()(ggml_backend_buffer* buffer) const { ggml_backend_buffer_free(buffer); }
};
template <class T>
using owned = std::unique_ptr<T, give_back>;

constexpr int layers = 2;
constexpr std::int64_t width = 128, hidden = 32, most_tokens = 512;

// ---- the model ----------------------------------------------------------------------------------

struct layer_weights {
  ggml_tensor *gate, *bias, *up, *sideways, *down;
};

struct model {
  std::string name;
  moeroute_spec spec;
  owned<ggml_context> context;
  owned<ggml_backend_buffer> memory;
  std::vector<layer_weights> layer;
  std::vector<std::unique_ptr<router_op>> routers;
};

void fill_random(ggml_tensor* tensor, float size, std::mt19937& random) {
  std::vector<float> values(static_cast<std::size_t>(ggml_nelements(tensor)));
  std::normal_distribution<float> normal(0.0f, size);
  for (float& value : values) value = normal(random);
  ggml_backend_tensor_set(tensor, values.data(), 0, values.size() * sizeof(float));
}

model random_model(const std::string& name, ggml_backend* backend, int threads) {
  model m = {.name = name, .spec = {}, .context = {}, .memory = {}, .layer = {}, .routers = {}};
  if (moeroute_spec_of_model(name.c_str(), &m.spec) != MOEROUTE_OK)
    throw std::runtime_error(moeroute_last_error());
  const std::int64_t experts = m.spec.experts;
  m.context.reset(ggml_init(
      {.mem_size = 16 * layers * ggml_tensor_overhead(), .mem_buffer = nullptr, .no_alloc = true}));
  for (int i = 0; i < layers; ++i) {
    ggml_context* c = m.context.get();
    m.layer.push_back({.gate = ggml_new_tensor_2d(c, GGML_TYPE_F32, width, experts),
                       .bias = ggml_new_tensor_1d(c, GGML_TYPE_F32, experts),
                       .up = ggml_new_tensor_3d(c, GGML_TYPE_F32, width, hidden, experts),
                       .sideways = ggml_new_tensor_3d(c, GGML_TYPE_F32, width, hidden, experts),
                       .down = ggml_new_tensor_3d(c, GGML_TYPE_F32, hidden, width, experts)});
  }
  m.memory.reset(ggml_backend_alloc_ctx_tensors(m.context.get(), backend));
  std::mt19937 random(11);
  const float by_width = 1.0f / std::sqrt(static_cast<float>(width));
  for (const layer_weights& layer : m.layer) {
    fill_random(layer.gate, by_width, random);
    fill_random(layer.bias, 0.05f, random);
    fill_random(layer.up, by_width, random);
    fill_random(layer.sideways, by_width, random);
    fill_random(layer.down, 1.0f / std::sqrt(static_cast<float>(hidden)), random);
    moeroute_tensors tensors = {};
    if (m.spec.selection_bias) {
      tensors.bias = static_cast<const float*>(layer.bias->data);
      tensors.bias_size = experts;
    }
    m.routers.push_back(std::make_unique<router_op>(m.spec, tensors, most_tokens, threads));
  }
  return m;
}

// ---- routing by nodes ---------------------------------------------------------------------------

struct by_blocks {
  routed choices;
  ggml_tensor* keys;  // [E, T] what the choice went by
};

// Where an expert's group is not among the best by the sum of its two best keys, -inf.
ggml_tensor* limit_groups(ggml_context* c, ggml_tensor* keys, const moeroute_spec& spec) {
  const std::int64_t experts = keys->ne[0], tokens = keys->ne[1], per_group = experts / spec.groups;
  ggml_tensor* groups = ggml_reshape_3d(c, keys, per_group, spec.groups, tokens);
  ggml_tensor* best = ggml_argsort_top_k(c, groups, 2);
  ggml_tensor* worth =
      ggml_get_rows(c, ggml_reshape_4d(c, groups, 1, per_group, spec.groups, tokens), best);
  worth = ggml_sum_rows(c, ggml_reshape_3d(c, worth, 2, spec.groups, tokens));
  worth = ggml_reshape_2d(c, worth, spec.groups, tokens);
  ggml_tensor* chosen = ggml_argsort_top_k(c, worth, static_cast<int>(spec.topk_group));
  ggml_tensor* none = ggml_fill(c, groups, -std::numeric_limits<float>::infinity());
  return ggml_reshape_2d(c, ggml_set_rows(c, none, ggml_get_rows(c, groups, chosen), chosen),
                         experts, tokens);
}

by_blocks route_by_blocks(ggml_context* c, ggml_tensor* logits, const moeroute_spec& spec,
                          ggml_tensor* bias) {
  const std::int64_t experts = logits->ne[0], tokens = logits->ne[1];
  ggml_tensor* scores =
      spec.score == MOEROUTE_SIGMOID ? ggml_sigmoid(c, logits) : ggml_soft_max(c, logits);
  ggml_tensor* keys = spec.selection_bias ? ggml_add(c, scores, bias) : scores;
  ggml_tensor* allowed = spec.groups > 1 ? limit_groups(c, keys, spec) : keys;
  ggml_tensor* ids = ggml_argsort_top_k(c, allowed, static_cast<int>(spec.k));
  ggml_tensor* weights = ggml_get_rows(c, ggml_reshape_3d(c, scores, 1, experts, tokens), ids);
  weights = ggml_reshape_2d(c, weights, spec.k, tokens);
  if (spec.normalize == MOEROUTE_NORMALIZE_SUM) {
    ggml_tensor* sum = ggml_sum_rows(c, weights);
    if (spec.eps_mode != MOEROUTE_EPS_NONE) {
      sum = ggml_clamp(c, sum, spec.eps, std::numeric_limits<float>::infinity());
    }
    weights = ggml_div(c, weights, sum);
  }
  if (spec.scale != 1.0f) weights = ggml_scale(c, weights, spec.scale);
  return {.choices = {.ids = ids, .weights = weights}, .keys = keys};
}

// ---- the graph ----------------------------------------------------------------------------------

enum class way { blocks, op, planned };

struct graph {
  owned<ggml_context> context;
  owned<ggml_gallocr> memory;
  ggml_cgraph* nodes = nullptr;
  std::vector<ggml_tensor*> inputs;
  std::vector<routed> choices;
  std::vector<ggml_tensor*> keys;
  ggml_tensor* y = nullptr;
};

// Sums of weights times rows [d, k, T], as engines take them: a view for every choice.
ggml_tensor* weighted_sum(ggml_context* c, ggml_tensor* rows, ggml_tensor* weights) {
  rows = ggml_mul(c, rows,
                  ggml_view_3d(c, weights, 1, weights->ne[0], weights->ne[1], weights->nb[0],
                               weights->nb[1], 0));
  ggml_tensor* sum = nullptr;
  for (std::int64_t i = 0; i < rows->ne[1]; ++i) {
    const std::size_t at = static_cast<std::size_t>(i) * rows->nb[1];
    ggml_tensor* one = ggml_view_2d(c, rows, rows->ne[0], rows->ne[2], rows->nb[2], at);
    sum = sum == nullptr ? one : ggml_add(c, sum, one);
  }
  return sum;
}

ggml_tensor* run_experts(ggml_context* c, const layer_weights& w, ggml_tensor* rows,
                         ggml_tensor* ids) {
  ggml_tensor* up = ggml_mul_mat_id(c, w.up, rows, ids);
  ggml_tensor* gated = ggml_swiglu_split(c, ggml_mul_mat_id(c, w.sideways, rows, ids), up);
  return ggml_mul_mat_id(c, w.down, gated, ids);
}

// What others read after the run is not to be written over: a view's memory is that of its source.
void keep(ggml_tensor* tensor) {
  ggml_set_output(tensor);
  if (tensor->view_src != nullptr) ggml_set_output(tensor->view_src);
}

ggml_tensor* append_layer(graph& g, const model& m, std::size_t i, way how, ggml_tensor* x) {
  ggml_context* c = g.context.get();
  const layer_weights& w = m.layer[i];
  const std::int64_t tokens = x->ne[1], k = m.spec.k;
  ggml_tensor* in = ggml_rms_norm(c, x, 1e-6f);
  ggml_tensor* logits = ggml_mul_mat(c, w.gate, in);
  ggml_tensor* sum = nullptr;
  if (how == way::planned) {
    const planned slots = m.routers[i]->route_and_plan(c, logits);
    ggml_tensor* rows =
        ggml_reshape_3d(c, ggml_get_rows(c, in, slots.token_of_slot), width, 1, k * tokens);
    ggml_tensor* out =
        ggml_reshape_2d(c, run_experts(c, w, rows, slots.expert_of_slot), width, k * tokens);
    out = ggml_reshape_3d(c, ggml_get_rows(c, out, slots.slot_of_choice), width, k, tokens);
    sum = weighted_sum(c, out, slots.choices.weights);
    g.choices.push_back(slots.choices);
  } else {
    if (how == way::blocks) {
      const by_blocks blocks = route_by_blocks(c, logits, m.spec, w.bias);
      g.choices.push_back(blocks.choices);
      g.keys.push_back(blocks.keys);
    } else {
      g.choices.push_back(m.routers[i]->route(c, logits));
    }
    const routed& choices = g.choices.back();
    sum = weighted_sum(c, run_experts(c, w, ggml_reshape_3d(c, in, width, 1, tokens), choices.ids),
                       choices.weights);
  }
  return ggml_add(c, x, sum);
}

graph empty_graph() {
  constexpr std::size_t most_nodes = 1024;
  graph g;
  g.context.reset(ggml_init({.mem_size = most_nodes * ggml_tensor_overhead() +
                                         ggml_graph_overhead_custom(most_nodes, false),
                             .mem_buffer = nullptr,
                             .no_alloc = true}));
  g.nodes = ggml_new_graph_custom(g.context.get(), most_nodes, false);
  return g;
}

void give_memory(graph& g, ggml_backend* backend) {
  for (const routed& choices : g.choices) {
    keep(choices.ids);
    keep(choices.weights);
    ggml_build_forward_expand(g.nodes, choices.ids);
    ggml_build_forward_expand(g.nodes, choices.weights);
  }
  g.memory.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend)));
  if (!ggml_gallocr_alloc_graph(g.memory.get(), g.nodes))
    throw std::runtime_error("no memory for the graph");
  std::mt19937 random(5);
  for (ggml_tensor* input : g.inputs) fill_random(input, 1.0f, random);
}

// x [d, T] through both layers.
graph layers_graph(const model& m, std::int64_t tokens, way how, ggml_backend* backend) {
  graph g = empty_graph();
  g.inputs.push_back(ggml_new_tensor_2d(g.context.get(), GGML_TYPE_F32, width, tokens));
  ggml_set_input(g.inputs[0]);
  ggml_tensor* y = g.inputs[0];
  for (std::size_t i = 0; i < m.layer.size(); ++i) y = append_layer(g, m, i, how, y);
  g.y = y;
  keep(g.y);
  for (ggml_tensor* keys : g.keys) keep(keys);
  ggml_build_forward_expand(g.nodes, g.y);
  give_memory(g, backend);
  return g;
}

// Both layers' routers alone, on logits of their own.
graph routers_graph(const model& m, std::int64_t tokens, way how, ggml_backend* backend) {
  graph g = empty_graph();
  ggml_context* c = g.context.get();
  for (std::size_t i = 0; i < m.layer.size(); ++i) {
    ggml_tensor* logits = ggml_new_tensor_2d(c, GGML_TYPE_F32, m.spec.experts, tokens);
    ggml_set_input(logits);
    g.inputs.push_back(logits);
    g.choices.push_back(how == way::blocks
                            ? route_by_blocks(c, logits, m.spec, m.layer[i].bias).choices
                        : how == way::op ? m.routers[i]->route(c, logits)
                                         : m.routers[i]->route_and_plan(c, logits).choices);
  }
  give_memory(g, backend);
  return g;
}

void run(const graph& g, ggml_backend* backend) {
  if (ggml_backend_graph_compute(backend, g.nodes) != GGML_STATUS_SUCCESS)
    throw std::runtime_error("graph failed");
}

// Nodes that compute; views and reshapes only name memory.
int computing(const graph& g) {
  int count = 0;
  for (int i = 0; i < ggml_graph_n_nodes(g.nodes); ++i) {
    const ggml_op op = ggml_graph_node(g.nodes, i)->op;
    count += op != GGML_OP_VIEW && op != GGML_OP_RESHAPE && op != GGML_OP_PERMUTE &&
             op != GGML_OP_TRANSPOSE;
  }
  return count;
}

// ---- the same choices ---------------------------------------------------------------------------

template <class T>
std::vector<T> contents(const ggml_tensor* tensor) {
  const std::size_t row = static_cast<std::size_t>(tensor->ne[0]);
  std::vector<T> values(row * static_cast<std::size_t>(ggml_nrows(tensor)));
  for (std::int64_t r = 0; r < ggml_nrows(tensor); ++r) {
    std::memcpy(
        values.data() + static_cast<std::size_t>(r) * row,
        static_cast<const char*>(tensor->data) + static_cast<std::size_t>(r) * tensor->nb[1],
        row * sizeof(T));
  }
  return values;
}

struct difference {
  std::int64_t choices = 0;  // compared
  std::int64_t swapped = 0;  // whose keys are equal but for the rounding of two exponentials
  std::int64_t wrong = 0;    // others, and values that are no numbers
  double weights = 0;        // the largest, relative
  double y = 0;              // the largest, of tokens with the same ids, relative to the largest y
};

difference compare(const graph& blocks, const graph& other) {
  difference d;
  std::vector<bool> same(static_cast<std::size_t>(blocks.y->ne[1]), true);
  for (std::size_t i = 0; i < blocks.choices.size(); ++i) {
    const auto expected = contents<std::int32_t>(blocks.choices[i].ids),
               ids = contents<std::int32_t>(other.choices[i].ids);
    const auto weights = contents<float>(blocks.choices[i].weights),
               got = contents<float>(other.choices[i].weights);
    const auto keys = contents<float>(blocks.keys[i]);
    const std::size_t k = static_cast<std::size_t>(blocks.choices[i].ids->ne[0]);
    const std::size_t experts = static_cast<std::size_t>(blocks.keys[i]->ne[0]);
    for (std::size_t c = 0; c < ids.size(); ++c, ++d.choices) {
      if (ids[c] == expected[c]) {
        const double off = std::abs(static_cast<double>(got[c]) / weights[c] - 1.0);
        if (std::isnan(off)) ++d.wrong;
        d.weights = std::max(d.weights, off);
        continue;
      }
      same[c / k] = false;
      const float* row = keys.data() + c / k * experts;
      const float mine = row[ids[c]], theirs = row[expected[c]];
      (std::abs(mine - theirs) <= 1e-5f * std::abs(theirs) ? d.swapped : d.wrong) += 1;
    }
  }
  const auto y = contents<float>(blocks.y), got = contents<float>(other.y);
  double largest = 0;
  for (const float value : y) largest = std::max(largest, std::abs(static_cast<double>(value)));
  for (std::size_t j = 0; j < y.size(); ++j) {
    if (!same[j / width]) continue;
    const double off = std::abs(static_cast<double>(got[j]) - y[j]) / largest;
    if (std::isnan(off)) ++d.wrong;
    d.y = std::max(d.y, off);
  }
  return d;
}

// Whether no node is made of a rule that is not one token's own.
bool refuses_batch_rules() {
  moeroute_spec spec;
  if (moeroute_spec_init(&spec) != MOEROUTE_OK) throw std::runtime_error(moeroute_last_error());
  spec.k = 1;
  for (const int selection :
       {MOEROUTE_RANDOM, MOEROUTE_SINKHORN, MOEROUTE_SELECTIVE_SINKHORN, MOEROUTE_BASE}) {
    spec.selection = selection;
    try {
      const router_op made(spec, {}, most_tokens, 2);
      std::printf("selection %d was not refused\n", selection);
      return false;
    } catch (const std::invalid_argument&) {
    }
  }
  return true;
}

// ---- the table ----------------------------------------------------------------------------------

// Nanoseconds of a run: the median of nine, each long enough to be timed, taken in turns.
std::vector<double> time_runs(std::span<const graph> graphs, ggml_backend* backend) {
  using clock = std::chrono::steady_clock;
  std::vector<int> repeats;
  std::vector<std::vector<double>> times(graphs.size());
  for (const graph& g : graphs) {
    run(g, backend);
    const auto begin = clock::now();
    run(g, backend);
    const double once = std::chrono::duration<double, std::nano>(clock::now() - begin).count();
    repeats.push_back(std::clamp(static_cast<int>(5e6 / once), 1, 10000));
  }
  for (int round = 0; round < 9; ++round) {
    for (std::size_t i = 0; i < graphs.size(); ++i) {
      const auto begin = clock::now();
      for (int r = 0; r < repeats[i]; ++r) run(graphs[i], backend);
      times[i].push_back(std::chrono::duration<double, std::nano>(clock::now() - begin).count() /
                         repeats[i]);
    }
  }
  std::vector<double> medians;
  for (auto& t : times) {
    std::ranges::nth_element(t, t.begin() + 4);
    medians.push_back(t[4]);
  }
  return medians;
}

bool show(const std::string& name, ggml_backend* backend, int threads, bool timed) {
  const model m = random_model(name, backend, threads);
  std::printf("\n%s: %lld experts, %lld a token, %d layers, d = %lld; per token and layer\n",
              m.name.c_str(), static_cast<long long>(m.spec.experts),
              static_cast<long long>(m.spec.k), layers, static_cast<long long>(width));
  std::printf("  %4s  %-16s %13s %12s %12s   %s\n", "T", "router by", "its nodes", "router, ns",
              "layer, ns", "against the blocks");
  bool right = true;
  for (const std::int64_t tokens : {std::int64_t{1}, most_tokens}) {
    std::vector<graph> alone, whole;
    for (const way how : {way::blocks, way::op, way::planned}) {
      alone.push_back(routers_graph(m, tokens, how, backend));
      whole.push_back(layers_graph(m, tokens, how, backend));
      run(whole.back(), backend);
    }
    std::vector<std::string> verdicts = {""};
    for (std::size_t i = 1; i < whole.size(); ++i) {
      const difference d = compare(whole[0], whole[i]);
      right = right && d.wrong == 0 && d.weights < 1e-5 && d.y < 1e-5;
      char text[160];
      std::snprintf(text, sizeof text,
                    "%lld of %lld ids the same, %lld equal but for rounding; weights %.0e, y %.0e",
                    static_cast<long long>(d.choices - d.swapped - d.wrong),
                    static_cast<long long>(d.choices), static_cast<long long>(d.swapped), d.weights,
                    d.y);
      verdicts.emplace_back(text);
    }
    const std::vector<double> none(whole.size(), 0.0);
    const std::vector<double> router = timed ? time_runs(alone, backend) : none;
    const std::vector<double> layer = timed ? time_runs(whole, backend) : none;
    constexpr const char* names[] = {"blocks", "one node", "one that plans"};
    for (std::size_t i = 0; i < whole.size(); ++i) {
      const auto each = [&](double run) {
        return timed ? std::to_string(std::llround(run / static_cast<double>(tokens * layers)))
                     : std::string("-");
      };
      std::printf("  %4lld  %-16s %4d of %3d   %12s %12s   %s\n", static_cast<long long>(tokens),
                  names[i], computing(alone[i]) / layers,
                  ggml_graph_n_nodes(alone[i].nodes) / layers, each(router[i]).c_str(),
                  each(layer[i]).c_str(), verdicts[i].c_str());
    }
  }
  return right;
}

}  // namespace

int main(int argc, char** argv) try {
  const int threads = argc > 1 ? std::stoi(argv[1]) : 1;
  const bool timed = argc <= 2 || std::string(argv[2]) != "untimed";
  if (threads < 1 || argc > 3) throw std::invalid_argument("usage: moe_graph [THREADS [untimed]]");
  const owned<ggml_backend> backend(ggml_backend_cpu_init());
  ggml_backend_cpu_set_n_threads(backend.get(), threads);
  std::printf("ggml %s, moeroute %s (%s), %d thread%s\n", ggml_version(), moeroute_version(),
              moeroute_isa(), threads, threads == 1 ? "" : "s");
  bool right = refuses_batch_rules();
  for (const char* name : {"qwen3_moe", "deepseek_v3"})
    right = show(name, backend.get(), threads, timed) && right;
  if (!right) std::printf("\nNOT THE SAME\n");
  return right ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "moe_graph: %s\n", error.what());
  return 1;
}

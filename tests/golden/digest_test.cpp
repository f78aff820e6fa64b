// The same trace gives the same ids and weights on every instruction set, compiler and number of
// threads: digests of what was decided, made once and checked wherever the tests run.
#include <algorithm>
#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <moeroute/exec/callable.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/make_router.hpp>
#include <moeroute/stage/route.hpp>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "support/random.hpp"
#include "support/sized.hpp"
#include "support/traces.hpp"

namespace {

using moeroute::index_t;

// FNV-1a over 32-bit words.
class digest {
 public:
  void add(std::uint32_t word) {
    for (int byte = 0; byte < 4; ++byte) hash_ = (hash_ ^ (word >> 8 * byte & 255)) * 0x100000001b3;
  }
  std::uint64_t value() const { return hash_; }

 private:
  std::uint64_t hash_ = 0xcbf29ce484222325;
};

struct digests {
  std::uint64_t ids, weights;
  bool operator==(const digests&) const = default;
};

// The catalogue's router for the experts of the trace.
moeroute::router_spec fitted(std::string_view name, index_t experts) {
  moeroute::router_spec s = moeroute::find_in_catalog(name)->spec;
  s.experts = experts;
  s.k = std::min<index_t>(s.k, 8);
  if (s.groups > 1) {
    s.groups = 4;
    s.topk_group = 2;
  }
  s.zero_experts = std::min<index_t>(s.zero_experts, 4);
  return s;
}

template <class Exec>
digests routed(std::string_view name, const std::vector<example::router_trace>& traces,
               const Exec& exec) {
  digest ids, weights;
  moeroute::workspace memory;
  moeroute::assignment choices;
  test::random rng(5);
  const moeroute::router_spec s = fitted(name, traces[0].experts);
  std::vector<float> bias, scale;
  for (index_t e = 0; e < s.experts; ++e) {
    const float x = rng.uniform();
    if (s.selection_bias) bias.push_back(0.125f * x);
    if (s.per_expert_scale) scale.push_back(0.5f + x);
  }
  const moeroute::any_router router =
      moeroute::make_router(s, {.bias = bias, .per_expert_scale = scale});
  for (const example::router_trace& trace : traces)
    for (index_t layer = 0; layer < trace.layers; ++layer) {
      moeroute::route(router, trace.layer(layer), {}, memory, choices, exec);
      for (const moeroute::expert_id e : choices.ids()) ids.add(static_cast<std::uint32_t>(e));
      for (const float w : choices.weights()) weights.add(std::bit_cast<std::uint32_t>(w));
    }
  return {ids.value(), weights.value()};
}

struct expected {
  const char* router;
  digests made;
};

constexpr expected expectations[] = {
    {"mixtral", {0x69df6a61b34d00ba, 0xe731756b84e49c65}},
    {"qwen2_moe", {0x1aa01dfd84c176a2, 0x461084079d6da2c5}},
    {"gpt_oss", {0x1aa01dfd84c176a2, 0x696ea6b40e0968ca}},
    {"deepseek_v2", {0xb8d036168835d8bd, 0x509fbba04c6189af}},
    {"deepseek_v3", {0x8c044c0fd629305, 0x2bf2101b8f7282ad}},
    {"glm4_moe", {0xad607bcd22237d77, 0xc0ce06cc968630f6}},
    {"llama4_scout", {0x5fc2dcd51039e372, 0x487c208aef1b8921}},
    {"deepseek_v4", {0xdc720545b1dd345c, 0x8be8eedff031c76b}},
    {"phimoe", {0x69df6a61b34d00ba, 0xd8c952e54bb27866}},
    {"dbrx", {0x1aa01dfd84c176a2, 0x696ea6b40e0968ca}},
    {"gemma4", {0xb2184f2571338b44, 0x48ed7f447aa88e7b}},
    {"longcat_flash", {0xf52a3a76dcc6b29f, 0xcb9b6444d13e46c2}},
};

}  // namespace

TEST_CASE("real logits are routed to the same bits everywhere") {
  const auto traces = example::read_traces(MOEROUTE_MODEL_DIR);
  for (const auto& [name, made] : expectations) {
    REQUIRE(moeroute::find_in_catalog(name) != nullptr);
    const digests now = routed(name, traces, moeroute::serial{});
    INFO(name << ": {0x" << std::hex << now.ids << ", 0x" << now.weights << "}");
    CHECK(now == made);
  }
}

TEST_CASE("one, two or three threads route real logits to the same bits") {
  const auto traces = example::read_traces(MOEROUTE_MODEL_DIR);
  for (const auto& [name, made] : expectations)
    for (const int threads : {3, 2, 1}) {
      if (threads < test::sized(1, 3)) break;
      // Every piece on a thread of its own: the last of them may come first.
      const auto on_threads = [threads](index_t n, index_t grain, auto&& piece) {
        std::vector<std::thread> running;
        for (index_t begin = 0; begin < n; begin += grain) {
          running.emplace_back(
              [&piece, begin, end = std::min(n, begin + grain)] { piece(begin, end); });
          if (static_cast<int>(running.size()) == threads) {
            for (std::thread& t : running) t.join();
            running.clear();
          }
        }
        for (std::thread& t : running) t.join();
      };
      INFO(name << ", " << threads << " threads");
      CHECK(routed(name, traces, moeroute::callable_executor(on_threads, threads)) == made);
    }
}

TEST_CASE("norms of rows have the same bits everywhere") {
  const auto traces = example::read_traces(MOEROUTE_MODEL_DIR);
  const example::router_trace& trace = traces[0];
  std::vector<float> gamma;
  test::random rng(6);
  for (index_t e = 0; e < trace.experts; ++e) gamma.push_back(0.5f + rng.uniform());
  moeroute::workspace memory;
  moeroute::assignment choices;
  const auto of_rows = [&](const moeroute::threshold_router<moeroute::relu>& router) {
    digest made;
    for (index_t layer = 0; layer < trace.layers; ++layer) {
      moeroute::route(router, trace.layer(layer), {}, memory, choices);
      for (const moeroute::expert_id e : choices.ids()) made.add(static_cast<std::uint32_t>(e));
      for (const float w : choices.weights()) made.add(std::bit_cast<std::uint32_t>(w));
    }
    return made.value();
  };
  const std::uint64_t rms = of_rows({.norm = moeroute::threshold_norm::rms, .gamma = gamma});
  const std::uint64_t sum = of_rows({.norm = moeroute::threshold_norm::sum, .eps = 1e-5f});
  INFO(std::hex << "0x" << rms << ", 0x" << sum);
  CHECK(rms == 0x4f8c3855c2ecef35);
  CHECK(sum == 0x91c93bbbf64792ad);
}

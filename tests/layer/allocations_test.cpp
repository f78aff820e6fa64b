// Nothing warm allocates: every stage and the whole layer, in every storage type and under every
// executor.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <condition_variable>
#include <fstream>
#include <moeroute/exec/callable.hpp>
#include <moeroute/layer/moe_layer.hpp>
#include <moeroute/layer/swiglu_experts.hpp>
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/policy/router.hpp>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "support/allocations.hpp"
#include "support/planned.hpp"
#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>
#endif

namespace allocations_test {

using namespace moeroute;

namespace {

// A second thread that waits for work: what it costs to hand over a loop is no allocation. A mutex
// and a condition, not std::atomic's wait: where a system has no futex libstdc++ 12 loses wake-ups
// of that.
class two_threads {
 public:
  two_threads() : second_([this] { serve(); }) {}
  two_threads(const two_threads&) = delete;
  two_threads& operator=(const two_threads&) = delete;
  ~two_threads() {
    hand_over(nullptr);
    second_.join();
  }

  void operator()(index_t n, index_t grain, loop_body body) {
    const job work{n, grain, body};
    hand_over(&work);
    half(work, 0);
    std::unique_lock lock(guard_);
    changed_.wait(lock, [&] { return done_ == turn_; });
  }

 private:
  struct job {
    index_t n, grain;
    loop_body body;
  };
  static void half(const job& work, index_t first) {
    for (index_t b = first * work.grain; b < work.n; b += 2 * work.grain)
      work.body(b, std::min(work.n, b + work.grain));
  }
  void hand_over(const job* work) {
    const std::lock_guard lock(guard_);
    job_ = work;
    ++turn_;
    changed_.notify_all();
  }
  void serve() {
    for (;;) {
      std::unique_lock lock(guard_);
      changed_.wait(lock, [&] { return done_ != turn_; });
      const job* const work = job_;
      if (work == nullptr) return;
      lock.unlock();
      half(*work, 1);
      lock.lock();
      done_ = turn_;
      changed_.notify_all();
    }
  }

  std::mutex guard_;
  std::condition_variable changed_;
  int turn_ = 0;
  int done_ = 0;
  const job* job_ = nullptr;
  std::thread second_;
};

template <class F>
void for_each_executor(F&& f) {
  f("serial", serial{});
  two_threads pool;
  f("callable",
    callable_executor([&](index_t n, index_t grain, loop_body body) { pool(n, grain, body); }, 2));
#if defined(_OPENMP)
  f("openmp", openmp{2});
#endif
}

struct shape {
  index_t d, ff, experts, k;
};

using layer = moe_layer<router<softmax>, swiglu_experts<>, swiglu_experts<>>;

layer make_layer(const shape& s) {
  const auto networks = [&](index_t n) {
    swiglu_experts<> list(n, s.d, s.ff);
    for (expert_id e = 0; e < n; ++e) {
      list.set_gate(e, const_view(test::random_rows(s.ff, s.d, 1)));
      list.set_up(e, const_view(test::random_rows(s.ff, s.d, 2)));
      list.set_down(e, const_view(test::random_rows(s.d, s.ff, 3)));
    }
    return list;
  };
  const row_matrix<float> gate = test::random_rows(s.experts, s.d, 4);
  const std::vector<float> shared(static_cast<std::size_t>(s.d), 0.1f);
  return {simd::packed_matrix<>(const_view(gate)),
          router<softmax>{.selection = {.k = s.k}, .weight = sum_normalized}, networks(s.experts),
          moe_layer_options{.shared = {.gate = shared}}, networks(1)};
}

// Every stage and the layer, largest batch first: then all that is needed is there.
template <class T, class Exec>
void check_no_allocations(const shape& s, const std::vector<index_t>& batches, const Exec& exec) {
  layer under_test = make_layer(s);
  workspace ws;
  assignment choices;
  dispatch_plan p;
  const index_t most = batches.front();
  const row_matrix<T> logits = test::random_rows(most, s.experts, 5).cast<T>();
  const row_matrix<T> x = test::random_rows(most, s.d, 6).cast<T>();
  row_matrix<T> y(most, s.d), slots(most * s.k, s.d);
  const router<softmax> by_softmax{.selection = {.k = s.k}, .weight = sum_normalized};
  const auto every_stage = [&](index_t tokens) {
    const matrix_view<const T> in(x.data(), tokens, s.d);
    const matrix_view<T> out(y.data(), tokens, s.d), rows(slots.data(), tokens * s.k, s.d);
    route(by_softmax, matrix_view<const T>(logits.data(), tokens, s.experts), ws, choices, exec);
    plan(choices, p);
    dispatch(in, p, rows, exec);
    combine(rows, p, choices, out, exec);
    under_test.forward(in, out, exec);
  };
  every_stage(most);
  for (const index_t tokens : batches) {
    INFO("T = " << tokens);
    CHECK(test::allocations_during([&] { every_stage(tokens); }) == 0);
  }
}

void check_every_type(const shape& s, const std::vector<index_t>& batches) {
  for_each_executor([&](const char* name, const auto& exec) {
    INFO(name);
    check_no_allocations<float>(s, batches, exec);
    check_no_allocations<bfloat16>(s, batches, exec);
    check_no_allocations<float16>(s, batches, exec);
  });
}

}  // namespace

TEST_CASE("warm stages and layers never allocate, in any storage type, under any executor") {
  check_every_type({40, 24, 12, 3}, {512, 64, 3, 1, 0});
}

TEST_CASE("a warm layer of the bundled model's sizes never allocates") {
  std::ifstream file(MOEROUTE_MODEL_DIR "/config.json");
  REQUIRE(file.good());
  const auto config = nlohmann::json::parse(file);
  check_every_type({config.at("hidden_size"), config.at("moe_intermediate_size"),
                    config.at("num_local_experts"), config.at("num_experts_per_tok")},
                   {512, 1});
}

TEST_CASE("a layer that sees more tokens than ever before allocates, and the counter sees it") {
  layer under_test = make_layer({40, 24, 12, 3});
  const row_matrix<float> x = test::random_rows(65, 40, 7);
  row_matrix<float> y(65, 40);
  const auto run = [&](index_t tokens) {
    under_test.forward(matrix_view<const float>(x.data(), tokens, 40),
                       matrix_view<float>(y.data(), tokens, 40));
  };
  run(64);
  CHECK(test::allocations_during([&] { run(64); }) == 0);
  CHECK(test::allocations_during([&] { run(65); }) > 0);
}

}  // namespace allocations_test

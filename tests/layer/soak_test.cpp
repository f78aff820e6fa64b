// Endurance: what only many calls of changing shapes would show. Hidden; test_layer "[soak]" runs
// it.
#include <algorithm>
#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <moeroute/stage/capacity.hpp>
#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/plan.hpp>
#include <string>
#include <vector>

#include "properties/spec.hpp"
#include "support/allocations.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/resident.hpp"
#include "support/threads.hpp"

namespace soak_test {

using namespace moeroute;

namespace {

constexpr index_t most_tokens = 4096, most_choices = 1 << 19, most_logits = 1 << 21;
constexpr index_t most_dim = 48, vocabulary = 5;

/// A router with its tensors at guarded ends.
struct setting {
  router_spec spec;
  test::guarded<float> bias, scale;
  expert_table table;
  any_router router;

  static any_router make(const router_spec& s, test::guarded<float>& bias,
                         test::guarded<float>& scale, const expert_table& table) {
    const auto filled = [&](test::guarded<float>& in, bool wanted, float first) {
      const auto n = static_cast<std::size_t>(wanted ? s.experts : 0);
      float* const values = in.window(static_cast<index_t>(n), test::guarded_end::back);
      for (std::size_t e = 0; e < n; ++e) values[e] = first + static_cast<float>(e % 7) / 64.0f;
      return lasting_span<const float>(values, n);
    };
    return make_router(s, {.bias = filled(bias, s.selection_bias, -0.05f),
                           .per_expert_scale = filled(scale, s.per_expert_scale, 0.9f),
                           .table = &table});
  }

  explicit setting(const router_spec& s)
      : spec(s),
        bias(s.experts),
        scale(s.experts),
        table(s.selection == selection_kind::expert_table
                  ? random_table(vocabulary, s.k, s.experts, 7)
                  : expert_table()),
        router(make(s, bias, scale, table)) {}

  index_t most_per_token() const {
    return router.visit([&](const auto& r) { return detail::most_choices(r, spec.columns()); });
  }
  index_t fits(index_t tokens) const {
    return std::min({tokens, most_choices / most_per_token(), most_logits / spec.columns()});
  }
};

/// The specs of make_router that are accepted, of random ones.
std::vector<std::unique_ptr<setting>> random_settings(std::size_t n) {
  std::vector<std::unique_ptr<setting>> list;
  test::random rng(2027);
  while (list.size() < n) {
    std::vector<std::uint8_t> data(160);
    for (auto& byte : data) byte = static_cast<std::uint8_t>(rng.below(256));
    test::bytes in(data);
    const router_spec s = test::detail::any_spec(in);
    try {
      list.push_back(std::make_unique<setting>(s));
    } catch (const error&) {
    }
  }
  return list;
}

/// Everything of one call, made of its number alone.
class soak {
 public:
  soak() : settings_(random_settings(96)), logits_pool_(most_logits), x_pool_(1 << 20) {
    test::random rng(3);
    for (std::size_t i = 0; i < logits_pool_.size(); ++i) {
      float z = 3.0f * rng.normal();
      if (i >> 17 & 1) z = std::round(z);  // stretches with ties
      const auto odd = rng.below(400);
      if (odd == 0) z = std::numeric_limits<float>::quiet_NaN();
      if (odd == 1) z = -std::numeric_limits<float>::infinity();
      if (odd == 2) z = std::numeric_limits<float>::infinity();
      logits_pool_[i] = z;
    }
    for (float& x : x_pool_) x = rng.normal();
  }

  std::size_t size() const { return settings_.size(); }
  index_t allocations() const { return allocations_; }
  std::uint64_t digest() const { return digest_; }
  void restart_digest() { digest_ = 0; }

  /// Returns the tokens that were routed; `broken` says what does not hold.
  index_t call(std::uint64_t number, std::string& broken) {
    test::random rng(number);
    const auto which = static_cast<std::size_t>(rng.below(static_cast<index_t>(settings_.size())));
    constexpr index_t sizes[] = {0, 1, 3, 16, 64, 257, most_tokens, most_tokens};
    index_t tokens = sizes[rng.below(8)];
    if (rng.below(3) == 0) tokens = rng.below(600);
    return call(*settings_[which], tokens, rng, broken);
  }

  /// Every setting at its largest, under both executors: after it nothing may allocate.
  void warm_up(std::string& broken) {
    for (const auto& s : settings_)
      for (int i = 0; i < 8 && broken.empty(); ++i) {
        test::random rng(static_cast<std::uint64_t>(i) + 100);
        call(*s, most_tokens, rng, broken);
      }
    allocations_ = 0;
  }

 private:
  index_t call(const setting& s, index_t tokens, test::random& rng, std::string& broken) {
    tokens = s.fits(tokens);
    const index_t d = 1 + rng.below(most_dim);
    const auto end = rng.below(2) == 0 ? test::guarded_end::front : test::guarded_end::back;
    const bool threads = rng.below(2) == 0, drop = rng.below(3) == 0, masked = rng.below(4) == 0;
    const index_t columns = s.spec.columns();

    float* const logits = logits_.window(tokens * columns, end);
    std::copy_n(logits_pool_.data() + rng.below(most_logits - tokens * columns + 1),
                tokens * columns, logits);
    float* const x = x_.window(tokens * d, end);
    const index_t from = static_cast<index_t>(x_pool_.size()) - tokens * d + 1;
    std::copy_n(x_pool_.data() + rng.below(from), tokens * d, x);
    std::int32_t* const ids = token_ids_.window(tokens, end);
    std::uint8_t* const mask = mask_.window(tokens, end);
    for (index_t t = 0; t < tokens; ++t) {
      ids[t] = static_cast<std::int32_t>(rng.below(vocabulary));
      mask[t] = rng.below(10) > 0;
    }
    const auto n = static_cast<std::size_t>(tokens);
    const side_inputs side = side_inputs{.token_ids = {ids, n},
                                         .mask = {mask, masked ? n : 0},
                                         .seed = static_cast<std::uint64_t>(d)}
                                 .only(side_use_of(s.router, columns));
    float* const y = y_.window(tokens * d, end);
    const capacity_policy capacity{
        .rule = {.formula = capacity_formula::megatron, .factor = 1.0},
        .order = static_cast<drop_order>(rng.below(static_cast<index_t>(drop_order::random) + 1))};

    const auto forward = [&](const auto& exec) {
      allocations_ += test::allocations_during([&] {
        route(s.router, matrix_view<const float>(logits, tokens, columns), side, memory_, choices_,
              exec);
        if (drop) apply_capacity(choices_, capacity, memory_);
        plan(choices_, plan_);
      });
      // The slots' window fits them exactly.
      float* const rows = slots_.window(plan_.slots() * d, end);
      allocations_ += test::allocations_during([&] {
        dispatch(matrix_view<const float>(x, tokens, d), plan_,
                 matrix_view<float>(rows, plan_.slots(), d), exec);
        combine(matrix_view<const float>(rows, plan_.slots(), d), plan_, choices_,
                matrix_view<float>(y, tokens, d), exec);
      });
    };
    if (threads) {
      forward(test::several_threads{2});
    } else {
      forward(serial{});
    }
    broken = verdict(tokens, d, x, y);
    if (!broken.empty())
      broken = to_string(s.spec) + " T " + std::to_string(tokens) + ": " + broken;
    return tokens;
  }

  std::string verdict(index_t tokens, index_t d, const float* x, const float* y) {
    if (std::string shape = test::detail::shape_break(choices_); !shape.empty()) return shape;
    if (plan_.kept() + plan_.dropped() + plan_.elsewhere() + plan_.unrouted() != choices_.choices())
      return "counts of the plan";
    index_t load = 0;
    for (index_t e = 0; e < plan_.experts(); ++e) load += plan_.load(e);
    if (load != plan_.kept() || load != plan_.slots()) return "loads of the plan";
    for (const expert_id e : choices_.ids()) add(static_cast<std::uint32_t>(e));
    for (const float w : choices_.weights()) add(std::bit_cast<std::uint32_t>(w));
    // Experts give back what they get: a token's result is its row times its weights.
    for (index_t t = 0; t < tokens; ++t) {
      double sum = 0.0, size = 0.0;
      for (index_t c = choices_.first(t); c < choices_.first(t + 1); ++c) {
        const auto w = static_cast<double>(choices_.weights()[static_cast<std::size_t>(c)]);
        sum += w;
        size += std::abs(w);
      }
      for (index_t c = 0; c < d; ++c) {
        add(std::bit_cast<std::uint32_t>(y[t * d + c]));
        const auto value = static_cast<double>(x[t * d + c]);
        const double error = std::abs(static_cast<double>(y[t * d + c]) - sum * value);
        if (size < 1e30 && !(error <= 2e-5 * size * std::abs(value) + 1e-30))
          return "token " + std::to_string(t) + " is off by " + std::to_string(error);
      }
    }
    return "";
  }

  void add(std::uint32_t word) { digest_ = (digest_ ^ word) * 0x100000001b3 + 1; }

  std::vector<std::unique_ptr<setting>> settings_;
  std::vector<float> logits_pool_, x_pool_;
  test::guarded<float> logits_{most_logits}, x_{most_tokens * most_dim}, y_{most_tokens * most_dim},
      slots_{most_choices * most_dim};
  test::guarded<std::int32_t> token_ids_{most_tokens};
  test::guarded<std::uint8_t> mask_{most_tokens};
  workspace memory_;
  assignment choices_;
  dispatch_plan plan_;
  index_t allocations_ = 0;
  std::uint64_t digest_ = 0;
};

}  // namespace

TEST_CASE(
    "over 10^7 tokens of changing shapes, specs and executors memory is flat, nothing allocates, "
    "no byte outside is touched and results do not drift",
    "[.][soak]") {
  const char* const wanted = std::getenv("MOEROUTE_SOAK_TOKENS");
  const index_t goal = wanted != nullptr ? std::atoll(wanted) : 10'000'000;
  constexpr std::uint64_t remembered = 60;
  soak run;
  std::string broken;
  run.warm_up(broken);
  REQUIRE(broken == "");
  const auto first_calls = [&] {
    run.restart_digest();
    for (std::uint64_t i = 0; i < remembered && broken.empty(); ++i) run.call(i, broken);
    return run.digest();
  };
  const std::uint64_t at_first = first_calls();
  REQUIRE(broken == "");
  const index_t before = test::resident_kilobytes();
  const auto start = std::chrono::steady_clock::now();
  index_t tokens = 0;
  std::uint64_t calls = 0;
  for (; tokens < goal && broken.empty(); ++calls) tokens += run.call(1000 + calls, broken);
  CHECK(broken == "");
  CHECK(first_calls() == at_first);
  CHECK(run.allocations() == 0);
  const index_t grown = test::resident_kilobytes() - before;
  CHECK(grown < 1024);
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("soak: %lld tokens in %llu calls of %zu routers, %.0f s, memory grew by %lld KB\n",
              static_cast<long long>(tokens), static_cast<unsigned long long>(calls), run.size(),
              seconds, static_cast<long long>(grown));
}

}  // namespace soak_test

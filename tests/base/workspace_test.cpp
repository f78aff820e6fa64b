#include <moeroute/base/workspace.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <limits>
#include <new>
#include <span>
#include <string>
#include <utility>

#include "support/allocations.hpp"
#include "support/counting_new.hpp"
#include "support/refusal.hpp"
#include "support/sized.hpp"

using namespace moeroute;
using test::allocations_during;

namespace {

bool aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % alignment == 0; }

struct parts {
  float* a;
  std::int16_t* b;
  double* c;
};

parts layout(scratch& tape, index_t n) {
  return {tape.take<float>(n), tape.take<std::int16_t>(3), tape.take<double>(n + 1)};
}

}  // namespace

TEST_CASE("a warm buffer never allocates, and its memory stays where it is") {
  buffer<float> b(100);
  const float* const memory = b.data();
  CHECK(allocations_during([&] {
          for (const index_t n : {0, 1, 99, 100, 7}) b.resize(n);
        }) == 0);
  CHECK(b.data() == memory);
  CHECK(b.size() == 7);
  CHECK(b.capacity() == 100);
  CHECK(allocations_during([&] { b.resize(101); }) == 1);
}

TEST_CASE("an empty buffer owns nothing") {
  CHECK(allocations_during([] {
          buffer<int> b;
          CHECK((b.size() == 0 && b.capacity() == 0 && b.data() == nullptr));
          b.resize(0);
          const buffer<int> copy = b;
          CHECK(copy.size() == 0);
        }) == 0);
}

TEST_CASE("a buffer begins on a cache line") {
  for (const index_t n : {1, 3, 16, 1000}) CHECK(aligned(buffer<std::int16_t>(n).data()));
}

TEST_CASE("a copied buffer has the same values in memory of its own") {
  buffer<int> a(3);
  for (int i = 0; i < 3; ++i) a[i] = i + 1;
  buffer<int> b = a;
  b[0] = 9;
  CHECK(a[0] == 1);
  CHECK((b.size() == 3 && b[1] == 2 && b[2] == 3));
  buffer<int>& same = b;
  b = same;
  CHECK((b.size() == 3 && b[0] == 9));
  const buffer<int> lesser(1), greater(5);
  CHECK((b = lesser).size() == 1);
  CHECK((b = greater).size() == 5);
}

TEST_CASE("a moved buffer hands over its memory and is empty") {
  buffer<int> a(3);
  const int* const memory = a.data();
  buffer<int> b = std::move(a);
  CHECK(b.data() == memory);
  CHECK(a.size() == 0);
  CHECK(a.capacity() == 0);
  buffer<int> c;
  c = std::move(b);
  CHECK(c.data() == memory);
  CHECK((c.size() == 3 && b.size() == 0 && b.capacity() == 0));
  b.resize(2);  // a moved-from buffer can be used again
  CHECK(b.size() == 2);
}

TEST_CASE("a buffer is a span of its size") {
  buffer<int> b(5);
  b.resize(2);
  CHECK(std::span<int>(b).size() == 2);
  CHECK(std::span<const int>(std::as_const(b)).data() == b.data());
}

TEST_CASE("measuring and carving take the same bytes") {
  scratch measure;
  layout(measure, 7);
  buffer<std::byte> memory(measure.used());
  scratch tape(memory.data());
  layout(tape, 7);
  CHECK(tape.used() == measure.used());
  CHECK(tape.used() == 3 * 64);
}

TEST_CASE("a tape over no memory hands out nothing") {
  scratch measure;
  const parts p = layout(measure, 7);
  CHECK((p.a == nullptr && p.b == nullptr && p.c == nullptr));
}

TEST_CASE("what is carved is aligned and does not overlap") {
  workspace ws;
  for (const index_t n : {1, 15, 16, 17}) {
    const parts p = ws.carve([&](scratch& tape) { return layout(tape, n); });
    CHECK((aligned(p.a) && aligned(p.b) && aligned(p.c)));
    CHECK(static_cast<void*>(p.a + n) <= static_cast<void*>(p.b));
    CHECK(static_cast<void*>(p.b + 3) <= static_cast<void*>(p.c));
    for (index_t i = 0; i < n; ++i) p.a[i] = 1.0f;  // seen by the address sanitizer if outside
    for (index_t i = 0; i < n + 1; ++i) p.c[i] = 2.0;
    CHECK(p.a[n - 1] == 1.0f);
  }
}

TEST_CASE("a warm workspace never allocates") {
  workspace ws;
  const auto carve = [&](index_t n) { ws.carve([&](scratch& tape) { return layout(tape, n); }); };
  carve(100);
  const index_t held = ws.capacity();
  CHECK(allocations_during([&] {
          carve(100);
          carve(1);
          carve(0);
        }) == 0);
  CHECK(ws.capacity() == held);
  CHECK(allocations_during([&] { carve(1000); }) == 1);
}

TEST_CASE("a layout runs once where there is room for it, and what has none is only measured") {
  workspace ws;
  int runs = 0;
  const auto carve = [&](index_t n) {
    runs = 0;
    return ws.carve([&](scratch& tape) {
      ++runs;
      return layout(tape, n);
    });
  };
  carve(100);
  CHECK(runs == 2);
  const parts whole = carve(100);
  CHECK(runs == 1);
  CHECK(carve(3).a == whole.a);
  CHECK(runs == 1);
  CHECK((carve(200).c != nullptr && runs == 2));

  alignas(alignment) std::byte memory[128];
  scratch tape(memory, 128);
  CHECK(tape.take<std::byte>(64) == memory);
  CHECK(tape.take<std::byte>(65) == nullptr);
  CHECK(tape.take<std::byte>(1) == nullptr);
  CHECK(tape.used() == 256);
}

TEST_CASE("a buffer that gets no memory is empty, and what no machine has is refused") {
  buffer<float> b(10);
  const auto refused = [&](index_t n) { return test::refusal([&] { b.resize(n); }); };
  // The second one times the size of a float is no number of 64 bits.
  for (const index_t n : {index_t{1} << 58, (index_t{1} << 62) + 3}) {
    CHECK(refused(n) == "moeroute::buffer: room for " + std::to_string(n) +
                            " values of 4 bytes is asked for, more than any machine has");
    CHECK((b.size() == 0 && b.capacity() == 0 && b.data() == nullptr));
    b.resize(10);
    CHECK(b.size() == 10);
  }
  // The largest that an address reaches is no mistake: there is no memory for it.
  if (sizeof(void*) == 8 && test::sized(1, 0) == 1) {
    CHECK_THROWS_AS(buffer<std::byte>(max_bytes), std::bad_alloc);
    CHECK(test::refusal([] { const buffer<std::byte> more(max_bytes + 1); }) ==
          "moeroute::buffer: room for " + std::to_string(max_bytes + 1) +
              " values of 1 bytes is asked for, more than any machine has");
  }
  workspace ws;
  for (const index_t n : {index_t{1} << 60, (index_t{1} << 62) + 3})
    CHECK(test::refusal([&] {
            ws.carve([&](scratch& tape) {
              tape.take<double>(n);
              return tape.take<double>(n);
            });
          }) == "moeroute::buffer: room for " + std::to_string(max_bytes + 1) +
                    " values of 1 bytes is asked for, more than any machine has");
}

TEST_CASE("a product of sizes that does not fit is the largest size") {
  constexpr index_t most = std::numeric_limits<index_t>::max();
  static_assert(size_product(3, 4) == 12 && size_product(0, most) == 0);
  static_assert(size_product(most, 1) == most && size_product(most, 2) == most);
  static_assert(size_product(index_t{1} << 40, index_t{1} << 40) == most);
  CHECK(size_product(index_t{1} << 62, 4) == most);
  CHECK((size_product(3, 4) == 12 && size_product(0, most) == 0 && size_product(most, 0) == 0));
  CHECK((size_product(most, 1) == most && size_product(1, most) == most));
  CHECK((size_product(most / 2, 2) == most - 1 && size_product(most / 2 + 1, 2) == most));
}

#include <moeroute/exec/first_exception.hpp>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <stdexcept>
#include <string>
#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>
#endif

using moeroute::first_exception;

TEST_CASE("the first exception is thrown again, later pieces are left out, and only once") {
  first_exception failure;
  int ran = 0;
  failure.guard([&] { ++ran; });
  failure.rethrow();
  failure.guard([&] { throw std::runtime_error("first"); });
  failure.guard([&] { ++ran; });
  CHECK(ran == 1);
  CHECK_THROWS_WITH(failure.rethrow(), "first");
  failure.rethrow();
}

TEST_CASE("of two exceptions at once the one that was thrown first is kept") {
  first_exception failure;
  failure.guard([&] {
    failure.guard([] { throw std::runtime_error("inner"); });
    throw std::runtime_error("outer");
  });
  CHECK_THROWS_WITH(failure.rethrow(), "inner");
}

#if defined(_OPENMP)
TEST_CASE("what a piece throws on an OpenMP team reaches the caller") {
  for (const int threads : {1, 2, 4}) {
    const auto loop = [&] {
      moeroute::openmp{threads}.parallel_for(20, 1, [](moeroute::index_t b, moeroute::index_t) {
        if (b == 11) throw std::runtime_error("piece");
      });
    };
    CHECK_THROWS_WITH(loop(), "piece");
  }
}
#endif

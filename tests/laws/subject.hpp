// Any router behind one face, so that the laws are compiled once and not once per router.
#pragma once

#include <memory>
#include <moeroute/stage/route.hpp>
#include <utility>
#include <vector>
#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>
#endif

namespace test {

using moeroute::assignment;
using moeroute::bfloat16;
using moeroute::float16;
using moeroute::index_t;
using moeroute::matrix_view;

class subject {
 public:
  virtual ~subject() = default;
  /// Whether it takes 16-bit logits: a router picked at run time is compiled for one type only.
  virtual bool narrow() const { return true; }
  virtual void route(matrix_view<const float> logits, assignment& out) = 0;
  virtual void route(matrix_view<const bfloat16> logits, assignment& out) = 0;
  virtual void route(matrix_view<const float16> logits, assignment& out) = 0;
  /// With side inputs: what the laws give is a mask.
  virtual void route(matrix_view<const float> logits, const moeroute::side_inputs& side,
                     assignment& out) = 0;
  /// By a team of threads; serially where the compiler has no OpenMP.
  virtual void route(matrix_view<const float> logits, int threads, assignment& out) = 0;
};

template <moeroute::any_kind_of_router Router>
class subject_of final : public subject {
 public:
  explicit subject_of(Router router) : router_(std::move(router)) {}

  /// Rules that see the whole batch take float.
  bool narrow() const override { return !moeroute::batch_router<Router>; }
  void route(matrix_view<const float> z, assignment& out) override {
    moeroute::route(router_, z, memory_, out);
  }
  void route(matrix_view<const bfloat16> z, assignment& out) override { widened(z, out); }
  void route(matrix_view<const float16> z, assignment& out) override { widened(z, out); }
  void route(matrix_view<const float> z, const moeroute::side_inputs& side,
             assignment& out) override {
    moeroute::route(router_, z, side, memory_, out);
  }
  void route(matrix_view<const float> z, [[maybe_unused]] int threads, assignment& out) override {
#if defined(_OPENMP)
    moeroute::route(router_, z, memory_, out, moeroute::openmp{threads});
#else
    moeroute::route(router_, z, memory_, out);
#endif
  }

 private:
  template <class T>
  void widened([[maybe_unused]] matrix_view<const T> z, [[maybe_unused]] assignment& out) {
    if constexpr (!moeroute::batch_router<Router>) moeroute::route(router_, z, memory_, out);
  }

  Router router_;
  moeroute::workspace memory_;
};

template <moeroute::any_kind_of_router Router>
std::unique_ptr<subject> make_subject(Router router) {
  return std::make_unique<subject_of<Router>>(std::move(router));
}

}  // namespace test

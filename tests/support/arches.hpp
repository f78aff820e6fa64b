// The instruction sets that this build can compile, so that one program compares their bits.
#pragma once

#include <moeroute/simd/batch.hpp>
#include <tuple>
#include <type_traits>

namespace test {

namespace detail {

template <class... A>
struct list {
  using type = std::tuple<A...>;
};

// Appends A where it is not there yet.
template <class List, class A>
struct append;
template <class... B, class A>
struct append<list<B...>, A> {
  using type = std::conditional_t<(std::is_same_v<A, B> || ...), list<B...>, list<B..., A>>;
};

template <class List, class... A>
struct append_all {
  using type = List;
};
template <class List, class A, class... More>
struct append_all<List, A, More...> {
  using type = typename append_all<typename append<List, A>::type, More...>::type;
};

}  // namespace detail

/// The default one and one of each width: 4 floats with the fused multiply-add emulated, 8 with it
/// in hardware.
using widths = detail::append_all<detail::list<>, moeroute::simd::default_arch
#if XSIMD_WITH_SSE2
                                  ,
                                  xsimd::sse2
#endif
#if XSIMD_WITH_FMA3_AVX2
                                  ,
                                  xsimd::fma3<xsimd::avx2>
#endif
                                  >::type::type;

/// As above and, in builds that try every set, those that differ in code generation only.
using arches = detail::append_all<detail::list<>, moeroute::simd::default_arch
#if XSIMD_WITH_SSE2
                                  ,
                                  xsimd::sse2
#endif
#if XSIMD_WITH_SSE4_2 && MOEROUTE_TEST_EVERY_SET
                                  ,
                                  xsimd::sse4_2
#endif
#if XSIMD_WITH_AVX2 && MOEROUTE_TEST_EVERY_SET
                                  ,
                                  xsimd::avx2
#endif
#if XSIMD_WITH_FMA3_AVX2
                                  ,
                                  xsimd::fma3<xsimd::avx2>
#endif
                                  >::type::type;

/// Calls f with a value of every arch's tag.
template <class Arches, class F>
void for_each_arch(F&& f) {
  std::apply([&](auto... tag) { (f(tag), ...); }, Arches{});
}

}  // namespace test

// Noise on logits, by counter: the same seed, step and token give the same noise on every machine.
#pragma once

#include <cmath>
#include <string>

#include <moeroute/base/rng.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/kinds.hpp>
#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/random.hpp>

namespace moeroute {

namespace detail {

// Streams of random numbers, one per use, so that no two uses share a number.
enum class random_use : std::uint64_t {
  logit_noise = 1,
  second_expert = 2,
  random_choice = 3,
  jitter = 4,
  candidates = 5,
  input_noise = 6,
  explore = 9,
  explored_choice = 10,
  sparsemixer = 11
};

inline std::uint64_t random_stream(random_use use, std::uint64_t step) {
  return static_cast<std::uint64_t>(use) << 56 | (step & 0x00ffffffffffffffull);
}

// The normal quantile of u in (0, 1): M. Giles 2012, "Approximating the erfinv function", single
// precision.
template <class A>
MOEROUTE_INLINE simd::vfloat<A> normal_quantile(simd::vfloat<A> u) {
  using F = simd::vfloat<A>;
  const F x = u + u - F(1.0f);
  const F w = -simd::log<A>((F(1.0f) - x) * (F(1.0f) + x));
  const auto polynomial = [](F t, const float(&c)[9]) {
    F p(c[0]);
    for (int i = 1; i < 9; ++i) p = simd::fma<A>(p, t, F(c[i]));
    return p;
  };
  constexpr float central[9] = {2.81022636e-08f,  3.43273939e-07f, -3.5233877e-06f,
                                -4.39150654e-06f, 0.00021858087f,  -0.00125372503f,
                                -0.00417768164f,  0.246640727f,    1.50140941f};
  constexpr float tail[9] = {-0.000200214257f, 0.000100950558f, 0.00134934322f,
                             -0.00367342844f,  0.00573950773f,  -0.0076224613f,
                             0.00943887047f,   1.00167406f,     2.83297682f};
  const F central_part = polynomial(w - F(2.5f), central);
  const F tail_part =
      polynomial(simd::square_root<A>(simd::select<A>(w < F(5.0f), F(5.0f), w)) - F(3.0f), tail);
  return simd::select<A>(w < F(5.0f), central_part, tail_part) * x * F(1.41421356f);
}

}  // namespace detail

/// z + n * sigma, with n by counter from side_inputs seed and step. Where side_inputs::noise_logits
/// is given, sigma is softplus(noise logit) + floor instead.
///
/// Cost: about 3 ns per logit. Determinism: the same bits on every ISA.
/// Source: noisy top-k (Shazeer et al. 2017); with a constant sigma V-MoE (Riquelme et al. 2021).
struct logit_noise {
  noise_kind kind = noise_kind::none;
  float sigma = 1.0f;
  float floor = 0.01f;

  bool active() const { return kind != noise_kind::none; }

  /// Throws: error where sigma or floor is negative.
  void check() const {
    if (!(sigma >= 0.0f)) fail_value("logit_noise", "sigma", sigma, ">= 0");
    if (!(floor >= 0.0f)) fail_value("logit_noise", "floor", floor, ">= 0");
  }

  /// Adds the noise of one token to its row.
  template <class A = simd::default_arch>
  void add_to_row(float* z, index_t columns, index_t token, const side_inputs& side) const {
    using F = simd::vfloat<A>;
    const std::uint64_t stream = detail::random_stream(detail::random_use::logit_noise, side.step);
    const auto blocks = static_cast<std::uint64_t>(ceil_div(columns, 4));
    const float* scale = side.noise_logits.data == nullptr ? nullptr : side.noise_logits.row(token);
    simd::random_lanes<A> random;
    // A block of random numbers serves four columns, 16 of them 64.
    for (index_t c = 0; c < columns; c += 64) {
      const auto drawn = static_cast<int>(ceil_div(std::min<index_t>(columns - c, 64), 4));
      random.place_all(
          stream, static_cast<std::uint64_t>(token) * blocks + static_cast<std::uint64_t>(c / 4), 1,
          drawn);
      random.draw(side.seed, drawn);
      alignas(alignment) float u[64] = {};
      for (int j = 0; j < 4; ++j)
        for (int i = 0; i < drawn; ++i) u[4 * i + j] = open_u01_of(random.word(j, i));
      for (index_t j = 0; j < 64 && c + j < columns; j += simd::width<A>) {
        const index_t n = std::min<index_t>(simd::width<A>, columns - c - j);
        const F x = simd::load<A>(u + j);
        const F noise = kind == noise_kind::gaussian ? detail::normal_quantile<A>(x)
                                                     : -simd::log<A>(-simd::log<A>(x));
        F width(sigma);
        if (scale != nullptr)
          width = simd::softplus<A>(simd::load_first<A>(scale + c + j, n, 0.0f)) + F(floor);
        const F logit = simd::load_first<A>(z + c + j, n, 0.0f);
        simd::store_first<A>(z + c + j, n, simd::fma<A>(noise, width, logit));
      }
    }
  }
};

/// out = x * u with u uniform in [1 - eps, 1 + eps) for every element: the input jitter of Switch
/// (Fedus et al. 2021) and Mixtral. Training only; out may be x.
///
/// Throws: error where shapes do not fit, rows run into one another, the two overlap without being
/// the same, or eps is negative or not finite.
template <readable_rows X, writable_rows Y>
void jitter_rows(const X& x_rows, float eps, const side_inputs& side, Y&& out_rows) {
  const auto x = const_view(x_rows);
  const auto out = view(out_rows);
  check_size("jitter_rows", "out.rows", out.rows, x.rows);
  check_size("jitter_rows", "out.cols", out.cols, x.cols);
  check_stride("jitter_rows", "x", x);
  check_stride("jitter_rows", "out", out);
  check_apart_or_same("jitter_rows", "x", x, "out", out);
  if (!(eps >= 0.0f) || !std::isfinite(eps))
    fail("jitter_rows", "eps is " + std::to_string(eps) + ", expected >= 0");
  const std::uint64_t stream = detail::random_stream(detail::random_use::jitter, side.step);
  for (index_t t = 0; t < x.rows; ++t)
    for (index_t c = 0; c < x.cols; ++c) {
      const float u = random_u01(side.seed, stream, static_cast<std::uint64_t>(t * x.cols + c));
      out(t, c) =
          static_cast<element_of<Y>>(static_cast<float>(x(t, c)) * (1.0f - eps + 2.0f * eps * u));
    }
}

/// out = x * (1 + factor * n) + addend * m with n and m standard normal, a pair for every element,
/// by counter: the noisy copy of the input of S2MoE (Do et al. 2025), whose weights of the two are
/// the caller's. Training only; out may be x.
///
/// Throws: error where shapes do not fit, rows run into one another, the two overlap without being
/// the same, or factor or addend is negative or not finite.
template <readable_rows X, writable_rows Y, class A = simd::default_arch>
void gaussian_rows(const X& x_rows, float factor, float addend, const side_inputs& side,
                   Y&& out_rows) {
  const auto x = const_view(x_rows);
  const auto out = view(out_rows);
  check_size("gaussian_rows", "out.rows", out.rows, x.rows);
  check_size("gaussian_rows", "out.cols", out.cols, x.cols);
  check_stride("gaussian_rows", "x", x);
  check_stride("gaussian_rows", "out", out);
  check_apart_or_same("gaussian_rows", "x", x, "out", out);
  if (!(factor >= 0.0f) || !std::isfinite(factor))
    fail_value("gaussian_rows", "factor", static_cast<double>(factor), ">= 0");
  if (!(addend >= 0.0f) || !std::isfinite(addend))
    fail_value("gaussian_rows", "addend", static_cast<double>(addend), ">= 0");
  const std::uint64_t stream = detail::random_stream(detail::random_use::input_noise, side.step);
  for (index_t t = 0; t < x.rows; ++t)
    for (index_t c = 0; c < x.cols; ++c) {
      const random_words words =
          random_block(side.seed, stream, static_cast<std::uint64_t>(t * x.cols + c));
      const auto normal = [](std::uint32_t word) {
        return detail::normal_quantile<A>(simd::vfloat<A>(open_u01_of(word))).get(0);
      };
      const float scaled =
          static_cast<float>(x(t, c)) * std::fma(factor, normal(words.word[0]), 1.0f);
      out(t, c) = static_cast<element_of<Y>>(std::fma(addend, normal(words.word[1]), scaled));
    }
}

}  // namespace moeroute

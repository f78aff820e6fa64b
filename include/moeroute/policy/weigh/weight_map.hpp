// From the logits of a token's chosen experts to its weights, and back: what a router does once it
// has chosen. Which experts were chosen is a constant here.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <type_traits>

#include <moeroute/base/gradient.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/logit_transform.hpp>
#include <moeroute/policy/parts/weight.hpp>
#include <moeroute/simd/probability/softmax_row.hpp>

namespace moeroute {

/// What a weight is made of.
enum class weight_score {
  softmax,           ///< over all experts
  softmax_selected,  ///< over the token's choices
  sigmoid,
  sqrt_softplus,
  softplus,
  relu,
  identity,
  uniform,  ///< 1
  /// One softmax per choice, over the experts close to the best that is left (policy/row/
  /// sparsemixer.hpp). Its gradient is the softmax's, whatever the weight was scaled with.
  sparsemixer,
  own,  ///< a score of the caller's: score_map::value and slope
};

/// A score of one logit, or of a row, in single numbers.
struct score_map {
  weight_score kind = weight_score::softmax;
  double (*value)(double z) = nullptr;
  double (*slope)(double z, double value) = nullptr;  ///< dvalue / dz
};

/// What scores are divided by.
enum class weight_divisor {
  none,
  sum,
  lp,
  scaled_sum,  ///< sum_factor * sum + eps
  rms,  ///< sqrt(the mean over all experts of score^2 + eps), those that were not chosen as 0
};

/// Which logit a choice has.
enum class logit_layout {
  row,           ///< that of its column
  product_keys,  ///< expert i * m + j: column i plus column n + j, of n + m
};

/// weight = factor * expert_factor[e] * score(transform(logit)) / divisor: one description of what
/// routers of all kinds make of the logits that they chose.
///
/// The divisor runs over the token's choices. Choices without an expert, or whose logit is NaN or
/// -inf, have weight 0 and count as absent.
struct weight_map {
  score_map score{};
  weight_divisor divisor = weight_divisor::none;
  float p = 2.0f;  ///< of lp
  float sum_factor = 1.0f;
  eps_mode eps_where = eps_mode::none;
  float eps = 0.0f;
  float factor = 1.0f;
  float divide = 1.0f;
  std::span<const float> expert_factor{};  ///< [E], or empty
  logit_transform transform{};
  logit_layout layout = logit_layout::row;
  index_t first_keys = 0;  ///< n of product keys; 0: half the columns
  float jitter = 0.0f;     ///< of sparsemixer
  /// Of sparsemixer in training: whether a choice that is not the best is weighed whole, not by a
  /// third. No gradient knows of it.
  bool (*whole)(const side_inputs&, index_t token, index_t rank) = nullptr;

  index_t experts(index_t columns) const {
    const index_t n = first_keys != 0 ? first_keys : columns / 2;
    return layout == logit_layout::product_keys ? n * (columns - n) : columns;
  }

  /// The same map without exponentials that a divisor would divide away again.
  weight_map reduced() const {
    weight_map m = *this;
    if (m.score.kind == weight_score::softmax && m.eps_where == eps_mode::none &&
        (m.divisor == weight_divisor::sum || m.divisor == weight_divisor::lp))
      m.score.kind = weight_score::softmax_selected;
    return m;
  }
};

/// The maps of a router: a second one where two modalities have experts of their own.
struct weight_maps {
  weight_map first{};
  weight_map second{};
  index_t first_columns = 0;   ///< where modalities are told apart: the columns of the first
  index_t shared = 0;          ///< experts behind all others that every token takes
  float shared_weight = 0.0f;  ///< their weight, where side_inputs::shared_weight is empty
};

/// One token's logits and choices.
template <std::floating_point F>
struct token_choices {
  const F* logits;
  index_t columns;
  index_t token;
  std::span<const expert_id> id;
  const side_inputs* side;
};

/// Gradients of what a router has beside logits; each is added to, empty ones are not wanted.
template <std::floating_point F>
struct router_gradients {
  std::span<F> expert_factor{};   ///< [E], of weight_rule::expert_scale, threshold_router::gamma
  std::span<F> add{};             ///< [columns], of logit_transform::add
  std::span<F> temperature{};     ///< [1], [2] by modality
  matrix_view<F> noise_logits{};  ///< [T, columns], of side_inputs::noise_logits
  std::span<F> shared_weight{};   ///< [T], of side_inputs::shared_weight

  /// Whether something is summed over tokens.
  bool sums() const { return !expert_factor.empty() || !add.empty() || !temperature.empty(); }
};

namespace detail {

// Scratch of one worker.
template <std::floating_point F>
struct weigh_memory {
  F *z, *probability, *dz;  // [columns]
  F *score, *dscore;        // [k]
  float* noise;             // [columns]

  static weigh_memory carve(scratch& tape, index_t columns, index_t k, bool transforms) {
    const index_t wide = transforms ? columns : 0;
    return {tape.take<F>(wide), tape.take<F>(columns), tape.take<F>(wide),
            tape.take<F>(k),    tape.take<F>(k),       tape.take<float>(round_up(wide, 64))};
  }
  static weigh_memory* carve(scratch& tape, index_t columns, index_t k, bool transforms,
                             int workers) {
    auto* const list = tape.take<weigh_memory>(workers);
    for (int w = 0; w < workers; ++w) {
      const weigh_memory m = carve(tape, columns, k, transforms);
      if (list != nullptr) std::construct_at(list + w, m);
    }
    return list;
  }
};

// What is divided by.
struct divisor_value {
  double value = 1.0;  // not above 0: weights are 0
  double norm = 1.0;   // before eps
  bool clamped = false;
};

// A map at work on one token: on all of its columns, or on those of its modality.
template <std::floating_point F, class A = simd::default_arch>
class weigh_token {
 public:
  weigh_token(const weight_map& map, const token_choices<F>& row, index_t first, index_t columns,
              const weigh_memory<F>& memory)
      : map_(map), row_(row), first_(first), columns_(columns), m_(memory) {}

  // Weights of the choices that are the map's; others stay as they are.
  void weigh(F* weight) const {
    constexpr F most = std::numeric_limits<float>::max();
    score_choices(transformed());
    const bool wild = map_.divisor != weight_divisor::none && tame();
    const divisor_value d = wild && of_threshold() ? divisor_value{} : divisor(wild);
    for (std::size_t c = 0; c < k(); ++c) {
      const index_t e = expert(c);
      if (e < 0) continue;
      F w = d.value > 0.0 ? static_cast<F>(wide(m_.score[c]) / d.value * factor(e)) : F(0);
      if (map_.whole != nullptr && !whole(c)) w /= 3;
      weight[c] = w != w ? F(0) : std::clamp(w, -most, most);
    }
  }

  // dlogits += (dweight / dlogits)^T dweight; dlogits begins at the map's first column.
  void pull(const F* dweight, F* dlogits, std::size_t modality,
            const router_gradients<F>& own) const {
    const F* const z = transformed();
    score_choices(z);
    if (map_.divisor != weight_divisor::none && tame()) return;
    pull_weights(dweight, own);
    if (!map_.transform.active()) return pull_scores(z, dlogits);
    std::fill_n(m_.dz, columns_, F(0));
    pull_scores(z, m_.dz);
    pull_transform(dlogits, modality, own);
  }

 private:
  static constexpr F never = -std::numeric_limits<F>::infinity();
  static constexpr F tiny_softplus = sizeof(F) == sizeof(float) ? F(-17) : F(-40);

  std::size_t k() const { return row_.id.size(); }
  bool of_threshold() const {
    return map_.divisor == weight_divisor::scaled_sum || map_.divisor == weight_divisor::rms;
  }
  bool pairs() const { return map_.layout == logit_layout::product_keys; }
  index_t first_keys() const { return map_.first_keys != 0 ? map_.first_keys : columns_ / 2; }
  index_t second_keys() const { return columns_ - first_keys(); }
  index_t experts() const { return map_.experts(columns_); }
  // The map's number of a choice's expert, below 0 where it is none of them.
  index_t expert(std::size_t c) const {
    const index_t e = row_.id[c];
    return e < first_ + experts() ? e - first_ : -1;
  }

  static double wide(F x) { return static_cast<double>(x); }
  static F softplus(F z) { return std::max(z, F(0)) + std::log1p(std::exp(-std::abs(z))); }
  static F sigmoid(F z) { return 1 / (1 + std::exp(-z)); }

  F value(F z) const {
    switch (map_.score.kind) {
      case weight_score::sigmoid: return sigmoid(z);
      // Far below 0 the softplus is exp(z), and its root exp(z / 2), which underflows later.
      case weight_score::sqrt_softplus:
        return z < tiny_softplus ? std::exp(z / 2) : std::sqrt(softplus(z));
      case weight_score::softplus: return softplus(z);
      case weight_score::relu: return z > 0 ? z : F(0);
      case weight_score::identity: return z;
      case weight_score::own: return static_cast<F>(map_.score.value(wide(z)));
      default: return F(1);
    }
  }
  F slope(F z, F value) const {
    switch (map_.score.kind) {
      case weight_score::sigmoid: return value * (1 - value);
      case weight_score::sqrt_softplus:
        return z < tiny_softplus ? value / 2 : sigmoid(z) / (2 * value);
      case weight_score::softplus: return sigmoid(z);
      case weight_score::relu: return z > 0 ? F(1) : F(0);
      case weight_score::identity: return F(1);
      case weight_score::own: return static_cast<F>(map_.score.slope(wide(z), wide(value)));
      default: return F(0);
    }
  }

  static void softmax(const F* z, index_t n, F* p) { simd::softmax_row<A>(z, n, p); }

  // The logits as they are scored.
  const F* transformed() const {
    const logit_transform& t = map_.transform;
    const F* const in = row_.logits + first_;
    if (!t.active()) return in;
    const bool noisy = t.noise.active();
    if (noisy) draw_noise();
    for (index_t c = 0; c < columns_; ++c) {
      F x = in[c];
      if (t.temperature != 1.0f) x /= F(t.temperature);
      if (t.softcap != 0.0f && x > never) x = std::tanh(x / F(t.softcap)) * F(t.softcap);
      if (!t.add.empty()) x += F(t.add[static_cast<std::size_t>(c)]);
      if (noisy) x += F(m_.noise[c]) * noise_width(c);
      m_.z[c] = x;
    }
    return m_.z;
  }

  // The standard noise that the forward pass multiplied by its width.
  void draw_noise() const {
    side_inputs replayed;
    replayed.seed = row_.side->seed;
    replayed.step = row_.side->step;
    std::fill_n(m_.noise, columns_, 0.0f);
    const logit_noise standard{.kind = map_.transform.noise.kind};
    standard.add_to_row<A>(m_.noise, columns_, row_.token, replayed);
  }
  bool learned_width() const { return row_.side->noise_logits.data != nullptr; }
  F noise_width(index_t c) const {
    const logit_noise& noise = map_.transform.noise;
    return learned_width()
               ? softplus(F(row_.side->noise_logits(row_.token, first_ + c))) + F(noise.floor)
               : F(noise.sigma);
  }

  F logit(const F* z, index_t e) const {
    return pairs() ? z[e / second_keys()] + z[first_keys() + e % second_keys()] : z[e];
  }
  void to_logit(F* dz, index_t e, F g) const {
    if (!pairs()) return void(dz[e] += g);
    dz[e / second_keys()] += g;
    dz[first_keys() + e % second_keys()] += g;
  }

  // Scores of the choices; what is absent has 0.
  void score_choices(const F* z) const {
    const weight_score kind = map_.score.kind;
    if (kind == weight_score::softmax) {
      const index_t n = pairs() ? first_keys() : columns_;
      softmax(z, n, m_.probability);
      if (pairs()) softmax(z + n, second_keys(), m_.probability + n);
      if (pairs() && share_infinities(z)) return;
    }
    for (std::size_t c = 0; c < k(); ++c) {
      const index_t e = expert(c);
      F& s = m_.score[c];
      if (kind == weight_score::sparsemixer) {
        s = e < 0 ? F(0) : close_probabilities(z, c);
      } else if (kind == weight_score::softmax) {
        // A softmax over sums of two is the product of two.
        const F* const p = m_.probability;
        s = e < 0     ? F(0)
            : pairs() ? p[e / second_keys()] * p[first_keys() + e % second_keys()]
                      : p[e];
      } else if (kind == weight_score::uniform) {
        s = e < 0 ? F(0) : F(1);  // whatever the logit
      } else {
        s = e < 0 ? never : logit(z, e);
      }
    }
    if (kind == weight_score::softmax || kind == weight_score::sparsemixer ||
        kind == weight_score::uniform)
      return;
    if (kind == weight_score::softmax_selected)
      return softmax(m_.score, static_cast<index_t>(k()), m_.score);
    for (std::size_t c = 0; c < k(); ++c)
      m_.score[c] = m_.score[c] > never ? value(m_.score[c]) : F(0);
  }

  // Sums of +inf share the row equally, which no product of two shares does, and have no gradient.
  bool share_infinities(const F* z) const {
    index_t infinite = 0;
    const auto is = [&](index_t e) { return std::isinf(logit(z, e)) && logit(z, e) > 0; };
    if (std::none_of(z, z + columns_, [](F x) { return std::isinf(x) && x > 0; })) return false;
    for (index_t e = 0; e < experts(); ++e) infinite += is(e);
    if (infinite == 0) return false;
    for (std::size_t c = 0; c < k(); ++c)
      m_.score[c] = expert(c) >= 0 && is(expert(c)) ? 1 / static_cast<F>(infinite) : F(0);
    std::fill_n(m_.probability, columns_, F(0));
    return true;
  }

  // Into m_.probability: the softmax over the experts that choice c could have been. Returns that
  // of its own.
  F close_probabilities(const F* z, std::size_t c) const {
    F* const p = m_.probability;
    std::copy_n(z, columns_, p);
    for (std::size_t before = 0; before < c; ++before)
      if (expert(before) >= 0) p[expert(before)] = never;
    F top = never;
    for (index_t e = 0; e < columns_; ++e) top = p[e] > top ? p[e] : top;
    for (index_t e = 0; e < columns_; ++e)
      if ((top - p[e]) / std::max(std::abs(p[e]), top) > 2 * F(map_.jitter)) p[e] = never;
    softmax(p, columns_, p);
    return p[expert(c)];
  }

  // Whether choice c is the best of those that it was drawn from, or has luck.
  bool whole(std::size_t c) const {
    const F p = close_probabilities(transformed(), c);
    return p == *std::max_element(m_.probability, m_.probability + columns_) ||
           map_.whole(*row_.side, row_.token, static_cast<index_t>(c));
  }

  // Infinite scores become 1 and the others 0, and none has a gradient.
  bool tame() const {
    bool wild = false;
    for (std::size_t c = 0; c < k(); ++c) wild = wild || std::isinf(m_.score[c]);
    for (std::size_t c = 0; wild && c < k(); ++c)
      m_.score[c] = std::isinf(m_.score[c]) ? F(1) : F(0);
    return wild;
  }

  // Beside an infinite score eps is nothing.
  divisor_value divisor(bool wild = false) const {
    if (map_.divisor == weight_divisor::none) return {};
    const bool plain_sum =
        map_.divisor == weight_divisor::sum || map_.divisor == weight_divisor::scaled_sum;
    const bool squares = map_.divisor == weight_divisor::rms || map_.p == 2.0f;
    const double p = static_cast<double>(map_.p);
    const double eps = wild ? 0.0 : static_cast<double>(map_.eps);
    double sum = 0.0;
    for (std::size_t c = 0; c < k(); ++c) {
      const double s = wide(m_.score[c]);
      sum += plain_sum ? s : squares ? s * s : std::pow(s, p);
    }
    divisor_value d;
    if (map_.divisor == weight_divisor::rms) {
      d.value = d.norm = std::sqrt(sum / static_cast<double>(experts()) + eps);
      return d;
    }
    d.norm = plain_sum ? sum : squares ? std::sqrt(sum) : std::pow(sum, 1.0 / p);
    if (map_.divisor == weight_divisor::scaled_sum) d.norm *= static_cast<double>(map_.sum_factor);
    d.value = d.norm;
    if (map_.eps_where == eps_mode::add) d.value += eps;
    if (map_.eps_where == eps_mode::clamp) {
      d.clamped = !(d.norm > eps);
      if (d.clamped) d.value = eps;
    }
    return d;
  }

  double common_factor() const {
    return static_cast<double>(map_.factor) / static_cast<double>(map_.divide);
  }
  double factor(index_t e) const {
    return map_.expert_factor.empty()
               ? common_factor()
               : common_factor() *
                     static_cast<double>(map_.expert_factor[static_cast<std::size_t>(e)]);
  }

  // dscore_c = (g_c - mean dnorm/ds_c) / divisor with g_c = factor_c dweight_c, and mean the sum of
  // g_c score_c / divisor. dnorm/ds is 1 for a sum, (s / norm)^(p - 1) for an Lp norm, s / (E norm)
  // for the root of a mean of squares, and 0 where eps holds the divisor.
  void pull_weights(const F* dweight, const router_gradients<F>& own) const {
    const divisor_value d = divisor();
    double mean = 0.0;
    for (std::size_t c = 0; c < k(); ++c) {
      const index_t e = expert(c);
      m_.dscore[c] = 0;
      if (e < 0 || !(d.value > 0.0)) continue;
      const double share = wide(m_.score[c]) / d.value, g = factor(e) * wide(dweight[c]);
      m_.dscore[c] = static_cast<F>(g / d.value);
      mean += g * share;
      if (!own.expert_factor.empty())
        own.expert_factor[static_cast<std::size_t>(first_ + e)] +=
            static_cast<F>(wide(dweight[c]) * share * common_factor());
    }
    if (map_.divisor == weight_divisor::none || d.clamped || !(d.value > 0.0)) return;
    // All scores are 0: no direction to go.
    if (map_.divisor == weight_divisor::lp && !(d.norm > 0.0)) return;
    const double p = static_cast<double>(map_.p);
    for (std::size_t c = 0; c < k(); ++c) {
      const double s = wide(m_.score[c]);
      double dnorm = 1.0;
      if (map_.divisor == weight_divisor::scaled_sum) dnorm = static_cast<double>(map_.sum_factor);
      if (map_.divisor == weight_divisor::lp)
        dnorm = p == 2.0 ? s / d.norm : std::pow(s / d.norm, p - 1.0);
      if (map_.divisor == weight_divisor::rms)
        dnorm = s / (static_cast<double>(experts()) * d.norm);
      m_.dscore[c] -= static_cast<F>(mean / d.value * dnorm);
    }
  }

  // dz += what dscore pulls back. Softmax: dz_e = p_e (G_e - sum over j of p_j G_j).
  void pull_scores(const F* z, F* dz) const {
    const weight_score kind = map_.score.kind;
    const bool over_all = kind == weight_score::softmax;
    if (over_all || kind == weight_score::softmax_selected) {
      F mean = 0;
      for (std::size_t c = 0; c < k(); ++c)
        if (m_.score[c] > 0) mean += m_.score[c] * m_.dscore[c];
      for (std::size_t c = 0; c < k(); ++c)
        if (m_.score[c] > 0 && std::isfinite(logit(z, expert(c))))
          to_logit(dz, expert(c), m_.score[c] * (over_all ? m_.dscore[c] : m_.dscore[c] - mean));
      for (index_t c = 0; over_all && c < columns_; ++c)
        if (m_.probability[c] > 0 && std::isfinite(z[c])) dz[c] -= m_.probability[c] * mean;
      return;
    }
    for (std::size_t c = 0; c < k(); ++c) {
      const index_t e = expert(c);
      if (e < 0) continue;
      if (kind == weight_score::sparsemixer) {
        const F own = close_probabilities(z, c) * m_.dscore[c];
        for (index_t j = 0; j < columns_; ++j)
          if (m_.probability[j] > 0 && std::isfinite(z[j])) dz[j] -= m_.probability[j] * own;
        if (m_.score[c] > 0 && std::isfinite(z[e])) dz[e] += own;
        continue;
      }
      const F x = logit(z, e);
      if (std::isfinite(x)) to_logit(dz, e, m_.dscore[c] * slope(x, m_.score[c]));
    }
  }

  // dlogits += dz through the transform.
  void pull_transform(F* dlogits, std::size_t modality, const router_gradients<F>& own) const {
    const logit_transform& t = map_.transform;
    const F* const in = row_.logits + first_;
    const bool widths = t.noise.active() && learned_width() && own.noise_logits.data != nullptr;
    for (index_t c = 0; c < columns_; ++c) {
      F g = m_.dz[c];
      if (g == 0) continue;
      if (!own.add.empty()) own.add[static_cast<std::size_t>(first_ + c)] += g;
      if (widths)
        own.noise_logits(row_.token, first_ + c) +=
            g * F(m_.noise[c]) * sigmoid(F(row_.side->noise_logits(row_.token, first_ + c)));
      if (t.softcap != 0.0f) {
        const F bent = std::tanh(in[c] / F(t.temperature) / F(t.softcap));
        g *= 1 - bent * bent;
      }
      if (g == 0) continue;  // flat, as +inf is under a soft-cap
      g /= F(t.temperature);
      if (!own.temperature.empty()) own.temperature[modality] -= g * in[c] / F(t.temperature);
      dlogits[c] += g;
    }
  }

  const weight_map& map_;
  const token_choices<F>& row_;
  index_t first_;  // of the map's columns and experts
  index_t columns_;
  const weigh_memory<F>& m_;
};

}  // namespace detail

}  // namespace moeroute

// Routers made of routers: one of two by modality, and shared experts appended.
#pragma once

#include <algorithm>

#include <moeroute/policy/concepts.hpp>

namespace moeroute {

/// Two routers with experts of their own; side_inputs::modality says which serves a token.
///
/// Shapes: logits [T, E0 + E1]: a token of modality 0 is routed by `first` on the first E0 columns,
/// one of modality 1 by `second` on the others, with ids from E0 on. Both have the same k. Source:
/// Ernie 4.5 VL (2025).
template <token_router First, token_router Second = First>
struct by_modality {
  First first{};
  Second second{};
  index_t first_experts = 1;  ///< E0

  template <class R>
  using buffers_of = decltype(std::declval<const R&>().carve(std::declval<scratch&>(), index_t{}));
  struct buffers {
    buffers_of<First> first;
    buffers_of<Second> second;
    expert_id* id;
    float* value;
  };

  index_t k() const { return first.k(); }
  static index_t experts(index_t columns) { return columns; }
  side_use reads_side(index_t columns) const {
    side_use use = side_use_of(first, first_experts);
    const side_use other = side_use_of(second, columns - first_experts);
    use.token_ids |= other.token_ids;
    use.own_k = std::min(use.own_k, other.own_k);
    use.modality = true;
    use.shared_weight |= other.shared_weight;
    use.noise_logits |= other.noise_logits;
    return use;
  }

  /// Throws: error where E0 does not leave columns for the second router, or the two differ in k.
  void check(index_t columns) const {
    check_range("by_modality", "first_experts", first_experts, 1, columns - 1);
    check_size("by_modality", "second.k", second.k(), first.k());
    first.check(first_experts);
    second.check(columns - first_experts);
  }

  buffers carve(scratch& tape, index_t columns) const {
    return {first.carve(tape, first_experts), second.carve(tape, columns - first_experts),
            tape.take<expert_id>(k() * block_rows), tape.take<float>(k() * block_rows)};
  }

  void route_block(const logit_block& z, const buffers& memory, choice_block& c) const {
    if (z.side->modality.empty()) fail("by_modality", "side_inputs::modality is missing");
    const auto modality = z.side->modality.subspan(static_cast<std::size_t>(z.first_token),
                                                   static_cast<std::size_t>(z.rows));
    // Modalities come in runs: most blocks need one router only.
    const auto others =
        std::count_if(modality.begin(), modality.end(), [](auto m) { return m != 0; });
    logit_block part = z;
    part.experts = first_experts;
    if (others < z.rows) first.route_block(part, memory.first, c);
    if (others == 0) return;
    part.logits = z.logits + first_experts;
    part.experts = z.experts - first_experts;
    side_inputs side = *z.side;  // its columns of the noise logits are the second router's as well
    if (side.noise_logits.data != nullptr) side.noise_logits.data += first_experts;
    part.side = &side;
    choice_block other{c.k, memory.id, memory.value};
    clear_lanes(other, z.rows);
    second.route_block(part, memory.second, other);
    for (int i = 0; i < z.rows; ++i) {
      if (modality[static_cast<std::size_t>(i)] == 0) continue;
      for (int at = i; at < c.k * block_rows; at += block_rows) {
        c.id[at] = other.id[at] == no_expert ? no_expert
                                             : other.id[at] + static_cast<expert_id>(first_experts);
        c.value[at] = other.value[at];
      }
    }
  }
};

/// A router's choices followed by `shared` experts that every token takes, with ids from E on.
///
/// Their weight is side_inputs::shared_weight of the token where given (a shared expert behind a
/// gate, as in Qwen2-MoE), else `weight`. A token's own k is of the router's choices: the shared
/// experts stay. The logits keep their E columns; the assignment has E +
/// shared experts.
template <token_router Router>
struct with_shared {
  Router router{};
  index_t shared = 1;
  float weight = 1.0f;

  index_t k() const { return router.k() + shared; }
  index_t experts(index_t columns) const { return router.experts(columns) + shared; }
  side_use reads_side(index_t columns) const {
    side_use use = side_use_of(router, columns);
    use.shared_weight = true;
    return use;
  }

  /// Throws: error where shared < 1 or the router does not fit.
  void check(index_t columns) const {
    check_range("with_shared", "shared", shared, 1, max_experts - columns);
    router.check(columns);
  }
  auto carve(scratch& tape, index_t columns) const { return router.carve(tape, columns); }

  template <class Buffers>
  void route_block(const logit_block& z, const Buffers& memory, choice_block& c) const {
    choice_block own{static_cast<int>(router.k()), c.id, c.value};
    router.route_block(z, memory, own);
    const auto first = static_cast<expert_id>(router.experts(z.experts));
    for (int r = own.k; r < c.k; ++r)
      for (int i = 0; i < z.rows; ++i) {
        c.id[r * block_rows + i] = first + static_cast<expert_id>(r - own.k);
        c.value[r * block_rows + i] =
            z.side->shared_weight.empty()
                ? weight
                : z.side->shared_weight[static_cast<std::size_t>(z.first_token + i)];
      }
  }
};

}  // namespace moeroute

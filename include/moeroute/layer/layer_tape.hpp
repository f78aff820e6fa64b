// What a layer's forward pass leaves for its backward pass.
#pragma once

#include <span>

#include <moeroute/base/workspace.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/dispatch_plan.hpp>
#include <moeroute/data/soft_plan.hpp>
#include <moeroute/matrix/matrix.hpp>

namespace moeroute {

/// The memory of one forward call: nothing is computed for the tape and nothing copied, the layer
/// goes on with the memory that the tape held before. Reusable: two calls of a size are the last
/// that allocate.
///
/// in is [slots, d] and out [slots, d_out]; of up to decode_tokens tokens in is unspecified, and
/// filled by the backward pass. shared_out [T, d_out] and shared_weight [T] are there where the
/// layer has shared experts.
struct layer_tape {
  /// Whether experts that offer it (kept_floats()) keep what their backward pass would compute
  /// again: time for memory. The caller's to set; gradients have the same bits either way.
  bool keep_activations = false;
  index_t tokens = -1;  ///< of the call, -1 before any
  assignment choices{};
  dispatch_plan plan{};
  matrix_view<float> logits{};
  matrix_view<float> in{}, out{}, shared_out{};
  std::span<float> shared_weight{};
  matrix_view<float> kept{};  ///< [slots, kept_floats()], or no data
  bool has_inputs = false;    ///< whether `in` was filled
  bool gated = true;          ///< whether the logits are the gate's of x

  /// Bytes that the tape holds, apart from the choices and the plan.
  index_t bytes() const {
    return logit_values.capacity() * index_t{sizeof(float)} + memory.capacity() +
           backward.capacity() + router.capacity();
  }

  buffer<float> logit_values;  ///< what the views point into, and
  workspace memory;
  workspace backward, router;  ///< scratch of the backward pass

  // A copy's views would point into the original.
  layer_tape() = default;
  layer_tape(layer_tape&&) = default;
  layer_tape& operator=(layer_tape&&) = default;
};

/// The same of a soft layer's call: in and out are [slots, d].
struct soft_tape {
  index_t tokens = -1;  ///< of the call, -1 before any
  soft_plan plan{};
  matrix_view<float> in{}, out{};

  /// Bytes that the tape holds, apart from the plan.
  index_t bytes() const { return memory.capacity() + backward.capacity() + sums.capacity(); }

  workspace memory;          ///< what the views point into
  workspace backward, sums;  ///< scratch of the backward pass

  soft_tape() = default;
  soft_tape(soft_tape&&) = default;
  soft_tape& operator=(soft_tape&&) = default;
};

}  // namespace moeroute

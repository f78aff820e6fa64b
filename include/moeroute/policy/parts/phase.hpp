// Training or evaluation: routers that balance a batch do so in training only.
#pragma once

namespace moeroute {

/// Whether the batch is balanced: in evaluation a token's experts must not depend on its
/// neighbours.
enum class routing_phase { training, evaluation };

}  // namespace moeroute

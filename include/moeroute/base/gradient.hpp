// What becomes of a gradient that a backward pass computes.
#pragma once

namespace moeroute {

/// What is done with the gradient.
enum class gradient_to { nowhere, write, add };

}  // namespace moeroute

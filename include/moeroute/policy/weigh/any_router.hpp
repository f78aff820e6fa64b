// The weight map of a router that was picked at run time.
#pragma once

#include <moeroute/policy/make_router.hpp>
#include <moeroute/policy/weigh/row_routers.hpp>

namespace moeroute {

inline weight_maps weight_maps_of(const any_router& r, const side_inputs& side) {
  return r.visit([&](const auto& kind) { return weight_maps_of(kind, side); });
}

}  // namespace moeroute

// Routing when memory is the limit: what is in it, and choices that give way to it. The floor
// residency.
#pragma once

#include <moeroute/residency/resident_any_router.hpp>

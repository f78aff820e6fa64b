// Routing when memory is the limit: what is in it, and choices that give way to it. The floor
// residency.
#pragma once

#include <moeroute/data/expert_profile.hpp>
#include <moeroute/residency/merge.hpp>
#include <moeroute/residency/prefetcher.hpp>
#include <moeroute/residency/pregate.hpp>
#include <moeroute/residency/prune.hpp>
#include <moeroute/residency/regroup.hpp>
#include <moeroute/residency/resident_any_router.hpp>

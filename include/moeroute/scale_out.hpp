// Experts over ranks, without a network: the phases of the exchange and their virtual ranks, and
// the planners of placements. What sends is <moeroute/mpi/...>, opened by name.
#pragma once

#include <moeroute/layer/joined_backward.hpp>
#include <moeroute/layer/virtual_ranks.hpp>
#include <moeroute/placement/affinity.hpp>
#include <moeroute/placement/cost.hpp>
#include <moeroute/placement/eplb.hpp>
#include <moeroute/placement/exact_balance.hpp>
#include <moeroute/placement/failover.hpp>
#include <moeroute/placement/grouping.hpp>
#include <moeroute/placement/loads.hpp>
#include <moeroute/placement/replan.hpp>
#include <moeroute/placement/replicate.hpp>
#include <moeroute/placement/search.hpp>
#include <moeroute/placement/shadow.hpp>
#include <moeroute/placement/simulate.hpp>
#include <moeroute/placement/spill.hpp>
#include <moeroute/placement/split.hpp>
#include <moeroute/placement/traffic.hpp>

// Experts over ranks, without a network: the phases of the exchange and their virtual ranks, and
// the planners of placements. What sends is <moeroute/mpi/...>, opened by name.
#pragma once

#include <moeroute/layer/virtual_ranks.hpp>

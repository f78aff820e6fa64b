// All of moeroute but the doors that are opened one by one (OpenMP, oneTBB and other optional third
// parties). A file that needs less compiles faster with the header that it needs.
#pragma once

#include <moeroute/balance.hpp>
#include <moeroute/exec/callable.hpp>
#include <moeroute/metrics.hpp>
#include <moeroute/residency.hpp>
#include <moeroute/routing.hpp>
#include <moeroute/scale_out.hpp>
#include <moeroute/training.hpp>

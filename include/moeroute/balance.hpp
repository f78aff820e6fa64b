// What pushes load even: losses, bias controllers, schedules. The floor balance.
#pragma once

#include <moeroute/balance/bias_controller.hpp>
#include <moeroute/balance/bip.hpp>
#include <moeroute/balance/expert_threshold.hpp>
#include <moeroute/balance/loss_chunk.hpp>
#include <moeroute/balance/loss_count.hpp>
#include <moeroute/balance/loss_load.hpp>
#include <moeroute/balance/loss_prior.hpp>
#include <moeroute/balance/loss_relu.hpp>
#include <moeroute/balance/loss_router.hpp>
#include <moeroute/balance/loss_selected.hpp>
#include <moeroute/balance/loss_token.hpp>
#include <moeroute/balance/quantile.hpp>
#include <moeroute/balance/schedule.hpp>
#include <moeroute/balance/sparsity_controller.hpp>

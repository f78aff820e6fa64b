// The backward passes of the stages and layers of <moeroute/routing.hpp>, from every router, and
// what else trains a router.
#pragma once

#include <moeroute/layer/lora_backward.hpp>
#include <moeroute/layer/moe_layer_backward.hpp>
#include <moeroute/layer/soft_moe_backward.hpp>
#include <moeroute/layer/swiglu_backward.hpp>
#include <moeroute/policy/weigh/any_router.hpp>
#include <moeroute/policy/weigh/batch_routers.hpp>
#include <moeroute/policy/weigh/rare_router.hpp>
#include <moeroute/policy/weigh/sinkhorn_plan.hpp>
#include <moeroute/policy/weigh/transport_plan.hpp>
#include <moeroute/stage/capacity_backward.hpp>
#include <moeroute/stage/combine_backward.hpp>
#include <moeroute/stage/dispatch_backward.hpp>
#include <moeroute/stage/expert_backward.hpp>
#include <moeroute/stage/gates_backward.hpp>
#include <moeroute/stage/policy_gradient.hpp>
#include <moeroute/stage/retained_inputs.hpp>
#include <moeroute/stage/router_target.hpp>
#include <moeroute/stage/soft_backward.hpp>
#include <moeroute/stage/transform_rows.hpp>
#include <moeroute/stage/weigh.hpp>

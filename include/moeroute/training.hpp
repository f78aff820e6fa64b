// The backward passes of the stages and layers of <moeroute/routing.hpp>, from every router.
#pragma once

#include <moeroute/policy/weigh/any_router.hpp>
#include <moeroute/policy/weigh/batch_routers.hpp>
#include <moeroute/stage/weigh.hpp>

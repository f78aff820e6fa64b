// From logits to outputs: routers, the stages, whole layers. The floors policy, stage and layer.
#pragma once

#include <moeroute/layer/lora_experts.hpp>
#include <moeroute/layer/mixture_of_depths.hpp>
#include <moeroute/layer/moe_layer.hpp>
#include <moeroute/layer/soft_moe.hpp>
#include <moeroute/layer/swiglu_experts.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/make_batch_router.hpp>
#include <moeroute/policy/row/compose.hpp>
#include <moeroute/policy/row/explore.hpp>
#include <moeroute/policy/row/replay.hpp>
#include <moeroute/policy/spec_text.hpp>
#include <moeroute/stage/gates/codebook.hpp>
#include <moeroute/stage/gates/cosine.hpp>
#include <moeroute/stage/gates/make_gate.hpp>
#include <moeroute/stage/gates/mixing.hpp>
#include <moeroute/stage/gates/mlp.hpp>
#include <moeroute/stage/gates/normalized.hpp>
#include <moeroute/stage/plan_layouts.hpp>
#include <moeroute/stage/rectify.hpp>
#include <moeroute/stage/sequences.hpp>

// What is measured of routing. The floor metrics.
#pragma once

#include <moeroute/metrics/agreement.hpp>
#include <moeroute/metrics/cache.hpp>
#include <moeroute/metrics/co_activation.hpp>
#include <moeroute/metrics/committee.hpp>
#include <moeroute/metrics/drops.hpp>
#include <moeroute/metrics/entropy.hpp>
#include <moeroute/metrics/load.hpp>
#include <moeroute/metrics/saliency.hpp>
#include <moeroute/metrics/saturation.hpp>
#include <moeroute/metrics/segment.hpp>
#include <moeroute/metrics/sparsity.hpp>
#include <moeroute/metrics/specialisation.hpp>

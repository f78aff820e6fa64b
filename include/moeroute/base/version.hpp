// The version: the one place that says it. Preprocessor only, so that C may read it too.
#pragma once

#define MOEROUTE_VERSION_MAJOR 0
#define MOEROUTE_VERSION_MINOR 2
#define MOEROUTE_VERSION_PATCH 0

# What moeroute needs from others: the installed package where there is one, else its source at a
# pinned release. FETCHCONTENT_SOURCE_DIR_<PACKAGE> names a local source instead.
include(FetchContent)

# tools/setup unpacks here what the distribution only has in a version too old.
if(PROJECT_IS_TOP_LEVEL AND EXISTS "${PROJECT_SOURCE_DIR}/.deps/prefix/usr")
  list(APPEND CMAKE_PREFIX_PATH "${PROJECT_SOURCE_DIR}/.deps/prefix/usr")
endif()

# moeroute_dependency(<package> <at least> <target> GIT <repository> TAG <tag> [HEADERS <folder>])
#
# At least: a list where a package takes itself to be compatible within a major version only.
# HEADERS: the library is headers only, found in that folder of its source. It becomes an imported
# target, so that its own build does not run and our export set need not carry it.
function(moeroute_dependency package versions target)
  if(TARGET ${target})
    return() # The project around us brought it.
  endif()
  cmake_parse_arguments(PARSE_ARGV 3 arg "" "GIT;TAG;HEADERS" "")
  string(TOUPPER ${package} upper)
  if(NOT FETCHCONTENT_SOURCE_DIR_${upper})
    foreach(version IN LISTS versions)
      if(NOT ${package}_FOUND)
        find_package(${package} ${version} CONFIG QUIET GLOBAL)
      endif()
    endforeach()
  endif()
  if(NOT TARGET ${target})
    message(STATUS "${package}: no installed version ${version} or newer; building from source")
    set(own_build "")
    if(arg_HEADERS)
      set(own_build SOURCE_SUBDIR no-build-of-its-own)
    endif()
    FetchContent_Declare(
      ${package}
      GIT_REPOSITORY ${arg_GIT}
      GIT_TAG ${arg_TAG}
      GIT_SHALLOW TRUE
      SYSTEM ${own_build})
    FetchContent_MakeAvailable(${package})
    if(arg_HEADERS)
      FetchContent_GetProperties(${package} SOURCE_DIR source)
      cmake_path(APPEND source "${arg_HEADERS}" OUTPUT_VARIABLE include)
      add_library(${target} INTERFACE IMPORTED GLOBAL)
      target_include_directories(${target} INTERFACE "${include}")
    endif()
  endif()
endfunction()

moeroute_dependency(Eigen3 "5;3.4" Eigen3::Eigen GIT https://gitlab.com/libeigen/eigen.git TAG 3.4.0 HEADERS .)
moeroute_dependency(xsimd "14;13" xsimd GIT https://github.com/xtensor-stack/xsimd.git TAG 13.2.0 HEADERS include)

if(MOEROUTE_BUILD_TESTS)
  moeroute_dependency(Catch2 3 Catch2::Catch2WithMain GIT https://github.com/catchorg/Catch2.git TAG v3.7.1)
endif()
if(MOEROUTE_BUILD_BENCH)
  set(BENCHMARK_ENABLE_TESTING OFF)
  set(BENCHMARK_ENABLE_INSTALL OFF)
  moeroute_dependency(benchmark 1.7 benchmark::benchmark_main GIT https://github.com/google/benchmark.git TAG v1.8.5)
endif()
if(MOEROUTE_BUILD_TESTS OR MOEROUTE_BUILD_EXAMPLES OR MOEROUTE_BUILD_BENCH OR MOEROUTE_BUILD_CONFORMANCE)
  moeroute_dependency(nlohmann_json 3.9 nlohmann_json::nlohmann_json GIT https://github.com/nlohmann/json.git TAG v3.11.3
                      HEADERS include)
  moeroute_dependency(cxxopts 3 cxxopts::cxxopts GIT https://github.com/jarro2783/cxxopts.git TAG v3.1.1 HEADERS include)
endif()

# moeroute::json is there for whoever has it.
if(NOT TARGET nlohmann_json::nlohmann_json)
  find_package(nlohmann_json 3.9 QUIET GLOBAL CONFIG)
endif()
find_package(OpenMP QUIET GLOBAL COMPONENTS CXX)
find_package(TBB QUIET GLOBAL CONFIG)
# moeroute::mpi asks for it: what is in C alone needs that language.
if(MOEROUTE_MPI)
  enable_language(C)
  find_package(MPI REQUIRED GLOBAL COMPONENTS C)
  # How Open MPI runs more ranks than processors, and as root; others do not read this.
  set(MOEROUTE_MPI_ENVIRONMENT
      "OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;OMPI_MCA_rmaps_base_oversubscribe=1;OMPI_MCA_mpi_yield_when_idle=1;OMPI_MCA_hwloc_base_binding_policy=none"
  )
endif()

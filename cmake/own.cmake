# How this project builds its own programs. None of it reaches the users of moeroute::moeroute.
set(MOEROUTE_ARCH native CACHE STRING "What the project's own programs are built for")
set_property(CACHE MOEROUTE_ARCH PROPERTY STRINGS native baseline avx2 avx512)

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set_property(CACHE CMAKE_BUILD_TYPE PROPERTY VALUE Release)
endif()

# Looked for once: with it every command is another, and a folder that was built without would be built anew.
if(NOT DEFINED CACHE{CCACHE})
  find_program(CCACHE ccache)
endif()
mark_as_advanced(CCACHE)
if(CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER "${CCACHE}")
endif()

set(arch_native -march=native)
set(arch_baseline "")
set(arch_avx2 -mavx2 -mfma -mbmi -mbmi2 -mf16c)
set(arch_avx512 ${arch_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd)
if(NOT DEFINED arch_${MOEROUTE_ARCH})
  message(FATAL_ERROR "MOEROUTE_ARCH is '${MOEROUTE_ARCH}', expected native, baseline, avx2 or avx512")
elseif(MOEROUTE_ARCH MATCHES "avx" AND NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  message(FATAL_ERROR "MOEROUTE_ARCH=${MOEROUTE_ARCH} is for x86-64, this is ${CMAKE_SYSTEM_PROCESSOR}")
endif()

add_library(moeroute_own INTERFACE)
target_link_libraries(moeroute_own INTERFACE moeroute::moeroute)
if(OpenMP_CXX_FOUND)
  target_link_libraries(moeroute_own INTERFACE moeroute::openmp)
endif()
target_compile_options(
  moeroute_own INTERFACE ${arch_${MOEROUTE_ARCH}} -Wall -Wextra -Wpedantic -Wconversion -Wshadow)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # Its own AVX-512 intrinsics read a value that they leave undefined on purpose.
  target_compile_options(moeroute_own INTERFACE -Wno-maybe-uninitialized -Wno-uninitialized)
endif()

if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_SYSTEM_PROCESSOR STREQUAL "aarch64")
  target_compile_options(moeroute_own INTERFACE -Wno-psabi) # of a change ten years ago
endif()

# moeroute_names(<variable> <folder> <glob>): the names of the files, without folder and extension.
function(moeroute_names variable folder glob)
  file(GLOB files CONFIGURE_DEPENDS "${folder}/${glob}")
  set(names "")
  foreach(file IN LISTS files)
    cmake_path(GET file STEM LAST_ONLY name)
    list(APPEND names ${name})
  endforeach()
  set(${variable} ${names} PARENT_SCOPE)
endfunction()

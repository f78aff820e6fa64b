# moeroute::compiled, the library for those who link instead of include: the faces <moeroute.h> (C) and
# <moeroute/compiled.hpp> (C++), with every instruction set in it, picked at run time. Static, or shared
# where BUILD_SHARED_LIBS says so; moeroute::compiled_shared and moeroute::compiled_static are both.
#
# The kernels are compiled once per instruction set. An inline function that two objects share by name is
# kept once by the linker, from whichever object comes first, so it could hold instructions that the
# machine lacks; therefore each set is joined into one object (ld -r) whose symbols but its table are made
# local (objcopy). Linux, with binutils.
set(sets baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(sets avx512 avx2 baseline) # the fastest first: the order in which a machine is asked
endif()
set(MOEROUTE_COMPILED_SETS "${sets}" CACHE STRING "The instruction sets of moeroute::compiled, the fastest first")
set(flags_baseline "")
set(flags_avx2 -mavx2 -mfma -mbmi -mbmi2 -mf16c)
set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd)

# What the program around asks for by CMAKE_CXX_FLAGS (-march=native, -mavx2) is taken back first:
# the library picks at run time, and what all sets share must run anywhere.
set(anywhere "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  string(TOUPPER "${CMAKE_BUILD_TYPE}" config)
  string(REGEX MATCHALL "-m(arch=[^ ]+|avx[^ ]*|fma4?|f16c|bmi2?|lzcnt|popcnt|movbe|sse[34][^ ]*|ssse3|vaes|gfni)"
               given "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${config}}")
  foreach(flag IN LISTS given)
    if(flag MATCHES "-march=")
      list(APPEND anywhere -march=x86-64 -mtune=generic)
    else()
      string(REPLACE "-m" "-mno-" flag "${flag}")
      list(APPEND anywhere ${flag})
    endif()
  endforeach()
endif()

# A machine must have what the kernels are compiled for: moeroute.cpp asks it for each of the flags.
file(READ "${PROJECT_SOURCE_DIR}/src/moeroute.cpp" asked)
foreach(flag IN LISTS flags_avx2 flags_avx512)
  string(REPLACE "-m" "" feature "${flag}")
  if(NOT asked MATCHES "__builtin_cpu_supports\\(\"${feature}\"\\)|has_${feature}\\(\\)")
    message(FATAL_ERROR "moeroute: kernels are compiled with ${flag}, but moeroute.cpp does not ask for ${feature}")
  endif()
endforeach()

# Whatever links the program: only GNU's linker lets go of the groups that share functions.
if(CMAKE_CROSSCOMPILING)
  set(MOEROUTE_LD "${CMAKE_LINKER}")
else()
  find_program(MOEROUTE_LD NAMES ld.bfd ld REQUIRED)
  mark_as_advanced(MOEROUTE_LD)
endif()

if(NOT CMAKE_OBJCOPY)
  message(FATAL_ERROR "The compiled library needs objcopy (Debian: binutils), which was not found")
endif()

set(source "${PROJECT_SOURCE_DIR}/src")

# moeroute_joined(<variable> <symbol> <flags> <sources>...): one object of the sources, of which the
# symbol alone can be seen.
function(moeroute_joined variable symbol flags)
  add_library(${symbol} OBJECT ${ARGN})
  target_compile_options(
    ${symbol}
    PRIVATE ${anywhere} ${flags} -fno-lto -fvisibility=hidden $<$<CXX_COMPILER_ID:GNU>:-fno-gnu-unique>
            # No -O3: the loops that matter are written out in registers.
            $<$<NOT:$<CONFIG:Debug>>:-O2>)
  target_link_libraries(${symbol} PRIVATE moeroute::moeroute)
  set_target_properties(${symbol} PROPERTIES POSITION_INDEPENDENT_CODE ON)
  set(object "${PROJECT_BINARY_DIR}/${symbol}.o")
  add_custom_command(
    OUTPUT "${object}"
    COMMAND "${MOEROUTE_LD}" -r --force-group-allocation -o "${object}.all" "$<TARGET_OBJECTS:${symbol}>"
    COMMAND "${CMAKE_OBJCOPY}" --keep-global-symbol=${symbol} "${object}.all" "${object}"
    DEPENDS ${symbol} "$<TARGET_OBJECTS:${symbol}>"
    COMMENT "Keeping ${symbol} to itself"
    COMMAND_EXPAND_LISTS VERBATIM)
  set_source_files_properties("${object}" PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
  set(${variable} ${${variable}} "${object}" PARENT_SCOPE)
endfunction()

set(joined "")
set(list "")
moeroute_joined(joined moeroute_plain "" "${source}/plain.cpp")
foreach(set IN LISTS MOEROUTE_COMPILED_SETS)
  moeroute_joined(joined moeroute_kernels_${set} "${flags_${set}}" "${source}/route.cpp" "${source}/rows.cpp"
                  "${source}/balance.cpp")
  target_compile_definitions(moeroute_kernels_${set} PRIVATE MOEROUTE_SET=${set})
  string(APPEND list "MOEROUTE_SET(${set})")
endforeach()
add_custom_target(moeroute_joined DEPENDS ${joined})

# What both libraries have of their own is compiled once.
add_library(moeroute_faces OBJECT "${source}/moeroute.cpp")
target_compile_features(moeroute_faces PRIVATE cxx_std_20)
target_compile_definitions(moeroute_faces PRIVATE "MOEROUTE_SETS=${list}")
target_compile_options(moeroute_faces PRIVATE ${anywhere} -fvisibility=hidden -fvisibility-inlines-hidden)
target_include_directories(moeroute_faces PRIVATE "${PROJECT_SOURCE_DIR}/include")
set_target_properties(moeroute_faces PROPERTIES POSITION_INDEPENDENT_CODE ON)

foreach(kind IN ITEMS static shared)
  string(TOUPPER ${kind} upper)
  add_library(moeroute_compiled_${kind} ${upper} $<TARGET_OBJECTS:moeroute_faces> ${joined})
  add_library(moeroute::compiled_${kind} ALIAS moeroute_compiled_${kind})
  add_dependencies(moeroute_compiled_${kind} moeroute_joined)
  target_include_directories(
    moeroute_compiled_${kind} PUBLIC "$<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>"
                                     "$<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>")
  set_target_properties(
    moeroute_compiled_${kind}
    PROPERTIES OUTPUT_NAME moeroute
               EXPORT_NAME compiled_${kind}
               POSITION_INDEPENDENT_CODE ON
               VERSION ${PROJECT_VERSION}
               SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}
               LINKER_LANGUAGE CXX)
endforeach()

# The one that a user names.
add_library(moeroute_compiled INTERFACE)
add_library(moeroute::compiled ALIAS moeroute_compiled)
set_target_properties(moeroute_compiled PROPERTIES EXPORT_NAME compiled)
if(BUILD_SHARED_LIBS)
  target_link_libraries(moeroute_compiled INTERFACE moeroute_compiled_shared)
else()
  target_link_libraries(moeroute_compiled INTERFACE moeroute_compiled_static)
endif()

# moeroute_add_dispatch(<target>): the target may include <moeroute_dispatch.hpp> and routes with the
# best instruction set of the machine it runs on, whatever the target itself is built for.
#
# The kernels are compiled once per instruction set. An inline function that two objects share by name is kept
# once by the linker, from whichever object comes first, so it could hold instructions that the machine lacks;
# therefore every symbol of such an object but its table is made local. Linux, with binutils.
set(MOEROUTE_DISPATCH_DIR "${CMAKE_CURRENT_LIST_DIR}/dispatch" CACHE INTERNAL "")

function(moeroute_add_dispatch target)
  set(sets baseline)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
    list(APPEND sets avx2 avx512)
  endif()
  set(flags_baseline "")
  set(flags_avx2 -mavx2 -mfma -mbmi -mbmi2 -mf16c)
  set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd)

  # A machine must have what the kernels are compiled for: pick.cpp asks it for each of the flags.
  file(READ "${MOEROUTE_DISPATCH_DIR}/pick.cpp" asked)
  foreach(flag IN LISTS flags_avx2 flags_avx512)
    string(REPLACE "-m" "" feature "${flag}")
    if(NOT asked MATCHES "__builtin_cpu_supports\\(\"${feature}\"\\)|has_${feature}\\(\\)")
      message(FATAL_ERROR "moeroute: kernels are compiled with ${flag}, but pick.cpp does not ask for ${feature}")
    endif()
  endforeach()

  if(NOT TARGET moeroute_dispatch)
    # Whatever links the program: only GNU's linker lets go of the groups that share functions.
    find_program(MOEROUTE_LD NAMES ld.bfd ld REQUIRED)
    mark_as_advanced(MOEROUTE_LD)
    add_library(moeroute_dispatch STATIC "${MOEROUTE_DISPATCH_DIR}/pick.cpp")
    target_include_directories(moeroute_dispatch PUBLIC "${MOEROUTE_DISPATCH_DIR}")
    target_link_libraries(moeroute_dispatch PUBLIC moeroute::moeroute)
    foreach(set IN LISTS sets)
      set(object moeroute_kernels_${set})
      add_library(${object} OBJECT "${MOEROUTE_DISPATCH_DIR}/kernels.cpp")
      target_compile_definitions(${object} PRIVATE MOEROUTE_DISPATCH_ISA=${set})
      target_compile_options(${object} PRIVATE ${flags_${set}} -fno-lto $<$<CXX_COMPILER_ID:GNU>:-fno-gnu-unique>)
      target_link_libraries(${object} PRIVATE moeroute::moeroute)
      set_target_properties(${object} PROPERTIES POSITION_INDEPENDENT_CODE ON)
      set(local "${CMAKE_CURRENT_BINARY_DIR}/${object}.o")
      add_custom_command(
        OUTPUT "${local}"
        COMMAND "${MOEROUTE_LD}" -r --force-group-allocation -o "${local}.joined" "$<TARGET_OBJECTS:${object}>"
        COMMAND "${CMAKE_OBJCOPY}" --keep-global-symbol=${object} "${local}.joined" "${local}"
        DEPENDS ${object} "$<TARGET_OBJECTS:${object}>"
        COMMENT "Keeping the kernels for ${set} to themselves"
        VERBATIM)
      set_source_files_properties("${local}" PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
      target_sources(moeroute_dispatch PRIVATE "${local}")
    endforeach()
  endif()
  target_link_libraries(${target} PRIVATE moeroute_dispatch)
endfunction()

# moeroute::moeroute, the headers; moeroute::openmp, the same with OpenMP on; moeroute::tbb, with oneTBB;
# moeroute::json, with nlohmann-json; moeroute::mpi, with MPI.
#
# A header that needs an optional third party belongs to the target that brings it, so that every
# target's headers compile alone (all_verify_interface_header_sets).
set(base "${PROJECT_SOURCE_DIR}/include")
file(GLOB_RECURSE headers CONFIGURE_DEPENDS "${base}/moeroute/*.hpp")
set(openmp_headers ${headers})
list(FILTER openmp_headers INCLUDE REGEX "/exec/openmp\\.hpp$")
set(tbb_headers ${headers})
list(FILTER tbb_headers INCLUDE REGEX "/exec/tbb\\.hpp$")
set(json_headers ${headers})
list(FILTER json_headers INCLUDE REGEX "/moeroute/json/")
set(mpi_headers ${headers})
list(FILTER mpi_headers INCLUDE REGEX "/moeroute/mpi/")
list(FILTER headers EXCLUDE REGEX "/exec/(openmp|tbb)\\.hpp$|/moeroute/(json|mpi)/")

add_library(moeroute INTERFACE)
add_library(moeroute::moeroute ALIAS moeroute)
target_compile_features(moeroute INTERFACE cxx_std_20)
target_link_libraries(moeroute INTERFACE Eigen3::Eigen xsimd)
# base/config.hpp says why.
target_compile_options(
  moeroute INTERFACE "$<$<AND:$<PLATFORM_ID:Windows>,$<CXX_COMPILER_ID:GNU>>:-fno-ipa-ra;-DMOEROUTE_NO_IPA_RA>")
target_sources(moeroute INTERFACE FILE_SET HEADERS BASE_DIRS "${base}" FILES ${headers})

add_library(moeroute_openmp INTERFACE)
add_library(moeroute::openmp ALIAS moeroute_openmp)
set_target_properties(moeroute_openmp PROPERTIES EXPORT_NAME openmp)
target_link_libraries(moeroute_openmp INTERFACE moeroute OpenMP::OpenMP_CXX)
target_sources(moeroute_openmp INTERFACE FILE_SET HEADERS BASE_DIRS "${base}" FILES ${openmp_headers})
set_target_properties(moeroute_openmp PROPERTIES VERIFY_INTERFACE_HEADER_SETS "${OpenMP_CXX_FOUND}")

add_library(moeroute_tbb INTERFACE)
add_library(moeroute::tbb ALIAS moeroute_tbb)
set_target_properties(moeroute_tbb PROPERTIES EXPORT_NAME tbb)
target_link_libraries(moeroute_tbb INTERFACE moeroute TBB::tbb)
target_sources(moeroute_tbb INTERFACE FILE_SET HEADERS BASE_DIRS "${base}" FILES ${tbb_headers})
set_target_properties(moeroute_tbb PROPERTIES VERIFY_INTERFACE_HEADER_SETS "${TBB_FOUND}")

add_library(moeroute_json INTERFACE)
add_library(moeroute::json ALIAS moeroute_json)
set_target_properties(moeroute_json PROPERTIES EXPORT_NAME json)
target_link_libraries(moeroute_json INTERFACE moeroute nlohmann_json::nlohmann_json)
target_sources(moeroute_json INTERFACE FILE_SET HEADERS BASE_DIRS "${base}" FILES ${json_headers})
if(NOT TARGET nlohmann_json::nlohmann_json)
  set_target_properties(moeroute_json PROPERTIES VERIFY_INTERFACE_HEADER_SETS OFF)
endif()

add_library(moeroute_mpi INTERFACE)
add_library(moeroute::mpi ALIAS moeroute_mpi)
set_target_properties(moeroute_mpi PROPERTIES EXPORT_NAME mpi)
target_link_libraries(moeroute_mpi INTERFACE moeroute MPI::MPI_C)
target_sources(moeroute_mpi INTERFACE FILE_SET HEADERS BASE_DIRS "${base}" FILES ${mpi_headers})
if(NOT TARGET MPI::MPI_C)
  set_target_properties(moeroute_mpi PROPERTIES VERIFY_INTERFACE_HEADER_SETS OFF)
endif()

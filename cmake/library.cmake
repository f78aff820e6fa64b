# moeroute::moeroute, the headers; moeroute::openmp, the same with OpenMP on; moeroute::tbb, with oneTBB.
#
# A header that needs an optional third party belongs to the target that brings it, so that every
# target's headers compile alone (all_verify_interface_header_sets).
set(base "${PROJECT_SOURCE_DIR}/include")
file(GLOB_RECURSE headers CONFIGURE_DEPENDS "${base}/moeroute/*.hpp")
set(openmp_headers ${headers})
list(FILTER openmp_headers INCLUDE REGEX "/exec/openmp\\.hpp$")
set(tbb_headers ${headers})
list(FILTER tbb_headers INCLUDE REGEX "/exec/tbb\\.hpp$")
list(FILTER headers EXCLUDE REGEX "/exec/(openmp|tbb)\\.hpp$")

add_library(moeroute INTERFACE)
add_library(moeroute::moeroute ALIAS moeroute)
target_compile_features(moeroute INTERFACE cxx_std_20)
target_link_libraries(moeroute INTERFACE Eigen3::Eigen xsimd)
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

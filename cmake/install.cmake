include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package_dir "${CMAKE_INSTALL_DATADIR}/cmake/moeroute")
install(TARGETS moeroute moeroute_openmp moeroute_tbb EXPORT moeroute FILE_SET HEADERS)
install(
  EXPORT moeroute
  NAMESPACE moeroute::
  FILE moeroute-targets.cmake
  DESTINATION "${package_dir}")

configure_package_config_file(cmake/moeroute-config.cmake.in moeroute-config.cmake
                              INSTALL_DESTINATION "${package_dir}")
# Headers have no architecture: a package made on one machine serves every other.
write_basic_package_version_file(moeroute-config-version.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/moeroute-config.cmake" "${PROJECT_BINARY_DIR}/moeroute-config-version.cmake"
        DESTINATION "${package_dir}")
install(FILES cmake/dispatch.cmake DESTINATION "${package_dir}")
install(DIRECTORY cmake/dispatch DESTINATION "${package_dir}")
install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DOCDIR}")

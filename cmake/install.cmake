include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package_dir "${CMAKE_INSTALL_DATADIR}/cmake/moeroute")
install(TARGETS moeroute moeroute_openmp moeroute_tbb moeroute_json EXPORT moeroute FILE_SET HEADERS)
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

configure_file(cmake/moeroute.pc.in moeroute.pc @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/moeroute.pc" DESTINATION "${CMAKE_INSTALL_DATADIR}/pkgconfig")

# cpack -G DEB
if(PROJECT_IS_TOP_LEVEL)
  set(CPACK_GENERATOR DEB)
  set(CPACK_PACKAGE_CONTACT "The moeroute authors <moeroute@localhost>")
  set(CPACK_PACKAGE_VENDOR moeroute)
  set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "${PROJECT_DESCRIPTION}")
  set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
  set(CPACK_DEBIAN_PACKAGE_NAME libmoeroute-dev)
  set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
  set(CPACK_DEBIAN_PACKAGE_ARCHITECTURE all)
  set(CPACK_DEBIAN_PACKAGE_SECTION libdevel)
  # xsimd 13 is in Debian from 13 on; before, it comes from elsewhere.
  set(CPACK_DEBIAN_PACKAGE_DEPENDS "libeigen3-dev (>= 3.4)")
  set(CPACK_DEBIAN_PACKAGE_RECOMMENDS "libxsimd-dev (>= 13)")
  include(CPack)
endif()

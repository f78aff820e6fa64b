# What `cmake --install` puts where, in three components:
#
#   headers   the header library, its CMake package and moeroute.pc
#   compiled  moeroute::compiled and moeroute-compiled.pc, where MOEROUTE_BUILD_COMPILED is on
#   laws      the laws of routers and what they need, to hold a router of one's own to
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package_dir "${CMAKE_INSTALL_DATADIR}/cmake/moeroute")
set(pc_dir "${CMAKE_INSTALL_DATADIR}/pkgconfig")
set(CMAKE_INSTALL_DEFAULT_COMPONENT_NAME headers)

install(TARGETS moeroute moeroute_openmp moeroute_tbb moeroute_json moeroute_mpi EXPORT moeroute FILE_SET HEADERS)
install(FILES include/moeroute.h DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
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
install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DOCDIR}")

# moeroute.pc. What Eigen's own file adds by -I is warned about in its headers; a folder that is named by
# -isystem as well is a system folder to g++ and clang. xsimd has no such file everywhere.
option(MOEROUTE_PC_FOLDERS "Write into moeroute.pc where Eigen and xsimd were found; off for packages" ON)
set(pc_system "")
if(MOEROUTE_PC_FOLDERS)
  foreach(target IN ITEMS Eigen3::Eigen xsimd)
    get_target_property(folders ${target} INTERFACE_INCLUDE_DIRECTORIES)
    foreach(folder IN LISTS folders)
      string(REGEX REPLACE "^\\$<[A-Z_]+:(.*)>$" "\\1" folder "${folder}")
      # The compiler's own folders must not be named again: their order is theirs.
      if(IS_ABSOLUTE "${folder}" AND NOT folder MATCHES "^/usr(/local)?/include/?$")
        string(APPEND pc_system " -isystem ${folder}")
      endif()
    endforeach()
  endforeach()
endif()
configure_file(cmake/moeroute.pc.in moeroute.pc @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/moeroute.pc" DESTINATION "${pc_dir}")

if(MOEROUTE_BUILD_COMPILED)
  install(TARGETS moeroute_compiled moeroute_compiled_static moeroute_compiled_shared
          EXPORT moeroute_compiled
          LIBRARY COMPONENT compiled
          ARCHIVE COMPONENT compiled)
  install(
    EXPORT moeroute_compiled
    NAMESPACE moeroute::
    FILE moeroute-compiled-targets.cmake
    DESTINATION "${package_dir}"
    COMPONENT compiled)
  file(RELATIVE_PATH pc_to_prefix "/${CMAKE_INSTALL_LIBDIR}" "/")
  configure_file(cmake/moeroute-compiled.pc.in moeroute-compiled.pc @ONLY)
  install(FILES "${PROJECT_BINARY_DIR}/moeroute-compiled.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig"
          COMPONENT compiled)
endif()

# A recipe may bring the library without its tests.
if(EXISTS "${PROJECT_SOURCE_DIR}/tests/laws")
  install(
    DIRECTORY tests/laws tests/oracle tests/support
    DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/moeroute-laws"
    COMPONENT laws
    FILES_MATCHING
    PATTERN "*.hpp")
endif()

# cpack -G DEB, one package per component
if(PROJECT_IS_TOP_LEVEL)
  set(CPACK_GENERATOR DEB)
  set(CPACK_PACKAGE_CONTACT "The moeroute authors <moeroute@localhost>")
  set(CPACK_PACKAGE_VENDOR moeroute)
  set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "${PROJECT_DESCRIPTION}")
  set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
  set(CPACK_DEB_COMPONENT_INSTALL ON)
  set(CPACK_COMPONENTS_ALL headers)
  set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
  set(CPACK_DEBIAN_PACKAGE_SECTION libdevel)
  set(CPACK_DEBIAN_HEADERS_PACKAGE_NAME libmoeroute-dev)
  set(CPACK_DEBIAN_HEADERS_PACKAGE_ARCHITECTURE all)
  # Not depended on: who links the compiled library needs neither, and has its faces and the CMake package
  # from here. xsimd 13 is in Debian from 13 on; before, it comes from elsewhere.
  set(CPACK_DEBIAN_HEADERS_PACKAGE_RECOMMENDS "libeigen3-dev (>= 3.4), libxsimd-dev (>= 13)")
  if(MOEROUTE_BUILD_COMPILED)
    list(APPEND CPACK_COMPONENTS_ALL compiled)
    set(CPACK_DEBIAN_COMPILED_PACKAGE_NAME libmoeroute-compiled-dev)
    set(CPACK_DEBIAN_COMPILED_PACKAGE_DEPENDS "libmoeroute-dev (= ${PROJECT_VERSION}), libc6, libstdc++6 (>= 12)")
    set(CPACK_DEBIAN_COMPILED_PACKAGE_SHLIBDEPS OFF)
  endif()
  include(CPack)
endif()

# An overlay port that packages the checkout it lies in; never run by the project's checks, which
# hold its version equal to CMakeLists.txt.
get_filename_component(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)

set(VCPKG_BUILD_TYPE release) # headers only
vcpkg_cmake_configure(
  SOURCE_PATH "${SOURCE_PATH}"
  OPTIONS -DMOEROUTE_BUILD_TESTS=OFF -DMOEROUTE_BUILD_BENCH=OFF -DMOEROUTE_BUILD_EXAMPLES=OFF -DMOEROUTE_INSTALL=ON)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(PACKAGE_NAME moeroute CONFIG_PATH share/cmake/moeroute)
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")

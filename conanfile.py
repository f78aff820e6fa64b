"""Conan recipe. Its version is held equal to CMakeLists.txt by tools/lint; it was never run by the project's checks."""

from conan import ConanFile
from conan.tools.build import check_min_cppstd
from conan.tools.cmake import CMake, CMakeToolchain, cmake_layout


class Moeroute(ConanFile):
    name = "moeroute"
    version = "0.2.0"
    license = "MIT"
    description = "Mixture-of-experts routing kernels for CPUs"
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    exports_sources = "CMakeLists.txt", "LICENSE", "cmake/*", "include/*"
    generators = "CMakeDeps"
    no_copy_source = True

    def requirements(self):
        self.requires("eigen/3.4.0", transitive_headers=True)
        self.requires("xsimd/13.2.0", transitive_headers=True)

    def validate(self):
        check_min_cppstd(self, 20)

    def layout(self):
        cmake_layout(self)

    def generate(self):
        toolchain = CMakeToolchain(self)
        for part in ("TESTS", "BENCH", "EXAMPLES"):
            toolchain.cache_variables[f"MOEROUTE_BUILD_{part}"] = False
        toolchain.cache_variables["MOEROUTE_INSTALL"] = True
        toolchain.generate()

    def package(self):
        cmake = CMake(self)
        cmake.configure()
        cmake.install()

    def package_id(self):
        self.info.clear()

    def package_info(self):
        # The package brings its own CMake files.
        self.cpp_info.bindirs = []
        self.cpp_info.libdirs = []
        self.cpp_info.builddirs = ["share/cmake/moeroute"]
        self.cpp_info.set_property("cmake_find_mode", "none")

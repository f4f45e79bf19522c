# Everything comes from Debian 12 packages (cmake/setup.sh lists them); nothing is downloaded.
# What is missing is collected and reported at once, by the name apt knows it by.
set(_missing "")

macro(_need found library apt)
  if(NOT ${found})
    string(APPEND _missing "\n  ${library}: Debian package ${apt}")
  endif()
endmacro()

set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)

find_package(OpenSSL QUIET)
_need(OpenSSL_FOUND "OpenSSL" libssl-dev)
find_package(CAF 0.17 QUIET COMPONENTS core io openssl)
_need(CAF_FOUND "CAF 0.17 (core, io, openssl)" libcaf-dev)
find_package(Protobuf QUIET)
_need(Protobuf_FOUND "Protobuf" libprotobuf-dev)
_need(Protobuf_PROTOC_EXECUTABLE "protoc" protobuf-compiler)
find_package(Boost 1.81 QUIET COMPONENTS json)
_need(Boost_FOUND "Boost 1.81 (headers, json)" libboost-json1.81-dev)
find_package(ucx QUIET)
_need(ucx_FOUND "UCX" libucx-dev)
find_package(CLI11 QUIET)
_need(CLI11_FOUND "CLI11" libcli11-dev)
find_package(fmt QUIET)
_need(fmt_FOUND "fmt" libfmt-dev)
find_package(spdlog QUIET)
_need(spdlog_FOUND "spdlog" libspdlog-dev)
find_package(doctest QUIET)
_need(doctest_FOUND "doctest" doctest-dev)
find_package(hwy QUIET)
_need(hwy_FOUND "Highway" libhwy-dev)

find_package(PkgConfig QUIET)
_need(PkgConfig_FOUND "pkg-config" pkg-config)
if(PkgConfig_FOUND)
  pkg_check_modules(PCRE2 QUIET IMPORTED_TARGET libpcre2-8)
  _need(PCRE2_FOUND "PCRE2" libpcre2-dev)
  pkg_check_modules(XXHASH QUIET IMPORTED_TARGET libxxhash)
  _need(XXHASH_FOUND "xxHash" libxxhash-dev)
endif()

if(_missing)
  message(FATAL_ERROR "These libraries were not found:${_missing}\n"
    "Install the packages with apt-get, or run apps/quickstart, which does.")
endif()

# oneDNN, the peer the benchmarks compare with; nothing else uses it. Debian's own package file
# insists on OpenCL headers, which the CPU engine never needs, so the library is found by name.
find_path(DNNL_INCLUDE_DIR oneapi/dnnl/dnnl.hpp)
find_library(DNNL_LIBRARY dnnl)
mark_as_advanced(DNNL_INCLUDE_DIR DNNL_LIBRARY)
if(DNNL_INCLUDE_DIR AND DNNL_LIBRARY)
  add_library(DNNL::dnnl UNKNOWN IMPORTED)
  set_target_properties(DNNL::dnnl PROPERTIES
    IMPORTED_LOCATION ${DNNL_LIBRARY} INTERFACE_INCLUDE_DIRECTORIES ${DNNL_INCLUDE_DIR})
endif()

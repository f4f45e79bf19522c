# Decides whether the CUDA plug-in is built. Sets TROUPE_CUDA_ENABLED.
#
# AUTO builds it where a working nvcc is found, ON insists on one, OFF never looks. Nothing but the
# plug-in (kernels/cuda) is compiled by nvcc, and nothing links it: the program finds it at run time.
if(NOT TROUPE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "TROUPE_CUDA is '${TROUPE_CUDA}', expected AUTO, ON or OFF")
endif()
set(TROUPE_CUDA_ENABLED OFF)
if(TROUPE_CUDA STREQUAL "OFF")
  return()
endif()

# CMake 3.25 knows no CUDA20, so device code stays at C++17. These come before the language is
# enabled, because enabling it reads them.
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80 90)  # A100, H100/H200; newer GPUs compile the PTX of 90
endif()

# A compiler that was missing at the last configure may have come since.
if(DEFINED CMAKE_CUDA_COMPILER AND NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE)
endif()
find_program(TROUPE_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
  PATH_SUFFIXES bin)
mark_as_advanced(TROUPE_NVCC)
if(TROUPE_NVCC OR DEFINED ENV{CUDACXX} OR CMAKE_CUDA_COMPILER)
  if(TROUPE_NVCC AND NOT DEFINED ENV{CUDACXX} AND NOT DEFINED CMAKE_CUDA_COMPILER)
    set(ENV{CUDACXX} ${TROUPE_NVCC})
  endif()
  include(CheckLanguage)
  check_language(CUDA)
endif()

if(CMAKE_CUDA_COMPILER)
  set(TROUPE_CUDA_ENABLED ON)
  message(STATUS "CUDA plug-in: built with ${CMAKE_CUDA_COMPILER}")
elseif(TROUPE_CUDA STREQUAL "ON")
  message(FATAL_ERROR "TROUPE_CUDA=ON needs a working nvcc (CUDA 12 or later), and none was found; "
    "put it on PATH or set CUDACXX, or use TROUPE_CUDA=AUTO or OFF")
else()
  message(STATUS "CUDA plug-in: not built, no working nvcc found")
endif()

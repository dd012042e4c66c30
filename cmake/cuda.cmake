# Finds nvcc and chooses architectures. Nothing here looks at torch: the kernels are compiled for
# the toolkit that is there, and the runtime is linked statically.
#
# Sets SOCO_HAS_CUDA, SOCO_CUDA_VERSION (empty without CUDA), SOCO_CUDA_ABSENT (why there is none)
# and SOCO_CUDA_ARCHITECTURES.

set(SOCO_CUDA AUTO CACHE STRING "CUDA kernels: AUTO (when nvcc is found), ON or OFF")
set_property(CACHE SOCO_CUDA PROPERTY STRINGS AUTO ON OFF)
if(NOT SOCO_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "SOCO_CUDA must be AUTO, ON or OFF, got '${SOCO_CUDA}'")
endif()

set(SOCO_HAS_CUDA OFF)
set(SOCO_CUDA_VERSION "")
set(SOCO_CUDA_ABSENT "")
set(SOCO_CUDA_ARCHITECTURES "")

if(SOCO_CUDA STREQUAL "OFF")
  set(SOCO_CUDA_ABSENT "built with SOCO_CUDA=OFF")
  return()
endif()

# The user's choice may come from the environment, which is all that `pip install` passes on easily.
if(NOT CMAKE_CUDA_ARCHITECTURES AND DEFINED ENV{CMAKE_CUDA_ARCHITECTURES})
  set(CMAKE_CUDA_ARCHITECTURES "$ENV{CMAKE_CUDA_ARCHITECTURES}" CACHE STRING "As CMake writes them")
endif()
# enable_language would fill in a default of its own: note first whether the user chose.
set(user_chose OFF)
if(CMAKE_CUDA_ARCHITECTURES OR DEFINED ENV{CUDAARCHS})
  set(user_chose ON)
else()
  unset(CMAKE_CUDA_ARCHITECTURES)
  unset(CMAKE_CUDA_ARCHITECTURES CACHE)
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  find_program(SOCO_NVCC nvcc NO_DEFAULT_PATH PATHS ENV PATH)
  if(SOCO_NVCC)
    set(SOCO_CUDA_ABSENT "nvcc was found at build time but could not compile")
  else()
    set(SOCO_CUDA_ABSENT "no nvcc was found at build time")
  endif()
  if(SOCO_CUDA STREQUAL "ON")
    message(FATAL_ERROR "SOCO_CUDA=ON, but ${SOCO_CUDA_ABSENT}")
  endif()
  if(SOCO_NVCC)
    message(WARNING "${SOCO_CUDA_ABSENT}: building without CUDA kernels")
  endif()
  return()
endif()

enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
if(NOT user_chose)
  # Machine code for these, and PTX of the newest for what comes after it. Into the cache, in the
  # place of enable_language's default: the next run in this build folder would take that for a
  # choice of the user.
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 89-real 90-real 100 CACHE STRING "" FORCE)
  elseif(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 11.8)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 89-real 90 CACHE STRING "" FORCE)
  else()
    message(FATAL_ERROR "soco needs CUDA 11.8 or newer, found ${CMAKE_CUDA_COMPILER_VERSION}; "
                        "SOCO_CUDA=OFF builds without it")
  endif()
endif()
set(SOCO_HAS_CUDA ON)
set(SOCO_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
set(SOCO_CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")

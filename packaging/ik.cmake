# Included by CMake when ik-llama-cpp-python is compiled (packaging/wheel.sh).
set(GGML_NATIVE ON CACHE BOOL "" FORCE)
# Install into the package's own folder: outside of it, files of the same names belong to llama-cpp-python.
set(CMAKE_INSTALL_LIBDIR ik_llama_cpp/lib CACHE PATH "")
set(CMAKE_INSTALL_BINDIR ik_llama_cpp/bin CACHE PATH "")
set(CMAKE_INSTALL_INCLUDEDIR ik_llama_cpp/include CACHE PATH "")
# libllama finds libggml in the same folder.
if(APPLE)
    set(CMAKE_INSTALL_RPATH "@loader_path")
else()
    set(CMAKE_INSTALL_RPATH "$ORIGIN")
endif()
# GCC emits about a hundred thousand warnings for its own headers.
add_compile_options(-w)
# The source distribution 0.1.5 lacks the script that writes build-info.cpp; without it the build fails.
set(script "${CMAKE_SOURCE_DIR}/vendor/ik_llama.cpp/common/cmake/build-info-gen-cpp.cmake")
if(NOT EXISTS "${script}")
    file(WRITE "${script}" [=[
include("${CMAKE_CURRENT_LIST_DIR}/../../cmake/build-info.cmake")
set(stem "${CMAKE_CURRENT_LIST_DIR}/../build-info.cpp")
configure_file("${stem}.in" "${stem}" @ONLY)
]=])
endif()

# Included by llama-cpp-python's CMake project (see wheel.sh).
# A normal variable overrides the cache entry that the project forces. llama.cpp's common library would take a
# third of the compile time, and is not used here.
set(LLAMA_BUILD_COMMON OFF)
# pip unpacks the source in a new folder each time, and ggml's assertions contain paths.
# GCC 12 emits about ten thousand warnings for its own headers.
add_compile_options(-w "-ffile-prefix-map=${CMAKE_SOURCE_DIR}=llama-cpp-python")
# GCC does not know that _tile_loadconfig reads memory: it removes the stores that fill the tile configuration, and
# the first product of several rows faults on every processor with AMX (ggml-org/llama.cpp, pull request 26954).
# Deferred to the end of the top-level folder, when ggml's folder is known.
function(edgespec_keep_tile_stores)
    set(folder "${CMAKE_SOURCE_DIR}/vendor/llama.cpp/ggml/src")
    set(file "${folder}/ggml-cpu/amx/mmq.cpp")
    if(NOT EXISTS "${file}")
        message(FATAL_ERROR "ggml-cpu/amx/mmq.cpp has moved: check the flags for AMX")
    endif()
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        set_property(SOURCE "${file}" DIRECTORY "${folder}" APPEND PROPERTY COMPILE_OPTIONS -fno-tree-dse -fno-dse)
    endif()
endfunction()
cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL edgespec_keep_tile_stores)

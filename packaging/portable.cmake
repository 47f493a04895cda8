# Read by llama-cpp-python's CMake project for the wheel in the binary (see wheel.sh).
# A plain variable wins over the cache entry that the project forces: llama.cpp's helpers for its own programs
# would take a third of the compile time, and nothing here calls them.
set(LLAMA_BUILD_COMMON OFF)
# pip unpacks the source in a new folder each time, and ggml's assertions name their files.
add_compile_options("-ffile-prefix-map=${CMAKE_SOURCE_DIR}=llama-cpp-python")

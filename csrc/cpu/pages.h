// Large pages for outputs.
#pragma once
#include <cstdint>

namespace soco::cpu {

// Asks for large pages behind memory that is about to be written, on Linux and from a few of them
// on. Most of what it takes to fill fresh memory is that each of its pages is handed out by itself:
// 64 MB were written in 10 ms so, instead of 22. It may have been in use before: then nothing
// happens.
void use_large_pages(void* memory, int64_t bytes);

}  // namespace soco::cpu

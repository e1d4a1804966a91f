// What goes wrong in C++, told to Rust.

#pragma once

#include <cstring>
#include <exception>

// Runs `work`; what it throws comes back as text that the caller frees, else null.
template <typename Work>
char* told(const Work& work) {
  try {
    work();
    return nullptr;
  } catch (const std::exception& e) {
    return strdup(e.what());
  }
}

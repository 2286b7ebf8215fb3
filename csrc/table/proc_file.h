// Lines of a file of /proc, without iostreams (see common/text.h).
#pragma once

#include <cstdio>
#include <cstdlib>
#include <memory>

namespace engram_kernels {

// Calls body(line) for each line until it returns false. Returns whether the file could be opened.
template <class Body>
bool for_each_line(const char* path, const Body& body) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "re"), &std::fclose);
  if (file == nullptr) return false;
  char* line = nullptr;
  size_t room = 0;
  while (getline(&line, &room, file.get()) > 0 && body(line)) {
  }
  std::free(line);
  return true;
}

}  // namespace engram_kernels

// Objects with threads: a child after a fork has their memory and not their threads, so only the process that made one ends it.
#pragma once

#include <unistd.h>

#include <memory>
#include <utility>

namespace engram_kernels {

// In another process than this one the object is left as it is.
template <class T, class... Args>
std::shared_ptr<T> make_process_owned(Args&&... args) {
  return std::shared_ptr<T>(new T(std::forward<Args>(args)...), [process = getpid()](T* object) {
    if (getpid() == process) delete object;
  });
}

}  // namespace engram_kernels

// What a file looks like from outside, to see later whether it was written to.
#pragma once

#include <cstdint>

namespace engram_kernels {

struct FileState {
  int64_t size, changed_ns;
};

// 0, or errno.
int file_state(int fd, FileState* state);

// The same, such that every later write shows. Most kernels stamp writes with the time of the last clock tick (up to 10 ms ago),
// so two writes within a tick look alike: a file that was changed in this tick is looked at again when the tick is over. A stamp
// of the future, as of another machine's clock, is taken as it is.
int settled_file_state(int fd, FileState* state);

}  // namespace engram_kernels

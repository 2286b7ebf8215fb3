#include "table/file_state.h"

#include <sys/stat.h>
#include <time.h>

#include <cerrno>

namespace engram_kernels {
namespace {

constexpr int kMaxLooks = 50;  // a millisecond apart
constexpr int64_t kNsPerS = 1'000'000'000;

int64_t nanoseconds(const timespec& time) { return int64_t{time.tv_sec} * kNsPerS + time.tv_nsec; }

}  // namespace

int file_state(int fd, FileState* state) {
  struct stat info;
  if (fstat(fd, &info) != 0) return errno;
  *state = {info.st_size, nanoseconds(info.st_mtim)};
  return 0;
}

int settled_file_state(int fd, FileState* state) {
  for (int look = 0; look < kMaxLooks; ++look) {
    const int error = file_state(fd, state);
    if (error != 0) return error;
    timespec tick;  // what a write would be stamped with
    clock_gettime(CLOCK_REALTIME_COARSE, &tick);
    if (state->changed_ns < nanoseconds(tick) || state->changed_ns > nanoseconds(tick) + kNsPerS) return 0;
    const timespec pause{0, 1'000'000};
    nanosleep(&pause, nullptr);
  }
  return 0;
}

}  // namespace engram_kernels

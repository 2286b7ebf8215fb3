#include "memory/file_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "common/error.h"

namespace engram_kernels {
namespace {

constexpr int64_t kRowsPerThread = 64;               // about 100 us of cached reads: worth starting a thread for
constexpr int64_t kMaxReadBytes = int64_t{8} << 20;  // of consecutive rows in one call

#define EK_THROW_READ(error, msg)              \
  do {                                         \
    std::ostringstream ek_os;                  \
    ek_os << msg;                              \
    throw FileReadError((error), ek_os.str()); \
  } while (0)

struct FileState {
  int64_t size, changed_ns;
};

FileState state_of(int fd, const std::string& path) {
  struct stat info;
  if (fstat(fd, &info) != 0) EK_THROW_READ(errno, path << ": fstat failed: " << std::strerror(errno));
  return {info.st_size, int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec};
}

}  // namespace

FileReader::FileReader(int fd, std::string path, int max_threads) : path_(std::move(path)), max_threads_(max_threads) {
  EK_CHECK(max_threads >= 1, "FileReader: max_threads is " << max_threads << ", expected at least 1");
  const FileState state = state_of(fd, path_);
  fd_ = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (fd_ < 0) EK_THROW_READ(errno, path_ << ": the descriptor cannot be duplicated: " << std::strerror(errno));
  size_ = state.size;
  changed_ns_ = state.changed_ns;
}

FileReader::~FileReader() {
  if (fd_ >= 0) close(fd_);
}

void FileReader::read_rows(const FileRows& rows, const int64_t* row_ids, int64_t count, std::byte* out) const {
  EK_CHECK(rows.offset >= 0 && rows.row_bytes >= 0 && rows.stride_bytes >= rows.row_bytes && rows.num_rows >= 0 &&
               (rows.num_rows == 0 || rows.stride_bytes <= (size_ - rows.offset) / rows.num_rows),
           "FileReader: " << rows.num_rows << " rows of " << rows.stride_bytes << " bytes from byte " << rows.offset
                          << " are not inside " << path_ << " of " << size_ << " bytes");
  for (int64_t i = 0; i < count; ++i) {
    EK_CHECK_INDEX(row_ids[i] >= 0 && row_ids[i] < rows.num_rows,
                   "FileReader: row_ids[" << i << "] is " << row_ids[i] << ", expected [0, " << rows.num_rows << ")");
  }
  const int64_t parts = std::clamp<int64_t>(count / kRowsPerThread, 1, max_threads_);
  std::vector<std::exception_ptr> errors(static_cast<size_t>(parts));
  const auto read_part = [&](int64_t part) {
    try {
      read_range(rows, row_ids, count * part / parts, count * (part + 1) / parts, out);
    } catch (...) {
      errors[static_cast<size_t>(part)] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(parts));
  int64_t started = 1;  // part 0 is the caller's
  try {
    for (; started < parts; ++started) threads.emplace_back(read_part, started);
  } catch (const std::system_error&) {
    // no more threads to be had: the caller reads what is left
  }
  read_part(0);
  for (int64_t part = started; part < parts; ++part) read_part(part);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);  // the first by position
  }
  check_unchanged();
}

void FileReader::read_range(const FileRows& rows, const int64_t* row_ids, int64_t begin, int64_t end, std::byte* out) const {
  const bool dense = rows.stride_bytes == rows.row_bytes && rows.row_bytes > 0;
  for (int64_t i = begin; i < end;) {
    int64_t run = 1;
    while (dense && i + run < end && row_ids[i + run] == row_ids[i] + run && (run + 1) * rows.row_bytes <= kMaxReadBytes) ++run;
    read_exactly(out + i * rows.row_bytes, run * rows.row_bytes, rows.offset + row_ids[i] * rows.stride_bytes, row_ids[i]);
    i += run;
  }
}

void FileReader::read_exactly(std::byte* to, int64_t bytes, int64_t at, int64_t row) const {
  for (int64_t done = 0; done < bytes;) {
    const ssize_t got = pread(fd_, to + done, static_cast<size_t>(bytes - done), at + done);
    if (got > 0) {
      done += got;  // a signal or a page boundary may cut a read short
    } else if (got == 0) {
      const int64_t size = state_of(fd_, path_).size;
      EK_THROW_READ(EIO, path_ << ": row " << row << " ends at byte " << at + bytes << ", but the file has " << size
                               << " bytes; it had " << size_ << " when it was opened");
    } else if (errno != EINTR) {
      const int error = errno;
      EK_THROW_READ(error, path_ << ": row " << row << " at byte " << at << " cannot be read: " << std::strerror(error));
    }
  }
}

void FileReader::check_unchanged() const {
  const FileState now = state_of(fd_, path_);
  if (now.size != size_) {
    EK_THROW_READ(EIO, path_ << ": the file has " << now.size << " bytes; it had " << size_ << " when it was opened");
  }
  if (now.changed_ns != changed_ns_) EK_THROW_READ(EIO, path_ << ": the file was written to after it was opened");
}

}  // namespace engram_kernels

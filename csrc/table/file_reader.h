// Reads rows of an open file by their index, many at a time and never through a memory map: a file that is cut short under
// a reader is an error, where a map would kill the process.
//
// Scope       positions in a file that holds rows at a fixed stride; no cache, no knowledge of formats. Each page is read once a
//             request, neighbouring pages in one read of at most kMaxReadBytes.
// Backends    io_uring, or threads that call pread where io_uring is absent or refused, whenever that shows; past the page cache
//             (O_DIRECT) into page-aligned buffers, or through it where the file system refuses that. Where there is no
//             descriptor for one more io_uring, a read waits for a queue of another.
// Ownership   descriptors of its own; the file may be renamed or deleted meanwhile: what was opened is read.
// Threads     `read` may be called from several threads at once; kMaxQueues calls read at a time, others wait. A queue has
//             queue_depth * kMaxReadBytes of buffers. After a fork the child makes queues and threads of its own.
// Failure     FileReadError; the output is then unspecified. Short reads are continued. A read of several rows that fails is
//             repeated row by row, so that the error names the row that cannot be read. A file whose size or time of change is
//             not what it was when it was opened is such a failure, found after the read and before it counts as a success;
//             opening a file that was written to in the same clock tick waits for the next.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "table/io_queue.h"

namespace engram_kernels {

// Row r lies at bytes [offset + r * stride_bytes, + row_bytes) of the file.
struct FileRows {
  int64_t offset;
  int64_t stride_bytes;
  int64_t row_bytes;
  int64_t num_rows;
};

struct FileReadError : std::runtime_error {
  FileReadError(int error, const std::string& message) : std::runtime_error(message), error_number(error) {}
  int error_number;  // errno, EIO where the file changed
};

struct FetchCancelled : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Rows of one array, and the array that they go to.
struct RowsWanted {
  FileRows rows;
  std::byte* out;
};

// Row ids[i] goes to row positions[i] of the output; positions null: to row i.
struct RowRequest {
  const int64_t* ids;
  int64_t count;
  const int64_t* positions = nullptr;
};

struct ReadCounters {
  int64_t reads = 0, moved_bytes = 0;
};

class FileReader {
 public:
  static constexpr int64_t kMaxReadBytes = 32 << 10;
  static constexpr int kMaxQueues = 8;

  // io: "auto", "io_uring", "preadv" (both past the page cache), "io_uring_buffered", "preadv_buffered". "auto" takes io_uring
  // where the system lets it, and the page cache where the file is small against the free memory (a quarter). A backend that is
  // named and cannot be had is a std::invalid_argument; "auto" falls back.
  FileReader(int fd, std::string path, int queue_depth = 64, const std::string& io = "auto");
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  // Throws std::invalid_argument unless the rows lie inside the file.
  void check(const FileRows& rows) const;

  // Fills every `wanted[..]` with the rows of the ids, which are in [0, num_rows) of each; any order, duplicates allowed.
  // `*counters` is added to; `*cancelled` is looked at between submissions. Both may be null.
  void read(const RowsWanted* wanted, int num_wanted, const RowRequest& request, ReadCounters* counters = nullptr,
            const std::atomic<bool>* cancelled = nullptr);

  // Fills `out` with `bytes` bytes from `offset` on, in large reads through the page cache. Blocks.
  void read_range(int64_t offset, int64_t bytes, std::byte* out) const;

  // FileReadError where the file is not what was opened; `row` is the one that was wanted.
  void check_unchanged(int64_t row) const;

  const char* backend() const { return use_io_uring_ ? "io_uring" : "preadv"; }
  bool direct() const { return direct_.load(std::memory_order_relaxed); }
  int queue_depth() const { return queue_depth_; }
  const std::string& path() const { return path_; }

  // From the next call on, reads go through what `wrapper` makes of each queue. Not while another call reads.
  void wrap_queues(IoQueueWrapper wrapper, void* context);

 private:
  struct Queue;
  struct Queues;
  class Request;
  Queues& queues();
  std::unique_ptr<Queue> take_queue(const std::atomic<bool>* cancelled);
  void give_queue(std::unique_ptr<Queue> queue);
  std::unique_ptr<Queue> make_queue(uint64_t number, bool io_uring, std::string* why);
  void give_up_io_uring(const std::string& why);
  void read_once(const RowsWanted* wanted, int num_wanted, const RowRequest& request, ReadCounters* counters,
                 const std::atomic<bool>* cancelled);
  void open_direct();
  void choose_backend(const std::string& io);

  int fd_ = -1, direct_fd_ = -1;
  std::string path_;
  int queue_depth_;
  int64_t size_ = 0, changed_ns_ = 0, sector_bytes_ = 4096;
  std::atomic<bool> use_io_uring_{true};
  bool any_io_ = false;  // no backend was named: preadv may take over
  std::atomic<bool> direct_{false};
  IoQueueWrapper wrapper_ = nullptr;
  void* wrapper_context_ = nullptr;
  std::atomic<Queues*> queues_{nullptr};
};

}  // namespace engram_kernels

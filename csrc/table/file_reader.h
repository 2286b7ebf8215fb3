// Reads rows of open files by their index, many at a time and never through a memory map: a file that is cut short under
// a reader is an error, where a map would kill the process.
//
// Scope       positions in files that hold rows at a fixed stride, in one part or in several that follow one another, in any of
//             the files; no cache, no knowledge of formats. Each page is read once per request, neighbouring pages of a file in
//             one read of at most kMaxReadBytes.
// Backends    io_uring, or threads that call pread where io_uring is absent or refused, whenever that shows; past the page cache
//             (O_DIRECT) into page-aligned buffers, or through it where the file system refuses that. Where there is no
//             descriptor for one more io_uring, a read waits for a queue of another. The queues serve all files.
// Ownership   descriptors of its own, one or two per file; a file may be renamed or deleted meanwhile: what was opened is read.
// Threads     `read` may be called from several threads at once; kMaxQueues calls read at a time, others wait. A queue has
//             queue_depth * kMaxReadBytes of buffers. After a fork the child makes queues and threads of its own.
// Failure     FileReadError; the output is then unspecified. Short reads are continued. A read of several rows that fails is
//             repeated row by row, so that the error names the row that cannot be read, and its file. A file that rows came from
//             and whose size or time of change is not what it was when it was opened is such a failure, found after the read and
//             before it counts as a success; opening a file that was written to in the same clock tick waits for the next.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "table/io_queue.h"

namespace engram_kernels {

// Rows from `first_row` up to the first of the next part, one behind the other from byte `offset` of a file on.
struct RowPart {
  int file;  // its number among those of the reader
  int64_t offset;
  int64_t first_row;
};

// Row r of part p lies at bytes [p.offset + (r - p.first_row) * stride_bytes, + row_bytes) of the part's file.
struct FileRows {
  int64_t stride_bytes = 0;
  int64_t row_bytes = 0;
  int64_t num_rows = 0;
  std::vector<RowPart> parts;  // ascending by first_row, the first from 0; none of them empty

  static FileRows in_one_part(int64_t offset, int64_t stride_bytes, int64_t row_bytes, int64_t num_rows) {
    return {stride_bytes, row_bytes, num_rows, {{0, offset, 0}}};
  }

  int64_t end_row(size_t part) const { return part + 1 < parts.size() ? parts[part + 1].first_row : num_rows; }

  // The part of a row in [0, num_rows). The one at `near` is looked at first, then that of parts as high as the first one.
  size_t part_of(int64_t row, size_t near) const {
    const auto holds = [&](size_t part) { return row >= parts[part].first_row && row < end_row(part); };
    if (holds(near)) return near;
    const size_t likely = std::min(static_cast<size_t>(row / end_row(0)), parts.size() - 1);
    if (holds(likely)) return likely;
    size_t low = 0, high = parts.size();  // the part is in [low, high)
    while (high - low > 1) {
      const size_t middle = (low + high) / 2;
      (parts[middle].first_row <= row ? low : high) = middle;
    }
    return low;
  }
};

struct FileReadError : std::runtime_error {
  FileReadError(int error, const std::string& message) : std::runtime_error(message), error_number(error) {}
  int error_number;  // errno, EIO where the file changed
};

struct FetchCancelled : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Rows of one array, which the caller keeps, and the array that they go to.
struct RowsWanted {
  const FileRows* rows;
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

  using NamedFile = std::pair<int, std::string>;  // a descriptor, which is duplicated, and a path for messages

  // io: "auto", "io_uring", "preadv" (both past the page cache), "io_uring_buffered", "preadv_buffered". "auto" takes io_uring
  // where the system lets it, and the page cache where the files are small against the free memory (a quarter). A backend that
  // is named and cannot be had is a std::invalid_argument; "auto" falls back.
  explicit FileReader(const std::vector<NamedFile>& files, int queue_depth = 64, const std::string& io = "auto");
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  // Throws std::invalid_argument unless the parts are in order and lie inside their files.
  void check(const FileRows& rows) const;

  // Fills every `wanted[..]` with the rows of the ids, which are in [0, num_rows) of each; any order, duplicates allowed.
  // `*counters` is added to; `*cancelled` is looked at between submissions. Both may be null.
  void read(const RowsWanted* wanted, int num_wanted, const RowRequest& request, ReadCounters* counters = nullptr,
            const std::atomic<bool>* cancelled = nullptr);

  // Fills `out` with `bytes` bytes from `offset` of a file on, in large reads through the page cache. Blocks.
  void read_range(int file, int64_t offset, int64_t bytes, std::byte* out) const;

  // FileReadError where a file that holds a wanted row is not what was opened; names a row of it.
  void check_unchanged(const RowsWanted* wanted, int num_wanted, const int64_t* ids, int64_t count) const;

  // Takes the files as they are now for what was opened: their owner has written to them. Not while another call reads.
  void accept_changes();

  const char* backend() const { return use_io_uring_ ? "io_uring" : "preadv"; }
  // Whether all files are read past the page cache.
  bool direct() const { return direct_files_.load(std::memory_order_relaxed) == static_cast<int>(files_.size()); }
  size_t num_files() const { return files_.size(); }
  int queue_depth() const { return queue_depth_; }

  // From the next call on, reads go through what `wrapper` makes of each queue. Not while another call reads.
  void wrap_queues(IoQueueWrapper wrapper, void* context);

 private:
  struct File;
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
  void choose_backend(const std::string& io);

  std::vector<std::unique_ptr<File>> files_;
  std::string name_;  // of the first file, and how many others there are
  int queue_depth_;
  std::atomic<bool> use_io_uring_{true};
  bool any_io_ = false;  // no backend was named: preadv may take over
  std::atomic<int> direct_files_{0};
  IoQueueWrapper wrapper_ = nullptr;
  void* wrapper_context_ = nullptr;
  std::atomic<Queues*> queues_{nullptr};
};

}  // namespace engram_kernels

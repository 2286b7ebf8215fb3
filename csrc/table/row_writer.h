// Writes rows of an open file by their index, many at a time: the way back of what file_reader.h reads.
//
// Scope       rows at a fixed stride from an offset on, through the page cache; neighbouring rows in one write of at most
//             kMaxWriteBytes. Nothing is on disk before `sync`.
// Backends    io_uring where it was built and the system allows it, else pwrite by the caller's thread.
// Ownership   a descriptor of its own.
// Threads     one call at a time.
// Failure     FileReadError names the path and the row. Any of the rows may then be written, in whole or in part.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "table/io_queue.h"

namespace engram_kernels {

class RowWriter {
 public:
  static constexpr int64_t kMaxWriteBytes = 1 << 20;
  static constexpr int kQueueDepth = 64;

  // `fd` is open for writing, and duplicated. io: "io_uring", or "preadv" for pwrite; "auto": the first where it can be had.
  RowWriter(int fd, std::string path, const std::string& io);
  ~RowWriter();
  RowWriter(const RowWriter&) = delete;
  RowWriter& operator=(const RowWriter&) = delete;

  // Row ids[i], of those that begin at byte `offset`, becomes row i of `rows`. Ids are distinct, in [0, num_rows); ascending is
  // fastest.
  void write(int64_t offset, int64_t row_bytes, int64_t num_rows, const int64_t* ids, int64_t count, std::byte* rows);
  void sync();  // what was written is on disk

  const char* backend() const { return queue_ != nullptr ? "io_uring" : "pwrite"; }
  int64_t writes() const { return writes_; }
  int64_t bytes() const { return bytes_; }

 private:
  struct Piece;
  void write_queued(const std::vector<Piece>& pieces);
  void write_now(Piece piece);
  [[noreturn]] void fail(int error, int64_t row, const char* what) const;

  int fd_;
  std::string path_;
  std::unique_ptr<IoQueue> queue_;
  int64_t writes_ = 0, bytes_ = 0;
};

}  // namespace engram_kernels

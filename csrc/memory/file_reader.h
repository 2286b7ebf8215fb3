// Reads rows of an open file by their index, with pread: a file that is cut short under a reader is an error, where a
// memory map would kill the process.
//
// Scope       positions in a file that holds rows at a fixed stride; no cache, no read-ahead, no knowledge of formats.
// Ownership   a duplicate of the descriptor that it is given; the file may be renamed or deleted meanwhile.
// Threads     read_rows may be called from several threads at once; it starts threads of its own for large requests,
// since
//             a thread that waits for a disk must not hold one of the caller's pool.
// Failure     FileReadError; the output is then unspecified. A file whose size or time of change is not what it was
// when it
//             was opened is such a failure, found after the read and before it is reported as a success.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

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

class FileReader {
 public:
  FileReader(int fd, std::string path, int max_threads = 8);
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  // out[i * row_bytes ..] = row row_ids[i], for `count` ids in [0, rows.num_rows). Consecutive ids are read in one go
  // where the rows lie without gaps.
  void read_rows(const FileRows& rows, const int64_t* row_ids, int64_t count, std::byte* out) const;

 private:
  void read_range(const FileRows& rows, const int64_t* row_ids, int64_t begin, int64_t end, std::byte* out) const;
  void read_exactly(std::byte* to, int64_t bytes, int64_t at, int64_t row) const;
  void check_unchanged() const;

  int fd_ = -1;
  std::string path_;
  int max_threads_;
  int64_t size_ = 0;
  int64_t changed_ns_ = 0;
};

}  // namespace engram_kernels

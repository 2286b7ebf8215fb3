#include "table/row_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "common/error.h"
#include "table/file_reader.h"

namespace engram_kernels {

// Rows that lie side by side.
struct RowWriter::Piece {
  int64_t row, offset, bytes;
  std::byte* from;
};

RowWriter::RowWriter(int fd, std::string path, const std::string& io) : fd_(-1), path_(std::move(path)) {
  EK_CHECK(io == "auto" || io == "io_uring" || io == "preadv",
           "RowWriter: io is '" << io << "', expected auto, io_uring or preadv");
  std::string why;
  if (io != "preadv") queue_ = make_io_uring_queue(kQueueDepth, nullptr, 0, &why);
  EK_CHECK(queue_ != nullptr || io != "io_uring", "RowWriter: io is 'io_uring', but " << why);
  fd_ = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (fd_ < 0) fail(errno, -1, "its descriptor cannot be duplicated");
}

RowWriter::~RowWriter() {
  queue_.reset();
  if (fd_ >= 0) close(fd_);
}

void RowWriter::fail(int error, int64_t row, const char* what) const {
  Text text;
  text << "tier file: " << path_ << ": ";
  if (row >= 0) text << "row " << row << " ";
  text << what << ": " << std::strerror(error);
  throw FileReadError(error, text.str());
}

void RowWriter::write(int64_t offset, int64_t row_bytes, int64_t num_rows, const int64_t* ids, int64_t count, std::byte* rows) {
  EK_CHECK(offset >= 0 && row_bytes > 0, "RowWriter: rows of " << row_bytes << " bytes at byte " << offset);
  for (int64_t i = 0; i < count; ++i) {
    EK_CHECK_INDEX(ids[i] >= 0 && ids[i] < num_rows,
                   "RowWriter: row_ids[" << i << "] is " << ids[i] << ", expected [0, " << num_rows << ")");
  }
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < count; ++i) {
    if (i > 0 && ids[i] == ids[i - 1] + 1 && pieces.back().bytes + row_bytes <= kMaxWriteBytes) {
      pieces.back().bytes += row_bytes;
    } else {
      pieces.push_back({ids[i], offset + ids[i] * row_bytes, row_bytes, rows + i * row_bytes});
    }
  }
  if (queue_ != nullptr) {
    write_queued(pieces);
  } else {
    for (const Piece& piece : pieces) write_now(piece);
  }
  bytes_ += count * row_bytes;
}

// Keeps the queue full; a piece that came out short, or failed, is finished by this thread, which then knows the error.
void RowWriter::write_queued(const std::vector<Piece>& pieces) {
  std::vector<Piece> flights(kQueueDepth), left;
  std::vector<int> free;
  for (int slot = kQueueDepth; slot-- > 0;) free.push_back(slot);
  IoDone done[kQueueDepth];
  size_t next = 0;
  while (next < pieces.size() || free.size() < flights.size()) {
    while (!free.empty() && next < pieces.size()) {
      const int slot = free.back();
      free.pop_back();
      const Piece& piece = flights[static_cast<size_t>(slot)] = pieces[next++];
      queue_->submit({fd_, slot, piece.offset, piece.bytes, piece.from, false, true});
      ++writes_;
    }
    const int count = queue_->wait(done, kQueueDepth);
    for (int i = 0; i < count; ++i) {
      Piece piece = flights[static_cast<size_t>(done[i].slot)];
      const int64_t written = std::max<int64_t>(done[i].result, 0);
      if (written < piece.bytes) left.push_back({piece.row, piece.offset + written, piece.bytes - written, piece.from + written});
      free.push_back(done[i].slot);
    }
  }
  for (const Piece& piece : left) write_now(piece);
}

void RowWriter::write_now(Piece piece) {
  while (piece.bytes > 0) {
    const ssize_t written = pwrite(fd_, piece.from, static_cast<size_t>(piece.bytes), piece.offset);
    ++writes_;
    if (written > 0) {
      piece.offset += written;
      piece.from += written;
      piece.bytes -= written;
    } else if (written == 0 || errno != EINTR) {
      fail(written == 0 ? EIO : errno, piece.row, "cannot be written");
    }
  }
}

void RowWriter::sync() {
  if (fdatasync(fd_) != 0) fail(errno, -1, "cannot be synced");
}

}  // namespace engram_kernels

// Bytes of a file in the order in which they lie there, for whoever wants all of it.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "common/error.h"
#include "table/file_reader.h"

namespace engram_kernels {

void FileReader::read_range(int64_t offset, int64_t bytes, std::byte* out) const {
  EK_CHECK(offset >= 0 && bytes >= 0 && bytes <= size_ - offset,
           "FileReader: bytes " << offset << " + " << bytes << " are not inside " << path_ << " of " << size_ << " bytes");
  constexpr int64_t kPieceBytes = 16 << 20;
  for (int64_t done = 0; done < bytes;) {
    const auto want = static_cast<size_t>(std::min(kPieceBytes, bytes - done));
    const ssize_t got = pread(fd_, out + done, want, offset + done);
    if (got > 0) {
      done += got;
    } else if (got == 0 || errno != EINTR) {
      const int error = got == 0 ? EIO : errno;
      Text text;
      text << "tier file: " << path_ << ": bytes from " << offset + done
           << " on cannot be read: " << (got == 0 ? "the file was cut short" : std::strerror(error));
      throw FileReadError(error, text.str());
    }
  }
  check_unchanged(0);
}

}  // namespace engram_kernels

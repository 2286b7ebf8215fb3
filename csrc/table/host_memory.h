// Memory for the rows of one table: exactly as large as asked, in huge pages where the system has them, placed on NUMA nodes,
// private to the process or a segment that processes share, and pinned for a device on demand.
//
// Scope       bytes; what lies in them is the caller's affair (python/engram_kernels/table/host_memory.py).
// Size        whole pages, or whole huge pages where those are explicit and waste less than an eighth. Nothing is rounded up to a
//             power of two. A page without access on either side (not of explicit huge pages) turns an overrun into a fault.
// Pages       anonymous: explicit huge pages (MAP_HUGETLB) where the pool has enough, else transparent ones are asked for;
//             a shared segment: transparent ones are asked for, and given to pages
//             that are taken by `populate` or a write to the mapping where its file system is mounted with huge=advise.
//             `pages` says what was asked for, `huge_bytes` what is there.
// Ownership   owns the mapping and its registration; the descriptor of a segment stays the caller's and may be closed.
// Threads     `pin` and `unpin` from one thread; everything else from any.
// Fork        a child sees the rows, and leaves the registration alone. The kernel copies pinned private pages at a fork: a
//             process that pins and forks wants a shared segment.
// Failure     HostMemoryError, and nothing is left behind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "table/host_registrar.h"

namespace engram_kernels {

struct HostMemoryError : std::runtime_error {
  HostMemoryError(int error, const std::string& message) : std::runtime_error(message), error_number(error) {}
  int error_number;  // errno
};

struct HostMemoryOptions {
  std::vector<int> numa_nodes;  // none: where the first touch is; one: there while there is room; several: page by page in turn
  int fd = -1;                  // a file of tmpfs to map, instead of anonymous memory
  int64_t fd_offset = 0;        // a multiple of kHugePageBytes
  bool read_only = false;
};

class HostMemory {
 public:
  explicit HostMemory(int64_t bytes, const HostMemoryOptions& options = {});
  ~HostMemory();
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  std::byte* data() const { return data_; }  // on a 2 MiB boundary
  int64_t bytes() const { return bytes_; }
  int64_t mapped_bytes() const { return mapped_bytes_; }
  int64_t pinned_bytes() const { return registration_.bytes(); }
  const char* pages() const { return pages_; }  // "explicit", "transparent" or "small"

  // Takes the pages of [offset, offset + bytes) now, as a write by the processor would, but where there is none HostMemoryError
  // says so. Kernels before 5.14 cannot.
  void populate(int64_t offset, int64_t bytes);

  struct Usage {
    int64_t resident_bytes, huge_bytes;  // in memory now; of these, in huge pages. -1: the system does not say
  };
  Usage usage() const;
  // (node, pages) of about `samples` pages spread over the memory; those that were never touched are on no node.
  std::vector<std::pair<int, int64_t>> pages_by_node(int samples) const;

  // Registers the memory chunk by chunk; on failure none of it stays registered. A read-only mapping is writable only while the
  // driver locks its pages.
  void pin(const HostRegistrar& registrar, int64_t chunk_bytes = HostRegistration::kChunkBytes);
  void unpin() noexcept;

 private:
  bool map_explicit();
  void map_private();
  void map_segment(const HostMemoryOptions& options);
  void reserve();
  void place(const std::vector<int>& numa_nodes);
  void unmap() noexcept;
  void forbid_writes() noexcept;

  std::byte* data_ = nullptr;
  int64_t bytes_, mapped_bytes_ = 0;
  std::byte* reserved_ = nullptr;  // the mapping with its guard pages
  int64_t reserved_bytes_ = 0;
  const char* pages_ = "small";
  bool read_only_ = false;
  HostRegistration registration_;
};

}  // namespace engram_kernels

#include "table/host_memory.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <map>

#include "common/error.h"
#include "common/huge_pages.h"
#include "table/proc_file.h"

#ifndef MAP_HUGE_2MB
#define MAP_HUGE_2MB (21 << 26)
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace engram_kernels {
namespace {

constexpr int kMpolPreferred = 1, kMpolInterleave = 3;  // linux/mempolicy.h
constexpr int kMaxNodes = 1024;

#define EK_THROW_MEMORY(error, msg)                \
  do {                                             \
    Text ek_text;                                  \
    ek_text << "HostMemory: " << msg;              \
    throw HostMemoryError((error), ek_text.str()); \
  } while (0)

int64_t page_bytes() {
  static const int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

int64_t round_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

HostMemory::HostMemory(int64_t bytes, const HostMemoryOptions& options) : bytes_(bytes), read_only_(options.read_only) {
  EK_CHECK(bytes > 0 && bytes < (int64_t{1} << 46), "HostMemory: bytes is " << bytes << ", expected [1, 2^46)");
  EK_CHECK(options.fd < 0 || (options.fd_offset >= 0 && options.fd_offset % kHugePageBytes == 0),
           "HostMemory: fd_offset is " << options.fd_offset << ", expected a multiple of " << kHugePageBytes);
  for (const int node : options.numa_nodes) {
    EK_CHECK(node >= 0 && node < kMaxNodes, "HostMemory: numa node is " << node << ", expected [0, " << kMaxNodes << ")");
  }
  try {
    if (options.fd >= 0) {
      map_segment(options);
      place(options.numa_nodes);
    } else {
      if (map_explicit()) {
        place(options.numa_nodes);
        // the pages of the pool are taken now: one that is missing would be a signal later. Kernels before 5.14 cannot
        if (madvise(data_, static_cast<size_t>(mapped_bytes_), MADV_POPULATE_WRITE) == 0 || errno == EINVAL) return;
        unmap();
      }
      map_private();
      place(options.numa_nodes);
    }
  } catch (...) {
    unmap();
    throw;
  }
}

HostMemory::~HostMemory() {
  unpin();
  unmap();
}

// Addresses for mapped_bytes_ from a huge page boundary on, and a page without access on either side.
void HostMemory::reserve() {
  const int64_t page = page_bytes(), bytes = mapped_bytes_ + kHugePageBytes + 2 * page;
  void* found = mmap(nullptr, static_cast<size_t>(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) EK_THROW_MEMORY(errno, bytes << " bytes of addresses cannot be had: " << std::strerror(errno));
  auto* begin = static_cast<std::byte*>(found);
  const auto start = round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin)) + page, kHugePageBytes);
  data_ = reinterpret_cast<std::byte*>(static_cast<uintptr_t>(start));
  reserved_ = data_ - page;
  reserved_bytes_ = mapped_bytes_ + 2 * page;
  if (reserved_ > begin) munmap(begin, static_cast<size_t>(reserved_ - begin));
  std::byte* const end = reserved_ + reserved_bytes_;
  if (end < begin + bytes) munmap(end, static_cast<size_t>(begin + bytes - end));
}

bool HostMemory::map_explicit() {
  mapped_bytes_ = round_up(bytes_, kHugePageBytes);
  if (mapped_bytes_ - bytes_ >= mapped_bytes_ / 8) return false;
  void* found = mmap(nullptr, static_cast<size_t>(mapped_bytes_), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_HUGE_2MB, -1, 0);
  if (found == MAP_FAILED) return false;
  data_ = reserved_ = static_cast<std::byte*>(found);
  reserved_bytes_ = mapped_bytes_;
  pages_ = "explicit";
  return true;
}

void HostMemory::map_private() {
  pages_ = "small";
  mapped_bytes_ = round_up(bytes_, page_bytes());
  reserve();
  // private: shared anonymous memory is a file to the kernel, and gets no huge pages
  if (mmap(data_, static_cast<size_t>(mapped_bytes_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) !=
      data_) {
    EK_THROW_MEMORY(errno, mapped_bytes_ << " bytes of memory cannot be had: " << std::strerror(errno));
  }
  if (ask_for_huge_pages(data_, mapped_bytes_)) pages_ = "transparent";
}

void HostMemory::map_segment(const HostMemoryOptions& options) {
  mapped_bytes_ = round_up(bytes_, page_bytes());
  reserve();
  const int access = PROT_READ | (read_only_ ? 0 : PROT_WRITE);
  if (mmap(data_, static_cast<size_t>(mapped_bytes_), access, MAP_SHARED | MAP_FIXED, options.fd, options.fd_offset) != data_) {
    EK_THROW_MEMORY(errno, mapped_bytes_ << " bytes of a segment cannot be mapped: " << std::strerror(errno));
  }
  if (ask_for_huge_pages(data_, mapped_bytes_)) pages_ = "transparent";
}

// Before the first touch. A policy on a shared segment belongs to the segment.
void HostMemory::place(const std::vector<int>& numa_nodes) {
  if (numa_nodes.empty()) return;
  unsigned long mask[kMaxNodes / (8 * sizeof(unsigned long))] = {};
  for (const int node : numa_nodes) mask[node / (8 * sizeof(long))] |= 1UL << (node % (8 * sizeof(long)));
  const int mode = numa_nodes.size() == 1 ? kMpolPreferred : kMpolInterleave;
  const unsigned long bits = kMaxNodes + 1;  // the kernel takes one off
  if (syscall(SYS_mbind, data_, static_cast<unsigned long>(mapped_bytes_), mode, mask, bits, 0) != 0) {
    Text nodes;
    for (const int node : numa_nodes) nodes << ' ' << node;
    EK_THROW_MEMORY(errno, "memory cannot be placed on NUMA nodes" << nodes.str() << ": " << std::strerror(errno));
  }
}

void HostMemory::unmap() noexcept {
  if (reserved_ != nullptr) munmap(reserved_, static_cast<size_t>(reserved_bytes_));
  reserved_ = data_ = nullptr;
}

void HostMemory::populate(int64_t offset, int64_t bytes) {
  EK_CHECK(offset >= 0 && bytes >= 0 && bytes <= mapped_bytes_ - offset,
           "HostMemory: bytes " << offset << ".." << offset + bytes << " are not inside of " << mapped_bytes_);
  const int64_t begin = offset / page_bytes() * page_bytes();
  if (madvise(data_ + begin, static_cast<size_t>(offset + bytes - begin), MADV_POPULATE_WRITE) == 0) return;
  const int error = errno == EFAULT ? ENOSPC : errno;  // where a write would be a signal
  EK_THROW_MEMORY(error, bytes << " bytes of memory cannot be had: " << std::strerror(error));
}

HostMemory::Usage HostMemory::usage() const {
  const auto begin = reinterpret_cast<uintptr_t>(data_), end = begin + static_cast<uintptr_t>(mapped_bytes_);
  bool inside = false;
  int64_t resident_kib = 0, huge_kib = 0;
  const bool found = for_each_line("/proc/self/smaps", [&](const char* line) {
    unsigned long from = 0, to = 0;
    char name[32];
    long kib = 0;
    if (std::sscanf(line, "%lx-%lx ", &from, &to) == 2) {
      inside = from >= begin && to <= end;
    } else if (inside && std::sscanf(line, "%31[A-Za-z_]: %ld kB", name, &kib) == 2) {
      const std::string field = name;
      const bool pool = field == "Private_Hugetlb" || field == "Shared_Hugetlb";  // not counted in Rss
      if (field == "Rss" || pool) resident_kib += kib;
      if (field == "AnonHugePages" || field == "ShmemPmdMapped" || field == "FilePmdMapped" || pool) huge_kib += kib;
    }
    return true;
  });
  if (!found) return {-1, -1};
  return {resident_kib << 10, huge_kib << 10};
}

std::vector<std::pair<int, int64_t>> HostMemory::pages_by_node(int samples) const {
  const int64_t pages = mapped_bytes_ / page_bytes(), count = std::min<int64_t>(std::max(samples, 1), pages);
  std::vector<void*> where;
  for (int64_t i = 0; i < count; ++i) where.push_back(data_ + i * pages / count * page_bytes());
  std::vector<int> nodes(where.size(), -1);
  // without target nodes, move_pages moves nothing and says where each page is
  if (syscall(SYS_move_pages, 0, where.size(), where.data(), nullptr, nodes.data(), 0) != 0) return {};
  std::map<int, int64_t> found;
  for (const int node : nodes) {
    if (node >= 0) ++found[node];
  }
  return {found.begin(), found.end()};
}

void HostMemory::forbid_writes() noexcept { (void)mprotect(data_, static_cast<size_t>(mapped_bytes_), PROT_READ); }

void HostMemory::pin(const HostRegistrar& registrar, int64_t chunk_bytes) {
  EK_CHECK(chunk_bytes > 0 && chunk_bytes % kHugePageBytes == 0,
           "HostMemory: chunk_bytes is " << chunk_bytes << ", expected a multiple of " << kHugePageBytes);
  if (registration_.bytes() > 0) return;
  // page-locking asks for write access to what is not marked read-only for the device
  if (read_only_ && mprotect(data_, static_cast<size_t>(mapped_bytes_), PROT_READ | PROT_WRITE) != 0) {
    EK_THROW_MEMORY(errno, "read-only memory cannot be pinned: " << std::strerror(errno));
  }
  try {
    registration_ = HostRegistration(registrar, data_, mapped_bytes_, chunk_bytes);
  } catch (const HostRegistrationError& err) {
    if (read_only_) forbid_writes();
    EK_THROW_MEMORY(ENOMEM, err.what());
  }
  // pages that are locked stay where they are, whatever the processor may do with them
  if (read_only_) forbid_writes();
}

void HostMemory::unpin() noexcept { registration_ = {}; }

}  // namespace engram_kernels

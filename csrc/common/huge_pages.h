// Transparent huge pages: with small ones a random read misses the TLB, and the first write to each 4 KiB is a fault.
#pragma once

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>

namespace engram_kernels {

constexpr int64_t kHugePageBytes = 2 << 20;

// Asks for huge pages where whole ones lie within the `bytes` from `memory` on, before the first write. False: small pages serve.
inline bool ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto begin = reinterpret_cast<uintptr_t>(memory), page = static_cast<uintptr_t>(kHugePageBytes);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + static_cast<uintptr_t>(bytes)) / page * page;
  return first < last && madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) == 0;
#else
  return false;
#endif
}

}  // namespace engram_kernels

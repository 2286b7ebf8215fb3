// An allocator for tables that are looked at here and there: transparent huge pages from their size on, where the kernel gives
// them, since with small ones most looks miss the TLB as well.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <new>

namespace engram_kernels {

template <class T>
struct HugeAllocator {
  using value_type = T;
  static constexpr size_t kHugePageBytes = size_t{2} << 20;

  HugeAllocator() = default;
  template <class U>
  HugeAllocator(const HugeAllocator<U>&) {}

  T* allocate(size_t count) {
    const size_t bytes = count * sizeof(T), align = bytes >= kHugePageBytes ? kHugePageBytes : alignof(std::max_align_t);
    const size_t aligned = align > alignof(T) ? align : alignof(T);
    void* memory = std::aligned_alloc(aligned, (bytes + aligned - 1) / aligned * aligned);
    if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (bytes >= kHugePageBytes) madvise(memory, bytes / kHugePageBytes * kHugePageBytes, MADV_HUGEPAGE);  // or small pages serve
#endif
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { std::free(memory); }

  friend bool operator==(const HugeAllocator&, const HugeAllocator&) { return true; }
};

}  // namespace engram_kernels

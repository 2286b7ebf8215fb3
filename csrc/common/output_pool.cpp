#include "common/output_pool.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <new>
#include <vector>

#include "common/huge_pages.h"
#include "common/math.h"

namespace engram_kernels {
namespace {

constexpr size_t kMaxKeptBlocks = 64;

#ifdef MAP_ANONYMOUS
std::byte* map_pages(int64_t bytes) {
  const auto size = static_cast<size_t>(bytes), huge = static_cast<size_t>(kHugePageBytes);
  void* mapped = mmap(nullptr, size + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  std::byte* begin = static_cast<std::byte*>(mapped);
  const size_t before = (huge - reinterpret_cast<uintptr_t>(begin) % huge) % huge;
  if (before > 0) munmap(begin, before);
  munmap(begin + before + size, huge - before);
  ask_for_huge_pages(begin + before, bytes);
  return begin + before;
}
void unmap_pages(const OutputBlock& block) { munmap(block.data, static_cast<size_t>(block.bytes)); }
#else
std::byte* map_pages(int64_t) { return nullptr; }
void unmap_pages(const OutputBlock&) {}
#endif

// Tells the system that nobody reads these pages again before writing them.
void leave_pages([[maybe_unused]] const OutputBlock& block) {
#ifdef MADV_FREE
  madvise(block.data, static_cast<size_t>(block.bytes), MADV_FREE);
#endif
}

struct Pool {
  std::mutex mutex;                // of what follows, but the atomics
  std::vector<OutputBlock*> kept;  // the oldest first
  std::atomic<int64_t> kept_bytes{0}, in_use{0}, most_in_use{0};

  Pool() { kept.reserve(kMaxKeptBlocks); }

  OutputBlock* remove(size_t index) {
    OutputBlock* block = kept[index];
    kept.erase(kept.begin() + static_cast<std::ptrdiff_t>(index));
    kept_bytes -= block->bytes;
    return block;
  }

  void drop_oldest() {
    OutputBlock* block = remove(0);
    unmap_pages(*block);
    delete block;
  }

  // The smallest kept block of [bytes, 2 * bytes], of equal ones the one that came last; or null.
  OutputBlock* fitting(int64_t bytes) {
    size_t best = kept.size();
    for (size_t i = 0; i < kept.size(); ++i) {
      const int64_t size = kept[i]->bytes;
      if (size >= bytes && size <= 2 * bytes && (best == kept.size() || size <= kept[best]->bytes)) best = i;
    }
    return best == kept.size() ? nullptr : remove(best);
  }
};

Pool& pool() {
  static Pool& pool = *new Pool;  // never destroyed: tensors may outlive every static object
  return pool;
}

}  // namespace

OutputBlock* take_output_block(int64_t bytes) {
  Pool& p = pool();
  bytes = ceil_div(bytes, kHugePageBytes) * kHugePageBytes;
  const std::unique_lock lock(p.mutex, std::try_to_lock);
  OutputBlock* block = lock.owns_lock() ? p.fitting(bytes) : nullptr;
  const int64_t in_use = p.in_use += block != nullptr ? block->bytes : bytes;
  if (in_use > p.most_in_use) p.most_in_use = in_use;
  if (block != nullptr) return block;
  while (lock.owns_lock() && !p.kept.empty() && p.kept_bytes + in_use > p.most_in_use) p.drop_oldest();
  std::byte* data = map_pages(bytes);
  block = data != nullptr ? new (std::nothrow) OutputBlock{data, bytes} : nullptr;
  if (block == nullptr) {
    if (data != nullptr) unmap_pages({data, bytes});
    p.in_use -= bytes;
  }
  return block;
}

void give_back_output_block(OutputBlock* block) {
  Pool& p = pool();
  p.in_use -= block->bytes;
  const bool keep = block->bytes <= kMaxKeptBytes;
  if (keep) leave_pages(*block);
  const std::unique_lock lock(p.mutex, std::try_to_lock);
  if (keep && lock.owns_lock()) {
    while (p.kept.size() == kMaxKeptBlocks || p.kept_bytes + block->bytes > kMaxKeptBytes) p.drop_oldest();
    p.kept.push_back(block);
    p.kept_bytes += block->bytes;
  } else {
    unmap_pages(*block);
    delete block;
  }
}

int64_t kept_output_bytes() { return pool().kept_bytes; }

}  // namespace engram_kernels

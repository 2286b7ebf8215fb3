// The caller's thread pool, handed to the torch-free kernels. The binding passes torch's own, so a process has one
// pool.
#pragma once

#include <algorithm>
#include <cstdint>

namespace engram_kernels {

struct Parallel {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  using Run = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

  Run run = nullptr;  // null: everything on the calling thread

  // Calls body(begin, end) on disjoint ranges that cover [0, count), each of at least `grain` where possible.
  template <class F>
  void for_range(int64_t count, int64_t grain, const F& body) const {
    if (count <= 0) return;
    if (run == nullptr || count <= grain) {
      body(int64_t{0}, count);
      return;
    }
    run(
        0, count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
        const_cast<F*>(&body));
  }
};

}  // namespace engram_kernels

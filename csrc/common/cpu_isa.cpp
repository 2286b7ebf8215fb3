#include "common/cpu_isa.h"

#include <atomic>
#include <cstring>

#include "common/error.h"

namespace engram_kernels {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

std::atomic<CpuIsa>& chosen() {
  static std::atomic<CpuIsa> isa{best_cpu_isa()};
  return isa;
}

}  // namespace

CpuIsa best_cpu_isa() {
#if defined(__x86_64__) && !defined(EK_ONE_ISA)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#if defined(EK_NO_AVX512)
  const bool avx512 = false;
#elif defined(EK_SIMDE)
  const bool avx512 = avx2;  // that is all that SIMDe's definitions need
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return avx512 ? CpuIsa::kAvx512 : avx2 ? CpuIsa::kAvx2 : CpuIsa::kPortable;
#else
  return CpuIsa::kPortable;
#endif
}

CpuIsa cpu_isa() { return chosen().load(std::memory_order_relaxed); }

void set_cpu_isa(CpuIsa isa) {
  EK_CHECK(isa <= best_cpu_isa(),
           "cpu_isa is " << cpu_isa_name(isa) << ", but the best that this machine runs is " << cpu_isa_name(best_cpu_isa()));
  chosen().store(isa, std::memory_order_relaxed);
}

const char* cpu_isa_name(CpuIsa isa) { return kNames[static_cast<int>(isa)]; }

CpuIsa cpu_isa_from_name(const char* name) {
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return static_cast<CpuIsa>(i);
  }
  EK_THROW_AS(std::invalid_argument, "cpu_isa is '" << name << "', expected portable, avx2 or avx512");
}

}  // namespace engram_kernels

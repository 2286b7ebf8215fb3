// One source, compiled per instruction set, chosen at run time.
//
// CMake compiles every *_cpu.cpp three times, with EK_ISA set to `portable`, `avx2` and `avx512` and the matching
// -m flags. Kernel code lives in namespace engram_kernels::EK_ISA; EK_DISPATCH_CPU, which only the portable
// compilation expands, defines the public function that picks one.
#pragma once

namespace engram_kernels {

enum class CpuIsa { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

CpuIsa best_cpu_isa();         // what this machine can run
CpuIsa cpu_isa();              // what is used: the best, unless set
void set_cpu_isa(CpuIsa isa);  // for tests and benchmarks; throws when the machine cannot run it
const char* cpu_isa_name(CpuIsa isa);
CpuIsa cpu_isa_from_name(const char* name);

}  // namespace engram_kernels

#ifndef EK_ISA
#define EK_ISA portable
#define EK_ISA_PORTABLE 1
#endif

// a build for tests may leave out the kernels that its machine cannot run (the CMake option EK_AVX512)
#ifdef EK_NO_AVX512
#define EK_WIDEST_ISA avx2
#else
#define EK_WIDEST_ISA avx512
#endif

// name: kernel; params: its parenthesised parameter list; args: the same names; all in namespace engram_kernels
#if EK_ISA_PORTABLE && !defined(EK_ONE_ISA)
#define EK_DISPATCH_CPU(name, params, args) \
  namespace engram_kernels {                \
  namespace avx2 {                          \
  void name params;                         \
  }                                         \
  namespace EK_WIDEST_ISA {                 \
  void name params;                         \
  }                                         \
  void name params {                        \
    switch (cpu_isa()) {                    \
      case CpuIsa::kAvx512:                 \
        return EK_WIDEST_ISA::name args;    \
      case CpuIsa::kAvx2:                   \
        return avx2::name args;             \
      default:                              \
        return portable::name args;         \
    }                                       \
  }                                         \
  }
#elif EK_ISA_PORTABLE
#define EK_DISPATCH_CPU(name, params, args) \
  namespace engram_kernels {                \
  void name params { portable::name args; } \
  }
#else
#define EK_DISPATCH_CPU(name, params, args)
#endif

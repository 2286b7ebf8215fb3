// C doors to the launchers, for ctypes: null, or the text of the exception.
//
// The launchers are weak here, so that a library of some ops alone can be loaded.
#include <exception>
#include <string>

#include "kernels/gate/gate.h"
#include "kernels/gather_gate/gather_gate.h"
#include "kernels/gather_rows/gather_rows.h"
#include "kernels/ngram_hash/ngram_hash.h"
#include "kernels/row_update/row_update.h"
#include "kernels/short_conv/short_conv.h"
#include "prefetch/place_rows.h"

#define EK_WEAK(function)                    \
  namespace engram_kernels {                 \
  [[gnu::weak]] decltype(function) function; \
  }

#define EK_LAUNCHER(launcher, Params)                                        \
  EK_WEAK(launcher)                                                          \
  extern "C" const char* launcher(const engram_kernels::Params* p) {         \
    static std::string error;                                                \
    if (!engram_kernels::launcher) return #launcher " is not in this build"; \
    try {                                                                    \
      engram_kernels::launcher(*p, nullptr);                                 \
      return nullptr;                                                        \
    } catch (const std::exception& e) {                                      \
      error = e.what();                                                      \
      return error.c_str();                                                  \
    }                                                                        \
  }                                                                          \
  extern "C" long launcher##_params_bytes() { return sizeof(engram_kernels::Params); }

EK_LAUNCHER(ngram_hash_cuda, NgramHashParams)
EK_LAUNCHER(gather_rows_cuda, GatherRowsParams)
EK_LAUNCHER(gather_rows_bwd_cuda, GatherRowsBwdParams)
EK_LAUNCHER(gate_cuda, GateParams)
EK_LAUNCHER(gate_bwd_cuda, GateBwdParams)
EK_LAUNCHER(gather_gate_cuda, GatherGateParams)
EK_LAUNCHER(gather_gate_bwd_cuda, GatherGateBwdParams)
EK_LAUNCHER(short_conv_cuda, ShortConvParams)
EK_LAUNCHER(short_conv_bwd_cuda, ShortConvBwdParams)
EK_LAUNCHER(row_update_cuda, RowUpdateParams)
EK_LAUNCHER(place_rows_cuda, PlaceRowsParams)

EK_WEAK(gate_bwd_cuda_scratch_bytes)
EK_WEAK(gather_gate_bwd_cuda_scratch_bytes)
EK_WEAK(short_conv_bwd_cuda_scratch_bytes)

extern "C" int64_t gate_bwd_cuda_scratch_bytes(const engram_kernels::GateBwdParams* p) {
  return engram_kernels::gate_bwd_cuda_scratch_bytes(*p);
}
extern "C" int64_t gather_gate_bwd_cuda_scratch_bytes(const engram_kernels::GatherGateBwdParams* p) {
  return engram_kernels::gather_gate_bwd_cuda_scratch_bytes(*p);
}
extern "C" int64_t short_conv_bwd_cuda_scratch_bytes(const engram_kernels::ShortConvBwdParams* p) {
  try {
    return engram_kernels::short_conv_bwd_cuda_scratch_bytes(*p);
  } catch (const std::exception&) {
    return 0;  // the launcher says why
  }
}

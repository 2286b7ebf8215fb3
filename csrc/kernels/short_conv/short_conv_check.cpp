// Checks of short_conv on host memory. Compiled once, for the plainest instruction set.
#include "common/cu_seqlens.h"
#include "kernels/short_conv/short_conv.h"

namespace engram_kernels {

void check_params(const ShortConvParams& p) {
  EK_CHECK(p.width >= 1 && p.width <= kMaxTaps, "short_conv: width is " << p.width << ", expected 1.." << kMaxTaps);
  EK_CHECK(p.dilation >= 1, "short_conv: dilation is " << p.dilation << ", expected at least 1");
  EK_CHECK(p.branches >= 1 && p.hidden_size >= 1,
           "short_conv: branches is " << p.branches << " and hidden_size " << p.hidden_size << ", expected at least 1");
  EK_CHECK(p.eps >= 0, "short_conv: eps is " << p.eps << ", expected a number >= 0");
}

void check_host_data(const ShortConvParams& p) {
  check_cu_seqlens("short_conv", p.cu_seqlens, p.num_sequences, p.num_tokens);
  if (p.state == nullptr) return;
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    const int64_t position = p.position(b), chunk = p.cu_seqlens[b + 1] - p.cu_seqlens[b];
    EK_CHECK(position >= 0 && position <= INT64_MAX - chunk,
             "short_conv: positions[" << b << "] is " << position << ", expected at least 0, and room for the " << chunk
                                      << " tokens of the chunk");
  }
}

}  // namespace engram_kernels

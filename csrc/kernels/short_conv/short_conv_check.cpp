// Checks of short_conv on host memory. Compiled once, for the plainest instruction set.
#include <algorithm>
#include <utility>
#include <vector>

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

namespace {

// Throws if two sequences with tokens have one ring: each would overwrite what the other reads.
void check_rings_differ(const ShortConvParams& p) {
  std::vector<std::pair<int64_t, int64_t>> users;  // (ring, sequence)
  users.reserve(static_cast<size_t>(p.num_sequences));
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    if (p.index(b) != kSkipped && p.cu_seqlens[b] < p.cu_seqlens[b + 1]) users.emplace_back(p.index(b), b);
  }
  std::sort(users.begin(), users.end());
  for (size_t i = 1; i < users.size(); ++i) {
    EK_CHECK(users[i].first != users[i - 1].first,
             "short_conv: state_indices[" << users[i - 1].second << "] and state_indices[" << users[i].second << "] are both "
                                          << users[i].first << ", expected a ring for each sequence");
  }
}

}  // namespace

void check_host_data(const ShortConvParams& p) {
  check_cu_seqlens("short_conv", p.cu_seqlens, p.num_sequences, p.num_tokens);
  if (!p.has_state()) return;
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    const int64_t position = p.position(b), chunk = p.cu_seqlens[b + 1] - p.cu_seqlens[b], ring = p.index(b);
    if (p.state_indices != nullptr) {
      EK_CHECK_INDEX(ring >= kSkipped && ring < p.num_rings, "short_conv: state_indices[" << b << "] is " << ring
                                                                                          << ", expected [0, " << p.num_rings
                                                                                          << ") or -1 (skip the sequence)");
      if (ring == kSkipped) continue;
    }
    EK_CHECK(p.position_fits(position, chunk), "short_conv: positions[" << b << "] is " << position
                                                                        << ", expected at least 0, and room for the " << chunk
                                                                        << " tokens of the chunk");
    if (chunk == 0 || p.can_resume(ring, position)) continue;
    const int64_t end = p.state_ends[2 * ring], furthest = p.state_ends[2 * ring + 1];
    EK_CHECK(position <= end, "short_conv: positions[" << b << "] is " << position << ", expected at most " << end
                                                       << ", the inputs that state_ends[" << ring << "] says the ring has");
    EK_CHECK(end <= furthest, "short_conv: state_ends[" << ring << "] is [" << end << ", " << furthest
                                                        << "], expected the inputs that the ring has, and at least as many "
                                                           "as the most that it has had");
    EK_CHECK(false, "short_conv: positions[" << b << "] is " << position << ", " << furthest - position
                                             << " before the furthest input, expected at most " << p.slots - p.reach()
                                             << " (the slots of state beyond (W-1) * dilation), or 0 for a new sequence");
  }
  if (p.state_indices != nullptr && p.num_sequences > 1) check_rings_differ(p);
}

}  // namespace engram_kernels

// Which state of a pool (a ring, a history) a sequence of a call has: what a look-up gives where it has none.
#pragma once

#include <cstdint>

namespace engram_kernels {

constexpr int64_t kSkipped = -1;  // an entry of state_indices, and what the look-up gives for it
constexpr int64_t kRefused = -2;  // what the look-up gives where check_host_data throws

}  // namespace engram_kernels

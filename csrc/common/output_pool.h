// Memory of large outputs on the host: kept when the last tensor in it is gone, for the next output of about that size. Fresh
// memory costs a pass of its own, since the system clears a page when it is first written, a huge one too.
//
// Ownership  a block belongs to whoever took it until it is given back, then to the pool
// Bound      kept blocks and blocks in use together are no more than was in use at one time, kept ones at most kMaxKeptBytes
// Pressure   the system may take the pages of kept blocks at any time, without writing them anywhere
// Threads    any. One that meets another one in here takes fresh memory, or gives its block to the system: a child after fork,
//            in which nobody may be left to unlock, goes on
#pragma once

#include <cstddef>
#include <cstdint>

namespace engram_kernels {

constexpr int64_t kLargeOutputBytes = 4 << 20;
constexpr int64_t kMaxKeptBytes = int64_t{1} << 30;

struct OutputBlock {
  std::byte* data;  // aligned to huge pages
  int64_t bytes;    // whole huge pages
};

// A block of at least `bytes`, uninitialised. Null: the system has none, or no such memory.
OutputBlock* take_output_block(int64_t bytes);
void give_back_output_block(OutputBlock* block);
int64_t kept_output_bytes();

}  // namespace engram_kernels

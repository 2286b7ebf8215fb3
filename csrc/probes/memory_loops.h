// Loops that measure a machine's memory. Every function returns seconds from the first thread's begin, once all stood ready,
// to the last one's end: no thread's start counts.
//
// Threads     one for each entry of `cpus`, pinned to that CPU where it is not -1, on an equal contiguous share of the work.
// Stores      copy and triad write past the caches on x86, so that the bytes that are counted are those that move; elsewhere a
//             store may read its line first, which is not counted.
// Source      loops of McCalpin's STREAM; a pointer chase over one cycle of all lines (Sattolo's algorithm).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace engram_kernels {

constexpr int64_t kProbeLineBytes = 64;

enum class StreamLoop { kRead, kCopy, kTriad };

// read: sum of b. copy: a = b. triad: a = b + 3 c. Arrays of `count` doubles, aligned to 64 bytes.
struct StreamParams {
  StreamLoop loop;
  double* a;
  const double* b;
  const double* c;
  int64_t count;
  std::vector<int> cpus;
};
double time_stream(const StreamParams& p);

// `repeats` times memcpy of `bytes` in every thread's own share.
struct MemcpyParams {
  std::byte* to;
  const std::byte* from;
  int64_t bytes;
  int64_t repeats;
  std::vector<int> cpus;
};
double time_memcpy(const MemcpyParams& p);

// Rows by id as a loop of memcpy; the row that is `prefetch` ids ahead is requested first (0: none is).
struct PlainGatherParams {
  const std::byte* table;
  std::byte* out;
  const int64_t* row_ids;  // [count], in [0, num_rows): checked
  int64_t count, num_rows, row_bytes, prefetch;
  std::vector<int> cpus;
};
double time_plain_gather(const PlainGatherParams& p);

// Makes one random cycle through all lines of `lines`; then `steps` loads follow it from line `*at`, each address known only
// after the load before.
void make_chase(std::byte* lines, int64_t num_lines, uint64_t seed);
double time_chase(const std::byte* lines, int64_t num_lines, int64_t steps, int64_t* at, int cpu);

// Writes a byte to each page, so that it is there, and on the node of the thread that did so.
double touch_pages(std::byte* memory, int64_t bytes, const std::vector<int>& cpus);
// Pages of [memory, +bytes) that are touched from now on come from `node`. Throws std::invalid_argument where the system refuses.
void bind_to_node(std::byte* memory, int64_t bytes, int node);

}  // namespace engram_kernels

// The last spans of a prefetcher, as a Chrome trace: a track per tier, and one for the caller.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace engram_kernels {

enum class TraceTrack : int { kCaller, kDevice, kHost, kFile, kRemote };

struct TraceSpan {
  TraceTrack track;
  const char* name;              // a literal
  int64_t ticket, rows, cached;  // cached: of the distinct rows of the ticket
  int64_t begin_ns, end_ns;      // of steady_ns()
};

inline int64_t steady_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class PrefetchTrace {
 public:
  explicit PrefetchTrace(int max_spans) : max_spans_(static_cast<size_t>(max_spans)) {}

  void add(const TraceSpan& span);  // the oldest goes where there is no room
  std::string json() const;         // opens in Perfetto and chrome://tracing

 private:
  const size_t max_spans_;
  mutable std::mutex mutex_;
  std::vector<TraceSpan> spans_;
  size_t oldest_ = 0;
};

}  // namespace engram_kernels

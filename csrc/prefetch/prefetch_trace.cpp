#include "prefetch/prefetch_trace.h"

#include "common/text.h"

namespace engram_kernels {
namespace {

constexpr const char* kTrackNames[] = {"caller", "tier device", "tier host", "tier file", "tier remote"};

// With three decimals.
std::string microseconds(int64_t ns) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%.3f", static_cast<double>(ns) * 1e-3);
  return digits;
}

}  // namespace

void PrefetchTrace::add(const TraceSpan& span) {
  if (max_spans_ == 0) return;
  const std::lock_guard lock(mutex_);
  if (spans_.size() < max_spans_) {
    spans_.push_back(span);
  } else {
    spans_[oldest_] = span;
    oldest_ = (oldest_ + 1) % max_spans_;
  }
}

std::string PrefetchTrace::json() const {
  Text out;
  out << "{\"displayTimeUnit\": \"ns\", \"otherData\": {\"provenance\": \"measured\"}, \"traceEvents\": [\n";
  for (size_t track = 0; track < sizeof(kTrackNames) / sizeof(*kTrackNames); ++track) {
    out << "{\"ph\": \"M\", \"pid\": 1, \"tid\": " << track << ", \"name\": \"thread_name\", \"args\": {\"name\": \""
        << kTrackNames[track] << "\"}},\n";
  }
  out << "{\"ph\": \"M\", \"pid\": 1, \"name\": \"process_name\", \"args\": {\"name\": \"RowPrefetcher\"}}";
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < spans_.size(); ++i) {
    const TraceSpan& span = spans_[(oldest_ + i) % spans_.size()];
    out << ",\n{\"ph\": \"X\", \"pid\": 1, \"tid\": " << static_cast<int>(span.track) << ", \"name\": \"" << span.name
        << "\", \"ts\": " << microseconds(span.begin_ns) << ", \"dur\": " << microseconds(span.end_ns - span.begin_ns)
        << ", \"args\": {\"ticket\": " << span.ticket << ", \"rows\": " << span.rows << ", \"cached\": " << span.cached << "}}";
  }
  out << "\n]}\n";
  return out.str();
}

}  // namespace engram_kernels

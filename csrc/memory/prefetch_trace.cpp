#include "memory/prefetch_trace.h"

#include <sstream>

namespace engram_kernels {
namespace {

constexpr const char* kTrackNames[] = {"caller", "tier device", "tier host", "tier file"};

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
  std::ostringstream out;
  out << "{\"displayTimeUnit\": \"ns\", \"otherData\": {\"provenance\": \"measured\"}, \"traceEvents\": [\n";
  for (size_t track = 0; track < sizeof(kTrackNames) / sizeof(*kTrackNames); ++track) {
    out << "{\"ph\": \"M\", \"pid\": 1, \"tid\": " << track << ", \"name\": \"thread_name\", \"args\": {\"name\": \""
        << kTrackNames[track] << "\"}},\n";
  }
  out << "{\"ph\": \"M\", \"pid\": 1, \"name\": \"process_name\", \"args\": {\"name\": \"RowPrefetcher\"}}";
  out.setf(std::ios::fixed);
  out.precision(3);
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < spans_.size(); ++i) {
    const TraceSpan& span = spans_[(oldest_ + i) % spans_.size()];
    out << ",\n{\"ph\": \"X\", \"pid\": 1, \"tid\": " << static_cast<int>(span.track) << ", \"name\": \"" << span.name
        << "\", \"ts\": " << static_cast<double>(span.begin_ns) * 1e-3
        << ", \"dur\": " << static_cast<double>(span.end_ns - span.begin_ns) * 1e-3 << ", \"args\": {\"ticket\": " << span.ticket
        << ", \"rows\": " << span.rows << "}}";
  }
  out << "\n]}\n";
  return out.str();
}

}  // namespace engram_kernels

// Counters and trace of the prefetcher.
#include "prefetch/prefetch_request.h"

namespace engram_kernels {

// Under the lock: a request that was waited for.
void RowPrefetcher::count(const Request& request, int64_t waited_since_ns) {
  PrefetchCounters& c = counters_;
  const StageCounters& staged = request.staged;
  const bool from_file = options_.stager.file != nullptr;
  const TraceTrack tier = from_file ? TraceTrack::kFile : options_.stager.on_device ? TraceTrack::kDevice : TraceTrack::kHost;
  const TraceTrack decode = options_.stager.direct         ? tier
                            : engine_->reads_host_memory() ? TraceTrack::kHost
                                                           : TraceTrack::kDevice;
  ++c.requests;
  c.requested += request.count;
  c.unique += staged.unique;
  c.device_cache_rows += staged.device_cached;
  c.cached_rows += staged.cached_rows;
  c.file_rows += staged.file_rows;
  if (!from_file) (options_.stager.on_device ? c.device_rows : c.host_rows) += staged.unique - staged.device_cached;
  const RowSource& table = options_.stager.table;
  c.payload_bytes +=
      request.count * (row_value_bytes(table.format, table.row_dim) + row_scale_bytes(table.format, table.row_dim));
  c.moved_bytes += staged.moved_bytes;
  const int64_t now = steady_ns();
  const int64_t cached = staged.device_cached + staged.cached_rows;
  const auto span = [&](TraceTrack track, const char* name, int64_t rows, int64_t begin, int64_t end) {
    trace_.add({track, name, request.number, rows, cached, begin, end});
  };
  if (request.fetch_end_ns > 0) {
    c.fetch_ns += request.fetch_end_ns - request.fetch_begin_ns;
    span(tier, "fetch", staged.unique, request.fetch_begin_ns, request.fetch_end_ns);
  }
  for (const Event& event : request.events) {
    EngineTimes times;
    if (!engine_->times(event, &times)) continue;
    c.fetch_ns += times.end_ns - times.begin_ns;
    span(decode, "gather", request.count, times.begin_ns, times.end_ns);
  }
  span(TraceTrack::kCaller, "wait", request.count, waited_since_ns, now);
}

PrefetchCounters RowPrefetcher::counters() const {
  check_process();
  const std::lock_guard lock(mutex_);
  PrefetchCounters counters = counters_;
  counters.queued = static_cast<int64_t>(queue_.size());
  return counters;
}

std::string RowPrefetcher::chrome_trace() const {
  check_process();
  return trace_.json();
}

int64_t RowPrefetcher::memory_bytes() const { return (options_.depth + 1) * options_.slot_bytes + stager_->memory_bytes(); }

int64_t RowPrefetcher::cache_slots() const { return stager_->cache_slots(); }

void RowPrefetcher::clear_cache() {
  check_process();
  stager_->clear_cache();
}

}  // namespace engram_kernels

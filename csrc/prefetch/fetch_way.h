// The eight ways that rows take to the slot that the caller reads, and what each of them does.
#pragma once

#include <cstddef>
#include <string>

#include "common/error.h"
#include "prefetch/prefetch_trace.h"

namespace engram_kernels {

enum class FetchWay : int { kInPlace, kUva, kDevice, kStaged, kFile, kFileStaged, kRemote, kRemoteStaged };

struct FetchWayTraits {
  const char* name;
  bool gathers_table;  // the gather reads the table itself; else distinct rows go through a staging slot first
  bool to_device;      // the gather runs on a device with memory of its own, so what the host prepares is copied there
  bool reads_tier;     // the rows come from a RowTier
  TraceTrack tier;     // where the table rests
  TraceTrack gather;   // whose time a gather takes

  bool stages() const { return !gathers_table || to_device; }     // rows, or ids alone
  bool can_cache() const { return !gathers_table && to_device; }  // rows that the device has already need not be copied
};

constexpr FetchWayTraits kFetchWays[] = {
    // name        table  device tier   tier                 gather
    {"in_place", true, false, false, TraceTrack::kHost, TraceTrack::kHost},
    {"uva", true, true, false, TraceTrack::kHost, TraceTrack::kHost},
    {"device", true, true, false, TraceTrack::kDevice, TraceTrack::kDevice},
    {"staged", false, true, false, TraceTrack::kHost, TraceTrack::kDevice},
    {"file", false, false, true, TraceTrack::kFile, TraceTrack::kHost},
    {"file_staged", false, true, true, TraceTrack::kFile, TraceTrack::kDevice},
    {"remote", false, false, true, TraceTrack::kRemote, TraceTrack::kHost},
    {"remote_staged", false, true, true, TraceTrack::kRemote, TraceTrack::kDevice},
};

constexpr const FetchWayTraits& traits_of(FetchWay way) { return kFetchWays[static_cast<size_t>(way)]; }

inline FetchWay fetch_way_from_name(const std::string& name) {
  for (size_t way = 0; way < sizeof(kFetchWays) / sizeof(*kFetchWays); ++way) {
    if (name == kFetchWays[way].name) return static_cast<FetchWay>(way);
  }
  EK_THROW_AS(std::invalid_argument, "RowPrefetcher: there is no way named '" << name << "'");
}

}  // namespace engram_kernels

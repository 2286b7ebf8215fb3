// The device seam: what the prefetcher needs of a device. CPU threads implement it (copy_engine_host.cpp, complete, and what
// the stress tests drive), and CUDA (copy_engine_cuda.cu, in _C_cuda alone).
//
// Scope       one stream, first in, first out: copies, gathers, rows put in places; events; memory that the device can read. No
//             tickets; what rows are for, it does not know.
// Ownership   whoever launches keeps the memory of a launch alive until its event is done.
// Threads     every call may be made from several threads at once; a launch is one place in the stream.
// Failure     what a call finds out, it throws; nothing of a launch that threw is left on the stream. What the stream finds out
//             later is thrown by the waits for the event of that launch, and by no other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "kernels/gather_rows/gather_rows.h"
#include "prefetch/place_rows.h"

namespace engram_kernels {

struct EngineError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class EngineEvent {
 public:
  virtual ~EngineEvent() = default;
};
using Event = std::shared_ptr<EngineEvent>;  // null: done

struct EngineCopy {
  std::byte* to = nullptr;
  const std::byte* from = nullptr;
  int64_t bytes = 0;
};

// In this order: wait for the events, copy, gather, place. A gather whose params have an error_count has ids that nobody has
// checked. All of it is done or, where one of it fails, failed.
struct EngineLaunch {
  Event after = {}, also_after = {};  // what used the memory before
  Event ready = {};                   // recorded for this launch, where its inputs are made
  EngineCopy copies[2] = {};
  const GatherRowsParams* gather = nullptr;  // copied by the call
  const PlaceRowsParams* place = nullptr;    // copied by the call; rows that later launches may read where they are put
  std::shared_ptr<const void> keeps = {};    // held until the launch is done, where host code runs it
};

// What the stream did for an event, by std::chrono::steady_clock.
struct EngineTimes {
  int64_t begin_ns = 0, end_ns = 0;
};

class CopyEngine {
 public:
  virtual ~CopyEngine() = default;

  virtual std::string name() const = 0;
  // Gathers read any host memory as fast as the device's own: nothing needs to be copied to the device.
  virtual bool reads_host_memory() const = 0;

  virtual std::byte* allocate_host(int64_t bytes) = 0;  // registered: copies from it are asynchronous, the device can read it
  virtual void free_host(std::byte* memory) noexcept = 0;
  virtual std::byte* allocate_device(int64_t bytes) = 0;
  virtual void free_device(std::byte* memory) noexcept = 0;
  // Whether gathers can read all of this host memory of the caller where it is: a device wants it pinned.
  virtual bool can_read(const std::byte* begin, int64_t bytes) const = 0;

  // By a thread that is not the caller's and works with this engine alone.
  virtual void adopt_thread() noexcept = 0;

  virtual Event launch(const EngineLaunch& launch) = 0;

  // `stream` is the caller's (0: its default, or no stream at all for CPU threads).
  virtual Event record_on(uintptr_t stream) = 0;  // all that was queued there before
  // Orders what the caller queues next behind the event. CPU threads: blocks, at most timeout_s (negative: for ever); false: it
  // is not done.
  virtual bool wait_on(const Event& event, uintptr_t stream, double timeout_s) = 0;
  virtual bool wait_host(const Event& event, double timeout_s) = 0;      // blocks
  virtual bool times(const Event& event, EngineTimes* times) const = 0;  // false: unknown
  virtual bool is_captured(const Event& event) const = 0;                // into a graph, whose replays repeat the work
};

// num_threads: that a gather takes, the stream's own included. has_device_memory: stands for a device with memory of its own, to
// which rows are staged and copied.
std::shared_ptr<CopyEngine> make_host_engine(int num_threads, bool has_device_memory = false);
#ifdef EK_WITH_CUDA
std::shared_ptr<CopyEngine> make_cuda_engine(int device);
#endif

}  // namespace engram_kernels

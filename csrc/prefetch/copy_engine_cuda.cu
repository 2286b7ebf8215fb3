// The device seam on a CUDA device: thin calls of the runtime API, one stream that does not block, events without timing.
//
// Graphs      work that depends on a stream under capture is captured with it. An event of another time is then waited for by
//             the host, since a graph cannot; and one that was captured means nothing outside of its graph. Every call that
//             another thread's capture in global mode would refuse (allocations, waits, the first launch of a kernel, which
//             loads its module) is made in relaxed mode.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "prefetch/copy_engine.h"
#include "prefetch/process_owned.h"

#define EK_ENGINE_CHECK(expr)                                                                             \
  do {                                                                                                    \
    const cudaError_t ek_error = (expr);                                                                  \
    if (ek_error != cudaSuccess) EK_THROW_AS(EngineError, #expr << ": " << cudaGetErrorString(ek_error)); \
  } while (0)

namespace engram_kernels {
namespace {

constexpr auto kPoll = std::chrono::microseconds(20);
constexpr int64_t kProbeBytes = int64_t{64} << 20;

// Lets this thread allocate, wait and query while some stream is under capture.
class RelaxedCapture {
 public:
  RelaxedCapture() { EK_ENGINE_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Going back to a device where the thread had no context would make one there: a caller that cares makes this device current
// first, as prefetch/runtime.py does with torch's guard.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    EK_ENGINE_CHECK(cudaGetDevice(&before_));
    if (before_ != device) EK_ENGINE_CHECK(cudaSetDevice(device));
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  const int device_;
  int before_ = 0;
  const RelaxedCapture relaxed_;
};

// The number of the capture that the stream is under; 0: none.
unsigned long long capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long number = 0;
  EK_ENGINE_CHECK(cudaStreamGetCaptureInfo(stream, &status, &number));
  return status == cudaStreamCaptureStatusActive ? number : 0;
}

// Events that can be recorded again.
struct EventPool {
  ~EventPool() {
    for (cudaEvent_t event : free) cudaEventDestroy(event);
  }

  cudaEvent_t take() {
    {
      const std::lock_guard lock(mutex);
      if (!free.empty()) {
        const cudaEvent_t event = free.back();
        free.pop_back();
        return event;
      }
    }
    cudaEvent_t event = nullptr;
    EK_ENGINE_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync));
    return event;
  }
  void give(cudaEvent_t event) {
    const std::lock_guard lock(mutex);
    free.push_back(event);
  }

  std::mutex mutex;
  std::vector<cudaEvent_t> free;
};

class CudaEvent final : public EngineEvent {
 public:
  CudaEvent(std::shared_ptr<EventPool> pool, cudaStream_t stream) : pool_(std::move(pool)), event_(pool_->take()) {
    try {
      capture_ = capture_of(stream);
      EK_ENGINE_CHECK(cudaEventRecord(event_, stream));
    } catch (...) {
      pool_->give(event_);
      throw;
    }
  }
  ~CudaEvent() override { pool_->give(event_); }
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;

  cudaEvent_t get() const { return event_; }
  unsigned long long capture() const { return capture_; }

 private:
  std::shared_ptr<EventPool> pool_;
  cudaEvent_t event_;
  unsigned long long capture_ = 0;  // 0: none
};

const CudaEvent& of(const Event& event) { return static_cast<const CudaEvent&>(*event); }

class CudaEngine final : public CopyEngine {
 public:
  explicit CudaEngine(int device) : device_(device), events_(std::make_shared<EventPool>()) {
    const OnDevice on(device_);
    EK_ENGINE_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }

  ~CudaEngine() override {
    try {
      const OnDevice on(device_);
      cudaStreamSynchronize(stream_);
      cudaStreamDestroy(stream_);
    } catch (const EngineError&) {  // the runtime is gone, and the stream with it
    }
  }

  std::string name() const override { return "cuda:" + std::to_string(device_); }
  bool reads_host_memory() const override { return false; }  // over a bus: rows that come twice would cross it twice

  std::byte* allocate_host(int64_t bytes) override {
    const OnDevice on(device_);
    void* memory = nullptr;
    EK_ENGINE_CHECK(cudaHostAlloc(&memory, static_cast<size_t>(bytes), cudaHostAllocPortable | cudaHostAllocMapped));
    return static_cast<std::byte*>(memory);
  }
  void free_host(std::byte* memory) noexcept override {
    free([memory] { cudaFreeHost(memory); });
  }

  std::byte* allocate_device(int64_t bytes) override {
    const OnDevice on(device_);
    void* memory = nullptr;
    EK_ENGINE_CHECK(cudaMalloc(&memory, static_cast<size_t>(bytes)));
    return static_cast<std::byte*>(memory);
  }
  void free_device(std::byte* memory) noexcept override {
    free([memory] { cudaFree(memory); });
  }

  // A registration is asked for at each of its chunks and at the end: memory that two owners pinned may have a gap.
  bool can_read(const std::byte* begin, int64_t bytes) const override {
    const OnDevice on(device_);
    const auto readable = [](const std::byte* at) {
      cudaPointerAttributes attributes{};
      const cudaError_t known = cudaPointerGetAttributes(&attributes, at);
      if (known != cudaSuccess) cudaGetLastError();  // clears it
      return known == cudaSuccess && attributes.devicePointer == at;
    };
    for (int64_t at = 0; at < bytes; at += kProbeBytes) {
      if (!readable(begin + at)) return false;
    }
    return bytes == 0 || readable(begin + bytes - 1);
  }

  // for good: to go back to the first device, where a thread begins, would make a context there
  void adopt_thread() noexcept override { cudaSetDevice(device_); }

  Event launch(const EngineLaunch& launch) override {
    const OnDevice on(device_);
    const unsigned long long capture = launch.ready == nullptr ? 0 : of(launch.ready).capture();
    for (const Event& event : {launch.after, launch.also_after}) wait_outside(event, capture);  // not under the lock
    const std::lock_guard lock(mutex_);      // a launch is one place in the stream
    follow(stream_, launch.ready, capture);  // first: it brings the stream into the graph that is captured
    follow(stream_, launch.after, capture);
    follow(stream_, launch.also_after, capture);
    try {
      queue(launch);
      return std::make_shared<CudaEvent>(events_, stream_);
    } catch (const std::exception& err) {
      // no event tells when the part that was queued is done with the memory of the launch
      if (capture == 0) cudaStreamSynchronize(stream_);
      throw EngineError(err.what());
    }
  }

  Event record_on(uintptr_t stream) override {
    const OnDevice on(device_);
    return std::make_shared<CudaEvent>(events_, reinterpret_cast<cudaStream_t>(stream));
  }

  bool wait_on(const Event& event, uintptr_t stream, double) override {
    const OnDevice on(device_);
    const unsigned long long capture = capture_of(reinterpret_cast<cudaStream_t>(stream));
    wait_outside(event, capture);
    follow(reinterpret_cast<cudaStream_t>(stream), event, capture);
    return true;
  }

  bool wait_host(const Event& event, double timeout_s) override {
    if (event == nullptr || of(event).capture() != 0) return true;
    const OnDevice on(device_);
    if (timeout_s < 0) {
      EK_ENGINE_CHECK(cudaEventSynchronize(of(event).get()));
      return true;
    }
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_s);
    for (;;) {
      const cudaError_t state = cudaEventQuery(of(event).get());
      if (state == cudaSuccess) return true;
      if (state != cudaErrorNotReady) EK_ENGINE_CHECK(state);
      cudaGetLastError();  // clears "not ready"
      if (std::chrono::steady_clock::now() >= until) return false;
      std::this_thread::sleep_for(kPoll);
    }
  }

  bool times(const Event&, EngineTimes*) const override { return false; }
  bool is_captured(const Event& event) const override { return event != nullptr && of(event).capture() != 0; }

 private:
  template <class Free>
  void free(const Free& call) const noexcept {
    try {
      const OnDevice on(device_);
      call();
    } catch (const EngineError&) {  // the runtime is gone, and the memory with it
    }
  }

  void queue(const EngineLaunch& launch) {
    for (const EngineCopy& copy : launch.copies) {
      if (copy.bytes == 0) continue;
      EK_ENGINE_CHECK(cudaMemcpyAsync(copy.to, copy.from, static_cast<size_t>(copy.bytes), cudaMemcpyDefault, stream_));
    }
    if (launch.gather != nullptr) gather_rows_cuda(*launch.gather, stream_);
    if (launch.place != nullptr) place_rows_cuda(*launch.place, stream_);
  }

  // Blocks until the event is done where a graph that is being captured cannot wait for it.
  void wait_outside(const Event& event, unsigned long long capture) {
    if (event != nullptr && capture != 0 && of(event).capture() == 0) wait_host(event, -1);
  }

  // `capture`: that the stream is under, or is brought under by the event.
  static void follow(cudaStream_t stream, const Event& event, unsigned long long capture) {
    // one of another capture means nothing here: whoever replays that graph orders it
    if (event == nullptr || of(event).capture() != capture) return;
    EK_ENGINE_CHECK(cudaStreamWaitEvent(stream, of(event).get(), 0));
  }

  const int device_;
  std::shared_ptr<EventPool> events_;
  cudaStream_t stream_ = nullptr;
  std::mutex mutex_;
};

}  // namespace

std::shared_ptr<CopyEngine> make_cuda_engine(int device) { return make_process_owned<CudaEngine>(device); }

}  // namespace engram_kernels

// The device seam on a CUDA device: thin calls of the runtime API, one stream that does not block, events without timing.
//
// Graphs      work that depends on a stream under capture is captured with it. An event of another time is then waited for by
//             the host, since a graph cannot; and one that was captured means nothing outside of its graph.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "prefetch/copy_engine.h"
#include "table/host_registrar.h"
#include "prefetch/process_owned.h"

#define EK_ENGINE_CHECK(expr)                                                                             \
  do {                                                                                                    \
    const cudaError_t ek_error = (expr);                                                                  \
    if (ek_error != cudaSuccess) EK_THROW_AS(EngineError, #expr << ": " << cudaGetErrorString(ek_error)); \
  } while (0)

namespace engram_kernels {
namespace {

constexpr auto kPoll = std::chrono::microseconds(20);

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
};

// Lets this thread wait and query while some stream is under capture.
class RelaxedCapture {
 public:
  RelaxedCapture() { EK_ENGINE_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
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
    int before = device_;
    cudaGetDevice(&before);
    cudaSetDevice(device_);
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
    for (const auto& [begin, pieces] : registered_) cuda_host_registry().give_back(pieces);
    if (before != device_) cudaSetDevice(before);
  }

  std::string name() const override { return "cuda:" + std::to_string(device_); }
  bool reads_host_memory() const override { return false; }  // over a bus: rows that come twice would cross it twice

  std::byte* allocate_host(int64_t bytes) override {
    const OnDevice on(device_);
    void* memory = nullptr;
    EK_ENGINE_CHECK(cudaHostAlloc(&memory, static_cast<size_t>(bytes), cudaHostAllocPortable | cudaHostAllocMapped));
    return static_cast<std::byte*>(memory);
  }
  void free_host(std::byte* memory) noexcept override { cudaFreeHost(memory); }

  std::byte* allocate_device(int64_t bytes) override {
    const OnDevice on(device_);
    void* memory = nullptr;
    EK_ENGINE_CHECK(cudaMalloc(&memory, static_cast<size_t>(bytes)));
    return static_cast<std::byte*>(memory);
  }
  void free_device(std::byte* memory) noexcept override { cudaFree(memory); }

  bool register_host(const std::byte* begin, int64_t bytes) override {
    const OnDevice on(device_);
    cudaPointerAttributes attributes{};
    const cudaError_t known = cudaPointerGetAttributes(&attributes, begin);
    if (known != cudaSuccess) cudaGetLastError();  // clears it
    // by somebody else, who made the whole table so; of what prefetchers registered, some may be of another table
    if (known == cudaSuccess && attributes.devicePointer == begin && !cuda_host_registry().holds(begin)) return false;
    try {
      HostRegistry::Pieces pieces = cuda_host_registry().take(begin, bytes);
      const std::lock_guard lock(mutex_);
      registered_[begin] = std::move(pieces);
    } catch (const HostRegistrationError& err) {
      EK_THROW_AS(EngineError, "tier host: " << bytes << " bytes of a table: " << err.what());
    }
    return true;
  }

  void unregister_host(const std::byte* begin) noexcept override {
    const std::lock_guard lock(mutex_);
    const auto found = registered_.find(begin);
    if (found == registered_.end()) return;
    cuda_host_registry().give_back(found->second);
    registered_.erase(found);
  }

  // for good: to go back to the first device, where a thread begins, would make a context there
  void adopt_thread() noexcept override { cudaSetDevice(device_); }

  Event launch(const EngineLaunch& launch) override {
    const OnDevice on(device_);
    const std::lock_guard lock(mutex_);  // a launch is one place in the stream
    const unsigned long long capture = launch.ready == nullptr ? 0 : of(launch.ready).capture();
    follow(stream_, launch.ready, capture);  // first: it brings the stream into the graph that is captured
    follow(stream_, launch.after, capture);
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
    follow(reinterpret_cast<cudaStream_t>(stream), event, capture_of(reinterpret_cast<cudaStream_t>(stream)));
    return true;
  }

  bool wait_host(const Event& event, double timeout_s) override {
    if (event == nullptr || of(event).capture() != 0) return true;
    const OnDevice on(device_);
    const RelaxedCapture relaxed;
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

 private:
  void queue(const EngineLaunch& launch) {
    for (const EngineCopy& copy : launch.copies) {
      if (copy.bytes == 0) continue;
      EK_ENGINE_CHECK(cudaMemcpyAsync(copy.to, copy.from, static_cast<size_t>(copy.bytes), cudaMemcpyDefault, stream_));
    }
    if (launch.gather != nullptr) gather_rows_cuda(*launch.gather, stream_);
    if (launch.place != nullptr) place_rows_cuda(*launch.place, stream_);
  }

  // `capture`: that the stream is under, or is brought under by the event.
  void follow(cudaStream_t stream, const Event& event, unsigned long long capture) {
    if (event == nullptr) return;
    const unsigned long long of_event = of(event).capture();
    if (of_event == capture) {
      EK_ENGINE_CHECK(cudaStreamWaitEvent(stream, of(event).get(), 0));
    } else if (of_event == 0) {
      wait_host(event, -1);
    }  // else of a graph that is captured no longer: whoever replays it orders it
  }

  const int device_;
  std::shared_ptr<EventPool> events_;
  cudaStream_t stream_ = nullptr;
  std::mutex mutex_;
  std::map<const std::byte*, HostRegistry::Pieces> registered_;
};

}  // namespace

std::shared_ptr<CopyEngine> make_cuda_engine(int device) { return make_process_owned<CudaEngine>(device); }

}  // namespace engram_kernels

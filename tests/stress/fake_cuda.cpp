#include "fake_cuda.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/gather_rows/gather_rows.h"
#include "prefetch/place_rows.h"

namespace {

thread_local int current_device = 0;
std::atomic<int64_t> first_device_calls{0};

struct FakeStream;

struct Mark {
  FakeStream* stream = nullptr;
  bool done = true;
  unsigned long long capture = 0;
};

struct Op {
  std::function<void()> run;
  std::shared_ptr<Mark> after, records;
};

struct FakeStream {
  std::deque<Op> pending;
  unsigned long long capture = 0;
};

struct FakeEvent {
  std::shared_ptr<Mark> mark = std::make_shared<Mark>();
};

std::recursive_mutex mutex;
std::mt19937_64 random_draw;
double failing = 0;
std::map<cudaStream_t, std::unique_ptr<FakeStream>> streams;  // the null stream among them
std::map<const std::byte*, size_t> registered;                // none overlaps another
std::vector<Op> graph;
unsigned long long captures = 0, capturing = 0;
int64_t live_events = 0;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

FakeStream& stream_of(cudaStream_t stream) {
  auto& found = streams[stream];
  if (found == nullptr) found = std::make_unique<FakeStream>();
  return *found;
}

FakeEvent& event_of(cudaEvent_t event) { return *reinterpret_cast<FakeEvent*>(event); }

void run_one(FakeStream& stream);

void run_until(const std::shared_ptr<Mark>& mark) {
  while (!mark->done) run_one(*mark->stream);
}

void run_one(FakeStream& stream) {
  const Op op = std::move(stream.pending.front());
  stream.pending.pop_front();
  if (op.after != nullptr) run_until(op.after);
  if (op.run) op.run();
  if (op.records != nullptr) op.records->done = true;
}

// Some of what is queued, anywhere.
void run_some() {
  while (random_draw() % 3 == 0) {
    auto at = streams.begin();
    if (streams.empty()) return;
    std::advance(at, static_cast<long>(random_draw() % streams.size()));
    if (!at->second->pending.empty()) run_one(*at->second);
  }
}

void push(cudaStream_t stream, Op op) {
  FakeStream& to = stream_of(stream);
  if (to.capture != 0) {
    graph.push_back(std::move(op));
  } else {
    to.pending.push_back(std::move(op));
    run_some();
  }
}

bool fails() { return failing > 0 && std::uniform_real_distribution<double>(0, 1)(random_draw) < failing; }

void check_launch(const char* kernel) {
  if (fails()) throw std::runtime_error(std::string("injected failure of ") + kernel);
}

cudaError_t blocking_call() {
  return capturing != 0 && thread_mode != cudaStreamCaptureModeRelaxed ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

}  // namespace

void fake_cuda_seed(uint64_t seed) {
  const std::lock_guard lock(mutex);
  random_draw.seed(seed);
}
void fake_cuda_fail(double share) {
  const std::lock_guard lock(mutex);
  failing = share;
}
void fake_cuda_begin_capture(cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  graph.clear();
  stream_of(stream).capture = capturing = ++captures;
}
void fake_cuda_end_capture() {
  const std::lock_guard lock(mutex);
  for (auto& [handle, stream] : streams) stream->capture = 0;
  capturing = 0;
}
void fake_cuda_replay() {
  const std::lock_guard lock(mutex);
  for (const Op& op : graph) {
    if (op.run) op.run();
  }
}
int64_t fake_cuda_live_events() { return live_events; }
int64_t fake_cuda_first_device_calls() { return first_device_calls; }
bool fake_cuda_is_registered(const void* memory) {
  const std::lock_guard lock(mutex);
  const auto next = registered.upper_bound(static_cast<const std::byte*>(memory));
  return next != registered.begin() && std::prev(next)->first + std::prev(next)->second > memory;
}

namespace engram_kernels {

void gather_rows_cuda(const GatherRowsParams& p, void* stream) {
  const std::lock_guard lock(mutex);
  check_launch("gather_rows");
  push(static_cast<cudaStream_t>(stream), {[p] {
                                             const int64_t out_bytes = int64_t{p.source.row_dim} * dtype_bytes(p.out_dtype),
                                                           id_bytes = p.row_ids.are_int64 ? 8 : 4;
                                             for (int64_t i = 0; i < p.row_ids.count; ++i) {
                                               GatherRowsParams one = p;
                                               one.row_ids.data = static_cast<const std::byte*>(p.row_ids.data) + i * id_bytes;
                                               one.row_ids.count = 1;
                                               one.out = p.out + i * out_bytes;
                                               const int64_t id = p.row_ids[i];
                                               if (id < kNoRow || id >= p.source.num_rows) {
                                                 std::memset(one.out, 0, static_cast<size_t>(out_bytes));
                                                 if (p.error_count != nullptr) ++*p.error_count;
                                               } else {
                                                 gather_rows_cpu(one, {});
                                               }
                                             }
                                           },
                                           nullptr, nullptr});
}

void place_rows_cuda(const PlaceRowsParams& p, void* stream) {
  const std::lock_guard lock(mutex);
  check_launch("place_rows");
  push(static_cast<cudaStream_t>(stream), {[p] { place_rows_cpu(p, {}); }, nullptr, nullptr});
}

}  // namespace engram_kernels

extern "C" {

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorStreamCaptureIsolation     ? "capture isolation"
         : error == cudaErrorStreamCaptureUnsupported ? "not while a stream is captured"
         : error == cudaErrorCapturedEvent            ? "captured event"
                                                      : "another error of the fake runtime";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device == 0) ++first_device_calls;
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const std::lock_guard lock(mutex);
  static uintptr_t next = 0x1000;
  *stream = reinterpret_cast<cudaStream_t>(next += 0x10);
  stream_of(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  streams.erase(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  while (!stream_of(stream).pending.empty()) run_one(stream_of(stream));
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  const std::lock_guard lock(mutex);
  *id = stream_of(stream).capture;
  *status = *id != 0 ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  const std::lock_guard lock(mutex);
  ++live_events;
  *event = reinterpret_cast<cudaEvent_t>(new FakeEvent);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const std::lock_guard lock(mutex);
  --live_events;
  delete &event_of(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  if (fails()) return cudaErrorUnknown;
  FakeStream& of = stream_of(stream);
  event_of(event).mark = std::make_shared<Mark>(Mark{&of, of.capture != 0, of.capture});
  if (of.capture == 0) push(stream, {{}, nullptr, event_of(event).mark});
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const std::lock_guard lock(mutex);
  FakeStream& waiting = stream_of(stream);
  const std::shared_ptr<Mark> mark = event_of(event).mark;
  if (mark->capture != 0) {
    if (mark->capture != capturing) return cudaErrorCapturedEvent;
    if (waiting.capture == 0 && !waiting.pending.empty()) {  // work before the capture is not part of it
      while (!waiting.pending.empty()) run_one(waiting);
    }
    waiting.capture = mark->capture;
    return cudaSuccess;  // the graph keeps the order of the calls
  }
  if (waiting.capture != 0) return cudaErrorStreamCaptureIsolation;
  push(stream, {{}, mark, nullptr});
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const std::lock_guard lock(mutex);
  if (event_of(event).mark->capture != 0) return cudaErrorCapturedEvent;
  const cudaError_t allowed = blocking_call();
  if (allowed == cudaSuccess) run_until(event_of(event).mark);
  return allowed;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  const std::lock_guard lock(mutex);
  const cudaError_t allowed = blocking_call();
  if (allowed != cudaSuccess) return allowed;
  run_some();
  return event_of(event).mark->done ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  const std::lock_guard lock(mutex);
  if (fails()) return cudaErrorUnknown;
  push(stream, {[=] {
                  if (bytes > 0) std::memcpy(to, from, bytes);
                },
                nullptr, nullptr});
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  const std::lock_guard lock(mutex);
  if (const cudaError_t allowed = blocking_call(); allowed != cudaSuccess) return allowed;
  if (current_device == 0) ++first_device_calls;
  *memory = std::calloc(bytes, 1);
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, size_t bytes) { return cudaHostAlloc(memory, bytes, 0); }
cudaError_t cudaFreeHost(void* memory) {
  const std::lock_guard lock(mutex);
  if (const cudaError_t allowed = blocking_call(); allowed != cudaSuccess) return allowed;
  if (current_device == 0) ++first_device_calls;
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) { return cudaFreeHost(memory); }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
  *attributes = {};
  if (fake_cuda_is_registered(memory)) attributes->devicePointer = const_cast<void*>(memory);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) {
  const std::lock_guard lock(mutex);
  const auto next = registered.lower_bound(static_cast<std::byte*>(memory) + bytes);  // the last one before it may overlap
  if (next != registered.begin() && std::prev(next)->first + std::prev(next)->second > memory)
    return cudaErrorHostMemoryAlreadyRegistered;
  registered.emplace(static_cast<std::byte*>(memory), bytes);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* memory) {
  const std::lock_guard lock(mutex);
  return registered.erase(static_cast<std::byte*>(memory)) == 1 ? cudaSuccess : cudaErrorHostMemoryNotRegistered;
}

}  // extern "C"

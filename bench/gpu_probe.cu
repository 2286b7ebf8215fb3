// What launches, the host link and host memory give, apart from this library: one run of about a minute on a GPU.
//
//   nvcc -std=c++20 -O3 -arch=sm_90 bench/gpu_probe.cu -o probe && ./probe [GiB of the large table]
//
//   1. launches  empty kernels: in a queue, in a graph, with programmatic dependent launch; what the host pays per call
//   2. memory    device memory, then pinned host memory of 1 GiB and of the size named, in small and in huge pages:
//                dependent loads, streams by SMs and by the copy engine, random requests of 32 to 512 bytes, and rows of 264
//                bytes by stride and layout. Rates that grow with the size of a request say that requests are what is limited.
//   3. CPU       threads that gather rows into a staging buffer
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

namespace {

using Byte = unsigned char;

constexpr uint64_t kMiB = 1 << 20, kGiB = 1 << 30;
constexpr uint64_t kHugePage = 2 * kMiB;
constexpr int kRounds = 5, kRowBytes = 264;

void check(cudaError_t error, const char* what, int line) {
  if (error == cudaSuccess) return;
  std::printf("FAILED at line %d, %s: %s\n", line, what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check((call), #call, __LINE__)

__global__ void spin(long long cycles) {
  const long long begun = clock64();
  while (clock64() - begun < cycles) {
  }
}
__global__ void empty_kernel() {}
__global__ void empty_dependent_kernel() {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

__host__ __device__ inline uint64_t mixed(uint64_t x) {
  x = (x ^ x >> 33) * 0xff51afd7ed558ccdULL;
  x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ULL;
  return x ^ x >> 33;
}

// Loads of one thread, each at a place that the one before gives.
__global__ void chase(const uint64_t* p, uint64_t n, int steps, uint64_t seed, uint64_t* out) {
  uint64_t at = mixed(seed) % n;
  const long long begun = clock64();
  for (int i = 0; i < steps; ++i) {
    uint64_t value;
    asm volatile("ld.global.cv.u64 %0, [%1];" : "=l"(value) : "l"(p + at));
    at = mixed(at + value + i + 1) % n;
  }
  out[0] = static_cast<uint64_t>(clock64() - begun) / steps;
  out[1] = at;
}

__global__ void __launch_bounds__(512) stream_read(const uint4* p, uint64_t n, uint4* out) {
  const uint64_t step = uint64_t{gridDim.x} * blockDim.x;
  uint4 sum = {};
  for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i + 3 * step < n; i += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = p[i + k * step];
#pragma unroll
    for (int k = 0; k < 4; ++k) sum.x ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  if (sum.x == 0x12345678) *out = sum;  // never, and the compiler cannot know
}

// kLanes lanes read kLanes * 16 bytes at a random slot, `lead` bytes into it; four slots are in flight per group of lanes.
template <int kLanes>
__global__ void __launch_bounds__(256)
    random_read(const Byte* p, uint64_t slots, uint64_t pitch, int lead, int rounds, uint64_t seed, uint4* out) {
  constexpr int kDeep = 4;
  const uint64_t group = (blockIdx.x * uint64_t{blockDim.x} + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  uint4 sum = {};
  for (int r = 0; r < rounds; ++r) {
    uint4 v[kDeep];
#pragma unroll
    for (int d = 0; d < kDeep; ++d) {
      const uint64_t slot = mixed(seed + (group * rounds + r) * kDeep + d + 1) % slots;
      asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v[d].x), "=r"(v[d].y), "=r"(v[d].z), "=r"(v[d].w)
                   : "l"(p + slot * pitch + lead + lane * 16));
    }
#pragma unroll
    for (int d = 0; d < kDeep; ++d) sum.x ^= v[d].x ^ v[d].y ^ v[d].z ^ v[d].w;
  }
  if (sum.x == 0x12345678) *out = sum;
}

// Rows of 256 bytes and 8 scale bytes, as gather_rows reads them: 8 bytes per lane, the scale in a load of its own.
__global__ void __launch_bounds__(256) read_rows(const Byte* p, const Byte* scales, uint64_t slots, uint64_t pitch,
                                                 uint64_t scale_pitch, int rounds, uint64_t seed, uint4* out) {
  constexpr int kDeep = 8;
  const uint64_t warp = (blockIdx.x * uint64_t{blockDim.x} + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  uint32_t sum = 0;
  for (int r = 0; r < rounds; ++r) {
    uint2 v[kDeep];
    uint32_t s[kDeep];
#pragma unroll
    for (int d = 0; d < kDeep; ++d) {
      const uint64_t slot = mixed(seed + (warp * rounds + r) * kDeep + d + 1) % slots;
      asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(v[d].x), "=r"(v[d].y) : "l"(p + slot * pitch + lane * 8));
      asm volatile("ld.global.u8 %0, [%1];" : "=r"(s[d]) : "l"(scales + slot * scale_pitch + lane / 4));
    }
#pragma unroll
    for (int d = 0; d < kDeep; ++d) sum ^= v[d].x ^ v[d].y ^ s[d];
  }
  if (sum == 0x12345678) out->x = sum;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Probe {
  cudaStream_t stream;
  uint4* out;       // 4 KiB of the device
  Byte* on_device;  // device_bytes of it
  uint64_t device_bytes = kGiB, seed = 1;

  // Median microseconds per call of n that were queued behind a blocked stream.
  float us(int n, const std::function<void()>& call) {
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    for (int i = 0; i < 3; ++i) call();
    std::vector<float> took;
    for (int round = 0; round < kRounds; ++round) {
      CHECK(cudaStreamSynchronize(stream));
      spin<<<1, 1, 0, stream>>>(4'000'000);
      CHECK(cudaEventRecord(begin, stream));
      for (int i = 0; i < n; ++i) call();
      CHECK(cudaEventRecord(end, stream));
      CHECK(cudaEventSynchronize(end));
      float ms;
      CHECK(cudaEventElapsedTime(&ms, begin, end));
      took.push_back(ms * 1000 / static_cast<float>(n));
    }
    std::sort(took.begin(), took.end());
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    return took[kRounds / 2];
  }

  void launches() {
    for (auto [blocks, shared] : {std::pair{1, 0}, {132, 0}, {1056, 0}})
      std::printf("empty kernel, %d blocks of 320: %.2f us\n", blocks,
                  us(400, [&] { empty_kernel<<<blocks, 320, shared, stream>>>(); }));
    cudaGraph_t graph;
    cudaGraphExec_t ready;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < 100; ++i) empty_kernel<<<4, 320, 0, stream>>>();
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&ready, graph, 0));
    std::printf("empty kernel in a graph of 100: %.2f us\n", us(10, [&] { CHECK(cudaGraphLaunch(ready, stream)); }) / 100);
    cudaLaunchConfig_t config = {};
    config.gridDim = 4, config.blockDim = 320, config.stream = stream;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute, config.numAttrs = 1;
    std::printf("empty kernel, programmatic dependent launch: %.2f us\n",
                us(400, [&] { CHECK(cudaLaunchKernelEx(&config, empty_dependent_kernel)); }));
    const double begun = now();
    for (int i = 0; i < 20000; ++i)
      CHECK(cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 96 << 10));
    std::printf("host: cudaFuncSetAttribute %.2f us\n", (now() - begun) * 50);
  }

  template <int kLanes>
  void random_requests(const char* name, const Byte* p, uint64_t bytes, uint64_t pitch, int lead) {
    constexpr int kBlocks = 528, kRoundsEach = 24;
    const double requests = double{kBlocks} * 256 / kLanes * kRoundsEach * 4;
    const float took = us(1, [&] {
      random_read<kLanes><<<kBlocks, 256, 0, stream>>>(p, bytes / pitch - 1, pitch, lead, kRoundsEach, seed += 1000003, out);
      CHECK(cudaGetLastError());
    });
    std::printf("%s: random %3d bytes every %4d, %3d in: %6.1f GB/s, %6.1f M/s\n", name, kLanes * 16, static_cast<int>(pitch),
                lead, requests * kLanes * 16 / took * 1e-3, requests / took);
  }

  void rows(const char* name, const char* layout, const Byte* p, const Byte* scales, uint64_t slots, uint64_t pitch,
            uint64_t scale_pitch) {
    constexpr int kBlocks = 528, kRoundsEach = 24;
    const double count = double{kBlocks} * 8 * kRoundsEach * 8;
    const float took = us(1, [&] {
      read_rows<<<kBlocks, 256, 0, stream>>>(p, scales, slots, pitch, scale_pitch, kRoundsEach, seed += 1000003, out);
      CHECK(cudaGetLastError());
    });
    std::printf("%s: rows of 264, %-34s: %6.1f GB/s, %6.1f M rows/s\n", name, layout, count * kRowBytes / took * 1e-3,
                count / took);
  }

  void memory(const char* name, Byte* p, uint64_t bytes) {
    uint64_t cycles[2];
    for (int k = 0; k < 2; ++k) {
      chase<<<1, 1, 0, stream>>>(reinterpret_cast<uint64_t*>(p), bytes / 8, 4000, ++seed, reinterpret_cast<uint64_t*>(out));
      CHECK(cudaMemcpyAsync(cycles, out, 16, cudaMemcpyDefault, stream));
      CHECK(cudaStreamSynchronize(stream));
    }
    std::printf("%s: a dependent random load takes %llu cycles\n", name, static_cast<unsigned long long>(cycles[0]));
    const uint64_t part = std::min(bytes, 2 * kGiB), copied = std::min(part, device_bytes);
    float took = us(1, [&] { stream_read<<<264, 512, 0, stream>>>(reinterpret_cast<uint4*>(p), part / 16, out); });
    std::printf("%s: streamed by SMs %.1f GB/s\n", name, part / took * 1e-3);
    took = us(1, [&] { CHECK(cudaMemcpyAsync(on_device, p, copied, cudaMemcpyDefault, stream)); });
    std::printf("%s: copy engine %.1f GB/s\n", name, copied / took * 1e-3);
    random_requests<2>(name, p, bytes, 128, 0);
    random_requests<4>(name, p, bytes, 128, 0);
    random_requests<8>(name, p, bytes, 128, 0);
    random_requests<8>(name, p, bytes, 256, 64);
    random_requests<16>(name, p, bytes, 256, 0);
    random_requests<32>(name, p, bytes, 512, 0);
    for (uint64_t pitch : {264, 288, 384}) {
      char layout[40];
      std::snprintf(layout, sizeof layout, "scales behind, every %llu", static_cast<unsigned long long>(pitch));
      rows(name, layout, p, p + 256, bytes / pitch - 1, pitch, pitch);
    }
    const uint64_t slots = bytes / 256 - 1;
    rows(name, "values and scales apart, here", p, p, slots, 256, 8);
    rows(name, "values here, scales on the device", p, on_device, std::min(slots, device_bytes / 8), 256, 8);
  }
};

void touch(Byte* p, uint64_t bytes) {
  constexpr uint64_t kThreads = 16;
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < kThreads; ++i)
    threads.emplace_back([=] { std::memset(p + bytes / kThreads * i, static_cast<int>(i) + 1, bytes / kThreads); });
  for (auto& thread : threads) thread.join();
}

// Rows of a host table, copied by threads into a staging buffer, the next sixteen asked for ahead.
void gather_on_cpu(const Byte* table, uint64_t bytes, Byte* staging, uint64_t rows, int num_threads) {
  std::vector<std::thread> threads;
  const double begun = now();
  for (int t = 0; t < num_threads; ++t)
    threads.emplace_back([=] {
      const uint64_t begin = rows / num_threads * t, end = rows / num_threads * (t + 1);
      uint64_t at[16];
      for (uint64_t row = begin; row < end; row += 16) {
        for (int j = 0; j < 16; ++j) {
          at[j] = mixed(row + j) % (bytes / kRowBytes - 1) * kRowBytes;
          for (int line = 0; line < kRowBytes; line += 64) __builtin_prefetch(table + at[j] + line);
        }
        for (uint64_t j = 0; j < 16 && row + j < end; ++j) std::memcpy(staging + (row + j) * kRowBytes, table + at[j], kRowBytes);
      }
    });
  for (auto& thread : threads) thread.join();
  const double took = now() - begun;
  std::printf("CPU gather, %d threads: %.1f M rows/s, %.1f GB/s\n", num_threads, rows / took * 1e-6,
              rows * kRowBytes / took * 1e-9);
}

void host_memory(Probe& probe, const char* name, uint64_t bytes) {
  Byte* p;
  const double begun = now();
  CHECK(cudaHostAlloc(reinterpret_cast<void**>(&p), bytes, cudaHostAllocMapped | cudaHostAllocPortable));
  touch(p, bytes);
  std::printf("%s: made in %.1f s\n", name, now() - begun);
  probe.memory(name, p, bytes);
  CHECK(cudaFreeHost(p));
}

void huge_pages(Probe& probe, uint64_t bytes) {
  void* mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) {
    std::printf("huge pages: no room\n");
    return;
  }
  Byte* p = reinterpret_cast<Byte*>((reinterpret_cast<uintptr_t>(mapped) + kHugePage - 1) / kHugePage * kHugePage);
  madvise(p, bytes, MADV_HUGEPAGE);
  double begun = now();
  touch(p, bytes);
  const double touched = now() - begun;
  begun = now();
  CHECK(cudaHostRegister(p, bytes, cudaHostRegisterMapped | cudaHostRegisterPortable));
  std::printf("huge pages: touched in %.1f s, registered in %.1f s\n", touched, now() - begun);
  probe.memory("host, huge pages", p, bytes);
  Byte* staging;
  CHECK(cudaHostAlloc(reinterpret_cast<void**>(&staging), 256 * kMiB, 0));
  touch(staging, 256 * kMiB);
  for (int num_threads : {1, 4, 8, 12, 16}) gather_on_cpu(p, bytes, staging, 256 * kMiB / kRowBytes, num_threads);
  CHECK(cudaFreeHost(staging));
  CHECK(cudaHostUnregister(p));
  munmap(mapped, bytes + kHugePage);
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t large = std::max<uint64_t>(1, argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 16) * kGiB;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s, %d multiprocessors, L2 of %d MiB\n", properties.name, properties.multiProcessorCount,
              properties.l2CacheSize >> 20);
  Probe probe;
  CHECK(cudaStreamCreateWithFlags(&probe.stream, cudaStreamNonBlocking));
  CHECK(cudaMalloc(reinterpret_cast<void**>(&probe.out), 4096));
  CHECK(cudaMalloc(reinterpret_cast<void**>(&probe.on_device), probe.device_bytes));
  CHECK(cudaMemset(probe.on_device, 1, probe.device_bytes));
  probe.launches();
  probe.memory("device, 1 GiB", probe.on_device, probe.device_bytes);
  host_memory(probe, "host, 1 GiB", kGiB);
  host_memory(probe, "host, the large one", large);
  huge_pages(probe, large);
  return 0;
}

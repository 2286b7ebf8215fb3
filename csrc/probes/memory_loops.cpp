#include "probes/memory_loops.h"

#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <thread>

#include "common/error.h"
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace engram_kernels {
namespace {

using Clock = std::chrono::steady_clock;

void pin_to(int cpu) {
  if (cpu < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  // refused for a CPU outside the process's own set: the thread then runs where it may
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
}

// Seconds of work(thread) on all threads at once. The caller sleeps meanwhile: it would take a CPU from one of them.
template <class Work>
double time_threads(const std::vector<int>& cpus, const Work& work) {
  EK_CHECK(!cpus.empty() && cpus.size() <= 4096, "probe: " << cpus.size() << " threads, expected 1 to 4096");
  const int num_threads = static_cast<int>(cpus.size());
  constexpr int kSpins = 1000;
  std::atomic<int> ready{0};
  std::vector<Clock::time_point> begins(cpus.size()), ends(cpus.size());
  std::vector<std::thread> threads;
  threads.reserve(cpus.size());
  for (int t = 0; t < num_threads; ++t) {
    threads.emplace_back([&, t] {
      pin_to(cpus[static_cast<size_t>(t)]);
      ready.fetch_add(1);
      for (int spins = 0; ready.load(std::memory_order_acquire) < num_threads; ++spins) {
        if (spins > kSpins) std::this_thread::yield();
      }
      begins[static_cast<size_t>(t)] = Clock::now();
      work(t);
      ends[static_cast<size_t>(t)] = Clock::now();
    });
  }
  for (std::thread& thread : threads) thread.join();
  const auto begin = *std::min_element(begins.begin(), begins.end());
  return std::chrono::duration<double>(*std::max_element(ends.begin(), ends.end()) - begin).count();
}

// Share `part` of [0, count) among `parts`, in multiples of `unit` but for the last.
struct Share {
  int64_t begin, end;
};
Share share(int64_t count, int64_t part, int64_t parts, int64_t unit) {
  const int64_t each = (count / parts + unit - 1) / unit * unit;
  return {std::min(count, part * each), part + 1 == parts ? count : std::min(count, (part + 1) * each)};
}

// The compiler must believe that the value is used.
template <class T>
void keep(T value) {
  asm volatile("" : : "g"(value) : "memory");
}

#ifdef __SSE2__
// 64-byte lines; `begin` and `end` are multiples of 8 doubles.
void stream_line(double* to, __m128d x0, __m128d x1, __m128d x2, __m128d x3) {
  _mm_stream_pd(to, x0);
  _mm_stream_pd(to + 2, x1);
  _mm_stream_pd(to + 4, x2);
  _mm_stream_pd(to + 6, x3);
}
#endif

void read_share(const double* b, int64_t begin, int64_t end) {
  const auto* words = reinterpret_cast<const uint64_t*>(b);
  uint64_t sums[8] = {};
  for (int64_t i = begin; i + 8 <= end; i += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] += words[i + lane];
  }
  keep(std::accumulate(sums, sums + 8, uint64_t{0}));
}

void copy_share(double* a, const double* b, int64_t begin, int64_t end) {
  int64_t i = begin;
#ifdef __SSE2__
  for (; i + 8 <= end; i += 8) {
    stream_line(a + i, _mm_load_pd(b + i), _mm_load_pd(b + i + 2), _mm_load_pd(b + i + 4), _mm_load_pd(b + i + 6));
  }
  _mm_sfence();
#endif
  for (; i < end; ++i) a[i] = b[i];
}

void triad_share(double* a, const double* b, const double* c, int64_t begin, int64_t end) {
  int64_t i = begin;
#ifdef __SSE2__
  const __m128d scale = _mm_set1_pd(3.0);
  const auto at = [&](int64_t j) { return _mm_add_pd(_mm_load_pd(b + j), _mm_mul_pd(scale, _mm_load_pd(c + j))); };
  for (; i + 8 <= end; i += 8) stream_line(a + i, at(i), at(i + 2), at(i + 4), at(i + 6));
  _mm_sfence();
#endif
  for (; i < end; ++i) a[i] = b[i] + 3.0 * c[i];
}

void prefetch_row(const std::byte* row, int64_t row_bytes) {
  for (int64_t byte = 0; byte < row_bytes; byte += kProbeLineBytes) __builtin_prefetch(row + byte, 0, 2);
}

}  // namespace

double time_stream(const StreamParams& p) {
  EK_CHECK(p.count >= 8 && p.count % 8 == 0, "probe: " << p.count << " doubles, expected a multiple of 8");
  const auto parts = static_cast<int64_t>(p.cpus.size());
  return time_threads(p.cpus, [&](int t) {
    const Share s = share(p.count, t, parts, 8);
    if (p.loop == StreamLoop::kRead) read_share(p.b, s.begin, s.end);
    if (p.loop == StreamLoop::kCopy) copy_share(p.a, p.b, s.begin, s.end);
    if (p.loop == StreamLoop::kTriad) triad_share(p.a, p.b, p.c, s.begin, s.end);
  });
}

double time_memcpy(const MemcpyParams& p) {
  EK_CHECK(p.repeats >= 1, "probe: " << p.repeats << " repeats, expected at least 1");
  const auto parts = static_cast<int64_t>(p.cpus.size());
  return time_threads(p.cpus, [&](int t) {
    const Share s = share(p.bytes, t, parts, kProbeLineBytes);
    for (int64_t r = 0; r < p.repeats; ++r) {
      std::memcpy(p.to + s.begin, p.from + s.begin, static_cast<size_t>(s.end - s.begin));
      keep(p.to);
    }
  });
}

double time_plain_gather(const PlainGatherParams& p) {
  for (int64_t i = 0; i < p.count; ++i) {
    EK_CHECK_INDEX(p.row_ids[i] >= 0 && p.row_ids[i] < p.num_rows,
                   "probe: row_ids[" << i << "] is " << p.row_ids[i] << ", expected [0, " << p.num_rows << ")");
  }
  const auto parts = static_cast<int64_t>(p.cpus.size());
  return time_threads(p.cpus, [&](int t) {
    const Share s = share(p.count, t, parts, 1);
    for (int64_t i = s.begin; i < s.end; ++i) {
      if (p.prefetch > 0 && i + p.prefetch < s.end) {
        prefetch_row(p.table + p.row_ids[i + p.prefetch] * p.row_bytes, p.row_bytes);
      }
      std::memcpy(p.out + i * p.row_bytes, p.table + p.row_ids[i] * p.row_bytes, static_cast<size_t>(p.row_bytes));
    }
    keep(p.out);
  });
}

void make_chase(std::byte* lines, int64_t num_lines, uint64_t seed) {
  EK_CHECK(num_lines >= 2, "probe: " << num_lines << " lines, expected at least 2");
  std::vector<uint32_t> next(static_cast<size_t>(num_lines));
  EK_CHECK(num_lines <= int64_t{UINT32_MAX}, "probe: " << num_lines << " lines are too many");
  std::iota(next.begin(), next.end(), 0u);
  std::mt19937_64 random(seed);
  // Sattolo: a swap with an earlier place only, which leaves one cycle
  for (size_t i = next.size() - 1; i > 0; --i) std::swap(next[i], next[random() % i]);
  for (int64_t i = 0; i < num_lines; ++i) {
    const int64_t to = next[static_cast<size_t>(i)];
    std::memcpy(lines + i * kProbeLineBytes, &to, sizeof(to));
  }
}

double time_chase(const std::byte* lines, int64_t num_lines, int64_t steps, int64_t* at, int cpu) {
  EK_CHECK_INDEX(*at >= 0 && *at < num_lines, "probe: line " << *at << ", expected [0, " << num_lines << ")");
  return time_threads({cpu}, [&](int) {
    int64_t line = *at;
    for (int64_t step = 0; step < steps; ++step) std::memcpy(&line, lines + line * kProbeLineBytes, sizeof(line));
    *at = line;
  });
}

double touch_pages(std::byte* memory, int64_t bytes, const std::vector<int>& cpus) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  const auto parts = static_cast<int64_t>(cpus.size());
  return time_threads(cpus, [&](int t) {
    const Share s = share(bytes, t, parts, 2 << 20);
    for (int64_t byte = s.begin; byte < s.end; byte += page) {
      *reinterpret_cast<volatile std::byte*>(memory + byte) = std::byte{1};
    }
  });
}

void bind_to_node(std::byte* memory, int64_t bytes, int node) {
  EK_CHECK(node >= 0 && node < 1024, "probe: node is " << node << ", expected [0, 1024)");
  constexpr int kBind = 2;  // MPOL_BIND of linux/mempolicy.h
  unsigned long mask[1024 / (8 * sizeof(unsigned long))] = {};
  mask[static_cast<size_t>(node) / (8 * sizeof(long))] |= 1ul << (static_cast<size_t>(node) % (8 * sizeof(long)));
  const long failed = syscall(SYS_mbind, memory, static_cast<unsigned long>(bytes), kBind, mask, 1025ul, 0u);
  EK_CHECK(failed == 0, "probe: the system refuses memory of node " << node << ": " << std::strerror(errno));
}

}  // namespace engram_kernels

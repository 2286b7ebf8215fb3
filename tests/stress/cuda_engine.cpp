// The prefetcher on its CUDA engine, over a CUDA runtime whose streams are as late as they may be (fake_cuda.h).
//
//   cuda_engine [rounds]      exit code 0, or a line that says what was wrong
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fake_cuda.h"
#include "prefetch/row_prefetcher.h"

namespace {

using namespace engram_kernels;

constexpr int64_t kNumRows = 5000, kMaxIds = 400;
constexpr int kRowDim = 8, kDepth = 3, kRequests = 30;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "cuda_engine: %s\n", what.c_str());
  std::_Exit(1);
}

float value(int64_t row, int i) { return static_cast<float>(row * kRowDim + i + 1); }

void check(const std::vector<int64_t>& ids, const float* rows, const std::string& where) {
  for (size_t i = 0; i < ids.size(); ++i) {
    for (int j = 0; j < kRowDim; ++j) {
      const float wanted = ids[i] == kNoRow ? 0 : value(ids[i], j), got = rows[i * kRowDim + static_cast<size_t>(j)];
      if (got != wanted) fail(where + ": row " + std::to_string(ids[i]) + ": got " + std::to_string(got));
    }
  }
}

struct Fixture {
  explicit Fixture(FetchWay way, int64_t cached_rows = 0, int device = 0)
      : table(kNumRows * kRowDim), slots((kDepth + 1) * kMaxIds * kRowDim), engine(make_cuda_engine(device)) {
    for (int64_t r = 0; r < kNumRows; ++r) {
      for (int j = 0; j < kRowDim; ++j) table[static_cast<size_t>(r * kRowDim + j)] = value(r, j);
    }
    PrefetcherOptions options;
    options.stager.table.rows = reinterpret_cast<const std::byte*>(table.data());
    options.stager.table.num_rows = kNumRows;
    options.stager.table.row_dim = kRowDim;
    options.stager.table.format = RowFormat::kF32;
    options.stager.table.row_stride_bytes = kRowDim * 4;
    options.stager.way = way;
    options.stager.staging_bytes = 1 << 13;  // a large request takes several blocks
    options.stager.cache_bytes = cached_rows * kRowDim * 4;
    options.out_dtype = DType::kF32;
    options.depth = kDepth;
    options.slots = reinterpret_cast<std::byte*>(slots.data());
    options.slot_bytes = kMaxIds * kRowDim * 4;
    prefetcher = std::make_unique<RowPrefetcher>(options, engine);
    for (cudaStream_t* each : {&stream, &other_stream}) {
      if (cudaStreamCreateWithFlags(each, cudaStreamNonBlocking) != cudaSuccess) fail("no stream");
    }
  }

  ~Fixture() {
    prefetcher->close();
    for (cudaStream_t each : {stream, other_stream}) {
      cudaStreamSynchronize(each);
      cudaStreamDestroy(each);
    }
  }
  Fixture(const Fixture&) = delete;
  Fixture& operator=(const Fixture&) = delete;

  uintptr_t handle() const { return reinterpret_cast<uintptr_t>(stream); }
  const float* slot(int number) const { return slots.data() + number * kMaxIds * kRowDim; }

  // ids in host memory, or in a buffer that the stream fills late
  int64_t submit(const std::vector<int64_t>& ids, std::vector<int64_t>* late) {
    const auto count = static_cast<int64_t>(ids.size());
    if (late == nullptr) return prefetcher->submit({{ids.data(), count, true}, {count}, false, handle()}, 10);
    late->assign(ids.size(), 7);
    cudaMemcpyAsync(late->data(), ids.data(), ids.size() * 8, cudaMemcpyDefault, stream);
    return prefetcher->submit({{late->data(), count, true}, {count}, true, handle()}, 10);
  }

  std::vector<float> table, slots;
  std::shared_ptr<CopyEngine> engine;
  std::unique_ptr<RowPrefetcher> prefetcher;
  cudaStream_t stream = nullptr, other_stream = nullptr;
};

std::vector<int64_t> draw_ids(std::mt19937_64& random, int64_t count) {
  std::vector<int64_t> ids(static_cast<size_t>(count));
  for (int64_t& id : ids) id = static_cast<int64_t>(random() % (random() % 2 == 0 ? 20 : kNumRows + 1)) - 1;
  return ids;
}

const char* name_of(FetchWay way) { return traits_of(way).name; }

// The consumers' streams are behind all the time: rows must be there when they read them, and stay until they have. With
// `two_streams` each wait is made on either of two.
void order(FetchWay way, bool ids_on_device, uint64_t seed, bool two_streams, int64_t cached_rows = 0) {
  std::mt19937_64 random(seed);
  std::vector<std::vector<int64_t>> ids, late(kRequests);
  std::vector<std::vector<float>> outs(kRequests);
  Fixture f(way, cached_rows);
  for (int i = 0; i < kRequests; ++i) ids.push_back(draw_ids(random, static_cast<int64_t>(random() % kMaxIds)));
  std::deque<std::pair<int, int64_t>> pending;
  const auto finish = [&] {
    const auto [i, ticket] = pending.front();
    pending.pop_front();
    const auto at = static_cast<size_t>(i);
    const bool keep = random() % 2 == 0;
    cudaStream_t stream = two_streams && random() % 2 == 0 ? f.other_stream : f.stream;
    const auto handle = reinterpret_cast<uintptr_t>(stream);
    int slot = f.prefetcher->wait(ticket, 10, handle, keep);
    outs[at].resize(ids[at].size() * kRowDim);
    if (random() % 5 == 0) {  // an interrupted wait, whose consumer had begun
      cudaMemcpyAsync(outs[at].data(), f.slot(slot), outs[at].size() * 4, cudaMemcpyDefault, stream);
      if (!f.prefetcher->restore(ticket) || f.prefetcher->restore(ticket)) fail("a ticket cannot be restored, or twice");
      slot = f.prefetcher->wait(ticket, 10, handle, keep);
    }
    cudaMemcpyAsync(outs[at].data(), f.slot(slot), outs[at].size() * 4, cudaMemcpyDefault, stream);
    if (keep) f.prefetcher->release(slot, handle);
  };
  for (int i = 0; i < kRequests; ++i) {
    if (pending.size() == kDepth) finish();
    pending.emplace_back(i, f.submit(ids[static_cast<size_t>(i)], ids_on_device ? &late[static_cast<size_t>(i)] : nullptr));
    if (random() % 7 == 0) {
      if (!f.prefetcher->cancel(pending.back().second)) fail("not cancelled");
      pending.pop_back();
    }
  }
  while (!pending.empty()) finish();
  cudaStreamSynchronize(f.stream);
  cudaStreamSynchronize(f.other_stream);
  const std::string where = std::string(name_of(way)) + (cached_rows > 0 ? ", cached" : "") +
                            (ids_on_device ? ", ids on the device" : "") + (two_streams ? ", two streams" : "");
  for (size_t i = 0; i < outs.size(); ++i) {
    if (!outs[i].empty()) check(ids[i], outs[i].data(), where + ", request " + std::to_string(i));
  }
}

// The caller's stream writes the table on the device right before it asks for rows of it by ids on the CPU.
void table_written_late(FetchWay way, uint64_t seed) {
  std::mt19937_64 random(seed);
  Fixture f(way);
  const std::vector<float> right = f.table;
  for (int i = 0; i < kRequests; ++i) {
    std::fill(f.table.begin(), f.table.end(), -1.0f);
    cudaMemcpyAsync(f.table.data(), right.data(), right.size() * 4, cudaMemcpyDefault, f.stream);
    const std::vector<int64_t> ids = draw_ids(random, 1 + static_cast<int64_t>(random() % kMaxIds));
    std::vector<float> out(ids.size() * kRowDim);
    const int slot = f.prefetcher->wait(f.submit(ids, nullptr), 10, f.handle(), false);
    cudaMemcpyAsync(out.data(), f.slot(slot), out.size() * 4, cudaMemcpyDefault, f.stream);
    cudaStreamSynchronize(f.stream);
    check(ids, out.data(), std::string(name_of(way)) + ", table written late, request " + std::to_string(i));
  }
}

// Calls of the runtime that fail, at every point of a launch: their tickets say so, and what others find in the cache was put
// there. How many hits and failures.
std::pair<int64_t, int64_t> failing(uint64_t seed) {
  std::mt19937_64 random(seed);
  Fixture f(FetchWay::kStaged, 200);
  int64_t failed = 0;
  for (int i = 0; i < kRequests; ++i) {
    const std::vector<int64_t> ids = draw_ids(random, static_cast<int64_t>(1 + random() % kMaxIds));
    const int64_t ticket = f.submit(ids, nullptr);
    int slot = -1;
    fake_cuda_fail(0.05);
    try {
      f.prefetcher->drain(10);
    } catch (const EngineError&) {
    }
    fake_cuda_fail(0);
    try {
      slot = f.prefetcher->wait(ticket, 10, f.handle(), false);
    } catch (const EngineError&) {
      ++failed;
      continue;
    }
    cudaStreamSynchronize(f.stream);
    check(ids, f.slot(slot), "failing, request " + std::to_string(i));
  }
  return {f.prefetcher->counters().device_cache_rows, failed};
}

// Two requests and one that uses a slot again, in one graph; replays read the ids of their time.
void graph(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int64_t> ids = draw_ids(random, 50), late(50);
  std::vector<std::vector<float>> outs(kDepth + 2, std::vector<float>(50 * kRowDim));
  Fixture f(FetchWay::kUva);
  for (int i = 0; i < 3; ++i) f.prefetcher->wait(f.submit(ids, &late), 10, f.handle(), false);
  fake_cuda_begin_capture(f.stream);
  const PrefetchIds wanted{{ids.data(), 50, true}, {50}, true, f.handle()};
  std::deque<int64_t> tickets;
  for (size_t i = 0; i < outs.size(); ++i) {
    while (tickets.size() < kDepth) tickets.push_back(f.prefetcher->submit(wanted, 0));
    const int slot = f.prefetcher->wait(tickets.front(), 10, f.handle(), false);
    tickets.pop_front();
    cudaMemcpyAsync(outs[i].data(), f.slot(slot), outs[i].size() * 4, cudaMemcpyDefault, f.stream);
  }
  while (!tickets.empty()) {
    f.prefetcher->wait(tickets.front(), 10, f.handle(), false);
    tickets.pop_front();
  }
  fake_cuda_end_capture();
  for (int replay = 0; replay < 3; ++replay) {
    const std::vector<int64_t> fresh = draw_ids(random, 50);
    std::copy(fresh.begin(), fresh.end(), ids.begin());
    fake_cuda_replay();
    for (const std::vector<float>& out : outs) check(fresh, out.data(), "replay " + std::to_string(replay));
  }
  for (int i = 0; i < 6; ++i) f.prefetcher->wait(f.submit(ids, &late), 10, f.handle(), false);  // outside of it again
}

void bad_ids() {
  std::vector<int64_t> ids{3, kNumRows, -2, 4}, late, good{1, 2};
  Fixture f(FetchWay::kUva);
  const int64_t doomed = f.submit(ids, &late);
  f.prefetcher->drain(10);
  try {
    f.prefetcher->wait(doomed, 10, f.handle(), false);
    fail("bad ids were not raised");
  } catch (const std::out_of_range& err) {
    if (std::string(err.what()).find("2 ids of ticket 0 are outside [0, 5000)") == std::string::npos) fail(err.what());
  }
  const int slot = f.prefetcher->wait(f.submit(good, &late), 10, f.handle(), false);
  cudaStreamSynchronize(f.stream);
  check(good, f.slot(slot), "after bad ids");
}

// Bad ids that are found out late, when their slot has another ticket: the ticket that had them is named, each once, and no
// other fails.
void late_bad_ids(uint64_t seed) {
  std::mt19937_64 random(seed);
  Fixture f(FetchWay::kDevice);
  std::vector<std::vector<int64_t>> kept(kRequests), late(kRequests);
  std::vector<int> told(kRequests);
  const auto tell = [&](const std::out_of_range& err) {
    int64_t ticket = -1;
    if (std::sscanf(err.what(), "RowPrefetcher: 1 ids of ticket %ld are", &ticket) != 1) fail(err.what());
    ++told[static_cast<size_t>(ticket)];
    return ticket;
  };
  std::vector<bool> bad(kRequests);
  for (int i = 0; i < kRequests; ++i) {
    std::vector<int64_t>& ids = kept[static_cast<size_t>(i)] = draw_ids(random, 5);  // copied late
    if ((bad[static_cast<size_t>(i)] = random() % 4 == 0)) ids[2] = kNumRows + 7;
    const int64_t ticket = f.submit(ids, &late[static_cast<size_t>(i)]);
    for (;;) {
      try {
        f.prefetcher->wait(ticket, 10, f.handle(), false);
      } catch (const std::out_of_range& err) {
        if (tell(err) != ticket) continue;  // another's: this one can still be waited for
      }
      break;
    }
  }
  std::vector<int64_t> good{1, 2}, buffer;
  for (int i = 0; i < kRequests; ++i) {
    cudaStreamSynchronize(f.stream);
    const int64_t ticket = f.submit(good, &buffer);
    f.prefetcher->drain(10);
    for (bool waited = false; !waited;) {
      try {
        f.prefetcher->wait(ticket, 10, f.handle(), false);
        waited = true;
      } catch (const std::out_of_range& err) {
        if (tell(err) >= kRequests) fail("a good request was blamed");
      }
    }
  }
  for (size_t i = 0; i < told.size(); ++i) {
    if (told[i] != bad[i]) fail("ticket " + std::to_string(i) + " was blamed " + std::to_string(told[i]) + " times");
  }
}

// A recorded event that fails in the middle of a wait or a release: the ticket stays valid, the slot stays out.
void failing_events(uint64_t seed) {
  std::mt19937_64 random(seed);
  Fixture f(FetchWay::kUva);
  for (int i = 0; i < kRequests; ++i) {
    const std::vector<int64_t> ids = draw_ids(random, 9);
    const bool keep = random() % 2 == 0;
    const int64_t ticket = f.submit(ids, nullptr);
    f.prefetcher->drain(10);
    int slot = -1;
    for (int attempt = 0; slot < 0; ++attempt) {
      fake_cuda_fail(attempt < 4 ? 0.7 : 0);
      try {
        slot = f.prefetcher->wait(ticket, 10, f.handle(), keep);
      } catch (const EngineError&) {
        if (!f.prefetcher->knows(ticket)) fail("an event that failed took the ticket");
      }
    }
    fake_cuda_fail(0);
    cudaStreamSynchronize(f.stream);
    check(ids, f.slot(slot), "failing events");
    while (keep) {
      fake_cuda_fail(0.5);
      try {
        f.prefetcher->release(slot, f.handle());
        break;
      } catch (const EngineError&) {
      }
    }
    fake_cuda_fail(0);
  }
  if (f.prefetcher->counters().in_flight != 0) fail("a slot was lost to an event that failed");
}

// Memory is readable where all of it is registered, not where its first byte is.
void readable() {
  constexpr int64_t kPage = 4096;
  std::vector<std::byte> memory(static_cast<size_t>(40 * kPage));
  std::byte* const begin = memory.data() + (kPage - reinterpret_cast<uintptr_t>(memory.data()) % kPage);
  const std::shared_ptr<CopyEngine> engine = make_cuda_engine(0);
  const auto expect = [&](int64_t bytes, bool wanted) {
    if (engine->can_read(begin, bytes) != wanted) fail("readable or not: " + std::to_string(bytes) + " bytes");
  };
  expect(100, false);
  cudaHostRegister(begin, 4 * kPage, 0);
  expect(0, true);
  expect(4 * kPage, true);
  expect(4 * kPage + 1, false);
  cudaHostRegister(begin + 4 * kPage, 4 * kPage, 0);
  expect(8 * kPage, true);
  cudaHostUnregister(begin);
  expect(8 * kPage, false);
  cudaHostUnregister(begin + 4 * kPage);
}

// Another thread captures in global mode: prefetchers are made, used and closed beside it.
void beside_a_capture() {
  cudaStream_t captured = nullptr;
  cudaStreamCreateWithFlags(&captured, cudaStreamNonBlocking);
  fake_cuda_begin_capture(captured);
  for (const FetchWay way : {FetchWay::kStaged, FetchWay::kUva}) {
    Fixture f(way, way == FetchWay::kStaged ? 50 : 0);
    const std::vector<int64_t> ids = {1, 2, 3};
    for (int i = 0; i < 5; ++i) f.prefetcher->wait(f.submit(ids, nullptr), 10, f.handle(), false);
  }
  fake_cuda_end_capture();
  cudaStreamDestroy(captured);
}

// A thread of the prefetcher touches no device but its own, and the caller's current device stays.
void devices() {
  for (const int current : {1, 0}) {
    cudaSetDevice(current);
    const int64_t before = fake_cuda_first_device_calls();
    {
      Fixture f(FetchWay::kStaged, 100, 1);
      const std::vector<int64_t> ids = {1, 2, 3};
      for (int i = 0; i < 5; ++i) f.prefetcher->wait(f.submit(ids, nullptr), 10, f.handle(), false);
      if (current == 1 && fake_cuda_first_device_calls() != before) fail("a prefetcher on device 1 turned to device 0");
    }
    int now = -1;
    cudaGetDevice(&now);
    if (now != current) fail("a prefetcher left another device current: " + std::to_string(now));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t rounds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 40;
  int64_t hits = 0, failures = 0;
  for (uint64_t seed = 0; seed < rounds; ++seed) {
    fake_cuda_seed(seed);
    for (const bool two_streams : {false, true}) {
      for (const FetchWay way : {FetchWay::kStaged, FetchWay::kUva, FetchWay::kDevice}) {
        for (const bool ids_on_device : {false, true}) order(way, ids_on_device, seed, two_streams);
      }
      order(FetchWay::kStaged, false, seed, two_streams, seed % 2 == 0 ? 20 : 1000);
      order(FetchWay::kStaged, true, seed, two_streams, 200);
    }
    table_written_late(FetchWay::kDevice, seed);
    table_written_late(FetchWay::kUva, seed);
    late_bad_ids(seed);
    failing_events(seed);
    graph(seed);
    const auto [hit, failure] = failing(seed);
    hits += hit;
    failures += failure;
  }
  if (hits == 0 || failures == 0) fail("nothing was found in the cache, or nothing failed");
  bad_ids();
  readable();
  beside_a_capture();
  devices();
  if (fake_cuda_live_events() != 0) fail("events are left");
  std::printf("cuda_engine: %llu rounds, %lld rows found in the cache, %lld failures\n", static_cast<unsigned long long>(rounds),
              static_cast<long long>(hits), static_cast<long long>(failures));
}

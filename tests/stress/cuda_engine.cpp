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
  explicit Fixture(bool direct, int64_t cached_rows = 0, int device = 0)
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
    options.stager.direct = direct;
    options.stager.staging_bytes = 1 << 13;  // a large request takes several blocks
    options.stager.cache_bytes = cached_rows * kRowDim * 4;
    options.out_dtype = DType::kF32;
    options.depth = kDepth;
    options.slots = reinterpret_cast<std::byte*>(slots.data());
    options.slot_bytes = kMaxIds * kRowDim * 4;
    prefetcher = std::make_unique<RowPrefetcher>(options, engine);
    if (cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess) fail("no stream");
  }

  ~Fixture() {
    prefetcher->close();
    cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
  }
  Fixture(const Fixture&) = delete;
  Fixture& operator=(const Fixture&) = delete;

  uintptr_t handle() const { return reinterpret_cast<uintptr_t>(stream); }
  const float* slot(int number) const { return slots.data() + number * kMaxIds * kRowDim; }

  // ids in host memory, or in a buffer that the stream fills late
  int64_t submit(const std::vector<int64_t>& ids, std::vector<int64_t>* late) {
    const auto count = static_cast<int64_t>(ids.size());
    if (late == nullptr) return prefetcher->submit({{ids.data(), count, true}, {count}, false, 0}, 10);
    late->assign(ids.size(), 7);
    cudaMemcpyAsync(late->data(), ids.data(), ids.size() * 8, cudaMemcpyDefault, stream);
    return prefetcher->submit({{late->data(), count, true}, {count}, true, handle()}, 10);
  }

  std::vector<float> table, slots;
  std::shared_ptr<CopyEngine> engine;
  std::unique_ptr<RowPrefetcher> prefetcher;
  cudaStream_t stream = nullptr;
};

std::vector<int64_t> draw_ids(std::mt19937_64& random, int64_t count) {
  std::vector<int64_t> ids(static_cast<size_t>(count));
  for (int64_t& id : ids) id = static_cast<int64_t>(random() % (random() % 2 == 0 ? 20 : kNumRows + 1)) - 1;
  return ids;
}

// The consumer's stream is behind all the time: rows must be there when it reads them, and stay until it has.
void order(bool direct, bool ids_on_device, uint64_t seed, int64_t cached_rows = 0) {
  std::mt19937_64 random(seed);
  std::vector<std::vector<int64_t>> ids, late(kRequests);
  std::vector<std::vector<float>> outs(kRequests);
  Fixture f(direct, cached_rows);
  for (int i = 0; i < kRequests; ++i) ids.push_back(draw_ids(random, static_cast<int64_t>(random() % kMaxIds)));
  std::deque<std::pair<int, int64_t>> pending;
  const auto finish = [&] {
    const auto [i, ticket] = pending.front();
    pending.pop_front();
    const auto at = static_cast<size_t>(i);
    const bool keep = random() % 2 == 0;
    const int slot = f.prefetcher->wait(ticket, 10, f.handle(), keep);
    outs[at].resize(ids[at].size() * kRowDim);
    cudaMemcpyAsync(outs[at].data(), f.slot(slot), outs[at].size() * 4, cudaMemcpyDefault, f.stream);
    if (keep) f.prefetcher->release(slot, f.handle());
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
  const std::string where = std::string(cached_rows > 0 ? "cached"
                                        : direct        ? "direct"
                                                        : "staged") +
                            (ids_on_device ? ", ids on the device" : "");
  for (size_t i = 0; i < outs.size(); ++i) {
    if (!outs[i].empty()) check(ids[i], outs[i].data(), where + ", request " + std::to_string(i));
  }
}

// Calls of the runtime that fail, at every point of a launch: their tickets say so, and what others find in the cache was put
// there. How many hits and failures.
std::pair<int64_t, int64_t> failing(uint64_t seed) {
  std::mt19937_64 random(seed);
  Fixture f(false, 200);
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
  Fixture f(true);
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
  Fixture f(true);
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

// Tables of several engines, which may meet in a page: each stays readable to the last byte until its own engine gives it up.
void registers() {
  constexpr int64_t kPage = 4096;
  std::vector<std::byte> memory(static_cast<size_t>(40 * kPage));
  const auto at = [&](int64_t offset) {
    const auto first = (reinterpret_cast<uintptr_t>(memory.data()) + kPage - 1) / kPage * kPage;
    return reinterpret_cast<const std::byte*>(first) + offset;
  };
  const auto expect = [&](int64_t begin, int64_t end, bool readable) {
    for (const int64_t offset : {begin, (begin + end) / 2, end - 1}) {
      if (fake_cuda_is_registered(at(offset)) != readable) fail("registered or not: byte " + std::to_string(offset));
    }
  };
  const auto take = [](CopyEngine& engine, const std::byte* begin, int64_t bytes) {
    if (!engine.register_host(begin, bytes)) fail("host memory was not registered");
  };
  std::shared_ptr<CopyEngine> one = make_cuda_engine(0), other = make_cuda_engine(0), third = make_cuda_engine(0);
  take(*one, at(100), 9 * kPage);                // pages 0..9
  take(*other, at(9 * kPage + 200), 5 * kPage);  // pages 9..14
  take(*third, at(100), 9 * kPage);              // the table of the first
  take(*third, at(4 * kPage), 8 * kPage);        // inside of both
  one->unregister_host(at(100));
  expect(100, 9 * kPage + 100, true);
  third.reset();  // as closed without unregistering
  expect(kPage, 9 * kPage, false);
  expect(9 * kPage + 200, 14 * kPage + 200, true);
  other->unregister_host(at(9 * kPage + 200));
  expect(0, 16 * kPage, false);
  take(*one, at(100), 20);
  expect(100, 120, true);
  fake_cuda_refuse_registration(2);  // the second call from here on: the table's first page is given back
  try {
    one->register_host(at(20 * kPage), 5 * kPage);
    fail("a registration that CUDA refused was taken for one");
  } catch (const EngineError& err) {
    if (std::string(err.what()).find("tier host: 20480 bytes of a table: bytes 0..12288 of 12288 cannot be pinned") != 0)
      fail(err.what());
  }
  expect(20 * kPage, 25 * kPage, false);
  cudaHostRegister(const_cast<std::byte*>(at(30 * kPage)), 2 * kPage, 0);
  if (other->register_host(at(30 * kPage), 2 * kPage)) fail("memory that somebody else has pinned was registered again");
}

// A thread of the prefetcher touches no device but its own, and the caller's current device stays.
void devices() {
  for (const int current : {1, 0}) {
    cudaSetDevice(current);
    const int64_t before = fake_cuda_first_device_calls();
    {
      Fixture f(false, 100, 1);
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
    order(false, false, seed);
    order(false, true, seed);
    order(true, false, seed);
    order(true, true, seed);
    order(false, false, seed, seed % 2 == 0 ? 20 : 1000);
    order(false, true, seed, 200);
    graph(seed);
    const auto [hit, failure] = failing(seed);
    hits += hit;
    failures += failure;
  }
  if (hits == 0 || failures == 0) fail("nothing was found in the cache, or nothing failed");
  bad_ids();
  registers();
  devices();
  if (fake_cuda_live_events() != 0) fail("events are left");
  std::printf("cuda_engine: %llu rounds, %lld rows found in the cache, %lld failures\n", static_cast<unsigned long long>(rounds),
              static_cast<long long>(hits), static_cast<long long>(failures));
}

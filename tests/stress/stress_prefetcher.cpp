// 16 threads that submit, wait, cancel and drain at random, over every way that rows take, with delays, errors, short reads and
// events out of order; some prefetchers are closed under them. Every row that is delivered must be right, and nothing may hang.
//
//   stress_prefetcher [seconds] [seed]      exit code 0, or a line that says what was wrong
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "engine_faults.h"
#include "io_faults.h"
#include "prefetch/row_prefetcher.h"
#include "table/cached_tier.h"
#include "table/file_tier.h"

namespace {

using namespace engram_kernels;
using Clock = std::chrono::steady_clock;

constexpr int64_t kNumRows = 20'000;
constexpr int kRowDim = 16;
constexpr int kThreads = 16;
constexpr int64_t kMaxIds = 700;
constexpr int kStuckSeconds = 60;

std::atomic<int64_t> progress{0};

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "stress_prefetcher: %s\n", what.c_str());
  std::_Exit(1);
}

float value(int64_t row, int i) { return static_cast<float>(row * kRowDim + i); }

std::vector<float> make_rows() {
  std::vector<float> rows(static_cast<size_t>(kNumRows) * kRowDim);
  for (int64_t r = 0; r < kNumRows; ++r) {
    for (int i = 0; i < kRowDim; ++i) rows[static_cast<size_t>(r * kRowDim + i)] = value(r, i);
  }
  return rows;
}

struct Way {
  const char* name;
  FetchWay fetch;
  const char* io;
  int64_t cached_rows;  // on the device
};

constexpr Way kWays[] = {
    {"host table, gathered in place", FetchWay::kInPlace, "", 0},
    {"host table, staged to a device", FetchWay::kStaged, "", 0},
    {"host table, few rows cached on a device", FetchWay::kStaged, "", 40},
    {"host table, many rows cached on a device", FetchWay::kStaged, "", 4000},
    {"host table, read by a device, ids staged", FetchWay::kUva, "", 0},
    {"table on a device, ids staged", FetchWay::kDevice, "", 0},
    {"file, pread", FetchWay::kFile, "preadv", 0},
    {"file, pread, to a device", FetchWay::kFileStaged, "preadv_buffered", 0},
    {"file, pread, cached on a device", FetchWay::kFileStaged, "preadv", 400},
    {"file, any io", FetchWay::kFile, "auto", 0},
};

struct Outcomes {
  std::atomic<int64_t> right{0}, failed{0}, bad_ids{0}, cancelled{0}, full{0}, timed_out{0}, closed{0};
};

// One caller: a random mix of calls until the time is over or the prefetcher is closed.
class Caller {
 public:
  Caller(RowPrefetcher& prefetcher, const float* slots, int64_t slot_floats, uint64_t seed, Outcomes& outcomes)
      : prefetcher_(prefetcher), slots_(slots), slot_floats_(slot_floats), random_(seed), outcomes_(outcomes) {}

  void run(Clock::time_point until) {
    while (Clock::now() < until && !closed_) {
      const int mine = draw(1, 3);
      for (int i = 0; i < mine && !closed_; ++i) submit();
      std::shuffle(tickets_.begin(), tickets_.end(), random_);
      if (draw(0, 40) == 0) drain();
      while (!tickets_.empty()) finish_one();
      ++progress;
    }
  }

 private:
  struct Ticket {
    int64_t number;
    std::vector<int64_t> ids;
    bool bad;
  };

  int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  void submit() {
    Ticket ticket{0, std::vector<int64_t>(static_cast<size_t>(draw(0, 3) == 0 ? draw(0, kMaxIds) : draw(0, 30))), false};
    for (int64_t& id : ticket.ids) id = draw(-1, draw(0, 1) ? 50 : static_cast<int>(kNumRows) - 1);
    if (!ticket.ids.empty() && draw(0, 30) == 0) {
      ticket.ids[ticket.ids.size() / 2] = draw(0, 1) ? kNumRows : -2;
      ticket.bad = true;
    }
    const auto count = static_cast<int64_t>(ticket.ids.size());
    try {
      ticket.number = prefetcher_.submit({{ticket.ids.data(), count, true}, {count}, false, 0}, draw(0, 2) * 0.01);
    } catch (const PrefetchQueueFull&) {
      ++outcomes_.full;
      return;
    } catch (const std::runtime_error& err) {
      if (std::strstr(err.what(), "submit after close") == nullptr) fail(err.what());
      closed_ = true;
      return;
    }
    tickets_.push_back(std::move(ticket));
  }

  void drain() {
    try {
      prefetcher_.drain(0.05);
    } catch (const PrefetchTimeout&) {
      ++outcomes_.timed_out;
    }
  }

  void finish_one() {
    const Ticket ticket = tickets_.back();
    if (draw(0, 30) == 0) prefetcher_.cancel(ticket.number + draw(-8, 8));  // another's, as like as not
    if (draw(0, 1000) == 0) prefetcher_.clear_cache();
    if (draw(0, 15) == 0) {
      tickets_.pop_back();
      outcomes_.cancelled += prefetcher_.cancel(ticket.number);
      return;
    }
    try {
      const int slot = prefetcher_.wait(ticket.number, draw(0, 3) == 0 ? 0.0005 : 30, 0, true);
      if (ticket.bad) fail("ids out of range were delivered");
      check(ticket, slots_ + slot * slot_floats_);
      prefetcher_.release(slot, 0);
      ++outcomes_.right;
    } catch (const PrefetchTimeout&) {
      ++outcomes_.timed_out;
      return;  // the ticket stays valid
    } catch (const std::out_of_range& err) {
      if (!ticket.bad) fail(std::string("a good request failed: ") + err.what());
      ++outcomes_.bad_ids;
    } catch (const FileReadError& err) {
      if (std::strstr(err.what(), "tier file") == nullptr || std::strstr(err.what(), ": row ") == nullptr) fail(err.what());
      ++outcomes_.failed;
    } catch (const EngineError& err) {
      if (std::strstr(err.what(), ("ticket " + std::to_string(ticket.number) + " ").c_str()) == nullptr) fail(err.what());
      ++outcomes_.failed;
    } catch (const PrefetchCancelled&) {
      ++outcomes_.closed;
    } catch (const UnknownTicket&) {
      ++outcomes_.closed;
    }
    tickets_.pop_back();
  }

  void check(const Ticket& ticket, const float* rows) const {
    for (size_t i = 0; i < ticket.ids.size(); ++i) {
      for (int j = 0; j < kRowDim; ++j) {
        const float wanted = ticket.ids[i] == kNoRow ? 0 : value(ticket.ids[i], j),
                    got = rows[i * kRowDim + static_cast<size_t>(j)];
        if (got != wanted) {
          fail("ticket " + std::to_string(ticket.number) + ", row " + std::to_string(ticket.ids[i]) + ": got " +
               std::to_string(got) + ", wanted " + std::to_string(wanted));
        }
      }
    }
  }

  RowPrefetcher& prefetcher_;
  const float* slots_;
  int64_t slot_floats_;
  std::mt19937_64 random_;
  Outcomes& outcomes_;
  std::vector<Ticket> tickets_;
  bool closed_ = false;
};

// How many requests failed, as some should.
int64_t run(const Way& way, double seconds, uint64_t seed, const std::vector<float>& table, int fd) {
  std::mt19937_64 random(seed);
  const int depth = std::uniform_int_distribution<int>(1, 12)(random);
  const int64_t slot_floats = kMaxIds * kRowDim;
  std::vector<float> slots(static_cast<size_t>(depth + 1) * slot_floats);
  IoFaults faults{.seed = seed, .eio = 0.001, .shorter = 0.1, .reorder = true, .max_delay_us = 50};
  PrefetcherOptions options;
  RowSource& source = options.stager.table;
  source.num_rows = kNumRows;
  source.row_dim = kRowDim;
  source.format = RowFormat::kF32;
  source.row_stride_bytes = kRowDim * 4;
  if (traits_of(way.fetch).reads_tier) {
    auto reader = std::make_shared<FileReader>(std::vector{FileReader::NamedFile(fd, "table")}, 16, way.io);
    reader->wrap_queues(&add_io_faults, &faults);
    const int64_t row_bytes = kRowDim * 4, split = kNumRows / 3;  // the same rows, in two parts that lie in order
    const FileRows rows{row_bytes, row_bytes, kNumRows, {{0, 0, 0}, {0, split * row_bytes, split}}};
    options.stager.tier = std::make_shared<CachedTier>(std::make_shared<FileTier>(reader, rows, FileRows{}), 200'000);
  } else {
    source.rows = reinterpret_cast<const std::byte*>(table.data());
  }
  options.stager.way = way.fetch;
  options.stager.staging_bytes = 1 << 16;  // large requests take several blocks
  options.stager.cache_bytes = way.cached_rows * kRowDim * 4;
  options.stager.num_threads = 2;
  options.out_dtype = DType::kF32;
  options.depth = depth;
  options.slots = reinterpret_cast<std::byte*>(slots.data());
  options.slot_bytes = slot_floats * 4;
  options.trace_spans = 100;
  Outcomes outcomes;
  {
    RowPrefetcher prefetcher(options,
                             add_engine_faults(make_host_engine(2, traits_of(way.fetch).to_device), {seed, 0.01, 100, true}));
    const auto until = Clock::now() + std::chrono::microseconds(static_cast<int64_t>(seconds * 1e6));
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back(
          [&, i] { Caller(prefetcher, slots.data(), slot_floats, seed * 100 + static_cast<uint64_t>(i), outcomes).run(until); });
    }
    if (seed % 2 == 1) {  // closed under the callers
      std::this_thread::sleep_until(until - std::chrono::milliseconds(100));
      prefetcher.close();
    }
    for (std::thread& thread : threads) thread.join();
    PrefetchCounters counters = prefetcher.counters();
    // what was cancelled last may be on its way still
    for (int i = 0; i < 1000 && counters.in_flight > 0; ++i, counters = prefetcher.counters()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    if (counters.in_flight != 0 || counters.queued != 0) fail("requests are left in flight");
    if ((counters.device_cache_rows > 0) != (way.cached_rows > 0)) fail("rows were cached where they should not, or were not");
    if (prefetcher.chrome_trace().find("tier file") == std::string::npos) fail("the trace has no tracks");
  }
  std::printf("%-42s depth %2d: %lld right, %lld failed, %lld bad ids, %lld cancelled, %lld full, %lld time-outs, %lld closed\n",
              way.name, depth, static_cast<long long>(outcomes.right), static_cast<long long>(outcomes.failed),
              static_cast<long long>(outcomes.bad_ids), static_cast<long long>(outcomes.cancelled),
              static_cast<long long>(outcomes.full), static_cast<long long>(outcomes.timed_out),
              static_cast<long long>(outcomes.closed));
  std::fflush(stdout);
  if (outcomes.right == 0) fail("nothing was delivered");
  return outcomes.failed + outcomes.bad_ids;
}

// Ends the process when nobody gets on.
void watch(const std::atomic<bool>& done) {
  int64_t last = -1;
  for (int still = 0; !done; std::this_thread::sleep_for(std::chrono::seconds(1))) {
    const int64_t now = progress;
    still = now == last ? still + 1 : 0;
    last = now;
    if (still > kStuckSeconds) fail("it hangs");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 60;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  const std::vector<float> table = make_rows();
  char path[] = "/tmp/stress_prefetcher.XXXXXX";
  const int fd = mkstemp(path);
  const auto bytes = static_cast<ssize_t>(table.size() * sizeof(float));
  if (fd < 0 || write(fd, table.data(), static_cast<size_t>(bytes)) != bytes || fsync(fd) != 0)
    fail("the table cannot be written");
  unlink(path);
  std::atomic<bool> done{false};
  std::thread watchdog([&done] { watch(done); });
  constexpr int kRounds = 2;  // the second is closed under its callers
  const double share = seconds / (kRounds * static_cast<double>(std::size(kWays)));
  int64_t failures = 0;
  for (int round = 0; round < kRounds; ++round) {
    for (size_t w = 0; w < std::size(kWays); ++w) {
      failures += run(kWays[w], share, seed * 1000 + w * 2 + static_cast<uint64_t>(round), table, fd);
    }
  }
  if (failures == 0) fail("nothing failed, though it should");
  done = true;
  watchdog.join();
  close(fd);
}

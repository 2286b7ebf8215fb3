// Rows of one table, fetched behind the caller's compute. What it promises: docs/prefetch.md.
//
// Scope       tickets: ids in, rows out, decoded, in a ring of depth + 1 slots of one size. Where rows cross a link (file to
//             memory, memory to a device of its own) each distinct row of a request does so once, through a staging ring.
// Ownership   the ring's slots, the table's memory and the ids on a device are the caller's and live until `close`; ids in host
//             memory are copied by `submit`. A slot that `wait` gave is the caller's until `release`, or until the next wait
//             that keeps its slot in the reading place; it is written again behind what the stream of that wait, and the one
//             of its release, hold by then. `close` frees all else: threads, staging memory, the engine.
// Threads     every call may be made from several threads at once. One thread fetches, one stream copies and gathers, in the
//             order of submission. After a fork the child may only destroy it.
// Failure     of a request: thrown by the wait of its ticket, and by no other. A wait that timed out leaves its ticket valid.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "prefetch/copy_engine.h"
#include "prefetch/fetch_way.h"
#include "prefetch/prefetch_trace.h"
#include "prefetch/row_stager.h"
#include "prefetch/slot_ring.h"

namespace engram_kernels {

struct PrefetchQueueFull : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct PrefetchCancelled : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct PrefetchTimeout : std::runtime_error {
  PrefetchTimeout(int64_t ticket, double timeout_s);
  int64_t ticket;
};
struct UnknownTicket : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct PrefetcherOptions {
  RowStagerOptions stager;  // the table, and how its rows come
  DType out_dtype = DType::kBf16;
  int depth = 1;
  std::byte* slots = nullptr;  // depth + 1 slots of slot_bytes each, on the device of the engine
  int64_t slot_bytes = 0;
  std::byte* distinct_rows = nullptr;  // slot_bytes there, for requests that have `places`; null: there are none
  int max_blocks = 0;                  // of a gather on a GPU; 0: as many as there is work for
  int trace_spans = 4096;
};

// Ids of a request: any shape, dense.
struct PrefetchIds {
  RowIds ids;
  std::vector<int64_t> sizes;
  bool on_device = false;
  uintptr_t stream = 0;  // the caller's: ids on a device, and a table that gathers read, are what its work makes of them
  // int32 [count], with ids on a device that has made them distinct: position i wants the row of ids[places[i]], -1: zeros
  const void* places = nullptr;
  int64_t ticket = -1;  // a number that no request had yet, so that the caller knows it whatever happens; -1: the next one
};

struct PrefetchCounters {
  int64_t requests = 0, failed = 0, cancelled = 0;
  int64_t requested = 0, unique = 0;  // rows; unique: that were looked up
  // hits by tier, of `unique`: the table's own, the cache on the device, that in front of a tier
  int64_t device_rows = 0, host_rows = 0, file_rows = 0, remote_rows = 0, device_cache_rows = 0, cached_rows = 0;
  int64_t payload_bytes = 0, moved_bytes = 0;            // of the rows requested; read from a file or copied to a device
  int64_t fetch_ns = 0, id_ns = 0, exposed_wait_ns = 0;  // id_ns: part of fetch_ns that sorted ids and made them distinct
  int64_t in_flight = 0, max_in_flight = 0, queued = 0;
};

class RowPrefetcher {
 public:
  RowPrefetcher(const PrefetcherOptions& options, std::shared_ptr<CopyEngine> engine);
  ~RowPrefetcher();
  RowPrefetcher(const RowPrefetcher&) = delete;
  RowPrefetcher& operator=(const RowPrefetcher&) = delete;

  // A ticket, without waiting for data. Waits at most timeout_s (negative: for ever) for a place in the ring, then throws
  // PrefetchQueueFull. Ids in host memory that name no row fail the ticket.
  int64_t submit(const PrefetchIds& ids, double timeout_s);

  // The slot that holds the rows of the ticket, ordered behind it on the caller's stream. `keep`: until `release`; else it takes
  // the reading place, and the slot that was there is free again. PrefetchTimeout, UnknownTicket, PrefetchCancelled, or what
  // went wrong with the request.
  int wait(int64_t ticket, double timeout_s, uintptr_t stream, bool keep);
  void release(int slot, uintptr_t stream);  // the caller has queued its last use on the stream
  // The caller did not get the slot of this ticket after all (a signal, an output that cannot be written): it can be waited for
  // again. False: no slot of it is out.
  bool restore(int64_t ticket);

  bool knows(int64_t ticket) const;  // it can be waited for
  // False: there is no such ticket any more. Where the ids are on a device: blocks until nothing reads them.
  bool cancel(int64_t ticket);
  void drain(double timeout_s);  // until every request that was submitted has arrived or failed
  void close();                  // drops what was not waited for
  void clear_cache();            // of the device: requests submitted from here on read the table

  PrefetchCounters counters() const;
  std::string chrome_trace() const;
  int64_t memory_bytes() const { return memory_bytes_; }  // of the rings, the slots included, and the device's cache
  int64_t cache_slots() const { return cache_slots_; }    // rows that it has room for

 private:
  struct Request;
  using RequestPtr = std::shared_ptr<Request>;
  class Call;
  // A slot that `wait` gave out: its request, and the stream that reads it.
  struct Lent {
    RequestPtr request;
    uintptr_t stream = 0;
  };
  // A launch that counts the ids that only the device sees.
  struct Counting {
    int64_t ticket = -1;
    int cell = -1;
    Event launched;
  };

  void check_process() const;
  RequestPtr admit(const PrefetchIds& ids, double timeout_s);
  bool begin(const RequestPtr& request, const PrefetchIds& ids);
  void launch_unseen(const RequestPtr& request);
  void check_ids(const Request& request) const;
  void work();
  void process(Request& request);
  void arrived(const RequestPtr& request, std::exception_ptr error);
  bool wait_events(const Request& request, double timeout_s, uintptr_t stream, bool on_host) const;
  [[noreturn]] void fail(const Request& request, std::exception_ptr error);
  Event launch_distinct(const RequestPtr& request, GatherRowsParams gather);
  int take_cell();
  void collect_bad_ids();
  std::exception_ptr bad_ids_of(int64_t ticket);
  void take_back(int slot, uintptr_t stream);
  void free_slot(const Request& request);
  void drop(const RequestPtr& request);
  void count(Request& request, int64_t waited_since_ns);
  GatherRowsParams gather_into(const Request& request) const;

  const PrefetcherOptions options_;
  const FetchWayTraits& way_;
  const int64_t out_row_bytes_;
  std::shared_ptr<CopyEngine> engine_;  // null once closed
  std::unique_ptr<RowStager> stager_;
  int64_t memory_bytes_ = 0, cache_slots_ = 0;
  PrefetchTrace trace_;
  const int process_;

  std::mutex closing_;   // before the others
  std::mutex distinct_;  // the two launches of a request that uses distinct_rows; before mutex_
  mutable std::mutex mutex_;
  std::condition_variable work_, room_, left_;
  SlotRing results_;
  std::unordered_map<int64_t, RequestPtr> tickets_;
  std::deque<RequestPtr> queue_;
  std::vector<Lent> lent_;  // by slot
  // ids that only a device sees: its gathers count what is out of range in cells that it can write to, the first one of them
  // those of captured graphs; a cell is read when its launch is done
  uint32_t* cells_ = nullptr;
  uint32_t seen_of_graphs_ = 0;
  std::vector<int> free_cells_;
  std::deque<Counting> counting_;
  std::vector<std::pair<int64_t, uint32_t>> bad_ids_;  // ticket (-1: a graph), count: found, and not yet told
  int64_t next_ticket_ = 0;
  int reading_ = -1;
  int calls_ = 0;  // that use the engine
  bool closed_ = false;
  PrefetchCounters counters_;
  std::thread worker_;
};

}  // namespace engram_kernels

#include "prefetch/row_prefetcher.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/error.h"
#include "prefetch/deadline.h"

namespace engram_kernels {
namespace {

constexpr const char* kName = "RowPrefetcher";

std::string timeout_text(int64_t ticket, double timeout_s) {
  Text text;
  text << kName << ": ticket " << ticket << " did not arrive in " << timeout_s << " s";
  return text.str();
}

RowFormat float_format_of(DType dtype) {
  int format = 0;
  while (!stores(static_cast<RowFormat>(format), dtype)) ++format;  // each dtype has one
  return static_cast<RowFormat>(format);
}

constexpr int kCellsPerSlot = 4;  // of launches whose count is not read yet

}  // namespace

// What is known of a ticket.
struct RowPrefetcher::Request {
  int64_t number = 0, count = 0;
  RowIds ids{};  // in `kept_ids`, or on the device
  std::vector<int64_t> sizes;
  std::vector<std::byte> kept_ids;
  Event ready, slot_free, slot_also_free;
  int slot = -1;
  bool ids_on_device = false;
  const void* places = nullptr;
  std::atomic<bool> cancelled{false};
  int64_t submitted_ns = 0, fetch_begin_ns = 0, fetch_end_ns = 0;
  StageCounters staged;

  // of the prefetcher's lock
  bool counted = false;  // in the counters
  bool settled = false;  // launched or failed: what is above does not change any more
  bool gone = false;     // cancelled: its slot is free once it is settled
  std::exception_ptr error;
  std::vector<Event> events;
  std::condition_variable changed;
};

// A call that uses the engine: `close` waits until it has left.
class RowPrefetcher::Call {
 public:
  explicit Call(RowPrefetcher& owner) : owner_(owner) {
    owner_.check_process();
    const std::lock_guard lock(owner_.mutex_);
    ++owner_.calls_;
  }
  ~Call() {
    const std::lock_guard lock(owner_.mutex_);
    if (--owner_.calls_ == 0 && owner_.closed_) owner_.left_.notify_all();
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

 private:
  RowPrefetcher& owner_;
};

PrefetchTimeout::PrefetchTimeout(int64_t ticket, double timeout_s)
    : std::runtime_error(timeout_text(ticket, timeout_s)), ticket(ticket) {}

RowPrefetcher::RowPrefetcher(const PrefetcherOptions& options, std::shared_ptr<CopyEngine> engine)
    : options_(options),
      way_(traits_of(options.stager.way)),
      out_row_bytes_(int64_t{options.stager.table.row_dim} * dtype_bytes(options.out_dtype)),
      engine_(std::move(engine)),
      stager_(std::make_unique<RowStager>(options.stager, engine_)),
      memory_bytes_((options.depth + (options.distinct_rows == nullptr ? 1 : 2)) * options.slot_bytes + stager_->memory_bytes()),
      cache_slots_(stager_->cache_slots()),
      trace_(options.trace_spans),
      process_(getpid()),
      results_(options.depth + 1),
      lent_(static_cast<size_t>(options.depth) + 1) {
  EK_CHECK(options.depth >= 1, kName << ": depth is " << options.depth << ", expected at least 1");
  EK_CHECK(options.distinct_rows == nullptr || (way_.gathers_table && way_.to_device),
           kName << ": rows are made distinct on the way '" << way_.name << "'");
  EK_CHECK(options.slots != nullptr && options.slot_bytes >= 0, kName << ": there are no slots");
  if (way_.gathers_table && way_.to_device) {
    const int cells = kCellsPerSlot * (options.depth + 1) + 1;
    cells_ = reinterpret_cast<uint32_t*>(engine_->allocate_host(cells * static_cast<int64_t>(sizeof(uint32_t))));
    std::fill_n(cells_, cells, 0U);
    for (int cell = cells; --cell > 0;) free_cells_.push_back(cell);
  }
}

RowPrefetcher::~RowPrefetcher() { close(); }

void RowPrefetcher::check_process() const {
  if (getpid() != process_) {
    EK_THROW_AS(std::runtime_error, kName << ": it was made before a fork and its threads stayed with the parent; make one here");
  }
}

RowPrefetcher::RequestPtr RowPrefetcher::admit(const PrefetchIds& ids, double timeout_s) {
  EK_CHECK(ids.ids.count <= options_.slot_bytes / out_row_bytes_,
           kName << ": " << ids.ids.count << " ids need " << ids.ids.count * out_row_bytes_
                 << " bytes of rows, a slot of the ring has " << options_.slot_bytes << "; raise ring_bytes or submit fewer");
  EK_CHECK(ids.places == nullptr || (ids.on_device && options_.distinct_rows != nullptr),
           kName << ": places are given for ids that are not on the device, or without memory for distinct rows");
  auto request = std::make_shared<Request>();
  request->count = ids.ids.count;
  request->ids = ids.ids;
  request->sizes = ids.sizes;
  request->ids_on_device = ids.on_device;
  request->places = ids.places;
  std::unique_lock lock(mutex_);
  const auto ready = [this] { return closed_ || (counters_.in_flight < options_.depth && !results_.empty()); };
  const bool room = timeout_s == 0 ? ready() : Deadline(timeout_s).wait(room_, lock, ready);
  if (closed_) EK_THROW_AS(std::runtime_error, kName << ": submit after close");
  if (!room) {
    EK_THROW_AS(PrefetchQueueFull, kName << ": " << counters_.in_flight << " requests are in flight, as many as depth allows ("
                                         << options_.depth << "); wait for one first");
  }
  request->number = ids.ticket >= 0 ? ids.ticket : next_ticket_++;
  EK_CHECK(tickets_.emplace(request->number, request).second, kName << ": ticket " << request->number << " exists already");
  RingSlot slot = results_.take();
  request->slot = slot.number;
  request->slot_free = std::move(slot.after);
  request->slot_also_free = std::move(slot.also_after);
  request->submitted_ns = steady_ns();
  counters_.max_in_flight = std::max(counters_.max_in_flight, ++counters_.in_flight);
  return request;
}

int64_t RowPrefetcher::submit(const PrefetchIds& ids, double timeout_s) {
  const Call call(*this);
  const RequestPtr request = admit(ids, timeout_s);
  const int64_t number = request->number;  // another thread may wait for it, and forget it, from here on
  std::exception_ptr error;
  bool launched = true;
  try {
    launched = begin(request, ids);
  } catch (...) {
    error = std::current_exception();
  }
  if (launched) arrived(request, std::move(error));
  return number;
}

// Launches the request, or leaves it to the worker (false).
bool RowPrefetcher::begin(const RequestPtr& request, const PrefetchIds& ids) {
  if (ids.on_device || way_.gathers_table) request->ready = engine_->record_on(ids.stream);
  if (!ids.on_device) {
    const auto* from = static_cast<const std::byte*>(ids.ids.data);
    request->kept_ids.assign(from, from + ids.ids.count * (ids.ids.are_int64 ? 8 : 4));
    request->ids.data = request->kept_ids.data();
    check_ids(*request);
  }
  if (way_.gathers_table && ids.on_device) {
    launch_unseen(request);
    return true;
  }
  if (!way_.stages()) {
    const GatherRowsParams gather = gather_into(*request);
    request->staged.unique = request->count;
    request->events.push_back(engine_->launch({.after = request->slot_free,
                                               .also_after = request->slot_also_free,
                                               .ready = request->ready,
                                               .gather = &gather,
                                               .keeps = request}));
    return true;
  }
  const std::lock_guard lock(mutex_);
  if (request->gone) throw PrefetchCancelled("RowPrefetcher: cancelled before it began");
  if (!worker_.joinable()) worker_ = start_thread("that fetches", [this] { work(); });
  queue_.push_back(request);
  work_.notify_one();
  return false;
}

// A gather by ids that only the device sees, which counts those that name no row.
void RowPrefetcher::launch_unseen(const RequestPtr& request) {
  const bool captured = engine_->is_captured(request->ready);
  const int cell = captured ? 0 : take_cell();
  GatherRowsParams gather = gather_into(*request);
  gather.error_count = cells_ + cell;
  request->staged.unique = request->count;
  request->events.reserve(2);
  Event launched;
  try {
    launched = request->places != nullptr ? launch_distinct(request, gather)
                                          : engine_->launch({.after = request->slot_free,
                                                             .also_after = request->slot_also_free,
                                                             .ready = request->ready,
                                                             .gather = &gather,
                                                             .keeps = request});
  } catch (...) {  // nothing of it is left on the stream
    const std::lock_guard lock(mutex_);
    if (!captured) free_cells_.push_back(cell);
    throw;
  }
  if (request->places == nullptr) request->events.push_back(launched);
  const std::lock_guard lock(mutex_);
  if (!captured) counting_.push_back({request->number, cell, std::move(launched)});
}

// Each distinct row once over the link, to memory of the device; from there to every place that wants it. The event of the first.
Event RowPrefetcher::launch_distinct(const RequestPtr& request, GatherRowsParams gather) {
  GatherRowsParams spread = gather;
  spread.source = {};
  spread.source.rows = gather.out = options_.distinct_rows;
  spread.source.num_rows = request->count;
  spread.source.row_stride_bytes = out_row_bytes_;
  spread.source.row_dim = gather.source.row_dim;
  spread.source.format = float_format_of(options_.out_dtype);
  spread.row_ids = {request->places, request->count, false};
  spread.error_count = nullptr;
  const std::lock_guard lock(distinct_);  // another request would write to the rows between
  request->events.push_back(engine_->launch({.ready = request->ready, .gather = &gather, .keeps = request}));
  request->events.push_back(engine_->launch({.after = request->slot_free,
                                             .also_after = request->slot_also_free,
                                             .ready = request->ready,
                                             .gather = &spread,
                                             .keeps = request}));
  return request->events.front();
}

void RowPrefetcher::check_ids(const Request& request) const {
  check_row_ids(kName, request.ids, options_.stager.table.num_rows, request.sizes.data(), static_cast<int>(request.sizes.size()));
}

GatherRowsParams RowPrefetcher::gather_into(const Request& request) const {
  GatherRowsParams p{};
  p.source = options_.stager.table;
  p.row_ids = request.ids;
  p.out = options_.slots + request.slot * options_.slot_bytes;
  p.out_dtype = options_.out_dtype;
  p.max_blocks = options_.max_blocks;
  return p;
}

void RowPrefetcher::work() {
  engine_->adopt_thread();
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [this] { return closed_ || !queue_.empty(); });
    if (queue_.empty()) return;
    const RequestPtr request = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    std::exception_ptr error;
    request->fetch_begin_ns = steady_ns();
    try {
      process(*request);
    } catch (...) {
      error = std::current_exception();
    }
    request->fetch_end_ns = steady_ns();
    arrived(request, std::move(error));
    lock.lock();
  }
}

void RowPrefetcher::process(Request& request) {
  if (request.cancelled) throw PrefetchCancelled("RowPrefetcher: cancelled before it began");
  if (request.ids_on_device) {
    request.kept_ids = stager_->fetch_ids(request.ids, request.ready);
    request.ids.data = request.kept_ids.data();
    check_ids(request);
  }
  const EngineLaunch first{
      .after = request.slot_free, .also_after = request.slot_also_free, .ready = way_.gathers_table ? request.ready : nullptr};
  stager_->stage(gather_into(request), first, request.cancelled, &request.events, &request.staged);
}

// The request is launched, or has failed: its waiters may look at it.
void RowPrefetcher::arrived(const RequestPtr& request, std::exception_ptr error) {
  const std::lock_guard lock(mutex_);
  request->error = std::move(error);
  request->settled = true;
  if (request->gone) free_slot(*request);
  request->changed.notify_all();
}

bool RowPrefetcher::wait_events(const Request& request, double timeout_s, uintptr_t stream, bool on_host) const {
  const Deadline deadline(timeout_s);
  std::exception_ptr error;
  for (const Event& event : request.events) {
    try {
      const bool done =
          on_host ? engine_->wait_host(event, deadline.left_s()) : engine_->wait_on(event, stream, deadline.left_s());
      if (!done) return false;
    } catch (...) {  // the others may still read ids that the caller gives up once this throws
      if (error == nullptr) error = std::current_exception();
    }
  }
  if (error != nullptr) std::rethrow_exception(error);
  return true;
}

int RowPrefetcher::wait(int64_t ticket, double timeout_s, uintptr_t stream, bool keep) {
  const Call call(*this);
  const Deadline deadline(timeout_s);
  const int64_t begin_ns = steady_ns();
  RequestPtr request;
  std::exception_ptr error;
  bool ready = false, failed = false;
  {
    std::unique_lock lock(mutex_);
    const auto found = tickets_.find(ticket);
    if (found == tickets_.end()) {
      if (closed_) EK_THROW_AS(PrefetchCancelled, kName << ": it was closed, so ticket " << ticket << " has no rows any more");
      EK_THROW_AS(UnknownTicket, kName << ": ticket " << ticket << " is unknown, was cancelled, or was waited for before");
    }
    request = found->second;
    ready = deadline.wait(request->changed, lock, [&] { return request->settled || request->gone; });
    failed = request->error != nullptr || request->gone;
  }
  if (ready && !failed) {
    try {
      ready = wait_events(*request, deadline.left_s(), stream, false);
    } catch (...) {
      error = std::current_exception();
    }
    if (error == nullptr) error = bad_ids_of(ticket);
  }
  const std::lock_guard lock(mutex_);
  counters_.exposed_wait_ns += steady_ns() - begin_ns;
  if (tickets_.count(ticket) == 0 || request->gone) {
    if (request->gone) EK_THROW_AS(PrefetchCancelled, kName << ": ticket " << ticket << " was cancelled");
    EK_THROW_AS(UnknownTicket, kName << ": ticket " << ticket << " was waited for by another thread");
  }
  if (!ready) throw PrefetchTimeout(ticket, timeout_s);
  if (request->error != nullptr) error = std::move(request->error);  // no thread holds it but this one
  const bool takes_place = error == nullptr && !keep;
  if (takes_place && reading_ >= 0) take_back(reading_, stream);  // may throw, and then the ticket stays valid
  tickets_.erase(ticket);
  count(*request, begin_ns);
  if (error != nullptr) fail(*request, std::move(error));
  lent_[static_cast<size_t>(request->slot)] = {request, stream};
  if (takes_place) {
    reading_ = request->slot;
    --counters_.in_flight;
    room_.notify_one();
  }
  return request->slot;
}

// Under the lock: the request's rows are nobody's.
void RowPrefetcher::fail(const Request& request, std::exception_ptr error) {
  ++counters_.failed;
  free_slot(request);
  try {
    std::rethrow_exception(std::move(error));
  } catch (const EngineError& err) {
    EK_THROW_AS(EngineError, "tier " << (way_.tier == TraceTrack::kDevice ? "device" : "host") << ": ticket " << request.number
                                     << " of " << request.count << " ids, its first row "
                                     << (request.count > 0 && !request.kept_ids.empty() ? request.ids[0] : kNoRow)
                                     << ", on engine " << engine_->name() << ": " << err.what());
  }
}

// Under the lock: a slot that was out is free behind what its own stream, and the caller's, hold now.
void RowPrefetcher::take_back(int slot, uintptr_t stream) {
  Lent& lent = lent_[static_cast<size_t>(slot)];
  if (lent.request == nullptr) return;
  Event after = engine_->record_on(lent.stream);
  Event also_after = stream == lent.stream ? nullptr : engine_->record_on(stream);
  results_.give(slot, std::move(after), std::move(also_after));
  lent = {};
  if (slot == reading_) reading_ = -1;
}

void RowPrefetcher::release(int slot, uintptr_t stream) {
  const Call call(*this);
  const std::lock_guard lock(mutex_);
  if (closed_ || lent_[static_cast<size_t>(slot)].request == nullptr) return;
  const bool was_in_flight = slot != reading_;
  take_back(slot, stream);
  if (was_in_flight) --counters_.in_flight;
  room_.notify_one();
}

bool RowPrefetcher::restore(int64_t ticket) {
  const Call call(*this);
  const std::lock_guard lock(mutex_);
  if (closed_) return false;
  for (size_t slot = 0; slot < lent_.size(); ++slot) {
    Lent& lent = lent_[slot];
    if (lent.request == nullptr || lent.request->number != ticket) continue;
    try {  // the caller may have queued a use of it
      lent.request->events.push_back(engine_->record_on(lent.stream));
    } catch (const EngineError&) {  // then nothing that it queues later runs either
    }
    if (static_cast<int>(slot) == reading_) {
      reading_ = -1;
      ++counters_.in_flight;
    }
    tickets_.emplace(ticket, std::move(lent.request));
    lent = {};
    return true;
  }
  return false;
}

// A cell for a launch whose count nobody waits for.
int RowPrefetcher::take_cell() {
  for (;;) {
    Event oldest;
    {
      const std::lock_guard lock(mutex_);
      if (free_cells_.empty()) collect_bad_ids();
      if (!free_cells_.empty()) {
        const int cell = free_cells_.back();
        free_cells_.pop_back();
        return cell;
      }
      if (!counting_.empty()) oldest = counting_.front().launched;
    }
    try {
      engine_->wait_host(oldest, -1);
    } catch (const std::exception&) {  // its ticket says so
    }
  }
}

// Under the lock: reads the cells of launches that are done.
void RowPrefetcher::collect_bad_ids() {
  for (; !counting_.empty(); counting_.pop_front()) {
    const Counting& oldest = counting_.front();
    try {
      if (!engine_->wait_host(oldest.launched, 0)) break;
    } catch (const std::exception&) {  // its ticket says so
    }
    const uint32_t bad = std::atomic_ref(cells_[oldest.cell]).exchange(0);
    if (bad != 0) bad_ids_.emplace_back(oldest.ticket, bad);
    free_cells_.push_back(oldest.cell);
  }
  // replays may count at any time, so this cell is never written by the host
  const uint32_t of_graphs = std::atomic_ref(cells_[0]).load();
  if (of_graphs != seen_of_graphs_) bad_ids_.emplace_back(-1, of_graphs - seen_of_graphs_);
  seen_of_graphs_ = of_graphs;
}

// What is known by now of ids that only a device saw: of `ticket`, returned; of another, thrown.
std::exception_ptr RowPrefetcher::bad_ids_of(int64_t ticket) {
  if (cells_ == nullptr) return nullptr;
  const std::lock_guard lock(mutex_);
  collect_bad_ids();
  if (bad_ids_.empty()) return nullptr;
  const auto own = std::find_if(bad_ids_.begin(), bad_ids_.end(), [=](const auto& found) { return found.first == ticket; });
  const auto told = own == bad_ids_.end() ? bad_ids_.begin() : own;
  const auto [number, bad] = *told;
  bad_ids_.erase(told);
  Text message;
  message << kName << ": " << bad << " ids of ";
  if (number < 0) {
    message << "a captured graph's requests";
  } else {
    message << "ticket " << number;
  }
  message << " are outside [0, " << options_.stager.table.num_rows << "); their rows are zeros";
  if (number == ticket) return std::make_exception_ptr(std::out_of_range(message.str()));
  throw std::out_of_range(message.str());
}

// Under the lock: what still writes to the slot is before whatever writes to it next.
void RowPrefetcher::free_slot(const Request& request) {
  if (request.events.empty()) {
    results_.give(request.slot, request.slot_free, request.slot_also_free);
  } else {
    results_.give(request.slot, request.events.back());
  }
  --counters_.in_flight;
  room_.notify_one();
}

// Under the lock: nobody gets the rows of this request any more.
void RowPrefetcher::drop(const RequestPtr& request) {
  tickets_.erase(request->number);
  request->cancelled = true;
  request->gone = true;
  const auto queued = std::find(queue_.begin(), queue_.end(), request);
  if (queued != queue_.end()) {
    queue_.erase(queued);
    request->settled = true;
  }
  if (request->settled) free_slot(*request);  // else `arrived` does
  request->changed.notify_all();
}

bool RowPrefetcher::knows(int64_t ticket) const {
  check_process();
  const std::lock_guard lock(mutex_);
  return tickets_.count(ticket) > 0;
}

bool RowPrefetcher::cancel(int64_t ticket) {
  const Call call(*this);
  RequestPtr request;
  {
    std::unique_lock lock(mutex_);
    const auto found = tickets_.find(ticket);
    if (found == tickets_.end()) return false;
    request = found->second;
    ++counters_.cancelled;
    drop(request);
    if (!request->ids_on_device) return true;
    // the caller may give up the memory of these ids now: nothing reads them any more
    request->changed.wait(lock, [&] { return request->settled; });
  }
  try {
    wait_events(*request, -1, 0, true);
  } catch (...) {  // nobody wants to know
  }
  return true;
}

void RowPrefetcher::drain(double timeout_s) {
  const Call call(*this);
  const Deadline deadline(timeout_s);
  std::vector<RequestPtr> requests;
  {
    std::unique_lock lock(mutex_);
    for (const auto& [number, request] : tickets_) requests.push_back(request);
    for (const RequestPtr& request : requests) {
      if (!deadline.wait(request->changed, lock, [&] { return request->settled || request->gone; })) {
        throw PrefetchTimeout(request->number, timeout_s);
      }
    }
    std::erase_if(requests, [](const RequestPtr& request) { return !request->settled; });
  }
  for (const RequestPtr& request : requests) {
    bool done = true;
    try {
      done = wait_events(*request, deadline.left_s(), 0, true);
    } catch (...) {  // that ticket's own wait says so
    }
    if (!done) throw PrefetchTimeout(request->number, timeout_s);
  }
}

void RowPrefetcher::close() {
  if (getpid() != process_) return;
  const std::lock_guard closing(closing_);
  {
    std::unique_lock lock(mutex_);
    if (closed_) return;
    closed_ = true;
    while (!tickets_.empty()) drop(RequestPtr(tickets_.begin()->second));
    room_.notify_all();
    work_.notify_all();
    left_.wait(lock, [this] { return calls_ == 0; });
  }
  if (worker_.joinable()) worker_.join();
  try {
    engine_->wait_host(engine_->launch({}), -1);  // what was launched writes to the slots
  } catch (...) {                                 // its tickets are gone
  }
  const std::lock_guard lock(mutex_);
  for (size_t slot = 0; slot < lent_.size(); ++slot) {  // a caller that copies its rows does not count them out any more
    if (lent_[slot].request != nullptr && static_cast<int>(slot) != reading_) --counters_.in_flight;
    lent_[slot] = {};
  }
  reading_ = -1;
  counting_.clear();
  results_.forget_events();  // here, where the caller has made their device current; this object may go elsewhere
  if (cells_ != nullptr) engine_->free_host(reinterpret_cast<std::byte*>(cells_));
  cells_ = nullptr;
  stager_.reset();
  engine_.reset();
}

// Under the lock: a request that was waited for.
void RowPrefetcher::count(Request& request, int64_t waited_since_ns) {
  PrefetchCounters& c = counters_;
  const StageCounters& staged = request.staged;
  if (request.counted) return;
  request.counted = true;
  ++c.requests;
  c.requested += request.count;
  c.unique += staged.unique;
  c.device_cache_rows += staged.device_cached;
  c.cached_rows += staged.cached_rows;
  (way_.tier == TraceTrack::kRemote ? c.remote_rows : c.file_rows) += staged.tier_rows;
  if (!way_.reads_tier) {
    (way_.tier == TraceTrack::kDevice ? c.device_rows : c.host_rows) += staged.unique - staged.device_cached;
  }
  const RowSource& table = options_.stager.table;
  c.payload_bytes +=
      request.count * (row_value_bytes(table.format, table.row_dim) + row_scale_bytes(table.format, table.row_dim));
  c.moved_bytes += staged.moved_bytes;
  const int64_t now = steady_ns();
  const int64_t cached = staged.device_cached + staged.cached_rows;
  const auto span = [&](TraceTrack track, const char* name, int64_t rows, int64_t begin, int64_t end) {
    trace_.add({track, name, request.number, rows, cached, begin, end});
  };
  if (request.fetch_end_ns > 0) {
    c.fetch_ns += request.fetch_end_ns - request.fetch_begin_ns;
    span(way_.tier, "fetch", staged.unique, request.fetch_begin_ns, request.fetch_end_ns);
  }
  c.id_ns += staged.id_ns;
  for (const Event& event : request.events) {
    EngineTimes times;
    if (!engine_->times(event, &times)) continue;
    c.fetch_ns += times.end_ns - times.begin_ns;
    span(way_.gather, "gather", request.count, times.begin_ns, times.end_ns);
  }
  span(TraceTrack::kCaller, "wait", request.count, waited_since_ns, now);
}

PrefetchCounters RowPrefetcher::counters() const {
  check_process();
  const std::lock_guard lock(mutex_);
  PrefetchCounters counters = counters_;
  counters.queued = static_cast<int64_t>(queue_.size());
  return counters;
}

std::string RowPrefetcher::chrome_trace() const {
  check_process();
  return trace_.json();
}

void RowPrefetcher::clear_cache() {
  check_process();
  const std::lock_guard lock(mutex_);
  if (!closed_) stager_->clear_cache();
}

}  // namespace engram_kernels

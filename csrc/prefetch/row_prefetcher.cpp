#include "prefetch/row_prefetcher.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/error.h"
#include "prefetch/deadline.h"
#include "prefetch/prefetch_request.h"

namespace engram_kernels {
namespace {

constexpr const char* kName = "RowPrefetcher";

std::string in_vain(int64_t ticket, double timeout_s) {
  Text text;
  text << kName << ": ticket " << ticket << " did not arrive in " << timeout_s << " s";
  return text.str();
}

}  // namespace

PrefetchTimeout::PrefetchTimeout(int64_t ticket, double timeout_s)
    : std::runtime_error(in_vain(ticket, timeout_s)), ticket(ticket) {}

RowPrefetcher::RowPrefetcher(const PrefetcherOptions& options, std::shared_ptr<CopyEngine> engine)
    : options_(options),
      out_row_bytes_(int64_t{options.stager.table.row_dim} * dtype_bytes(options.out_dtype)),
      engine_(std::move(engine)),
      stager_(std::make_unique<RowStager>(options.stager, engine_)),
      trace_(options.trace_spans),
      process_(getpid()),
      slots_(options.depth + 1),
      ticket_of_slot_(static_cast<size_t>(options.depth) + 1, -1) {
  EK_CHECK(options.depth >= 1, kName << ": depth is " << options.depth << ", expected at least 1");
  EK_CHECK(options.slots != nullptr && options.slot_bytes >= 0, kName << ": there are no slots");
  if (options.stager.direct) {
    const size_t bytes = ticket_of_slot_.size() * sizeof(uint32_t);
    bad_ids_ = reinterpret_cast<uint32_t*>(engine_->allocate_host(static_cast<int64_t>(bytes)));
    std::memset(bad_ids_, 0, bytes);
  }
}

RowPrefetcher::~RowPrefetcher() {
  close();
  if (bad_ids_ != nullptr) engine_->free_host(reinterpret_cast<std::byte*>(bad_ids_));
}

void RowPrefetcher::check_process() const {
  if (getpid() != process_) {
    EK_THROW_AS(std::runtime_error, kName << ": it was made before a fork and its threads stayed with the parent; make one here");
  }
}

RowPrefetcher::RequestPtr RowPrefetcher::admit(const PrefetchIds& ids, double timeout_s) {
  EK_CHECK(ids.ids.count <= options_.slot_bytes / out_row_bytes_,
           kName << ": " << ids.ids.count << " ids need " << ids.ids.count * out_row_bytes_
                 << " bytes of rows, a slot of the ring has " << options_.slot_bytes << "; raise ring_bytes or submit fewer");
  auto request = std::make_shared<Request>();
  request->count = ids.ids.count;
  request->ids = ids.ids;
  request->sizes = ids.sizes;
  request->ids_on_device = ids.on_device;
  std::unique_lock lock(mutex_);
  const auto ready = [this] { return closed_ || (counters_.in_flight < options_.depth && !slots_.empty()); };
  const bool room = timeout_s == 0 ? ready() : Deadline(timeout_s).wait(room_, lock, ready);
  if (closed_) EK_THROW_AS(std::runtime_error, kName << ": submit after close");
  if (!room) {
    EK_THROW_AS(PrefetchQueueFull, kName << ": " << counters_.in_flight << " requests are in flight, as many as depth allows ("
                                         << options_.depth << "); wait for one first");
  }
  RingSlot slot = slots_.take();
  request->number = next_ticket_++;
  request->slot = slot.number;
  request->slot_free = std::move(slot.after);
  request->submitted_ns = steady_ns();
  ticket_of_slot_[static_cast<size_t>(slot.number)] = request->number;
  tickets_.emplace(request->number, request);
  ++submitting_;
  counters_.max_in_flight = std::max(counters_.max_in_flight, ++counters_.in_flight);
  return request;
}

int64_t RowPrefetcher::submit(const PrefetchIds& ids, double timeout_s) {
  check_process();
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
  const std::lock_guard lock(mutex_);
  if (--submitting_ == 0 && closed_) submitted_.notify_all();
  return number;
}

// Launches the request, or leaves it to the worker (false).
bool RowPrefetcher::begin(const RequestPtr& request, const PrefetchIds& ids) {
  if (ids.on_device) {
    request->ids_ready = engine_->record_on(ids.stream);
  } else {
    const auto* from = static_cast<const std::byte*>(ids.ids.data);
    request->kept_ids.assign(from, from + ids.ids.count * (ids.ids.are_int64 ? 8 : 4));
    request->ids.data = request->kept_ids.data();
    check_ids(*request);
  }
  if (options_.stager.direct && (ids.on_device || !stager_->is_needed())) {
    GatherRowsParams gather = gather_into(*request);
    if (ids.on_device) gather.error_count = bad_ids_ + request->slot;
    request->staged.unique = request->count;
    request->events.push_back(
        engine_->launch({.after = request->slot_free, .ready = request->ids_ready, .gather = &gather, .keeps = request}));
    return true;
  }
  const std::lock_guard lock(mutex_);
  if (request->gone) throw PrefetchCancelled("RowPrefetcher: cancelled before it began");
  if (!worker_.joinable()) worker_ = start_thread("that fetches", [this] { work(); });
  queue_.push_back(request);
  work_.notify_one();
  return false;
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
    request.kept_ids = stager_->fetch_ids(request.ids, request.ids_ready);
    request.ids.data = request.kept_ids.data();
    check_ids(request);
  }
  stager_->stage(gather_into(request), request.slot_free, request.cancelled, &request.events, &request.staged);
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
  for (const Event& event : request.events) {
    const bool done = on_host ? engine_->wait_host(event, deadline.left_s()) : engine_->wait_on(event, stream, deadline.left_s());
    if (!done) return false;
  }
  return true;
}

int RowPrefetcher::wait(int64_t ticket, double timeout_s, uintptr_t stream, bool keep) {
  check_process();
  const Deadline deadline(timeout_s);
  const int64_t begin_ns = steady_ns();
  RequestPtr request;
  std::exception_ptr error;
  bool ready = false, failed = false;
  {
    std::unique_lock lock(mutex_);
    const auto found = tickets_.find(ticket);
    if (found == tickets_.end()) {
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
  tickets_.erase(ticket);
  count(*request, begin_ns);
  if (request->error != nullptr) error = std::move(request->error);  // no thread holds it but this one
  if (error != nullptr) {
    ++counters_.failed;
    free_slot(*request);
    try {
      std::rethrow_exception(error);
    } catch (const EngineError& err) {
      EK_THROW_AS(EngineError, "tier " << (options_.stager.on_device ? "device" : "host") << ": ticket " << ticket << " of "
                                       << request->count << " ids, its first row "
                                       << (request->count > 0 && !request->kept_ids.empty() ? request->ids[0] : kNoRow)
                                       << ", on engine " << engine_->name() << ": " << err.what());
    }
  }
  if (!keep) {
    if (reading_ >= 0) slots_.give(reading_, engine_->record_on(stream));
    reading_ = request->slot;
    --counters_.in_flight;
    room_.notify_one();
  }
  return request->slot;
}

void RowPrefetcher::release(int slot, uintptr_t stream) {
  check_process();
  const std::lock_guard lock(mutex_);
  slots_.give(slot, engine_->record_on(stream));
  --counters_.in_flight;
  room_.notify_one();
}

// Ids that only a device sees are counted there. What is known by now: of `ticket`, returned; of another, thrown.
std::exception_ptr RowPrefetcher::bad_ids_of(int64_t ticket) {
  if (bad_ids_ == nullptr) return nullptr;
  const std::lock_guard lock(mutex_);
  for (size_t slot = 0; slot < ticket_of_slot_.size(); ++slot) {
    const uint32_t bad = std::atomic_ref(bad_ids_[slot]).exchange(0);
    if (bad == 0) continue;
    Text message;
    message << kName << ": " << bad << " ids of ticket " << ticket_of_slot_[slot] << " are outside [0, "
            << options_.stager.table.num_rows << "); their rows are zeros";
    if (ticket_of_slot_[slot] == ticket) return std::make_exception_ptr(std::out_of_range(message.str()));
    throw std::out_of_range(message.str());
  }
  return nullptr;
}

// Under the lock: what still writes to the slot is before whatever writes to it next.
void RowPrefetcher::free_slot(const Request& request) {
  slots_.give(request.slot, request.events.empty() ? request.slot_free : request.events.back());
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
  check_process();
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
  check_process();
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
    submitted_.wait(lock, [this] { return submitting_ == 0; });
  }
  if (worker_.joinable()) worker_.join();
  try {
    engine_->wait_host(engine_->launch({}), -1);  // what was launched writes to the slots
  } catch (...) {                                 // its tickets are gone
  }
}

}  // namespace engram_kernels

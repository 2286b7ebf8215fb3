#include "table/file_reader.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "common/error.h"
#include "table/proc_file.h"
#include "table/read_plan.h"

namespace engram_kernels {
namespace {

constexpr int kMaxQueueDepth = 4096;
constexpr int kMaxStalls = 64;             // results of a read in a row that bring nothing
constexpr int kEndOfFile = 0;              // as an error number
constexpr int64_t kPieceBytes = 16 << 20;  // of a read of a whole range

#define EK_THROW_READ(error, msg)                \
  do {                                           \
    Text ek_text;                                \
    ek_text << "tier file: " << msg;             \
    throw FileReadError((error), ek_text.str()); \
  } while (0)

// What a file looks like from outside, to see later whether it was written to.
struct FileState {
  int64_t size, changed_ns;
};

constexpr int kMaxLooks = 50;  // a millisecond apart
constexpr int64_t kNsPerS = 1'000'000'000;

int64_t nanoseconds(const timespec& time) { return int64_t{time.tv_sec} * kNsPerS + time.tv_nsec; }

// 0, or errno.
int file_state(int fd, FileState* state) {
  struct stat info;
  if (fstat(fd, &info) != 0) return errno;
  *state = {info.st_size, nanoseconds(info.st_mtim)};
  return 0;
}

// The state of a file, such that every later write shows. Most kernels stamp writes with the time of the last clock tick (up to
// 10 ms ago), so two writes within a tick look alike: a file that was changed in this tick is looked at again when the tick is
// over. A stamp of the future, as of another machine's clock, is taken as it is.
int settled_file_state(int fd, FileState* state) {
  for (int look = 0; look < kMaxLooks; ++look) {
    const int error = file_state(fd, state);
    if (error != 0) return error;
    timespec tick;  // what a write would be stamped with
    clock_gettime(CLOCK_REALTIME_COARSE, &tick);
    if (state->changed_ns < nanoseconds(tick) || state->changed_ns > nanoseconds(tick) + kNsPerS) return 0;
    const timespec pause{0, 1'000'000};
    nanosleep(&pause, nullptr);
  }
  return 0;
}

FileState state_of(int fd, const std::string& path, int (*look)(int, FileState*) = file_state) {
  FileState state;
  const int error = look(fd, &state);
  if (error != 0) EK_THROW_READ(error, path << ": fstat failed: " << std::strerror(error));
  return state;
}

// Bytes that can be had without swapping; 0: unknown.
int64_t available_memory_bytes() {
  long kib = 0;
  for_each_line("/proc/meminfo", [&](const char* line) { return std::sscanf(line, "MemAvailable: %ld", &kib) != 1; });
  return int64_t{kib} << 10;
}

// CPUs that this process may use: of its affinity and, where a control group has one, its quota.
int usable_cpus() {
  cpu_set_t allowed;
  int cpus = sched_getaffinity(0, sizeof(allowed), &allowed) == 0 ? CPU_COUNT(&allowed) : 1;
  long quota = 0, period = 0;
  for_each_line("/sys/fs/cgroup/cpu.max", [&](const char* line) { return std::sscanf(line, "%ld %ld", &quota, &period) != 2; });
  if (quota > 0 && period > 0) cpus = std::min(cpus, static_cast<int>((quota + period - 1) / period));
  return std::max(cpus, 1);
}

}  // namespace

// An open file, and what it was like when it was opened.
struct FileReader::File {
  File(int original, std::string name);
  ~File() {
    if (direct_fd >= 0) close(direct_fd);
    close(fd);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  void open_direct();
  void check_unchanged(int64_t row) const;

  int fd = -1, direct_fd = -1;
  std::string path;
  int64_t size = 0, changed_ns = 0, sector_bytes = 4096;
  std::atomic<bool> direct{false};
};

FileReader::File::File(int original, std::string name) : path(std::move(name)) {
  const FileState state = state_of(original, path, settled_file_state);
  size = state.size;
  changed_ns = state.changed_ns;
  fd = fcntl(original, F_DUPFD_CLOEXEC, 0);
  if (fd < 0) EK_THROW_READ(errno, path << ": the descriptor cannot be duplicated: " << std::strerror(errno));
  // io_uring answers EAGAIN, not data, where a descriptor may not block
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
  posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);  // rows are far apart: read-ahead would move 32 pages for each
}

// A descriptor of the same file, whatever its name is now, that reads past the page cache. Where there is none, reads go
// through it.
void FileReader::File::open_direct() {
#if defined(O_DIRECT) && defined(STATX_DIOALIGN)
  direct_fd = open(("/proc/self/fd/" + std::to_string(fd)).c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
  if (direct_fd < 0) return;
  struct statx info;
  const bool known = statx(direct_fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &info) == 0 && (info.stx_mask & STATX_DIOALIGN) != 0;
  if (known) sector_bytes = info.stx_dio_offset_align;
  // 0: the file system takes the flag, but not direct reads of this file
  direct = !known || (sector_bytes > 0 && sector_bytes <= ReadPlan::kPageBytes && info.stx_dio_mem_align <= ReadPlan::kPageBytes);
#endif
}

// FileReadError where the file is not what was opened; `row` is one that was wanted of it.
void FileReader::File::check_unchanged(int64_t row) const {
  const FileState now = state_of(fd, path);
  if (now.size != size) {
    EK_THROW_READ(EIO, path << ": the file has " << now.size << " bytes; it had " << size << " when it was opened; row " << row
                            << " is not what it was");
  }
  if (now.changed_ns != changed_ns) {
    EK_THROW_READ(EIO, path << ": the file was written to after it was opened, or touched (its time of change is another, its "
                               "size is not); row "
                            << row << " may not be what it was; if its rows are those that are meant, open the table again");
  }
}

// What one call has to itself.
struct FileReader::Queue {
  std::unique_ptr<std::byte, decltype(&std::free)> buffers{nullptr, &std::free};
  std::unique_ptr<IoQueue> io;  // destroyed first
  bool io_uring = false;
};

// The queues of one process: a child after a fork has neither the threads nor the rings of its parent.
struct FileReader::Queues {
  pid_t process = getpid();
  std::shared_ptr<PreadPool> threads;
  std::mutex mutex;
  std::condition_variable given_back;
  std::vector<std::unique_ptr<Queue>> free;
  int taken = 0;
  int limit = kMaxQueues;  // fewer where the system had no more of them
  uint64_t made = 0;
};

FileReader::FileReader(const std::vector<NamedFile>& files, int queue_depth, const std::string& io) : queue_depth_(queue_depth) {
  EK_CHECK(queue_depth >= 1 && queue_depth <= kMaxQueueDepth,
           "FileReader: queue_depth is " << queue_depth << ", expected [1, " << kMaxQueueDepth << "]");
  EK_CHECK(!files.empty(), "FileReader: there are no files");
  files_.reserve(files.size());
  for (const auto& [fd, path] : files) files_.push_back(std::make_unique<File>(fd, path));
  name_ = files_[0]->path;
  if (files_.size() > 1) name_ += " and " + std::to_string(files_.size() - 1) + " more files";
  choose_backend(io);
}

FileReader::~FileReader() {
  Queues* queues = queues_.load();
  if (queues != nullptr && queues->process == getpid()) delete queues;
}

void FileReader::choose_backend(const std::string& wanted) {
  const char* forced = std::getenv("EK_FILE_IO");
  const std::string io = wanted == "auto" && forced != nullptr && *forced != '\0' ? forced : wanted;
  const bool any = any_io_ = io == "auto", buffered = io.ends_with("_buffered");
  const std::string backend = buffered ? io.substr(0, io.size() - 9) : io;
  EK_CHECK(any || backend == "io_uring" || backend == "preadv",
           "FileReader: io is '" << io << "', expected auto, io_uring, preadv, io_uring_buffered or preadv_buffered");
  int64_t size = 0;
  for (const auto& file : files_) size += file->size;
  if (any ? size > available_memory_bytes() / 4 : !buffered) {
    for (const auto& file : files_) {
      file->open_direct();
      direct_files_ += file->direct ? 1 : 0;
    }
  }
  use_io_uring_ = backend != "preadv";
  if (use_io_uring_) {
    std::string why;
    std::unique_ptr<Queue> first = make_queue(0, true, &why);
    EK_CHECK(first != nullptr || any, "FileReader: io is '" << io << "', but " << why);
    use_io_uring_ = first != nullptr;
    if (first != nullptr) {
      Queues& queues = this->queues();
      queues.free.push_back(std::move(first));
      queues.made = 1;
    }
  }
}

FileReader::Queues& FileReader::queues() {
  Queues* queues = queues_.load(std::memory_order_acquire);
  if (queues != nullptr && queues->process == getpid()) return *queues;
  auto* fresh = new Queues;
  if (queues_.compare_exchange_strong(queues, fresh)) return *fresh;  // those of the parent, if any, are left alone
  delete fresh;
  return *queues;
}

std::unique_ptr<FileReader::Queue> FileReader::make_queue(uint64_t number, bool io_uring, std::string* why) {
  auto queue = std::make_unique<Queue>();
  const int64_t bytes = queue_depth_ * kMaxReadBytes;
  queue->buffers.reset(static_cast<std::byte*>(std::aligned_alloc(ReadPlan::kPageBytes, static_cast<size_t>(bytes))));
  if (queue->buffers == nullptr) throw std::bad_alloc();
  queue->io_uring = io_uring;
  if (io_uring) {
    queue->io = make_io_uring_queue(queue_depth_, queue->buffers.get(), bytes, why);
    if (queue->io == nullptr) return nullptr;
  } else {
    Queues& queues = this->queues();
    const std::lock_guard lock(queues.mutex);
    if (queues.threads == nullptr) queues.threads = make_pread_pool(std::min(queue_depth_, usable_cpus()));
    queue->io = make_pread_queue(queues.threads);
  }
  if (wrapper_ != nullptr) queue->io.reset(wrapper_(queue->io.release(), number, wrapper_context_));
  return queue;
}

// From here on preadv reads; FileReadError where io_uring was named.
void FileReader::give_up_io_uring(const std::string& why) {
  if (!any_io_) EK_THROW_READ(EIO, name_ << ": io_uring was named, and " << why);
  Queues& queues = this->queues();
  const std::lock_guard lock(queues.mutex);
  if (use_io_uring_.exchange(false)) queues.free.clear();
  queues.limit = kMaxQueues;
}

std::unique_ptr<FileReader::Queue> FileReader::take_queue(const std::atomic<bool>* cancelled) {
  Queues& queues = this->queues();
  for (;;) {
    uint64_t number = 0;
    bool io_uring = false;
    {
      std::unique_lock lock(queues.mutex);
      while (queues.taken >= queues.limit) {
        queues.given_back.wait_for(lock, std::chrono::milliseconds(10));
        if (cancelled != nullptr && cancelled->load()) throw FetchCancelled("tier file: " + name_ + ": the fetch was cancelled");
      }
      ++queues.taken;
      if (!queues.free.empty()) {
        std::unique_ptr<Queue> queue = std::move(queues.free.back());
        queues.free.pop_back();
        return queue;
      }
      number = queues.made++;
      io_uring = use_io_uring_;
    }
    std::string why;
    std::unique_ptr<Queue> queue;
    try {
      queue = make_queue(number, io_uring, &why);
    } catch (...) {
      give_queue(nullptr);
      throw;
    }
    if (queue != nullptr) return queue;
    give_queue(nullptr);
    {
      const std::lock_guard lock(queues.mutex);
      const int others = queues.taken + static_cast<int>(queues.free.size());
      queues.limit = std::max(others, 1);
      if (others > 0) continue;  // one of them will do
    }
    give_up_io_uring(why);
  }
}

void FileReader::give_queue(std::unique_ptr<Queue> queue) {
  Queues& queues = this->queues();
  const std::lock_guard lock(queues.mutex);
  --queues.taken;
  if (queue != nullptr && queue->io_uring == use_io_uring_) queues.free.push_back(std::move(queue));
  queues.given_back.notify_one();
}

void FileReader::wrap_queues(IoQueueWrapper wrapper, void* context) {
  Queues& queues = this->queues();
  const std::lock_guard lock(queues.mutex);
  wrapper_ = wrapper;
  wrapper_context_ = context;
  queues.free.clear();
  queues.made = 0;
}

// One call of `read`: keeps the queue full, continues what came back short, narrows down what failed.
class FileReader::Request {
 public:
  Request(FileReader& reader, Queue& queue, ReadPlan& plan, ReadCounters& counters, const std::atomic<bool>* cancelled)
      : reader_(reader), queue_(queue), plan_(plan), counters_(counters), cancelled_(cancelled) {
    flights_.resize(static_cast<size_t>(reader.queue_depth_));
    for (int slot = reader.queue_depth_; slot-- > 0;) free_.push_back(slot);
  }

  void run() {
    std::vector<IoDone> done(flights_.size());
    while (fill() || in_flight() > 0) {
      const int count = queue_.io->wait(done.data(), static_cast<int>(done.size()));
      for (int i = 0; i < count; ++i) finish(done[static_cast<size_t>(i)]);
    }
    if (failed_row_ >= 0) report();
    if (stopped_) throw FetchCancelled("tier file: " + reader_.name_ + ": the fetch was cancelled");
  }

  size_t in_flight() const { return flights_.size() - free_.size(); }

 private:
  struct Flight {
    PlannedRead read;
    int64_t got;
    int stalls;
    bool direct;
  };

  // Starts what there is room for; whether anything was started.
  bool fill() {
    stopped_ = stopped_ || (cancelled_ != nullptr && cancelled_->load(std::memory_order_relaxed));
    bool any = false;
    while (!free_.empty() && !stopped_ && failed_row_ < 0) {
      PlannedRead read;
      if (!again_.empty()) {
        read = again_.back();
        again_.pop_back();
      } else if (!plan_.next(&read)) {
        break;
      }
      const int slot = free_.back();
      free_.pop_back();
      flights_[static_cast<size_t>(slot)] = {read, 0, 0, file(read.file).direct.load(std::memory_order_relaxed)};
      start(slot);
      any = true;
    }
    return any;
  }

  void start(int slot) {
    const Flight& flight = flights_[static_cast<size_t>(slot)];
    const File& from = file(flight.read.file);
    queue_.io->submit({flight.direct ? from.direct_fd : from.fd, slot, flight.read.begin + flight.got,
                       flight.read.end - flight.read.begin - flight.got, buffer(slot) + flight.got, flight.direct});
    ++counters_.reads;
  }

  void finish(const IoDone& done) {
    Flight& flight = flights_[static_cast<size_t>(done.slot)];
    File& from = file(flight.read.file);
    int error = -1;
    if (done.result == -EINVAL && flight.direct) {  // refused at the first read, not at open, as some file systems do
      if (from.direct.exchange(false, std::memory_order_relaxed)) --reader_.direct_files_;
      flight.direct = false;
    } else if (done.result == -EINTR || done.result == -EAGAIN) {
      if (++flight.stalls > kMaxStalls) error = static_cast<int>(-done.result);
    } else if (done.result < 0) {
      error = static_cast<int>(-done.result);
    } else {
      counters_.moved_bytes += done.result;
      const int64_t got = flight.got + done.result;
      if (got >= flight.read.needed - flight.read.begin) {
        plan_.copy_out(flight.read, buffer(done.slot));
        free_.push_back(done.slot);
        return;
      }
      // a direct read goes on at a whole sector
      const int64_t whole = flight.direct ? got / from.sector_bytes * from.sector_bytes : got;
      flight.stalls = whole > flight.got ? 0 : flight.stalls + 1;
      flight.got = whole;
      if (flight.stalls > kMaxStalls) error = EIO;
      if (done.result == 0 || (flight.stalls > 0 && state_of(from.fd, from.path).size < flight.read.needed)) error = kEndOfFile;
    }
    if (error < 0 && failed_row_ < 0 && !stopped_) return start(done.slot);
    if (error >= 0) fail(flight.read, error);
    free_.push_back(done.slot);
  }

  void fail(const PlannedRead& read, int error) {
    if (read.first < read.last) {  // which of its rows it is, only they can tell
      for (int64_t k = read.last; k >= read.first; --k) again_.push_back(plan_.only(read, k));
      return;
    }
    const Piece piece = plan_.piece(read.first);
    if (failed_row_ >= 0 && piece.row >= failed_row_) return;
    failed_row_ = piece.row;
    failed_file_ = piece.file;
    failed_at_ = piece.offset;
    failed_end_ = piece.offset + piece.bytes;
    error_ = error;
  }

  [[noreturn]] void report() const {
    const File& of = file(failed_file_);
    if (error_ == kEndOfFile) {
      EK_THROW_READ(EIO, of.path << ": row " << failed_row_ << " ends at byte " << failed_end_ << ", but the file has "
                                 << state_of(of.fd, of.path).size << " bytes; it had " << of.size << " when it was opened");
    }
    EK_THROW_READ(
        error_, of.path << ": row " << failed_row_ << " at byte " << failed_at_ << " cannot be read: " << std::strerror(error_));
  }

  File& file(int number) const { return *reader_.files_[static_cast<size_t>(number)]; }
  std::byte* buffer(int slot) const { return queue_.buffers.get() + slot * kMaxReadBytes; }

  FileReader& reader_;
  Queue& queue_;
  ReadPlan& plan_;
  ReadCounters& counters_;
  const std::atomic<bool>* cancelled_;
  std::vector<Flight> flights_;
  std::vector<int> free_;
  std::vector<PlannedRead> again_;  // single rows of reads that failed
  int64_t failed_row_ = -1, failed_at_ = 0, failed_end_ = 0;
  int failed_file_ = 0, error_ = 0;
  bool stopped_ = false;
};

void FileReader::check(const FileRows& rows) const {
  EK_CHECK(rows.row_bytes >= 0 && rows.stride_bytes >= rows.row_bytes && rows.num_rows >= 0 &&
               (rows.num_rows == 0 || (!rows.parts.empty() && rows.parts[0].first_row == 0)),
           "FileReader: " << rows.num_rows << " rows of " << rows.row_bytes << " bytes, " << rows.stride_bytes
                          << " apart, cannot lie in " << rows.parts.size() << " parts");
  for (size_t p = 0; p < rows.parts.size(); ++p) {
    const RowPart& part = rows.parts[p];
    EK_CHECK(part.file >= 0 && static_cast<size_t>(part.file) < files_.size(),
             "FileReader: part " << p << " is in file " << part.file << ", expected [0, " << files_.size() << ")");
    const File& file = *files_[static_cast<size_t>(part.file)];
    const int64_t count = rows.end_row(p) - part.first_row;
    EK_CHECK(part.offset >= 0 && (count > 0 || (count == 0 && rows.num_rows == 0)) &&
                 static_cast<unsigned __int128>(rows.stride_bytes) * static_cast<uint64_t>(count) <=
                     static_cast<unsigned __int128>(std::max<int64_t>(file.size - part.offset, 0)),
             "FileReader: " << count << " rows of " << rows.stride_bytes << " bytes from byte " << part.offset
                            << " are not inside " << file.path << " of " << file.size << " bytes");
  }
}

void FileReader::read(const RowsWanted* wanted, int num_wanted, const RowRequest& request, ReadCounters* counters,
                      const std::atomic<bool>* cancelled) {
  for (int w = 0; w < num_wanted; ++w) {
    const FileRows& rows = *wanted[w].rows;
    check(rows);
    for (int64_t i = 0; i < request.count; ++i) {
      const int64_t row = request.ids[i];
      EK_CHECK_INDEX(row >= 0 && row < rows.num_rows,
                     "FileReader: row_ids[" << i << "] is " << row << ", expected [0, " << rows.num_rows << ")");
    }
  }
  if (request.count == 0) return;
  for (;;) {
    try {
      return read_once(wanted, num_wanted, request, counters, cancelled);
    } catch (const IoQueueBroken& err) {
      give_up_io_uring(err.what());
    }
  }
}

void FileReader::read_once(const RowsWanted* wanted, int num_wanted, const RowRequest& request, ReadCounters* counters,
                           const std::atomic<bool>* cancelled) {
  const bool any_direct = direct_files_.load(std::memory_order_relaxed) > 0;
  ReadPlan plan(wanted, num_wanted, request, any_direct ? ReadPlan::kPageBytes : 1, kMaxReadBytes);
  ReadCounters counted;
  std::unique_ptr<Queue> queue = take_queue(cancelled);
  Request run(*this, *queue, plan, counted, cancelled);
  try {
    run.run();
  } catch (...) {
    if (run.in_flight() > 0) (void)queue.release();  // the queue itself failed: its buffers may still be written to
    give_queue(std::move(queue));
    throw;
  }
  give_queue(std::move(queue));
  plan.copy_duplicates();
  check_unchanged(wanted, num_wanted, request.ids, request.count);
  if (counters != nullptr) {
    counters->reads += counted.reads;
    counters->moved_bytes += counted.moved_bytes;
  }
}

void FileReader::read_range(int file, int64_t offset, int64_t bytes, std::byte* out) const {
  EK_CHECK(file >= 0 && static_cast<size_t>(file) < files_.size(),
           "FileReader: file is " << file << ", expected [0, " << files_.size() << ")");
  const File& from = *files_[static_cast<size_t>(file)];
  EK_CHECK(offset >= 0 && bytes >= 0 && bytes <= from.size - offset, "FileReader: bytes " << offset << " + " << bytes
                                                                                          << " are not inside " << from.path
                                                                                          << " of " << from.size << " bytes");
  for (int64_t done = 0; done < bytes;) {
    const auto want = static_cast<size_t>(std::min(kPieceBytes, bytes - done));
    const ssize_t got = pread(from.fd, out + done, want, offset + done);
    if (got > 0) {
      done += got;
    } else if (got == 0 || errno != EINTR) {
      const int error = got == 0 ? EIO : errno;
      EK_THROW_READ(error, from.path << ": bytes from " << offset + done
                                     << " on cannot be read: " << (got == 0 ? "the file was cut short" : std::strerror(error)));
    }
  }
  from.check_unchanged(0);
}

void FileReader::accept_changes() {
  for (const auto& file : files_) {
    const FileState now = state_of(file->fd, file->path);
    file->size = now.size;
    file->changed_ns = now.changed_ns;
  }
}

void FileReader::check_unchanged(const RowsWanted* wanted, int num_wanted, const int64_t* ids, int64_t count) const {
  if (count == 0) return;
  if (files_.size() == 1) return files_[0]->check_unchanged(ids[0]);
  std::vector<int64_t> row_of(files_.size(), -1);  // a row of each file that was read from
  for (int w = 0; w < num_wanted; ++w) {
    const FileRows& rows = *wanted[w].rows;
    if (rows.row_bytes == 0) continue;
    size_t part = 0;
    for (int64_t i = 0; i < count; ++i) {
      part = rows.part_of(ids[i], part);
      int64_t& row = row_of[static_cast<size_t>(rows.parts[part].file)];
      if (row < 0) row = ids[i];
    }
  }
  for (size_t f = 0; f < files_.size(); ++f) {
    if (row_of[f] >= 0) files_[f]->check_unchanged(row_of[f]);
  }
}

}  // namespace engram_kernels

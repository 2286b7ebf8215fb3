// Reads and writes of a file that are in flight at the same time: one interface, two backends (io_uring, threads that call
// pread and pwrite).
//
// Scope       bytes at positions; no rows, no retries, no meaning of an error.
// Ownership   a queue borrows descriptors and buffers until every read of it was returned by `wait`.
// Threads     a queue is used by one thread at a time, which may be another one once nothing is in flight.
// Failure     of a read, as a negative errno in its result; of the queue as such, IoQueueBroken.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace engram_kernels {

struct IoRead {
  int fd;
  int slot;  // whose buffer it is; comes back with the result
  int64_t offset;
  int64_t bytes;  // below 2^31
  std::byte* to;
  bool direct = false;  // past the page cache, in whole sectors
  bool write = false;   // `to` is where the bytes come from
};

struct IoDone {
  int slot;
  int64_t result;  // bytes read (0: end of file), or -errno
};

class IoQueue {
 public:
  virtual ~IoQueue() = default;
  virtual void submit(const IoRead& read) = 0;       // at most `depth` in flight; may start only in `wait`
  virtual int wait(IoDone* done, int capacity) = 0;  // blocks until one is done; how many are returned
};

// Whether the build found liburing.
bool io_uring_compiled_in();

// The system takes no more reads of this queue; what was submitted may still be written to its buffers.
struct IoQueueBroken : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Null where io_uring is not compiled in or the system refuses it; `why` then says so. `buffers` (`bytes` of them) are
// registered where that is allowed, which saves pinning them at each read.
std::unique_ptr<IoQueue> make_io_uring_queue(int depth, std::byte* buffers, int64_t bytes, std::string* why);

// Threads that call pread for all queues of one reader; started when there is work for them, at most `max_threads`.
class PreadPool;
std::shared_ptr<PreadPool> make_pread_pool(int max_threads);
std::unique_ptr<IoQueue> make_pread_queue(std::shared_ptr<PreadPool> pool);

// Makes another queue of one that it takes over: how tests put faults between a reader and the system. `number` counts the queues
// of a reader.
using IoQueueWrapper = IoQueue* (*)(IoQueue* queue, uint64_t number, void* context);

}  // namespace engram_kernels

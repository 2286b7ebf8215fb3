// Reads of a file that are in flight at the same time: one interface, two backends (io_uring, threads that call pread),
// and a decorator that injects faults for tests.
//
// Scope       bytes at positions; no rows, no retries, no meaning of an error.
// Ownership   a queue borrows descriptors and buffers until every read of it was returned by `wait`.
// Threads     a queue is used by one thread at a time, which may be another one once nothing is in flight.
// Failure     per read, as a negative errno in its result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace engram_kernels {

struct IoRead {
  int fd;
  int slot;  // whose buffer it is; comes back with the result
  int64_t offset;
  int64_t bytes;  // below 2^31
  std::byte* to;
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

// Null where io_uring is not compiled in or the system refuses it; `why` then says so. `buffers` (`bytes` of them) are
// registered where that is allowed, which saves pinning them at each read.
std::unique_ptr<IoQueue> make_io_uring_queue(int depth, std::byte* buffers, int64_t bytes, std::string* why);

// Threads that call pread for all queues of one file; started when there is work for them, at most `max_threads`.
class PreadPool;
std::shared_ptr<PreadPool> make_pread_pool(int max_threads);
std::unique_ptr<IoQueue> make_pread_queue(std::shared_ptr<PreadPool> pool);

// What a test wants to go wrong. Draws come from the seed and the number of the queue.
struct IoFaults {
  uint64_t seed = 0;
  double eio = 0;         // share of reads that fail
  double shorter = 0;     // share of reads that return fewer bytes, at least one
  bool reorder = false;   // results come back in another order
  int max_delay_us = 0;   // before results are returned
  int64_t bad_begin = 0;  // reads that touch bytes [bad_begin, bad_end) always fail
  int64_t bad_end = 0;
  int refused_fd = -1;  // reads of this descriptor fail with EINVAL, as where O_DIRECT is refused
};
std::unique_ptr<IoQueue> make_faulty_queue(std::unique_ptr<IoQueue> queue, const IoFaults& faults, uint64_t number);

}  // namespace engram_kernels

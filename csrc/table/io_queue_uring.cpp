#include "table/io_queue.h"

#ifdef EK_WITH_IO_URING
#include <liburing.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <thread>

namespace engram_kernels {
namespace {

class UringQueue final : public IoQueue {
 public:
  UringQueue() = default;
  ~UringQueue() override {
    if (open_) io_uring_queue_exit(&ring_);
  }

  // 0, or -errno
  int open(int depth, std::byte* buffers, int64_t bytes) {
    // completions are looked for in `wait` alone, so no interrupt of the thread is wanted; before Linux 5.19 the flag is unknown
    int error = io_uring_queue_init(static_cast<unsigned>(depth), &ring_, IORING_SETUP_COOP_TASKRUN);
    if (error == -EINVAL) error = io_uring_queue_init(static_cast<unsigned>(depth), &ring_, 0);
    if (error != 0) return error;
    open_ = true;
    if ((error = try_out()) != 0) return error;
    const iovec all{buffers, static_cast<size_t>(bytes)};
    registered_ = io_uring_register_buffers(&ring_, &all, 1) == 0;  // refused beyond RLIMIT_MEMLOCK: slower, not wrong
    return 0;
  }

  void submit(const IoRead& read) override {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    if (sqe == nullptr) throw std::logic_error("UringQueue: more reads than its depth");
    const auto bytes = static_cast<unsigned>(read.bytes);
    const auto offset = static_cast<uint64_t>(read.offset);
    if (read.write) {
      io_uring_prep_write(sqe, read.fd, read.to, bytes, offset);
    } else if (registered_) {
      io_uring_prep_read_fixed(sqe, read.fd, read.to, bytes, offset, 0);
    } else {
      io_uring_prep_read(sqe, read.fd, read.to, bytes, offset);
    }
    io_uring_sqe_set_data64(sqe, static_cast<uint64_t>(read.slot));
  }

  int wait(IoDone* done, int capacity) override {
    for (;;) {
      const int error = io_uring_submit_and_wait(&ring_, 1);
      int count = 0;
      io_uring_cqe* cqe = nullptr;
      while (count < capacity && io_uring_peek_cqe(&ring_, &cqe) == 0) {
        done[count++] = {static_cast<int>(io_uring_cqe_get_data64(cqe)), cqe->res};
        io_uring_cqe_seen(&ring_, cqe);
      }
      if (count > 0) return count;
      if (error < 0 && error != -EINTR && error != -EAGAIN && error != -EBUSY) {
        throw IoQueueBroken(std::string("io_uring_enter failed: ") + std::strerror(-error));
      }
      std::this_thread::yield();  // the kernel is short of memory for requests: what is in flight will free some
    }
  }

 private:
  // A filter of system calls may allow the setup of a ring and refuse its use. 0, or -errno
  int try_out() {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    io_uring_prep_nop(sqe);
    int error = -EINTR;
    while (error == -EINTR) error = io_uring_submit_and_wait(&ring_, 1);
    if (error < 0) return error;
    io_uring_cqe* cqe = nullptr;
    if (io_uring_peek_cqe(&ring_, &cqe) != 0) return -EIO;
    error = cqe->res;
    io_uring_cqe_seen(&ring_, cqe);
    return error;
  }

  io_uring ring_{};
  bool open_ = false, registered_ = false;
};

}  // namespace

bool io_uring_compiled_in() { return true; }

std::unique_ptr<IoQueue> make_io_uring_queue(int depth, std::byte* buffers, int64_t bytes, std::string* why) {
  auto queue = std::make_unique<UringQueue>();
  if (const int error = queue->open(depth, buffers, bytes); error != 0) {
    *why = std::string("io_uring is refused: ") + std::strerror(-error);
    return nullptr;
  }
  return queue;
}

}  // namespace engram_kernels

#else

namespace engram_kernels {

bool io_uring_compiled_in() { return false; }

std::unique_ptr<IoQueue> make_io_uring_queue(int, std::byte*, int64_t, std::string* why) {
  *why = "liburing was not found when this module was built";
  return nullptr;
}

}  // namespace engram_kernels

#endif

// What the file tier and the row cache are measured against: raw reads of random pages, LRU, and the best that a cache can
// do. Compiled by native.py when a benchmark needs it; no part of the package.
#include <fcntl.h>
#include <liburing.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <list>
#include <memory>
#include <set>
#include <unordered_map>
#include <vector>

namespace {

constexpr unsigned kPageBytes = 4096;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::unique_ptr<char, decltype(&std::free)> pages(int64_t count) {
  return {static_cast<char*>(std::aligned_alloc(kPageBytes, static_cast<size_t>(count) * kPageBytes)), &std::free};
}

}  // namespace

extern "C" {

// Reads `count` pages with `depth` in flight, buffers registered; seconds, or -1.
double raw_io_uring(int fd, const int64_t* page_ids, int64_t count, int depth) {
  io_uring ring;
  if (io_uring_queue_init(static_cast<unsigned>(depth), &ring, 0) != 0) return -1;
  auto buffers = pages(depth);
  const iovec all{buffers.get(), static_cast<size_t>(depth) * kPageBytes};
  const bool fixed = io_uring_register_buffers(&ring, &all, 1) == 0;
  std::vector<uint64_t> free;
  for (int slot = 0; slot < depth; ++slot) free.push_back(static_cast<uint64_t>(slot));
  const auto start = std::chrono::steady_clock::now();
  bool failed = false;
  for (int64_t submitted = 0, done = 0; done < count && !failed;) {
    while (submitted < count && !free.empty()) {
      io_uring_sqe* sqe = io_uring_get_sqe(&ring);
      char* to = buffers.get() + free.back() * kPageBytes;
      const auto offset = static_cast<uint64_t>(page_ids[submitted++]) * kPageBytes;
      if (fixed) {
        io_uring_prep_read_fixed(sqe, fd, to, kPageBytes, offset, 0);
      } else {
        io_uring_prep_read(sqe, fd, to, kPageBytes, offset);
      }
      io_uring_sqe_set_data64(sqe, free.back());
      free.pop_back();
    }
    io_uring_submit_and_wait(&ring, 1);
    io_uring_cqe* cqe = nullptr;
    while (io_uring_peek_cqe(&ring, &cqe) == 0) {
      failed = failed || cqe->res != static_cast<int>(kPageBytes);
      free.push_back(io_uring_cqe_get_data64(cqe));
      io_uring_cqe_seen(&ring, cqe);
      ++done;
    }
  }
  const double seconds = seconds_since(start);
  io_uring_queue_exit(&ring);
  return failed ? -1 : seconds;
}

// The same pages one after the other; seconds, or -1.
double raw_synchronous(int fd, const int64_t* page_ids, int64_t count) {
  auto buffer = pages(1);
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < count; ++i) {
    if (pread(fd, buffer.get(), kPageBytes, page_ids[i] * kPageBytes) != static_cast<ssize_t>(kPageBytes)) return -1;
  }
  return seconds_since(start);
}

// Hits of a fully associative LRU cache.
int64_t lru_hits(const int64_t* rows, int64_t count, int64_t slots) {
  std::list<int64_t> order;
  std::unordered_map<int64_t, std::list<int64_t>::iterator> where;
  int64_t hits = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto found = where.find(rows[i]);
    if (found != where.end()) {
      ++hits;
      order.splice(order.begin(), order, found->second);
      continue;
    }
    order.push_front(rows[i]);
    where[rows[i]] = order.begin();
    if (static_cast<int64_t>(order.size()) > slots) {
      where.erase(order.back());
      order.pop_back();
    }
  }
  return hits;
}

// Hits of the best cache there is: it knows the future, evicts what is needed last, and does not admit what is needed later
// still (Belady's MIN with bypass).
int64_t ideal_hits(const int64_t* rows, int64_t count, int64_t slots) {
  std::vector<int64_t> next(static_cast<size_t>(count));
  std::unordered_map<int64_t, int64_t> seen;
  for (int64_t i = count; i-- > 0;) {
    const auto found = seen.find(rows[i]);
    next[static_cast<size_t>(i)] = found == seen.end() ? count + i : found->second;  // never again: told apart by i
    seen[rows[i]] = i;
  }
  std::set<int64_t> needed;  // next uses of what is cached
  int64_t hits = 0;
  for (int64_t i = 0; i < count; ++i) {
    hits += static_cast<int64_t>(needed.erase(i));
    if (next[static_cast<size_t>(i)] >= count) continue;
    needed.insert(next[static_cast<size_t>(i)]);
    if (static_cast<int64_t>(needed.size()) > slots) needed.erase(std::prev(needed.end()));
  }
  return hits;
}

}  // extern "C"

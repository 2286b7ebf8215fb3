// A queue that injects faults into the reads of a file, for tests: what csrc/table/io_queue.h calls an IoQueueWrapper.
#pragma once

#include <cstdint>

#include "table/io_queue.h"

namespace engram_kernels {

// What goes wrong. Draws come from the seed and the number of the queue.
struct IoFaults {
  uint64_t seed = 0;
  double eio = 0;         // share of reads that fail
  double shorter = 0;     // share of reads that return fewer bytes, at least one
  bool reorder = false;   // results come back in another order
  int max_delay_us = 0;   // before results are returned
  int64_t bad_begin = 0;  // reads that touch bytes [bad_begin, bad_end) always fail
  int64_t bad_end = 0;
  bool refuse_direct = false;  // reads past the page cache fail with EINVAL, as where O_DIRECT is refused
};

// As FileReader::wrap_queues takes it; `faults` is an IoFaults that outlives the reader.
IoQueue* add_io_faults(IoQueue* queue, uint64_t number, void* faults);

}  // namespace engram_kernels

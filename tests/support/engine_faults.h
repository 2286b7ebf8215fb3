// An engine that injects faults into the stream of another one, for tests.
#pragma once

#include <cstdint>
#include <memory>

#include "prefetch/copy_engine.h"

namespace engram_kernels {

// What goes wrong. Draws come from the seed.
struct EngineFaults {
  uint64_t seed = 0;
  double error = 0;      // share of launches that fail
  int max_delay_us = 0;  // before a launch runs
  bool reorder = false;  // events are seen to be done later than those of later launches
};

std::shared_ptr<CopyEngine> add_engine_faults(std::shared_ptr<CopyEngine> engine, const EngineFaults& faults);

}  // namespace engram_kernels

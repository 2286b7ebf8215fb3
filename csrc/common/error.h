// Errors of the torch-free layer. Every message names the op, the argument and the value that was wrong.
#pragma once

#include <stdexcept>

#include "common/text.h"

// A wrong argument. torch and pybind11 turn std::invalid_argument into ValueError, std::out_of_range into IndexError.
// `msg` is what Text takes: EK_CHECK(n > 0, "gate: n is " << n).
#define EK_THROW_AS(exception, msg) \
  do {                              \
    ::engram_kernels::Text ek_text; \
    ek_text << msg;                 \
    throw exception(ek_text.str()); \
  } while (0)

#define EK_CHECK(cond, msg)                               \
  do {                                                    \
    if (!(cond)) EK_THROW_AS(std::invalid_argument, msg); \
  } while (0)

// A data value (an id) outside its range.
#define EK_CHECK_INDEX(cond, msg)                     \
  do {                                                \
    if (!(cond)) EK_THROW_AS(std::out_of_range, msg); \
  } while (0)

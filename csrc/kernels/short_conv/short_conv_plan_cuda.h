// How the launchers of short_conv share tokens out among blocks. Included by .cu files only.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "kernels/short_conv/short_conv_rows_cuda.h"

namespace engram_kernels {
namespace {

constexpr int64_t kMaxHidden = 1 << 22;
constexpr int kMaxBlocksOfSm = 16;
constexpr int kSharedBytesOfSm = 228 * 1024;
constexpr int kReservedSharedBytes = 1024;  // of a block

inline void check_launch(const ShortConvParams& p) {
  check_params(p);
  EK_CHECK(p.branches <= kMaxGridY, "short_conv: branches is " << p.branches << ", expected at most " << kMaxGridY);
  EK_CHECK(p.hidden_size <= kMaxHidden, "short_conv: hidden_size is " << p.hidden_size << ", expected at most " << kMaxHidden);
  EK_CHECK(p.dilation <= INT32_MAX / kMaxTaps,
           "short_conv: dilation is " << p.dilation << ", expected at most " << INT32_MAX / kMaxTaps);
  EK_CHECK(p.num_tokens <= INT32_MAX && p.num_sequences <= INT32_MAX,
           "short_conv: " << p.num_tokens << " tokens in " << p.num_sequences << " sequences, expected less than 2^31 of each");
  EK_CHECK(p.num_tokens == 0 || p.num_sequences > 0, "short_conv: " << p.num_tokens << " tokens in 0 sequences");
}

// Whether rows of these strides (in elements) and arrays are on 16-byte boundaries.
inline bool all_aligned(DType dtype, std::initializer_list<int64_t> strides, std::initializer_list<const void*> arrays) {
  uint64_t bits = 0;
  for (const int64_t stride : strides) bits |= static_cast<uint64_t>(stride) * static_cast<uint64_t>(dtype_bytes(dtype));
  for (const void* array : arrays) bits |= reinterpret_cast<uintptr_t>(array);
  return bits % 16 == 0;
}

template <DType kType>
Plan make_plan(const ShortConvParams& p, int max_threads) {
  Plan plan{};
  plan.aligned = all_aligned(p.dtype, {p.x_token_stride, p.x_branch_stride, p.state_sequence_stride, p.hidden_size},
                             {p.x, p.weight, p.norm_weight, p.state, p.out});
  plan.vectors = static_cast<int>(ceil_div(p.hidden_size, kLanes<kType>));
  const int64_t rounds = ceil_div(plan.vectors, kVectors<kType> * max_threads);
  plan.thread_vectors = static_cast<int>(rounds) * kVectors<kType>;
  plan.threads = static_cast<int>(ceil_div(ceil_div(plan.vectors, plan.thread_vectors), kWarp) * kWarp);
  plan.row_bytes = plan.vectors * 16;
  plan.inverse_size = 1.0F / static_cast<float>(p.hidden_size);
  plan.slots = ExactModulus::of(static_cast<uint64_t>(std::max<int64_t>(p.reach(), 1)));
  return plan;
}

// Tokens of a block if every multiprocessor is to have all the blocks that it can hold.
template <DType kType>
int even_tokens(const ShortConvParams& p, const Plan& plan) {
  const int blocks_of_sm =
      std::min({kMaxThreads / plan.threads, kMaxBlocksOfSm, kSharedBytesOfSm / (plan.shared_bytes + kReservedSharedBytes)});
  return static_cast<int>(ceil_div(p.num_tokens * p.branches, int64_t{std::max(blocks_of_sm, 1)} * num_multiprocessors()));
}

template <DType kType>
bool fits_registers(const ShortConvParams& p, const Plan& plan) {
  return p.width <= kTaps && plan.thread_vectors == kVectors<kType>;
}

inline dim3 blocks_of(const ShortConvParams& p, const Plan& plan) {
  return dim3(static_cast<unsigned>(ceil_div(p.num_tokens, plan.tokens)), static_cast<unsigned>(p.branches));
}

template <class... Args>
void launch_blocks(void (*kernel)(Args...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream, const Args&... args) {
  if (shared_bytes > kMaxSharedBytes) {
    EK_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(args...);
  EK_CUDA_CHECK(cudaGetLastError());
}

}  // namespace
}  // namespace engram_kernels

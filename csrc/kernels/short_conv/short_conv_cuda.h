// What the CUDA kernels of short_conv share: which rows a token reaches, weights in registers, rows in shared
// memory, sums over rows, and how launchers share tokens out among blocks. Included by .cu files only.
//
// A thread owns the same 16-byte vectors of every row of its branch. Only sums pass between threads, and the
// order of all additions depends on H and the dtype alone, so every kernel gives a token the same bits.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "common/convert_cuda.h"
#include "common/cuda_check.h"
#include "kernels/short_conv/short_conv.h"

namespace engram_kernels {
namespace {

constexpr int kWarp = 32;
constexpr int kGroup = 4;          // rows whose sums are taken together
constexpr int kTaps = 4;           // widths up to this have their weights in registers
constexpr int kMaxThreads = 640;   // 96 registers each: half of them hold weights
constexpr int kChannels = 8;       // channels per thread where weights are in registers
constexpr int kPartialPitch = 40;  // floats between the rows of partial sums: the four rows lie in different banks
constexpr int kPartials = kGroup * kPartialPitch;
constexpr float kLog2E = 1.4426950408889634F;

template <DType kType>
constexpr int kLanes = 16 / dtype_bytes(kType);  // elements per vector
template <DType kType>
constexpr int kVectors = kChannels / kLanes<kType>;

// What the launcher derives from the params.
struct Plan {
  int threads;
  int vectors;         // 16-byte vectors per row
  int thread_vectors;  // vectors per row and thread, at most
  int ring_rows;       // rows of a ring in shared memory
  int rows_held;       // rows in shared memory in all
  int group;           // rows that are fetched together
  int row_bytes;
  int shared_bytes;
  int tokens;      // tokens per block
  int64_t x_step;  // of the walk: bytes to the next token of a phase
  int64_t out_step;
  float inverse_size;  // 1 / H
  ExactModulus slots;  // modulus: slots of a ring of the state
  bool aligned;        // every row and weight is 16-byte aligned
};

extern __shared__ __align__(16) unsigned char shared[];

// The tokens [begin, end) of a sequence. `before` inputs, at most the reach, precede them in the state's
// ring; the first token's own slot is `phase`. The bounds are clamped: begin <= t < end holds for the token
// that was looked up, whatever cu_seqlens holds.
struct Span {
  int begin, end, before;
  uint32_t phase;
  int ring;  // negative: the sequence is skipped
  int sequence;
};

// Sequence b, in which token t lies.
__device__ __forceinline__ Span span_of_sequence(const ShortConvParams& p, const Plan& plan, int b, int t) {
  const int num_tokens = static_cast<int>(p.num_tokens);
  const int begin = min(max(p.cu_seqlens[b], 0), num_tokens), end = min(p.cu_seqlens[b + 1], num_tokens);
  Span s{min(begin, t), max(end, t + 1), 0, 0, 0, b};
  if (p.has_state()) {
    s.ring = static_cast<int>(p.ring_of(b, s.end - s.begin));
    const int64_t position = max(p.position(b), int64_t{0});
    s.before = static_cast<int>(min(position, p.reach()));
    s.phase = plan.slots(static_cast<uint64_t>(position));
  }
  return s;
}

// Looks for the sequence of token t with a whole warp: up to 1,024 sequences take two rounds of loads.
__device__ __forceinline__ Span span_of(const ShortConvParams& p, const Plan& plan, int t) {
  int low = 0, high = static_cast<int>(p.num_sequences);  // cu_seqlens[low] <= t < cu_seqlens[high]
  const int lane = threadIdx.x % kWarp;
  while (high - low > 1) {
    const int step = static_cast<int>((static_cast<unsigned>(high - low) + kWarp - 1) / kWarp);
    const int64_t at = low + int64_t{lane} * step;
    const unsigned before = __ballot_sync(~0U, at < high && p.cu_seqlens[min(at, int64_t{high - 1})] <= t);
    low += (before == 0 ? 0 : kWarp - 1 - __clz(before)) * step;
    high = high - low > step ? low + step : high;
  }
  return span_of_sequence(p, plan, low, t);
}

// Counts what check_host_data refuses.
__device__ __forceinline__ void count_bad_data(const ShortConvParams& p) {
  if (p.error_count == nullptr) return;
  const int64_t block = blockIdx.x + int64_t{gridDim.x} * blockIdx.y, step = int64_t{gridDim.x} * gridDim.y * blockDim.x;
  for (int64_t b = block * blockDim.x + threadIdx.x; b < p.num_sequences; b += step) {
    const int64_t begin = p.cu_seqlens[b], end = p.cu_seqlens[b + 1];
    const bool bad = begin > end || begin < 0 || end > p.num_tokens || (b == 0 && begin != 0) ||
                     (b == p.num_sequences - 1 && end != p.num_tokens);
    if (bad || (p.has_state() && p.ring_of(b, max(end - begin, int64_t{0})) == kRefused)) count_error(p.error_count);
  }
  if (p.state_indices == nullptr) return;
  for (int64_t b = block; b < p.num_sequences; b += int64_t{gridDim.x} * gridDim.y) {
    if (p.index(b) == kSkipped || p.cu_seqlens[b] >= p.cu_seqlens[b + 1]) continue;
    for (int64_t other = threadIdx.x; other < b; other += blockDim.x) {
      if (p.index(other) == p.index(b) && p.cu_seqlens[other] < p.cu_seqlens[other + 1]) count_error(p.error_count);
    }
  }
}

template <DType kType>
__device__ __forceinline__ std::byte* state_row(const ShortConvParams& p, const Plan& plan, const Span& s, int branch, int t) {
  // a ring's length is added since an input before the chunk lies less far back, and the sum must not be negative
  const int64_t slot = plan.slots(static_cast<uint64_t>(s.phase + p.slots + t - s.begin));
  const int64_t at = s.ring * p.state_ring_stride + (slot * p.branches + branch) * p.hidden_size;
  return static_cast<std::byte*>(p.state) + at * dtype_bytes(kType);
}

// The input at t. It may lie before the chunk but not before the sequence.
template <DType kType>
__device__ __forceinline__ const std::byte* input_row(const ShortConvParams& p, const Plan& plan, const Span& s, int branch,
                                                      int t) {
  if (t < s.begin) return state_row<kType>(p, plan, s, branch, t);
  return static_cast<const std::byte*>(p.x) + (int64_t{t} * p.x_token_stride + branch * p.x_branch_stride) * dtype_bytes(kType);
}

template <DType kType>
__device__ __forceinline__ std::byte* output_row(const ShortConvParams& p, void* out, int branch, int t) {
  return static_cast<std::byte*>(out) + (int64_t{t} * p.branches + branch) * p.hidden_size * dtype_bytes(kType);
}

// The tokens that a block computes. The first tokens of a sequence read the state and its last ones write it.
// The block in which the sequence begins therefore takes all tokens that read, and writes all slots itself.
struct BlockTokens {
  int next, last, first;

  __device__ __forceinline__ BlockTokens(const ShortConvParams& p, const Plan& plan)
      : next(blockIdx.x * plan.tokens), last(static_cast<int>(min(int64_t{next} + plan.tokens, p.num_tokens))), first(next) {}
  __device__ __forceinline__ bool owns(const ShortConvParams& p, const Span& s) const {
    return p.has_state() && s.begin >= first;
  }
  // Skips the tokens of the sequence of `s` that another block computes; returns false if that is all of
  // them.
  __device__ __forceinline__ bool begins_in(const ShortConvParams& p, const Span& s) {
    if (!p.has_state() || s.begin >= first) return true;
    next = static_cast<int>(max(int64_t{next}, min(s.begin + p.reach(), int64_t{s.end})));
    return next < min(s.end, last);
  }
  __device__ __forceinline__ int end_in(const ShortConvParams& p, const Span& s) const {
    const int64_t wanted = owns(p, s) ? max(int64_t{last}, s.begin + p.reach()) : last;
    return static_cast<int>(min(int64_t{s.end}, wanted));
  }
};

// Whether the block that owns the sequence writes input t while it computes token t: no later token reads the
// slot's old input. The owner copies the inputs of tokens that other blocks compute when it is done with its
// own.
__device__ __forceinline__ bool writes_state(const ShortConvParams& p, const Span& s, int t) {
  return p.has_state() && t >= s.end - p.slots;
}
__device__ __forceinline__ int first_copied(const ShortConvParams& p, const Span& s, int computed_end) {
  return static_cast<int>(max(int64_t{computed_end}, s.end - p.slots));
}

// Accurate to a few units in the last place for float, and to 1e-6 of the value for types that are rounded to
// 16 bits.
template <DType kType>
__device__ __forceinline__ float sigmoid(float x) {
  float e, s;
  if constexpr (kType == DType::kF32) {
    e = expf(-x);
  } else {
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -kLog2E));
  }
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(e + 1.0F));
  return s;
}

template <int kCount>
__device__ __forceinline__ float add_squares(const float* values, float sum) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum = __fmaf_rn(values[i], values[i], sum);
  return sum;
}

// z += tap * (x / rms(x)); the tap has the norm weight in it
template <int kCount>
__device__ __forceinline__ void add_tap(const float* tap, const float* x, float inverse_rms, float* z) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) z[i] = __fmaf_rn(tap[i], __fmul_rn(x[i], inverse_rms), z[i]);
}

// z becomes x + silu(z)
template <DType kType, int kCount>
__device__ __forceinline__ void finish(const float* x, float* z) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) z[i] = __fmaf_rn(z[i], sigmoid<kType>(z[i]), x[i]);
}

// Sums over a warp of the four values of its lanes; lanes 8 g .. 8 g + 7 get the sum of value g.
__device__ __forceinline__ float warp_sums(const float (&v)[kGroup]) {
  const bool upper = (threadIdx.x & 16) != 0, odd = (threadIdx.x & 8) != 0;
  const float a = (upper ? v[2] : v[0]) + __shfl_xor_sync(~0U, upper ? v[0] : v[2], 16);
  const float b = (upper ? v[3] : v[1]) + __shfl_xor_sync(~0U, upper ? v[1] : v[3], 16);
  float sum = (odd ? b : a) + __shfl_xor_sync(~0U, odd ? a : b, 8);
#pragma unroll
  for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0U, sum, distance);
  return sum;
}

__device__ __forceinline__ void put_partial(float* partials, float sum) {
  const int lane = threadIdx.x % kWarp;
  if (lane % 8 == 0) partials[lane / 8 * kPartialPitch + threadIdx.x / kWarp] = sum;
}

// The block's sum of value g, in lanes 8 g .. 8 g + 7, of the partial sums that its warps have put.
__device__ __forceinline__ float sum_partials(const float* partials) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  float part[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int warp = lane % 8 + 8 * k;
    part[k] = warp < warps ? partials[lane / 8 * kPartialPitch + warp] : 0.0F;
  }
  float sum = (part[0] + part[1]) + (part[2] + part[3]);
#pragma unroll
  for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0U, sum, distance);
  return sum;
}

// Sums of four values over the block; two calls in a row need different `partials`.
__device__ __forceinline__ float block_sums(const float (&v)[kGroup], float* partials) {
  put_partial(partials, warp_sums(v));
  __syncthreads();
  return sum_partials(partials);
}

__device__ __forceinline__ float inverse_rms(float sum_of_squares, const ShortConvParams& p, const Plan& plan) {
  return rsqrtf(__fmaf_rn(sum_of_squares, plan.inverse_size, p.eps));
}

// Loads the taps of a thread's channels times the norm weight, the last tap last; narrower widths leave the
// first taps out.
template <DType kWeight, int kWidth, int kCount>
__device__ __forceinline__ void load_taps(const std::byte* weight, const std::byte* norm_weight, float (*taps)[kChannels]) {
  float stored[kCount * kWidth], norm[kCount];
  constexpr int kBytes = kCount * kWidth * dtype_bytes(kWeight), kPiece = (kBytes % 16 == 0 ? 16 : 8) / dtype_bytes(kWeight);
#pragma unroll
  for (int i = 0; i < kCount * kWidth; i += kPiece) load_floats<kWeight, kPiece>(weight + i * dtype_bytes(kWeight), stored + i);
  load_floats<kWeight, kCount>(norm_weight, norm);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) taps[kTaps - kWidth + j][i] = stored[i * kWidth + j] * norm[i];
  }
}

template <DType kWeight, int kCount>
__device__ __forceinline__ void load_taps_of_width(const ShortConvParams& p, int64_t channel, float (*taps)[kChannels]) {
  const std::byte* weight = static_cast<const std::byte*>(p.weight) + channel * p.width * dtype_bytes(kWeight);
  const std::byte* norm_weight = static_cast<const std::byte*>(p.norm_weight) + channel * dtype_bytes(kWeight);
  if (p.width == 4) return load_taps<kWeight, 4, kCount>(weight, norm_weight, taps);
  if (p.width == 3) return load_taps<kWeight, 3, kCount>(weight, norm_weight, taps);
  if (p.width == 2) return load_taps<kWeight, 2, kCount>(weight, norm_weight, taps);
  load_taps<kWeight, 1, kCount>(weight, norm_weight, taps);
}

// first_channel is the channel of vector 0.
template <DType kType>
__device__ __forceinline__ void load_thread_taps(const ShortConvParams& p, const Plan& plan, int64_t first_channel,
                                                 float (&taps)[kTaps][kChannels]) {
  constexpr int kPart = 4;  // channels at a time: loaded words take registers until they are converted
#pragma unroll
  for (int i = 0; i < kChannels; i += kPart) {
    const int vector = threadIdx.x + i / kLanes<kType> * plan.threads;
    if (vector >= plan.vectors) continue;
    const int64_t channel = first_channel + vector * kLanes<kType> + i % kLanes<kType>;
    float (*part)[kChannels] = reinterpret_cast<float (*)[kChannels]>(&taps[0][i]);
    if (p.weight_dtype == kType) {
      load_taps_of_width<kType, kPart>(p, channel, part);
    } else {
      load_taps_of_width<DType::kF32, kPart>(p, channel, part);
    }
  }
}

// ---- rows in shared memory --------------------------------------------------------------------

inline int ring_bytes(int rows_held, int row_bytes, int threads) {
  return rows_held * (row_bytes + threads / kWarp * 4) + 2 * kPartials * static_cast<int>(sizeof(float));
}

__device__ __forceinline__ void copy_async(void* to, const std::byte* from) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all of this thread's copies except those since the last end_copies.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

// plan.rows_held slots, of which the first plan.ring_rows are a ring. A thread reads only vectors that it
// copied there itself, and a warp has norms of its own, so that only the sums of squares wait for a barrier.
template <DType kType>
struct Ring {
  const ShortConvParams& p;
  const Plan& plan;

  __device__ __forceinline__ int wrapped(int slot) const { return slot >= plan.ring_rows ? slot - plan.ring_rows : slot; }
  __device__ __forceinline__ uint4* vector_of(int slot, int v) const {
    return reinterpret_cast<uint4*>(shared + slot * plan.row_bytes) + threadIdx.x + v * plan.threads;
  }
  __device__ __forceinline__ bool has(int v) const { return static_cast<int>(threadIdx.x) + v * plan.threads < plan.vectors; }
  __device__ __forceinline__ float* norms() const {
    return reinterpret_cast<float*>(shared + plan.rows_held * plan.row_bytes) + threadIdx.x / kWarp * plan.rows_held;
  }
  __device__ __forceinline__ float* partials(int parity) const {
    float* behind = reinterpret_cast<float*>(shared + plan.rows_held * plan.row_bytes) + plan.threads / kWarp * plan.rows_held;
    return behind + parity * kPartials;
  }

  __device__ __forceinline__ void fetch(int slot, const std::byte* row) const {
#pragma unroll
    for (int v = 0; v < kVectors<kType>; ++v) {
      if (has(v)) copy_async(vector_of(slot, v), row + (threadIdx.x + v * plan.threads) * 16);
    }
  }

  __device__ __forceinline__ void load(int slot, float (&x)[kChannels]) const {
#pragma unroll
    for (int v = 0; v < kVectors<kType>; ++v) {
      if (has(v)) load_floats<kType, kLanes<kType>>(vector_of(slot, v), x + v * kLanes<kType>);
    }
  }

  // This thread's part of a row's sum of squares. kWhole: every thread has all its vectors.
  template <bool kWhole>
  __device__ __forceinline__ float sum_of_squares(int slot) const {
    float sum = 0;
#pragma unroll
    for (int v = 0; v < kVectors<kType>; ++v) {
      if (!kWhole && !has(v)) continue;
      float x[kLanes<kType>];
      load_floats<kType, kLanes<kType>>(vector_of(slot, v), x);
      sum = add_squares<kLanes<kType>>(x, sum);
    }
    return sum;
  }

  // Takes the norms of the rows in slots first .. first + 3 whose bit in `there` is set. The whole block
  // calls it; parity alternates between calls.
  __device__ __forceinline__ void norm_group(int first, unsigned there, int parity) const {
    float sums[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) sums[i] = (there >> i & 1) != 0 ? sum_of_squares<false>(wrapped(first + i)) : 0.0F;
    const float norm = inverse_rms(block_sums(sums, partials(parity)), p, plan);
    const int lane = threadIdx.x % kWarp;
    if (lane % 8 == 0 && (there >> lane / 8 & 1) != 0) norms()[wrapped(first + lane / 8)] = norm;
    __syncwarp();
  }

  __device__ __forceinline__ void add_row(int slot, const float* tap, float (&x)[kChannels], float (&z)[kChannels]) const {
    load(slot, x);
    add_tap<kChannels>(tap, x, norms()[slot], z);
  }

  // Writes the output of token t, whose row x lies in `slot`, and its input into the state where this block
  // does so.
  __device__ __forceinline__ void write(const Span& s, int branch, int t, int slot, bool owns, const float (&x)[kChannels],
                                        float (&z)[kChannels]) const {
    finish<kType, kChannels>(x, z);
    std::byte* out = output_row<kType>(p, p.out, branch, t);
    std::byte* state = owns && writes_state(p, s, t) ? state_row<kType>(p, plan, s, branch, t) : nullptr;
#pragma unroll
    for (int v = 0; v < kVectors<kType>; ++v) {
      if (!has(v)) continue;
      const int at = (threadIdx.x + v * plan.threads) * 16;
      store_floats<kType>(out + at, z + v * kLanes<kType>);
      if (state != nullptr) *reinterpret_cast<uint4*>(state + at) = *vector_of(slot, v);
    }
  }
};

// Writes zeros for tokens [first, last), which belong to a skipped sequence; returns `last`.
template <DType kType>
__device__ __forceinline__ int skip(const ShortConvParams& p, const Plan& plan, int branch, int first, int last) {
#pragma unroll 1
  for (int t = first; t < last; ++t) {
    auto* to = reinterpret_cast<uint4*>(output_row<kType>(p, p.out, branch, t));
    for (int vector = threadIdx.x; vector < plan.vectors; vector += plan.threads) to[vector] = make_uint4(0, 0, 0, 0);
  }
  return last;
}

// Copies inputs [first, last) of a sequence into their slots.
template <DType kType>
__device__ __forceinline__ void copy_to_state(const ShortConvParams& p, const Plan& plan, const Span& s, int branch, int first,
                                              int last) {
  for (int t = first; t < last; ++t) {
    const auto* from = reinterpret_cast<const uint4*>(input_row<kType>(p, plan, s, branch, t));
    auto* to = reinterpret_cast<uint4*>(state_row<kType>(p, plan, s, branch, t));
    for (int vector = threadIdx.x; vector < plan.vectors; vector += plan.threads) to[vector] = from[vector];
  }
}

// ---- how launchers share tokens out among blocks ----------------------------------------------

constexpr int64_t kMaxHidden = 1 << 22;
constexpr int kMaxBlocksOfSm = 16;
constexpr int kSharedBytesOfSm = 228 * 1024;
constexpr int kReservedSharedBytes = 1024;  // per block

inline void check_launch(const ShortConvParams& p) {
  check_params(p);
  EK_CHECK(p.branches <= kMaxGridY, "short_conv: branches is " << p.branches << ", expected at most " << kMaxGridY);
  EK_CHECK(p.hidden_size <= kMaxHidden, "short_conv: hidden_size is " << p.hidden_size << ", expected at most " << kMaxHidden);
  EK_CHECK(p.dilation <= INT32_MAX / kMaxTaps,
           "short_conv: dilation is " << p.dilation << ", expected at most " << INT32_MAX / kMaxTaps);
  EK_CHECK(p.num_tokens <= INT32_MAX && p.num_sequences <= INT32_MAX,
           "short_conv: " << p.num_tokens << " tokens in " << p.num_sequences << " sequences, expected less than 2^31 of each");
  EK_CHECK(p.num_tokens == 0 || p.num_sequences > 0, "short_conv: " << p.num_tokens << " tokens in 0 sequences");
  EK_CHECK(p.num_rings <= INT32_MAX && p.slots <= INT32_MAX,
           "short_conv: state has " << p.num_rings << " rings of " << p.slots << " slots, expected less than 2^31 of each");
}

// Whether these arrays, and rows at these strides (in elements), are 16-byte aligned.
inline bool all_aligned(DType dtype, std::initializer_list<int64_t> strides, std::initializer_list<const void*> arrays) {
  uint64_t bits = 0;
  for (const int64_t stride : strides) bits |= static_cast<uint64_t>(stride) * static_cast<uint64_t>(dtype_bytes(dtype));
  for (const void* array : arrays) bits |= reinterpret_cast<uintptr_t>(array);
  return bits % 16 == 0;
}

template <DType kType>
Plan make_plan(const ShortConvParams& p, int max_threads) {
  Plan plan{};
  plan.aligned = all_aligned(p.dtype, {p.x_token_stride, p.x_branch_stride, p.state_ring_stride, p.hidden_size},
                             {p.x, p.weight, p.norm_weight, p.state, p.out});
  plan.vectors = static_cast<int>(ceil_div(p.hidden_size, kLanes<kType>));
  const int64_t rounds = ceil_div(plan.vectors, kVectors<kType> * max_threads);
  plan.thread_vectors = static_cast<int>(rounds) * kVectors<kType>;
  plan.threads = static_cast<int>(ceil_div(ceil_div(plan.vectors, plan.thread_vectors), kWarp) * kWarp);
  plan.row_bytes = plan.vectors * 16;
  plan.inverse_size = 1.0F / static_cast<float>(p.hidden_size);
  plan.slots = ExactModulus::of(static_cast<uint64_t>(std::max<int64_t>(p.slots, 1)));
  return plan;
}

// Tokens per block if every multiprocessor is to have all the blocks that it can hold.
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
  if (shared_bytes > kMaxSharedBytes) allow_max_shared_bytes(reinterpret_cast<const void*>(kernel));
  kernel<<<grid, threads, shared_bytes, stream>>>(args...);
  EK_CUDA_CHECK(cudaGetLastError());
}

}  // namespace
}  // namespace engram_kernels

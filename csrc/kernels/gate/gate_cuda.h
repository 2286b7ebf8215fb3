// Device code of gate that several of its kernels share, those of gather_gate too. Included by .cu files only.
//
//   1. rows    vectors, weights and sums of one branch: for every kernel
//   2. tokens  a token in a block's registers: for the kernels of gate_cuda.cu and gate_bwd_cuda.cu
#pragma once

#include <cstdint>

#include "common/cuda_check.h"
#include "common/vector_cuda.h"
#include "kernels/gate/gate.h"

namespace engram_kernels {

// ---- rows ------------------------------------------------------------------------------------------------------------
//
// Floats lie in shared memory in planes of four: neighbouring lanes then read neighbouring 16 bytes, and no bank is asked
// twice.

// The vector of a branch row that lies `index` vectors in.
template <class T>
__device__ __forceinline__ T* vector_at(const BranchRows& rows, DType dtype, int64_t t, int branch, int index) {
  const int64_t element = t * rows.token_stride + branch * rows.branch_stride;
  return reinterpret_cast<T*>(static_cast<std::byte*>(rows.data) + element * dtype_bytes(dtype)) + index;
}

// kElements floats of vector `index` out of planes that are `vectors` float4 long.
template <int kElements>
__device__ __forceinline__ void load_planes(const float4* planes, int vectors, int index, float* values) {
#pragma unroll
  for (int i = 0; i < kElements / 4; ++i) {
    const float4 v = planes[i * vectors + index];
    values[4 * i] = v.x, values[4 * i + 1] = v.y, values[4 * i + 2] = v.z, values[4 * i + 3] = v.w;
  }
}

template <int kElements>
__device__ __forceinline__ void store_planes(float4* planes, int vectors, int index, const float* values) {
#pragma unroll
  for (int i = 0; i < kElements / 4; ++i) {
    planes[i * vectors + index] = make_float4(values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]);
  }
}

// kElements weights from `element` on, in 16-byte accesses where their dtype gives as much.
template <int kElements>
__device__ __forceinline__ void load_weights(const void* data, DType dtype, int64_t element, float* values) {
  if (dtype == DType::kF32) {
    load_floats<DType::kF32, kElements>(static_cast<const float*>(data) + element, values);
  } else if (dtype == DType::kBf16) {
    load_floats<DType::kBf16, kElements>(static_cast<const uint16_t*>(data) + element, values);
  } else {
    load_floats<DType::kF16, kElements>(static_cast<const uint16_t*>(data) + element, values);
  }
}

// The first vector of this thread; the others follow kWarp apart.
template <int kVectors>
__device__ __forceinline__ int first_vector() {
  return threadIdx.x / kWarp * (kWarp * kVectors) + threadIdx.x % kWarp;
}

template <DType kWeights, int kElements, int kVectors>
__device__ __forceinline__ void stage_weights_of(const GateWeights& w, int64_t hidden_size, int first_branch, int branches,
                                                 int vectors, float4* planes) {
  const auto *of_hidden = static_cast<const std::byte*>(w.w_hidden), *of_key = static_cast<const std::byte*>(w.w_key);
#pragma unroll 4  // loads in flight
  for (int n = 0; n < branches * kVectors; ++n) {
    const int branch = n / kVectors, i = first_vector<kVectors>() + n % kVectors * kWarp;
    const int64_t at = ((first_branch + branch) * hidden_size + i * kElements) * dtype_bytes(kWeights);
    float a[kElements] = {}, b[kElements] = {};
    if (i < vectors) load_floats<kWeights, kElements>(of_hidden + at, a), load_floats<kWeights, kElements>(of_key + at, b);
#pragma unroll
    for (int e = 0; e < kElements; ++e) a[e] *= b[e];
    if (i < vectors) store_planes<kElements>(planes + branch * (kElements / 4) * vectors, vectors, i, a);
  }
}

// The products w_hidden * w_key of this thread's vectors in `branches` branches, into planes that only it reads.
template <int kElements, int kVectors>
__device__ __forceinline__ void stage_weights(const GateWeights& w, int64_t hidden_size, int first_branch, int branches,
                                              int vectors, float4* planes) {
  if (w.dtype == DType::kF32) {
    stage_weights_of<DType::kF32, kElements, kVectors>(w, hidden_size, first_branch, branches, vectors, planes);
  } else if (w.dtype == DType::kBf16) {
    stage_weights_of<DType::kBf16, kElements, kVectors>(w, hidden_size, first_branch, branches, vectors, planes);
  } else {
    stage_weights_of<DType::kF16, kElements, kVectors>(w, hidden_size, first_branch, branches, vectors, planes);
  }
}

// Sums up to four values over the branch's warps, in place and in a fixed order. `by_warp` holds a float4 per warp of the
// block; the lanes of each branch's first warp get the sums. The caller synchronizes before it calls this again.
template <int kCount>
__device__ __forceinline__ void branch_sums(float (&v)[kCount], float4* by_warp) {
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  warp_sums(v);
  if (lane == 0) {
    by_warp[threadIdx.y * warps + threadIdx.x / kWarp] = make_float4(v[0], v[1], v[2], kCount > 3 ? v[kCount - 1] : 0.0F);
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const float4 sums = lane < warps ? by_warp[threadIdx.y * warps + lane] : make_float4(0, 0, 0, 0);
  v[0] = sums.x, v[1] = sums.y, v[2] = sums.z;
  if (kCount > 3) v[kCount - 1] = sums.w;
  warp_sums(v);
}

// Threads of a block for a row of `vectors` vectors: whole warps, of which a thread takes at most `per_thread` vectors.
inline int lanes_for(int64_t vectors, int per_thread) {
  return static_cast<int>(ceil_div(vectors, int64_t{per_thread} * kWarp)) * kWarp;
}

inline bool on_vectors(const BranchRows& rows, int64_t tokens, int64_t branches, int element_bytes) {
  return reinterpret_cast<uintptr_t>(rows.data) % kVectorBytes == 0 &&
         (tokens <= 1 || rows.token_stride * element_bytes % kVectorBytes == 0) &&
         (branches <= 1 || rows.branch_stride * element_bytes % kVectorBytes == 0);
}

inline bool on_vectors(const GateWeights& w) {
  return (reinterpret_cast<uintptr_t>(w.w_hidden) | reinterpret_cast<uintptr_t>(w.w_key)) % kVectorBytes == 0;
}

// ---- tokens ----------------------------------------------------------------------------------------------------------
//
// A thread holds the same kVectors 16-byte vectors of a row in each of kBranches branches, so that the value is read and
// unpacked once for all of them. What a thread keeps in shared memory lies at constant distances from one address of its
// own (Slots). Vectors behind the end of a row, in a block that is wider, are zeros that nobody stores: no sum is guarded.

// The block's shape: warps over a row, and groups of kBranches branches over a token.
struct TokenTile {
  int vectors;  // of a row
  int warps;
  int groups;
  int tokens;
};

// 16-byte words of dynamic shared memory, [group][warp][branch][vector][kCount][lane]: neighbouring lanes read neighbouring
// words, and only the thread that wrote a word reads it. The products of the weights come first, four per word.
template <int kBranches, int kVectors, int kCount>
struct Slots {
  static constexpr int kOfWarp = kBranches * kVectors * kCount * kWarp;

  __host__ __device__ static int size(const TokenTile& tile) { return tile.groups * tile.warps * kOfWarp; }
  // this thread's first word; the others lie at(..) behind it
  __device__ static int first(const TokenTile& tile, int group) {
    return (group * tile.warps + static_cast<int>(threadIdx.x) / kWarp) * kOfWarp + static_cast<int>(threadIdx.x) % kWarp;
  }
  __device__ static constexpr int at(int branch, int vector, int word) {
    return ((branch * kVectors + vector) * kCount + word) * kWarp;
  }
};

template <DType kWeights, DType kType, int kBranches, int kVectors, int kCount>
__device__ __forceinline__ void stage_slots_of(const GateWeights& w, int64_t hidden_size, const TokenTile& tile, int first_branch,
                                               float4* words) {
  constexpr int kElements = kVectorElements<kType>;
  const auto *of_hidden = static_cast<const std::byte*>(w.w_hidden), *of_key = static_cast<const std::byte*>(w.w_key);
#pragma unroll 4  // loads in flight
  for (int n = 0; n < tile.groups * kBranches * kVectors; ++n) {
    const int branch = n / kVectors, j = n % kVectors, i = first_vector<kVectors>() + j * kWarp;
    const int64_t at = ((first_branch + branch) * hidden_size + i * kElements) * dtype_bytes(kWeights);
    float a[kElements] = {}, b[kElements] = {};
    if (i < tile.vectors) load_floats<kWeights, kElements>(of_hidden + at, a), load_floats<kWeights, kElements>(of_key + at, b);
    using WeightSlots = Slots<kBranches, kVectors, kCount>;
    float4* to = words + WeightSlots::first(tile, branch / kBranches) + WeightSlots::at(branch % kBranches, j, 0);
#pragma unroll
    for (int word = 0; word < kCount; ++word) {
      const int e = 4 * word;
      to[word * kWarp] = e < kElements ? make_float4(a[e] * b[e], a[e + 1] * b[e + 1], a[e + 2] * b[e + 2], a[e + 3] * b[e + 3])
                                       : make_float4(0, 0, 0, 0);
    }
  }
}

// The products w_hidden * w_key of this thread's vectors in every group; its other words are cleared.
template <DType kType, int kBranches, int kVectors, int kCount>
__device__ __forceinline__ void stage_slots(const GateWeights& w, int64_t hidden_size, const TokenTile& tile, int first_branch,
                                            float4* words) {
  if (w.dtype == DType::kF32) {
    stage_slots_of<DType::kF32, kType, kBranches, kVectors, kCount>(w, hidden_size, tile, first_branch, words);
  } else if constexpr (kType != DType::kF32) {  // the dtype of hidden
    stage_slots_of<kType, kType, kBranches, kVectors, kCount>(w, hidden_size, tile, first_branch, words);
  }
}

__device__ __forceinline__ void read_word(const float4& word, float* values) {
  const float4 v = word;
  values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
}

// What a thread holds of a token in registers.
template <int kBranches, int kVectors>
struct Held {
  uint4 hidden[kBranches][kVectors], key[kBranches][kVectors];
};

// Whether the block works on that token and its row has a j-th vector for this thread.
template <int kVectors>
__device__ __forceinline__ bool has_vector(const TokenTile& tile, int token, int j) {
  return token < tile.tokens && first_vector<kVectors>() + j * kWarp < tile.vectors;
}

// The block's first token from t on that is not masked; pass(token) is called for the masked ones on the way.
template <class Pass>
__device__ __forceinline__ int next_token(const GateParams& p, const TokenTile& tile, int t, const Pass& pass) {
#pragma unroll 1
  for (; t < tile.tokens && p.masked(t); t += gridDim.x) pass(t);
  return t;
}

// A [token, branch, hidden] array as the kernels address it: strides in bytes.
struct TokenRows {
  std::byte* data;
  int64_t branch_bytes;
  uint32_t token_bytes;  // 32 bits, so that a product with them is one instruction

  // A thread's first vector of a token in the first branch.
  __device__ __forceinline__ std::byte* at(int token, int first) const {
    return data + static_cast<uint32_t>(first * kVectorBytes) + uint64_t{static_cast<uint32_t>(token)} * token_bytes;
  }
  __device__ __forceinline__ void go_branches(std::byte** at, int branches) const { *at += branches * branch_bytes; }
  __device__ __forceinline__ void next_branch(std::byte** at, bool back) const {
    *at = back ? *at - branch_bytes : *at + branch_bytes;
  }
};

inline TokenRows token_rows(const BranchRows& rows, int64_t element_bytes) {
  return {static_cast<std::byte*>(rows.data), rows.branch_stride * element_bytes,
          static_cast<uint32_t>(rows.token_stride * element_bytes)};
}

// Whether vectors and strides are such as token_rows wants.
inline bool has_token_rows(const BranchRows& rows, int64_t tokens, int64_t branches, int element_bytes) {
  return on_vectors(rows, tokens, branches, element_bytes) && rows.token_stride >= 0 &&
         rows.token_stride <= UINT32_MAX / element_bytes;
}

constexpr int kTokenVectors = 2;  // of a thread of a kernel for one token, which keeps all that it reads in registers

// unpack_vector for what is used before and after a barrier: left to itself, the compiler unpacks bfloat16 anew behind it. A
// kernel that holds many tokens' registers must do so.
template <DType kType>
__device__ __forceinline__ void unpack_once(const uint4& v, float* values) {
  if constexpr (kType == DType::kBf16) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      asm("shl.b32 %0, %1, 16;" : "=f"(values[2 * i]) : "r"(words[i]));
      asm("and.b32 %0, %1, 0xFFFF0000;" : "=f"(values[2 * i + 1]) : "r"(words[i]));
    }
  } else {
    unpack_vector<kType>(v, values);
  }
}

// kElements products of the two weights of a thread's vector, as they were loaded.
template <DType kWeights, int kWords>
__device__ __forceinline__ void multiply_weights(const uint4 (&of_hidden)[kWords], const uint4 (&of_key)[kWords],
                                                 float* products) {
  constexpr int kElements = kVectorElements<kWeights>;
#pragma unroll
  for (int n = 0; n < kWords; ++n) {
    float b[kElements];
    unpack_once<kWeights>(of_hidden[n], products + n * kElements), unpack_once<kWeights>(of_key[n], b);
#pragma unroll
    for (int e = 0; e < kElements; ++e) products[n * kElements + e] *= b[e];
  }
}

// A thread's vectors of a row, from `row` on; zeros behind the row's end. kWhole: every thread has all its vectors.
template <bool kWhole, int kWords>
__device__ __forceinline__ void load_row(const std::byte* row, const bool (&there)[kTokenVectors],
                                         uint4 (&to)[kTokenVectors][kWords]) {
#pragma unroll
  for (int j = 0; j < kTokenVectors; ++j) {
#pragma unroll
    for (int n = 0; n < kWords; ++n) {
      const std::byte* from = row + (j * kWarp * kWords + n) * kVectorBytes;
      if constexpr (kWhole) {
        to[j][n] = *reinterpret_cast<const uint4*>(from);
      } else {
        to[j][n] = make_uint4(0, 0, 0, 0);
        load_if(there[j], from, &to[j][n]);
      }
    }
  }
}

// Adds products of 2-byte elements to sums on the tensor cores: rows 0 to 7 of the left matrix come from `rows`, 8 to 15
// from `rows_below`, the right matrix from `columns`; a quad of lanes holds a row and a column. Exact up to the float32 sum.
template <DType kType>
__device__ __forceinline__ void multiply(float (&sum)[4], uint32_t rows, uint32_t rows_below, uint32_t columns) {
  const float a = sum[0], b = sum[1], c = sum[2], d = sum[3];
  if constexpr (kType == DType::kBf16) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
        : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
        : "r"(rows), "r"(rows_below), "r"(columns), "f"(a), "f"(b), "f"(c), "f"(d));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
        : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
        : "r"(rows), "r"(rows_below), "r"(columns), "f"(a), "f"(b), "f"(c), "f"(d));
  }
}

// The thread's part of the sum over i of x[i] y[i], of kVectors vectors x, y; pairs(j, add) calls add(x, y) for the j-th ones.
// Of 2-byte elements one lane of a quad has the sum over the quad, the others 0.
template <DType kType, int kVectors, class Pairs>
__device__ __forceinline__ float product_sum(const Pairs& pairs) {
  if constexpr (kType == DType::kF32) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      pairs(j, [&](const uint4& x, const uint4& y) {
        float xs[4], ys[4];
        unpack_vector<kType>(x, xs), unpack_vector<kType>(y, ys);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum = fmaf(xs[e], ys[e], sum);
      });
    }
    return sum;
  }
  float even[4] = {}, odd[4] = {};  // words: the product of even ones is wanted of rows 0 to 7, of odd ones of rows 8 to 15
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    pairs(j, [&](const uint4& x, const uint4& y) {
      multiply<kType>(even, x.x, x.y, y.x), multiply<kType>(odd, x.x, x.y, y.y);
      multiply<kType>(even, x.z, x.w, y.z), multiply<kType>(odd, x.z, x.w, y.w);
    });
  }
  // a quad's row meets its own column on the diagonal
  const int lane = threadIdx.x % kWarp;
  const float sum = lane & 4 ? even[1] + odd[3] : even[0] + odd[2];
  return lane % 4 == lane / 8 ? sum : 0.0F;
}

// The thread's part of sum_i h w k; a vector has kCount words, the weights' first.
template <DType kType, int kCount, int kVectors>
__device__ __forceinline__ float weighted_dot(const uint4 (&hidden)[kVectors], const uint4 (&key)[kVectors],
                                              const float4* words) {
  constexpr int kParts = kVectorElements<kType> / 4;
  float dot = 0;
#pragma unroll
  for (int n = 0; n < kVectors * kParts; ++n) {  // four elements at a time, for the registers' sake
    float h[4], k[4], w[4];
    unpack_four<kType>(hidden[n / kParts], n % kParts, h);
    unpack_four<kType>(key[n / kParts], n % kParts, k);
    read_word(words[(n / kParts * kCount + n % kParts) * kWarp], w);
#pragma unroll
    for (int e = 0; e < 4; ++e) dot = fmaf(h[e], k[e] * w[e], dot);
  }
  return dot;
}

constexpr int kSums = 4;  // dot, hidden^2, key^2, and grad_out . value in the backward pass

// The four sums of every branch over the block, in a fixed order; `sums` is [kind][branch]. Only the first warp gets
// the first kWanted of them: lane l those of branch l % kBranches. `by_warp` holds kSums * kBranches floats per
// warp; the caller synchronizes before the next call.
template <int kBranches, int kWanted>
__device__ __forceinline__ void token_sums(float (&sums)[kSums * kBranches], const TokenTile& tile, float* by_warp,
                                           float (&of_branch)[kWanted]) {
  constexpr int kCount = kSums * kBranches;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const float sum = spread_sums<1>(sums);
  if (lane < kCount) by_warp[warp * kCount + lane] = sum;
  __syncthreads();
  if (warp != 0) return;
  float total = 0;
#pragma unroll 4
  for (int w = lane / kCount; w < tile.warps; w += kWarp / kCount) total += by_warp[w * kCount + lane % kCount];
#pragma unroll
  for (int offset = kCount; offset < kWarp; offset *= 2) total += __shfl_xor_sync(~0U, total, offset);
#pragma unroll
  for (int i = 0; i < kWanted; ++i) of_branch[i] = __shfl_sync(~0U, total, i * kBranches + lane % kBranches);
}

}  // namespace engram_kernels

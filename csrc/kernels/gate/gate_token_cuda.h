// Device code that gate and its backward pass share: a token in a block's registers. Included by .cu files only.
//
// A thread holds the same kVectors 16-byte vectors of a row in each of kBranches branches, so that the value is read and
// unpacked once for all of them. What a thread keeps in shared memory lies at constant distances from one address of its own
// (Slots). Where a row ends within a block, the vectors behind it are zeros that nobody stores: no sum is guarded.
#pragma once

#include "kernels/gate/gate_row_cuda.h"

namespace engram_kernels {

// The block's shape: warps over a row, and groups of kBranches branches over a token.
struct TokenTile {
  int vectors;  // of a row
  int warps;
  int groups;
  int tokens;
};

// 16-byte slots of dynamic shared memory, [group][warp][branch][vector][kCount][lane]: neighbouring lanes read neighbouring
// 16 bytes, and only the thread that wrote a slot reads it. The products of the weights come first, four a slot.
template <int kBranches, int kVectors, int kCount>
struct Slots {
  static constexpr int kOfWarp = kBranches * kVectors * kCount * kWarp;

  __host__ __device__ static int size(const TokenTile& tile) { return tile.groups * tile.warps * kOfWarp; }
  // this thread's first slot; the others lie at(..) behind it
  __device__ static int first(const TokenTile& tile, int group) {
    return (group * tile.warps + static_cast<int>(threadIdx.x) / kWarp) * kOfWarp + static_cast<int>(threadIdx.x) % kWarp;
  }
  __device__ static constexpr int at(int branch, int vector, int slot) {
    return ((branch * kVectors + vector) * kCount + slot) * kWarp;
  }
};

template <DType kWeights, DType kType, int kBranches, int kVectors, int kCount>
__device__ __forceinline__ void stage_slots_of(const GateWeights& w, int64_t hidden_size, const TokenTile& tile, int first_branch,
                                               float4* slots) {
  constexpr int kElements = kVectorElements<kType>;
  const auto *of_hidden = static_cast<const std::byte*>(w.w_hidden), *of_key = static_cast<const std::byte*>(w.w_key);
#pragma unroll 4  // loads in flight
  for (int n = 0; n < tile.groups * kBranches * kVectors; ++n) {
    const int branch = n / kVectors, j = n % kVectors, i = first_vector<kVectors>() + j * kWarp;
    const int64_t at = ((first_branch + branch) * hidden_size + i * kElements) * dtype_bytes(kWeights);
    float a[kElements] = {}, b[kElements] = {};
    if (i < tile.vectors) load_floats<kWeights, kElements>(of_hidden + at, a), load_floats<kWeights, kElements>(of_key + at, b);
    using Place = Slots<kBranches, kVectors, kCount>;
    float4* to = slots + Place::first(tile, branch / kBranches) + Place::at(branch % kBranches, j, 0);
#pragma unroll
    for (int slot = 0; slot < kCount; ++slot) {
      const int e = 4 * slot;
      to[slot * kWarp] = e < kElements ? make_float4(a[e] * b[e], a[e + 1] * b[e + 1], a[e + 2] * b[e + 2], a[e + 3] * b[e + 3])
                                       : make_float4(0, 0, 0, 0);
    }
  }
}

// The products w_hidden * w_key of this thread's vectors in every group; its other slots are cleared.
template <DType kType, int kBranches, int kVectors, int kCount>
__device__ __forceinline__ void stage_slots(const GateWeights& w, int64_t hidden_size, const TokenTile& tile, int first_branch,
                                            float4* slots) {
  if (w.dtype == DType::kF32) {
    stage_slots_of<DType::kF32, kType, kBranches, kVectors, kCount>(w, hidden_size, tile, first_branch, slots);
  } else if constexpr (kType != DType::kF32) {  // the dtype of hidden
    stage_slots_of<kType, kType, kBranches, kVectors, kCount>(w, hidden_size, tile, first_branch, slots);
  }
}

__device__ __forceinline__ void read_slot(const float4& slot, float* values) {
  const float4 v = slot;
  values[0] = v.x, values[1] = v.y, values[2] = v.z, values[3] = v.w;
}

template <DType kType>
__device__ __forceinline__ void pack_vector(const float* values, uint32_t (&words)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == DType::kF32) {
      words[i] = __float_as_uint(values[i]);
    } else {
      words[i] = pack_pair<kType>(values[2 * i], values[2 * i + 1]);
    }
  }
}

// A load or store of 16 bytes that may not take place, without a branch; `to` then stays as it is.
__device__ __forceinline__ void load_if(bool there, const std::byte* from, uint4* to) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(to->x), "+r"(to->y), "+r"(to->z), "+r"(to->w)
               : "l"(from), "r"(static_cast<int>(there)));
}
__device__ __forceinline__ void store_if(bool there, std::byte* to, const uint32_t (&w)[4]) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p st.global.v4.b32 [%4], {%0, %1, %2, %3};}" ::"r"(w[0]), "r"(w[1]),
               "r"(w[2]), "r"(w[3]), "l"(to), "r"(static_cast<int>(there))
               : "memory");
}

// The same into this thread's own slot, which it may read after wait_for_copies.
__device__ __forceinline__ void copy_if(bool there, const std::byte* from, float4* to) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(static_cast<int>(there))
               : "memory");
}

// What a block does at once: kBranches branches of a token.
struct Step {
  int token;
  int branch;  // the first
};

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

// Sums of kCount values, a power of two, over a warp: lane l gets that of value l % kCount. Each step halves what a lane holds.
template <int kCount, int kHalf = kCount / 2>
__device__ __forceinline__ float scattered_warp_sums(float (&v)[kCount]) {
  if constexpr (kHalf > 0) {
    const bool upper = (threadIdx.x & kHalf) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float kept = upper ? v[i + kHalf] : v[i], given = upper ? v[i] : v[i + kHalf];
      v[i] = kept + __shfl_xor_sync(~0U, given, kHalf);
    }
    return scattered_warp_sums<kCount, kHalf / 2>(v);
  } else {
#pragma unroll
    for (int offset = kCount; offset < kWarp; offset *= 2) v[0] += __shfl_xor_sync(~0U, v[0], offset);
    return v[0];
  }
}

// A step of sums of products of 2-byte elements on the tensor cores: rows 0 to 7 of the left matrix come from `rows`, 8 to 15
// from `rows_below`, the right matrix from `columns`; a quad of lanes holds a row and a column. Exact up to the float32 sum.
template <DType kType>
__device__ __forceinline__ void multiply(float (&sum)[4], uint32_t rows, uint32_t rows_below, uint32_t columns) {
  if constexpr (kType == DType::kBf16) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(rows), "r"(rows_below), "r"(columns));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(rows), "r"(rows_below), "r"(columns));
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

// Four elements of a vector: all of them, or its `half`.
template <DType kType>
__device__ __forceinline__ void unpack_four(const uint4& v, int half, float* values) {
  if constexpr (kType == DType::kF32) {
    unpack_vector<kType>(v, values);
  } else {
    unpack_pair<kType>(half ? v.z : v.x, values, values + 1);
    unpack_pair<kType>(half ? v.w : v.y, values + 2, values + 3);
  }
}

// The thread's part of sum_i h w k; kCount slots a vector, the weights' first.
template <DType kType, int kCount, int kVectors>
__device__ __forceinline__ float weighted_dot(const uint4 (&hidden)[kVectors], const uint4 (&key)[kVectors],
                                              const float4* slots) {
  constexpr int kParts = kVectorElements<kType> / 4;
  float dot = 0;
#pragma unroll
  for (int n = 0; n < kVectors * kParts; ++n) {  // four elements a time, for the registers' sake
    float h[4], k[4], w[4];
    unpack_four<kType>(hidden[n / kParts], n % kParts, h);
    unpack_four<kType>(key[n / kParts], n % kParts, k);
    read_slot(slots[(n / kParts * kCount + n % kParts) * kWarp], w);
#pragma unroll
    for (int e = 0; e < 4; ++e) dot = fmaf(h[e], k[e] * w[e], dot);
  }
  return dot;
}

constexpr int kSums = 4;  // dot, hidden^2, key^2, and grad_out . value in the backward pass

// The four sums of every branch over the block, in a fixed order; `sums` is [kind][branch]. Only the first warp gets them: lane l
// those of branch l % kBranches. `partial` holds kSums * kBranches floats a warp; the caller synchronizes before the next call.
template <int kBranches>
__device__ __forceinline__ void token_sums(float (&sums)[kSums * kBranches], const TokenTile& tile, float* partial,
                                           float (&of_branch)[kSums]) {
  constexpr int kCount = kSums * kBranches;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const float sum = scattered_warp_sums(sums);
  if (lane < kCount) partial[warp * kCount + lane] = sum;
  __syncthreads();
  if (warp != 0) return;
  float total = 0;
#pragma unroll 4
  for (int w = lane / kCount; w < tile.warps; w += kWarp / kCount) total += partial[w * kCount + lane % kCount];
#pragma unroll
  for (int offset = kCount; offset < kWarp; offset *= 2) total += __shfl_xor_sync(~0U, total, offset);
#pragma unroll
  for (int i = 0; i < kSums; ++i) of_branch[i] = __shfl_sync(~0U, total, i * kBranches + lane % kBranches);
}

}  // namespace engram_kernels

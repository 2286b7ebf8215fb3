// CPU kernel of engram_forward. Contract: engram_forward.h, gate.h.
//
// Mapping  tokens are taken in tiles of kTileTokens, whose memory vectors, decoded to float, stay in a core's L2. Threads share
//          the blocks of kBlock rows of w_kv: first those of the keys, of whose products only three sums a token are kept,
//          added in the order of the blocks; then those of the value, whose products go through the gates into out.
//          Products are dot products of kTokenStep tokens by kRowStep rows, lanes along the memory vector.
//          With a lent product a tile is gathered, multiplied and gated by the kernels of those ops.
// Traffic  w_kv and hidden (twice, the second time from cache where a tile of it fits) once a tile; rows and out once.
#include "kernels/engram_forward/engram_forward.h"
#include "kernels/gate/gate_row_cpu.h"
#include "kernels/gather_rows/gather_rows.h"

namespace engram_kernels::EK_ISA {
namespace {

constexpr int kTileTokens = 32;
constexpr int kBlock = 64;  // rows of w_kv
// of a product: as many sums as fit the registers beside their operands
constexpr int kTokenStep = kLanes == 16 ? 6 : 4;
constexpr int kRowStep = kLanes == 16 ? 4 : 2;

// One tile of tokens: those that are not masked.
struct Tile {
  int64_t tokens[kTileTokens];
  int count = 0;
};

struct Workspace {
  int64_t stride;  // floats from one memory vector to the next
  int64_t blocks;  // of a branch
  Scratch memory;
  Scratch sums;   // RowSums [branches, blocks, kTileTokens]
  Scratch gates;  // [kTileTokens, branches]

  explicit Workspace(const EngramForwardParams& p)
      : stride(ceil_div(p.memory_size(), int64_t{kLanes}) * kLanes + kLanes),  // no power of two, that caches sets share
        blocks(ceil_div(p.hidden_size, int64_t{kBlock})),
        memory(stride * kTileTokens),
        sums(p.branches * blocks * kTileTokens * 3),
        gates(p.branches * kTileTokens) {}

  RowSums* sums_of(int64_t branch_and_block) const {
    return reinterpret_cast<RowSums*>(sums.data()) + branch_and_block * kTileTokens;
  }
};

// The memory vector of token t, rounded to T, as floats; zeros behind its end.
template <class T>
void decode_token(const EngramForwardParams& p, int64_t t, int64_t stride, float* e) {
  const int dim = p.table.row_dim;
  std::memset(e, 0, static_cast<size_t>(stride) * sizeof(float));
  with_row_format(p.table.format, [&](auto kFormat) {
    for (int64_t c = 0; c < p.columns; ++c) {
      const int64_t id = p.row_id(t, c);
      if (id == kNoRow) continue;
      const std::byte *row = p.table.row(id), *scales = p.table.row_scales(id);
      for (int i = 0; i < dim; i += kLanes) {
        const int left = dim - i < kLanes ? dim - i : kLanes;
        T rounded[kLanes];
        store(rounded, decode_lanes<decltype(kFormat)::value>(p.table, row, scales, i, left));
        store_upto(e + c * dim + i, load(rounded), left);
      }
    }
  });
}

// products[i][j] = e_i . w_j for kTokens tokens and kRows rows; `size` elements each.
template <int kTokens, int kRows, class T>
EK_LANE void multiply(const float* e, int64_t e_stride, const T* w, int64_t size, float* products) {
  F32 acc[kTokens][kRows];
  for (auto& row : acc) {
    for (F32& x : row) x = zeros();
  }
  const auto step = [&](int64_t k, const auto& load_w) {
    F32 y[kRows];
    for (int j = 0; j < kRows; ++j) y[j] = load_w(w + j * size + k);
    for (int i = 0; i < kTokens; ++i) {
      const F32 x = load(e + i * e_stride + k);
      for (int j = 0; j < kRows; ++j) acc[i][j] = fma(x, y[j], acc[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) step(k, [](const T* at) { return load(at); });
  if (k < size) step(k, [&](const T* at) { return load_upto(at, size - k); });
  for (int i = 0; i < kTokens; ++i) {
    for (int j = 0; j < kRows; ++j) products[i * kBlock + j] = sum(acc[i][j]);
  }
}

// products [count, kBlock]: the tile's memory vectors times `rows` rows of w_kv from `first` on.
template <class T>
void multiply_block(const EngramForwardParams& p, const Workspace& work, int count, int64_t first, int rows, float* products) {
  const int64_t size = p.memory_size();
  const T* w = static_cast<const T*>(p.w_kv) + first * size;
  for (int j = 0; j < rows; j += kRowStep) {
    for (int i = 0; i < count; i += kTokenStep) {
      const float* e = work.memory.data() + i * work.stride;
      float* to = products + i * kBlock + j;
      if (i + kTokenStep <= count && j + kRowStep <= rows) {
        multiply<kTokenStep, kRowStep>(e, work.stride, w + j * size, size, to);
        continue;
      }
      // the ends: one by one, each sum in the same order as above
      for (int a = i; a < count && a < i + kTokenStep; ++a) {
        for (int b = j; b < rows && b < j + kRowStep; ++b) {
          multiply<1, 1>(work.memory.data() + a * work.stride, work.stride, w + b * size, size, products + a * kBlock + b);
        }
      }
    }
  }
}

template <class T>
float weight_at(const EngramForwardParams& p, int64_t i) {
  if (p.weights.dtype == DType::kF32) {
    return static_cast<const float*>(p.weights.w_hidden)[i] * static_cast<const float*>(p.weights.w_key)[i];
  }
  return to_float(static_cast<const T*>(p.weights.w_hidden)[i]) * to_float(static_cast<const T*>(p.weights.w_key)[i]);
}

// What a block of one branch's keys adds to the sums of every token of the tile.
template <class T>
void score_block(const EngramForwardParams& p, const Tile& tile, Workspace* work, int64_t branch_and_block) {
  alignas(64) float products[kTileTokens * kBlock];
  float weights[kBlock];
  const int64_t m = branch_and_block / work->blocks, begin = branch_and_block % work->blocks * kBlock;
  const int rows = static_cast<int>(std::min<int64_t>(kBlock, p.hidden_size - begin));
  multiply_block<T>(p, *work, tile.count, m * p.hidden_size + begin, rows, products);
  for (int j = 0; j < rows; ++j) weights[j] = weight_at<T>(p, m * p.hidden_size + begin + j);
  for (int i = 0; i < tile.count; ++i) {
    const T* h = p.hidden.row<const T>(tile.tokens[i], m) + begin;
    RowSums sums{};
    for (int j = 0; j < rows; ++j) {
      const float x = to_float(h[j]), k = products[i * kBlock + j];
      sums.dot += x * weights[j] * k;
      sums.hh += x * x;
      sums.kk += k * k;
    }
    work->sums_of(branch_and_block)[i] = sums;
  }
}

void find_gates(const EngramForwardParams& p, const Tile& tile, Workspace* work) {
  for (int i = 0; i < tile.count; ++i) {
    for (int64_t m = 0; m < p.branches; ++m) {
      RowSums total{};
      for (int64_t b = 0; b < work->blocks; ++b) {
        const RowSums& part = work->sums_of(m * work->blocks + b)[i];
        total.dot += part.dot;
        total.hh += part.hh;
        total.kk += part.kk;
      }
      work->gates.data()[i * p.branches + m] = gate_score(p.options, p.hidden_size, total.dot, total.hh, total.kk).gate;
    }
  }
}

// A block of the value, gated into every branch of the tile's tokens.
template <class T>
void value_block(const EngramForwardParams& p, const Tile& tile, const Workspace& work, int64_t block) {
  alignas(64) float products[kTileTokens * kBlock];
  const int64_t begin = block * kBlock;
  const int rows = static_cast<int>(std::min<int64_t>(kBlock, p.hidden_size - begin));
  multiply_block<T>(p, work, tile.count, p.branches * p.hidden_size + begin, rows, products);
  alignas(64) float value[kBlock];
  for (int i = 0; i < tile.count; ++i) {
    for (int j = 0; j < rows; ++j) value[pair_ordered_index<T>(j, rows)] = products[i * kBlock + j];
    for (int64_t m = 0; m < p.branches; ++m) {
      write_row<false>(p.hidden.row<const T>(tile.tokens[i], m) + begin, value, work.gates.data()[i * p.branches + m],
                       p.options.add_residual, rows, p.out.row<T>(tile.tokens[i], m) + begin, [](int64_t) {});
    }
  }
}

template <class T>
void forward_tile(const EngramForwardParams& p, const Tile& tile, Workspace* work, const Parallel& parallel) {
  parallel.for_range(tile.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      decode_token<T>(p, tile.tokens[i], work->stride, work->memory.data() + i * work->stride);
    }
  });
  parallel.for_range(p.branches * work->blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) score_block<T>(p, tile, work, b);
  });
  find_gates(p, tile, work);
  parallel.for_range(work->blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) value_block<T>(p, tile, *work, b);
  });
}

template <class T>
void engram_forward_of_type(const EngramForwardParams& p, const Parallel& parallel) {
  Workspace work(p);
  for (int64_t t = 0; t < p.num_tokens;) {
    Tile tile;
    for (; t < p.num_tokens && tile.count < kTileTokens; ++t) {
      if (!p.masked(t)) {
        tile.tokens[tile.count++] = t;
        continue;
      }
      for (int64_t m = 0; m < p.branches; ++m) {
        pass_row(p.hidden.row<const T>(t, m), p.options.add_residual, p.hidden_size, p.out.row<T>(t, m));
      }
    }
    if (tile.count > 0) forward_tile<T>(p, tile, &work, parallel);
  }
}

BranchRows from_token(const BranchRows& rows, int64_t t, size_t element_bytes) {
  const int64_t bytes = t * rows.token_stride * static_cast<int64_t>(element_bytes);
  return {static_cast<std::byte*>(rows.data) + bytes, rows.token_stride, rows.branch_stride};
}

// Gather, product, gate: the three ops on one tile after another.
void with_lent_product(const EngramForwardParams& p, const TileProduct& product, const Parallel& parallel) {
  const auto element_bytes = static_cast<size_t>(dtype_bytes(p.dtype));
  const int64_t kv_size = (p.branches + 1) * p.hidden_size, value_offset = p.branches * p.hidden_size;
  for (int64_t first = 0; first < p.num_tokens; first += product.tokens) {
    const int64_t count = std::min(product.tokens, p.num_tokens - first);
    for (int64_t i = 0; i < count * p.columns; ++i) {
      const int64_t t = first + i / p.columns;
      product.row_ids[i] = p.masked(t) ? kNoRow : p.row_id(t, i % p.columns);
    }
    GatherRowsParams gather{};
    gather.source = p.table;
    gather.row_ids = {product.row_ids, count * p.columns, true};
    gather.out = static_cast<std::byte*>(product.memory);
    gather.out_dtype = p.dtype;
    gather_rows_cpu(gather, parallel);
    product.run(count, product.context);
    GateParams gate{};
    gate.hidden = from_token(p.hidden, first, element_bytes);
    gate.key = {product.kv, kv_size, p.hidden_size};
    gate.value = static_cast<std::byte*>(product.kv) + static_cast<size_t>(value_offset) * element_bytes;
    gate.value_stride = kv_size;
    gate.weights = p.weights;
    gate.mask = p.mask == nullptr ? nullptr : p.mask + first;
    gate.out = from_token(p.out, first, element_bytes);
    gate.num_tokens = count;
    gate.branches = p.branches;
    gate.hidden_size = p.hidden_size;
    gate.dtype = p.dtype;
    gate.options = p.options;
    gate_cpu(gate, parallel);
  }
}

}  // namespace

void engram_forward_cpu(const EngramForwardParams& p, const TileProduct& product, const Parallel& parallel) {
  if (p.num_tokens == 0) return;
  if (product.run != nullptr) return with_lent_product(p, product, parallel);
  with_dtype(p.dtype, [&](auto* tag) { engram_forward_of_type<std::remove_pointer_t<decltype(tag)>>(p, parallel); });
}

}  // namespace engram_kernels::EK_ISA

EK_DISPATCH_CPU(engram_forward_cpu, (const EngramForwardParams& p, const TileProduct& product, const Parallel& parallel),
                (p, product, parallel))

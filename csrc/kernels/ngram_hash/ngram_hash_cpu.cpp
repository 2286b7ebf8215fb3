// CPU kernel of ngram_hash. Contract and formula: ngram_hash.h.
//
// Mapping  tokens in blocks of kBlock, of one sequence or of many short ones; per block and layer, first the mixes of every order
//          (scalar), then eight columns at a time with their constants in registers.
// Modulus  quotients from double reciprocals, exact: for |mix| <= 2^63 and m > 2^13 the quotient is at most 2^50, so rounding
//          mix and 1/m to 53 bits moves mix * (1/m) by less than 1/4; rounded to an integer it is within 3/4 of mix / m,
//          and the remainder lies in (-m, m): one unsigned minimum mends it, and makes it that of a floor whatever the sign
//          of mix. Smaller moduli: ExactModulus, of the ones' complement where mix is negative.
// Traffic  reads 4 or 8 B per token, writes 4 B * columns * layers per token, which bounds the kernel.
#include "kernels/ngram_hash/ngram_hash.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/cpu_isa.h"
#include "common/cu_seqlens.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace engram_kernels::EK_ISA {
namespace {

constexpr int kBlock = 64;              // tokens; mixes of a block stay in L1
constexpr int kLanes = 8;               // columns at a time
constexpr int64_t kGrainTokens = 1024;  // a thread is worth starting for about 20 us of work
constexpr int64_t kMinVectorModulus = 1 << 13;

// ids[s][i]: canonical, of s tokens before token i of the block; the boundary's where that position is blocked.
struct Block {
  uint32_t ids[kMaxOrder][kBlock];
};

struct Mixes {
  int64_t mix[kBlock];
  double value[kBlock];  // the same, rounded to 53 bits
};

// Constants of eight columns.
struct ColumnGroup {
  alignas(32) double reciprocal[kLanes];  // 1 / modulus
  alignas(32) uint32_t modulus[kLanes];
  alignas(32) uint32_t offset[kLanes];
  ExactModulus exact[kLanes];
  int count;  // columns in use
  bool vectorised;
};

// The id `back` tokens before token t of `sequence`, canonical; false if it is blocked by itself.
bool lookback(const NgramHashParams& p, int64_t sequence, int64_t t, int back, uint32_t* id) {
  const int64_t source = t - back;
  int64_t raw;
  if (source >= p.cu_seqlens[sequence]) {
    if (p.dead(source)) return false;
    raw = p.token_id(source);
  } else {
    const int64_t into_history = p.cu_seqlens[sequence] - source;
    if (p.history == nullptr) return false;
    raw = p.history_id(sequence, static_cast<int>(into_history));
    if (raw < 0) return false;
  }
  *id = static_cast<uint32_t>(p.canonical(raw));
  return static_cast<int64_t>(*id) != p.eos_id;
}

// Fills places [at, at + count) of the block with tokens of one sequence, from `first` on.
template <int kOrder>
void load_tokens(const NgramHashParams& p, int64_t sequence, int64_t first, int count, int at, Block* block) {
  const int order = kOrder > 0 ? kOrder : p.max_order;
  const auto boundary = static_cast<uint32_t>(p.boundary_id);
  uint32_t before[kMaxOrder];  // of the next token, blocked ones replaced
  bool open = true;
  for (int back = 1; back < order; ++back) {
    open = open && lookback(p, sequence, first, back, &before[back]);
    if (!open) before[back] = boundary;
  }
  for (int i = 0; i < count; ++i) {
    const bool dead = p.dead(first + i);
    const uint32_t id = dead ? boundary : static_cast<uint32_t>(p.canonical(p.token_id(first + i)));
    block->ids[0][at + i] = id;
    for (int s = 1; s < order; ++s) block->ids[s][at + i] = dead ? boundary : before[s];
    const bool ends = dead || static_cast<int64_t>(id) == p.eos_id;  // the lookback of the tokens behind it
    for (int s = order - 1; s > 1; --s) before[s] = ends ? boundary : before[s - 1];
    before[1] = ends ? boundary : id;
  }
}

// Calls f with the order as a constant where it is a usual one, else 0.
template <class F>
void with_order(int order, const F& f) {
  switch (order) {
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    default:
      return f(std::integral_constant<int, 0>{});
  }
}

// mixes[s - 1] for orders s + 1 = 2..N, multipliers [N]
template <int kOrder>
void mix_block(const Block& block, int count, const int64_t* multipliers, int order, Mixes* mixes) {
  const int n = kOrder > 0 ? kOrder : order;
  for (int i = 0; i < count; ++i) {
    uint64_t mix = block.ids[0][i] * static_cast<uint64_t>(multipliers[0]);
    for (int s = 1; s < n; ++s) {
      mix ^= block.ids[s][i] * static_cast<uint64_t>(multipliers[s]);
      mixes[s - 1].mix[i] = static_cast<int64_t>(mix);
      mixes[s - 1].value[i] = static_cast<double>(static_cast<int64_t>(mix));
    }
  }
}

void reduce_exact(const Mixes& mixes, int count, const ColumnGroup& group, int columns, int32_t* out) {
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < group.count; ++j) {
      out[int64_t{i} * columns + j] = static_cast<int32_t>(group.exact[j].of_signed(mixes.mix[i]) + group.offset[j]);
    }
  }
}

#ifdef __AVX2__
// Adding 1.5 * 2^52 leaves round(x) in the low bits of the double.
constexpr double kRoundToLowBits = 6755399441055744.0;

void reduce_vectorised(const Mixes& mixes, int count, const ColumnGroup& group, int columns, int32_t* out) {
  // shuffle_ps takes the low words of lanes (0,1 | 4,5) and (2,3 | 6,7) back into column order
  const __m256d low = _mm256_load_pd(group.reciprocal), high = _mm256_load_pd(group.reciprocal + 4);
  const __m256d reciprocal_a = _mm256_permute2f128_pd(low, high, 0x20);
  const __m256d reciprocal_b = _mm256_permute2f128_pd(low, high, 0x31);
  const __m256d magic = _mm256_set1_pd(kRoundToLowBits);
  const __m256i modulus = _mm256_load_si256(reinterpret_cast<const __m256i*>(group.modulus));
  const __m256i offset = _mm256_load_si256(reinterpret_cast<const __m256i*>(group.offset));
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i in_use = _mm256_cmpgt_epi32(_mm256_set1_epi32(group.count), lane);
  for (int i = 0; i < count; ++i) {
    const __m256d value = _mm256_broadcast_sd(&mixes.value[i]);
    const __m256 quotient_a = _mm256_castpd_ps(_mm256_fmadd_pd(value, reciprocal_a, magic));
    const __m256 quotient_b = _mm256_castpd_ps(_mm256_fmadd_pd(value, reciprocal_b, magic));
    const __m256i quotient = _mm256_castps_si256(_mm256_shuffle_ps(quotient_a, quotient_b, 0x88));
    const __m256i mix = _mm256_set1_epi32(static_cast<int>(mixes.mix[i]));
    __m256i rest = _mm256_sub_epi32(mix, _mm256_mullo_epi32(quotient, modulus));
    rest = _mm256_min_epu32(rest, _mm256_add_epi32(rest, modulus));  // a negative rest is a huge unsigned one
    const __m256i row = _mm256_add_epi32(rest, offset);
    int* target = out + int64_t{i} * columns;
    if (group.count == kLanes) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), row);
    } else {
      _mm256_maskstore_epi32(target, in_use, row);
    }
  }
}
#else
void reduce_vectorised(const Mixes& mixes, int count, const ColumnGroup& group, int columns, int32_t* out) {
  reduce_exact(mixes, count, group, columns, out);
}
#endif

// groups of at most kLanes columns that share an order, all layers
std::vector<ColumnGroup> make_groups(const NgramHashParams& p) {
  std::vector<ColumnGroup> groups;
  groups.reserve(static_cast<size_t>(p.num_layers) * static_cast<size_t>(p.max_order - 1) *
                 static_cast<size_t>(ceil_div(p.heads, kLanes)));
  for (int64_t order_start = 0; order_start < int64_t{p.num_layers} * p.columns(); order_start += p.heads) {
    for (int head = 0; head < p.heads; head += kLanes) {
      ColumnGroup group{};
      group.count = std::min(kLanes, p.heads - head);
      group.vectorised = true;
      for (int j = 0; j < kLanes; ++j) {
        const int64_t column = order_start + head + std::min(j, group.count - 1);
        group.exact[j] = {static_cast<uint32_t>(p.moduli[column]), static_cast<uint64_t>(p.reciprocals[column])};
        group.modulus[j] = static_cast<uint32_t>(p.moduli[column]);
        group.reciprocal[j] = 1.0 / static_cast<double>(p.moduli[column]);
        group.offset[j] = static_cast<uint32_t>(p.offsets[column]);
        group.vectorised = group.vectorised && p.moduli[column] > kMinVectorModulus;
      }
      groups.push_back(group);
    }
  }
  return groups;
}

void sum_column(const NgramHashParams& p, const Block& block, int count, int64_t column, int order, const ExactModulus& exact,
                int32_t* out) {
  const int64_t* multipliers = p.multipliers + column * p.max_order;
  for (int i = 0; i < count; ++i) {
    uint64_t sum = 0;
    for (int s = 0; s < order; ++s) sum += block.ids[s][i] * static_cast<uint64_t>(multipliers[s]);
    out[int64_t{i} * p.columns()] = static_cast<int32_t>(exact(sum) + static_cast<uint32_t>(p.offsets[column]));
  }
}

void hash_block(const NgramHashParams& p, const std::vector<ColumnGroup>& groups, const Block& block, int64_t first, int count) {
  Mixes mixes[kMaxOrder - 1];
  const ColumnGroup* group = groups.data();
  for (int layer = 0; layer < p.num_layers; ++layer) {
    int32_t* out = p.row_ids + (layer * p.num_tokens + first) * p.columns();
    if (!p.per_column) {
      with_order(p.max_order, [&](auto order) {
        mix_block<decltype(order)::value>(block, count, p.multipliers + layer * p.max_order, p.max_order, mixes);
      });
    }
    for (int order = 2; order <= p.max_order; ++order) {
      for (int head = 0; head < p.heads; head += kLanes, ++group) {
        const int column = (order - 2) * p.heads + head;
        if (p.per_column) {
          for (int j = 0; j < group->count; ++j) {
            sum_column(p, block, count, int64_t{layer} * p.columns() + column + j, order, group->exact[j], out + column + j);
          }
        } else if (group->vectorised) {
          reduce_vectorised(mixes[order - 2], count, *group, p.columns(), out + column);
        } else {
          reduce_exact(mixes[order - 2], count, *group, p.columns(), out + column);
        }
      }
    }
  }
}

// No row for tokens of a skipped sequence.
void fill_block(const NgramHashParams& p, int64_t first, int64_t stop) {
  for (int layer = 0; layer < p.num_layers; ++layer) {
    int32_t* out = p.row_ids + (layer * p.num_tokens + first) * p.columns();
    std::fill(out, out + (stop - first) * p.columns(), static_cast<int32_t>(kNoRow));
  }
}

void hash_tokens(const NgramHashParams& p, const std::vector<ColumnGroup>& groups, int64_t begin, int64_t end) {
  Block block;
  int held = 0;  // tokens of the block, the last ones before `first`
  int64_t sequence = sequence_of(p.cu_seqlens, p.num_sequences, begin), first = begin;
  const auto hash_held = [&] {
    hash_block(p, groups, block, first - held, held);
    held = 0;
  };
  while (first < end) {
    while (p.cu_seqlens[sequence + 1] <= first) ++sequence;
    const int64_t stop = std::min<int64_t>(end, p.cu_seqlens[sequence + 1]);
    if (p.history_row(sequence) == kSkipped) {
      hash_held();
      fill_block(p, first, stop);
      first = stop;
      continue;
    }
    const int count = static_cast<int>(std::min<int64_t>(stop - first, kBlock - held));
    with_order(p.max_order, [&](auto order) { load_tokens<decltype(order)::value>(p, sequence, first, count, held, &block); });
    first += count;
    held += count;
    if (held == kBlock) hash_held();
  }
  hash_held();
}

// p.commit(b) of every sequence; a step that decodes moves each history by one entry.
template <class T>
void commit_all(const NgramHashParams& p) {
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    const int64_t t = p.cu_seqlens[b], row = p.history_row(b);
    if (p.rejected != nullptr || p.cu_seqlens[b + 1] - t != 1 || row < 0) {
      p.commit(b);
      continue;
    }
    T* history = static_cast<T*>(p.committed) + row * p.history_stride;
    for (int64_t j = p.history_width - 1; j > 0; --j) history[j] = history[j - 1];
    history[0] = static_cast<T>(p.dead(t) ? kDeadToken : p.token_id(t));
  }
}

}  // namespace

void ngram_hash_cpu(const NgramHashParams& p, const Parallel& parallel) {
  if (p.num_tokens > 0) {
    const std::vector<ColumnGroup> groups = make_groups(p);
    parallel.for_range(p.num_tokens, kGrainTokens, [&](int64_t begin, int64_t end) { hash_tokens(p, groups, begin, end); });
  }
  if (p.committed == nullptr) return;
  p.ids_are_int64 ? commit_all<int64_t>(p) : commit_all<int32_t>(p);
}

}  // namespace engram_kernels::EK_ISA

EK_DISPATCH_CPU(ngram_hash_cpu, (const NgramHashParams& p, const Parallel& parallel), (p, parallel))

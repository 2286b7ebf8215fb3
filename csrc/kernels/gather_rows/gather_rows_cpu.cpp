// CPU kernel of gather_rows. Contract: gather_rows.h.
//
// Mapping   consecutive ids to each thread; a row is decoded kLanes elements at a time, or copied where the dtype stays.
// Latency   a random row is a DRAM access away (and a TLB miss, which huge pages make cheap), so the cache lines of rows
//           some kPrefetchBytes ahead are requested while this one is copied. They go to L2: the L1 has room for few. A row
//           that is decoded is moved on into L1 kDecodedNear rows before, since its loads would wait behind those requests.
// Traffic   reads each row once, writes the output once. A large output goes past the cache: an ordinary store would read
//           the line first.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/cpu_isa.h"
#include "common/row_decode.h"
#include "kernels/gather_rows/fp8_to_bf16_cpu.h"
#include "kernels/gather_rows/gather_rows.h"

#if defined(__SSE2__) && !defined(__AVX2__)
#include <emmintrin.h>
#endif

namespace engram_kernels::EK_ISA {
namespace {

constexpr int64_t kGrainRows = 128;
constexpr int64_t kCacheLine = 64;
constexpr int64_t kPrefetchBytes = 8192;                          // in flight ahead of the copy
constexpr int64_t kMaxPrefetchRows = 32, kMaxPrefetchLines = 32;  // of a row; the hardware follows a longer one
constexpr int kDecodedNear = 6;                                   // rows that are in L1 before one is decoded
constexpr int64_t kStreamBytes = int64_t{8} << 20;                // outputs from here on do not stay in a cache anyway
constexpr int kPiece = 256;                                       // elements decoded before they are streamed out
constexpr int64_t kFewElements = 1 << 14;                         // below, tables of all scales are not worth their making

#if defined(__AVX512F__)
constexpr int64_t kStreamAlign = 64;
EK_LANE void stream_line(std::byte* to, const std::byte* from) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
EK_LANE void copy_line(std::byte* to, const std::byte* from) { _mm512_storeu_si512(to, _mm512_loadu_si512(from)); }
EK_LANE void stream_done() { _mm_sfence(); }
#elif defined(__AVX2__)
constexpr int64_t kStreamAlign = 32;
EK_LANE void stream_line(std::byte* to, const std::byte* from) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), low);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to + 32), high);
}
EK_LANE void copy_line(std::byte* to, const std::byte* from) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), high);
}
EK_LANE void stream_done() { _mm_sfence(); }
#elif defined(__SSE2__)
constexpr int64_t kStreamAlign = 16;
EK_LANE void stream_line(std::byte* to, const std::byte* from) {
  for (int i = 0; i < 64; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
}
EK_LANE void copy_line(std::byte* to, const std::byte* from) { std::memcpy(to, from, 64); }
EK_LANE void stream_done() { _mm_sfence(); }
#else
constexpr int64_t kStreamAlign = 1;
EK_LANE void stream_line(std::byte* to, const std::byte* from) { std::memcpy(to, from, 64); }
EK_LANE void copy_line(std::byte* to, const std::byte* from) { std::memcpy(to, from, 64); }
EK_LANE void stream_done() {}
#endif

template <bool kStream>
EK_LANE void copy_bytes(std::byte* to, const std::byte* from, int64_t bytes) {
  int64_t i = 0;
  for (; i + kCacheLine <= bytes; i += kCacheLine) {
    if constexpr (kStream) {
      stream_line(to + i, from + i);
    } else {
      copy_line(to + i, from + i);
    }
  }
  if (i < bytes) std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
}

constexpr int kToL1 = 3, kToL2 = 2;  // as __builtin_prefetch counts

template <int kWhere>
EK_LANE void request(const std::byte* begin, int64_t skip_lines, int64_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t end = first + static_cast<uintptr_t>(std::min(bytes, kMaxPrefetchLines * kCacheLine));
  uintptr_t line = (first & ~uintptr_t{kCacheLine - 1}) + static_cast<uintptr_t>(skip_lines * kCacheLine);
  for (; line < end; line += kCacheLine) __builtin_prefetch(reinterpret_cast<const void*>(line), 0, kWhere);
}

// Requests the lines of rows [begin, end). First one line of every row: a request waits for its page to be translated,
// and only requests that stand close together have their translations overlap.
EK_LANE void request_rows(const GatherRowsParams& p, int64_t begin, int64_t end) {
  const RowSource& s = p.source;
  const int64_t value_bytes = row_value_bytes(s.format, s.row_dim), scale_bytes = row_scale_bytes(s.format, s.row_dim);
  for (int64_t i = begin; i < end; ++i) {
    if (p.row_ids[i] != kNoRow) __builtin_prefetch(s.row(p.row_ids[i]), 0, kToL2);
  }
  for (int64_t i = begin; scale_bytes > 0 && i < end; ++i) {
    if (p.row_ids[i] != kNoRow) request<kToL2>(s.row_scales(p.row_ids[i]), 0, scale_bytes);
  }
  for (int64_t i = begin; i < end; ++i) {
    if (p.row_ids[i] != kNoRow) request<kToL2>(s.row(p.row_ids[i]), 1, value_bytes);
  }
}

// Calls emit(row id, output row) for rows [begin, end), their lines requested a group ahead into L2, and kNear rows ahead into
// L1.
template <int kNear, class Emit>
EK_LANE void for_rows(const GatherRowsParams& p, int64_t begin, int64_t end, const Emit& emit) {
  const int64_t row_bytes = row_value_bytes(p.source.format, p.source.row_dim);
  const int64_t scale_bytes = row_scale_bytes(p.source.format, p.source.row_dim);
  const int64_t out_bytes = int64_t{p.source.row_dim} * dtype_bytes(p.out_dtype);
  const int64_t group = std::clamp<int64_t>(kPrefetchBytes / row_bytes, 1, kMaxPrefetchRows);
  request_rows(p, begin, std::min(end, begin + group));
  for (int64_t first = begin; first < end; first += group) {
    const int64_t next = std::min(end, first + group);
    request_rows(p, next, std::min(end, next + group));
    for (int64_t i = first; i < next; ++i) {
      if (kNear > 0 && i + kNear < end && p.row_ids[i + kNear] != kNoRow) {
        request<kToL1>(p.source.row(p.row_ids[i + kNear]), 0, row_bytes);
        if (scale_bytes > 0) request<kToL1>(p.source.row_scales(p.row_ids[i + kNear]), 0, scale_bytes);
      }
      const int64_t id = p.row_ids[i];
      std::byte* out = p.out + i * out_bytes;
      if (id == kNoRow) {
        std::memset(out, 0, static_cast<size_t>(out_bytes));
      } else {
        emit(id, out);
      }
    }
  }
}

template <RowFormat kFormat, class Out>
EK_LANE void decode_piece(const RowSource& s, int64_t id, int first, int count, Out* out) {
  const std::byte* row = s.row(id);
  const std::byte* scales = has_row_scales(kFormat) ? s.row_scales(id) : nullptr;
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, decode_lanes<kFormat>(s, row, scales, first + i, kLanes));
  if (i < count) store_first(out + i, decode_lanes<kFormat>(s, row, scales, first + i, count - i), count - i);
}

template <bool kStream>
void copy_rows(const GatherRowsParams& p, int64_t begin, int64_t end) {
  const int64_t bytes = row_value_bytes(p.source.format, p.source.row_dim);
  for_rows<0>(p, begin, end, [&](int64_t id, std::byte* out) __attribute__((always_inline)) {
    copy_bytes<kStream>(out, p.source.row(id), bytes);
  });
}

template <RowFormat kFormat, class Out, bool kStream>
void decode_rows(const GatherRowsParams& p, int64_t begin, int64_t end) {
  for_rows<kDecodedNear>(p, begin, end, [&](int64_t id, std::byte* out) __attribute__((always_inline)) {
    if constexpr (kStream) {
      alignas(64) Out piece[kPiece];
      for (int first = 0; first < p.source.row_dim; first += kPiece) {
        const int count = std::min(kPiece, p.source.row_dim - first);
        decode_piece<kFormat>(p.source, id, first, count, piece);
        copy_bytes<true>(out + first * int64_t{sizeof(Out)}, reinterpret_cast<const std::byte*>(piece),
                         count * int64_t{sizeof(Out)});
      }
    } else {
      decode_piece<kFormat>(p.source, id, 0, p.source.row_dim, reinterpret_cast<Out*>(out));
    }
  });
}

// Rows of fp8 to bf16 by tables of products where their scales are ordinary, else over float.
template <RowFormat kFormat, bool kStream>
void fp8_rows(const GatherRowsParams& p, int64_t begin, int64_t end) {
  constexpr RowScale kScale = traits_of(kFormat).scale;
  static_assert(kScale != RowScale::kBlockUe8m0 || traits_of(kFormat).block == kTableBlock);
  const RowSource& s = p.source;
  const int dim = s.row_dim, in_blocks = dim / kTableBlock * kTableBlock;
  Fp8Table table{};
  bool fits = true;
  if constexpr (kScale == RowScale::kTensor) {
    const float scale = scale_at<kFormat>(s, nullptr, 0);
    fits = fits_fp8_table(scale);
    table = fp8_table(scale);
  }
  for_rows<kDecodedNear>(p, begin, end, [&](int64_t id, std::byte* out) __attribute__((always_inline)) {
    const std::byte* row = s.row(id);
    const std::byte* scales = has_row_scales(kFormat) ? s.row_scales(id) : nullptr;
    Bf16* to = reinterpret_cast<Bf16*>(out);
    if constexpr (kScale == RowScale::kBlockUe8m0) fits = fit_fp8_tables(scales, dim / kTableBlock);
    if constexpr (kScale == RowScale::kRowF32) {
      const float scale = scale_at<kFormat>(s, scales, 0);
      fits = fits_fp8_table(scale);
      table = fp8_table(scale);
    }
    if (!fits) {
      decode_piece<kFormat>(s, id, 0, dim, to);
      return;
    }
    NanLanes nans;
    for (int i = 0; i < in_blocks; i += kTableBlock) {
      if constexpr (kScale == RowScale::kBlockUe8m0) table = fp8_table(scales[i / kTableBlock]);
      fp8_block_to_bf16<kStream>(row + i, table, to + i, &nans);
    }
    if (any(nans)) decode_piece<kFormat>(s, id, 0, in_blocks, to);
    if (in_blocks < dim) decode_piece<kFormat>(s, id, in_blocks, dim - in_blocks, to + in_blocks);
  });
}

// To bf16: defined where there are shuffles of bytes.
template <RowFormat kFormat, bool kStream>
void int8_rows(const GatherRowsParams& p, int64_t begin, int64_t end);
template <RowFormat kFormat, bool kStream>
void e2m1_rows(const GatherRowsParams& p, int64_t begin, int64_t end);

#ifdef __AVX2__
// 16 integers of a byte times a finite scale, to nearest even 16 bits at a time: the upper halves of all products, one more where
// the lower half is above 0x8000, or equal to it and the upper half is odd. An overflow becomes an infinity.
EK_LANE __m256i int8_to_bf16(const std::byte* p, __m256 scale) {
  const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i first_of_two = _mm256_madd_epi16(words, _mm256_set1_epi32(1));
  const __m256i even = _mm256_castps_si256(_mm256_mul_ps(_mm256_cvtepi32_ps(first_of_two), scale));
  const __m256i odd = _mm256_castps_si256(_mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srai_epi32(words, 16)), scale));
  const __m256i upper = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xAA);
  const __m256i lower = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xAA);
  const __m256i is_even = _mm256_andnot_si256(upper, _mm256_set1_epi16(1));
  return _mm256_add_epi16(upper, _mm256_srli_epi16(_mm256_subs_epu16(lower, is_even), 15));
}

// Whether so many fp32 scales are neither infinite nor NaN.
EK_LANE bool all_finite(const std::byte* scales, int count) {
  uint32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, scales + sizeof(bits) * static_cast<size_t>(i), sizeof(bits));
    largest = std::max(largest, bits & 0x7FFFFFFF);
  }
  return largest < 0x7F800000;
}

template <bool kStream>
EK_LANE void put(Bf16* out, __m256i words) {
  if constexpr (kStream) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), words);
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), words);
  }
}

template <RowFormat kFormat, bool kStream>
void int8_rows(const GatherRowsParams& p, int64_t begin, int64_t end) {
  constexpr int kBlock = traits_of(kFormat).block;
  static_assert(kBlock == 32);
  const RowSource& s = p.source;
  const int dim = s.row_dim;
  for_rows<kDecodedNear>(p, begin, end, [&](int64_t id, std::byte* out) __attribute__((always_inline)) {
    const std::byte *row = s.row(id), *scales = s.row_scales(id);
    Bf16* to = reinterpret_cast<Bf16*>(out);
    if (!all_finite(scales, dim / kBlock)) {
      decode_piece<kFormat>(s, id, 0, dim, to);
      return;
    }
    for (const std::byte* stop = row + dim; row < stop; row += kBlock, scales += sizeof(float), to += kBlock) {
      const __m256 scale = _mm256_set1_ps(scale_at<kFormat>(s, scales, 0));
      put<kStream>(to, int8_to_bf16(row, scale));
      put<kStream>(to + 16, int8_to_bf16(row + 16, scale));
    }
  });
}

// The bf16 bytes of all 16 e2m1 values times each of 256 scales: low ones, then high ones.
struct E2m1Tables {
  alignas(32) uint8_t of[256][2][16];
};

template <RowFormat kFormat>
void fill_tables(const RowSource& s, E2m1Tables* tables) {
  const float magnitudes[16] = {0, 0.5F, 1, 1.5F, 2, 3, 4, 6, 0, 0.5F, 1, 1.5F, 2, 3, 4, 6};
  for (int i = 0; i < 256; ++i) {
    const std::byte stored{static_cast<uint8_t>(i)};
    const float scale = scale_at<kFormat>(s, &stored, 0);
    alignas(32) Bf16 values[16];
    for (int j = 0; j < 16; j += kLanes) {
      F32 x = mul(load(magnitudes + j), splat(scale));
      if constexpr (has_table_scale(kFormat)) x = mul(x, splat(s.table_scale));
      store(values + j, x);
    }
    for (int j = 0; j < 16; ++j) {
      const int negative = j >= 8 && scale == scale ? 0x80 : 0;  // a NaN has no sign
      tables->of[i][0][j] = static_cast<uint8_t>(values[j].bits);
      tables->of[i][1][j] = static_cast<uint8_t>(values[j].bits >> 8 ^ negative);
    }
  }
}

// 32 e2m1 values, the first 16 by the first table, to bf16
template <bool kStream>
EK_LANE void e2m1_to_bf16(const std::byte* p, const uint8_t (*first)[16], const uint8_t (*second)[16], Bf16* out) {
  const auto both = [&](int plane) __attribute__((always_inline)) {
    return _mm256_set_m128i(_mm_load_si128(reinterpret_cast<const __m128i*>(second[plane])),
                            _mm_load_si128(reinterpret_cast<const __m128i*>(first[plane])));
  };
  const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i nibbles = _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)), _mm256_set1_epi8(15));
  const __m256i low = _mm256_shuffle_epi8(both(0), nibbles), high = _mm256_shuffle_epi8(both(1), nibbles);
  const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);  // 0-7 | 16-23, 8-15 | 24-31
  put<kStream>(out, _mm256_permute2x128_si256(a, b, 0x20));
  put<kStream>(out + 16, _mm256_permute2x128_si256(a, b, 0x31));
}

template <RowFormat kFormat, bool kStream>
void e2m1_rows(const GatherRowsParams& p, int64_t begin, int64_t end) {
  constexpr int kBlock = traits_of(kFormat).block;
  static_assert(kBlock == 16 || kBlock == 32);
  const RowSource& s = p.source;
  const int dim = s.row_dim, whole = dim / 32 * 32;
  if ((end - begin) * dim < kFewElements || (has_table_scale(kFormat) && !std::isfinite(s.table_scale))) {
    return decode_rows<kFormat, Bf16, kStream>(p, begin, end);
  }
  E2m1Tables tables;
  fill_tables<kFormat>(s, &tables);
  for_rows<kDecodedNear>(p, begin, end, [&](int64_t id, std::byte* out) __attribute__((always_inline)) {
    const std::byte *row = s.row(id), *scales = s.row_scales(id);
    Bf16* to = reinterpret_cast<Bf16*>(out);
    for (int i = 0; i < whole; i += 32) {
      e2m1_to_bf16<kStream>(row + i / 2, tables.of[static_cast<int>(scales[i / kBlock])],
                            tables.of[static_cast<int>(scales[(i + 16) / kBlock])], to + i);
    }
    if (whole < dim) decode_piece<kFormat>(s, id, whole, dim - whole, to + whole);
  });
}
#endif

template <bool kStream>
void gather_range(const GatherRowsParams& p, int64_t begin, int64_t end) {
  with_row_decode(p.source.format, [&](auto format) __attribute__((always_inline)) {
    constexpr RowFormat kFormat = decltype(format)::value;
    constexpr RowFormatTraits kTraits = traits_of(kFormat);
    with_dtype(p.out_dtype, [&](auto* out) __attribute__((always_inline)) {
      using Out = std::remove_pointer_t<decltype(out)>;
      if constexpr (stores(kFormat, kDType<Out>)) {
        copy_rows<kStream>(p, begin, end);
      } else if constexpr (kHasTables && kTraits.element == RowElement::kFp8E4m3 && std::is_same_v<Out, Bf16> &&
                           (kTraits.scale == RowScale::kTensor || kTraits.scale == RowScale::kRowF32 ||
                            kTraits.scale == RowScale::kBlockUe8m0)) {
        fp8_rows<kFormat, kStream>(p, begin, end);
      } else if constexpr (kHasTables && kTraits.element == RowElement::kInt8 && std::is_same_v<Out, Bf16>) {
        int8_rows<kFormat, kStream>(p, begin, end);
      } else if constexpr (kHasTables && kTraits.element == RowElement::kE2m1 && std::is_same_v<Out, Bf16>) {
        e2m1_rows<kFormat, kStream>(p, begin, end);
      } else {
        decode_rows<kFormat, Out, kStream>(p, begin, end);
      }
    });
  });
}

}  // namespace

void gather_rows_cpu(const GatherRowsParams& p, const Parallel& parallel) {
  const int64_t out_bytes = int64_t{p.source.row_dim} * dtype_bytes(p.out_dtype);
  const bool stream = p.row_ids.count * out_bytes >= kStreamBytes && out_bytes % kStreamAlign == 0 &&
                      reinterpret_cast<uintptr_t>(p.out) % kStreamAlign == 0;
  parallel.for_range(p.row_ids.count, kGrainRows, [&](int64_t begin, int64_t end) {
    if (stream) {
      gather_range<true>(p, begin, end);
      stream_done();
    } else {
      gather_range<false>(p, begin, end);
    }
  });
}

}  // namespace engram_kernels::EK_ISA

EK_DISPATCH_CPU(gather_rows_cpu, (const GatherRowsParams& p, const Parallel& parallel), (p, parallel))

// CPU kernel of gather_rows. Contract: gather_rows.h.
//
// Mapping   consecutive ids to each thread; a row is decoded kLanes elements at a time, or copied where the dtype stays.
// Latency   a random row is a DRAM access away (and a TLB miss, which huge pages make cheap), so the cache lines of rows
//           some kPrefetchBytes ahead are requested while this one is copied.
// Traffic   reads each row once, writes the output once. A large output goes past the cache: an ordinary store would read
//           the line first.
#include <algorithm>
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
constexpr int64_t kStreamBytes = int64_t{8} << 20;                // outputs from here on do not stay in a cache anyway
constexpr int kPiece = 256;                                       // elements decoded before they are streamed out

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

EK_LANE void request(const std::byte* begin, int64_t skip_lines, int64_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t end = first + static_cast<uintptr_t>(std::min(bytes, kMaxPrefetchLines * kCacheLine));
  uintptr_t line = (first & ~uintptr_t{kCacheLine - 1}) + static_cast<uintptr_t>(skip_lines * kCacheLine);
  for (; line < end; line += kCacheLine) __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
}

// Requests the lines of rows [begin, end). First one line of every row: a request waits for its page to be translated,
// and only requests that stand close together have their translations overlap.
EK_LANE void request_rows(const GatherRowsParams& p, int64_t begin, int64_t end) {
  const RowSource& s = p.source;
  const int64_t value_bytes = row_value_bytes(s.format, s.row_dim), scale_bytes = row_scale_bytes(s.format, s.row_dim);
  for (int64_t i = begin; i < end; ++i) {
    if (p.row_ids[i] != kNoRow) __builtin_prefetch(s.row(p.row_ids[i]), 0, 2);
  }
  for (int64_t i = begin; scale_bytes > 0 && i < end; ++i) {
    if (p.row_ids[i] != kNoRow) request(s.row_scales(p.row_ids[i]), 0, scale_bytes);
  }
  for (int64_t i = begin; i < end; ++i) {
    if (p.row_ids[i] != kNoRow) request(s.row(p.row_ids[i]), 1, value_bytes);
  }
}

// Calls emit(row id, output row) for rows [begin, end), their lines requested a group ahead.
template <class Emit>
EK_LANE void for_rows(const GatherRowsParams& p, int64_t begin, int64_t end, const Emit& emit) {
  const int64_t row_bytes = row_value_bytes(p.source.format, p.source.row_dim);
  const int64_t out_bytes = int64_t{p.source.row_dim} * dtype_bytes(p.out_dtype);
  const int64_t group = std::clamp<int64_t>(kPrefetchBytes / row_bytes, 1, kMaxPrefetchRows);
  request_rows(p, begin, std::min(end, begin + group));
  for (int64_t first = begin; first < end; first += group) {
    const int64_t next = std::min(end, first + group);
    request_rows(p, next, std::min(end, next + group));
    for (int64_t i = first; i < next; ++i) {
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
  for_rows(p, begin, end,
           [&](int64_t id, std::byte* out) __attribute__((always_inline)) { copy_bytes<kStream>(out, p.source.row(id), bytes); });
}

template <RowFormat kFormat, class Out, bool kStream>
void decode_rows(const GatherRowsParams& p, int64_t begin, int64_t end) {
  for_rows(p, begin, end, [&](int64_t id, std::byte* out) __attribute__((always_inline)) {
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

// Blocks of fp8 with a power-of-two scale, to bf16: by shifting where the scales are ordinary, else over float.
template <RowFormat kFormat, bool kStream>
void shift_rows(const GatherRowsParams& p, int64_t begin, int64_t end) {
  static_assert(traits_of(kFormat).block == kShiftBlock);
  const RowSource& s = p.source;
  const int dim = s.row_dim;
  for_rows(p, begin, end, [&](int64_t id, std::byte* out) __attribute__((always_inline)) {
    const std::byte* row = s.row(id);
    const std::byte* scales = s.row_scales(id);
    Bf16* to = reinterpret_cast<Bf16*>(out);
    if (!shifts_to_bf16(scales, dim / kShiftBlock)) {
      decode_piece<kFormat>(s, id, 0, dim, to);
      return;
    }
    for (int i = 0; i < dim; i += kShiftBlock) fp8_block_to_bf16<kStream>(row + i, scales[i / kShiftBlock], to + i);
  });
}

template <bool kStream>
void gather_range(const GatherRowsParams& p, int64_t begin, int64_t end) {
  with_row_decode(p.source.format, [&](auto format) __attribute__((always_inline)) {
    constexpr RowFormat kFormat = decltype(format)::value;
    constexpr RowFormatTraits kTraits = traits_of(kFormat);
    with_dtype(p.out_dtype, [&](auto* out) __attribute__((always_inline)) {
      using Out = std::remove_pointer_t<decltype(out)>;
      if constexpr (stores(kFormat, kDType<Out>)) {
        copy_rows<kStream>(p, begin, end);
      } else if constexpr (kHasFp8Shift && kTraits.element == RowElement::kFp8E4m3 && kTraits.scale == RowScale::kBlockUe8m0 &&
                           std::is_same_v<Out, Bf16>) {
        shift_rows<kFormat, kStream>(p, begin, end);
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

#include "memory/row_stager.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/error.h"

namespace engram_kernels {
namespace {

constexpr int64_t kAlign = 256;        // of the parts of a slot, for the widest loads of a device
constexpr int64_t kPrefetchRows = 16;  // requested ahead of the copy: a random row is a DRAM access away
constexpr int64_t kGrainRows = 256;    // of a thread
constexpr int64_t kCacheLine = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

}  // namespace

// What a slot holds: rows, scales, ids into them.
struct RowStager::Block {
  RowSource source;  // of the device
  int64_t ids_at = 0, bytes = 0;
};

RowStager::RowStager(const RowStagerOptions& options, std::shared_ptr<CopyEngine> engine)
    : options_(options),
      engine_(std::move(engine)),
      row_bytes_(std::max(row_value_bytes(options.table.format, options.table.row_dim),
                          options.file == nullptr ? int64_t{0} : options.file->row_bytes())),  // with padding
      scale_bytes_(row_scale_bytes(options.table.format, options.table.row_dim)),
      needed_(!options.direct || !engine_->reads_host_memory()),
      threads_(options.num_threads) {
  if (options_.file != nullptr) {
    const FileTier& file = *options_.file;
    EK_CHECK(!options_.direct && file.num_rows() == options_.table.num_rows &&
                 (file.num_rows() == 0 || (file.row_bytes() == row_bytes_ && file.scale_bytes() == scale_bytes_)),
             "RowPrefetcher: the file has " << file.num_rows() << " rows of " << file.row_bytes() << " and " << file.scale_bytes()
                                            << " bytes, expected " << options_.table.num_rows << " of " << row_bytes_ << " and "
                                            << scale_bytes_);
  } else {
    check_row_source("RowPrefetcher", options_.table);
  }
  if (!needed_) return;
  const int64_t slot_bytes = options_.staging_bytes / kNumSlots / kAlign * kAlign;
  const int64_t id_bytes = options_.direct ? 8 : row_bytes_ + scale_bytes_ + 4;
  block_ids_ = std::min((slot_bytes - 3 * kAlign) / id_bytes, int64_t{1} << 30);
  EK_CHECK(block_ids_ >= 1, "RowPrefetcher: staging_bytes is " << options_.staging_bytes << ", expected at least "
                                                               << kNumSlots * (id_bytes + 4 * kAlign) << " for rows of "
                                                               << row_bytes_ + scale_bytes_ << " bytes");
  ring_ = std::make_unique<StagingRing>(kNumSlots, slot_bytes, engine_);
}

RingSlot RowStager::take_slot() {
  RingSlot slot = ring_->take();
  try {
    engine_->wait_host(slot.after, -1);
  } catch (...) {  // that launch failed, and its own ticket says so
  }
  return slot;
}

std::vector<std::byte> RowStager::fetch_ids(const RowIds& ids, const Event& ready) {
  const int64_t id_bytes = ids.are_int64 ? 8 : 4, piece = block_ids_ * 4;
  std::vector<std::byte> fetched(static_cast<size_t>(ids.count * id_bytes));
  const auto* from = static_cast<const std::byte*>(ids.data);
  for (int64_t begin = 0; begin < static_cast<int64_t>(fetched.size()); begin += piece) {
    const int64_t bytes = std::min(piece, static_cast<int64_t>(fetched.size()) - begin);
    const RingSlot slot = take_slot();
    Event copied;
    try {
      copied = engine_->launch({nullptr, ready, slot.host, from + begin, bytes, nullptr, nullptr});
      engine_->wait_host(copied, -1);
    } catch (...) {
      ring_->give(slot.number, copied);
      throw;
    }
    std::memcpy(fetched.data() + begin, slot.host, static_cast<size_t>(bytes));
    ring_->give(slot.number, nullptr);
  }
  return fetched;
}

void RowStager::stage(const GatherRowsParams& gather, const Event& after, const std::atomic<bool>& cancelled,
                      std::vector<Event>* events, StageCounters* counters) {
  if (gather.row_ids.count == 0) events->push_back(engine_->launch({after, nullptr, nullptr, nullptr, 0, nullptr, nullptr}));
  const int64_t id_bytes = gather.row_ids.are_int64 ? 8 : 4;
  const int64_t out_bytes = int64_t{gather.source.row_dim} * dtype_bytes(gather.out_dtype);
  for (int64_t begin = 0; begin < gather.row_ids.count; begin += block_ids_) {
    GatherRowsParams part = gather;
    part.row_ids.data = static_cast<const std::byte*>(gather.row_ids.data) + begin * id_bytes;
    part.row_ids.count = std::min(block_ids_, gather.row_ids.count - begin);
    part.out = gather.out + begin * out_bytes;
    const RingSlot slot = take_slot();
    try {
      Block block{options_.table, 0, part.row_ids.count * id_bytes};
      if (options_.direct) {
        std::memcpy(slot.host, part.row_ids.data, static_cast<size_t>(block.bytes));
        counters->unique += part.row_ids.count;
      } else {
        fill_with_rows(part.row_ids, slot, cancelled, &block, counters);
        part.row_ids.are_int64 = false;
      }
      part.source = block.source;
      part.row_ids.data = slot.device + block.ids_at;
      const bool copies = slot.device != slot.host;
      if (copies) counters->moved_bytes += block.bytes;
      events->push_back(engine_->launch(
          {events->empty() ? after : nullptr, nullptr, slot.device, slot.host, copies ? block.bytes : 0, &part, nullptr}));
    } catch (...) {
      ring_->give(slot.number, nullptr);
      throw;
    }
    ring_->give(slot.number, events->back());
  }
}

void RowStager::fill_with_rows(const RowIds& ids, const RingSlot& slot, const std::atomic<bool>& cancelled, Block* block,
                               StageCounters* counters) {
  const RowOrder order(ids, options_.table.num_rows);
  distinct_.clear();
  for (int64_t i = 0; i < order.count(); ++i) {
    if (i == 0 || order.row(i) != distinct_.back()) distinct_.push_back(order.row(i));
  }
  const auto count = static_cast<int64_t>(distinct_.size());
  const int64_t scales_at = aligned(count * row_bytes_);
  block->ids_at = scales_at + aligned(count * scale_bytes_);
  block->bytes = block->ids_at + ids.count * 4;
  auto* local_ids = reinterpret_cast<int32_t*>(slot.host + block->ids_at);
  std::fill_n(local_ids, ids.count, static_cast<int32_t>(kNoRow));
  int32_t local = -1;
  for (int64_t i = 0; i < order.count(); ++i) {
    local += i == 0 || order.row(i) != order.row(i - 1);
    local_ids[order.position(i)] = local;
  }
  if (options_.file != nullptr) {
    FetchCounters fetched;
    options_.file->fetch(distinct_.data(), count, slot.host, slot.host + scales_at, &fetched, &cancelled);
    counters->cached_rows += fetched.cache_hits;
    counters->file_rows += fetched.file_rows;
    counters->moved_bytes += fetched.moved_bytes;
  } else {
    if (cancelled.load(std::memory_order_relaxed)) throw FetchCancelled("RowPrefetcher: the request was cancelled");
    copy_rows(slot.host, slot.host + scales_at);
  }
  counters->unique += count;
  RowSource& source = block->source;
  source.rows = slot.device;
  source.row_stride_bytes = row_bytes_;
  source.num_rows = count;
  if (scale_bytes_ > 0) {
    source.scales = slot.device + scales_at;
    source.scale_stride_bytes = scale_bytes_;
  }
}

// The distinct rows of a table in memory, side by side.
void RowStager::copy_rows(std::byte* rows, std::byte* scales) {
  const RowSource& table = options_.table;
  const auto count = static_cast<int64_t>(distinct_.size());
  threads_.parallel().for_range(count, kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + kPrefetchRows < end) {
        const int64_t ahead = distinct_[static_cast<size_t>(i + kPrefetchRows)];
        for (int64_t at = 0; at < row_bytes_; at += kCacheLine) __builtin_prefetch(table.row(ahead) + at);
        if (scale_bytes_ > 0) __builtin_prefetch(table.row_scales(ahead));
      }
      const int64_t row = distinct_[static_cast<size_t>(i)];
      std::memcpy(rows + i * row_bytes_, table.row(row), static_cast<size_t>(row_bytes_));
      if (scale_bytes_ > 0) {
        std::memcpy(scales + i * scale_bytes_, table.row_scales(row), static_cast<size_t>(scale_bytes_));
      }
    }
  });
}

}  // namespace engram_kernels

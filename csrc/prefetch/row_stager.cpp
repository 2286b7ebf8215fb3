#include "prefetch/row_stager.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <optional>
#include <utility>

#include "common/error.h"
#include "common/math.h"
#include "prefetch/prefetch_trace.h"
#include "table/file_reader.h"

namespace engram_kernels {
namespace {

constexpr int64_t kAlign = 256;                      // of the parts of a slot, for the widest loads of a device
constexpr int64_t kPrefetchRows = 16;                // requested ahead of the copy: a random row is a DRAM access away
constexpr int64_t kGrainRows = 256;                  // of a thread
constexpr int64_t kPartIds = 16384, kMaxParts = 64;  // of an order that threads share
constexpr int64_t kCacheLine = 64;
constexpr int64_t kMinRowsAligned = 16;  // so that scales of as many rows are aligned too

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Rows after which the next one is aligned.
int64_t aligned_rows(int64_t row_bytes) { return std::max(kAlign / std::gcd(kAlign, row_bytes), kMinRowsAligned); }

}  // namespace

// A slot on its way to the device: rows, ids into `source`, places of rows that go into the cache, scales.
struct RowStager::Block {
  int64_t count = 0;  // rows that are staged
  std::byte* rows = nullptr;
  std::byte* scales = nullptr;
  int32_t* local_ids = nullptr;
  int64_t places_at = 0;
  // of the device
  RowSource source;
  std::byte* device = nullptr;  // its half of the slot
  const void* ids = nullptr;
  EngineCopy copies[2] = {};  // not used where the device reads the slot itself
  PlaceRowsParams place = {};
};

RowStager::RowStager(const RowStagerOptions& options, std::shared_ptr<CopyEngine> engine)
    : options_(options),
      engine_(std::move(engine)),
      way_(traits_of(options.way)),
      row_bytes_(std::max(row_value_bytes(options.table.format, options.table.row_dim),
                          options.tier == nullptr ? int64_t{0} : options.tier->row_bytes())),  // with padding
      scale_bytes_(row_scale_bytes(options.table.format, options.table.row_dim)),
      threads_(options.num_threads) {
  EK_CHECK(way_.to_device != engine_->reads_host_memory() && way_.reads_tier == (options_.tier != nullptr),
           "RowPrefetcher: way '" << way_.name << "' on engine " << engine_->name() << " with"
                                  << (options_.tier == nullptr ? "out" : "") << " a tier");
  if (options_.tier != nullptr) {
    const RowTier& tier = *options_.tier;
    EK_CHECK(tier.num_rows() == options_.table.num_rows &&
                 (tier.num_rows() == 0 || (tier.row_bytes() == row_bytes_ && tier.scale_bytes() == scale_bytes_)),
             "RowPrefetcher: the tier has " << tier.num_rows() << " rows of " << tier.row_bytes() << " and " << tier.scale_bytes()
                                            << " bytes, expected " << options_.table.num_rows << " of " << row_bytes_ << " and "
                                            << scale_bytes_);
  } else {
    check_row_source("RowPrefetcher", options_.table);
  }
  EK_CHECK(options_.cache_bytes == 0 || way_.can_cache(),
           "RowPrefetcher: cache_bytes is " << options_.cache_bytes << ", but no row is copied to a device");
  if (way_.stages()) make_ring();
}

void RowStager::make_ring() {
  const bool caches = options_.cache_bytes > 0;
  int64_t slot_bytes = options_.staging_bytes / kNumSlots / kAlign * kAlign;
  int64_t id_bytes = way_.gathers_table ? 8 : row_bytes_ + scale_bytes_ + 4, room = slot_bytes - 3 * kAlign;
  int64_t least = id_bytes + 4 * kAlign;
  if (caches) {  // on the device rows and scales of all slots are one array each, which a cache continues
    const int64_t step = aligned_rows(row_bytes_);
    rows_per_slot_ = slot_bytes / (row_bytes_ + scale_bytes_) / step * step;
    slot_bytes = rows_per_slot_ * (row_bytes_ + scale_bytes_);
    id_bytes = row_bytes_ + 4 + static_cast<int64_t>(sizeof(RowPlace));
    room = rows_per_slot_ * row_bytes_ - 2 * kAlign;
    least = (ceil_div(id_bytes + 2 * kAlign, step * row_bytes_) * step) * (row_bytes_ + scale_bytes_) + kAlign;
  }
  block_ids_ = std::min(room / id_bytes, int64_t{1} << 30);
  EK_CHECK(block_ids_ >= 1, "RowPrefetcher: staging_bytes is " << options_.staging_bytes << ", expected at least "
                                                               << kNumSlots * least << " for rows of "
                                                               << row_bytes_ + scale_bytes_ << " bytes");
  if (caches) {
    cache_ = std::make_unique<DeviceRowCache>(
        DeviceRowCacheOptions{options_.cache_bytes, row_bytes_, scale_bytes_, options_.table.num_rows, kNumSlots, rows_per_slot_},
        engine_);
  }
  staging_ = std::make_unique<SlotRing>(kNumSlots, slot_bytes, engine_, !caches);
}

int64_t RowStager::memory_bytes() const {
  if (!way_.stages()) return 0;
  return options_.staging_bytes * (way_.to_device ? 2 : 1) + (cache_ == nullptr ? 0 : cache_->cache_bytes());
}

void RowStager::clear_cache() {
  if (cache_ != nullptr) cache_->clear();
}

RingSlot RowStager::take_slot() {
  RingSlot slot = staging_->take();
  try {
    engine_->wait_host(slot.after, -1);  // which is the only one: no caller reads this ring
  } catch (...) {                        // that launch failed, and its own ticket says so
  }
  if (cache_ != nullptr) cache_->settle(slot.number);
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
      copied = engine_->launch({.ready = ready, .copies = {{slot.host, from + begin, bytes}}});
      engine_->wait_host(copied, -1);
    } catch (...) {
      staging_->give(slot.number, copied);
      throw;
    }
    std::memcpy(fetched.data() + begin, slot.host, static_cast<size_t>(bytes));
    staging_->give(slot.number, nullptr);
  }
  return fetched;
}

void RowStager::stage(const GatherRowsParams& gather, const EngineLaunch& first, const std::atomic<bool>& cancelled,
                      std::vector<Event>* events, StageCounters* counters) {
  if (gather.row_ids.count == 0) events->push_back(engine_->launch(first));
  const int64_t id_bytes = gather.row_ids.are_int64 ? 8 : 4, count = gather.row_ids.count;
  const int64_t out_bytes = int64_t{gather.source.row_dim} * dtype_bytes(gather.out_dtype);
  const int64_t blocks = ceil_div(count, block_ids_);  // of one size, so that none waits for a much larger one
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = count * block / blocks, end = count * (block + 1) / blocks;
    GatherRowsParams part = gather;
    part.row_ids.data = static_cast<const std::byte*>(gather.row_ids.data) + begin * id_bytes;
    part.row_ids.count = end - begin;
    part.out = gather.out + begin * out_bytes;
    std::optional<RowOrder> order;
    if (!way_.gathers_table) {
      const int64_t begun_ns = steady_ns();
      order.emplace(part.row_ids, options_.table.num_rows, threads_.parallel(), &sorting_);
      find_distinct(*order);
      counters->id_ns += steady_ns() - begun_ns;
    }
    const RingSlot slot = take_slot();
    try {
      events->reserve(events->size() + 1);  // nothing may fail between a launch and its event's place
      events->push_back(launch_block(&part, order, slot, events->empty() ? first : EngineLaunch{}, cancelled, counters));
    } catch (...) {
      if (cache_ != nullptr) cache_->abandon();
      staging_->give(slot.number, nullptr);
      throw;
    }
    if (cache_ != nullptr) cache_->launched(events->back());
    staging_->give(slot.number, events->back());
  }
}

Event RowStager::launch_block(GatherRowsParams* gather, const std::optional<RowOrder>& order, const RingSlot& slot,
                              EngineLaunch launch, const std::atomic<bool>& cancelled, StageCounters* counters) {
  Block block{.source = options_.table};
  if (way_.gathers_table) {
    fill_with_ids(gather->row_ids, slot, &block);
    counters->unique += gather->row_ids.count;
  } else {
    const int64_t begun_ns = steady_ns();
    lay_out(gather->row_ids, slot, &block, counters);
    place_ids(gather->row_ids, *order, block.local_ids);
    counters->id_ns += steady_ns() - begun_ns;
    read_rows(block, cancelled, counters);
    if (cache_ != nullptr) admit_rows(slot, &block);
    gather->row_ids.are_int64 = false;
  }
  gather->source = block.source;
  gather->row_ids.data = block.ids;
  block.place.max_blocks = gather->max_blocks;
  launch.gather = gather;
  if (block.place.count > 0) launch.place = &block.place;
  if (way_.to_device) {
    std::copy_n(block.copies, 2, launch.copies);
    counters->moved_bytes += launch.copies[0].bytes + launch.copies[1].bytes;
  }
  return engine_->launch(launch);
}

void RowStager::fill_with_ids(const RowIds& ids, const RingSlot& slot, Block* block) {
  const int64_t bytes = ids.count * (ids.are_int64 ? 8 : 4);
  std::memcpy(slot.host, ids.data, static_cast<size_t>(bytes));
  block->ids = slot.device;
  block->copies[0] = {slot.device, slot.host, bytes};
}

// Calls body(part, begin, end) on the parts of an order, which threads share.
template <class Body>
void RowStager::for_parts(const RowOrder& order, const Body& body) {
  const int64_t parts = std::clamp<int64_t>(order.count() / kPartIds, 1, kMaxParts);
  const Parallel threads = parts > 2 ? threads_.parallel() : Parallel{};  // less than it takes to wake them
  threads.for_range(parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      body(part, order.count() * part / parts, order.count() * (part + 1) / parts);
    }
  });
}

void RowStager::find_distinct(const RowOrder& order) {
  before_.assign(kMaxParts + 1, 0);
  for_parts(order, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += order.begins_row(i);
    before_[static_cast<size_t>(part) + 1] = count;
  });
  std::partial_sum(before_.begin(), before_.end(), before_.begin());
  distinct_.resize(static_cast<size_t>(before_.back()));
  for_parts(order, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t at = before_[static_cast<size_t>(part)];
    for (int64_t i = begin; i < end; ++i) {
      if (order.begins_row(i)) distinct_[static_cast<size_t>(at++)] = order.row(i);
    }
  });
}

// Where the gather finds the row of each id.
void RowStager::place_ids(const RowIds& ids, const RowOrder& order, int32_t* local_ids) {
  if (order.count() < ids.count) std::fill_n(local_ids, ids.count, static_cast<int32_t>(kNoRow));
  for_parts(order, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t local = before_[static_cast<size_t>(part)] - 1;
    for (int64_t i = begin; i < end; ++i) {
      local += order.begins_row(i);
      local_ids[order.position(i)] = cache_ == nullptr ? static_cast<int32_t>(local) : indices_[static_cast<size_t>(local)];
    }
  });
}

// Decides which distinct rows of a block are staged, and where everything lies in the slot and on the device.
void RowStager::lay_out(const RowIds& ids, const RingSlot& slot, Block* block, StageCounters* counters) {
  const auto unique = static_cast<int64_t>(distinct_.size());
  block->count = unique;
  if (cache_ != nullptr) {
    // rows that stay on the device are of the tier, too
    if (options_.tier != nullptr) options_.tier->check_unchanged(distinct_.data(), unique);
    indices_.resize(distinct_.size());
    block->count = cache_->find(distinct_.data(), unique, slot.number, indices_.data());
  }
  counters->unique += unique;
  counters->device_cached += unique - block->count;
  const int64_t ids_at = aligned(block->count * row_bytes_);
  block->places_at = aligned(ids_at + ids.count * 4);
  const int64_t scales_at = cache_ == nullptr ? block->places_at : rows_per_slot_ * row_bytes_;
  block->rows = slot.host;
  block->scales = slot.host + scales_at;
  block->local_ids = reinterpret_cast<int32_t*>(slot.host + ids_at);

  // in the arrays of rows and scales on the device
  const int64_t first = cache_ == nullptr ? 0 : cache_->first_row(slot.number);
  block->device = cache_ == nullptr ? slot.device : cache_->rows() + first * row_bytes_;
  block->ids = block->device + ids_at;
  RowSource& source = block->source;
  source.row_stride_bytes = row_bytes_;
  if (scale_bytes_ > 0) source.scale_stride_bytes = scale_bytes_;
  if (cache_ == nullptr) {
    source.rows = block->device;
    source.num_rows = block->count;
    if (scale_bytes_ > 0) source.scales = block->device + scales_at;
    block->copies[0] = {block->device, slot.host, scales_at + block->count * scale_bytes_};
    return;
  }
  source.rows = cache_->rows();
  source.num_rows = cache_->num_rows();
  if (scale_bytes_ > 0) source.scales = cache_->scales();
  block->copies[1] = {cache_->scales() + first * scale_bytes_, block->scales, block->count * scale_bytes_};
}

// Rows of the block that get a place in the cache.
void RowStager::admit_rows(const RingSlot& slot, Block* block) {
  auto* places = reinterpret_cast<RowPlace*>(slot.host + block->places_at);
  const int64_t admitted = cache_->admit(distinct_.data(), block->count, slot.number, places);
  block->copies[0] = {block->device, slot.host, block->places_at + admitted * static_cast<int64_t>(sizeof(RowPlace))};
  block->place = {cache_->rows(), cache_->scales(),   row_bytes_,
                  scale_bytes_,   cache_->num_rows(), reinterpret_cast<const RowPlace*>(block->device + block->places_at),
                  admitted};
}

// The first rows of distinct_, from wherever the table is.
void RowStager::read_rows(const Block& block, const std::atomic<bool>& cancelled, StageCounters* counters) {
  if (options_.tier != nullptr) {
    FetchCounters fetched;
    options_.tier->fetch({distinct_.data(), block.count, block.rows, block.scales}, &fetched, &cancelled);
    counters->cached_rows += fetched.cache_hits;
    counters->tier_rows += fetched.tier_rows;
    counters->moved_bytes += fetched.moved_bytes;
    return;
  }
  if (cancelled.load(std::memory_order_relaxed)) throw FetchCancelled("RowPrefetcher: the request was cancelled");
  copy_rows(block);
}

// Copies the distinct rows of a table in memory side by side.
void RowStager::copy_rows(const Block& block) {
  const RowSource& table = options_.table;
  threads_.parallel().for_range(block.count, kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + kPrefetchRows < end) {
        const int64_t ahead = distinct_[static_cast<size_t>(i + kPrefetchRows)];
        for (int64_t at = 0; at < row_bytes_; at += kCacheLine) __builtin_prefetch(table.row(ahead) + at);
        if (scale_bytes_ > 0) __builtin_prefetch(table.row_scales(ahead));
      }
      const int64_t row = distinct_[static_cast<size_t>(i)];
      std::memcpy(block.rows + i * row_bytes_, table.row(row), static_cast<size_t>(row_bytes_));
      if (scale_bytes_ > 0) {
        std::memcpy(block.scales + i * scale_bytes_, table.row_scales(row), static_cast<size_t>(scale_bytes_));
      }
    }
  });
}

}  // namespace engram_kernels

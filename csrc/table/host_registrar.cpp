#include "table/host_registrar.h"

#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

#include "common/error.h"

namespace engram_kernels {
namespace {

uintptr_t address(const std::byte* at) { return reinterpret_cast<uintptr_t>(at); }

uintptr_t page_bytes() {
  static const auto bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

uintptr_t page_begin(uintptr_t at) { return at / page_bytes() * page_bytes(); }
uintptr_t page_end(uintptr_t at) { return page_begin(at + page_bytes() - 1); }

}  // namespace

HostRegistration::HostRegistration(const HostRegistrar& registrar, const std::byte* begin, int64_t bytes, int64_t chunk_bytes)
    : registrar_(registrar), process_(getpid()) {
  const uintptr_t first = page_begin(address(begin));
  const auto total = static_cast<int64_t>(page_end(address(begin + bytes)) - first);
  while (bytes_ < total) {
    const int64_t size = std::min(chunk_bytes, total - bytes_);
    void* chunk = reinterpret_cast<void*>(first + static_cast<uintptr_t>(bytes_));
    const int error = registrar_.register_host(chunk, static_cast<size_t>(size));
    if (error != 0) {
      const char* text = registrar_.error_text == nullptr ? nullptr : registrar_.error_text(error);
      Text message;
      message << "bytes " << bytes_ << ".." << bytes_ + size << " of " << total
              << " cannot be pinned: " << (text == nullptr ? "error " + std::to_string(error) : std::string(text));
      undo();
      throw HostRegistrationError(message.str());
    }
    chunks_.push_back(chunk);
    bytes_ += size;
  }
}

HostRegistration& HostRegistration::operator=(HostRegistration&& other) noexcept {
  std::swap(registrar_, other.registrar_);
  std::swap(process_, other.process_);
  chunks_.swap(other.chunks_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

void HostRegistration::undo() noexcept {
  if (process_ == getpid()) {
    for (void* chunk : chunks_) (void)registrar_.unregister_host(chunk);
  }
  chunks_.clear();
  bytes_ = 0;
}

HostRegistry::Pieces HostRegistry::take(const std::byte* begin, int64_t bytes) {
  const std::lock_guard lock(mutex_);
  const uintptr_t first = page_begin(address(begin)), end = page_end(address(begin + bytes));
  const uintptr_t first_end = first + page_bytes(), last = end - page_bytes();
  Pieces taken;
  try {
    for (uintptr_t at = first; at < end;) {
      auto next = pieces_.upper_bound(at);
      if (next != pieces_.begin() && std::prev(next)->second.end > at) {
        auto& [from, piece] = *std::prev(next);
        taken.push_back(from);
        ++piece.users;
        at = piece.end;
        continue;
      }
      uintptr_t until = at < first_end ? first_end : at < last ? last : end;
      if (next != pieces_.end()) until = std::min(until, next->first);
      const auto size = static_cast<int64_t>(until - at);
      HostRegistration registration(registrar_, reinterpret_cast<const std::byte*>(at), size);
      pieces_.emplace(at, Piece{until, std::move(registration), 1});
      taken.push_back(at);
      at = until;
    }
  } catch (...) {
    drop(taken);
    throw;
  }
  return taken;
}

void HostRegistry::give_back(const Pieces& pieces) {
  const std::lock_guard lock(mutex_);
  drop(pieces);
}

void HostRegistry::drop(const Pieces& pieces) {
  for (const uintptr_t from : pieces) {
    const auto found = pieces_.find(from);
    if (--found->second.users == 0) pieces_.erase(found);
  }
}

bool HostRegistry::holds(const std::byte* at) const {
  const std::lock_guard lock(mutex_);
  const auto next = pieces_.upper_bound(address(at));
  return next != pieces_.begin() && std::prev(next)->second.end > address(at);
}

}  // namespace engram_kernels

#include "table/host_registrar.h"

#include <unistd.h>

#include <algorithm>
#include <string>
#include <utility>

#include "common/error.h"

namespace engram_kernels {

HostRegistration::HostRegistration(const HostRegistrar& registrar, std::byte* begin, int64_t bytes, int64_t chunk_bytes)
    : registrar_(registrar), process_(getpid()) {
  while (bytes_ < bytes) {
    const int64_t size = std::min(chunk_bytes, bytes - bytes_);
    void* chunk = begin + bytes_;
    const int error = registrar_.register_host(chunk, static_cast<size_t>(size));
    if (error != 0) {
      const char* text = registrar_.error_text == nullptr ? nullptr : registrar_.error_text(error);
      Text message;
      message << "bytes " << bytes_ << ".." << bytes_ + size << " of " << bytes
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

}  // namespace engram_kernels

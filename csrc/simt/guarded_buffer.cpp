#include "simt/guarded_buffer.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

namespace flashinfer_lite::simt {

namespace {
constexpr size_t kGuardBytes = 64 * 1024;
constexpr size_t kAlignment = 256;
constexpr size_t kPage = 4096;
constexpr size_t kMaxBytes = size_t{1} << 40;
}  // namespace

GuardedBuffer::GuardedBuffer(size_t bytes) : bytes_(bytes) {
  if (bytes > kMaxBytes) throw std::bad_alloc();
  const size_t usable = (bytes / kPage + 1) * kPage;
  mapped_bytes_ = usable + 2 * kGuardBytes;
  void* memory =
      mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<uint8_t*>(memory);
  uint8_t* start = base_ + kGuardBytes;
  mprotect(start, usable, PROT_READ | PROT_WRITE);
  std::memset(start, 0xff, usable);
  data_ = start + (usable - bytes) / kAlignment * kAlignment;
}

GuardedBuffer::~GuardedBuffer() { munmap(base_, mapped_bytes_); }

}  // namespace flashinfer_lite::simt

// Memory between unmapped pages, for the tensors of a test.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashinfer_lite::simt {

// Starts at a multiple of 256 bytes, as the GPU's allocator would, and ends as close to an unmapped
// page as that allows. 64 KiB are unmapped on both sides. Filled with 0xff: NaN in every float
// format, -1 in every integer.
class GuardedBuffer {
 public:
  explicit GuardedBuffer(size_t bytes);
  ~GuardedBuffer();
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_;
  size_t mapped_bytes_;
  uint8_t* base_;
  uint8_t* data_;
};

}  // namespace flashinfer_lite::simt

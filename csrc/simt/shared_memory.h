// Shared memory of a block, its poison and its shadow: who wrote each word, who read it since, and
// what is still in flight.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "simt/site.h"

namespace flashinfer_lite::simt {

struct Block;
struct Lane;

// The first 1024 bytes are the system's, as on sm_90, so that address 0 is never valid.
inline constexpr uint32_t kSharedBase = 1024;
inline constexpr uint32_t kMaxSharedBytes = 232448 - kSharedBase;
// NaN as bfloat16 and float16; two of them are a NaN as float.
inline constexpr uint16_t kPoison = 0x7fbf;

struct SharedWord {
  uint32_t time;      // of the agent, at its write
  uint32_t sequence;  // of the block, at that write
  uint16_t agent;
  uint16_t site;
  uint8_t written;  // bytes of that write, as a mask
  uint8_t valid;    // bytes ever written
  bool pending;     // an async copy into it is in flight
  bool async;       // written through the async proxy
};

// Lanes of one warp that read a word at `time` or before, since its last write.
struct SharedReaders {
  uint32_t time;
  uint32_t lanes;
};

class SharedMemory {
 public:
  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // Poisons the memory; clears the shadow if there is to be one.
  void reset(uint32_t bytes, int num_warps, bool with_shadow);

  uint8_t* at(uint32_t address) { return arena_ + address; }
  uint32_t bytes() const { return bytes_; }
  bool contains(const void* pointer) const;
  uint32_t address_of(const void* pointer) const;

  // Reports and returns false if an access would be outside, or misaligned (up to 16 bytes).
  bool check(uint32_t address, uint32_t bytes, bool write, Site site) const {
    const bool inside =
        address >= kSharedBase && bytes <= bytes_ && address - kSharedBase <= bytes_ - bytes;
    const bool aligned = bytes > 16 || (address & (bytes - 1)) == 0;
    return (inside && aligned) || refuse(address, bytes, write, site);
  }

  static uint32_t word_index(uint32_t address) { return (address - kSharedBase) / 4; }
  SharedWord& word(uint32_t index) { return words_[index]; }
  SharedReaders* readers(uint32_t index) { return &readers_[size_t{index} * num_warps_]; }

 private:
  bool refuse(uint32_t address, uint32_t bytes, bool write, Site site) const;

  uint8_t* arena_;
  uint32_t bytes_ = 0;
  int num_warps_ = 0;
  std::vector<SharedWord> words_;
  std::vector<SharedReaders> readers_;
};

template <int kBytes>
void load_shared(uint32_t address, void* out, Site site);
template <int kBytes>
void store_shared(uint32_t address, const void* value, Site site);

// SharedMemory::check of the running block.
bool check_shared_bounds(uint32_t address, uint32_t bytes, bool write, Site site);

void fill_poison(void* out, size_t bytes);

// ---- Shadow. Only called with race checks on, for accesses within bounds.

void shadow_read(Lane& lane, uint32_t address, uint32_t bytes, Site site);
void shadow_write(Lane& lane, uint32_t address, uint32_t bytes, Site site);
// A copy is issued by `lane` and lands later on behalf of `agent` at `time`.
void shadow_issue(Lane& lane, uint32_t address, uint32_t bytes, uint32_t agent, uint32_t time,
                  Site site);
void shadow_land(uint32_t address, uint32_t bytes, uint32_t agent, uint32_t time, bool async,
                 Site site);
// Reports generic writes that no proxy fence separates from an async access by `lane`.
void check_proxy(Lane& lane, uint32_t address, uint32_t bytes, Site site);

std::string describe_agent(uint32_t agent);

}  // namespace flashinfer_lite::simt

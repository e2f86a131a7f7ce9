// Global memory: registered buffers, their bounds, and a shadow that knows which block and thread
// accessed each word of a writable buffer.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "simt/lane.h"
#include "simt/site.h"

namespace flashinfer_lite::simt {

struct Block;
extern constinit thread_local Block* current_block __attribute__((tls_model("initial-exec")));

struct GlobalReader {
  uint32_t block;  // serial; 0 = none
  uint32_t time;
  uint16_t thread;
  uint8_t bytes;  // of the word, as a mask
};

struct GlobalWord {
  Site writer_site;
  uint32_t writer_block;  // serial; 0 = none
  uint32_t writer_time;
  uint16_t writer_thread;
  uint8_t written;  // bytes of that write, as a mask
  uint8_t valid;    // bytes ever written; outlives a launch
  bool atomic;
  // Two of the running block that are unordered between them, so that whoever writes finds another;
  // one of the block before.
  GlobalReader readers[3];
};

struct Buffer {
  uint8_t* start;
  size_t bytes;
  std::string name;
  bool writable;
  bool initialised;
  std::unique_ptr<GlobalWord, void (*)(void*)> shadow;  // of writable buffers

  bool contains(const void* p, size_t size) const {
    const uint8_t* q = static_cast<const uint8_t*>(p);
    return q >= start && q + size <= start + bytes;
  }
};

// Publications taken by `thread` and fenced at its `time`: valid for threads ordered after that.
struct Acquisition {
  Publication from;
  uint16_t thread;
  uint32_t time;
};

// Knows the block that holds it, which may fault in the middle.
class SpinLock {
 public:
  void lock() {
    for (const Block* none = nullptr;
         !holder_.compare_exchange_weak(none, current_block, std::memory_order_acquire);) {
      none = nullptr;
    }
  }
  void unlock() { holder_.store(nullptr, std::memory_order_release); }
  void unlock_if_held() {
    if (holder_.load(std::memory_order_relaxed) == current_block) unlock();
  }

 private:
  std::atomic<const Block*> holder_ = nullptr;
};

class GlobalMemory {
 public:
  // `initialised`: a word may be read before a kernel has written it.
  void add_buffer(void* start, size_t bytes, std::string name, bool writable, bool initialised);
  bool empty() const { return buffers_.empty(); }
  // The host wrote these bytes of a registered buffer, before the next launch.
  void set_written(const void* start, size_t bytes);
  // The buffer that holds all of [p, p + bytes), or null.
  const Buffer* find(const void* p, size_t bytes) const;
  // The buffer closest to an address outside of all, or null if none is within `distance`.
  const Buffer* nearest(const void* p, size_t distance) const;
  // Launches are ordered: what earlier ones published and accessed matters no more.
  void begin_launch(uint32_t first_serial);

  uint32_t first_serial() const { return first_serial_; }
  std::vector<Publication>& publications(const void* counter) { return published_[counter]; }

  SpinLock lock;  // of shadow and publications, when blocks run on two OS threads

 private:
  void check_overlap(const void* start, size_t bytes, const std::string& name) const;

  std::deque<Buffer> buffers_;  // stable addresses
  std::map<const uint8_t*, const Buffer*> by_start_;
  uint32_t first_serial_ = 1;
  std::map<const void*, std::vector<Publication>> published_;
};

template <int kBytes>
void load_global(const void* source, void* out, Site site);
template <int kBytes>
void store_global(void* destination, const void* value, Site site);

// Adds and returns the old value. T: int32_t, uint32_t, uint64_t, float.
template <class T>
T atomic_add(T* destination, T value, Site site);
// Returns the old value; the counter goes on to old + 1, or to 0 after `last`.
uint32_t ticket(uint32_t* counter, uint32_t last, Site site);
void fence_gpu(Site site);
void prefetch_l2(const void* address, Site site);

// True if the access may be carried out; reports otherwise.
bool check_global_bounds(const void* p, size_t bytes, bool write, Site site);

// ---- Shadow. Only called with race checks on.

enum class GlobalAccess : uint8_t { kRead, kWrite, kAtomic };
void shadow_global(const void* p, uint32_t bytes, GlobalAccess access, Site site);
// An atomic on `counter` by the running thread: publishes what it fenced, takes what others did.
void exchange_publications(const void* counter);

}  // namespace flashinfer_lite::simt

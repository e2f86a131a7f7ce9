#include "simt/global_memory.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>

#include "simt/block.h"

namespace flashinfer_lite::simt {

namespace {

constexpr uint64_t kAddressSpace = uint64_t{1} << 47;  // of a process on x86-64
constexpr size_t kNearby = 64 * 1024;  // how far from a buffer an access is told to be "near" it

template <class T>
T fetch_add(T* destination, T value) {
  std::atomic_ref<T> cell(*destination);
  return cell.fetch_add(value, std::memory_order_relaxed);
}

void count_global(const void* p, int bytes, Access access, Site site) {
  Block& block = *current_block;
  if (!block.options.count_accesses) return;
  current_lane->warp->log.add(block.sites.id(site), access, current_lane->index,
                              reinterpret_cast<uintptr_t>(p), bytes);
}

bool check_alignment(const void* p, uint32_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return true;
  report(Kind::kMisaligned, site, "a global address is not aligned to %u bytes", bytes);
  return false;
}

// Bounds, counters and shadow of an atomic; false if it must not be carried out.
bool prepare_atomic(const void* p, uint32_t bytes, Site site) {
  if (!check_global_bounds(p, bytes, true, site) || !check_alignment(p, bytes, site)) return false;
  count_global(p, bytes, Access::kAtomic, site);
  if (current_block->options.check_races) shadow_global(p, bytes, GlobalAccess::kAtomic, site);
  return true;
}

}  // namespace

void GlobalMemory::add_buffer(void* start, size_t bytes, std::string name, bool writable,
                              bool initialised) {
  if (bytes == 0) return;
  if (bytes > kAddressSpace || reinterpret_cast<uintptr_t>(start) > kAddressSpace - bytes) {
    throw std::invalid_argument("the buffer " + name + " reaches beyond the address space");
  }
  check_overlap(start, bytes, name);
  std::unique_ptr<GlobalWord, void (*)(void*)> shadow(nullptr, std::free);
  if (writable) {
    // Zero pages until touched. A buffer may begin and end within a word.
    void* words = std::calloc(bytes / 4 + 2, sizeof(GlobalWord));
    if (words == nullptr) throw std::bad_alloc();
    shadow.reset(static_cast<GlobalWord*>(words));
  }
  buffers_.push_back({static_cast<uint8_t*>(start), bytes, std::move(name), writable, initialised,
                      std::move(shadow)});
  by_start_[buffers_.back().start] = &buffers_.back();
}

void GlobalMemory::set_written(const void* start, size_t bytes) {
  const Buffer* buffer = find(start, bytes);
  if (buffer == nullptr || !buffer->writable) return;
  const uint8_t* base = buffer->start - reinterpret_cast<uintptr_t>(buffer->start) % 4;
  const size_t first = static_cast<size_t>(static_cast<const uint8_t*>(start) - base);
  for (size_t at = first; at < first + bytes; ++at) {
    buffer->shadow.get()[at / 4].valid |= static_cast<uint8_t>(1u << at % 4);
  }
}

void GlobalMemory::check_overlap(const void* start, size_t bytes, const std::string& name) const {
  const uint8_t* p = static_cast<const uint8_t*>(start);
  for (const Buffer& buffer : buffers_) {
    if (p >= buffer.start + buffer.bytes || p + bytes <= buffer.start) continue;
    throw std::invalid_argument("the buffers " + buffer.name + " and " + name + " overlap");
  }
}

const Buffer* GlobalMemory::find(const void* p, size_t bytes) const {
  auto after = by_start_.upper_bound(static_cast<const uint8_t*>(p));
  if (after == by_start_.begin()) return nullptr;
  const Buffer* buffer = std::prev(after)->second;
  return buffer->contains(p, bytes) ? buffer : nullptr;
}

const Buffer* GlobalMemory::nearest(const void* p, size_t distance) const {
  const Buffer* best = nullptr;
  for (const Buffer& buffer : buffers_) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    const uintptr_t start = reinterpret_cast<uintptr_t>(buffer.start);
    const uintptr_t end = start + buffer.bytes;
    const size_t gap = address < start ? start - address : address >= end ? address - end : 0;
    if (gap >= distance) continue;
    distance = gap;
    best = &buffer;
  }
  return best;
}

void GlobalMemory::begin_launch(uint32_t first_serial) {
  first_serial_ = first_serial;
  published_.clear();
}

bool check_global_bounds(const void* p, size_t bytes, bool write, Site site) {
  Block& block = *current_block;
  const GlobalMemory& memory = block.session.memory();
  if (memory.empty()) return true;
  const Buffer* buffer = block.last_buffer;
  if (buffer == nullptr || !buffer->contains(p, bytes)) buffer = memory.find(p, bytes);
  const char* what = write ? "write" : "read";
  if (buffer == nullptr) {
    const Buffer* near = memory.nearest(p, kNearby);
    const long offset = near == nullptr ? 0 : static_cast<const uint8_t*>(p) - near->start;
    report(Kind::kOobGlobal, site,
           "%s of %zu bytes outside every buffer; nearest is %s, of %zu bytes, at its offset %ld",
           what, bytes, near == nullptr ? "none" : near->name.c_str(),
           near == nullptr ? 0 : near->bytes, offset);
    return false;
  }
  block.last_buffer = buffer;
  if (write && !buffer->writable) {
    report(Kind::kOobGlobal, site, "write to the read-only buffer %s", buffer->name.c_str());
    return false;
  }
  return true;
}

template <int kBytes>
void load_global(const void* source, void* out, Site site) {
  if (!check_global_bounds(source, kBytes, false, site) || !check_alignment(source, kBytes, site)) {
    return fill_poison(out, kBytes);
  }
  count_global(source, kBytes, Access::kGlobalLoad, site);
  if (current_block->options.check_races) {
    shadow_global(source, kBytes, GlobalAccess::kRead, site);
  }
  std::memcpy(out, source, kBytes);
}

template <int kBytes>
void store_global(void* destination, const void* value, Site site) {
  if (!check_global_bounds(destination, kBytes, true, site)) return;
  if (!check_alignment(destination, kBytes, site)) return;
  count_global(destination, kBytes, Access::kGlobalStore, site);
  if (current_block->options.check_races) {
    shadow_global(destination, kBytes, GlobalAccess::kWrite, site);
  }
  std::memcpy(destination, value, kBytes);
}

template <class T>
T atomic_add(T* destination, T value, Site site) {
  if (!prepare_atomic(destination, sizeof(T), site)) return T{};
  const std::lock_guard guard(current_block->session.memory().lock);
  const T old = fetch_add(destination, value);
  // A float accumulates; only integers are counters that blocks synchronise by.
  if (std::is_integral_v<T>) exchange_publications(destination);
  return old;
}

uint32_t ticket(uint32_t* counter, uint32_t last, Site site) {
  if (!prepare_atomic(counter, sizeof(uint32_t), site)) return 0;
  const std::lock_guard guard(current_block->session.memory().lock);
  const uint32_t old = *counter;
  *counter = old >= last ? 0 : old + 1;
  exchange_publications(counter);
  return old;
}

void prefetch_l2(const void* address, Site site) { check_global_bounds(address, 1, false, site); }

template void load_global<1>(const void*, void*, Site);
template void load_global<2>(const void*, void*, Site);
template void load_global<4>(const void*, void*, Site);
template void load_global<8>(const void*, void*, Site);
template void load_global<16>(const void*, void*, Site);
template void store_global<1>(void*, const void*, Site);
template void store_global<2>(void*, const void*, Site);
template void store_global<4>(void*, const void*, Site);
template void store_global<8>(void*, const void*, Site);
template void store_global<16>(void*, const void*, Site);
template int32_t atomic_add(int32_t*, int32_t, Site);
template uint32_t atomic_add(uint32_t*, uint32_t, Site);
template uint64_t atomic_add(uint64_t*, uint64_t, Site);
template float atomic_add(float*, float, Site);

}  // namespace flashinfer_lite::simt

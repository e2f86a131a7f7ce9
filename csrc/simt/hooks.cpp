// Plain loads and stores of kernel code, without wrappers. Kernels compiled with
//   -fsanitize=thread --param=tsan-instrument-func-entry-exit=0
// call a function at each memory access; these are those functions, instead of libtsan's. This
// file, like the executor, is compiled without the flag. The site of a raw access is the program
// counter: file "@pc", line = offset in the module, for addr2line.
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>

#include "simt/block.h"

namespace flashinfer_lite::simt {

namespace {

Site site_of(const void* pc) {
  static const uintptr_t base = [] {
    Dl_info info{};
    dladdr(reinterpret_cast<const void*>(&launch), &info);
    return reinterpret_cast<uintptr_t>(info.dli_fbase);
  }();
  return {"@pc", static_cast<int>(reinterpret_cast<uintptr_t>(pc) - base)};
}

void count_raw(Block& block, Access access, uint64_t address, uint32_t bytes, Site site) {
  if (!block.options.count_accesses || bytes > 16) return;
  current_lane->warp->log.add(block.sites.id(site), access, current_lane->index, address,
                              static_cast<int>(bytes));
}

void raw_shared(Block& block, const void* p, uint32_t bytes, bool write, Site site) {
  const uint32_t address = block.shared.address_of(p);
  if (!check_shared_bounds(address, bytes, write, site)) return;
  count_raw(block, write ? Access::kSharedStore : Access::kSharedLoad, address, bytes, site);
  if (!block.options.check_races) return;
  if (write) {
    shadow_write(*current_lane, address, bytes, site);
  } else {
    shadow_read(*current_lane, address, bytes, site);
  }
}

// Only what is in a buffer or near one is global memory; the rest is the host's.
void raw_global(Block& block, const void* p, uint32_t bytes, bool write, Site site) {
  constexpr size_t kNearby = 64 * 1024;
  if (block.session.memory().nearest(p, kNearby) == nullptr) return;
  if (!check_global_bounds(p, bytes, write, site)) return;
  count_raw(block, write ? Access::kGlobalStore : Access::kGlobalLoad,
            reinterpret_cast<uintptr_t>(p), bytes, site);
  if (!block.options.check_races) return;
  shadow_global(p, bytes, write ? GlobalAccess::kWrite : GlobalAccess::kRead, site);
}

void raw_access(const void* p, size_t size, bool write, const void* pc) {
  Block* block = current_block;
  if (block == nullptr || block->is_main() || block->stacks->contains(p)) return;
  const uint32_t bytes = static_cast<uint32_t>(size);
  if (block->shared.contains(p)) {
    raw_shared(*block, p, bytes, write, site_of(pc));
  } else {
    raw_global(*block, p, bytes, write, site_of(pc));
  }
}

}  // namespace

}  // namespace flashinfer_lite::simt

#define FIL_HOOK(name, bytes, write)                                                 \
  void name(void* p) {                                                               \
    flashinfer_lite::simt::raw_access(p, bytes, write, __builtin_return_address(0)); \
  }
#define FIL_HOOKS(bytes)                               \
  FIL_HOOK(__tsan_read##bytes, bytes, false)           \
  FIL_HOOK(__tsan_write##bytes, bytes, true)           \
  FIL_HOOK(__tsan_unaligned_read##bytes, bytes, false) \
  FIL_HOOK(__tsan_unaligned_write##bytes, bytes, true) \
  FIL_HOOK(__tsan_volatile_read##bytes, bytes, false)  \
  FIL_HOOK(__tsan_volatile_write##bytes, bytes, true)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

FIL_HOOKS(1)
FIL_HOOKS(2)
FIL_HOOKS(4)
FIL_HOOKS(8)
FIL_HOOKS(16)

void __tsan_read_range(void* p, size_t bytes) {
  flashinfer_lite::simt::raw_access(p, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  flashinfer_lite::simt::raw_access(p, bytes, true, __builtin_return_address(0));
}
}

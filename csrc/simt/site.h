// Call sites of kernel code: interned, counted, and switched off one by one for mutation tests.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace flashinfer_lite::simt {

struct Site {
  const char* file = nullptr;
  int line = 0;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// The last folder and the file: decode/sm80.cuh.
const char* short_name(const char* path);
std::string to_string(Site site);  // decode/sm80.cuh:12

// Calls that order or guard something. Each can be disabled at its site.
enum class SyncKind : uint8_t {
  kBarrier,
  kNamedBarrier,
  kWait,
  kCommit,
  kFence,
  kArrive,
  kSyncWarp,
  kPredicate,
};
inline constexpr int kNumSyncKinds = 8;
inline constexpr std::array<const char*, kNumSyncKinds> kSyncKindNames = {
    "barrier", "named_barrier", "wait", "commit", "fence", "arrive", "syncwarp", "predicate"};

enum class Access : uint8_t {
  kSharedLoad,
  kSharedStore,
  kLdmatrix,
  kCopyToShared,
  kGlobalLoad,
  kGlobalStore,
  kCopyFromGlobal,
  kAtomic,
};
inline constexpr int kNumAccesses = 8;
inline constexpr std::array<const char*, kNumAccesses> kAccessNames = {
    "ld.shared", "st.shared", "ldmatrix",        "cp.async.shared",
    "ld.global", "st.global", "cp.async.global", "atom.global"};

// Shared memory counts wavefronts, global memory sectors of 32 bytes.
struct AccessCount {
  uint64_t requests = 0;  // warp-wide instructions
  uint64_t ideal = 0;
  uint64_t actual = 0;
};

struct DisabledSite {
  std::string file;  // the end of its path, from a folder on
  int line = 0;
  SyncKind kind = SyncKind::kBarrier;
};

struct SiteEntry {
  Site site;
  std::array<uint64_t, kNumSyncKinds> hits{};
  std::array<bool, kNumSyncKinds> disabled{};
  std::array<AccessCount, kNumAccesses> accesses{};
};

class SiteTable {
 public:
  explicit SiteTable(const std::vector<DisabledSite>& disabled);

  uint16_t id(Site site) {
    for (size_t slot = hash(site) & mask_;; slot = (slot + 1) & mask_) {
      const uint16_t id = slots_[slot];
      if (id == kEmpty) return insert(site);
      const Site& known = entries_[id].site;
      if (known.file == site.file && known.line == site.line) return id;
    }
  }

  SiteEntry& operator[](uint16_t id) { return entries_[id]; }
  const std::vector<SiteEntry>& entries() const { return entries_; }

  // Counts a call; false if the site is disabled.
  bool visit(Site site, SyncKind kind) {
    SiteEntry& entry = entries_[id(site)];
    const int index = static_cast<int>(kind);
    entry.hits[index]++;
    return !entry.disabled[index];
  }

 private:
  static constexpr uint16_t kEmpty = 0xffff;

  static size_t hash(Site site) {
    return (reinterpret_cast<uintptr_t>(site.file) >> 3) * 31 + static_cast<size_t>(site.line);
  }
  uint16_t insert(Site site);
  void place(uint16_t id);

  const std::vector<DisabledSite>& disabled_;
  std::vector<uint16_t> slots_;
  size_t mask_;
  std::vector<SiteEntry> entries_;
};

}  // namespace flashinfer_lite::simt

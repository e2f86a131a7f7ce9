// What a run found: errors, access counters, and the sites that ordered or guarded something.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "simt/site.h"

namespace flashinfer_lite::simt {

enum class Kind : uint8_t {
  kOobShared,
  kOobGlobal,
  kMisaligned,
  kUninitShared,
  kUninitGlobal,
  kRaceShared,
  kRaceGlobal,
  kInFlight,
  kLeftover,
  kProxyFence,
  kCollective,
  kBarrier,
  kMbarrier,
  kDeadlock,
  kStackOverflow,
  kFault,
  kLaunch,
};
inline constexpr int kNumKinds = 17;
inline constexpr std::array<const char*, kNumKinds> kKindNames = {
    "oob-shared",  "oob-global", "misaligned",     "uninit-shared", "uninit-global", "race-shared",
    "race-global", "in-flight",  "leftover",       "proxy-fence",   "collective",    "barrier",
    "mbarrier",    "deadlock",   "stack-overflow", "fault",         "launch"};

struct Finding {
  Kind kind;
  std::string file;  // short_name of its path
  int line = 0;
  uint64_t count = 0;
  std::string text;  // of the first occurrence
};

struct CounterRow {
  Access access;
  std::string file;
  int line = 0;
  AccessCount count;
};

struct SyncRow {
  SyncKind kind;
  std::string file;
  int line = 0;
  uint64_t hits = 0;
};

struct Totals {
  uint64_t launches = 0;
  uint64_t blocks = 0;
  uint64_t collectives = 0;
  uint64_t mmas = 0;
  double seconds = 0;
};

// Findings of one OS thread, one per kind and site.
class Findings {
 public:
  // Counts a further occurrence; false if there is none yet.
  bool count_again(Kind kind, uint16_t site);
  void add(Kind kind, uint16_t site, Site where, std::string text);
  const std::vector<Finding>& all() const { return findings_; }

 private:
  std::unordered_map<uint32_t, size_t> index_;
  std::vector<Finding> findings_;
};

struct Report {
  std::vector<Finding> errors;
  std::vector<CounterRow> counters;  // sorted by file, line and access
  std::vector<SyncRow> sites;        // sorted by file, line and kind
  Totals totals;

  void merge(const Findings& findings);
  void merge(const SiteTable& table);
  void sort();
  std::string text() const;
};

}  // namespace flashinfer_lite::simt

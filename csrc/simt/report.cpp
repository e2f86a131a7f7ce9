#include "simt/report.h"

#include <algorithm>
#include <sstream>
#include <tuple>

namespace flashinfer_lite::simt {

namespace {

template <class Row>
Row* find_row(std::vector<Row>& rows, const Row& like, auto kind) {
  for (Row& row : rows) {
    if (row.line == like.line && row.*kind == like.*kind && row.file == like.file) return &row;
  }
  return nullptr;
}

bool counts_sectors(Access access) {
  return access == Access::kGlobalLoad || access == Access::kGlobalStore ||
         access == Access::kCopyFromGlobal || access == Access::kAtomic;
}

}  // namespace

bool Findings::count_again(Kind kind, uint16_t site) {
  const auto found = index_.find(static_cast<uint32_t>(kind) << 16 | site);
  if (found == index_.end()) return false;
  findings_[found->second].count++;
  return true;
}

void Findings::add(Kind kind, uint16_t site, Site where, std::string text) {
  index_[static_cast<uint32_t>(kind) << 16 | site] = findings_.size();
  findings_.push_back({kind, short_name(where.file), where.line, 1, std::move(text)});
}

void Report::merge(const Findings& findings) {
  for (const Finding& finding : findings.all()) {
    if (Finding* known = find_row(errors, finding, &Finding::kind)) {
      known->count += finding.count;
    } else {
      errors.push_back(finding);
    }
  }
}

void Report::merge(const SiteTable& table) {
  for (const SiteEntry& entry : table.entries()) {
    const std::string file = short_name(entry.site.file);
    for (int i = 0; i < kNumSyncKinds; i++) {
      if (entry.hits[i] == 0) continue;
      const SyncRow row{static_cast<SyncKind>(i), file, entry.site.line, entry.hits[i]};
      if (SyncRow* known = find_row(sites, row, &SyncRow::kind)) {
        known->hits += row.hits;
      } else {
        sites.push_back(row);
      }
    }
    for (int i = 0; i < kNumAccesses; i++) {
      const AccessCount& count = entry.accesses[i];
      if (count.requests == 0) continue;
      const CounterRow row{static_cast<Access>(i), file, entry.site.line, count};
      if (CounterRow* known = find_row(counters, row, &CounterRow::access)) {
        known->count.requests += count.requests;
        known->count.ideal += count.ideal;
        known->count.actual += count.actual;
      } else {
        counters.push_back(row);
      }
    }
  }
}

void Report::sort() {
  std::sort(counters.begin(), counters.end(), [](const CounterRow& a, const CounterRow& b) {
    return std::tie(a.file, a.line, a.access) < std::tie(b.file, b.line, b.access);
  });
  std::sort(sites.begin(), sites.end(), [](const SyncRow& a, const SyncRow& b) {
    return std::tie(a.file, a.line, a.kind) < std::tie(b.file, b.line, b.kind);
  });
}

std::string Report::text() const {
  std::ostringstream out;
  for (const Finding& error : errors) {
    out << "error " << kKindNames[static_cast<int>(error.kind)] << " x" << error.count << " at "
        << error.file << ":" << error.line << ": " << error.text << "\n";
  }
  for (const CounterRow& row : counters) {
    out << "  " << row.file << ":" << row.line << " " << kAccessNames[static_cast<int>(row.access)]
        << " requests " << row.count.requests
        << (counts_sectors(row.access) ? " sectors" : " wavefronts") << " ideal " << row.count.ideal
        << " actual " << row.count.actual
        << (row.count.actual > row.count.ideal ? "  <-- excess" : "") << "\n";
  }
  return out.str();
}

}  // namespace flashinfer_lite::simt

#include "simt/site.h"

#include <string_view>

namespace flashinfer_lite::simt {

namespace {

bool ends_with_path(std::string_view path, std::string_view end) {
  if (!path.ends_with(end)) return false;
  return path.size() == end.size() || path[path.size() - end.size() - 1] == '/';
}

}  // namespace

const char* short_name(const char* path) {
  if (path == nullptr) return "?";
  const char* name = path;
  for (const char *p = path, *previous = path; *p != 0; p++) {
    if (*p != '/') continue;
    name = previous;
    previous = p + 1;
  }
  return name;
}

std::string to_string(Site site) {
  return std::string(short_name(site.file)) + ":" + std::to_string(site.line);
}

SiteTable::SiteTable(const std::vector<DisabledSite>& disabled)
    : disabled_(disabled), slots_(1024, kEmpty), mask_(slots_.size() - 1) {
  entries_.reserve(256);
}

void SiteTable::place(uint16_t id) {
  size_t slot = hash(entries_[id].site) & mask_;
  while (slots_[slot] != kEmpty) slot = (slot + 1) & mask_;
  slots_[slot] = id;
}

uint16_t SiteTable::insert(Site site) {
  // The last id takes all sites that find no place: no kernel has 65000 of them.
  if (entries_.size() == kEmpty - 1u) return static_cast<uint16_t>(entries_.size() - 1);
  SiteEntry entry;
  entry.site = site;
  for (const DisabledSite& off : disabled_) {
    if (off.line == site.line && ends_with_path(short_name(site.file), off.file)) {
      entry.disabled[static_cast<int>(off.kind)] = true;
    }
  }
  entries_.push_back(entry);
  const uint16_t id = static_cast<uint16_t>(entries_.size() - 1);
  if (2 * entries_.size() > slots_.size()) {
    slots_.assign(2 * slots_.size(), kEmpty);
    mask_ = slots_.size() - 1;
    for (uint16_t known = 0; known <= id; known++) place(known);
  } else {
    place(id);
  }
  return id;
}

}  // namespace flashinfer_lite::simt

// Blocks of one launch are unordered, except where one publishes and another takes: fence_gpu()
// and then an atomic by one thread publishes all that the thread knew at the fence; an atomic on
// the same counter and then fence_gpu() by one thread takes it, for all that is ordered after.
// Blocks run one after another, so the data is right either way: only these rules find the fault.
#include <mutex>
#include <string>

#include "simt/block.h"
#include "simt/global_memory.h"
#include "simt/ordering.h"

namespace flashinfer_lite::simt {

namespace {

// Is (block, thread, time) ordered before what the running lane does now?
bool ordered_before_here(uint32_t serial, uint16_t thread, uint32_t time) {
  const Block& block = *current_block;
  const Lane& lane = *current_lane;
  if (serial < block.session.memory().first_serial()) return true;  // an earlier launch
  if (serial == block.serial) return knows(lane, thread, time);
  for (const Acquisition& acquired : block.acquisitions) {
    if (acquired.from.block == serial && (*acquired.from.times)[thread] >= time &&
        knows(lane, acquired.thread, acquired.time)) {
      return true;
    }
  }
  return false;
}

std::string describe(uint32_t serial, uint16_t thread) {
  const Block& block = *current_block;
  const uint32_t index = serial - block.session.memory().first_serial();
  return (serial == block.serial ? "thread " : "block " + std::to_string(index) + " thread ") +
         std::to_string(thread);
}

void report_race(const char* what, const char* earlier, const Buffer& buffer, size_t offset,
                 uint32_t serial, uint16_t thread, Site other, Site site) {
  const std::string where = other.file == nullptr ? "" : " at " + to_string(other);
  report(Kind::kRaceGlobal, site,
         "%s of %s at byte %zu, %s by %s%s, with nothing between that orders the two%s", what,
         buffer.name.c_str(), offset, earlier, describe(serial, thread).c_str(), where.c_str(),
         serial == current_block->serial
             ? ""
             : ": sync_threads, fence_gpu, atomic; then atomic, fence_gpu, sync_threads");
}

void check_writer(const Buffer& buffer, const GlobalWord& word, uint8_t mask, size_t offset,
                  GlobalAccess access, Site site) {
  if (word.writer_block == 0 || (word.written & mask) == 0) return;
  if (word.atomic && access == GlobalAccess::kAtomic) return;
  if (ordered_before_here(word.writer_block, word.writer_thread, word.writer_time)) return;
  report_race(access == GlobalAccess::kRead ? "read" : "write", "written", buffer, offset,
              word.writer_block, word.writer_thread, word.writer_site, site);
}

void check_readers(const Buffer& buffer, const GlobalWord& word, uint8_t mask, size_t offset,
                   Site site) {
  for (const GlobalReader& reader : word.readers) {
    if (reader.block == 0 || (reader.bytes & mask) == 0) continue;
    if (ordered_before_here(reader.block, reader.thread, reader.time)) continue;
    report_race("write", "read", buffer, offset, reader.block, reader.thread, Site{}, site);
    return;
  }
}

void add_reader(GlobalWord& word, uint8_t mask) {
  const Block& block = *current_block;
  const Lane& lane = *current_lane;
  GlobalReader* readers = word.readers;
  if (readers[0].block != block.serial) {
    readers[2] = readers[0];
    readers[0] = readers[1] = {};
  }
  for (GlobalReader* reader : {readers, readers + 1}) {
    const bool replaces = reader->block == 0 || knows(lane, reader->thread, reader->time);
    if (!replaces) continue;
    *reader = {block.serial, lane.time, lane.thread, mask};
    return;
  }
}

void set_writer(GlobalWord& word, uint8_t mask, GlobalAccess access, Site site) {
  const Lane& lane = *current_lane;
  word.writer_site = site;
  word.writer_block = current_block->serial;
  word.writer_time = lane.time;
  word.writer_thread = lane.thread;
  word.written = mask;
  word.valid |= mask;
  word.atomic = access == GlobalAccess::kAtomic;
  for (GlobalReader& reader : word.readers) reader = {};
}

void access_word(const Buffer& buffer, GlobalWord& word, uint8_t mask, size_t offset,
                 GlobalAccess access, Site site) {
  check_writer(buffer, word, mask, offset, access, site);
  if (access != GlobalAccess::kWrite && !buffer.initialised && (word.valid & mask) != mask) {
    report(Kind::kUninitGlobal, site, "read of %s at byte %zu, which was never written",
           buffer.name.c_str(), offset);
  }
  if (access == GlobalAccess::kRead) {
    add_reader(word, mask);
  } else {
    check_readers(buffer, word, mask, offset, site);
    set_writer(word, mask, access, site);
  }
}

}  // namespace

void shadow_global(const void* p, uint32_t bytes, GlobalAccess access, Site site) {
  GlobalMemory& memory = current_block->session.memory();
  if (memory.empty()) return;
  const Buffer* buffer = current_block->last_buffer;  // found by the bounds check
  if (!buffer->writable) return;
  const uintptr_t base = reinterpret_cast<uintptr_t>(buffer->start) / 4 * 4;
  const uintptr_t start = reinterpret_cast<uintptr_t>(p);
  const uintptr_t end = start + bytes;
  const std::lock_guard guard(memory.lock);
  for (uintptr_t at = start / 4 * 4; at < end; at += 4) {
    const uint32_t from = at < start ? start - at : 0;
    const uint32_t to = end - at < 4 ? end - at : 4;
    const uint8_t mask = static_cast<uint8_t>((1u << to) - (1u << from));
    const size_t offset = at + from - reinterpret_cast<uintptr_t>(buffer->start);
    access_word(*buffer, buffer->shadow.get()[(at - base) / 4], mask, offset, access, site);
  }
}

void exchange_publications(const void* counter) {
  Block& block = *current_block;
  Lane& lane = *current_lane;
  if (!block.options.check_races) return;
  std::vector<Publication>& published = block.session.memory().publications(counter);
  lane.taken.insert(lane.taken.end(), published.begin(), published.end());
  if (!lane.fenced) return;
  auto times = std::make_shared<std::vector<uint32_t>>(lane.fenced.times());
  (*times)[lane.thread] = lane.fenced_time;
  published.push_back({block.serial, std::move(times)});
}

void fence_gpu(Site site) {
  Block& block = *current_block;
  Lane& lane = *current_lane;
  if (!block.sites.visit(site, SyncKind::kFence) || !block.options.check_races) return;
  for (Publication& publication : lane.taken) {
    block.acquisitions.push_back({std::move(publication), lane.thread, lane.time});
  }
  lane.taken.clear();
  lane.fenced = lane.known;
  lane.fenced_time = lane.time++;
}

}  // namespace flashinfer_lite::simt

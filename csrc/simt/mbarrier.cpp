#include "simt/mbarrier.h"

#include <algorithm>

#include "simt/block.h"
#include "simt/ordering.h"
#include "simt/scheduler.h"

namespace flashinfer_lite::simt {

namespace {

constexpr uint32_t kMbarrierBytes = 8;
// A thread may ask a few times and then do something else; one that asks for longer waits.
constexpr int kMaxIdlePolls = 1000;

// The initialised barrier at the address, whose initialisation the running thread knows of.
Mbarrier& use_mbarrier(uint32_t address, Site site) {
  Block& block = *current_block;
  const auto found = block.mbarriers.by_address.find(address);
  if (found == block.mbarriers.by_address.end()) {
    fatal(Kind::kMbarrier, site, "the mbarrier at shared address %u is not initialised", address);
  }
  if (block.options.check_races) {
    const SharedWord& word = block.shared.word(SharedMemory::word_index(address));
    if (!knows(*current_lane, word.agent, word.time)) {
      report(Kind::kMbarrier, site,
             "the mbarrier at shared address %u is used, but nothing orders this after its "
             "initialisation",
             address);
    }
  }
  return found->second;
}

bool phase_complete(const Mbarrier& barrier, uint32_t parity) {
  return (barrier.phase & 1) != parity;
}

void acquire_phase(const Mbarrier& barrier, Warp& warp, uint32_t lanes) {
  if (barrier.completed && lanes != 0) acquire(barrier.completed, warp, lanes);
}

// The async proxy sees the mbarriers that the running thread has initialised.
void publish_mbarriers(Block& block) {
  for (auto& [address, barrier] : block.mbarriers.by_address) {
    if (barrier.initialiser == current_lane->thread) barrier.published = true;
  }
}

}  // namespace

bool wake_pollers(Block& block) {
  if (++block.mbarriers.idle_polls > kMaxIdlePolls) return false;
  bool any = false;
  for (int i = 0; i < block.num_warps; i++) {
    Warp& warp = block.warps[i];
    any |= warp.polling != 0;
    warp.ready |= warp.polling;
    warp.polling = 0;
  }
  return any;
}

void complete_phase_if_due(Block& block, Mbarrier& barrier) {
  block.mbarriers.idle_polls = 0;
  if (barrier.pending != 0 || barrier.transaction_bytes != 0) return;
  barrier.phase++;
  barrier.pending = barrier.expected;
  if (block.options.check_races) {
    barrier.completed = barrier.joined ? barrier.joined : block.clocks->zero();
    barrier.joined = ClockRef();
    // What TMA wrote for this phase is known to whoever waits for it.
    barrier.completed.get()->times[block.num_threads + barrier.index] = barrier.phase;
  }
  for (int i = 0; i < block.num_warps; i++) {
    Warp& warp = block.warps[i];
    acquire_phase(barrier, warp, barrier.waiting[i]);
    warp.ready |= barrier.waiting[i] | warp.polling;
    warp.polling = 0;
  }
  barrier.waiting.fill(0);
  barrier.polled.fill(0);
}

Mbarrier& mbarrier_of_load(uint32_t address, Site site) {
  Mbarrier& barrier = use_mbarrier(address, site);
  if (current_block->options.check_races && !barrier.published) {
    report(Kind::kProxyFence, site,
           "the mbarrier at shared address %u is used by a TMA load without a fence after its "
           "initialisation",
           address);
  }
  return barrier;
}

void mbarrier_init(uint32_t address, uint32_t count, Site site) {
  if (!check_shared_bounds(address, kMbarrierBytes, true, site)) return;
  Block& block = *current_block;
  auto& barriers = block.mbarriers.by_address;
  const auto [found, is_new] = barriers.try_emplace(address);
  const int index = is_new ? static_cast<int>(barriers.size()) - 1 : found->second.index;
  if (index >= kMaxMbarriers) {
    fatal(Kind::kMbarrier, site, "more than %d mbarriers in a block", kMaxMbarriers);
  }
  found->second = Mbarrier{};
  found->second.index = index;
  found->second.initialiser = current_lane->thread;
  found->second.expected = count;
  found->second.pending = count;
  found->second.site = site;
  if (block.options.check_races) shadow_write(*current_lane, address, kMbarrierBytes, site);
}

void mbarrier_arrive(uint32_t address, uint32_t transaction_bytes, Site site) {
  Block& block = *current_block;
  if (!block.sites.visit(site, SyncKind::kArrive)) return;
  Lane& lane = *current_lane;
  Mbarrier& barrier = use_mbarrier(address, site);
  if (barrier.pending == 0) {
    fatal(Kind::kMbarrier, site,
          "phase %u of the mbarrier at shared address %u expects only %u arrivals", barrier.phase,
          address, barrier.expected);
  }
  if (block.options.check_races) {
    release(barrier.joined, *lane.warp, 1u << lane.index);
    lane.time++;
  }
  barrier.transaction_bytes += transaction_bytes;
  barrier.pending--;
  complete_phase_if_due(block, barrier);
}

void mbarrier_wait(uint32_t address, uint32_t parity, Site site) {
  if (!current_block->sites.visit(site, SyncKind::kWait)) return;
  Lane& lane = *current_lane;
  Warp& warp = *lane.warp;
  const uint32_t bit = 1u << lane.index;
  Mbarrier& barrier = use_mbarrier(address, site);
  if (phase_complete(barrier, parity)) return acquire_phase(barrier, warp, bit);
  lane.op = Op::kMbarrier;
  lane.site = site;
  barrier.waiting[warp.index] |= bit;
  warp.ready &= ~bit;
  reschedule();
  lane.op = Op::kRunning;
}

bool mbarrier_test_wait(uint32_t address, uint32_t parity, Site site) {
  if (!current_block->sites.visit(site, SyncKind::kWait)) return true;
  Lane& lane = *current_lane;
  const uint32_t bit = 1u << lane.index;
  Mbarrier& barrier = use_mbarrier(address, site);
  if (phase_complete(barrier, parity)) {
    acquire_phase(barrier, *lane.warp, bit);
    return true;
  }
  if ((barrier.polled[lane.warp->index] & bit) == 0) {
    barrier.polled[lane.warp->index] |= bit;
    return false;
  }
  // Asking again before some phase completes would tell nothing new: the others run first.
  lane.op = Op::kPoll;
  lane.site = site;
  lane.warp->polling |= bit;
  lane.warp->ready &= ~bit;
  reschedule();
  lane.op = Op::kRunning;
  return false;
}

void fence_mbarrier_init(Site site) {
  if (current_block->sites.visit(site, SyncKind::kFence)) publish_mbarriers(*current_block);
}

void fence_proxy_async(Site site) {
  Block& block = *current_block;
  if (!block.sites.visit(site, SyncKind::kFence)) return;
  current_lane->proxy_fence = ++block.sequence;
  publish_mbarriers(block);
}

}  // namespace flashinfer_lite::simt

#include "simt/barrier.h"

#include "simt/block.h"
#include "simt/ordering.h"
#include "simt/scheduler.h"

namespace flashinfer_lite::simt {

namespace {

void complete(Block& block, Barrier& barrier) {
  for (int i = 0; i < block.num_warps; i++) {
    Warp& warp = block.warps[i];
    const uint32_t waiting = barrier.waiting[i];
    if (waiting == 0) continue;
    if (block.options.check_races) adopt(barrier.joined, warp, waiting);
    if (waiting == warp.exist && warp.log.dirty()) warp.log.flush(block.sites);
    warp.ready |= waiting;
  }
  block.sequence++;
  barrier.waiting.fill(0);
  barrier.present.fill(0);
  barrier.arrived = 0;
  barrier.joined = ClockRef();
  barrier.result = barrier.any;
  barrier.any = false;
}

void check_arrival(const Barrier& barrier, uint32_t id, bool all_threads, uint32_t threads,
                   Site site) {
  const Lane& lane = *current_lane;
  const uint32_t present = barrier.present[lane.warp->index];
  if (barrier.all_threads != all_threads || barrier.threads != threads) {
    fatal(Kind::kBarrier, site, "barrier %u expects %u threads here and %u at %s", id, threads,
          barrier.threads, to_string(barrier.site).c_str());
  }
  if ((present >> lane.index & 1) != 0) {
    fatal(Kind::kBarrier, site, "the thread arrives twice at barrier %u before it is complete", id);
  }
  const Site first = barrier.warp_site[lane.warp->index];
  if (present != 0 && (first.line != site.line || first.file != site.file)) {
    report(Kind::kBarrier, site, "lanes of one warp arrive at barrier %u here and at %s", id,
           to_string(first).c_str());
  }
}

enum class Arrival { kWait, kGoOn };

// `threads` is the expected count, for sync_threads all of the block.
void arrive(uint32_t id, bool all_threads, uint32_t threads, Arrival arrival, bool predicate,
            Site site) {
  Block& block = *current_block;
  Lane& lane = *current_lane;
  Warp& warp = *lane.warp;
  Barrier& barrier = block.barriers[id];
  const uint32_t bit = 1u << lane.index;
  if (barrier.arrived == 0) {
    barrier.all_threads = all_threads;
    barrier.threads = threads;
    barrier.site = site;
  }
  check_arrival(barrier, id, all_threads, threads, site);
  if (barrier.present[warp.index] == 0) barrier.warp_site[warp.index] = site;
  barrier.present[warp.index] |= bit;
  barrier.arrived++;
  barrier.any |= predicate;
  if (block.options.check_races) {
    release(barrier.joined, warp, bit);
    if (arrival == Arrival::kGoOn) lane.time++;
  }
  if (arrival == Arrival::kWait) {
    barrier.waiting[warp.index] |= bit;
    warp.ready &= ~bit;
    lane.op = Op::kBarrier;
    lane.site = site;
    lane.barrier_id = id;
  }
  const uint32_t needed = all_threads ? block.live_threads : threads;
  if (barrier.arrived == needed) {
    if (all_threads && needed != threads) {
      report(Kind::kBarrier, site, "sync_threads reached by %u of %u threads, the rest has exited",
             needed, threads);
    }
    complete(block, barrier);
  } else if (arrival == Arrival::kWait) {
    reschedule();
  }
  lane.op = Op::kRunning;
}

void check_named(uint32_t id, uint32_t threads, Site site) {
  if (id < kNumBarriers && threads != 0 && threads % 32 == 0) return;
  fatal(Kind::kBarrier, site, "barrier %u with %u threads: ids go to 15, threads count whole warps",
        id, threads);
}

bool enabled(SyncKind kind, Site site) { return current_block->sites.visit(site, kind); }

}  // namespace

void sync_threads(Site site) {
  if (!enabled(SyncKind::kBarrier, site)) return;
  arrive(0, true, current_block->num_threads, Arrival::kWait, false, site);
}

bool sync_threads_or(bool predicate, Site site) {
  if (!enabled(SyncKind::kBarrier, site)) return predicate;
  arrive(0, true, current_block->num_threads, Arrival::kWait, predicate, site);
  return current_block->barriers[0].result;
}

void bar_sync(uint32_t id, uint32_t threads, Site site) {
  if (!enabled(SyncKind::kNamedBarrier, site)) return;
  check_named(id, threads, site);
  arrive(id, false, threads, Arrival::kWait, false, site);
}

void bar_arrive(uint32_t id, uint32_t threads, Site site) {
  if (!enabled(SyncKind::kArrive, site)) return;
  check_named(id, threads, site);
  arrive(id, false, threads, Arrival::kGoOn, false, site);
}

void recheck_sync_threads(Block& block) {
  Barrier& barrier = block.barriers[0];
  if (!barrier.all_threads || barrier.arrived == 0 || barrier.arrived != block.live_threads) return;
  report(Kind::kBarrier, barrier.site, "sync_threads is complete only because threads have exited");
  complete(block, barrier);
}

void report_unfinished_barriers(Block& block) {
  for (int i = 0; i < kNumBarriers; i++) {
    const Barrier& barrier = block.barriers[i];
    if (barrier.arrived == 0) continue;
    report(Kind::kBarrier, barrier.site, "the block ends with %u arrivals at barrier %d",
           barrier.arrived, i);
  }
}

}  // namespace flashinfer_lite::simt

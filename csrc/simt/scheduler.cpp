#include "simt/scheduler.h"

#include <bit>
#include <map>
#include <string>

#include "simt/block.h"
#include "simt/ordering.h"

namespace flashinfer_lite::simt {

constinit thread_local Lane* current_lane __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

std::string describe(const Lane& lane) {
  if (lane.op == Op::kExited) return kOpNames[static_cast<int>(lane.op)];
  std::string text = kOpNames[static_cast<int>(lane.op)];
  if (lane.op == Op::kBarrier) text += " " + std::to_string(lane.barrier_id);
  return text + " at " + to_string(lane.site);
}

// Where every warp stands, lanes in the same place together.
[[noreturn]] void report_deadlock(const Block& block) {
  std::string text;
  Site site = current_lane->site;
  for (int i = 0; i < block.num_warps; i++) {
    const Warp& warp = block.warps[i];
    std::map<std::string, uint32_t> places;
    for (uint32_t rest = warp.exist; rest != 0; rest &= rest - 1) {
      const Lane& lane = warp.lanes[std::countr_zero(rest)];
      places[describe(lane)] |= 1u << lane.index;
      if (lane.op != Op::kExited) site = lane.site;
    }
    for (const auto& [place, lanes] : places) {
      char mask[16];
      std::snprintf(mask, sizeof mask, "%08x", lanes);
      text += "; warp " + std::to_string(i) + " lanes " + mask + ": " + place;
    }
  }
  fatal(Kind::kDeadlock, site, "no thread can run%s", text.c_str());
}

void check_collective(const Collective& collective, Warp& warp, uint32_t mask) {
  const Lane& first = warp.lanes[std::countr_zero(mask)];
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const Lane& lane = warp.lanes[std::countr_zero(rest)];
    if (lane.op != first.op || lane.mask != mask) {
      fatal(Kind::kCollective, lane.site,
            "lanes of one mask meet in different collectives: lane %d in %s (mask %08x), "
            "lane %d in %s (mask %08x) at %s",
            lane.index, kOpNames[static_cast<int>(lane.op)], lane.mask, first.index,
            kOpNames[static_cast<int>(first.op)], first.mask, to_string(first.site).c_str());
    }
    const bool same_site = lane.site.line == first.site.line && lane.site.file == first.site.file;
    if (collective.aligned && !same_site) {
      fatal(Kind::kCollective, lane.site,
            "an .aligned instruction is reached from different places: lane %d here, lane %d at %s",
            lane.index, first.index, to_string(first.site).c_str());
    }
  }
}

}  // namespace

void reschedule() {
  Block& block = *current_block;
  const Warp& own = *current_lane->warp;
  if (own.ready != 0) {
    return switch_to(&own.lanes[next_in_ring(own.ready, current_lane->index)]);
  }
  for (;;) {
    for (int i = 1; i <= block.num_warps; i++) {
      const Warp& warp = block.warps[(own.index + i) % block.num_warps];
      if (warp.ready == 0) continue;
      Lane* next = &warp.lanes[std::countr_zero(warp.ready)];
      if (next != current_lane) switch_to(next);
      return;
    }
    if (block.live_threads == 0) switch_to_main();
    if (!land_one_load(block) && !wake_pollers(block)) report_deadlock(block);
  }
}

void switch_to_main() {
  Lane* self = current_lane;
  current_lane = &current_block->main_lane;
  flashinfer_lite_simt_swap(&self->stack_pointer, current_block->main_stack_pointer);
  __builtin_unreachable();
}

void exit_lane() {
  Block& block = *current_block;
  Lane& lane = *current_lane;
  if (!lane.copies.empty()) {
    report(Kind::kLeftover, lane.copies.front().site,
           "the thread exits with %zu cp.async in flight", lane.copies.size());
  }
  const uint32_t bit = 1u << lane.index;
  lane.warp->ready &= ~bit;
  lane.warp->live &= ~bit;
  lane.op = Op::kExited;
  block.live_threads--;
  recheck_sync_threads(block);
  if (block.live_threads == 0) switch_to_main();
  reschedule();
  __builtin_unreachable();
}

void complete_collective(const Collective& collective, uint32_t mask) {
  Block& block = *current_block;
  Warp& warp = *current_lane->warp;
  check_collective(collective, warp, mask);
  warp.parked &= ~mask;
  if (collective.perform != nullptr) collective.perform(warp.lanes, mask);
  block.totals.collectives++;
  if (mask == warp.exist && warp.log.dirty()) warp.log.flush(block.sites);
  if (collective.orders && block.options.check_races) {
    ClockRef joined;
    release(joined, warp, mask);
    adopt(joined, warp, mask);
  }
  warp.ready |= mask;
}

void refuse_mask(uint32_t mask, Site site) {
  fatal(Kind::kCollective, site, "the calling lane %d is not in its mask %08x", current_lane->index,
        mask);
}

}  // namespace flashinfer_lite::simt

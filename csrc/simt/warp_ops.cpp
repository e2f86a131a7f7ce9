#include "simt/warp_ops.h"

#include "simt/block.h"

namespace flashinfer_lite::simt {

void perform_shuffle(Lane* lanes, uint32_t mask) {
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const Lane& lane = lanes[std::countr_zero(rest)];
    ShuffleArgument* argument = static_cast<ShuffleArgument*>(lane.argument);
    const uint32_t source = argument->source_lane;
    if ((mask >> source & 1) != 0) {
      argument->result = static_cast<ShuffleArgument*>(lanes[source].argument)->value;
    } else {
      fill_poison(&argument->result, sizeof argument->result);
      report(Kind::kCollective, lane.site, "shuffle from lane %u, which does not exist", source);
    }
  }
}

void perform_vote(Lane* lanes, uint32_t mask) {
  uint32_t ballot = 0;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    const bool predicate = static_cast<VoteArgument*>(lanes[lane].argument)->predicate;
    ballot |= uint32_t{predicate} << lane;
  }
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    static_cast<VoteArgument*>(lanes[std::countr_zero(rest)].argument)->result = ballot;
  }
}

void sync_warp(uint32_t mask, Site site) {
  if (!current_block->sites.visit(site, SyncKind::kSyncWarp)) return;
  meet(kSyncWarp, mask, nullptr, site);
}

bool predicate(bool value, Site site) {
  return !current_block->sites.visit(site, SyncKind::kPredicate) || value;
}

}  // namespace flashinfer_lite::simt

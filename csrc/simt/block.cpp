#include "simt/block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>

#include "simt/fault.h"
#include "simt/kernel_api.h"
#include "simt/scheduler.h"

namespace flashinfer_lite::simt {

constinit thread_local Block* current_block __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

void run_thread() {
  const Launch& launch = *current_block->launch;
  launch.kernel(launch.params);
  exit_lane();
}

void record(Kind kind, Site site, const char* format, va_list arguments) {
  Block& block = *current_block;
  const uint16_t id = block.sites.id(site);
  if (block.findings.count_again(kind, id)) return;
  char message[2048];
  int length = std::vsnprintf(message, sizeof message - 64, format, arguments);
  length = std::min<int>(length, sizeof message - 65);
  if (!block.is_main()) {
    std::snprintf(message + length, 64, " [block %u warp %d lane %d]", block.index,
                  current_lane->warp->index, current_lane->index);
  }
  block.findings.add(kind, id, site, message);
}

void report_fault(Block& block, const FaultPoint& point) {
  const Lane& lane = *current_lane;
  if (point.signal_number == SIGFPE || point.signal_number == SIGILL) {
    report(Kind::kFault, lane.site, "%s; this is the last place where the thread was seen",
           point.signal_number == SIGFPE ? "division of an integer by zero" : "trap");
    return;
  }
  void* address = point.address;
  if (block.stacks->overflows(lane.thread, address)) {
    report(Kind::kStackOverflow, lane.site, "the stack of the thread overflows its %zu bytes",
           block.stacks->usable_bytes());
    return;
  }
  const Buffer* near = block.session.memory().nearest(address, 1u << 20);
  const std::string where = near == nullptr ? "" : ", near the buffer " + near->name;
  report(Kind::kFault, lane.site,
         "memory fault at %p%s; this is the last place where the thread was seen", address,
         where.c_str());
}

}  // namespace

void report(Kind kind, Site site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record(kind, site, format, arguments);
  va_end(arguments);
}

void fatal(Kind kind, Site site, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  record(kind, site, format, arguments);
  va_end(arguments);
  current_block->aborted = true;
  switch_to_main();
}

int block_index() { return static_cast<int>(current_block->index); }

int num_blocks() { return static_cast<int>(current_block->launch->num_blocks); }

Block::Block(Session& session)
    : session(session), options(session.options()), sites(options.disabled) {}

void Block::prepare(const Launch& next) {
  launch = &next;
  const int threads = static_cast<int>(next.num_threads);
  if (stacks == nullptr || stacks->count() < threads) {
    stacks = std::make_unique<FiberStacks>(threads, options.stack_bytes);
  }
  if (threads == num_threads) return;
  num_threads = threads;
  num_warps = (threads + 31) / 32;
  // References go before the pool they refer to.
  lanes = std::vector<Lane>(threads);
  barriers.fill(Barrier{});
  mbarriers = Mbarriers{};
  clocks = std::make_unique<ClockPool>(num_agents());
}

void Block::reset(uint32_t block_index) {
  index = block_index;
  serial = session.memory().first_serial() + block_index;
  live_threads = num_threads;
  sequence = 1;
  aborted = false;
  last_buffer = nullptr;
  barriers.fill(Barrier{});
  mbarriers = Mbarriers{};
  acquisitions.clear();
  shared.reset(launch->smem_bytes, num_warps, options.check_races);
  const ClockRef start = clocks->zero();
  for (int i = 0; i < num_threads; i++) {
    Lane& lane = lanes[i];
    lane = Lane{};
    lane.warp = &warps[i / 32];
    lane.index = static_cast<uint8_t>(i % 32);
    lane.thread = static_cast<uint16_t>(i);
    lane.known = start;
    lane.stack_pointer = stacks->prepare(i, run_thread);
  }
  for (int i = 0; i < num_warps; i++) {
    Warp& warp = warps[i];
    const int count = std::min(32, num_threads - 32 * i);
    warp.exist = count == 32 ? 0xffffffffu : (1u << count) - 1;
    warp.live = warp.exist;
    warp.ready = warp.exist;
    warp.parked = 0;
    warp.polling = 0;
    warp.index = i;
    warp.lanes = &lanes[32 * i];
    warp.log.clear();
  }
}

void Block::run(uint32_t block_index) {
  Block* outer_block = current_block;
  Lane* outer_lane = current_lane;
  current_block = this;
  current_lane = &main_lane;
  main_lane.warp = &warps[0];
  reset(block_index);
  FaultPoint& point = fault_point();
  if (sigsetjmp(point.context, 1) == 0) {
    point.armed = true;
    current_lane = &lanes[0];
    flashinfer_lite_simt_swap(&main_stack_pointer, lanes[0].stack_pointer);
    point.armed = false;
  } else {
    aborted = true;
    session.memory().lock.unlock_if_held();
    report_fault(*this, point);
  }
  current_lane = &main_lane;
  finish();
  current_block = outer_block;
  current_lane = outer_lane;
}

void Block::finish() {
  totals.blocks++;
  for (int i = 0; i < num_warps; i++) warps[i].log.flush(sites);
  if (aborted) return;
  report_unfinished_barriers(*this);
  report_unfinished_loads(*this);
}

}  // namespace flashinfer_lite::simt

#include "simt/session.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "simt/block.h"
#include "simt/fault.h"

namespace flashinfer_lite::simt {

namespace {

thread_local Session* session_of_thread = nullptr;

constexpr uint32_t kMaxThreads = 1024;
constexpr int kMaxOsThreads = 64;
constexpr size_t kMaxStackBytes = 64 << 20;

// splitmix64
uint64_t next_random(uint64_t& state) {
  uint64_t z = state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

std::vector<uint32_t> block_order(uint32_t num_blocks, uint64_t seed) {
  std::vector<uint32_t> order(num_blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (seed == 0) return order;
  for (uint32_t i = num_blocks; i > 1; i--) {
    std::swap(order[i - 1], order[next_random(seed) % i]);
  }
  return order;
}

// Runs blocks until none is left, or one is abandoned.
void run_blocks(Block& block, const std::vector<uint32_t>& order, std::atomic<size_t>& next) {
  const FaultStack stack;
  for (size_t i; (i = next.fetch_add(1)) < order.size();) {
    block.run(order[i]);
    if (block.aborted) next.store(order.size());
  }
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

Session::Session(Options options) : options_(std::move(options)) {
  if (options_.os_threads < 1 || options_.os_threads > kMaxOsThreads) {
    throw std::invalid_argument("threads: expected 1 to " + std::to_string(kMaxOsThreads));
  }
  if (options_.stack_bytes > kMaxStackBytes) {
    throw std::invalid_argument("stack_bytes: expected at most " + std::to_string(kMaxStackBytes));
  }
}

Session::~Session() {
  if (session_of_thread == this) session_of_thread = nullptr;
}

void Session::launch(uint32_t blocks, uint32_t threads, uint32_t smem_bytes,
                     void (*kernel)(const void* params), const void* params) {
  const auto start = std::chrono::steady_clock::now();
  totals_.launches++;
  if (blocks == 0 || threads == 0 || threads > kMaxThreads || smem_bytes > kMaxSharedBytes) {
    refused_.add(Kind::kLaunch, 0, Site{"launch", 0},
                 "refused: " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
                     " threads with " + std::to_string(smem_bytes) + " bytes of shared memory");
    return;
  }
  memory_.begin_launch(next_serial_);
  next_serial_ += blocks;
  const Launch launch{blocks, threads, smem_bytes, kernel, params};
  while (blocks_.size() < static_cast<size_t>(options_.os_threads)) {
    blocks_.push_back(std::make_unique<Block>(*this));
  }
  for (auto& block : blocks_) block->prepare(launch);
  const std::vector<uint32_t> order = block_order(blocks, options_.seed);
  std::atomic<size_t> next{0};
  const FaultHandlers handlers;
  std::vector<std::thread> others;
  for (size_t i = 1; i < blocks_.size(); i++) {
    others.emplace_back([&, i] { run_blocks(*blocks_[i], order, next); });
  }
  run_blocks(*blocks_[0], order, next);
  for (std::thread& other : others) other.join();
  totals_.seconds += seconds_since(start);
}

Report Session::report() const {
  Report report;
  report.totals = totals_;
  report.merge(refused_);
  for (const auto& block : blocks_) {
    report.merge(block->findings);
    report.merge(block->sites);
    report.totals.blocks += block->totals.blocks;
    report.totals.collectives += block->totals.collectives;
    report.totals.mmas += block->totals.mmas;
  }
  report.sort();
  return report;
}

Session* current_session() { return session_of_thread; }

void set_current_session(Session* session) { session_of_thread = session; }

int launch(uint32_t blocks, uint32_t threads, uint32_t smem_bytes,
           void (*kernel)(const void* params), const void* params) {
  if (session_of_thread != nullptr) {
    session_of_thread->launch(blocks, threads, smem_bytes, kernel, params);
    return 0;
  }
  Options unchecked;
  unchecked.check_races = false;
  unchecked.count_accesses = false;
  Session session(unchecked);
  session.launch(blocks, threads, smem_bytes, kernel, params);
  return session.report().errors.empty() ? 0 : 1;
}

}  // namespace flashinfer_lite::simt

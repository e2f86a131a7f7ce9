// Transaction barriers in shared memory (sm_90), and the TMA loads that complete on them.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <string>

#include "simt/barrier.h"
#include "simt/clock.h"
#include "simt/site.h"

namespace flashinfer_lite::simt {

inline constexpr int kMaxMbarriers = 32;

struct Mbarrier {
  int index = 0;
  uint16_t initialiser = 0;  // thread
  uint32_t expected = 0;
  uint32_t pending = 0;
  int64_t transaction_bytes = 0;
  uint32_t phase = 0;      // completed phases
  bool published = false;  // to the async proxy, by a fence after its initialisation
  ClockRef joined;         // of the arrivals of this phase
  ClockRef completed;      // of the previous phase
  std::array<uint32_t, kMaxWarps> waiting{};
  std::array<uint32_t, kMaxWarps> polled{};  // lanes that asked for this phase already
  Site site;
};

// The executor's contents of a TensorMap: a matrix of rows, dimension 0 contiguous.
struct TensorMap2d {
  uint64_t magic;
  const uint8_t* base;
  uint64_t size[2];     // elements
  uint64_t row_stride;  // bytes
  uint32_t box[2];      // elements
  uint32_t element_bytes;
  uint32_t swizzle_bytes;  // 0 or 128
};
static_assert(sizeof(TensorMap2d) <= 128, "must fit a CUtensorMap");

struct TmaLoad {
  uint32_t destination;
  uint32_t mbarrier;
  TensorMap2d map;  // a copy: the kernel parameter may be gone when the load lands
  int column, row;
  Site site;
};

struct Mbarriers {
  std::map<uint32_t, Mbarrier> by_address;
  std::deque<TmaLoad> loads;  // in flight
  int idle_polls = 0;         // rounds of polls since the last arrival
};

// Fills the 128 bytes of `map`; an error text if the driver would refuse such a map, else empty.
std::string encode_tensor_map_2d(void* map, const TensorMap2d& wanted);

void mbarrier_init(uint32_t address, uint32_t count, Site site);
void mbarrier_arrive(uint32_t address, uint32_t transaction_bytes, Site site);
void mbarrier_wait(uint32_t address, uint32_t parity, Site site);
bool mbarrier_test_wait(uint32_t address, uint32_t parity, Site site);
void fence_mbarrier_init(Site site);
void fence_proxy_async(Site site);
void tma_load_2d(uint32_t destination, const void* map, int column, int row, uint32_t mbarrier,
                 Site site);

// The barrier that a TMA load completes on.
Mbarrier& mbarrier_of_load(uint32_t address, Site site);
void complete_phase_if_due(Block& block, Mbarrier& barrier);
// Lets the lanes that poll ask again; false if none does, or if they have for too long.
bool wake_pollers(Block& block);
// Lets the oldest load land; false if none is in flight.
bool land_one_load(Block& block);
void report_unfinished_loads(Block& block);

}  // namespace flashinfer_lite::simt

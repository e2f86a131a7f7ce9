// Gathers what the lanes of a warp access into warp-wide requests, without making the lanes meet:
// the n-th access of each lane at one site, between two points where the whole warp meets, is one
// request.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "simt/site.h"

namespace flashinfer_lite::simt {

class AccessLog {
 public:
  void add(uint16_t site, Access access, int lane, uint64_t address, int bytes);
  bool dirty() const { return !dirty_.empty(); }
  // Counts the requests gathered so far.
  void flush(SiteTable& sites);
  void clear();

 private:
  struct Request {
    std::array<uint64_t, 32> address;
    std::array<uint8_t, 32> bytes;
    uint32_t mask = 0;
  };
  struct Stream {
    uint16_t site;
    Access access;
    std::array<uint16_t, 32> occurrences{};
    std::vector<Request> requests;
    size_t used = 0;
  };

  // Does an earlier lane access the address of this one?
  static bool among_earlier_lanes(const Request& request, int lane);
  static void count_sectors(const Request& request, AccessCount& count);

  std::vector<Stream> streams_;
  std::vector<int> index_;  // of a stream, by site and access; -1: none
  std::vector<int> dirty_;  // streams with requests
};

// Shared memory serves 128 bytes a wavefront: 32 lanes of 4 bytes, 16 of 8, 8 of 16. Ideal is one
// wavefront for each such group that has an active lane.
void count_wavefronts(const uint64_t* address, uint32_t mask, int bytes, AccessCount& count);

}  // namespace flashinfer_lite::simt

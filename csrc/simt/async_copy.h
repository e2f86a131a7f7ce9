// cp.async: data lands in the wait_group of the issuing thread, as late as is legal.
#pragma once

#include <cstdint>

#include "simt/site.h"

namespace flashinfer_lite::simt {

// Copies valid_bytes of 16, the rest becomes 0.
void cp_async_16(uint32_t destination, const void* source, int valid_bytes, Site site);
void cp_async_commit(Site site);
// Waits until at most `keep` committed groups of the thread are in flight.
void cp_async_wait(uint32_t keep, Site site);

}  // namespace flashinfer_lite::simt

// A machine with GPUs, made up: what the ops ask of the driver and of torch is answered from here,
// and what they launch runs on the executor. So the ops' own code runs where there is no GPU.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "simt/guarded_buffer.h"

namespace flashinfer_lite::simt {

struct FakeDevice {
  std::string name;
  int arch;  // 10 * major + minor
  int num_sms;
  int smem_optin;   // bytes
  int smem_per_sm;  // bytes
  int l2_bytes;
};

struct FakeLaunch {
  std::string instance;
  uintptr_t stream;
  int device;  // the current one, as opposed to that of the tensors
};

// What cudaMalloc gave; never freed.
struct FakeMemory {
  int device;
  bool initialised;
  std::shared_ptr<GuardedBuffer> memory;
};

struct FakeCuda {
  std::map<int, FakeDevice> devices;
  std::map<int, uintptr_t> streams;  // of each device the current one; default 0
  std::map<uintptr_t, int> tensors;  // address of a tensor's first element -> its device
  int current_device = 0;
  uintptr_t capturing = ~uintptr_t{0};  // the stream that is
  int driver_version = 13000;
  int runtime_version = 13000;
  int launch_error = 0;  // what every launch returns instead of running, unless 0
  int malloc_error = 0;  // what cudaMalloc returns, unless 0
  int last_error = 0;    // of cudaMalloc: what cudaGetLastError tells, once
  std::vector<FakeMemory> allocations;
  std::vector<FakeLaunch> launches;
};

FakeCuda& fake_cuda();

// Tells the current session of what cudaMalloc gave.
void register_allocations();

}  // namespace flashinfer_lite::simt

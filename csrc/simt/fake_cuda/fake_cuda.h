// A machine with GPUs, made up: what the ops ask of the driver and of torch is answered from here,
// and what they launch runs on the executor. So the ops' own code runs where there is no GPU.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

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

struct FakeCuda {
  std::map<int, FakeDevice> devices;
  std::map<int, uintptr_t> streams;  // of each device the current one; default 0
  std::map<uintptr_t, int> tensors;  // address of a tensor's first element -> its device
  int current_device = 0;
  uintptr_t capturing = ~uintptr_t{0};  // the stream that is
  int driver_version = 13000;
  int runtime_version = 13000;
  int launch_error = 0;  // what every launch returns instead of running, unless 0
  std::vector<FakeLaunch> launches;
};

FakeCuda& fake_cuda();

}  // namespace flashinfer_lite::simt

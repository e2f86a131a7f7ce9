// The table of instances that the ops see here: the rows that are compiled, each launch recorded.
#include <iterator>

#include "cuda/instance.h"
#include "simt/fake_cuda/fake_cuda.h"

namespace flashinfer_lite::cuda {
namespace {

// A launch is a plain function pointer, so each row has a function of its own.
template <const Instance& row>
Status launch_recorded(const void* params, Stream stream) {
  simt::FakeCuda& fake = simt::fake_cuda();
  fake.launches.push_back({row.name, reinterpret_cast<uintptr_t>(stream), fake.current_device});
  simt::register_allocations();
  return fake.launch_error == 0 ? row.launch(params, stream) : fake.launch_error;
}

template <const Instance& row>
Instance with_recorded_launch() {
  Instance copy = row;
  copy.launch = &launch_recorded<row>;
  return copy;
}

template <const Instance& row>
const Instance kRecorded = with_recorded_launch<row>();

}  // namespace

// rows.inc, written by scripts/build_simt.py, is FIL_ROW(name) for each row.
#define FIL_ROW(name)             \
  namespace name {                \
  extern const Instance instance; \
  }
#include "instances/rows.inc"
#undef FIL_ROW

const Instance* const kInstances[] = {
#define FIL_ROW(name) &kRecorded<name::instance>,
#include "instances/rows.inc"
#undef FIL_ROW
};
const int kNumInstances = std::size(kInstances);

}  // namespace flashinfer_lite::cuda

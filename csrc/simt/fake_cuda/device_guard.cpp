// What torch's autograd asks of a device before it lets a tensor there have a gradient: only a
// torch with CUDA has it for CUDA. Beyond the stable ABI, but in no shipped library.
#undef TORCH_TARGET_VERSION
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
const c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());

}  // namespace

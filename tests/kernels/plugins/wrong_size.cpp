// A plug-in whose table lacks functions that this program would call.
#include "kernels/device_abi.hpp"

namespace {
constexpr uint32_t kTable[2] = {troupe::kDeviceAbi, sizeof(troupe::DevicePluginTable) - 8};
}

extern "C" const void* troupe_device_plugin() { return kTable; }

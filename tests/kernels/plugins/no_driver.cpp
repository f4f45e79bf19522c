// A machine without a driver, wherever the test runs.
#include "kernels/device_abi.hpp"

#include <cstring>

namespace {
using namespace troupe;

DeviceStatus probe(DeviceProbe* out, DeviceError* error) {
  *out = DeviceProbe{0, 0, 13000};
  std::strcpy(error->text, "cudaGetDeviceCount: no driver here");
  return DeviceStatus::no_driver;
}

DevicePluginTable make_table() {
  DevicePluginTable table{};
  table.abi = kDeviceAbi;
  table.table_bytes = sizeof(table);
  table.name = "driverless";
  table.version = "1";
  table.probe = probe;
  return table;
}
} // namespace

extern "C" const DevicePluginTable* troupe_device_plugin() {
  static const DevicePluginTable table = make_table();
  return &table;
}

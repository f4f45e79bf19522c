// A device made of host memory, to test the program's side of the table on any machine. It does
// everything at once, so an event has happened when it is recorded. Device 0 has room for 1 MiB;
// device 1 is lost as soon as a stream is created on it.
//
// Whatever is still held when a device goes would be a bug of the program's side: it aborts.
#include "kernels/device_abi.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

namespace troupe {

struct DeviceHandle {
  int32_t device_idx;
  uint64_t free_bytes = 1 << 20;
  int32_t num_held = 0;
  std::map<void*, uint64_t> sizes;
};
struct StreamHandle {
  DeviceHandle* device;
};
struct EventHandle {
  DeviceHandle* device;
  double recorded_us = -1;
};

namespace {

DeviceStatus fail(DeviceStatus status, const char* text, DeviceError* error) {
  std::snprintf(error->text, sizeof(error->text), "%s", text);
  return status;
}

DeviceStatus probe(DeviceProbe* out, DeviceError*) {
  *out = DeviceProbe{2, 13010, 13000};
  return DeviceStatus::ok;
}

DeviceStatus describe(int32_t device_idx, DeviceInfo* out, DeviceError*) {
  *out = DeviceInfo{};
  std::snprintf(out->name, sizeof(out->name), "host memory %d", device_idx);
  out->compute_major = 9;
  out->num_multiprocessors = 1;
  out->memory_bytes = int64_t{1} << 30;
  return DeviceStatus::ok;
}

DeviceStatus create(int32_t device_idx, DeviceHandle** out, DeviceError* error) {
  if (device_idx < 0 || device_idx > 1)
    return fail(DeviceStatus::invalid_argument, "devices are 0 and 1", error);
  *out = new DeviceHandle{device_idx, 1 << 20, 0, {}};
  return DeviceStatus::ok;
}

void destroy(DeviceHandle* device) {
  if (device->num_held != 0)
    std::abort();
  delete device;
}

DeviceStatus allocate(DeviceHandle* device, DeviceMemory, uint64_t bytes, void** out,
                      DeviceError* error) {
  if (bytes == 0)
    return fail(DeviceStatus::invalid_argument, "0 bytes", error);
  if (bytes > device->free_bytes)
    return fail(DeviceStatus::out_of_memory, "1 MiB is all there is", error);
  *out = std::malloc(bytes);
  device->sizes[*out] = bytes;
  device->free_bytes -= bytes;
  ++device->num_held;
  return DeviceStatus::ok;
}

void release(DeviceHandle* device, DeviceMemory, void* memory) {
  device->free_bytes += device->sizes.at(memory);
  device->sizes.erase(memory);
  --device->num_held;
  std::free(memory);
}

DeviceStatus create_stream(DeviceHandle* device, StreamHandle** out, DeviceError* error) {
  if (device->device_idx == 1)
    return fail(DeviceStatus::failed, "an illegal memory access was encountered", error);
  *out = new StreamHandle{device};
  ++device->num_held;
  return DeviceStatus::ok;
}

void destroy_stream(StreamHandle* stream) {
  --stream->device->num_held;
  delete stream;
}

DeviceStatus synchronize(StreamHandle*, DeviceError*) { return DeviceStatus::ok; }

DeviceStatus copy(StreamHandle*, void* to, const void* from, uint64_t bytes, DeviceError*) {
  std::memcpy(to, from, bytes);
  return DeviceStatus::ok;
}

DeviceStatus create_event(DeviceHandle* device, EventHandle** out, DeviceError*) {
  *out = new EventHandle{device};
  ++device->num_held;
  return DeviceStatus::ok;
}

void destroy_event(EventHandle* event) {
  --event->device->num_held;
  delete event;
}

DeviceStatus record(StreamHandle*, EventHandle* event, DeviceError*) {
  static double now_us = 0;
  event->recorded_us = ++now_us;
  return DeviceStatus::ok;
}

DeviceStatus query(EventHandle*, DeviceError*) { return DeviceStatus::ok; }
DeviceStatus wait(StreamHandle*, EventHandle*, DeviceError*) { return DeviceStatus::ok; }

DeviceStatus elapsed_us(EventHandle* from, EventHandle* to, double* out, DeviceError*) {
  if (from->recorded_us < 0 || to->recorded_us < 0)
    return DeviceStatus::not_ready;
  *out = to->recorded_us - from->recorded_us;
  return DeviceStatus::ok;
}

constexpr DevicePluginTable kTable = {
    kDeviceAbi,    sizeof(DevicePluginTable),
    "host",        "1",
    probe,         describe,
    create,        destroy,
    allocate,      release,
    create_stream, destroy_stream,
    synchronize,   copy,
    create_event,  destroy_event,
    record,        query,
    wait,          elapsed_us,
};

} // namespace
} // namespace troupe

extern "C" const troupe::DevicePluginTable* troupe_device_plugin() { return &troupe::kTable; }

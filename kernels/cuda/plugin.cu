// The CUDA plug-in: the table of kernels/device_abi.hpp over the CUDA runtime.
//
// The runtime is linked statically and opens the driver itself, so this file loads on any machine
// and says what is missing. Every entry point selects its device first: the current device is a
// property of the calling thread, and callers come from many.
#include "kernels/device_abi.hpp"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <new>

namespace troupe {

struct DeviceHandle {
  int32_t device_idx;
};
struct StreamHandle {
  int32_t device_idx;
  cudaStream_t stream;
};
struct EventHandle {
  int32_t device_idx;
  cudaEvent_t event;
};

namespace {

DeviceStatus status_of(cudaError_t code) {
  switch (code) {
  case cudaSuccess:
    return DeviceStatus::ok;
  case cudaErrorNotReady:
    return DeviceStatus::not_ready;
  case cudaErrorInsufficientDriver:
  case cudaErrorStubLibrary:
  case cudaErrorSystemDriverMismatch:
  case cudaErrorCompatNotSupportedOnDevice:
    return DeviceStatus::no_driver;
  case cudaErrorNoDevice:
    return DeviceStatus::no_device;
  case cudaErrorMemoryAllocation:
    return DeviceStatus::out_of_memory;
  case cudaErrorInvalidValue:
  case cudaErrorInvalidDevice:
  case cudaErrorInvalidResourceHandle:
    return DeviceStatus::invalid_argument;
  default:
    return DeviceStatus::failed;
  }
}

void say(DeviceError* error, const char* call, const char* what) {
  if (error != nullptr)
    std::snprintf(error->text, sizeof(error->text), "%s: %s", call, what);
}

// The status of `code`; its text goes to `error`. Also forgets the runtime's sticky copy of a
// harmless error, which the next call would otherwise report as its own.
DeviceStatus report(const char* call, cudaError_t code, DeviceError* error) {
  DeviceStatus status = status_of(code);
  if (status == DeviceStatus::ok || status == DeviceStatus::not_ready)
    return status;
  (void)cudaGetLastError();
  char what[384];
  std::snprintf(what, sizeof(what), "%s (%s)", cudaGetErrorString(code), cudaGetErrorName(code));
  say(error, call, what);
  return status;
}

DeviceStatus no_room(const char* call, DeviceError* error) {
  say(error, call, "no host memory for a handle");
  return DeviceStatus::out_of_memory;
}

DeviceStatus probe(DeviceProbe* out, DeviceError* error) {
  *out = DeviceProbe{};
  // Neither call fails without a driver: the driver's version is then 0.
  (void)cudaRuntimeGetVersion(&out->runtime_version);
  (void)cudaDriverGetVersion(&out->driver_version);
  int num_devices = 0;
  DeviceStatus status = report("cudaGetDeviceCount", cudaGetDeviceCount(&num_devices), error);
  if (status != DeviceStatus::ok)
    return status;
  out->num_devices = num_devices;
  if (num_devices == 0) {
    say(error, "cudaGetDeviceCount", "0 devices");
    return DeviceStatus::no_device;
  }
  return DeviceStatus::ok;
}

DeviceStatus describe(int32_t device_idx, DeviceInfo* out, DeviceError* error) {
  cudaDeviceProp prop{};
  DeviceStatus status =
      report("cudaGetDeviceProperties", cudaGetDeviceProperties(&prop, device_idx), error);
  if (status != DeviceStatus::ok)
    return status;
  *out = DeviceInfo{};
  std::snprintf(out->name, sizeof(out->name), "%s", prop.name);
  out->compute_major = prop.major;
  out->compute_minor = prop.minor;
  out->num_multiprocessors = prop.multiProcessorCount;
  out->memory_bytes = static_cast<int64_t>(prop.totalGlobalMem);
  return DeviceStatus::ok;
}

DeviceStatus select(int32_t device_idx, DeviceError* error) {
  return report("cudaSetDevice", cudaSetDevice(device_idx), error);
}

DeviceStatus create(int32_t device_idx, DeviceHandle** out, DeviceError* error) {
  DeviceStatus status = select(device_idx, error);
  if (status != DeviceStatus::ok)
    return status;
  // A driver may put the context off until it is needed; an error belongs here, not there.
  status = report("cudaFree", cudaFree(nullptr), error);
  if (status != DeviceStatus::ok)
    return status;
  auto* device = new (std::nothrow) DeviceHandle{device_idx};
  if (device == nullptr)
    return no_room("create", error);
  *out = device;
  return DeviceStatus::ok;
}

// The context stays: it is the process's, and other users of CUDA in it may hold memory there.
void destroy(DeviceHandle* device) { delete device; }

DeviceStatus allocate(DeviceHandle* device, DeviceMemory kind, uint64_t bytes, void** out,
                      DeviceError* error) {
  if (bytes == 0) {
    say(error, "allocate", "0 bytes asked for, expected at least 1");
    return DeviceStatus::invalid_argument;
  }
  DeviceStatus status = select(device->device_idx, error);
  if (status != DeviceStatus::ok)
    return status;
  if (kind == DeviceMemory::pinned)
    return report("cudaHostAlloc", cudaHostAlloc(out, bytes, cudaHostAllocPortable), error);
  return report("cudaMalloc", cudaMalloc(out, bytes), error);
}

// An error here is one of earlier work, which its own stream reports; the memory goes either way.
void release(DeviceHandle* device, DeviceMemory kind, void* memory) {
  if (memory == nullptr || select(device->device_idx, nullptr) != DeviceStatus::ok)
    return;
  report("release", kind == DeviceMemory::pinned ? cudaFreeHost(memory) : cudaFree(memory),
         nullptr);
}

DeviceStatus create_stream(DeviceHandle* device, StreamHandle** out, DeviceError* error) {
  DeviceStatus status = select(device->device_idx, error);
  if (status != DeviceStatus::ok)
    return status;
  cudaStream_t stream = nullptr;
  // Non-blocking: never waits for the legacy default stream, which is everybody's.
  status = report("cudaStreamCreateWithFlags",
                  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), error);
  if (status != DeviceStatus::ok)
    return status;
  auto* handle = new (std::nothrow) StreamHandle{device->device_idx, stream};
  if (handle == nullptr) {
    (void)cudaStreamDestroy(stream);
    return no_room("create_stream", error);
  }
  *out = handle;
  return DeviceStatus::ok;
}

DeviceStatus synchronize(StreamHandle* stream, DeviceError* error) {
  DeviceStatus status = select(stream->device_idx, error);
  if (status != DeviceStatus::ok)
    return status;
  return report("cudaStreamSynchronize", cudaStreamSynchronize(stream->stream), error);
}

void destroy_stream(StreamHandle* stream) {
  if (stream == nullptr)
    return;
  synchronize(stream, nullptr);
  (void)cudaStreamDestroy(stream->stream);
  delete stream;
}

DeviceStatus copy(StreamHandle* stream, void* to, const void* from, uint64_t bytes,
                  DeviceError* error) {
  if (bytes == 0)
    return DeviceStatus::ok;
  DeviceStatus status = select(stream->device_idx, error);
  if (status != DeviceStatus::ok)
    return status;
  return report("cudaMemcpyAsync",
                cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream->stream), error);
}

DeviceStatus create_event(DeviceHandle* device, EventHandle** out, DeviceError* error) {
  DeviceStatus status = select(device->device_idx, error);
  if (status != DeviceStatus::ok)
    return status;
  cudaEvent_t event = nullptr;
  status = report("cudaEventCreate", cudaEventCreate(&event), error);
  if (status != DeviceStatus::ok)
    return status;
  auto* handle = new (std::nothrow) EventHandle{device->device_idx, event};
  if (handle == nullptr) {
    (void)cudaEventDestroy(event);
    return no_room("create_event", error);
  }
  *out = handle;
  return DeviceStatus::ok;
}

void destroy_event(EventHandle* event) {
  if (event == nullptr)
    return;
  if (select(event->device_idx, nullptr) == DeviceStatus::ok)
    (void)cudaEventDestroy(event->event);
  delete event;
}

DeviceStatus record(StreamHandle* stream, EventHandle* event, DeviceError* error) {
  DeviceStatus status = select(stream->device_idx, error);
  if (status != DeviceStatus::ok)
    return status;
  return report("cudaEventRecord", cudaEventRecord(event->event, stream->stream), error);
}

DeviceStatus query(EventHandle* event, DeviceError* error) {
  DeviceStatus status = select(event->device_idx, error);
  if (status != DeviceStatus::ok)
    return status;
  cudaError_t code = cudaEventQuery(event->event);
  if (code == cudaErrorNotReady)
    (void)cudaGetLastError();
  return report("cudaEventQuery", code, error);
}

DeviceStatus wait(StreamHandle* stream, EventHandle* event, DeviceError* error) {
  DeviceStatus status = select(stream->device_idx, error);
  if (status != DeviceStatus::ok)
    return status;
  return report("cudaStreamWaitEvent", cudaStreamWaitEvent(stream->stream, event->event, 0), error);
}

DeviceStatus elapsed_us(EventHandle* from, EventHandle* to, double* out, DeviceError* error) {
  DeviceStatus status = select(from->device_idx, error);
  if (status != DeviceStatus::ok)
    return status;
  float milliseconds = 0;
  status = report("cudaEventElapsedTime",
                  cudaEventElapsedTime(&milliseconds, from->event, to->event), error);
  if (status == DeviceStatus::ok)
    *out = 1000.0 * milliseconds;
  return status;
}

constexpr DevicePluginTable kTable = {
    kDeviceAbi,    sizeof(DevicePluginTable),
    "cuda",        TROUPE_VERSION,
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

extern "C" __attribute__((visibility("default"))) const troupe::DevicePluginTable*
troupe_device_plugin() {
  return &troupe::kTable;
}

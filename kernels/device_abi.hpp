// What a device plug-in (libtroupe_cuda.so) and the program agree on: plain structs and one table
// of functions. The program is C++20 and the plug-in C++17 from another compiler, so nothing of the
// C++ library crosses this line, no exception and no ownership but the handles below.
//
// A plug-in exports one function, troupe_device_plugin, which returns its table. The first two
// fields of the table keep their place for ever: they are what a program of another age reads
// before it believes the rest. Whoever changes anything else here raises kDeviceAbi.
#pragma once

#include <cstdint>

namespace troupe {

inline constexpr uint32_t kDeviceAbi = 1;
inline constexpr char kDevicePluginFile[] = "libtroupe_cuda.so";
inline constexpr char kDevicePluginSymbol[] = "troupe_device_plugin";

enum class DeviceStatus : int32_t {
  ok = 0,
  not_ready = 1,        // an event that has not happened yet
  no_driver = 2,        // no driver, or one too old for the plug-in's runtime
  no_device = 3,        // a driver, but no device (or none that may be seen)
  out_of_memory = 4,    // the device or pinned memory has no room; nothing else is lost
  invalid_argument = 5, // the caller's mistake; nothing else is lost
  failed = 6,           // the context is beyond use: this process needs a new one
};

// Where memory lives. Pinned memory is host memory that copies run from at full speed.
enum class DeviceMemory : int32_t { device = 0, pinned = 1 };

// The library's own words, with the call that failed. Filled whenever a status is neither ok nor
// not_ready; always terminated.
struct DeviceError {
  char text[512];
};

struct DeviceProbe {
  int32_t num_devices;
  int32_t driver_version;  // 1000·major + 10·minor as CUDA counts; 0: no driver
  int32_t runtime_version; // likewise, what the plug-in was built with
};

struct DeviceInfo {
  char name[256];
  int32_t compute_major, compute_minor;
  int32_t num_multiprocessors;
  int64_t memory_bytes;
};

// Opaque, the plug-in's. A handle belongs to whoever created it and ends with its destroy call;
// all handles of a device end before the device.
struct DeviceHandle;
struct StreamHandle;
struct EventHandle;

// Every function may be called from any thread. Those that return a status fill `error` when it is
// an error; out parameters are written only on ok. Destroy calls accept null.
struct DevicePluginTable {
  uint32_t abi;         // kDeviceAbi of the plug-in
  uint32_t table_bytes; // sizeof(DevicePluginTable) of the plug-in
  const char* name;     // "cuda"
  const char* version;  // of Troupe, for messages

  // Looks at the machine without claiming anything on it. Fills the versions even if it fails.
  DeviceStatus (*probe)(DeviceProbe* out, DeviceError* error);
  DeviceStatus (*describe)(int32_t device_idx, DeviceInfo* out, DeviceError* error);

  DeviceStatus (*create)(int32_t device_idx, DeviceHandle** out, DeviceError* error);
  void (*destroy)(DeviceHandle* device);

  // `bytes` > 0; aligned to 256 bytes at least. release waits for work that still uses the memory.
  DeviceStatus (*allocate)(DeviceHandle* device, DeviceMemory kind, uint64_t bytes, void** out,
                           DeviceError* error);
  void (*release)(DeviceHandle* device, DeviceMemory kind, void* memory);

  DeviceStatus (*create_stream)(DeviceHandle* device, StreamHandle** out, DeviceError* error);
  void (*destroy_stream)(StreamHandle* stream); // after waiting for the work on it
  // Blocks until everything started on the stream is done.
  DeviceStatus (*synchronize)(StreamHandle* stream, DeviceError* error);

  // Starts a copy between any two kinds of memory, ordinary host memory included. Both ends live
  // until the copy is done; they don't overlap.
  DeviceStatus (*copy)(StreamHandle* stream, void* to, const void* from, uint64_t bytes,
                       DeviceError* error);

  DeviceStatus (*create_event)(DeviceHandle* device, EventHandle** out, DeviceError* error);
  void (*destroy_event)(EventHandle* event);
  DeviceStatus (*record)(StreamHandle* stream, EventHandle* event, DeviceError* error);
  // ok when everything before the last record is done, not_ready before that.
  DeviceStatus (*query)(EventHandle* event, DeviceError* error);
  // Work started on `stream` from now on begins after `event`.
  DeviceStatus (*wait)(StreamHandle* stream, EventHandle* event, DeviceError* error);
  // Microseconds between two events that have both happened.
  DeviceStatus (*elapsed_us)(EventHandle* from, EventHandle* to, double* out, DeviceError* error);
};

using DevicePluginFunction = const DevicePluginTable* (*)();

} // namespace troupe

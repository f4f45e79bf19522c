// Devices: GPUs behind a plug-in that is found at run time (kernels/device_abi.hpp).
//
// One build of Troupe runs on machines with and without a GPU, so nothing links the plug-in. It is
// looked for next to the program and then in the folders of TROUPE_PLUGIN_PATH; the first file of
// its name is taken, and one that does not fit is an error, never a reason to look further. Each
// way in which a device can be missing has its own message: no library, a library of another
// Troupe, no driver, no device.
//
// Expected trouble (no room, no such device) comes back as an error. A device beyond use throws
// DeviceLost: the process that holds such a context can only end, and its supervisor decides.
#pragma once

#include "config/errors.hpp"
#include "kernels/device_abi.hpp"

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace troupe {

class DeviceLost : public std::runtime_error {
public:
  using std::runtime_error::runtime_error;
};

// What a plug-in found on this machine.
struct DeviceReport {
  std::string plugin; // "cuda 0.1.0 from /path/libtroupe_cuda.so"
  int32_t driver_version = 0, runtime_version = 0;
  std::vector<DeviceInfo> devices; // never empty
};
// One line for each device and one for the versions.
[[nodiscard]] std::string to_text(const DeviceReport& report);

// A loaded plug-in. It stays loaded until the process ends, also when the last reference is gone:
// the CUDA runtime registers handlers that run at exit.
class DevicePlugin {
public:
  // The folders in which plug-ins are looked for, in order.
  [[nodiscard]] static std::vector<std::filesystem::path> search_path();
  // not_found: no such file in `folders`; mismatch: another ABI; malformed: no plug-in at all.
  [[nodiscard]] static caf::expected<std::shared_ptr<const DevicePlugin>>
  load(std::span<const std::filesystem::path> folders);

  // not_found: no driver or no device here.
  [[nodiscard]] caf::expected<DeviceReport> probe() const;
  [[nodiscard]] const DevicePluginTable& table() const { return *table_; }
  // "cuda 0.1.0 from PATH"
  [[nodiscard]] std::string description() const;

private:
  DevicePlugin(const DevicePluginTable* table, std::filesystem::path file)
      : table_(table), file_(std::move(file)) {}

  const DevicePluginTable* table_;
  std::filesystem::path file_;
};

// The four things a device lends. They keep their device alive, and return what they hold when
// they go.
class Device;
using DevicePtr = std::shared_ptr<Device>;

class DeviceBuffer {
public:
  DeviceBuffer() = default;
  [[nodiscard]] void* data() const { return memory_.get(); }
  [[nodiscard]] uint64_t size() const { return bytes_; }

private:
  friend class Device;
  DeviceBuffer(std::shared_ptr<void> memory, uint64_t bytes)
      : memory_(std::move(memory)), bytes_(bytes) {}

  std::shared_ptr<void> memory_;
  uint64_t bytes_ = 0;
};

class DeviceEvent {
public:
  // True when everything before the last record is done; an event never recorded is done.
  [[nodiscard]] bool done() const;
  // Both events have happened.
  [[nodiscard]] caf::expected<double> elapsed_us_since(const DeviceEvent& earlier) const;

private:
  friend class Device;
  friend class DeviceQueue;
  DeviceEvent(DevicePtr device, EventHandle* handle);

  DevicePtr device_;
  std::shared_ptr<EventHandle> handle_;
};

// A stream of the device: copies (and, in time, kernels) run in the order started.
class DeviceQueue {
public:
  // Between any two kinds of memory. Both ends live until the copy is done.
  void copy(void* to, const void* from, uint64_t bytes) const;
  void record(const DeviceEvent& event) const;
  // What is started here from now on begins after `event`.
  void wait(const DeviceEvent& event) const;
  // Blocks the calling thread: for threads that belong to a stream or to a test, never a handler.
  void synchronize() const;

private:
  friend class Device;
  DeviceQueue(DevicePtr device, StreamHandle* handle);

  DevicePtr device_;
  std::shared_ptr<StreamHandle> handle_;
};

class Device : public std::enable_shared_from_this<Device> {
public:
  // invalid_argument: there is no device of that index.
  [[nodiscard]] static caf::expected<DevicePtr> open(std::shared_ptr<const DevicePlugin> plugin,
                                                     int32_t device_idx);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // out_of_memory when there is no room; the device is as before.
  [[nodiscard]] caf::expected<DeviceBuffer> allocate(DeviceMemory kind, uint64_t bytes);
  [[nodiscard]] caf::expected<DeviceQueue> create_queue();
  [[nodiscard]] caf::expected<DeviceEvent> create_event();
  [[nodiscard]] const DevicePluginTable& table() const { return plugin_->table(); }

private:
  Device(std::shared_ptr<const DevicePlugin> plugin, DeviceHandle* handle)
      : plugin_(std::move(plugin)), handle_(handle) {}

  std::shared_ptr<const DevicePlugin> plugin_;
  DeviceHandle* handle_;
};

} // namespace troupe

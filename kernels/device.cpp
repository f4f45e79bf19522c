#include "kernels/device.hpp"

#include <dlfcn.h>
#include <fmt/format.h>

#include <cstdlib>
#include <string_view>
#include <system_error>
#include <utility>

namespace troupe {
namespace {

namespace fs = std::filesystem;

std::string joined(std::span<const fs::path> folders) {
  std::string text;
  for (const auto& folder : folders)
    text += (text.empty() ? "" : ", ") + folder.string();
  return text.empty() ? "no folder" : text;
}

// Plug-ins fill fixed arrays; what is not terminated is cut off.
template <size_t N>
std::string_view text_in(const char (&text)[N]) {
  std::string_view whole(text, N);
  return whole.substr(0, whole.find('\0'));
}

Errc code_for(DeviceStatus status) {
  switch (status) {
  case DeviceStatus::no_driver:
  case DeviceStatus::no_device:
    return Errc::not_found;
  case DeviceStatus::out_of_memory:
    return Errc::out_of_memory;
  case DeviceStatus::invalid_argument:
    return Errc::invalid_argument;
  default:
    return Errc::internal;
  }
}

// The error of a call that failed. Throws if the device went with it.
caf::error error_of(const char* what, DeviceStatus status, const DeviceError& error) {
  if (status == DeviceStatus::failed)
    throw DeviceLost(fmt::format("{}: {}", what, text_in(error.text)));
  return make_error(code_for(status), fmt::format("{}: {}", what, text_in(error.text)));
}

// For calls whose only failures are a lost device and our own mistakes.
void require(const char* what, DeviceStatus status, const DeviceError& error) {
  if (status != DeviceStatus::ok)
    throw DeviceLost(fmt::format("{}: {}", what, text_in(error.text)));
}

std::string cuda_version(int32_t version) {
  return version == 0 ? "none" : fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

// The plug-in's table, after checking that it is one and of our age.
caf::expected<const DevicePluginTable*> table_of(void* library, const fs::path& file) {
  auto get = reinterpret_cast<DevicePluginFunction>(dlsym(library, kDevicePluginSymbol));
  const DevicePluginTable* table = get == nullptr ? nullptr : get();
  if (table == nullptr)
    return make_error(Errc::malformed,
                      fmt::format("{}: not a device plug-in of Troupe: it {} {}", file.string(),
                                  get == nullptr ? "lacks the function" : "returned no table from",
                                  kDevicePluginSymbol));
  if (table->abi != kDeviceAbi)
    return make_error(
        Errc::mismatch,
        fmt::format("{}: the device plug-in speaks interface version {}, this program {}; both "
                    "must come from one build",
                    file.string(), table->abi, kDeviceAbi));
  if (table->table_bytes != sizeof(DevicePluginTable))
    return make_error(Errc::mismatch,
                      fmt::format("{}: the device plug-in's table has {} bytes, this program's "
                                  "{}; both must come from one build",
                                  file.string(), table->table_bytes, sizeof(DevicePluginTable)));
  return table;
}

} // namespace

std::string to_text(const DeviceReport& report) {
  std::string text =
      fmt::format("{}; driver {}, runtime {}\n", report.plugin, cuda_version(report.driver_version),
                  cuda_version(report.runtime_version));
  for (size_t i = 0; i < report.devices.size(); ++i) {
    const auto& device = report.devices[i];
    text += fmt::format("device {}: {}, compute {}.{}, {} multiprocessors, {:.1f} GiB\n", i,
                        text_in(device.name), device.compute_major, device.compute_minor,
                        device.num_multiprocessors,
                        static_cast<double>(device.memory_bytes) / (1 << 30));
  }
  return text;
}

std::vector<fs::path> DevicePlugin::search_path() {
  std::vector<fs::path> folders;
  std::error_code ignored; // without /proc there is no "next to the program"
  if (auto program = fs::read_symlink("/proc/self/exe", ignored); !program.empty())
    folders.push_back(program.parent_path());
  const char* variable = std::getenv("TROUPE_PLUGIN_PATH");
  std::string_view rest = variable == nullptr ? "" : variable;
  while (!rest.empty()) {
    auto folder = rest.substr(0, rest.find(':'));
    if (!folder.empty())
      folders.emplace_back(folder);
    rest.remove_prefix(std::min(rest.size(), folder.size() + 1));
  }
  return folders;
}

caf::expected<std::shared_ptr<const DevicePlugin>>
DevicePlugin::load(std::span<const fs::path> folders) {
  for (const auto& folder : folders) {
    std::error_code error;
    auto file = fs::absolute(folder / kDevicePluginFile, error);
    if (error || !fs::exists(file, error))
      continue;
    void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library == nullptr) {
      const char* why = dlerror();
      return make_error(Errc::malformed, fmt::format("{}: the device plug-in does not load: {}",
                                                     file.string(), why ? why : "unknown error"));
    }
    auto table = table_of(library, file);
    if (!table)
      return table.error();
    return std::shared_ptr<const DevicePlugin>(new DevicePlugin(*table, std::move(file)));
  }
  return make_error(Errc::not_found,
                    fmt::format("no device plug-in: {} is not in {}; build with TROUPE_CUDA=ON, or "
                                "name its folder in TROUPE_PLUGIN_PATH",
                                kDevicePluginFile, joined(folders)));
}

std::string DevicePlugin::description() const {
  return fmt::format("{} {} from {}", table_->name, table_->version, file_.string());
}

caf::expected<DeviceReport> DevicePlugin::probe() const {
  DeviceProbe found{};
  DeviceError error{};
  auto status = table_->probe(&found, &error);
  auto versions = fmt::format("driver {}, runtime {}", cuda_version(found.driver_version),
                              cuda_version(found.runtime_version));
  if (status == DeviceStatus::no_driver)
    return make_error(Errc::not_found,
                      fmt::format("no {} driver that can serve the plug-in ({}): {}", table_->name,
                                  versions, text_in(error.text)));
  if (status == DeviceStatus::no_device)
    return make_error(Errc::not_found, fmt::format("no {} device on this machine ({}): {}",
                                                   table_->name, versions, text_in(error.text)));
  if (status != DeviceStatus::ok)
    return error_of("looking for devices", status, error);
  DeviceReport report{description(), found.driver_version, found.runtime_version, {}};
  for (int32_t i = 0; i < found.num_devices; ++i) {
    DeviceInfo info{};
    if (auto described = table_->describe(i, &info, &error); described != DeviceStatus::ok)
      return error_of("asking for a device's properties", described, error);
    report.devices.push_back(info);
  }
  return report;
}

caf::expected<DevicePtr> Device::open(std::shared_ptr<const DevicePlugin> plugin,
                                      int32_t device_idx) {
  DeviceHandle* handle = nullptr;
  DeviceError error{};
  if (auto status = plugin->table().create(device_idx, &handle, &error); status != DeviceStatus::ok)
    return error_of(fmt::format("opening device {}", device_idx).c_str(), status, error);
  return DevicePtr(new Device(std::move(plugin), handle));
}

Device::~Device() { table().destroy(handle_); }

caf::expected<DeviceBuffer> Device::allocate(DeviceMemory kind, uint64_t bytes) {
  void* memory = nullptr;
  DeviceError error{};
  if (auto status = table().allocate(handle_, kind, bytes, &memory, &error);
      status != DeviceStatus::ok)
    return error_of(fmt::format("allocating {} bytes of {} memory", bytes,
                                kind == DeviceMemory::pinned ? "pinned" : "device")
                        .c_str(),
                    status, error);
  auto self = shared_from_this();
  return DeviceBuffer(
      std::shared_ptr<void>(
          memory, [self, kind](void* held) { self->table().release(self->handle_, kind, held); }),
      bytes);
}

caf::expected<DeviceQueue> Device::create_queue() {
  StreamHandle* handle = nullptr;
  DeviceError error{};
  if (auto status = table().create_stream(handle_, &handle, &error); status != DeviceStatus::ok)
    return error_of("creating a stream", status, error);
  return DeviceQueue(shared_from_this(), handle);
}

caf::expected<DeviceEvent> Device::create_event() {
  EventHandle* handle = nullptr;
  DeviceError error{};
  if (auto status = table().create_event(handle_, &handle, &error); status != DeviceStatus::ok)
    return error_of("creating an event", status, error);
  return DeviceEvent(shared_from_this(), handle);
}

DeviceEvent::DeviceEvent(DevicePtr device, EventHandle* handle)
    : device_(std::move(device)), handle_(handle, [device = device_](EventHandle* held) {
        device->table().destroy_event(held);
      }) {}

bool DeviceEvent::done() const {
  DeviceError error{};
  auto status = device_->table().query(handle_.get(), &error);
  if (status == DeviceStatus::not_ready)
    return false;
  require("asking for an event", status, error);
  return true;
}

caf::expected<double> DeviceEvent::elapsed_us_since(const DeviceEvent& earlier) const {
  double elapsed = 0;
  DeviceError error{};
  auto status = device_->table().elapsed_us(earlier.handle_.get(), handle_.get(), &elapsed, &error);
  if (status == DeviceStatus::not_ready)
    return make_error(Errc::invalid_argument, "the time between two events was asked for before "
                                              "both had happened");
  if (status != DeviceStatus::ok)
    return error_of("timing two events", status, error);
  return elapsed;
}

DeviceQueue::DeviceQueue(DevicePtr device, StreamHandle* handle)
    : device_(std::move(device)), handle_(handle, [device = device_](StreamHandle* held) {
        device->table().destroy_stream(held);
      }) {}

void DeviceQueue::copy(void* to, const void* from, uint64_t bytes) const {
  DeviceError error{};
  require("starting a copy", device_->table().copy(handle_.get(), to, from, bytes, &error), error);
}

void DeviceQueue::record(const DeviceEvent& event) const {
  DeviceError error{};
  require("recording an event", device_->table().record(handle_.get(), event.handle_.get(), &error),
          error);
}

void DeviceQueue::wait(const DeviceEvent& event) const {
  DeviceError error{};
  require("waiting for an event", device_->table().wait(handle_.get(), event.handle_.get(), &error),
          error);
}

void DeviceQueue::synchronize() const {
  DeviceError error{};
  require("waiting for a stream", device_->table().synchronize(handle_.get(), &error), error);
}

} // namespace troupe

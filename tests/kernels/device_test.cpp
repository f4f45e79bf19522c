// The loader and the program's side of the table, against plug-ins made for the purpose (plugins/),
// and the CUDA plug-in itself where this build has one.
#include "kernels/device.hpp"

#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

namespace fs = std::filesystem;
using namespace troupe;

namespace {

std::vector<fs::path> folder_of(const char* plugin) {
  return {fs::path(TROUPE_BINARY_DIR) / "test_plugins" / plugin};
}

std::shared_ptr<const DevicePlugin> load(const std::vector<fs::path>& folders) {
  auto plugin = DevicePlugin::load(folders);
  if (!plugin)
    FAIL(text_of(plugin.error()));
  return *plugin;
}

caf::error error_of_load(const std::vector<fs::path>& folders) {
  auto plugin = DevicePlugin::load(folders);
  REQUIRE_FALSE(plugin);
  return plugin.error();
}

DevicePtr open(const std::shared_ptr<const DevicePlugin>& plugin, int32_t device_idx) {
  auto device = Device::open(plugin, device_idx);
  if (!device)
    FAIL(text_of(device.error()));
  return *device;
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Host memory → pinned → device → device → pinned, on two queues that an event puts in order.
// What arrives is what was sent, and the events tell a time that is not negative.
void check_round_trip(const DevicePtr& device) {
  constexpr uint64_t kBytes = 100'003; // not a multiple of anything that could hide a cut tail
  std::vector<uint8_t> sent(kBytes), arrived(kBytes, 0);
  std::iota(sent.begin(), sent.end(), uint8_t{1});

  auto pinned = device->allocate(DeviceMemory::pinned, kBytes);
  auto first = device->allocate(DeviceMemory::device, kBytes);
  auto second = device->allocate(DeviceMemory::device, kBytes);
  auto upload = device->create_queue(), download = device->create_queue();
  auto start = device->create_event(), uploaded = device->create_event();
  REQUIRE((pinned && first && second && upload && download && start && uploaded));
  CHECK(first->size() == kBytes);
  CHECK(first->data() != second->data());
  CHECK(reinterpret_cast<uintptr_t>(first->data()) % 16 == 0);

  upload->record(*start);
  upload->copy(pinned->data(), sent.data(), kBytes);
  upload->copy(first->data(), pinned->data(), kBytes);
  upload->copy(second->data(), first->data(), kBytes);
  upload->record(*uploaded);
  download->wait(*uploaded);
  download->copy(arrived.data(), second->data(), kBytes);
  download->synchronize();

  CHECK(uploaded->done());
  CHECK(arrived == sent);
  auto elapsed = uploaded->elapsed_us_since(*start);
  REQUIRE(elapsed);
  CHECK(*elapsed >= 0);
}

} // namespace

TEST_CASE("without a plug-in the message names the file, the folders and the way out") {
  auto error = error_of_load({"/nowhere/a", "/nowhere/b"});
  CHECK(code_of(error) == Errc::not_found);
  CHECK(text_of(error) ==
        "no device plug-in: libtroupe_cuda.so is not in /nowhere/a, /nowhere/b; build with "
        "TROUPE_CUDA=ON, or name its folder in TROUPE_PLUGIN_PATH");
  CHECK(contains(text_of(error_of_load({})), "is not in no folder"));
}

TEST_CASE("a plug-in of another interface version is refused by both numbers") {
  auto error = error_of_load(folder_of("wrong_abi"));
  CHECK(code_of(error) == Errc::mismatch);
  CHECK(contains(text_of(error), "wrong_abi/libtroupe_cuda.so: the device plug-in speaks interface "
                                 "version " +
                                     std::to_string(kDeviceAbi + 1) + ", this program " +
                                     std::to_string(kDeviceAbi)));
}

TEST_CASE("a plug-in whose table has another size is refused before it is called") {
  auto error = error_of_load(folder_of("wrong_size"));
  CHECK(code_of(error) == Errc::mismatch);
  CHECK(contains(text_of(error), std::to_string(sizeof(DevicePluginTable))));
}

TEST_CASE("another library under the plug-in's name is refused") {
  auto error = error_of_load(folder_of("no_table"));
  CHECK(code_of(error) == Errc::malformed);
  CHECK(contains(text_of(error), "it lacks the function troupe_device_plugin"));
}

TEST_CASE("a file that is no library is refused with the linker's words, not passed over") {
  auto folder = fs::temp_directory_path() /
                ("troupe_device_test_" + std::to_string(reinterpret_cast<uintptr_t>(&contains)));
  fs::create_directories(folder);
  std::ofstream(folder / kDevicePluginFile) << "not a library\n";
  auto folders = folder_of("host");
  folders.insert(folders.begin(), folder);
  auto error = error_of_load(folders);
  fs::remove_all(folder);
  CHECK(code_of(error) == Errc::malformed);
  CHECK(contains(text_of(error), "does not load"));
}

TEST_CASE("folders are searched in order and those without a plug-in are passed over") {
  auto folders = folder_of("absent");
  folders.push_back(folder_of("host").front());
  folders.push_back(folder_of("wrong_abi").front());
  CHECK(contains(load(folders)->description(), "host 1 from "));
}

TEST_CASE("the search path is the program's folder, then TROUPE_PLUGIN_PATH") {
  const char* before = std::getenv("TROUPE_PLUGIN_PATH");
  std::string saved = before == nullptr ? "" : before;
  setenv("TROUPE_PLUGIN_PATH", "/one::/two three:", 1);
  auto folders = DevicePlugin::search_path();
  if (before == nullptr)
    unsetenv("TROUPE_PLUGIN_PATH");
  else
    setenv("TROUPE_PLUGIN_PATH", saved.c_str(), 1);
  REQUIRE(folders.size() == 3);
  CHECK(fs::equivalent(folders[0], TROUPE_BINARY_DIR));
  CHECK(folders[1] == "/one");
  CHECK(folders[2] == "/two three");
}

TEST_CASE("a machine without a driver is told so, with the versions") {
  auto report = load(folder_of("no_driver"))->probe();
  REQUIRE_FALSE(report);
  CHECK(code_of(report.error()) == Errc::not_found);
  CHECK(text_of(report.error()) == "no driverless driver that can serve the plug-in (driver none, "
                                   "runtime 13.0): cudaGetDeviceCount: no driver here");
}

TEST_CASE("a report names plug-in, versions and every device") {
  auto report = load(folder_of("host"))->probe();
  REQUIRE(report);
  auto text = to_text(*report);
  CHECK(contains(text, "; driver 13.1, runtime 13.0\n"));
  CHECK(contains(text, "device 0: host memory 0, compute 9.0, 1 multiprocessors, 1.0 GiB\n"));
  CHECK(contains(text, "device 1: host memory 1, "));
}

TEST_CASE("bytes survive the way to the device and back") {
  check_round_trip(open(load(folder_of("host")), 0));
}

TEST_CASE("a device with no room says so and goes on; what was lent comes back") {
  auto device = open(load(folder_of("host")), 0);
  for (int round = 0; round < 3; ++round) {
    auto most = device->allocate(DeviceMemory::device, 1 << 20);
    REQUIRE(most);
    auto more = device->allocate(DeviceMemory::device, 1);
    REQUIRE_FALSE(more);
    CHECK(code_of(more.error()) == Errc::out_of_memory);
    CHECK(text_of(more.error()) == "allocating 1 bytes of device memory: 1 MiB is all there is");
  }
}

TEST_CASE("what a device lent keeps it alive") {
  auto device = open(load(folder_of("host")), 0);
  auto buffer = device->allocate(DeviceMemory::pinned, 64);
  auto event = device->create_event();
  REQUIRE((buffer && event));
  std::weak_ptr<Device> watch = device;
  device.reset();
  CHECK_FALSE(watch.expired());
  *buffer = DeviceBuffer(); // the stand-in aborts if a device goes before its memory
  CHECK_FALSE(watch.expired());
}

TEST_CASE("an unknown device and an empty allocation are the caller's mistakes") {
  auto plugin = load(folder_of("host"));
  auto device = Device::open(plugin, 7);
  REQUIRE_FALSE(device);
  CHECK(code_of(device.error()) == Errc::invalid_argument);
  CHECK(text_of(device.error()) == "opening device 7: devices are 0 and 1");
  auto nothing = open(plugin, 0)->allocate(DeviceMemory::device, 0);
  REQUIRE_FALSE(nothing);
  CHECK(code_of(nothing.error()) == Errc::invalid_argument);
}

TEST_CASE("a lost device throws with the library's words") {
  auto device = open(load(folder_of("host")), 1);
  CHECK_THROWS_WITH_AS((void)device->create_queue(),
                       "creating a stream: an illegal memory access was encountered", DeviceLost);
}

TEST_CASE("the time between events that have not happened is refused") {
  auto device = open(load(folder_of("host")), 0);
  auto first = device->create_event(), second = device->create_event();
  REQUIRE((first && second));
  auto elapsed = second->elapsed_us_since(*first);
  REQUIRE_FALSE(elapsed);
  CHECK(code_of(elapsed.error()) == Errc::invalid_argument);
}

#ifdef TROUPE_CUDA_PLUGIN_DIR
TEST_CASE(
    "the CUDA plug-in runs where there is a GPU, and says what is missing where there is none") {
  auto plugin = load({TROUPE_CUDA_PLUGIN_DIR});
  CHECK(contains(plugin->description(), "cuda "));
  auto report = plugin->probe();
  if (!report) {
    auto text = text_of(report.error());
    CHECK(code_of(report.error()) == Errc::not_found);
    CHECK((contains(text, "no cuda driver that can serve the plug-in (driver ") ||
           contains(text, "no cuda device on this machine (driver ")));
    CHECK(contains(text, "cudaGetDeviceCount: "));
    auto device = Device::open(plugin, 0);
    REQUIRE_FALSE(device);
    CHECK(code_of(device.error()) == Errc::not_found);
    return;
  }
  MESSAGE(to_text(*report));
  auto num_devices = static_cast<int32_t>(report->devices.size());
  for (int32_t i = 0; i < num_devices; ++i) {
    auto device = open(plugin, i);
    check_round_trip(device);
    auto too_much = device->allocate(DeviceMemory::device, uint64_t{1} << 46);
    REQUIRE_FALSE(too_much);
    CHECK(code_of(too_much.error()) == Errc::out_of_memory);
    check_round_trip(device); // the refusal left the device as it was
  }
  auto absent = Device::open(plugin, num_devices);
  REQUIRE_FALSE(absent);
  CHECK(code_of(absent.error()) == Errc::invalid_argument);
}
#endif

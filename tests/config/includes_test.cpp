// Compares our #include lines and CMake link lines with the table of the house style:
//
//   config      nothing of ours; Protobuf, Boost.JSON, PCRE2, CAF's two value headers
//   transport   config; UCX, NCCL
//   kernels     config; intrinsics or Highway; CUDA in the plug-in, and nothing else there
//   actors      config, transport, kernels; CAF, Boost.Asio and Beast
//   apps        all; an option parser, a progress bar
//
// fmt (std::format is not in g++ 12) and xxHash (checksums) know nothing of what they serve, and
// are open to all. Tests of a folder live under its row, so that kernels are also tested without a
// network library.
#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <regex>
#include <sstream>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;
using Words = std::vector<std::string>;

// What one folder may use. A header that ends in '/' stands for all below it.
struct Row {
  Words folders; // of ours
  Words headers; // of third parties, besides kEverybody
  Words links;   // of its CMake library, besides kLinksOfAll
  bool sockets = false;
};

const Words kFolders = {"config", "transport", "kernels", "actors", "apps", "tests"};
const Words kEverybody = {"fmt/", "xxhash.h", "caf/error.hpp", "caf/expected.hpp"};
const Words kLinksOfAll = {"troupe_flags", "fmt::fmt", "PkgConfig::XXHASH", "Threads::Threads"};

const std::map<std::string, Row> kTable = {
    {"config",
     {{"config"},
      {"google/protobuf/", "boost/json.hpp", "boost/json/", "pcre2.h"},
      {"CAF::core", "protobuf::libprotobuf", "Boost::json", "PkgConfig::PCRE2"}}},
    {"transport",
     {{"config", "transport"},
      {"ucp/", "ucs/", "uct/", "nccl.h"},
      {"troupe_config", "ucx::ucp", "ucx::ucs"},
      true}},
    {"kernels",
     {{"config", "kernels"},
      {"immintrin.h", "cpuid.h", "hwy/"},
      {"troupe_config", "hwy::hwy", "${CMAKE_DL_LIBS}"}}},
    {"kernels/cuda", {{"kernels"}, {"cuda", "cublas", "cub/"}, {}}},
    {"actors",
     {{"config", "transport", "kernels", "actors"},
      {"caf/", "boost/asio.hpp", "boost/asio/", "boost/beast.hpp", "boost/beast/", "boost/json.hpp",
       "boost/json/", "spdlog/"},
      {"troupe_config", "troupe_kernels", "troupe_transport", "CAF::core", "CAF::io",
       "CAF::openssl", "Boost::headers", "Boost::json", "spdlog::spdlog"},
      true}},
    {"apps",
     {{"config", "transport", "kernels", "actors", "apps"},
      {"caf/", "boost/", "spdlog/", "CLI/", "openssl/"},
      {"troupe_config", "troupe_kernels", "troupe_transport", "troupe_actors", "CLI11::CLI11",
       "Boost::headers", "Boost::json", "spdlog::spdlog", "OpenSSL::SSL", "OpenSSL::Crypto",
       "CAF::core", "CAF::io", "CAF::openssl"},
      true}},
};

// Errors are made here, so this file alone looks inside CAF's value types.
const std::map<std::string, Words> kExceptions = {
    {"config/errors.cpp",
     {"caf/atom.hpp", "caf/deep_to_string.hpp", "caf/make_message.hpp", "caf/message.hpp"}},
};

// The operating system's own. Whoever computes or reads files needs no sockets.
const Words kSystem = {"sys/",    "linux/",   "sanitizer/", "stdlib.h",  "dlfcn.h",  "fcntl.h",
                       "sched.h", "signal.h", "poll.h",     "pthread.h", "unistd.h", "errno.h",
                       "elf.h",   "dirent.h", "spawn.h",    "pty.h"};
const Words kSockets = {"sys/socket.h", "sys/un.h",  "netinet/", "arpa/",
                        "netdb.h",      "ifaddrs.h", "net/if.h", "linux/if"};

bool matches(const Words& patterns, const std::string& header) {
  return std::any_of(patterns.begin(), patterns.end(), [&](const std::string& pattern) {
    bool whole = pattern.find('.') != std::string::npos;
    return whole ? header == pattern : header.rfind(pattern, 0) == 0;
  });
}

bool has(const Words& words, const std::string& word) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

// The row that governs a file: its folder's, or for a test the row of what it tests (tests/fuzz,
// tests/bench and tests/apps see all) with the test library added.
Row row_of(const std::string& file) {
  if (file.rfind("kernels/cuda/", 0) == 0)
    return kTable.at("kernels/cuda");
  auto folder = file.substr(0, file.find('/'));
  if (folder != "tests")
    return kTable.at(folder);
  auto rest = file.substr(folder.size() + 1);
  auto tested = rest.substr(0, rest.find('/'));
  bool known = tested != rest && kTable.count(tested) != 0;
  Row row = kTable.at(known ? tested : "apps");
  row.folders.push_back("tests");
  row.headers.push_back("doctest/");
  // A test may write the files its folder reads.
  row.headers.insert(row.headers.end(), {"boost/json.hpp", "boost/json/"});
  if (tested == "bench")
    row.headers.insert(row.headers.end(), {"oneapi/dnnl/", "dnnl.hpp"});
  return row;
}

// Why `file` (a path from the root) may not hold this line; nothing if it may.
std::optional<std::string> violation(const std::string& file, const std::string& line) {
  static const std::regex kInclude(R"(^\s*#\s*include\b\s*(.*)$)");
  static const std::regex kTarget(R"(^([<"])([^>"]+)[>"].*$)");
  std::smatch include, target;
  if (!std::regex_match(line, include, kInclude))
    return std::nullopt;
  std::string rest = include[1];
  if (!std::regex_match(rest, target, kTarget))
    return "names its header through a macro";
  bool quoted = target[1] == "\"";
  std::string header = target[2];
  auto row = row_of(file);

  auto folder = header.substr(0, header.find('/'));
  if (quoted || (folder != header && has(kFolders, folder))) {
    if (!quoted)
      return "includes ours in angle brackets: " + header;
    if (folder == header || !has(kFolders, folder))
      return "includes ours by another path than from the root: " + header;
    if (!has(row.folders, folder))
      return "may not include " + folder + "/: " + header;
    return std::nullopt;
  }
  bool standard = header.find_first_of("./") == std::string::npos;
  if (matches(row.headers, header) || matches(kEverybody, header))
    return std::nullopt;
  if (standard && header.rfind("cuda", 0) != 0)
    return std::nullopt;
  if (auto exception = kExceptions.find(file);
      exception != kExceptions.end() && has(exception->second, header))
    return std::nullopt;
  if (matches(kSockets, header))
    return row.sockets ? std::nullopt : std::optional("may not use sockets: " + header);
  if (matches(kSystem, header))
    return std::nullopt;
  return "may not use this library: " + header;
}

// Every library on a link line of `target` in this CMakeLists.txt that the row does not allow.
Words forbidden_links(const std::string& cmake, const std::string& target, const Row& row) {
  static const std::regex kComment(R"(#[^\n]*)");
  auto text = std::regex_replace(cmake, kComment, "");
  std::regex call(R"(target_link_libraries\(\s*)" + target + R"(\s([^)]*)\))");
  Words forbidden;
  for (std::sregex_iterator it(text.begin(), text.end(), call), end; it != end; ++it) {
    std::istringstream words((*it)[1].str());
    for (std::string word; words >> word;)
      if (!has({"PUBLIC", "PRIVATE", "INTERFACE"}, word) && !has(row.links, word) &&
          !has(kLinksOfAll, word))
        forbidden.push_back(word);
  }
  return forbidden;
}

std::string read(const fs::path& path) {
  std::ifstream in(path);
  REQUIRE_MESSAGE(in, path.string());
  return {std::istreambuf_iterator<char>(in), {}};
}

bool allowed(const std::string& file, const std::string& line) { return !violation(file, line); }

} // namespace

TEST_CASE("every include line in the tree follows the table of folders") {
  const fs::path root = TROUPE_SOURCE_DIR;
  const Words endings = {".hpp", ".cpp", ".h", ".cu", ".cuh"};
  int num_files = 0, num_includes = 0;
  for (const auto& folder : kFolders)
    for (const auto& entry : fs::recursive_directory_iterator(root / folder)) {
      if (!entry.is_regular_file() || !has(endings, entry.path().extension().string()))
        continue;
      ++num_files;
      auto file = fs::relative(entry.path(), root).generic_string();
      std::istringstream lines(read(entry.path()));
      int number = 0;
      for (std::string line; std::getline(lines, line);) {
        ++number;
        num_includes += line.rfind("#include", 0) == 0;
        auto why = violation(file, line);
        CHECK_MESSAGE(!why, file << ":" << number << ": " << why.value_or(""));
      }
    }
  CHECK(num_files > 50); // the walk found the tree
  CHECK(num_includes > 300);
}

TEST_CASE("every folder's library links only what its row allows") {
  const fs::path root = TROUPE_SOURCE_DIR;
  for (const Words& pair : std::vector<Words>{{"config", "troupe_config"},
                                              {"transport", "troupe_transport"},
                                              {"kernels", "troupe_kernels"},
                                              {"kernels/cuda", "troupe_cuda"},
                                              {"actors", "troupe_actors"},
                                              {"apps", "troupe"}}) {
    auto cmake = read(root / pair[0] / "CMakeLists.txt");
    CAPTURE(pair[0]);
    CHECK(forbidden_links(cmake, pair[1], kTable.at(pair[0])) == Words{});
    // The call is there under that name, so that the check above looked at something.
    if (pair[0] != "kernels/cuda")
      CHECK(cmake.find("target_link_libraries(" + pair[1]) != std::string::npos);
  }
}

TEST_CASE("the checker refuses what the table does not allow") {
  // Upwards and sideways.
  CHECK_FALSE(allowed("config/ids.hpp", "#include \"kernels/gate.hpp\""));
  CHECK_FALSE(allowed("kernels/gate.cpp", "#include \"transport/fabric.hpp\""));
  CHECK_FALSE(allowed("transport/wire.cpp", "#include \"kernels/gate.hpp\""));
  CHECK_FALSE(allowed("actors/rank.cpp", "#include \"apps/options.hpp\""));
  CHECK_FALSE(allowed("kernels/gate.cpp", "#include \"tests/kernels/tensors.hpp\""));
  // Other people's.
  CHECK_FALSE(allowed("config/ids.hpp", "#include <caf/all.hpp>"));
  CHECK_FALSE(allowed("config/json.cpp", "#include <caf/message.hpp>"));
  CHECK_FALSE(allowed("kernels/gate.cpp", "#include <caf/actor.hpp>"));
  CHECK_FALSE(allowed("kernels/gate.cpp", "#include <ucp/api/ucp.h>"));
  CHECK_FALSE(allowed("kernels/gate.cpp", "#include <cuda_runtime_api.h>"));
  CHECK_FALSE(allowed("kernels/cuda/gate.cu", "#include <nccl.h>"));
  CHECK_FALSE(allowed("kernels/cuda/gate.cu", "#include \"config/ids.hpp\""));
  CHECK_FALSE(allowed("transport/wire.cpp", "#include <immintrin.h>"));
  CHECK_FALSE(allowed("actors/rank.cpp", "#include <ucp/api/ucp.h>"));
  CHECK_FALSE(allowed("actors/rank.cpp", "#include <CLI/CLI.hpp>"));
  CHECK_FALSE(allowed("apps/main.cpp", "#include <oneapi/dnnl/dnnl.hpp>"));
  CHECK_FALSE(allowed("actors/rank.cpp", "#include <some_library.h>"));
  CHECK_FALSE(allowed("kernels/load.cpp", "#include <sys/socket.h>"));
  // However it is written.
  CHECK_FALSE(allowed("config/a.hpp", "  #  include\t<spdlog/spdlog.h> // why not"));
  CHECK_FALSE(allowed("config/a.hpp", "#include\"actors/view.hpp\""));
  CHECK_FALSE(allowed("config/a.hpp", "#include \"ids.hpp\""));
  CHECK_FALSE(allowed("config/a.hpp", "#include \"../config/ids.hpp\""));
  CHECK_FALSE(allowed("config/a.hpp", "#include <config/ids.hpp>"));
  CHECK_FALSE(allowed("config/a.hpp", "#include SOME_HEADER"));
  // Tests live under the row of what they test.
  CHECK_FALSE(allowed("tests/kernels/gate_test.cpp", "#include \"transport/fabric.hpp\""));
  CHECK_FALSE(allowed("tests/config/json_test.cpp", "#include <caf/actor.hpp>"));
  CHECK_FALSE(allowed("tests/kernels/gate_test.cpp", "#include <oneapi/dnnl/dnnl.hpp>"));
}

TEST_CASE("the checker allows what the table allows") {
  CHECK(allowed("config/a.cpp", "#include \"config/ids.hpp\""));
  CHECK(allowed("config/a.cpp", "#include \"config/cluster.pb.h\""));
  CHECK(allowed("config/a.cpp", "#include <google/protobuf/text_format.h>"));
  CHECK(allowed("config/a.hpp", "#include <caf/expected.hpp>"));
  CHECK(allowed("config/errors.cpp", "#include <caf/message.hpp>"));
  CHECK(allowed("config/a.cpp", "#include <sys/mman.h>"));
  CHECK(allowed("config/a.cpp", "#include <vector>"));
  CHECK(allowed("transport/a.cpp", "#include <ucp/api/ucp.h>"));
  CHECK(allowed("transport/a.cpp", "#include <sys/socket.h>"));
  CHECK(allowed("kernels/a.cpp", "#include <immintrin.h>"));
  CHECK(allowed("kernels/cuda/a.cu", "#include <cuda_runtime_api.h>"));
  CHECK(allowed("actors/a.cpp", "#include <boost/beast/http.hpp>"));
  CHECK(allowed("actors/a.cpp", "#include \"kernels/backend.hpp\""));
  CHECK(allowed("apps/a.cpp", "#include <CLI/CLI.hpp>"));
  CHECK(allowed("tests/kernels/a_test.cpp", "#include <doctest/doctest.h>"));
  CHECK(allowed("tests/bench/a_bench.cpp", "#include <oneapi/dnnl/dnnl.hpp>"));
  CHECK(allowed("tests/bench/a_bench.cpp", "#include \"kernels/backend.hpp\""));
  CHECK(allowed("config/a.cpp", "// #include <caf/all.hpp>"));
  CHECK(allowed("config/a.cpp", "#include_next_to_nothing"));
}

TEST_CASE("the checker of link lines sees every call and no comment") {
  const auto& row = kTable.at("kernels");
  CHECK(forbidden_links("target_link_libraries(troupe_kernels PUBLIC troupe_config\n"
                        "  PRIVATE hwy::hwy)",
                        "troupe_kernels", row) == Words{});
  CHECK(forbidden_links("target_link_libraries(troupe_kernels PUBLIC troupe_config)\n"
                        "# target_link_libraries(troupe_kernels PUBLIC CAF::io)\n"
                        "target_link_libraries(troupe_kernels\n  PRIVATE ucx::ucp troupe_actors)",
                        "troupe_kernels", row) == Words{"ucx::ucp", "troupe_actors"});
}

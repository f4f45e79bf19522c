// The whole runtime against transformers: the checkpoints of tests/reference/data, made together
// with what transformers computes for them (tests/reference/make_fixtures.py).
#include "actors/in_process_cluster.hpp"
#include "config/safetensors.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

using namespace troupe;

namespace {

// The specification alone gave 1e-5 (§12); F32 in another order of summation can't give less than
// a few 1e-7.
constexpr double kTolerance = 5e-5;
// BF16 keeps 8 bits: each of the ~12 roundings of a layer moves a value by up to 2^-9 of itself,
// and independent errors add up as a square root over two or three layers.
constexpr double kBf16Tolerance = 0.05;

std::vector<std::filesystem::path> fixtures() {
  std::vector<std::filesystem::path> list;
  for (const auto& entry :
       std::filesystem::directory_iterator{TROUPE_SOURCE_DIR "/tests/reference/data"})
    if (std::filesystem::exists(entry.path() / "expected.safetensors"))
      list.push_back(entry.path());
  std::sort(list.begin(), list.end());
  return list;
}

struct Expected {
  std::shared_ptr<const SafetensorsFile> file;
  explicit Expected(const std::filesystem::path& folder) {
    auto opened = SafetensorsFile::open(folder / "expected.safetensors");
    REQUIRE(opened);
    file = *opened;
  }
  template <class T>
  [[nodiscard]] std::vector<T> values(const std::string& name) const {
    for (const auto& entry : file->header().entries)
      if (entry.name == name) {
        std::vector<T> out(static_cast<size_t>(entry.num_bytes) / sizeof(T));
        std::memcpy(out.data(), file->bytes(entry).data(), static_cast<size_t>(entry.num_bytes));
        return out;
      }
    return {};
  }
};

double difference(const std::vector<float>& got, const std::vector<float>& reference) {
  REQUIRE(got.size() == reference.size());
  double worst = 0, largest = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    worst = std::max(worst, std::fabs(double{got[i]} - double{reference[i]}));
    largest = std::max(largest, std::fabs(double{reference[i]}));
  }
  return worst / largest;
}

std::unique_ptr<InProcessCluster> cluster_of(const std::filesystem::path& model, DType compute) {
  ClusterOptions options;
  options.model = model.string();
  options.shape.num_ranks = 2;
  options.compute = compute;
  options.num_threads = 1;
  options.limits.kv_tokens = 256;
  options.cluster_token = "test";
  auto cluster = InProcessCluster::start(options);
  if (!cluster)
    FAIL(model.filename().string() << ": " << text_of(cluster.error()));
  return std::move(*cluster);
}

std::map<std::string, std::vector<float>> score(ClusterClient& client,
                                                const std::vector<int32_t>& tokens) {
  RequestSpec spec;
  spec.prompt = tokens;
  spec.logits = true;
  spec.hidden_states = true;
  REQUIRE(client.submit(spec));
  std::map<std::string, std::vector<float>> rows;
  RequestHandlers handlers;
  handlers.on_rows = [&](const RowsReady& ready) {
    auto& to = rows[ready.name];
    const auto old = to.size();
    to.resize(old + ready.bytes.size() / sizeof(float));
    std::memcpy(to.data() + old, ready.bytes.data(), ready.bytes.size());
  };
  const auto done = client.wait(handlers);
  REQUIRE(done);
  REQUIRE(done->error == "");
  return rows;
}

} // namespace

TEST_CASE("logits and hidden states of every family agree with transformers") {
  const auto folders = fixtures();
  REQUIRE(folders.size() >= 10);
  for (const auto& folder : folders) {
    CAPTURE(folder.filename().string());
    const Expected expected{folder};
    auto cluster = cluster_of(folder, DType::f32);
    auto rows = score(cluster->client(), expected.values<int32_t>("tokens"));
    CHECK(difference(rows["logits"], expected.values<float>("logits")) < kTolerance);
    size_t states = 0;
    for (; !expected.values<float>("hidden." + std::to_string(states)).empty(); ++states) {
      const auto name = "hidden." + std::to_string(states);
      CHECK(difference(rows[name], expected.values<float>(name)) < kTolerance);
    }
    CHECK(states >= 3);
  }
}

TEST_CASE("greedy continuations equal those of transformers") {
  for (const auto& folder : fixtures()) {
    CAPTURE(folder.filename().string());
    const Expected expected{folder};
    auto cluster = cluster_of(folder, DType::f32);
    RequestSpec spec;
    spec.prompt = expected.values<int32_t>("prompt");
    const auto greedy = expected.values<int32_t>("greedy");
    spec.max_tokens = static_cast<int32_t>(greedy.size());
    spec.ignore_eos = true;
    REQUIRE(cluster->client().submit(spec));
    std::vector<int32_t> answer;
    RequestHandlers handlers;
    handlers.on_tokens = [&](const TokensReady& news) {
      answer.insert(answer.end(), news.tokens.begin(), news.tokens.end());
    };
    REQUIRE(cluster->client().wait(handlers));
    CHECK(answer == greedy);
  }
}

TEST_CASE("BF16 stays within its rounding of the reference") {
  for (const auto* name : {"v3", "v2", "moonlight", "v3_bf16", "v3_fp8"}) {
    CAPTURE(name);
    const std::filesystem::path folder =
        std::filesystem::path{TROUPE_SOURCE_DIR "/tests/reference/data"} / name;
    const Expected expected{folder};
    auto cluster = cluster_of(folder, DType::bf16);
    auto rows = score(cluster->client(), expected.values<int32_t>("tokens"));
    const auto reference = expected.values<float>("logits");
    // A near tie in the gate may flip under rounding and change a row for good, so the bound is
    // on the root mean square and not on the largest difference.
    double square = 0, largest = 0;
    for (size_t i = 0; i < reference.size(); ++i) {
      const double d = double{rows["logits"][i]} - double{reference[i]};
      square += d * d;
      largest = std::max(largest, std::fabs(double{reference[i]}));
    }
    const double rms = std::sqrt(square / static_cast<double>(reference.size())) / largest;
    CAPTURE(rms);
    CHECK(rms < kBf16Tolerance);
    CHECK(rms > 0);
  }
}

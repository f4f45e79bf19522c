// One linear layer over FP8 weights against its float64 emulation
// (tests/reference/README.md, fp8_linear.safetensors).
#include "config/safetensors.hpp"
#include "kernels/backend.hpp"
#include "tests/kernels/random_tensors.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

using namespace troupe;
using namespace troupe::test;

namespace {

constexpr int64_t kRows = 5, kIn = 300, kOut = 200, kTiles = 3;
// Sums of 300 products in FP32 against float64. Quantizing the activations moves y by 2.6e-2.
constexpr float kTolerance = 2e-6f;

// The tensors of one kind of scale: any float (no suffix), or powers of two ("_ue8m0").
class Fixture {
public:
  explicit Fixture(std::string suffix) : suffix_(std::move(suffix)) {
    auto opened =
        SafetensorsFile::open(TROUPE_SOURCE_DIR "/tests/reference/data/fp8_linear.safetensors");
    REQUIRE(opened);
    file_ = *opened;
  }
  [[nodiscard]] bool power_of_two() const { return !suffix_.empty(); }
  [[nodiscard]] std::span<const std::byte> bytes(const std::string& name, size_t expected) const {
    for (const auto& entry : file_->header().entries)
      if (entry.name == name) {
        REQUIRE(file_->bytes(entry).size() == expected);
        return file_->bytes(entry);
      }
    FAIL("fp8_linear.safetensors lacks " << name);
    return {};
  }
  [[nodiscard]] const std::byte* x() const { return bytes("x", kRows * kIn * 2).data(); }
  [[nodiscard]] std::span<const std::byte> x_codes() const {
    return bytes("x_codes" + suffix_, kRows * kIn);
  }
  [[nodiscard]] std::span<const std::byte> x_scales() const {
    return bytes("x_scales" + suffix_, kRows * kTiles * sizeof(float));
  }
  [[nodiscard]] std::vector<float> floats(const std::string& name) const {
    const auto from = bytes(name + suffix_, kRows * kOut * sizeof(float));
    std::vector<float> out(kRows * kOut);
    std::memcpy(out.data(), from.data(), from.size());
    return out;
  }
  [[nodiscard]] Weight weight() const {
    WeightSource source;
    source.data = bytes("weight" + suffix_, kOut * kIn).data();
    source.scales = bytes("weight" + suffix_ + "_scale_inv", 2 * kTiles * sizeof(float)).data();
    source.dtype = DType::f8_e4m3;
    source.total_rows = source.rows = kOut;
    source.total_cols = source.cols = kIn;
    Weight w;
    w.m.n = kOut;
    w.m.k = kIn;
    w.m.dtype = DType::f8_e4m3;
    w.m.segments = whole_k(kIn);
    w.memory = AlignedBytes(packed_bytes(w.m));
    REQUIRE(!pack(w.m, {&source, 1}, w.memory.data(), 0, w.m.panels()));
    return w;
  }

private:
  std::string suffix_;
  std::shared_ptr<const SafetensorsFile> file_;
};

float error(const std::vector<float>& ours, const std::vector<float>& expected) {
  float worst = 0, largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const float difference = std::fabs(ours[i] - expected[i]);
    worst = difference <= worst ? worst : difference; // NaN counts as larger
    largest = std::max(largest, std::fabs(expected[i]));
  }
  return std::isnan(worst) ? INFINITY : worst / largest;
}

std::vector<float> linear(const Backend& backend, const Weight& w, Rows x, QuantizedRows xq) {
  std::vector<float> y(kRows * kOut);
  InlineWorkers workers;
  backend.linear({kRows, x, xq, &w.m, {y.data(), DType::f32, kOut}, {}}, workers);
  return y;
}

} // namespace

TEST_CASE("a linear over FP8 weights is that of the float64 emulation") {
  for (const std::string suffix : {"", "_ue8m0"}) {
    CAPTURE(suffix);
    const Fixture fixture{suffix};
    const Weight w = fixture.weight();
    const Rows x{fixture.x(), DType::bf16, kIn};
    for (const auto& name : available_backends()) {
      CAPTURE(name);
      const auto& backend = *find_backend(name);
      std::vector<uint8_t> codes(kRows * kIn);
      std::vector<float> scales(kRows * kTiles);
      InlineWorkers workers;
      backend.quantize(
          {kRows, kIn, x, fixture.power_of_two(), codes.data(), scales.data(), kIn, kTiles},
          workers);
      CHECK(std::ranges::equal(std::as_bytes(std::span{codes}), fixture.x_codes()));
      CHECK(std::ranges::equal(std::as_bytes(std::span{scales}), fixture.x_scales()));
      const QuantizedRows xq{codes.data(), scales.data(), kIn, kTiles};
      CHECK(error(linear(backend, w, {}, xq), fixture.floats("y")) <= kTolerance);
      CHECK(error(linear(backend, w, x, {}), fixture.floats("y_weight_only")) <= kTolerance);
    }
  }
}

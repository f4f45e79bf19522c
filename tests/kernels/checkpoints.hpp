// Small checkpoints on disk for kernel tests, and ways to spoil them.
#pragma once

#include "config/checkpoint.hpp"
#include "config/checkpoint_init.hpp"
#include "config/presets.hpp"

#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace troupe::test {

// A folder of its own, gone at the end of the scope.
class TempFolder {
public:
  TempFolder() {
    auto pattern = (std::filesystem::temp_directory_path() / "troupe-test-XXXXXX").string();
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  ~TempFolder() {
    std::error_code ignored; // a folder that stays behind fails no test
    std::filesystem::remove_all(path_, ignored);
  }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

private:
  std::filesystem::path path_;
};

inline std::shared_ptr<const Checkpoint> open_checkpoint(const std::filesystem::path& folder) {
  auto checkpoint = Checkpoint::open(folder);
  if (!checkpoint)
    FAIL(text_of(checkpoint.error()));
  return *checkpoint;
}

// A random checkpoint of a configuration; its files live as long as the object.
class RandomCheckpoint {
public:
  RandomCheckpoint(ModelConfig config, WeightFormat format, uint64_t seed = 1) {
    if (format == WeightFormat::fp8 && !config.quantization)
      config.quantization = QuantizationConfig{};
    InitOptions options;
    options.format = format;
    options.seed = seed;
    if (auto error = init_checkpoint(config, folder(), options))
      FAIL(text_of(error));
    checkpoint_ = open_checkpoint(folder());
  }
  RandomCheckpoint(const char* name, WeightFormat format, uint64_t seed = 1)
      : RandomCheckpoint(preset(name).value(), format, seed) {}

  [[nodiscard]] const std::shared_ptr<const Checkpoint>& get() const { return checkpoint_; }
  const Checkpoint& operator*() const { return *checkpoint_; }
  const Checkpoint* operator->() const { return checkpoint_.get(); }
  [[nodiscard]] std::filesystem::path folder() const { return files_.path() / "model"; }

private:
  TempFolder files_;
  std::shared_ptr<const Checkpoint> checkpoint_;
};

// Another checkpoint with some tensors hidden or replaced.
class EditedCheckpoint final : public Checkpoint {
public:
  explicit EditedCheckpoint(std::shared_ptr<const Checkpoint> base) : base_(std::move(base)) {}

  void hide(const std::string& name) { hidden_.insert(name); }
  // A copy of the tensor that the test may change.
  struct Edited {
    std::vector<std::byte> bytes;
    TensorView view;
  };
  Edited& edit(const std::string& name) {
    auto& edited = edited_[name];
    const auto* original = base_->find(name);
    REQUIRE(original != nullptr);
    edited.view = *original;
    edited.bytes.assign(original->bytes.begin(), original->bytes.end());
    edited.view.bytes = edited.bytes;
    return edited;
  }

  [[nodiscard]] const ModelConfig& config() const override { return base_->config(); }
  [[nodiscard]] int64_t num_mtp_layers() const override { return base_->num_mtp_layers(); }
  [[nodiscard]] const TensorView* find(std::string_view name) const override {
    const std::string key{name};
    if (hidden_.contains(key))
      return nullptr;
    const auto it = edited_.find(key);
    return it != edited_.end() ? &it->second.view : base_->find(name);
  }
  [[nodiscard]] const std::vector<std::filesystem::path>& files() const override {
    return base_->files();
  }
  [[nodiscard]] uint64_t digest() const override { return base_->digest(); }
  // Edited tensors lie on the heap, where forgetting pages would lose them.
  void release(std::span<const std::byte> bytes) const override {
    for (const auto& [name, edited] : edited_)
      if (bytes.data() >= edited.bytes.data() &&
          bytes.data() < edited.bytes.data() + edited.bytes.size())
        return;
    base_->release(bytes);
  }

private:
  std::shared_ptr<const Checkpoint> base_;
  std::set<std::string> hidden_;
  std::map<std::string, Edited> edited_;
};

} // namespace troupe::test

#include "actors/train_checkpoint.hpp"

#include "actors/train_shard.hpp"
#include "config/json.hpp"

#include <fmt/format.h>
#include <xxhash.h>

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <map>

namespace troupe {

namespace fs = std::filesystem;
namespace json = boost::json;

namespace {

constexpr const char* kStateFile = "state.json";
constexpr std::string_view kPrefix = "step-";
const std::string kTemporary = ".tmp-";
constexpr std::array kTokenizerFiles = {"tokenizer.json",         "tokenizer_config.json",
                                        "tiktoken.model",         "special_tokens_map.json",
                                        "generation_config.json", "chat_template.jinja"};

caf::error io_error(const fs::path& path, const std::string& what) {
  return make_error(Errc::io_error, fmt::format("{}: {}", path.string(), what));
}

caf::error synchronize(const fs::path& path, bool folder) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | (folder ? O_DIRECTORY : 0));
  if (fd < 0)
    return io_error(path, std::strerror(errno));
  const int result = fsync(fd);
  const int why = errno;
  close(fd);
  return result == 0 ? caf::error{} : io_error(path, std::strerror(why));
}

caf::error write_text(const fs::path& path, const std::string& text) {
  std::ofstream file{path, std::ios::binary | std::ios::trunc};
  file << text;
  file.close();
  return file ? caf::error{} : io_error(path, "can't be written");
}

caf::expected<uint64_t> checksum(const fs::path& path) {
  std::ifstream file{path, std::ios::binary};
  if (!file)
    return io_error(path, "can't be read");
  XXH3_state_t* state = XXH3_createState();
  XXH3_64bits_reset(state);
  std::vector<char> piece(size_t{1} << 20);
  while (file.read(piece.data(), static_cast<std::streamsize>(piece.size())) || file.gcount() > 0)
    XXH3_64bits_update(state, piece.data(), static_cast<size_t>(file.gcount()));
  const uint64_t sum = XXH3_64bits_digest(state);
  XXH3_freeState(state);
  if (file.bad()) // a disk's error is no end of the file
    return io_error(path, "can't be read");
  return sum;
}

std::string folder_name(int64_t step) { return fmt::format("{}{:08}", kPrefix, step); }

std::optional<int64_t> step_of(const fs::path& folder) {
  const auto name = folder.filename().string();
  int64_t step = 0;
  if (!name.starts_with(kPrefix))
    return std::nullopt;
  const char* end = name.data() + name.size();
  const auto [last, error] = std::from_chars(name.data() + kPrefix.size(), end, step);
  return error == std::errc{} && last == end ? std::optional{step} : std::nullopt;
}

// Checkpoints in `out`, the newest first.
std::vector<std::pair<int64_t, fs::path>> checkpoints(const fs::path& out) {
  std::vector<std::pair<int64_t, fs::path>> found;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator{out, error})
    if (const auto step = step_of(entry.path()))
      found.emplace_back(*step, entry.path());
  std::ranges::sort(found, std::greater{});
  return found;
}

// Ranks on other hosts may have written to a folder of theirs that has the same name.
caf::error check_shards(const fs::path& folder, const std::vector<ShardSaved>& shards) {
  for (const auto& shard : shards) {
    if (shard.tensors.empty())
      continue;
    for (const auto& file :
         {folder / shard_file_name(shard.rank.value, static_cast<int32_t>(shards.size())),
          folder / "training" / training_file_name(shard.rank.value)})
      if (!fs::exists(file))
        return io_error(file, fmt::format("rank {} wrote it, but it is not here; do all hosts have "
                                          "the same file system there?",
                                          shard.rank.value));
  }
  return {};
}

// config.json, index and tokenizer of a model folder.
caf::error complete_model(const fs::path& folder, const TrainSetup& setup,
                          const std::vector<ShardSaved>& shards) {
  auto config = setup.model;
  config.torch_dtype = setup.config.compute == ComputePrecision::f32 ? "float32" : "bfloat16";
  config.quantization.reset();
  if (auto error = write_text(folder / "config.json", to_json(config)))
    return error;
  json::object weight_map;
  int64_t total = 0;
  for (const auto& shard : shards) {
    total += shard.bytes;
    for (const auto& tensor : shard.tensors)
      weight_map[tensor] = shard_file_name(shard.rank.value, static_cast<int32_t>(shards.size()));
  }
  const json::object index{{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
  if (auto error = write_text(folder / "model.safetensors.index.json", pretty(index)))
    return error;
  if (setup.tokenizer.empty())
    return {};
  for (const char* name : kTokenizerFiles) {
    std::error_code error;
    if (!fs::is_regular_file(setup.tokenizer / name, error))
      continue;
    fs::copy_file(setup.tokenizer / name, folder / name, fs::copy_options::overwrite_existing,
                  error);
    if (error)
      return io_error(folder / name, error.message());
  }
  return {};
}

// state.json holds its own checksum: of its text with zeros in the checksum's place.
const std::string kNoChecksum(16, '0');

std::string text_checksum(const std::string& text) {
  return fmt::format("{:016x}", XXH3_64bits(text.data(), text.size()));
}

// Where the digits begin; npos in a file that has none.
size_t checksum_place(const std::string& text) {
  constexpr std::string_view kMark = "\"checksum\": \"";
  const auto found = text.find(kMark);
  if (found == std::string::npos || found + kMark.size() + kNoChecksum.size() > text.size())
    return std::string::npos;
  return found + kMark.size();
}

bool is_damaged(std::string text) {
  const auto place = checksum_place(text);
  if (place == std::string::npos)
    return false; // of a version that wrote none
  const auto expected = text.substr(place, kNoChecksum.size());
  return text_checksum(text.replace(place, kNoChecksum.size(), kNoChecksum)) != expected;
}

caf::error write_state(const fs::path& folder, const TrainState& state) {
  json::array files;
  for (const auto& entry : fs::recursive_directory_iterator{folder}) {
    if (!entry.is_regular_file() || entry.path() == folder / "training" / kStateFile)
      continue;
    auto sum = checksum(entry.path());
    if (!sum)
      return sum.error();
    files.push_back({{"name", fs::relative(entry.path(), folder).string()},
                     {"bytes", static_cast<int64_t>(entry.file_size())},
                     {"xxh3", fmt::format("{:016x}", *sum)}});
  }
  const json::object object{
      {"checksum", kNoChecksum},    {"step", state.step},
      {"tokens", state.tokens},     {"data_digest", fmt::format("{:016x}", state.data_digest)},
      {"settings", state.settings}, {"files", files}};
  auto text = pretty(object);
  text.replace(checksum_place(text), kNoChecksum.size(), text_checksum(text));
  return write_text(folder / "training" / kStateFile, text);
}

caf::error synchronize_all(const fs::path& folder) {
  for (const auto& entry : fs::recursive_directory_iterator{folder})
    if (auto error = synchronize(entry.path(), entry.is_directory()))
      return error;
  return synchronize(folder, true);
}

// Puts a link in its place in one step.
caf::error link(const fs::path& target, const fs::path& at) {
  std::error_code error;
  auto temporary = at;
  temporary += ".new";
  fs::remove(temporary, error);
  fs::create_symlink(target, temporary, error);
  if (!error)
    fs::rename(temporary, at, error);
  return error ? io_error(at, error.message()) : caf::error{};
}

// OUT/latest, and OUT's own entries, which lead through it.
caf::error link_latest(const fs::path& out, const fs::path& folder) {
  if (auto error = link(folder.filename(), out / "latest"))
    return error;
  std::error_code ignored; // what can't be listed can't be stale either
  for (const auto& entry : fs::directory_iterator{out, ignored})
    if (entry.is_symlink() && fs::read_symlink(entry.path()).parent_path() == "latest" &&
        !fs::exists(folder / entry.path().filename()))
      fs::remove(entry.path(), ignored);
  for (const auto& entry : fs::directory_iterator{folder, ignored})
    if (entry.is_regular_file())
      if (auto error =
              link(fs::path{"latest"} / entry.path().filename(), out / entry.path().filename()))
        return error;
  return synchronize(out, true);
}

// Takes away a checkpoint's name before its files: what has its name is whole.
void discard(const fs::path& folder) {
  auto nameless = folder.parent_path() / (kTemporary + folder.filename().string());
  nameless += ".old";
  fs::remove_all(nameless);
  fs::rename(folder, nameless);
  fs::remove_all(nameless);
}

// A setting as a person writes it: 0.5, [8, [100, 16]].
std::string plain(const json::value& value) {
  if (value.is_double())
    return fmt::format("{}", value.get_double());
  if (!value.is_array())
    return json::serialize(value);
  std::string list;
  for (const auto& item : value.get_array())
    list += (list.empty() ? "" : ", ") + plain(item);
  return "[" + list + "]";
}

} // namespace

fs::path temporary_checkpoint(const fs::path& out, int64_t step) {
  return out / (kTemporary + folder_name(step));
}

bool is_temporary_checkpoint(const fs::path& folder) {
  return folder.filename().string().starts_with(kTemporary + std::string{kPrefix});
}

caf::expected<fs::path> commit_checkpoint(const fs::path& out, const TrainSetup& setup,
                                          const TrainState& state,
                                          const std::vector<ShardSaved>& shards, int32_t keep) try {
  const auto temporary = temporary_checkpoint(out, state.step);
  const auto folder = out / folder_name(state.step);
  if (auto error = check_shards(temporary, shards))
    return error;
  if (auto error = complete_model(temporary, setup, shards))
    return error;
  if (fs::exists(temporary / "ema"))
    if (auto error = complete_model(temporary / "ema", setup, shards))
      return error;
  if (auto error = write_state(temporary, state))
    return error;
  if (auto error = synchronize_all(temporary))
    return error;
  if (fs::exists(folder)) // of a run that went this far before and was resumed from earlier
    discard(folder);
  fs::rename(temporary, folder);
  if (auto error = synchronize(out, true))
    return error;
  if (auto error = link_latest(out, folder))
    return error;
  if (keep > 0) {
    auto all = checkpoints(out);
    // Later ones are not whole, or the run would have gone on from them; it will write them anew.
    std::erase_if(all, [&](const auto& found) { return found.first > state.step; });
    for (size_t i = static_cast<size_t>(keep); i < all.size(); ++i)
      discard(all[i].second);
  }
  return folder;
} catch (const std::exception& error) { // a job must not throw
  return make_error(Errc::io_error, error.what());
}

caf::error remove_temporary_checkpoints(const fs::path& out) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator{out, error})
    if (is_temporary_checkpoint(entry.path())) {
      fs::remove_all(entry.path(), error);
      if (error)
        return io_error(entry.path(), error.message());
    }
  return {};
}

caf::expected<TrainState> read_train_state(const fs::path& folder) {
  const auto path = folder / "training" / kStateFile;
  auto text = read_text_file(path, size_t{64} << 20);
  if (!text)
    return text.error();
  if (is_damaged(*text))
    return make_error(Errc::malformed,
                      fmt::format("{}: damaged, its checksum is wrong", path.string()));
  auto object = parse_json_object(*text, path.string(), {size_t{64} << 20, 32, size_t{1} << 22});
  if (!object)
    return object.error();
  JsonFields fields{*object, path.string()};
  TrainState state;
  constexpr int64_t kMany = int64_t{1} << 60;
  state.step = fields.integer("step", 0, kMany);
  state.tokens = fields.integer("tokens", 0, kMany);
  const auto digest = fields.string("data_digest");
  const char* end = digest.data() + digest.size();
  if (const auto [last, wrong] = std::from_chars(digest.data(), end, state.data_digest, 16);
      wrong != std::errc{} || last != end)
    fields.fail(Errc::malformed, "data_digest", "expected a hexadecimal number");
  if (const auto* settings = fields.object_or_null("settings"))
    state.settings = *settings;
  if (auto error = fields.error())
    return error;
  if (const auto step = step_of(folder); step && *step != state.step)
    return make_error(Errc::malformed, fmt::format("{}: step: {} given, the folder is of step {}",
                                                   path.string(), state.step, *step));
  const auto* files = object->if_contains("files");
  if (!files || !files->is_array())
    return make_error(Errc::malformed, path.string() + ": files: expected a list");
  for (const auto& item : files->as_array()) {
    const auto* file = item.if_object();
    if (!file)
      return make_error(Errc::malformed, path.string() + ": files: expected objects");
    JsonFields entry{*file, path.string(), "files."};
    const auto name = entry.string("name");
    const auto bytes = entry.integer("bytes", 0, kMany);
    const auto expected = entry.string("xxh3");
    if (const fs::path path{name}; path.is_absolute() || name.find("..") != std::string::npos)
      entry.fail(Errc::malformed, "name", fmt::format("\"{}\" lies elsewhere", name));
    if (auto error = entry.error())
      return error;
    std::error_code error;
    const auto size = fs::file_size(folder / name, error);
    if (error)
      return io_error(folder / name, error.message());
    if (static_cast<int64_t>(size) != bytes)
      return make_error(Errc::malformed, fmt::format("{}: {} bytes, {} were written",
                                                     (folder / name).string(), size, bytes));
    auto sum = checksum(folder / name);
    if (!sum)
      return sum.error();
    if (fmt::format("{:016x}", *sum) != expected)
      return make_error(Errc::malformed, fmt::format("{}: damaged, its checksum is wrong",
                                                     (folder / name).string()));
  }
  return state;
}

caf::expected<FoundCheckpoint> newest_checkpoint(const fs::path& out) {
  std::vector<std::string> skipped;
  for (const auto& [step, folder] : checkpoints(out)) {
    auto state = read_train_state(folder);
    if (state) {
      for (auto& why : skipped)
        why = fmt::format("resume: {}; the run goes on from {}", why, folder.filename().string());
      return FoundCheckpoint{folder, std::move(*state), std::move(skipped)};
    }
    skipped.push_back(text_of(state.error()));
  }
  return make_error(Errc::not_found,
                    skipped.empty()
                        ? fmt::format("{}: no checkpoint to resume from", out.string())
                        : fmt::format("{}: no checkpoint to resume from is whole; the newest: {}",
                                      out.string(), skipped.front()));
}

std::vector<std::string> changed_settings(const json::object& then, const json::object& now) {
  std::vector<std::string> lines;
  for (const auto& [name, value] : now) {
    const auto* before = then.if_contains(name);
    if (before == nullptr || json::serialize(*before) != json::serialize(value))
      lines.push_back(fmt::format("{}: {} now, {} before", std::string{name}, plain(value),
                                  before ? plain(*before) : "nothing"));
  }
  return lines;
}

} // namespace troupe

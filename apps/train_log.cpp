#include "apps/train_log.hpp"

#include "config/json.hpp"

#include <fmt/format.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

namespace troupe {

namespace {

namespace json = boost::json;

constexpr double kMaxNumber = 1e30;
constexpr size_t kMaxLine = size_t{16} << 20;
constexpr int64_t kMaxStep = int64_t{1} << 53;

double number_of(const json::value& value, JsonFields& fields, std::string_view name) {
  double x = kMaxNumber;
  if (value.is_double())
    x = value.get_double();
  else if (value.is_int64())
    x = static_cast<double>(value.get_int64());
  if (!(x > -kMaxNumber && x < kMaxNumber)) {
    fields.fail(Errc::malformed, name, fmt::format("expected a number, got {}", shown(value)));
    return 0;
  }
  return x;
}

// A list of numbers, or a single one; absent and null: none.
std::vector<double> numbers(JsonFields& fields, std::string_view name) {
  const auto* value = fields.find(name);
  if (!value)
    return {};
  if (!value->is_array())
    return {number_of(*value, fields, name)};
  std::vector<double> list;
  for (const auto& x : value->get_array())
    list.push_back(number_of(x, fields, name));
  return list;
}

std::vector<std::vector<double>> loads(JsonFields& fields) {
  constexpr const char* kExpected = "expected a list of tokens per expert for each MoE layer";
  const auto* value = fields.find("load");
  if (!value || !value->is_array()) {
    fields.fail(Errc::malformed, "load",
                value ? fmt::format("{}, got {}", kExpected, shown(*value)) : kExpected);
    return {};
  }
  std::vector<std::vector<double>> all;
  for (const auto& layer : value->get_array()) {
    if (!layer.is_array() || layer.get_array().empty()) {
      fields.fail(Errc::malformed, "load", fmt::format("{}, got {}", kExpected, shown(layer)));
      return {};
    }
    auto& experts = all.emplace_back();
    for (const auto& count : layer.get_array()) {
      experts.push_back(number_of(count, fields, "load"));
      if (experts.back() < 0)
        fields.fail(Errc::malformed, "load", fmt::format("{} tokens on an expert", shown(count)));
    }
  }
  return all;
}

caf::expected<TrainLogLine> parse_line(std::string_view text, const std::string& source,
                                       bool with_load) {
  const auto object = parse_json_object(text, source);
  if (!object)
    return object.error();
  JsonFields fields{*object, source};
  TrainLogLine line;
  line.step = fields.integer("step", 0, kMaxStep);
  line.evaluated = fields.boolean_or("evaluated", false);
  line.main_loss = fields.number("main_loss", -kMaxNumber, kMaxNumber);
  line.mtp_loss = numbers(fields, fields.find("mtp_losses") ? "mtp_losses" : "mtp_loss");
  line.max_vio = numbers(fields, "max_vio");
  if (with_load && !line.evaluated)
    line.load = loads(fields);
  if (!fields.ok())
    return fields.error();
  return line;
}

} // namespace

caf::error read_train_log(const std::string& path, bool with_load,
                          const std::function<void(const TrainLogLine&)>& take) {
  const auto wrong = [&](Errc code, std::string_view text) {
    return make_error(code, fmt::format("{}: {}", path, text));
  };
  std::error_code folder;
  if (std::filesystem::is_directory(path, folder))
    return wrong(Errc::invalid_argument, "is a folder, expected the log of `troupe train`");
  std::ifstream file{path, std::ios::binary};
  if (!file)
    return wrong(Errc::not_found, fmt::format("can't be read: {}", strerror(errno)));
  std::vector<char> buffer(kMaxLine);
  bool any = false;
  for (int64_t number = 1; !file.eof(); ++number) {
    file.getline(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    const auto source = fmt::format("{}:{}", path, number);
    if (file.bad())
      return wrong(Errc::io_error, "can't be read");
    if (file.fail() && !file.eof())
      return make_error(Errc::malformed,
                        fmt::format("{}: a line longer than {} MiB", source, kMaxLine >> 20));
    const auto taken = static_cast<size_t>(file.gcount());
    const std::string_view text{buffer.data(), taken - (file.eof() ? 0 : 1)}; // without its end
    if (text.find_first_not_of(" \t\r") == std::string_view::npos)
      continue;
    auto line = parse_line(text, source, with_load);
    if (!line && file.eof() && any)
      break; // what a crash left of the last line
    if (!line)
      return line.error();
    line->number = number;
    take(*line);
    any = true;
  }
  if (!any)
    return wrong(Errc::malformed, "is empty, expected the log of `troupe train`, a JSON object for "
                                  "each step");
  return {};
}

} // namespace troupe

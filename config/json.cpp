#include "config/json.hpp"

#include <boost/json/basic_parser_impl.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>
#include <unordered_set>

namespace troupe {

namespace json = boost::json;

namespace {

// The text is read twice: by this handler, which counts and compares keys, and then by Boost's own
// parser, which silently keeps the last of two equal keys. What the first reading refuses, the
// second never sees.
struct CheckingHandler {
  static constexpr std::size_t max_object_size = static_cast<std::size_t>(-1);
  static constexpr std::size_t max_array_size = static_cast<std::size_t>(-1);
  static constexpr std::size_t max_key_size = static_cast<std::size_t>(-1);
  static constexpr std::size_t max_string_size = static_cast<std::size_t>(-1);

  size_t max_values = 0;
  size_t num_values = 0;
  std::string key;
  std::string trouble;
  std::vector<std::unordered_set<std::string>> keys; // of the objects that are open

  using Code = json::error_code;

  bool count(Code& ec) {
    if (++num_values <= max_values)
      return true;
    trouble = fmt::format("more than {} values", max_values);
    ec = json::error::exception;
    return false;
  }

  bool on_document_begin(Code&) { return true; }
  bool on_document_end(Code&) { return true; }
  bool on_object_begin(Code& ec) {
    keys.emplace_back();
    return count(ec);
  }
  bool on_object_end(std::size_t, Code&) {
    keys.pop_back();
    return true;
  }
  bool on_array_begin(Code& ec) { return count(ec); }
  bool on_array_end(std::size_t, Code&) { return true; }
  bool on_key_part(json::string_view part, std::size_t, Code&) {
    key.append(part.data(), part.size());
    return true;
  }
  bool on_key(json::string_view part, std::size_t, Code& ec) {
    key.append(part.data(), part.size());
    if (!keys.back().insert(key).second) {
      trouble = fmt::format("the key \"{}\" appears twice", key.substr(0, 120));
      ec = json::error::exception;
      return false;
    }
    key.clear();
    return true;
  }
  bool on_string_part(json::string_view, std::size_t, Code&) { return true; }
  bool on_string(json::string_view, std::size_t, Code& ec) { return count(ec); }
  bool on_number_part(json::string_view, Code&) { return true; }
  bool on_int64(std::int64_t, json::string_view, Code& ec) { return count(ec); }
  bool on_uint64(std::uint64_t, json::string_view, Code& ec) { return count(ec); }
  bool on_double(double, json::string_view, Code& ec) { return count(ec); }
  bool on_bool(bool, Code& ec) { return count(ec); }
  bool on_null(Code& ec) { return count(ec); }
  bool on_comment_part(json::string_view, Code&) { return true; }
  bool on_comment(json::string_view, Code&) { return true; }
};

std::string place(std::string_view text, size_t offset, std::string_view source) {
  const auto before = text.substr(0, std::min(offset, text.size()));
  const auto line = std::count(before.begin(), before.end(), '\n') + 1;
  const auto newline = before.rfind('\n');
  const auto column =
      newline == std::string_view::npos ? before.size() + 1 : before.size() - newline;
  return fmt::format("{}:{}:{}", source, line, column);
}

caf::error check(std::string_view text, std::string_view source, const JsonLimits& limits) {
  json::parse_options options;
  options.max_depth = limits.max_depth;
  json::basic_parser<CheckingHandler> parser{options};
  parser.handler().max_values = limits.max_values;
  json::error_code ec;
  const size_t used = parser.write_some(false, text.data(), text.size(), ec);
  const auto& trouble = parser.handler().trouble;
  if (!trouble.empty())
    return make_error(Errc::malformed, fmt::format("{}: {}", place(text, used, source), trouble));
  if (ec == json::error::too_deep)
    return make_error(Errc::malformed, fmt::format("{}: nested deeper than {} levels",
                                                   place(text, used, source), limits.max_depth));
  if (ec)
    return make_error(Errc::malformed,
                      fmt::format("{}: not JSON: {}", place(text, used, source), ec.message()));
  // Padding after the root is white space only (safetensors pads its header with blanks).
  const auto rest = text.find_first_not_of(" \t\r\n", used);
  if (rest != std::string_view::npos)
    return make_error(Errc::malformed, fmt::format("{}: not JSON: text follows the closing brace",
                                                   place(text, rest, source)));
  return {};
}

} // namespace

caf::expected<json::object> parse_json_object(std::string_view text, std::string_view source,
                                              const JsonLimits& limits) {
  if (text.size() > limits.max_bytes)
    return make_error(Errc::malformed, fmt::format("{}: {} bytes of JSON, at most {} are read",
                                                   source, text.size(), limits.max_bytes));
  if (auto error = check(text, source, limits))
    return error;
  json::parse_options options;
  options.max_depth = limits.max_depth;
  json::error_code ec;
  auto root = json::parse({text.data(), text.size()}, ec, {}, options);
  if (ec)
    return make_error(Errc::malformed, fmt::format("{}: not JSON: {}", source, ec.message()));
  if (!root.is_object())
    return make_error(Errc::malformed,
                      fmt::format("{}: expected a JSON object, got {}", source, shown(root)));
  return std::move(root.get_object());
}

caf::expected<std::string> read_text_file(const std::filesystem::path& path, size_t max_bytes) {
  std::error_code ec;
  const auto status = std::filesystem::status(path, ec);
  if (status.type() == std::filesystem::file_type::not_found)
    return make_error(Errc::not_found, fmt::format("{}: no such file", path.string()));
  if (ec)
    return make_error(Errc::io_error, fmt::format("{}: {}", path.string(), ec.message()));
  if (status.type() != std::filesystem::file_type::regular)
    return make_error(Errc::io_error, fmt::format("{}: not a regular file", path.string()));
  const auto size = std::filesystem::file_size(path, ec);
  if (ec)
    return make_error(Errc::io_error, fmt::format("{}: {}", path.string(), ec.message()));
  if (size > max_bytes)
    return make_error(Errc::malformed, fmt::format("{}: {} bytes, at most {} are read",
                                                   path.string(), size, max_bytes));
  std::ifstream file{path, std::ios::binary};
  std::string text(size, '\0');
  if (!file || !file.read(text.data(), static_cast<std::streamsize>(size)))
    return make_error(Errc::io_error,
                      fmt::format("{}: can't be read: {}", path.string(), std::strerror(errno)));
  return text;
}

std::string shown(const json::value& value) {
  if (value.is_object())
    return "an object";
  if (value.is_array())
    return fmt::format("an array of {}", value.get_array().size());
  auto text = json::serialize(value);
  return text.size() <= 60 ? text : text.substr(0, 57) + "…";
}

namespace {

void write_pretty(std::string& out, const json::value& value, size_t indent);

void write_double(std::string& out, double x) {
  const auto text = fmt::format("{}", x);
  out += text;
  if (text.find_first_of(".en") == std::string::npos)
    out += ".0"; // stays a float for readers that tell the two apart
}

void write_object(std::string& out, const json::object& object, size_t indent) {
  const std::string margin(indent + 2, ' ');
  out += '{';
  const char* separator = "\n";
  for (const auto& [key, value] : object) {
    out += separator + margin + json::serialize(json::value(key)) + ": ";
    write_pretty(out, value, indent + 2);
    separator = ",\n";
  }
  out += '\n' + std::string(indent, ' ') + '}';
}

void write_pretty(std::string& out, const json::value& value, size_t indent) {
  if (value.is_object() && !value.get_object().empty()) {
    write_object(out, value.get_object(), indent);
  } else if (value.is_array()) {
    const char* separator = "[";
    for (const auto& item : value.get_array()) {
      out += separator;
      write_pretty(out, item, indent);
      separator = ", ";
    }
    out += value.get_array().empty() ? "[]" : "]";
  } else if (value.is_double()) {
    write_double(out, value.get_double());
  } else {
    out += json::serialize(value);
  }
}

} // namespace

std::string pretty(const json::object& object) {
  std::string out;
  write_pretty(out, object, 0);
  return out += '\n';
}

JsonFields::JsonFields(const json::object& object, std::string source, std::string prefix)
    : object_(&object), source_(std::move(source)), prefix_(std::move(prefix)) {}

bool JsonFields::has(std::string_view name) const {
  return object_->contains({name.data(), name.size()});
}

const json::value* JsonFields::find(std::string_view name) const {
  const auto* value = object_->if_contains({name.data(), name.size()});
  return value && !value->is_null() ? value : nullptr;
}

const json::value* JsonFields::require(std::string_view name, std::string_view expected) {
  const auto* value = find(name);
  if (!value)
    fail(Errc::malformed, name,
         fmt::format("expected {}, but it is {}", expected, has(name) ? "null" : "absent"));
  return value;
}

int64_t JsonFields::integer(std::string_view name, int64_t low, int64_t high) {
  const auto expected = fmt::format("an integer from {} to {}", low, high);
  const auto* value = require(name, expected);
  if (!value)
    return low;
  const bool fits = value->is_int64() && value->get_int64() >= low && value->get_int64() <= high;
  if (!fits) { // an unsigned value does not fit into int64, so it is always too large
    fail(Errc::malformed, name, fmt::format("expected {}, got {}", expected, shown(*value)));
    return low;
  }
  return value->get_int64();
}

double JsonFields::number(std::string_view name, double low, double high) {
  const auto expected = fmt::format("a number from {} to {}", low, high);
  const auto* value = require(name, expected);
  if (!value)
    return low;
  double x = 0;
  if (value->is_double())
    x = value->get_double();
  else if (value->is_int64())
    x = static_cast<double>(value->get_int64());
  const bool is_number = value->is_double() || value->is_int64();
  if (!is_number || !(x >= low && x <= high)) {
    fail(Errc::malformed, name, fmt::format("expected {}, got {}", expected, shown(*value)));
    return low;
  }
  return x;
}

bool JsonFields::boolean(std::string_view name) {
  const auto* value = require(name, "true or false");
  if (value && !value->is_bool())
    fail(Errc::malformed, name, fmt::format("expected true or false, got {}", shown(*value)));
  return value && value->is_bool() && value->get_bool();
}

std::string JsonFields::string(std::string_view name) {
  const auto* value = require(name, "a string");
  if (value && !value->is_string())
    fail(Errc::malformed, name, fmt::format("expected a string, got {}", shown(*value)));
  return value && value->is_string() ? std::string{value->get_string()} : std::string{};
}

int64_t JsonFields::integer_or(std::string_view name, int64_t low, int64_t high, int64_t fallback) {
  return find(name) ? integer(name, low, high) : fallback;
}

double JsonFields::number_or(std::string_view name, double low, double high, double fallback) {
  return find(name) ? number(name, low, high) : fallback;
}

bool JsonFields::boolean_or(std::string_view name, bool fallback) {
  return find(name) ? boolean(name) : fallback;
}

std::string JsonFields::string_or(std::string_view name, std::string fallback) {
  return find(name) ? string(name) : std::move(fallback);
}

std::vector<std::string> JsonFields::strings_or_empty(std::string_view name) {
  const auto* value = find(name);
  if (!value)
    return {};
  std::vector<std::string> result;
  const auto* array = value->if_array();
  if (array)
    for (const auto& item : *array)
      if (const auto* text = item.if_string())
        result.emplace_back(*text);
  if (!array || result.size() != array->size())
    fail(Errc::malformed, name, "expected an array of strings");
  return result;
}

const json::object* JsonFields::object_or_null(std::string_view name) {
  const auto* value = find(name);
  if (!value)
    return nullptr;
  if (!value->is_object())
    fail(Errc::malformed, name, fmt::format("expected an object, got {}", shown(*value)));
  return value->if_object();
}

void JsonFields::fail(Errc code, std::string_view name, std::string_view text) {
  if (ok())
    error_ = make_error(code, fmt::format("{}: {}{}: {}", source_, prefix_, name, text));
}

void JsonFields::adopt(const caf::error& error) {
  if (ok())
    error_ = error;
}

} // namespace troupe

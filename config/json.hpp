// Reading JSON from files nobody vouches for: bounded in size, depth and number of values, keys
// unique within an object, and errors that say where ("FILE:LINE:COLUMN: …").
#pragma once

#include "config/errors.hpp"

#include <boost/json.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace troupe {

struct JsonLimits {
  size_t max_bytes = size_t{16} << 20;
  size_t max_depth = 32;
  size_t max_values = size_t{1} << 20; // bounds the memory of the parsed form
};

// `source` names the text in errors. The root must be an object.
[[nodiscard]] caf::expected<boost::json::object>
parse_json_object(std::string_view text, std::string_view source, const JsonLimits& limits = {});

// The bytes of a regular file of at most `max_bytes`.
[[nodiscard]] caf::expected<std::string> read_text_file(const std::filesystem::path& path,
                                                        size_t max_bytes);

// Reads fields of an object and keeps the first thing that is wrong; after an error every further
// read gives a default. So a parser is a plain list of fields with one check at its end.
//
// A field that is absent and one that is null are the same, except to `has` and where said.
class JsonFields {
public:
  JsonFields(const boost::json::object& object, std::string source, std::string prefix = {});

  [[nodiscard]] bool has(std::string_view name) const;                       // present, null or not
  [[nodiscard]] const boost::json::value* find(std::string_view name) const; // non-null values only

  // Required: absent or null is an error.
  int64_t integer(std::string_view name, int64_t low, int64_t high);
  double number(std::string_view name, double low, double high);
  bool boolean(std::string_view name);
  std::string string(std::string_view name);

  int64_t integer_or(std::string_view name, int64_t low, int64_t high, int64_t fallback);
  double number_or(std::string_view name, double low, double high, double fallback);
  bool boolean_or(std::string_view name, bool fallback);
  std::string string_or(std::string_view name, std::string fallback);
  std::vector<std::string> strings_or_empty(std::string_view name);
  // nullptr when absent or null.
  const boost::json::object* object_or_null(std::string_view name);

  // "SOURCE: PREFIXname: text", unless something was wrong before.
  void fail(Errc code, std::string_view name, std::string_view text);
  void adopt(const JsonFields& nested) { adopt(nested.error_); }
  void adopt(const caf::error& error);
  [[nodiscard]] bool ok() const { return !error_; }
  [[nodiscard]] const caf::error& error() const { return error_; }
  [[nodiscard]] const std::string& source() const { return source_; }

private:
  const boost::json::value* require(std::string_view name, std::string_view expected);

  const boost::json::object* object_;
  std::string source_;
  std::string prefix_;
  caf::error error_;
};

// A value as an error message shows it: short, on one line.
[[nodiscard]] std::string shown(const boost::json::value& value);

// Indented by two, a list of plain values on one line, floating-point numbers in their shortest
// exact form: what a person expects of a config.json.
[[nodiscard]] std::string pretty(const boost::json::object& object);

} // namespace troupe

// Reading files in Protobuf's text format, with errors that say where: "FILE:LINE:COLUMN: field:
// what was expected", for meaning as well as for syntax. Internal to config/.
#pragma once

#include "config/errors.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <google/protobuf/message.h>
#include <google/protobuf/text_format.h>

#include <algorithm>
#include <initializer_list>
#include <set>
#include <string>
#include <string_view>

namespace troupe {

inline constexpr size_t kMaxTextProto = size_t{1} << 20; // bytes of a file that is read

// Fills `message` and, where its fields stand in the text, `tree`.
[[nodiscard]] caf::error parse_text_proto(std::string_view text, std::string_view source,
                                          google::protobuf::Message& message,
                                          google::protobuf::TextFormat::ParseInfoTree& tree);

// A message with the places of its fields in the text. Refers to all it is given.
class TextPlace {
public:
  // `tree` may be null: nothing was read. A field in `flags` came from the command line instead.
  TextPlace(const google::protobuf::Message& message,
            const google::protobuf::TextFormat::ParseInfoTree* tree, std::string source,
            std::set<std::string> flags = {});

  // "SOURCE:LINE:COLUMN", of the message where the field is absent; or "--flag".
  [[nodiscard]] std::string of(const std::string& field, int index = -1) const;
  // The same for the message inside `field`, and for one of a list.
  [[nodiscard]] TextPlace inside(const google::protobuf::Message& message,
                                 const std::string& field) const;
  [[nodiscard]] TextPlace element(const google::protobuf::Message& message,
                                  const std::string& field, int index) const;
  [[nodiscard]] caf::error error(const std::string& field, const std::string& text) const;

private:
  const google::protobuf::Message& message_;
  const google::protobuf::TextFormat::ParseInfoTree* tree_;
  std::string source_, prefix_, fallback_;
  std::set<std::string> flags_;
};

// "learning_rate" as a flag: "--learning-rate".
[[nodiscard]] std::string flag_of(const std::string& field);

// Collects the first complaint about meaning, as JsonFields does for JSON.
class TextChecker {
public:
  explicit TextChecker(const TextPlace& place) : place_(place) {}

  void fail(const std::string& field, const std::string& text) {
    if (!error_)
      error_ = place_.error(field, text);
  }
  void adopt(const caf::error& error) {
    if (!error_)
      error_ = error;
  }

  template <class T>
  T in_range(const std::string& field, bool given, T value, T low, T high, T fallback) {
    if (!given)
      return fallback;
    if (value >= low && value <= high)
      return value;
    fail(field, fmt::format("expected {} to {}, got {}", low, high, value)); // NaN too
    return fallback; // what is computed from it before the error is looked at stays in bounds
  }

  std::string one_of(const std::string& field, bool given, const std::string& value,
                     std::initializer_list<std::string_view> allowed, std::string fallback) {
    if (!given)
      return fallback;
    if (std::ranges::find(allowed, value) == allowed.end())
      fail(field,
           fmt::format("expected {}, got \"{}\"", fmt::join(allowed, " or "), value.substr(0, 60)));
    return value;
  }

  [[nodiscard]] const caf::error& error() const { return error_; }

private:
  const TextPlace& place_;
  caf::error error_;
};

} // namespace troupe

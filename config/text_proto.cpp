#include "config/text_proto.hpp"

#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <optional>

namespace troupe {

namespace pb = google::protobuf;

namespace {

constexpr int kMaxDepth = 8;

// Keeps the first error, which is the one that caused the others.
class FirstError final : public pb::io::ErrorCollector {
public:
  void AddError(int line, int column, const std::string& text) override {
    if (!first_)
      first_ = {line, column, text};
  }

  [[nodiscard]] caf::error as_error(std::string_view source) const {
    if (!first_)
      return make_error(Errc::malformed, fmt::format("{}: not text format", source));
    return make_error(Errc::malformed, fmt::format("{}:{}:{}: {}", source, first_->line + 1,
                                                   first_->column + 1, first_->text));
  }

private:
  struct Found {
    int line = 0, column = 0; // from 0
    std::string text;
  };
  std::optional<Found> first_;
};

} // namespace

caf::error parse_text_proto(std::string_view text, std::string_view source, pb::Message& message,
                            pb::TextFormat::ParseInfoTree& tree) {
  if (text.size() > kMaxTextProto)
    return make_error(Errc::malformed, fmt::format("{}: {} bytes, at most {} are read", source,
                                                   text.size(), kMaxTextProto));
  FirstError errors;
  pb::TextFormat::Parser parser;
  parser.RecordErrorsTo(&errors);
  parser.WriteLocationsTo(&tree);
  parser.SetRecursionLimit(kMaxDepth);
  pb::io::ArrayInputStream input{text.data(), static_cast<int>(text.size())};
  return parser.Parse(&input, &message) ? caf::error{} : errors.as_error(source);
}

std::string flag_of(const std::string& field) {
  std::string flag = "--" + field;
  std::ranges::replace(flag, '_', '-');
  return flag;
}

TextPlace::TextPlace(const pb::Message& message, const pb::TextFormat::ParseInfoTree* tree,
                     std::string source, std::set<std::string> flags)
    : message_(message), tree_(tree), source_(std::move(source)),
      fallback_(tree ? fmt::format("{}:1:1", source_) : source_), flags_(std::move(flags)) {}

std::string TextPlace::of(const std::string& field, int index) const {
  if (flags_.contains(field))
    return flag_of(field);
  const auto* descriptor = message_.GetDescriptor()->FindFieldByName(field);
  if (!tree_ || !descriptor)
    return fallback_;
  // Of a list as a whole: of its first element. Protobuf aborts on any other combination.
  const auto location =
      tree_->GetLocation(descriptor, descriptor->is_repeated() ? std::max(index, 0) : -1);
  return location.line < 0
             ? fallback_
             : fmt::format("{}:{}:{}", source_, location.line + 1, location.column + 1);
}

TextPlace TextPlace::inside(const pb::Message& message, const std::string& field) const {
  const auto* descriptor = message_.GetDescriptor()->FindFieldByName(field);
  const auto* tree = tree_ && message_.GetReflection()->HasField(message_, descriptor)
                         ? tree_->GetTreeForNested(descriptor, -1)
                         : nullptr;
  TextPlace place{message, tree, source_};
  place.prefix_ = prefix_ + field + ".";
  place.fallback_ = of(field);
  return place;
}

TextPlace TextPlace::element(const pb::Message& message, const std::string& field,
                             int index) const {
  const auto* descriptor = message_.GetDescriptor()->FindFieldByName(field);
  TextPlace place{message, tree_ ? tree_->GetTreeForNested(descriptor, index) : nullptr, source_};
  place.prefix_ = fmt::format("{}{}[{}].", prefix_, field, index);
  place.fallback_ = of(field, index);
  return place;
}

caf::error TextPlace::error(const std::string& field, const std::string& text) const {
  const auto place = of(field);
  if (flags_.contains(field))
    return make_error(Errc::invalid_argument, fmt::format("{}: {}", place, text));
  return make_error(Errc::invalid_argument,
                    fmt::format("{}: {}{}: {}", place, prefix_, field, text));
}

} // namespace troupe

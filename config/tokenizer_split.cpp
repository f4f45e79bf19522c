// Three things keep hostile patterns and texts from hanging the process:
//  - PCRE2's match limit bounds the backtracking from one starting position;
//  - a pattern that is not known to cost a bounded number of steps per byte runs with callouts,
//    which count the steps of the whole text against a budget proportional to its length;
//  - the JIT's stack is bounded.
// Counting depends on pattern and text only, so the same text always gives the same answer.
#define PCRE2_CODE_UNIT_WIDTH 8

#include "config/tokenizer_split.hpp"

#include "config/tokenizer_text.hpp"

#include <pcre2.h>

#include <algorithm>
#include <array>
#include <new>

namespace troupe {

const std::string_view kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// The published pattern writes its classes as [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]] and
// [\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]; PCRE2 has no intersection, so here are their complements.
#define TROUPE_UPPER R"([^\p{sc:Han}\p{Ll}\p{N}\p{P}\p{S}\p{Z}\p{C}])"
#define TROUPE_LOWER R"([^\p{sc:Han}\p{Lu}\p{Lt}\p{N}\p{P}\p{S}\p{Z}\p{C}])"
#define TROUPE_ENDING R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
const std::string_view kKimiPattern =
    R"(\p{sc:Han}+|[^\r\n\p{L}\p{N}]?)" TROUPE_UPPER "*" TROUPE_LOWER "+" TROUPE_ENDING
    R"(|[^\r\n\p{L}\p{N}]?)" TROUPE_UPPER "+" TROUPE_LOWER "*" TROUPE_ENDING
    R"(|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
#undef TROUPE_UPPER
#undef TROUPE_LOWER
#undef TROUPE_ENDING

namespace {

// The published DeepSeek-V3 pattern: after a failed alternative a later one consumes all that was
// scanned, so the total work is proportional to the text.
constexpr std::string_view kDeepSeekV3Pattern =
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
    "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+";
// DeepSeek-V2's last but one. From every blank of a run it would walk to the run's end again; as
// the run's first blank always wins when any does, looking only there changes nothing.
constexpr std::string_view kTrailingSpace = R"(\s+$)";
constexpr std::string_view kTrailingSpaceOnce = R"((?<!\s)\s+$)";

// Bounds of one text of n bytes; far above what any published pattern needs.
constexpr uint64_t kBaseSteps = 1'000'000;
constexpr uint64_t kStepsPerByte = 128;
constexpr size_t kJitStackStart = size_t{32} << 10;
constexpr size_t kJitStackMax = size_t{16} << 20;

// Without groups and alternatives, and with the only unbounded repetition at its very end, a
// pattern fails in a bounded number of steps and gives back nothing that it matched.
bool is_linear(std::string_view p) {
  constexpr size_t kMaxLinearBraces = 5; // "{1,99", or "{Han": at most 99 repetitions
  bool in_class = false;
  for (size_t i = 0; i < p.size(); ++i) {
    if (p[i] == '\\') {
      ++i;
    } else if (in_class) {
      in_class = p[i] != ']';
    } else if (p[i] == '[') {
      in_class = true;
    } else if (p[i] == '(' || p[i] == '|') {
      return false;
    } else if (p[i] == '*' || p[i] == '+') {
      if (i + 1 != p.size())
        return false;
    } else if (p[i] == '{') { // of a property, or a repetition: {3}, {1,3}, {2,}
      const size_t close = std::min(p.find('}', i), p.size());
      const bool unbounded = p[close - 1] == ',' && close + 1 < p.size();
      if (unbounded || close - i > kMaxLinearBraces)
        return false;
    }
  }
  return true;
}

bool is_known(std::string_view pattern) {
  return pattern == kDeepSeekV3Pattern || pattern == kByteLevelPattern || pattern == kKimiPattern ||
         pattern == kTrailingSpaceOnce || is_linear(pattern);
}

// Reads an Oniguruma pattern (Ruby syntax) and writes PCRE2's.
class Translator {
public:
  explicit Translator(std::string_view pattern) : in_(pattern) {}

  caf::expected<std::string> run() {
    if (text::first_invalid_utf8(in_))
      return make_error(Errc::malformed, "the pattern is not valid UTF-8");
    while (at_ < in_.size() && trouble_.empty())
      item();
    if (!trouble_.empty())
      return make_error(Errc::unsupported, "the pattern " + text::quoted(in_) + " uses " +
                                               trouble_ + " at byte " + std::to_string(at_));
    return std::move(out_);
  }

private:
  [[nodiscard]] char peek(size_t ahead = 0) const {
    return at_ + ahead < in_.size() ? in_[at_ + ahead] : '\0';
  }
  [[nodiscard]] bool next_is(std::string_view s) const { return in_.substr(at_).starts_with(s); }
  void copy(size_t n) {
    out_ += in_.substr(at_, n);
    at_ += n;
  }
  void refuse(std::string what) { trouble_ = std::move(what); }

  void item() {
    switch (peek()) {
    case '\\':
      escape();
      break;
    case '[':
      char_class();
      break;
    case '(':
      group();
      break;
    case '{':
      braces();
      break;
    default:
      copy(1);
    }
  }

  void group() {
    if (peek(1) != '?')
      return copy(1);
    for (const std::string_view kind : {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"})
      if (next_is(kind))
        return copy(kind.size());
    refuse("a group of a kind that is not supported");
  }

  // {n}, {n,} or {n,m}; any other brace is a literal in PCRE2 but may not be in Oniguruma.
  void braces() {
    size_t i = at_ + 1;
    const auto digits = [&] {
      const size_t from = i;
      while (i < in_.size() && in_[i] >= '0' && in_[i] <= '9')
        ++i;
      return i - from;
    };
    bool valid = digits() > 0;
    if (i < in_.size() && in_[i] == ',') {
      ++i;
      digits();
    }
    valid = valid && i < in_.size() && in_[i] == '}';
    if (!valid)
      return refuse("a brace that is no repetition");
    if (i + 1 < in_.size() && in_[i + 1] == '+')
      return refuse("a repetition followed by '+', which is possessive only in PCRE2,");
    copy(i + 1 - at_);
  }

  void char_class() {
    copy(1);
    if (peek() == '^')
      copy(1);
    if (peek() == ']')
      return refuse("an empty character class");
    while (at_ < in_.size() && peek() != ']' && trouble_.empty()) {
      if (peek() == '\\')
        escape();
      else if (peek() == '[')
        refuse("a character class inside another");
      else if (next_is("&&"))
        refuse("an intersection of character classes");
      else
        copy(1);
    }
    if (at_ == in_.size() && trouble_.empty())
      refuse("a character class without its end");
    else if (trouble_.empty())
      copy(1);
  }

  void escape() {
    const char c = peek(1);
    const bool alphanumeric =
        (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
    if (c == '\0' && at_ + 1 >= in_.size())
      return refuse("a backslash with nothing after it");
    if (!alphanumeric || std::string_view{"sSdDrntf"}.find(c) != std::string_view::npos)
      return copy(2);
    if (c == 'p' || c == 'P')
      return property();
    if (c == 'x' || c == 'u')
      return number(c);
    refuse(std::string{"\\"} + c);
  }

  // General categories, which the tables of stand-ins make equal, and Han.
  void property() {
    static constexpr std::array<std::string_view, 37> kCategories = {
        "L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M",  "Mn", "Mc", "Me", "N",  "Nd", "Nl",
        "No", "P",  "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "S",  "Sm", "Sc", "Sk",
        "So", "Z",  "Zs", "Zl", "Zp", "C",  "Cc", "Cf", "Cn", "Co", "Cs"};
    const size_t close = in_.find('}', at_);
    if (peek(2) != '{' || close == std::string_view::npos)
      return refuse("a property without braces");
    const auto name = in_.substr(at_ + 3, close - at_ - 3);
    if (name == "Han") {
      out_ += std::string{"\\"} + peek(1) + "{sc:Han}";
      at_ = close + 1;
    } else if (std::ranges::find(kCategories, name) != kCategories.end()) {
      copy(close + 1 - at_);
    } else {
      refuse("the property " + text::quoted(name));
    }
  }

  // \x{H…}, \xHH below 0x80 and \uHHHH.
  void number(char kind) {
    size_t from = at_ + 2;
    size_t length = kind == 'u' ? 4 : 2;
    const bool braced = kind == 'x' && peek(2) == '{';
    if (braced) {
      const size_t close = in_.find('}', ++from);
      length = close == std::string_view::npos ? 0 : close - from;
    }
    const auto digits = in_.substr(std::min(from, in_.size()), length);
    const bool hex = std::ranges::all_of(digits, [](char c) {
      return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
    });
    if (digits.empty() || digits.size() != length || length > 6 || !hex)
      return refuse("a malformed character number");
    if (kind == 'x' && !braced && digits[0] > '7')
      return refuse("a byte above 0x7f");
    out_ += "\\x{" + std::string{digits} + "}";
    at_ = from + length + (braced ? 1 : 0);
  }

  std::string_view in_;
  size_t at_ = 0;
  std::string out_;
  std::string trouble_;
};

std::string pcre_message(int code) {
  std::array<PCRE2_UCHAR, 256> buffer{};
  pcre2_get_error_message(code, buffer.data(), buffer.size());
  return reinterpret_cast<const char*>(buffer.data());
}

template <auto Free>
struct Deleter {
  template <class T>
  void operator()(T* p) const {
    Free(p);
  }
};

// What became of the stretches of a piece; matches and the text between them, in order.
struct Stretch {
  Piece piece;
  bool match = false;
};

void join(std::vector<Piece>& pieces, size_t first, const Piece& p) {
  if (pieces.size() > first)
    pieces.back().end = p.end;
  else
    pieces.push_back(p);
}

// Appends to `out` what `behavior` makes of the stretches of one piece.
void apply(SplitBehavior behavior, const std::vector<Stretch>& stretches, std::vector<Piece>& out) {
  const size_t first = out.size();
  bool previous = false;
  if (behavior == SplitBehavior::merged_with_next) { // the mirror image: right to left
    for (auto it = stretches.rbegin(); it != stretches.rend(); ++it) {
      if (it->match && !previous && out.size() > first)
        out.back().begin = it->piece.begin;
      else
        out.push_back(it->piece);
      previous = it->match;
    }
    std::reverse(out.begin() + static_cast<ptrdiff_t>(first), out.end());
    return;
  }
  for (const auto& [piece, match] : stretches) {
    if (behavior == SplitBehavior::removed) {
      if (!match)
        out.push_back(piece);
    } else if (behavior == SplitBehavior::contiguous && match == previous) {
      join(out, first, piece);
    } else if (behavior == SplitBehavior::merged_with_previous && match && !previous) {
      join(out, first, piece);
    } else {
      out.push_back(piece);
    }
    previous = match;
  }
}

struct StepCount {
  uint64_t steps = 0;
  uint64_t budget = 0;
  size_t position = 0; // at the last callout
};

// PCRE2 calls this before every item of the pattern, but not for every character that an item
// such as \s* takes: the distance covered since the last call counts, too.
int count_step(pcre2_callout_block* block, void* data) {
  auto& count = *static_cast<StepCount*>(data);
  const size_t at = block->current_position;
  count.steps += 1 + (at > count.position ? at - count.position : count.position - at);
  count.position = at;
  return count.steps > count.budget ? PCRE2_ERROR_CALLOUT : 0;
}

} // namespace

struct Split::Impl {
  std::unique_ptr<pcre2_code, Deleter<pcre2_code_free>> code;
  std::string pattern; // for errors
  bool literal = false;
  SplitBehavior behavior = SplitBehavior::isolated;
  bool invert = false;
};

Split::Split(std::unique_ptr<const Impl> impl) : impl_(std::move(impl)) {}
Split::Split(Split&&) noexcept = default;
Split& Split::operator=(Split&&) noexcept = default;
Split::~Split() = default;

caf::expected<std::string> to_pcre(std::string_view onig_pattern) {
  return Translator{onig_pattern}.run();
}

caf::expected<Split> Split::regex(std::string_view pattern, SplitBehavior behavior, bool invert,
                                  bool is_pcre) {
  if (pattern.empty())
    return make_error(Errc::malformed, "the pattern is empty");
  if (pattern == kTrailingSpace)
    pattern = kTrailingSpaceOnce;
  const bool counted = !is_known(pattern);
  if (is_pcre)
    return compile(std::string{pattern}, PCRE2_UTF | PCRE2_UCP, behavior, invert, counted);
  auto translated = to_pcre(pattern);
  if (!translated)
    return std::move(translated.error());
  // In Ruby's syntax ^ and $ are always those of a line.
  return compile(*translated, PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, behavior, invert, counted);
}

caf::expected<Split> Split::literal(std::string_view text, SplitBehavior behavior, bool invert) {
  if (text.empty())
    return make_error(Errc::malformed, "the pattern is empty");
  if (text::first_invalid_utf8(text))
    return make_error(Errc::malformed, "the pattern is not valid UTF-8");
  return compile(std::string{text}, PCRE2_UTF | PCRE2_LITERAL, behavior, invert, false);
}

caf::expected<Split> Split::compile(const std::string& pattern, uint32_t options,
                                    SplitBehavior behavior, bool invert, bool counted) {
  std::unique_ptr<pcre2_compile_context, Deleter<pcre2_compile_context_free>> context{
      pcre2_compile_context_create(nullptr)};
  if (!context)
    throw std::bad_alloc{};
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_max_pattern_length(context.get(), 65536);
  pcre2_set_parens_nest_limit(context.get(), 64);
  int error = 0;
  size_t offset = 0;
  auto impl = std::make_unique<Impl>();
  impl->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                 options | (counted ? PCRE2_AUTO_CALLOUT : 0u), &error, &offset,
                                 context.get()));
  if (!impl->code)
    return make_error(Errc::malformed, "the pattern " + text::quoted(pattern) +
                                           " does not compile: " + pcre_message(error) +
                                           " at byte " + std::to_string(offset));
  // Without a JIT for this machine PCRE2 interprets, with the same results.
  (void)pcre2_jit_compile(impl->code.get(), PCRE2_JIT_COMPLETE);
  impl->pattern = pattern;
  impl->literal = (options & PCRE2_LITERAL) != 0;
  impl->behavior = behavior;
  impl->invert = invert;
  return Split{std::move(impl)};
}

// The state of splitting one text: what PCRE2 needs writable, and the step budget.
class SplitRun {
public:
  // `matched` is the text with stand-ins, `text` the one without: literals are looked for there.
  SplitRun(std::string_view text, std::string_view matched)
      : text_(text), matched_(matched), data_(pcre2_match_data_create(1, nullptr)),
        context_(pcre2_match_context_create(nullptr)) {
    if (!data_ || !context_)
      throw std::bad_alloc{};
    const uint64_t budget = kBaseSteps + kStepsPerByte * text.size();
    count_.budget = budget;
    pcre2_set_match_limit(context_.get(),
                          static_cast<uint32_t>(std::min<uint64_t>(budget, UINT32_MAX)));
    pcre2_set_callout(context_.get(), count_step, &count_);
    // Short texts do with the 32 KiB that PCRE2 takes from the machine stack.
    if (text.size() > 512) {
      stack_.reset(pcre2_jit_stack_create(kJitStackStart, kJitStackMax, nullptr));
      pcre2_jit_stack_assign(context_.get(), nullptr, stack_.get());
    }
  }

  caf::error run(const Split& split, const std::vector<Piece>& pieces, std::vector<Piece>& out) {
    out.clear();
    for (const Piece& piece : pieces) {
      if (auto error = find(*split.impl_, piece))
        return error;
      const size_t first = out.size();
      apply(split.impl_->behavior, stretches_, out);
      out.erase(std::remove_if(out.begin() + static_cast<ptrdiff_t>(first), out.end(),
                               [](const Piece& p) { return p.empty(); }),
                out.end());
    }
    return {};
  }

private:
  void add(size_t begin, size_t end, bool match) { stretches_.push_back({{begin, end}, match}); }

  // Fills stretches_ with the matches inside `piece` and what lies between. An empty match right
  // after another match is skipped, as the reference does.
  caf::error find(const Split::Impl& split, const Piece& piece) {
    stretches_.clear();
    const auto* subject =
        reinterpret_cast<PCRE2_SPTR>((split.literal ? text_ : matched_).data() + piece.begin);
    const size_t length = piece.end - piece.begin;
    size_t from = 0;        // where to search
    size_t last = SIZE_MAX; // end of the last match
    size_t done = 0;        // everything before is in stretches_
    while (from <= length) {
      const int rc = pcre2_match(split.code.get(), subject, length, from, PCRE2_NO_UTF_CHECK,
                                 data_.get(), context_.get());
      if (rc == PCRE2_ERROR_NOMATCH)
        break;
      if (rc < 0)
        return make_error(Errc::unsupported,
                          "the text takes too many steps for the pre-tokenizer pattern " +
                              text::quoted(split.pattern) + " (" + pcre_message(rc) + ")");
      const size_t* range = pcre2_get_ovector_pointer(data_.get());
      const size_t begin = range[0], end = range[1];
      if (begin > end || end < from) // only \K could, and to_pcre refuses it
        return make_error(Errc::internal, "a match ends before it begins");
      if (begin == end && end == last) {
        from = end + character_length(piece, end);
        continue;
      }
      if (done != begin)
        add(piece.begin + done, piece.begin + begin, split.invert);
      add(piece.begin + begin, piece.begin + end, !split.invert);
      done = last = from = end;
    }
    if (done != length)
      add(piece.begin + done, piece.end, split.invert);
    return {};
  }

  [[nodiscard]] size_t character_length(const Piece& piece, size_t offset) const {
    if (piece.begin + offset >= piece.end)
      return 1;
    bool unfinished = false;
    const int n = text::sequence_length(text_.substr(piece.begin + offset), &unfinished);
    return n > 0 ? static_cast<size_t>(n) : 1;
  }

  std::string_view text_;
  std::string_view matched_;
  std::unique_ptr<pcre2_match_data, Deleter<pcre2_match_data_free>> data_;
  std::unique_ptr<pcre2_match_context, Deleter<pcre2_match_context_free>> context_;
  std::unique_ptr<pcre2_jit_stack, Deleter<pcre2_jit_stack_free>> stack_;
  StepCount count_;
  std::vector<Stretch> stretches_;
};

caf::expected<std::vector<Piece>> split_all(const std::vector<Split>& splits,
                                            std::string_view text) {
  std::vector<Piece> pieces;
  if (text.empty())
    return pieces;
  const auto changed = text::with_stand_ins(text);
  SplitRun run{text, changed ? std::string_view{*changed} : text};
  pieces.push_back({0, text.size()});
  std::vector<Piece> next;
  for (const Split& split : splits) {
    if (auto error = run.run(split, pieces, next))
      return error;
    pieces.swap(next);
  }
  return pieces;
}

} // namespace troupe

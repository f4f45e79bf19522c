// Any bytes as tokenizer.json (first byte even) or tiktoken.model (odd), the part after a zero
// byte as text: refused with a text, or a tokenizer whose ids are its own and whose decoder gives
// back what was encoded.
#include "config/chat_template.hpp"
#include "config/tokenizer.hpp"

#include <cstdlib>
#include <string_view>

namespace {

void require(bool condition) {
  if (!condition)
    std::abort();
}

void try_text(const std::shared_ptr<const troupe::Tokenizer>& tokenizer, std::string_view text,
              bool match_special) {
  const auto ids = tokenizer->encode(text, match_special);
  if (!ids) {
    require(!troupe::text_of(ids.error()).empty());
    return;
  }
  troupe::Detokenizer detokenizer{tokenizer, false};
  std::string streamed;
  for (const int32_t id : *ids) {
    require(tokenizer->token_bytes(id).has_value());
    streamed += detokenizer.push(id);
  }
  streamed += detokenizer.flush();
  const auto decoded = tokenizer->decode(*ids, false);
  require(decoded && *decoded == streamed);
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0)
    return 0;
  const bool is_json = data[0] % 2 == 0;
  const std::string_view input{reinterpret_cast<const char*>(data) + 1, size - 1};
  const size_t end = std::min(input.find('\0'), input.size());
  const auto text = input.substr(std::min(end + 1, input.size()));
  const troupe::TokenizerFiles files{std::string{input.substr(0, end)}, "", "", "input"};
  const auto tokenizer =
      is_json ? troupe::load_tokenizer_json(files) : troupe::load_tiktoken(files);
  if (!tokenizer) {
    require(!troupe::text_of(tokenizer.error()).empty());
    return 0;
  }
  try_text(*tokenizer, text, false);
  try_text(*tokenizer, text, true);
  try_text(*tokenizer, "Hello, 123  world\n", true);
  (void)troupe::chat_format_of(**tokenizer);
  return 0;
}

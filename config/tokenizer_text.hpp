// UTF-8 as the tokenizers need it: strict validation, the lossy decoding that Rust's
// `String::from_utf8_lossy` and Python's `errors="replace"` share, and the byte map of byte-level
// BPE. Internal to the tokenizer; nothing outside config/ includes it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace troupe::text {

inline constexpr std::string_view kReplacement = "\xEF\xBF\xBD"; // U+FFFD

// Length of the well-formed UTF-8 sequence at the front of `s` (1 … 4). When there is none, the
// number of bytes that one U+FFFD stands for (the "maximal subpart" of Unicode 3.9), negated;
// `*unfinished` then tells whether more bytes could still complete it.
[[nodiscard]] int sequence_length(std::string_view s, bool* unfinished);

// Offset of the first byte that is not part of well-formed UTF-8.
[[nodiscard]] std::optional<size_t> first_invalid_utf8(std::string_view s);

// Moves what is certain from the front of `bytes` to the result, broken sequences as U+FFFD. An
// unfinished sequence at the end stays in `bytes`, unless `at_end`.
[[nodiscard]] std::string take_lossy(std::string& bytes, bool at_end);

// The code point of a well-formed sequence of `length` bytes.
[[nodiscard]] char32_t code_point(std::string_view s, int length);
void append_utf8(std::string& out, char32_t c);

// Well-formed text as the regexes should see it. PCRE2 10.42 has the tables of Unicode 14 and
// counts U+180E as white space; the reference tokenizers have Unicode 16. A character on which
// they differ is replaced by an older one of the same general category, script (as far as Han is
// concerned) and UTF-8 length, so all offsets stay. Returns nullopt when nothing differs, which
// is nearly always.
[[nodiscard]] std::optional<std::string> with_stand_ins(std::string_view valid_utf8);

// The byte map (GPT-2 convention, §11.1): every byte has a printable stand-in character.
[[nodiscard]] char32_t char_of_byte(uint8_t byte);
// "Ġhi" → " hi". Empty optional when some character is no stand-in of a byte.
[[nodiscard]] std::optional<std::string> unmap_bytes(std::string_view mapped);

// `s` for a one-line message: quoted, cut after 40 bytes, control characters escaped.
[[nodiscard]] std::string quoted(std::string_view s);

} // namespace troupe::text

#include "config/tokenizer_text.hpp"

#include <algorithm>
#include <iterator>

namespace troupe::text {

namespace {

constexpr uint8_t byte_at(std::string_view s, size_t i) { return static_cast<uint8_t>(s[i]); }

// What may follow a lead byte: table 3-7 of the Unicode standard.
struct Lead {
  int length = 0; // 0: no lead byte
  uint8_t second_min = 0x80;
  uint8_t second_max = 0xBF;
};

constexpr Lead lead_of(uint8_t b) {
  if (b < 0x80)
    return {1};
  if (b < 0xC2)
    return {0};
  if (b < 0xE0)
    return {2};
  if (b < 0xF0)
    return {3, static_cast<uint8_t>(b == 0xE0 ? 0xA0 : 0x80),
            static_cast<uint8_t>(b == 0xED ? 0x9F : 0xBF)};
  if (b < 0xF5)
    return {4, static_cast<uint8_t>(b == 0xF0 ? 0x90 : 0x80),
            static_cast<uint8_t>(b == 0xF4 ? 0x8F : 0xBF)};
  return {0};
}

struct StandIn {
  char32_t first, last; // characters of Unicode 15, 15.1 and 16, and U+180E
  char32_t instead;
};

// Found by comparing the categories of all 1,112,064 characters; ordered. The stand-ins lie
// outside the literal ranges of the published DeepSeek-V2 regexes, except where the character
// itself lies inside.
constexpr StandIn kStandIns[] = {
    {0x897, 0x897, 0x898},       {0xcf3, 0xcf3, 0xcbe},       {0xece, 0xece, 0xecd},
    {0x180e, 0x180e, 0x200b},    {0x1b4e, 0x1b4f, 0x1b5a},    {0x1b7f, 0x1b7f, 0x1b5a},
    {0x1c89, 0x1c89, 0x10c7},    {0x1c8a, 0x1c8a, 0x1c80},    {0x2427, 0x2429, 0x2426},
    {0x2ffc, 0x2fff, 0x2ffb},    {0x31e4, 0x31e5, 0x31e3},    {0x31ef, 0x31ef, 0x31e3},
    {0xa7cb, 0xa7cc, 0xa7c9},    {0xa7cd, 0xa7cd, 0xa7ca},    {0xa7da, 0xa7da, 0xa7c9},
    {0xa7db, 0xa7db, 0xa7ca},    {0xa7dc, 0xa7dc, 0xa7c9},    {0x105c0, 0x105f3, 0x10000},
    {0x10d40, 0x10d49, 0x1d7ce}, {0x10d4a, 0x10d4d, 0x10000}, {0x10d4e, 0x10d4e, 0x16b40},
    {0x10d4f, 0x10d4f, 0x10000}, {0x10d50, 0x10d65, 0x1d400}, {0x10d69, 0x10d6d, 0x1d167},
    {0x10d6e, 0x10d6e, 0x10ead}, {0x10d6f, 0x10d6f, 0x16b40}, {0x10d70, 0x10d85, 0x1d41a},
    {0x10d8e, 0x10d8f, 0x1d6c1}, {0x10ec2, 0x10ec4, 0x10000}, {0x10efc, 0x10eff, 0x1d167},
    {0x1123f, 0x11240, 0x10000}, {0x11241, 0x11241, 0x1d167}, {0x11380, 0x11389, 0x10000},
    {0x1138b, 0x1138b, 0x10000}, {0x1138e, 0x1138e, 0x10000}, {0x11390, 0x113b5, 0x10000},
    {0x113b7, 0x113b7, 0x10000}, {0x113b8, 0x113ba, 0x11000}, {0x113bb, 0x113c0, 0x1d167},
    {0x113c2, 0x113c2, 0x11000}, {0x113c5, 0x113c5, 0x11000}, {0x113c7, 0x113ca, 0x11000},
    {0x113cc, 0x113cd, 0x11000}, {0x113ce, 0x113ce, 0x1d167}, {0x113cf, 0x113cf, 0x11000},
    {0x113d0, 0x113d0, 0x1d167}, {0x113d1, 0x113d1, 0x10000}, {0x113d2, 0x113d2, 0x1d167},
    {0x113d3, 0x113d3, 0x10000}, {0x113d4, 0x113d5, 0x10100}, {0x113d7, 0x113d8, 0x10100},
    {0x113e1, 0x113e2, 0x1d167}, {0x116d0, 0x116e3, 0x1d7ce}, {0x1171e, 0x1171e, 0x11000},
    {0x11b00, 0x11b09, 0x10100}, {0x11bc0, 0x11be0, 0x10000}, {0x11be1, 0x11be1, 0x10100},
    {0x11bf0, 0x11bf9, 0x1d7ce}, {0x11f00, 0x11f01, 0x1d167}, {0x11f02, 0x11f02, 0x10000},
    {0x11f03, 0x11f03, 0x11000}, {0x11f04, 0x11f10, 0x10000}, {0x11f12, 0x11f33, 0x10000},
    {0x11f34, 0x11f35, 0x11000}, {0x11f36, 0x11f3a, 0x1d167}, {0x11f3e, 0x11f3f, 0x11000},
    {0x11f40, 0x11f40, 0x1d167}, {0x11f41, 0x11f41, 0x11000}, {0x11f42, 0x11f42, 0x1d167},
    {0x11f43, 0x11f4f, 0x10100}, {0x11f50, 0x11f59, 0x1d7ce}, {0x11f5a, 0x11f5a, 0x1d167},
    {0x1342f, 0x1342f, 0x10000}, {0x13439, 0x1343f, 0x110bd}, {0x13440, 0x13440, 0x1d167},
    {0x13441, 0x13446, 0x10000}, {0x13447, 0x13455, 0x1d167}, {0x13460, 0x143fa, 0x10000},
    {0x16100, 0x1611d, 0x10000}, {0x1611e, 0x16129, 0x1d167}, {0x1612a, 0x1612c, 0x11000},
    {0x1612d, 0x1612f, 0x1d167}, {0x16130, 0x16139, 0x1d7ce}, {0x16d40, 0x16d42, 0x16b40},
    {0x16d43, 0x16d6a, 0x10000}, {0x16d6b, 0x16d6c, 0x16b40}, {0x16d6d, 0x16d6f, 0x10100},
    {0x16d70, 0x16d79, 0x1d7ce}, {0x18cff, 0x18cff, 0x10000}, {0x1b132, 0x1b132, 0x10000},
    {0x1b155, 0x1b155, 0x10000}, {0x1cc00, 0x1ccef, 0x1f000}, {0x1ccf0, 0x1ccf9, 0x1d7ce},
    {0x1cd00, 0x1ceb3, 0x1f000}, {0x1d2c0, 0x1d2d3, 0x10107}, {0x1df25, 0x1df2a, 0x1d41a},
    {0x1e030, 0x1e06d, 0x16b40}, {0x1e08f, 0x1e08f, 0x1d167}, {0x1e4d0, 0x1e4ea, 0x10000},
    {0x1e4eb, 0x1e4eb, 0x16b40}, {0x1e4ec, 0x1e4ef, 0x1d167}, {0x1e4f0, 0x1e4f9, 0x1d7ce},
    {0x1e5d0, 0x1e5ed, 0x10000}, {0x1e5ee, 0x1e5ef, 0x1d167}, {0x1e5f0, 0x1e5f0, 0x10000},
    {0x1e5f1, 0x1e5fa, 0x1d7ce}, {0x1e5ff, 0x1e5ff, 0x10100}, {0x1f6dc, 0x1f6dc, 0x1f000},
    {0x1f774, 0x1f776, 0x1f000}, {0x1f77b, 0x1f77f, 0x1f000}, {0x1f7d9, 0x1f7d9, 0x1f000},
    {0x1f8b2, 0x1f8bb, 0x1f000}, {0x1f8c0, 0x1f8c1, 0x1f000}, {0x1fa75, 0x1fa77, 0x1f000},
    {0x1fa87, 0x1fa89, 0x1f000}, {0x1fa8f, 0x1fa8f, 0x1f000}, {0x1faad, 0x1faaf, 0x1f000},
    {0x1fabb, 0x1fabf, 0x1f000}, {0x1fac6, 0x1fac6, 0x1f000}, {0x1face, 0x1facf, 0x1f000},
    {0x1fada, 0x1fadc, 0x1f000}, {0x1fadf, 0x1fadf, 0x1f000}, {0x1fae8, 0x1fae9, 0x1f000},
    {0x1faf7, 0x1faf8, 0x1f000}, {0x1fbcb, 0x1fbef, 0x1f000}, {0x2b739, 0x2b739, 0x20000},
    {0x2ebf0, 0x2ee5d, 0x20000}, {0x31350, 0x323af, 0x20000}};

const StandIn* find_stand_in(char32_t c) {
  if (c < kStandIns[0].first || (c >= 0x3200 && c < 0xA7CB) || (c >= 0xAC00 && c < 0x10000))
    return nullptr;
  const auto* it = std::upper_bound(std::begin(kStandIns), std::end(kStandIns), c,
                                    [](char32_t x, const StandIn& s) { return x < s.first; });
  if (it == std::begin(kStandIns) || c > std::prev(it)->last)
    return nullptr;
  return std::prev(it);
}

constexpr bool is_printable(int byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

struct ByteMap {
  std::array<char32_t, 256> to_char{};
  std::array<int16_t, 0x144> to_byte{}; // -1: stands for no byte
};

constexpr ByteMap make_byte_map() {
  ByteMap map;
  for (auto& b : map.to_byte)
    b = -1;
  char32_t next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const char32_t c = is_printable(byte) ? static_cast<char32_t>(byte) : next++;
    map.to_char[static_cast<size_t>(byte)] = c;
    map.to_byte[c] = static_cast<int16_t>(byte);
  }
  return map;
}

constexpr ByteMap kByteMap = make_byte_map();
static_assert(kByteMap.to_char[0x20] == 0x120 && kByteMap.to_char[0xAD] == 0x143);

} // namespace

int sequence_length(std::string_view s, bool* unfinished) {
  *unfinished = false;
  const Lead lead = lead_of(byte_at(s, 0));
  if (lead.length <= 1)
    return lead.length == 1 ? 1 : -1;
  for (int i = 1; i < lead.length; ++i) {
    if (static_cast<size_t>(i) == s.size()) {
      *unfinished = true;
      return -i;
    }
    const uint8_t b = byte_at(s, static_cast<size_t>(i));
    if (b < (i == 1 ? lead.second_min : 0x80) || b > (i == 1 ? lead.second_max : 0xBF))
      return -i;
  }
  return lead.length;
}

std::optional<size_t> first_invalid_utf8(std::string_view s) {
  size_t i = 0;
  while (i < s.size()) {
    if (byte_at(s, i) < 0x80) {
      ++i;
      continue;
    }
    bool unfinished = false;
    const int n = sequence_length(s.substr(i), &unfinished);
    if (n < 0)
      return i;
    i += static_cast<size_t>(n);
  }
  return std::nullopt;
}

std::string take_lossy(std::string& bytes, bool at_end) {
  const std::string_view s = bytes;
  std::string out;
  size_t i = 0;
  while (i < s.size()) {
    bool unfinished = false;
    const int n = sequence_length(s.substr(i), &unfinished);
    if (unfinished && !at_end)
      break;
    if (n > 0)
      out.append(s.substr(i, static_cast<size_t>(n)));
    else
      out.append(kReplacement);
    i += static_cast<size_t>(n > 0 ? n : -n);
  }
  bytes.erase(0, i);
  return out;
}

char32_t code_point(std::string_view s, int length) {
  if (length == 1)
    return byte_at(s, 0);
  char32_t c = byte_at(s, 0) & (0xFFu >> (length + 1));
  for (int i = 1; i < length; ++i)
    c = (c << 6) | (byte_at(s, static_cast<size_t>(i)) & 0x3Fu);
  return c;
}

void append_utf8(std::string& out, char32_t c) {
  const auto tail = [&](int shift) {
    out.push_back(static_cast<char>(0x80 | ((c >> shift) & 0x3F)));
  };
  if (c < 0x80) {
    out.push_back(static_cast<char>(c));
  } else if (c < 0x800) {
    out.push_back(static_cast<char>(0xC0 | (c >> 6)));
    tail(0);
  } else if (c < 0x10000) {
    out.push_back(static_cast<char>(0xE0 | (c >> 12)));
    tail(6);
    tail(0);
  } else {
    out.push_back(static_cast<char>(0xF0 | (c >> 18)));
    tail(12);
    tail(6);
    tail(0);
  }
}

std::optional<std::string> with_stand_ins(std::string_view s) {
  std::optional<std::string> out;
  size_t i = 0;
  while (i < s.size()) {
    const int n = byte_at(s, i) < 0x80 ? 1 : lead_of(byte_at(s, i)).length;
    // Characters of two bytes end at U+07FF, before the first that differs.
    const StandIn* found =
        n >= 3 ? find_stand_in(code_point(s.substr(i, static_cast<size_t>(n)), n)) : nullptr;
    if (found) {
      if (!out)
        out.emplace(s);
      std::string instead;
      append_utf8(instead, found->instead);
      out->replace(i, static_cast<size_t>(n), instead); // equal length
    }
    i += static_cast<size_t>(n);
  }
  return out;
}

char32_t char_of_byte(uint8_t byte) { return kByteMap.to_char[byte]; }

std::optional<std::string> unmap_bytes(std::string_view mapped) {
  std::string out;
  size_t i = 0;
  while (i < mapped.size()) {
    bool unfinished = false;
    const int n = sequence_length(mapped.substr(i), &unfinished);
    if (n < 0)
      return std::nullopt;
    const char32_t c = code_point(mapped.substr(i), n);
    if (c >= kByteMap.to_byte.size() || kByteMap.to_byte[c] < 0)
      return std::nullopt;
    out.push_back(static_cast<char>(kByteMap.to_byte[c]));
    i += static_cast<size_t>(n);
  }
  return out;
}

std::string quoted(std::string_view s) {
  constexpr size_t kMax = 40;
  constexpr char kHex[] = "0123456789abcdef";
  std::string out = "'";
  std::string rest{s.substr(0, kMax)};
  for (const char c : take_lossy(rest, true)) {
    const auto b = static_cast<uint8_t>(c);
    if (b < 0x20 || b == 0x7F)
      out += std::string{"\\x"} + kHex[b >> 4] + kHex[b & 15];
    else
      out += c;
  }
  return out + (s.size() > kMax ? "…'" : "'");
}

} // namespace troupe::text

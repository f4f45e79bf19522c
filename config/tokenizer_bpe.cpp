#include "config/tokenizer_bpe.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <queue>

namespace troupe {

namespace {

// From here on a heap is cheaper than scanning.
constexpr size_t kShortPiece = 48;

size_t table_size(size_t num_entries) {
  return std::bit_ceil(std::max<size_t>(2 * num_entries, 8));
}

uint64_t hash_bytes(std::string_view s) {
  constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15u;
  uint64_t h = s.size() * kMultiplier;
  while (!s.empty()) {
    uint64_t word = 0;
    const size_t n = std::min<size_t>(s.size(), 8);
    std::memcpy(&word, s.data(), n);
    h = (h ^ word) * kMultiplier;
    h ^= h >> 29;
    s.remove_prefix(n);
  }
  return h ^ (h >> 32);
}

} // namespace

void PairTable::reserve(size_t num_pairs) {
  const size_t size = table_size(num_pairs);
  slots_.assign(size, Slot{});
  mask_ = size - 1;
  shift_ = 64 - std::countr_zero(size);
}

void PairTable::put(int32_t left, int32_t right, Merge merge) {
  const uint64_t key = key_of(left, right);
  size_t i = start_of(key);
  while (slots_[i].key != kEmpty && slots_[i].key != key)
    i = (i + 1) & mask_;
  slots_[i] = Slot{key, merge};
}

void ByteTable::reserve(size_t num_tokens) {
  slots_.assign(table_size(num_tokens), Slot{});
  mask_ = slots_.size() - 1;
}

size_t ByteTable::slot_of(std::string_view bytes) const {
  size_t i = static_cast<size_t>(hash_bytes(bytes)) & mask_;
  while (slots_[i].id >= 0 && slots_[i].bytes != bytes)
    i = (i + 1) & mask_;
  return i;
}

bool ByteTable::put(std::string_view bytes, int32_t id) {
  Slot& slot = slots_[slot_of(bytes)];
  if (slot.id >= 0)
    return false;
  slot = Slot{bytes, id};
  return true;
}

int32_t ByteTable::find(std::string_view bytes) const {
  return slots_.empty() ? -1 : slots_[slot_of(bytes)].id;
}

BytePairEncoder::BytePairEncoder(PairTable pairs, std::array<int32_t, 256> byte_ids)
    : pairs_(std::move(pairs)), byte_ids_(byte_ids),
      all_bytes_(std::ranges::none_of(byte_ids, [](int32_t id) { return id < 0; })) {}

bool BytePairEncoder::has_all_bytes(std::string_view piece) const {
  return all_bytes_ || std::ranges::none_of(piece, [&](char c) { return id_of(c) < 0; });
}

caf::error BytePairEncoder::missing_byte(std::string_view piece) const {
  constexpr char kHex[] = "0123456789abcdef";
  const auto it = std::ranges::find_if(piece, [&](char c) { return id_of(c) < 0; });
  const auto byte = static_cast<uint8_t>(*it);
  return make_error(Errc::unsupported, std::string{"the vocabulary has no token for byte 0x"} +
                                           kHex[byte >> 4] + kHex[byte & 15]);
}

caf::error BytePairEncoder::encode(std::string_view piece, std::vector<int32_t>& ids) const {
  if (piece.empty())
    return {};
  if (const int32_t id = whole_.find(piece); id >= 0) {
    ids.push_back(id);
    return {};
  }
  if (!has_all_bytes(piece))
    return missing_byte(piece);
  if (piece.size() <= kShortPiece)
    merge_short(piece, ids);
  else
    merge_long(piece, ids);
  return {};
}

bool BytePairEncoder::merges_to(std::string_view piece, int32_t id) const {
  if (piece.empty() || !has_all_bytes(piece))
    return false;
  std::vector<int32_t> ids;
  if (piece.size() <= kShortPiece)
    merge_short(piece, ids);
  else
    merge_long(piece, ids);
  return ids.size() == 1 && ids.front() == id;
}

void BytePairEncoder::merge_short(std::string_view piece, std::vector<int32_t>& ids) const {
  std::array<int32_t, kShortPiece> symbols; // tokens so far, left to right
  std::array<Merge, kShortPiece> merges;    // merges[i] joins symbols[i] and symbols[i + 1]
  size_t n = piece.size();
  for (size_t i = 0; i < n; ++i)
    symbols[i] = id_of(piece[i]);
  for (size_t i = 0; i + 1 < n; ++i)
    merges[i] = pairs_.find(symbols[i], symbols[i + 1]);
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i)
      if (merges[i].rank < merges[best].rank)
        best = i;
    if (merges[best].id < 0)
      break;
    symbols[best] = merges[best].id;
    std::copy(symbols.begin() + static_cast<ptrdiff_t>(best) + 2,
              symbols.begin() + static_cast<ptrdiff_t>(n),
              symbols.begin() + static_cast<ptrdiff_t>(best) + 1);
    std::copy(merges.begin() + static_cast<ptrdiff_t>(best) + 1,
              merges.begin() + static_cast<ptrdiff_t>(n) - 1,
              merges.begin() + static_cast<ptrdiff_t>(best));
    --n;
    if (best > 0)
      merges[best - 1] = pairs_.find(symbols[best - 1], symbols[best]);
    if (best + 1 < n)
      merges[best] = pairs_.find(symbols[best], symbols[best + 1]);
  }
  ids.insert(ids.end(), symbols.begin(), symbols.begin() + static_cast<ptrdiff_t>(n));
}

void BytePairEncoder::merge_long(std::string_view piece, std::vector<int32_t>& ids) const {
  constexpr size_t kNone = SIZE_MAX;
  struct Symbol {
    int32_t id; // -1: merged into the symbol on its left
    size_t previous, next;
  };
  struct Candidate {
    uint32_t rank;
    int32_t id;
    size_t position;
    bool operator<(const Candidate& other) const { // the queue's top is its largest
      return rank != other.rank ? rank > other.rank : position > other.position;
    }
  };
  std::vector<Symbol> symbols(piece.size());
  for (size_t i = 0; i < piece.size(); ++i)
    symbols[i] = {id_of(piece[i]), i == 0 ? kNone : i - 1, i + 1 == piece.size() ? kNone : i + 1};

  std::vector<Candidate> first;
  const auto candidate = [&](size_t left, auto&& take) {
    const Merge merge = pairs_.find(symbols[left].id, symbols[symbols[left].next].id);
    if (merge.id >= 0)
      take(Candidate{merge.rank, merge.id, left});
  };
  for (size_t i = 0; i + 1 < symbols.size(); ++i)
    candidate(i, [&](const Candidate& c) { first.push_back(c); });
  std::priority_queue<Candidate> queue{std::less<Candidate>{}, std::move(first)};
  const auto push = [&](const Candidate& c) { queue.push(c); };

  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    Symbol& left = symbols[top.position];
    if (left.id < 0 || left.next == kNone)
      continue;
    Symbol& right = symbols[left.next];
    if (pairs_.find(left.id, right.id).id != top.id)
      continue; // an entry from before one of the two changed
    left.id = top.id;
    right.id = -1;
    left.next = right.next;
    if (left.next != kNone) {
      symbols[left.next].previous = top.position;
      candidate(top.position, push);
    }
    if (left.previous != kNone)
      candidate(left.previous, push);
  }
  for (const Symbol& symbol : symbols)
    if (symbol.id >= 0)
      ids.push_back(symbol.id);
}

} // namespace troupe

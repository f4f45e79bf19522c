// Byte-level BPE on one piece of text: merge the adjacent pair of lowest rank, leftmost on ties,
// until no adjacent pair can merge (specification §11.1). Equal to Hugging Face's `tokenizers` for
// merge lists and to tiktoken for rank files, where a pair's rank is the id of the joined bytes.
//
// Pieces of up to kShortPiece bytes are scanned; longer ones use a heap over a linked list, so
// that a piece of n bytes costs O(n log n) whatever it holds. Internal to the tokenizer.
#pragma once

#include "config/errors.hpp"

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace troupe {

// Ids are dense: the tables are arrays indexed by them. Published vocabularies have < 170,000.
inline constexpr int64_t kMaxTokenIds = int64_t{1} << 20;

struct Merge {
  uint32_t rank = UINT32_MAX; // UINT32_MAX: this pair does not merge
  int32_t id = -1;            // of the joined token
};

// (left id, right id) → Merge. Open addressing, at most half full.
class PairTable {
public:
  void reserve(size_t num_pairs);
  // A pair that is there already is overwritten, as in `tokenizers`. Room must have been reserved.
  void put(int32_t left, int32_t right, Merge merge);
  [[nodiscard]] Merge find(int32_t left, int32_t right) const {
    if (slots_.empty())
      return {};
    const uint64_t key = key_of(left, right);
    for (size_t i = start_of(key);; i = (i + 1) & mask_) {
      if (slots_[i].key == key)
        return slots_[i].merge;
      if (slots_[i].key == kEmpty)
        return {};
    }
  }

private:
  struct Slot {
    uint64_t key = kEmpty;
    Merge merge;
  };
  static constexpr uint64_t kEmpty = UINT64_MAX; // no pair: ids are below 2^20
  static uint64_t key_of(int32_t left, int32_t right) {
    return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) |
           static_cast<uint32_t>(right);
  }
  [[nodiscard]] size_t start_of(uint64_t key) const {
    return static_cast<size_t>((key * 0x9E3779B97F4A7C15u) >> shift_);
  }

  std::vector<Slot> slots_;
  size_t mask_ = 0;
  int shift_ = 64;
};

// Bytes of a token → id. Keeps views: the strings live in the tokenizer's table of tokens.
class ByteTable {
public:
  void reserve(size_t num_tokens);
  // False when these bytes are there already. Room must have been reserved.
  bool put(std::string_view bytes, int32_t id);
  [[nodiscard]] int32_t find(std::string_view bytes) const; // -1: none

private:
  struct Slot {
    std::string_view bytes;
    int32_t id = -1;
  };
  [[nodiscard]] size_t slot_of(std::string_view bytes) const;

  std::vector<Slot> slots_;
  size_t mask_ = 0;
};

class BytePairEncoder {
public:
  // `pairs` and the ids of the 256 single bytes (-1 where the vocabulary lacks one).
  BytePairEncoder(PairTable pairs, std::array<int32_t, 256> byte_ids);

  // Pieces that are one token without looking at merges.
  void set_whole(ByteTable whole) { whole_ = std::move(whole); }

  // Appends the ids of `piece`. Fails on a byte that has no token.
  [[nodiscard]] caf::error encode(std::string_view piece, std::vector<int32_t>& ids) const;
  // The same by merges alone: true when all of `piece` becomes the one token `id`.
  [[nodiscard]] bool merges_to(std::string_view piece, int32_t id) const;

private:
  [[nodiscard]] caf::error missing_byte(std::string_view piece) const;
  void merge_short(std::string_view piece, std::vector<int32_t>& ids) const;
  void merge_long(std::string_view piece, std::vector<int32_t>& ids) const;
  [[nodiscard]] bool has_all_bytes(std::string_view piece) const;
  [[nodiscard]] int32_t id_of(char byte) const { return byte_ids_[static_cast<uint8_t>(byte)]; }

  PairTable pairs_;
  std::array<int32_t, 256> byte_ids_;
  ByteTable whole_;
  bool all_bytes_ = false;
};

} // namespace troupe

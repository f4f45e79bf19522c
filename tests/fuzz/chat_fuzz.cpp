// Any bytes as conversations: refused with a text, or rows of samples that fit into them, each with
// something to learn.
#include "config/bpe_trainer.hpp"
#include "config/tokenizer.hpp"
#include "config/train_chat.hpp"

#include <algorithm>
#include <cstdlib>
#include <sstream>

namespace {

void require(bool condition) {
  if (!condition)
    std::abort();
}

// The 256 bytes and the special tokens.
std::shared_ptr<const troupe::Tokenizer> bytes_tokenizer() {
  auto trainer = troupe::BpeTrainer::make({300, 2, troupe::default_special_tokens()});
  require(bool{trainer});
  const auto trained = trainer->train([](int32_t) {});
  const auto tokenizer = troupe::load_tokenizer_json(
      {trained.tokenizer_json(), trained.tokenizer_config(), "", "bytes"});
  require(bool{tokenizer});
  return *tokenizer;
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto tokenizer = bytes_tokenizer();
  if (size == 0)
    return 0;
  const int64_t row_tokens = 1 + data[0];
  std::istringstream lines{{reinterpret_cast<const char*>(data) + 1, size - 1}};
  const auto rows =
      troupe::ChatRows::read(lines, "input", row_tokens, tokenizer->num_ids(), *tokenizer);
  if (!rows) {
    require(!troupe::text_of(rows.error()).empty());
    return 0;
  }
  size_t num_samples = 0;
  for (size_t r = 0; r < rows->num_rows(); ++r) {
    size_t length = 0;
    int64_t loss_tokens = 0;
    for (size_t i = 0; i < rows->samples_of_row(r); ++i, ++num_samples) {
      const auto sample = rows->sample(r, i);
      length += sample.ids.size();
      require(sample.has_loss.size() == sample.ids.size() && sample.has_loss[0] == 0);
      const auto count = std::ranges::count(sample.has_loss, 1);
      require(count > 0);
      loss_tokens += count;
    }
    require(length <= static_cast<size_t>(row_tokens) + 1);
    require(loss_tokens == rows->num_loss_tokens(r));
  }
  require(num_samples == rows->num_samples());
  return 0;
}

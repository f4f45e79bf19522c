// Any bytes as a safetensors file: the header is refused, or every tensor lies inside the file and
// has as many bytes as its shape says.
#include "config/safetensors.hpp"

#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span{data, size});
  const auto header = troupe::parse_safetensors_header(bytes, static_cast<int64_t>(size), "input");
  if (!header)
    return 0;
  int64_t end = header->data_offset;
  for (const auto& entry : header->entries) {
    int64_t elements = 1;
    for (const int64_t n : entry.shape)
      elements *= n;
    if (entry.offset != end || elements * troupe::size_of(entry.dtype) != entry.num_bytes)
      std::abort();
    end += entry.num_bytes;
  }
  if (end != static_cast<int64_t>(size))
    std::abort();
  return 0;
}

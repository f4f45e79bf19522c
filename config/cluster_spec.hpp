// A cluster as its operator describes it (config/cluster.proto, as text format). Protobuf ends
// here: everybody else sees this struct.
#pragma once

#include "config/errors.hpp"
#include "config/layout.hpp"

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace troupe {

struct ControlSpec {
  std::string host = "127.0.0.1";
  int32_t port = 0; // 0: any that is free
  std::string token;
  std::filesystem::path certificate, key, ca; // all or none

  [[nodiscard]] bool tls() const { return !certificate.empty(); }
};

struct HostSpec {
  std::string name;
  int32_t ranks = 0;
};

struct ClusterSpec {
  std::filesystem::path model;
  ClusterLayout layout;      // ranks, tp and nodes are in it
  std::string compute;       // "f32", "bf16" or "": by the checkpoint
  std::string fp8;           // "weights", "activations" or "": weights where the checkpoint is FP8
  int64_t kv_tokens = 16384; // per attention group
  int32_t batch = 16;
  int32_t prefill_chunk = 256;
  int32_t overlap_rows = 64;
  int32_t threads = 0; // per rank; 0: the host's cores divided by its ranks
  std::string fabric = "ucx";
  std::string backend; // "": the fastest that every rank has
  bool two_hop = false;
  uint64_t placement_seed = 0;
  int32_t speculate = 0;
  ControlSpec control;
  std::vector<HostSpec> hosts; // empty: all ranks on this host; else their ranks add up
};

// Errors are "SOURCE:LINE:COLUMN: field: what was expected", for meaning as for syntax; a field
// that is absent gives the place of the message it belongs in. Paths are taken relative to
// `folder`.
[[nodiscard]] caf::expected<ClusterSpec> parse_cluster_spec(std::string_view text,
                                                            std::string_view source,
                                                            const std::filesystem::path& folder);
[[nodiscard]] caf::expected<ClusterSpec> load_cluster_spec(const std::filesystem::path& path);

// Whether a host's name or address is this host and no other: a control port without TLS binds
// nothing else.
[[nodiscard]] bool is_loopback(std::string_view host);

} // namespace troupe

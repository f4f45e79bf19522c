// The fabric between processes: UCX active messages (docs: transport/README.md).
//
// Make it after the last fork: UCX starts threads. The first one made in a process puts defaults
// for UCX_* variables into the environment, where the user has not set them.
#pragma once

#include "transport/fabric.hpp"

#include <cstdint>
#include <memory>
#include <string>

namespace troupe {

struct UcxOptions {
  // Workers, each with a progress thread of its own. Peer p is served by channel p mod channels, so
  // a pair of ranks has one order.
  int channels = 1;
  // How long a progress thread looks for more before it sleeps. 0 on shared cores.
  int64_t spin_us = 0;
};

// Errc::invalid_argument for options, Errc::unsupported when UCX does not start.
[[nodiscard]] caf::expected<std::unique_ptr<Fabric>> make_ucx_fabric(FabricOptions options,
                                                                     UcxOptions ucx = {});

// The UCX_* variables in force, for the log: "UCX_TLS=tcp,self …".
[[nodiscard]] std::string ucx_settings();

} // namespace troupe

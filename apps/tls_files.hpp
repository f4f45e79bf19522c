// Looks at the files of mutual TLS before a process is started with them: CAF would take a wrong
// path for no certificate, and a wrong pair for a bad day.
#pragma once

#include "actors/tls.hpp"
#include "config/errors.hpp"

#include <string>

namespace troupe {

// `names` are what to call the three in errors: a cluster file's fields, or flags.
struct TlsNames {
  std::string certificate, key, ca;
};
[[nodiscard]] caf::error check_tls_files(const TlsFiles& files, const TlsNames& names);

} // namespace troupe

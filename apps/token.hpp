// The secret that members and clients of a cluster share.
#pragma once

#include <caf/error.hpp>
#include <caf/expected.hpp>

#include <string>

namespace troupe {

// 128 random bits from the kernel, in hexadecimal.
[[nodiscard]] caf::expected<std::string> random_token();

// The first line of a regular file of at most 4 KiB: at least 8 printable characters. Errors name
// the file.
[[nodiscard]] caf::expected<std::string> read_token(const std::string& path);

// What was given: the first that there is of `token`, `file`, and the environment's TROUPE_TOKEN
// and TROUPE_TOKEN_FILE; "" where there is none.
[[nodiscard]] caf::expected<std::string> given_token(const std::string& token,
                                                     const std::string& file);

// A secret of this user on this host, made when first asked for: $XDG_RUNTIME_DIR/troupe/secret, or
// /tmp/troupe-UID/secret. Errors where the folder or file is another's, or open to others.
[[nodiscard]] caf::expected<std::string> user_secret();

} // namespace troupe

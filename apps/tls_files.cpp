#include "apps/tls_files.hpp"

#include <openssl/err.h>
#include <openssl/ssl.h>

#include <fmt/format.h>

#include <memory>

namespace troupe {

namespace {

// The library's own words, without its error numbers.
std::string reason() {
  const char* text = ERR_reason_error_string(ERR_peek_last_error());
  ERR_clear_error();
  return text ? text : "unreadable";
}

} // namespace

caf::error check_tls_files(const TlsFiles& files, const TlsNames& names) {
  const auto bad = [](const std::string& name, const std::string& file, const std::string& what) {
    return make_error(Errc::invalid_argument, fmt::format("{}: {}: {}", name, file, what));
  };
  if (files.key.empty() || files.ca.empty() || files.certificate.empty())
    return make_error(Errc::invalid_argument, fmt::format("{}, {} and {} come together",
                                                          names.certificate, names.key, names.ca));
  const std::unique_ptr<SSL_CTX, void (*)(SSL_CTX*)> context{SSL_CTX_new(TLS_method()),
                                                             SSL_CTX_free};
  if (!context)
    return make_error(Errc::out_of_memory, "no memory for TLS");
  auto* c = context.get();
  if (SSL_CTX_use_certificate_chain_file(c, files.certificate.c_str()) != 1)
    return bad(names.certificate, files.certificate,
               fmt::format("no PEM certificate can be read ({})", reason()));
  if (SSL_CTX_use_PrivateKey_file(c, files.key.c_str(), SSL_FILETYPE_PEM) != 1)
    return bad(names.key, files.key,
               fmt::format("no PEM private key of that certificate can be read ({})", reason()));
  if (SSL_CTX_check_private_key(c) != 1)
    return bad(names.key, files.key, "is not the key of the certificate");
  if (SSL_CTX_load_verify_locations(c, files.ca.c_str(), nullptr) != 1)
    return bad(names.ca, files.ca, fmt::format("no PEM certificates can be read ({})", reason()));
  return {};
}

} // namespace troupe

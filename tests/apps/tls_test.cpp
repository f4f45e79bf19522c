// The control port over mutual TLS, with certificates that openssl(1) makes for the occasion.
#include "tests/apps/run_program.hpp"

#include <doctest/doctest.h>

#include <fmt/format.h>

namespace troupe::test {

namespace {

// Certificates: `node` and `client` of one authority, `stranger` of another.
class Authority {
public:
  explicit Authority(const Scratch& scratch) : scratch_(scratch) {
    for (const char* name : {"ca", "other"})
      openssl({"req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
               "-days", "2", "-keyout", path(name, "key"), "-out", path(name, "pem"), "-subj",
               std::string{"/CN="} + name});
    sign("node", "ca");
    sign("client", "ca");
    sign("stranger", "other");
  }
  [[nodiscard]] std::string path(const std::string& name, const char* kind) const {
    return scratch_.path(name + "." + kind);
  }
  [[nodiscard]] std::vector<std::string> flags(const std::string& name) const {
    return {"--tls-certificate", path(name, "pem"), "--tls-key",
            path(name, "key"),   "--tls-ca",        path("ca", "pem")};
  }

private:
  static void openssl(std::vector<std::string> args) {
    Program program{std::move(args), {}, "openssl"};
    const auto o = program.finish();
    CAPTURE(o.err);
    REQUIRE(o.code == 0);
  }
  void sign(const std::string& name, const std::string& authority) const {
    openssl({"req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout",
             path(name, "key"), "-out", path(name, "csr"), "-subj", "/CN=" + name});
    openssl({"x509", "-req", "-in", path(name, "csr"), "-CA", path(authority, "pem"), "-CAkey",
             path(authority, "key"), "-CAcreateserial", "-days", "2", "-out", path(name, "pem")});
  }

  const Scratch& scratch_;
};

// "attach":"HOST:PORT" of what launch --json prints.
std::string attach_of(const std::string& json) {
  const std::string key = "\"attach\":\"";
  const auto begin = json.find(key) + key.size();
  return json.substr(begin, json.find('"', begin) - begin);
}

} // namespace

TEST_CASE("a cluster over TLS serves whom its authority knows, and nobody else") {
  const Scratch s;
  const Authority authority{s};
  std::ofstream{s.path("c.textproto")}
      << "model: \"model\" ranks: 2 control { token: \"a token of this test\" certificate: "
         "\"node.pem\" key: \"node.key\" ca: \"ca.pem\" }";
  Program cluster{{"launch", s.path("c.textproto"), "--json"}};
  REQUIRE(cluster.await_output("attach", std::chrono::seconds{20}));
  const auto attach = attach_of(cluster.output());
  const auto ask = [&](const std::vector<std::string>& more) {
    std::vector<std::string> args{
        "generate", s.model,    "--tokens", "5,6",     "--max-tokens",        "3",
        "-q",       "--attach", attach,     "--token", "a token of this test"};
    args.insert(args.end(), more.begin(), more.end());
    return run(args);
  };
  const auto first = ask(authority.flags("client"));
  CAPTURE(first.err);
  CHECK(first.code == 0);
  const auto stranger = ask(authority.flags("stranger"));
  CHECK(stranger.code == 1);
  CHECK(stranger.err.find("does not take this certificate") != std::string::npos);
  const auto plain = ask({});
  CHECK(plain.code == 1);
  CHECK(plain.err.find("no cluster answers") != std::string::npos);
  const auto last = ask(authority.flags("node"));
  CHECK(last.code == 0);
  CHECK(last.out == first.out);
  cluster.signal_all(SIGINT);
  const auto o = cluster.finish();
  CHECK(o.code == 128 + SIGINT);
  CHECK(o.left_behind == 0);
}

TEST_CASE("a launcher's tasks meet over TLS, whom their authority knows") {
  const Scratch s;
  const Authority authority{s};
  const auto task = [&](int rank, int port, const std::string& name) {
    return fmt::format("RANK={0} LOCAL_RANK={0} WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 "
                       "MASTER_ADDR=127.0.0.1 MASTER_PORT={1} TROUPE_TLS_CERTIFICATE={2} "
                       "TROUPE_TLS_KEY={3} TROUPE_TLS_CA={4}",
                       rank, port, authority.path(name, "pem"), authority.path(name, "key"),
                       authority.path("ca", "pem"));
  };
  const auto args = "generate " + s.model + " --tokens 5,6 -n 3 -q --join-timeout 3";
  const auto good = run_tasks({task(0, 29487, "node"), task(1, 29487, "client")}, args);
  CAPTURE(good.err);
  CHECK(good.out.ends_with("rc=0\nrc=0\n"));
  const auto stranger = run_tasks({task(0, 29488, "node"), task(1, 29488, "stranger")}, args);
  CAPTURE(stranger.err);
  CHECK(stranger.out == "rc=1\nrc=1\n");
  CHECK(stranger.left_behind == 0);
  const auto wrong = run_tasks({task(0, 29489, "absent")}, args);
  CHECK(wrong.out == "rc=1\n");
  CHECK(wrong.err.find("TROUPE_TLS_CERTIFICATE: ") != std::string::npos);
}

TEST_CASE("files that make no TLS are refused before anything starts") {
  const Scratch s;
  const Authority authority{s};
  std::ofstream{s.path("junk.pem")} << "junk";
  const auto refused = [&](const std::string& certificate, const std::string& key,
                           const std::string& ca, const std::string& text) {
    std::ofstream{s.path("c.textproto")}
        << "model: \"model\" control { token: \"a token of this test\" certificate: \""
        << certificate << "\" key: \"" << key << "\" ca: \"" << ca << "\" }";
    const auto o = run({"launch", s.path("c.textproto")});
    CAPTURE(o.err);
    CHECK(o.code == 1);
    CHECK(o.err.find(text) != std::string::npos);
  };
  refused("absent.pem", "node.key", "ca.pem", "control.certificate: ");
  refused("junk.pem", "node.key", "ca.pem", "control.certificate: ");
  refused("node.pem", "junk.pem", "ca.pem", "control.key: ");
  refused("node.pem", "client.key", "ca.pem", "control.key: ");
  refused("node.pem", "node.key", "junk.pem", "control.ca: ");
  const auto o = run({"generate", s.model, "--tokens", "5", "--attach", "127.0.0.1:9",
                      "--tls-certificate", s.path("node.pem")});
  CHECK(o.code == 2);
  CHECK(o.err.find("come together") != std::string::npos);
}

} // namespace troupe::test

// Whoever dies, whenever: the run ends with one message that names the cause, a non-zero exit code,
// and nobody left behind.
#include "tests/apps/run_program.hpp"

#include <doctest/doctest.h>

#include <pty.h>

#include <algorithm>

namespace troupe::test {

namespace {

using std::chrono::milliseconds;

std::vector<std::string> long_run(const Scratch& s) {
  return {"generate", s.model,        "--tokens",       "5", "--max-tokens", "4000", "--ranks", "3",
          "-q",       "--ignore-eos", "--join-timeout", "10"};
}

// Waits until the run writes its answer, and a little longer.
bool get_going(Program& p, size_t children, milliseconds then) {
  if (!p.await_output(",", std::chrono::seconds{20}) || p.children().size() != children)
    return false;
  usleep(static_cast<useconds_t>(then.count()) * 1000);
  return true;
}

size_t lines(const std::string& text) {
  return static_cast<size_t>(std::count(text.begin(), text.end(), '\n'));
}

} // namespace

TEST_CASE("a killed rank ends the run, named once") {
  const Scratch s;
  for (const size_t victim : {0U, 2U}) {
    Program p{long_run(s)};
    REQUIRE(get_going(p, 4, milliseconds{50}));
    kill(p.children()[victim], SIGKILL);
    const auto o = p.finish();
    CHECK(o.code == 1);
    CHECK(o.err == "troupe: error: rank " + std::to_string(victim) +
                       " was lost: it was killed by signal 9 (Killed)\n");
    CHECK(o.left_behind == 0);
  }
}

TEST_CASE("a rank killed while the cluster forms ends it at once") {
  const Scratch s;
  Program p{long_run(s)};
  while (p.children().size() < 2)
    usleep(1000);
  kill(p.children()[1], SIGKILL);
  const auto start = Program::Clock::now();
  const auto o = p.finish();
  CHECK(o.code == 1);
  CHECK(o.err == "troupe: error: rank 1 was lost: it was killed by signal 9 (Killed)\n");
  CHECK(o.left_behind == 0);
  CHECK(Program::Clock::now() - start < std::chrono::seconds{4});
}

TEST_CASE("a rank that is stopped before it serves ends the run and is named") {
  const Scratch s;
  Program p{long_run(s)};
  while (p.children().size() < 2)
    usleep(1000);
  kill(p.children()[1], SIGSTOP);
  const auto o = p.finish();
  CHECK(o.code == 1);
  CHECK(o.err == "troupe: error: rank 1 was lost: it was stopped by a signal and did not go on\n");
  CHECK(o.left_behind == 0);
}

TEST_CASE("a run that is stopped as a whole goes on") {
  const Scratch s;
  Program p{{"generate", s.model, "--tokens", "5,6,7", "--max-tokens", "1000", "--ignore-eos",
             "--ranks", "3", "-q"}};
  REQUIRE(get_going(p, 4, milliseconds{20}));
  p.signal_all(SIGSTOP);
  usleep(5'000'000); // longer than the ranks' and the agent's patience with one of them
  p.signal_all(SIGCONT);
  const auto o = p.finish();
  CAPTURE(o.err);
  CHECK(o.code == 0);
  CHECK(std::count(o.out.begin(), o.out.end(), ',') == 999);
}

TEST_CASE("a stopped rank is missed by its peers and named") {
  const Scratch s;
  Program p{long_run(s)};
  REQUIRE(get_going(p, 4, milliseconds{50}));
  kill(p.children()[1], SIGSTOP);
  const auto o = p.finish();
  CHECK(o.code == 1);
  CHECK(lines(o.err) == 1);
  CAPTURE(o.err);
  CHECK(o.err.find("rank 1 was lost") != std::string::npos);
  CHECK(o.left_behind == 0);
}

TEST_CASE("nobody outlives the agent, and a killed client ends the ranks") {
  const Scratch s;
  {
    Program p{long_run(s)};
    REQUIRE(get_going(p, 4, milliseconds{10}));
    kill(p.pid(), SIGKILL);
    const auto o = p.finish();
    CHECK(o.code == 128 + SIGKILL);
    CHECK(o.left_behind == 0);
  }
  Program p{long_run(s)};
  REQUIRE(get_going(p, 4, milliseconds{10}));
  kill(p.children()[3], SIGKILL);
  const auto o = p.finish();
  CHECK(o.code == 1);
  CHECK(o.err == "troupe: error: the client was killed by signal 9 (Killed)\n");
  CHECK(o.left_behind == 0);
}

TEST_CASE("a signal to the whole group ends the run with 128 + n and no words") {
  const Scratch s;
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
    CAPTURE(signal);
    Program p{long_run(s)};
    REQUIRE(get_going(p, 4, milliseconds{10}));
    p.signal_all(signal);
    const auto o = p.finish();
    CHECK(o.code == 128 + signal);
    CHECK(o.err.empty());
    CHECK(o.left_behind == 0);
  }
}

TEST_CASE("a launched cluster serves clients with its token until it is told to stop") {
  const Scratch s;
  std::ofstream{s.path("c.textproto")} << "model: \"model\" ranks: 2 "
                                          "control { token: \"correct horse\" }";
  Program cluster{{"launch", s.path("c.textproto"), "--json"}};
  REQUIRE(cluster.await_output("\n", std::chrono::seconds{20}));
  auto address = cluster.output();
  address = address.substr(address.find("127.0.0.1:"));
  address = address.substr(0, address.find('"'));
  const auto client = [&](const std::string& token) {
    return TROUPE_PROGRAM " generate " + s.model + " --tokens 5,7 -n 3 -q --attach " + address +
           " --token '" + token + "'";
  };
  // Clients are children of a shell of their own, so that the cluster is not taken for an orphan.
  const auto shell = [](const std::string& command) { return system(command.c_str()); };
  CHECK(shell(client("correct horse") + " >" + s.path("a") + " & " + client("correct horse") +
              " >" + s.path("b") + " && wait && cmp " + s.path("a") + " " + s.path("b")) == 0);
  CHECK(shell(client("battery staple") + " 2>" + s.path("e")) != 0);
  std::ifstream refused{s.path("e")};
  std::string line;
  std::getline(refused, line);
  CHECK(line.find("token") != std::string::npos);
  kill(cluster.pid(), SIGTERM);
  const auto o = cluster.finish();
  CHECK(o.code == 128 + SIGTERM);
  CHECK(o.err.empty());
  CHECK(o.left_behind == 0);
}

TEST_CASE("a killed client's request ends, and leaves the cluster's memory to the next") {
  const Scratch s;
  // Room for one of these requests, not for two.
  std::ofstream{s.path("c.textproto")} << "model: \"model\" ranks: 2 kv_tokens: 4096 "
                                          "control { token: \"correct horse\" port: 29475 }";
  Program cluster{{"launch", s.path("c.textproto"), "--json"}};
  REQUIRE(cluster.await_output("\n", std::chrono::seconds{20}));
  const auto request = [&](const std::string& max_tokens) {
    return std::vector<std::string>{"generate", s.model,           "--tokens", "5,7",
                                    "-n",       max_tokens,        "-q",       "--ignore-eos",
                                    "--attach", "127.0.0.1:29475", "--token",  "correct horse"};
  };
  for (int i = 0; i < 3; ++i) {
    Program client{request("4000")};
    REQUIRE(client.await_output(",", std::chrono::seconds{20}));
    kill(client.pid(), SIGKILL);
    CHECK(client.finish().code == 128 + SIGKILL);
  }
  const auto o = run(request("4000"));
  CAPTURE(o.err);
  CHECK(o.code == 0);
  CHECK(std::count(o.out.begin(), o.out.end(), ',') == 3999);
  kill(cluster.pid(), SIGTERM);
  CHECK(cluster.finish().left_behind == 0);
}

TEST_CASE("garbage on the control port harms nobody") {
  const Scratch s;
  std::ofstream{s.path("c.textproto")} << "model: \"model\" ranks: 2 "
                                          "control { token: \"correct horse\" port: 29476 }";
  Program cluster{{"launch", s.path("c.textproto"), "--json"}};
  REQUIRE(cluster.await_output("\n", std::chrono::seconds{20}));
  const auto frame = [](char kind, const std::string& length) {
    return std::string{kind} + std::string(3, '\0') + length + std::string(24, '\0');
  };
  const std::string none(4, '\0');
  // The second made CAF follow a null pointer; the third takes 4 GiB where it is believed.
  for (const auto& bytes :
       {std::string{"GET / HTTP/1.1\r\nHost: troupe\r\n\r\n"}, frame(1, none),
        frame(1, "\xff\xff\xff\xff"), frame(2, none), frame(0, none) + std::string(64, '\xff'),
        std::string(1000, '\xff'), std::string{}}) {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in to{};
    to.sin_family = AF_INET;
    to.sin_port = htons(29476);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    REQUIRE(connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof to) == 0);
    CHECK(send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(bytes.size()));
    usleep(20'000);
    close(fd);
  }
  const auto o = run({"generate", s.model, "--tokens", "5,7", "-n", "3", "-q", "--attach",
                      "127.0.0.1:29476", "--token", "correct horse"});
  CAPTURE(o.err);
  CHECK(o.code == 0);
  kill(cluster.pid(), SIGTERM);
  const auto end = cluster.finish();
  CHECK(end.code == 128 + SIGTERM);
  CHECK(end.err.empty());
  CHECK(end.left_behind == 0);
}

TEST_CASE("a client of something that is no cluster gives up, saying why") {
  const Scratch s;
  const SilentPort silent;
  const auto address = "127.0.0.1:" + std::to_string(silent.port());
  const auto o = run({"generate", s.model, "--tokens", "5", "--attach", address, "--token", "any"});
  CAPTURE(o.err);
  CHECK_FALSE(o.timed_out);
  CHECK(o.code == 1);
  CHECK(o.err.find("no cluster answers at " + address) != std::string::npos);
  CHECK(lines(o.err) == 1);
}

TEST_CASE("closing the terminal leaves nobody behind") {
  const Scratch s;
  int master = -1;
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  const pid_t pid = forkpty(&master, nullptr, nullptr, nullptr);
  REQUIRE(pid >= 0);
  if (pid == 0) {
    execl(TROUPE_PROGRAM, TROUPE_PROGRAM, "generate", s.model.c_str(), "--tokens", "5", "-n",
          "4000", "--ranks", "3", "--ignore-eos", "-q", nullptr);
    _exit(127);
  }
  std::string shown;
  char bytes[4096];
  for (ssize_t n = 1; n > 0 && shown.find(',') == std::string::npos;)
    if ((n = read(master, bytes, sizeof bytes)) > 0)
      shown.append(bytes, static_cast<size_t>(n));
  CHECK(shown.find(',') != std::string::npos);
  close(master); // SIGHUP to the session, and writes to the terminal fail
  const auto deadline = Program::Clock::now() + std::chrono::seconds{10};
  int status = 0;
  bool ended = false;
  while (!(ended = waitpid(pid, &status, WNOHANG) == pid) && Program::Clock::now() < deadline)
    usleep(5'000);
  CHECK(ended);
  CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 128 + SIGHUP));
  // Its ranks are ours by now, and of its group.
  pid_t left = 0;
  while ((left = waitpid(-pid, nullptr, WNOHANG)) >= 0 && Program::Clock::now() < deadline)
    usleep(5'000);
  CHECK(left < 0);
  kill(-pid, SIGKILL);
}

TEST_CASE("two hosts of one cluster file start, serve and end together") {
  const Scratch s;
  const auto file = s.path("c.textproto");
  std::ofstream{file}
      << "model: \"model\" ranks: 3 control { token: \"correct horse\" port: 29473 } "
         "hosts { name: \"one\" ranks: 2 } hosts { name: \"two\" ranks: 1 }";
  // The second host may come first: it looks for the seed until the join timeout.
  Program two{{"launch", file, "--host", "two", "--json"}};
  Program one{{"launch", file, "--host", "one", "--json"}};
  REQUIRE(one.await_output("\n", std::chrono::seconds{20}));
  REQUIRE(two.await_output("\n", std::chrono::seconds{20}));
  CHECK(one.output().find("\"ranks\":2") != std::string::npos);
  CHECK(two.output().find("\"ranks\":1") != std::string::npos);
  CHECK(two.output().find("\"host\":\"two\"") != std::string::npos);
  const auto command = TROUPE_PROGRAM " generate " + s.model + " --tokens 5,7 -n 3 -q --attach " +
                       file + " >" + s.path("a");
  CHECK(system(command.c_str()) == 0);
  kill(one.pid(), SIGTERM);
  const auto first = one.finish();
  CHECK(first.code == 128 + SIGTERM);
  CHECK(first.left_behind == 0);
  const auto second = two.finish();
  CHECK(second.code == 0);
  CHECK(second.err.empty());
  CHECK(second.left_behind == 0);
}

TEST_CASE("a host that is none, or whose seed does not answer, is told") {
  const Scratch s;
  const auto file = s.path("c.textproto");
  const std::string hosts = "hosts { name: \"one\" ranks: 1 } hosts { name: \"two\" ranks: 1 }";
  const std::string start = "model: \"model\" ranks: 2 control { token: \"correct horse\" ";
  const auto write = [&](const std::string& text) { std::ofstream{file} << text; };
  write(start + "port: 29474 } " + hosts);
  auto o = run({"launch", file, "--host", "three"});
  CHECK(o.code == 2);
  CHECK(o.err.find("host: \"three\" given, expected one of one, two") != std::string::npos);
  o = run({"launch", file});
  CHECK(o.code == 2);
  CHECK(o.err.find("is none of one, two; name it with --host") != std::string::npos);
  o = run({"launch", file, "--host", "two", "--join-timeout", "1"});
  CHECK(o.code == 1);
  CAPTURE(o.err);
  CHECK(o.err.find("127.0.0.1:29474") != std::string::npos);
  CHECK(o.left_behind == 0);
  write(start + "} " + hosts);
  o = run({"launch", file, "--host", "one"});
  CHECK(o.code == 1);
  CHECK(o.err.find("control.port") != std::string::npos);
  write(start + "}");
  o = run({"launch", file, "--host", "one"});
  CHECK(o.code == 2);
  CHECK(o.err.find("the file names no hosts") != std::string::npos);
}

TEST_CASE("launcher variables make ranks of separate tasks, and they end together") {
  const Scratch s;
  const std::string tasks =
      "for i in 0 1 2; do RANK=$i WORLD_SIZE=3 LOCAL_RANK=$i LOCAL_WORLD_SIZE=3 "
      "MASTER_ADDR=127.0.0.1 MASTER_PORT=29471 " TROUPE_PROGRAM
      " generate $M --tokens 5,7 -n 3 -q $([ $i = 1 ] && echo $EXTRA) & "
      "pids=\"$pids $!\"; done; for p in $pids; do wait $p; echo rc=$?; done";
  const auto run_tasks = [&](const std::string& extra) {
    return Program{{"-c", "M=" + s.model + " EXTRA='" + extra + "'; " + tasks}, {}, "bash"}
        .finish();
  };
  const auto good = run_tasks("");
  CHECK(good.out.find("rc=0\nrc=0\nrc=0\n") != std::string::npos);
  CHECK(good.err.empty());
  CHECK(good.left_behind == 0);
  const auto bad = run_tasks("--compute bf16");
  CAPTURE(bad.err);
  CHECK(bad.out == "rc=1\nrc=1\nrc=1\n");
  CHECK(bad.err.find("ranks disagree about the arithmetic") != std::string::npos);
  CHECK(bad.left_behind == 0);
}

} // namespace troupe::test

// Ranks as the tasks that Slurm, mpirun or torchrun start, by the variables these set.
#include "tests/apps/run_program.hpp"

#include <doctest/doctest.h>

#include <fmt/format.h>

#include <sys/stat.h>

namespace troupe::test {

namespace {

std::string torchrun(int rank, int port, const std::string& more = "") {
  return fmt::format("RANK={0} LOCAL_RANK={0} WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 "
                     "MASTER_ADDR=127.0.0.1 MASTER_PORT={1} {2}",
                     rank, port, more);
}

std::string generate(const std::string& model) {
  return "generate " + model + " --tokens 5,7 -n 4 -q";
}

void write(const std::string& path, const std::string& text) { std::ofstream{path} << text; }

} // namespace

TEST_CASE("what srun starts gives the tokens of one process") {
  const Scratch s;
  const auto alone = run({"generate", s.model, "--tokens", "5,7", "-n", "4", "-q"});
  REQUIRE(alone.code == 0);
  const auto task = [](int rank) {
    return fmt::format("SLURM_PROCID={0} SLURM_LOCALID={0} SLURM_STEP_NUM_TASKS=2 "
                       "SLURM_STEP_NUM_NODES=1 SLURM_JOB_ID=4711 SLURM_STEP_ID=0",
                       rank);
  };
  const auto o = run_tasks({task(0), task(1)}, generate(s.model));
  CAPTURE(o.err);
  CHECK(o.out == alone.out + "rc=0\nrc=0\n");
  CHECK(o.left_behind == 0);
}

TEST_CASE("a launcher's variable that can't be is named") {
  const Scratch s;
  for (const auto& [name, value, expected] : {std::array{"MASTER_PORT", "70000", "1 to 65535"},
                                              {"MASTER_PORT", "here", "1 to 65535"},
                                              {"RANK", "2", "0 to 1"},
                                              {"RANK", "first", "0 to 1"},
                                              {"WORLD_SIZE", "0", "1 to 65536"},
                                              {"LOCAL_RANK", "-1", "0 to 65536"}}) {
    const auto o =
        run_tasks({torchrun(0, 29481, fmt::format("{}={}", name, value))}, generate(s.model));
    CAPTURE(o.err);
    CHECK(o.out == "rc=1\n");
    CHECK(o.err.find(fmt::format("environment {}: expected {}, got \"{}\"", name, expected,
                                 value)) != std::string::npos);
  }
  const auto mpi = run_tasks({"OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=2"}, generate(s.model));
  CHECK(mpi.err.find("environment OMPI_COMM_WORLD_RANK: expected 0 to 1") != std::string::npos);
  // Left over from something else, they say nothing.
  const auto stray = run_tasks({"RANK=first WORLD_SIZE=many"}, generate(s.model));
  CHECK(stray.out.ends_with("rc=0\n"));
}

TEST_CASE("tasks with another token, or another model, are refused") {
  const Scratch s;
  write(s.path("token"), "a secret of these tests\nand a remark\n");
  write(s.path("other"), "another secret\n");
  const auto with = [&](int port, const char* file) {
    return run_tasks({torchrun(0, port, "TROUPE_TOKEN_FILE=" + s.path("token")),
                      torchrun(1, port, "TROUPE_TOKEN_FILE=" + s.path(file))},
                     generate(s.model) + " --join-timeout 3");
  };
  const auto same = with(29482, "token");
  CAPTURE(same.err);
  CHECK(same.out.ends_with("rc=0\nrc=0\n"));
  const auto other = with(29483, "other");
  CAPTURE(other.err);
  CHECK(other.out == "rc=1\nrc=1\n");
  CHECK(other.err.find("the cluster token is wrong") != std::string::npos);
  CHECK(other.left_behind == 0);

  REQUIRE(run({"init", "tiny-v3", s.path("second"), "--dtype", "f32", "--seed", "9"}).code == 0);
  std::filesystem::create_directory(s.path("a"));
  std::filesystem::create_directory(s.path("b"));
  std::filesystem::create_directory_symlink(s.model, s.path("a/m"));
  std::filesystem::create_directory_symlink(s.path("second"), s.path("b/m"));
  const auto models = run_tasks({"-C " + s.path("a") + " " + torchrun(0, 29484),
                                 "-C " + s.path("b") + " " + torchrun(1, 29484)},
                                generate("m"));
  CAPTURE(models.err);
  CHECK(models.out == "rc=1\nrc=1\n");
  CHECK(models.err.find("disagree about the model") != std::string::npos);
}

TEST_CASE("a file that holds no token is named") {
  const Scratch s;
  write(s.path("empty"), "");
  write(s.path("short"), "secret\n");
  write(s.path("bell"), "a token\a with a bell\n");
  write(s.path("long"), std::string(5000, 'x'));
  REQUIRE(mkfifo(s.path("pipe").c_str(), 0600) == 0);
  for (const char* name : {"absent", "empty", "short", "bell", "long", "pipe", "model"}) {
    const auto o = run({"generate", s.model, "--tokens", "5", "--attach", "127.0.0.1:9",
                        "--token-file", s.path(name)});
    CAPTURE(o.err);
    CHECK(o.code == 1);
    CHECK(o.err.starts_with("troupe: error: " + s.path(name) + ": "));
  }
  const auto both = run({"generate", s.model, "--tokens", "5", "--attach", "127.0.0.1:9", "--token",
                         "a secret of one", "--token-file", s.path("long")});
  CHECK(both.code == 2);
}

TEST_CASE("tasks on one host share a secret that is their user's alone") {
  const Scratch s;
  const auto start = [&](int port) {
    return run_tasks({torchrun(0, port, "XDG_RUNTIME_DIR=" + s.folder.string()),
                      torchrun(1, port, "XDG_RUNTIME_DIR=" + s.folder.string())},
                     generate(s.model));
  };
  const auto first = start(29485);
  CAPTURE(first.err);
  CHECK(first.out.ends_with("rc=0\nrc=0\n"));
  struct stat secret {};
  REQUIRE(stat(s.path("troupe/secret").c_str(), &secret) == 0);
  CHECK((secret.st_mode & 0777) == 0600);
  REQUIRE(chmod(s.path("troupe").c_str(), 0755) == 0);
  const auto open = start(29486);
  CHECK(open.out == "rc=1\nrc=1\n");
  CHECK(open.err.find("this user's alone") != std::string::npos);
}

TEST_CASE("a meeting point that is taken is named") {
  const Scratch s;
  const SilentPort taken;
  const int port = taken.port();
  const auto o =
      run_tasks({torchrun(0, port), torchrun(1, port)}, generate(s.model) + " --join-timeout 2");
  CAPTURE(o.err);
  CHECK(o.out == "rc=1\nrc=1\n");
  CHECK(o.err.find(fmt::format("127.0.0.1:{}", port)) != std::string::npos);
  CHECK(o.left_behind == 0);
}

} // namespace troupe::test

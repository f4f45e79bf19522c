// Two micro-batches in flight: while one waits for the wire, the other computes.
#include "actors/in_process_cluster.hpp"
#include "tests/actors/small_models.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <string_view>
#include <vector>

using namespace troupe;
using namespace troupe::test;

namespace {

// How long an attention rank waited for the wire, and how much of that its trunk computed: other
// steps, since a step that waits has only shared experts to compute.
struct Waiting {
  Nanoseconds all{0}, computing{0};
};

Waiting waiting_of(const std::vector<Span>& spans) {
  Waiting waiting;
  for (const auto& wait : spans) {
    if (std::string_view{wait.track} != "wire")
      continue;
    waiting.all += wait.end - wait.begin;
    for (const auto& span : spans)
      if (std::string_view{span.name} == "trunk")
        waiting.computing += std::max(Nanoseconds{0}, std::min(wait.end, span.end) -
                                                          std::max(wait.begin, span.begin));
  }
  return waiting;
}

Waiting run_prompts(const std::string& model, int64_t overlap_rows) {
  auto options = one_rank(model, DType::f32);
  set_shape(options, 3, false, 1, 1);
  options.limits.max_speculate = 0;
  options.limits.overlap_rows = overlap_rows;
  options.trace = true;
  auto cluster = InProcessCluster::start(options);
  if (!cluster)
    FAIL(text_of(cluster.error()));
  constexpr int kRequests = 4;
  for (uint64_t i = 0; i < kRequests; ++i) {
    RequestSpec spec;
    spec.prompt = random_prompt(100, i, 256);
    spec.max_tokens = 8;
    spec.ignore_eos = true;
    REQUIRE((*cluster)->client().submit(spec));
  }
  for (int i = 0; i < kRequests; ++i) {
    const auto done = (*cluster)->client().wait({});
    REQUIRE(done);
    REQUIRE(done->error == "");
  }
  return waiting_of((*cluster)->host(0).rank().trace().spans());
}

} // namespace

TEST_CASE("while one micro-batch waits for the wire the other computes") {
  const TemporaryModel model{*preset("tiny-v3")};
  const auto alone = run_prompts(model.path(), 0);
  const auto two = run_prompts(model.path(), 1);
  REQUIRE(alone.all.count() > 0);
  CHECK(alone.computing.count() == 0); // nothing else to do
  // A third of the waiting on an idle machine, next to nothing beside busy ones.
  CHECK(two.computing.count() > 0);
}

// Reading part of a checkpoint with a few threads: jobs, each with the bytes it reads, run in the
// order those bytes lie in the files.
//
// The disk sees one stream: whoever takes a job first asks the kernel for what comes up to
// kReadAhead bytes later. Before a job runs its bytes are mapped with errors instead of signals (a
// file that shrank since it was opened gives an error, not SIGBUS), afterwards they are released,
// so that at most kReadAhead and the jobs at hand are resident of the files.
#pragma once

#include "config/checkpoint.hpp"
#include "config/errors.hpp"
#include "kernels/weights.hpp"

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace troupe {

class LoadPlan {
public:
  static constexpr int64_t kReadAhead = int64_t{64} << 20;
  // What a job should read: large enough to stream, small enough to share among threads.
  static constexpr int64_t kJobBytes = int64_t{4} << 20;

  explicit LoadPlan(const Checkpoint& checkpoint) : checkpoint_(&checkpoint) {}

  // Bytes [offset, offset + size) of a tensor.
  struct Piece {
    const TensorView* tensor = nullptr;
    int64_t offset = 0, size = 0;
  };
  // `work` reads the pieces (at least one), and all of the tensors in `shared`, and may run on any
  // thread beside other jobs. What many jobs share (block scales) is small, does not count as bytes
  // and is released when the plan has run.
  void add(std::vector<Piece> pieces, std::function<caf::error()> work,
           std::vector<const TensorView*> shared = {});

  [[nodiscard]] int64_t bytes() const { return bytes_; }
  // Runs all jobs; the first error ends it. `progress` (may be empty) is called by one thread at a
  // time with bytes_before + what this plan has read, of bytes_total.
  [[nodiscard]] caf::error run(int num_threads, const LoadProgress& progress, int64_t bytes_before,
                               int64_t bytes_total);

private:
  struct Job {
    std::vector<Piece> pieces;
    std::vector<const TensorView*> shared;
    std::function<caf::error()> work;
    int64_t bytes = 0;
  };
  class Runner;

  const Checkpoint* checkpoint_; // outlives the plan
  std::vector<Job> jobs_;
  int64_t bytes_ = 0;
};

} // namespace troupe

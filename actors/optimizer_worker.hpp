// What the optimizer actor does, step by step; jobs share its ownership.
#pragma once

#include "actors/optimizer_state.hpp"
#include "actors/train_messages.hpp"

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace troupe {

class OptimizerWorker : public std::enable_shared_from_this<OptimizerWorker> {
public:
  // `job_done` sends JobDone to the actor; callable from any thread.
  OptimizerWorker(std::shared_ptr<const TrainContext> context,
                  std::shared_ptr<OptimizerState> state, std::function<void(uint64_t)> job_done);

  // Handlers of the actor. They throw what went wrong.
  void gradients_ready(const GradientsReady& news);
  void on_piece(Envelope&& message);
  void on_taken(const TensorTaken& news);
  void apply(const ApplyUpdate& command);
  void save(const SaveShard& command);
  void on_job(uint64_t ticket);

private:
  static constexpr int64_t kPieceElements = 1 << 20; // 4 MiB
  static constexpr int64_t kWindowBytes = 32 << 20;
  // What a piece is of, in the header's `attempt`: a part's number, or
  static constexpr uint32_t kValues = 0xffffffff, kDump = 0xfffffffe;

  struct Piece {
    RankId to;
    uint32_t tensor = 0, part = 0;
    int64_t begin = 0, count = 0;
    const float* from = nullptr; // of the tensor's first element; lives until the step's end
  };
  // The gradient of a tensor that this rank owns.
  struct Gather {
    std::vector<float*> parts;
    std::vector<Floats> received; // memory of those that came from afar
    int64_t missing = 0;          // elements
    bool summed = false;
  };
  using PieceKey = std::tuple<uint32_t, uint32_t, int64_t, RankId>;

  void begin_step(int64_t step);
  void reduce_lanes(Workers& workers);
  void queue_pieces(RankId to, uint32_t tensor, uint32_t part, const float* from);
  void pump();
  void check(const Envelope& message) const;
  void take_pieces();
  void copy_piece(const Envelope& message);
  void sum_ready();
  void send_norms();
  void adamw(const ApplyUpdate& command, Workers& workers);
  void set_biases(const ApplyUpdate& command);
  void average();
  void write_dump();
  void commit_if_done();
  void run(const char* name, std::function<void(Workers&)> work, std::function<void()> then);
  void run_on(ComputeStream& stream, const char* name, std::function<void(Workers&)> work,
              std::function<void()> then);

  [[nodiscard]] const PlannedTensor& planned(uint32_t tensor) const {
    return context_->tensors[tensor];
  }
  [[nodiscard]] bool owns(uint32_t tensor) const {
    return planned(tensor).owner == context_->self();
  }

  const std::shared_ptr<const TrainContext> context_;
  const std::shared_ptr<OptimizerState> state_;
  const std::function<void(uint64_t)> job_done_;

  // ---- of the step ----
  int64_t step_ = 0;
  bool applied_ = false, preparing_ = false;
  std::map<uint32_t, Gather> gathers_; // owned tensors with gradients
  size_t unsummed_ = 0;
  std::vector<std::pair<int64_t, double>> norms_;
  int64_t values_missing_ = 0; // elements
  std::set<PieceKey> taken_;   // a second copy is dropped
  std::vector<Envelope> arrived_;
  bool taking_ = false;
  std::deque<Piece> outgoing_;
  int64_t in_flight_ = 0; // bytes
  bool packing_ = false;

  // ---- rank 0 with --dump-gradients ----
  std::map<uint32_t, Floats> dump_;
  int64_t dump_missing_ = 0; // elements
  bool dumped_ = true;

  // ---- averages ----
  std::vector<float> snapshot_; // masters of a step
  bool averaging_ = false, average_due_ = false;

  std::map<uint64_t, std::function<void()>> jobs_; // what follows each
  uint64_t next_ticket_ = 1;
  std::mutex failure_mutex_; // a job may write it
  std::string failure_;
};

} // namespace troupe

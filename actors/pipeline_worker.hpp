// The program of a pipeline rank as coroutines (actors/task.hpp): what a chunk does, in order.
// Belongs to one pipeline stage actor, which calls it from its handlers; jobs share ownership, so
// that memory outlives them whatever happens to the actor.
#pragma once

#include "actors/expert_route.hpp"
#include "actors/taken_messages.hpp"
#include "actors/task.hpp"
#include "actors/train_context.hpp"
#include "actors/train_messages.hpp"

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace troupe {

class PipelineWorker : public std::enable_shared_from_this<PipelineWorker> {
public:
  // `job_done` sends JobDone to the actor; callable from any thread.
  PipelineWorker(std::shared_ptr<const TrainContext> context,
                 std::function<void(uint64_t ticket)> job_done);

  // Handlers of the actor. They throw what went wrong; then the worker is of no more use.
  void begin(const BeginStep& command);
  void on_message(Envelope&& message);
  void on_job(uint64_t ticket);
  void on_experts_done(uint64_t run);

private:
  // ---- what a chunk keeps between its passes ----
  struct BlockState {
    AttentionSaved attention;
    Floats mid; // after attention
    Floats u;   // its norm
    FfnSaved ffn;
    GateSaved gate;
    ExpertRoute route;
  };
  // An end of the model: norm and head over hidden rows.
  struct HeadState {
    Floats pre_norm, h, dlogits;
  };
  struct MtpState {
    MicroBatchRows rows;
    std::vector<int32_t> ids, targets;
    TrainCompute::MtpSaved input;
    BlockState block;
    HeadState head;
  };
  struct Chunk {
    int64_t micro_batch = 0;
    MicroBatchRows rows;
    std::vector<TrainRow> sequences;
    std::vector<int32_t> ids, targets;
    std::vector<BlockState> blocks;
    HeadState head;
    std::vector<MtpState> mtp;
    WeightWork work; // not yet run
  };
  struct Deferred {
    int64_t micro_batch = 0;
    WeightWork work;
  };
  struct PhaseRun {
    std::vector<int64_t> micro_batches;
    std::map<int64_t, std::unique_ptr<Chunk>> live; // by micro-batch
    std::deque<Deferred> deferred;
  };

  // ---- waiting ----
  struct JobAwaiter {
    PipelineWorker& worker;
    const char* name;
    int64_t layer;
    FunctionRef<void(Workers&)> work; // lives in the coroutine
    bool await_ready() { return false; }
    void await_suspend(std::coroutine_handle<> waiting);
    void await_resume() {}
  };
  struct MessageAwaiter {
    PipelineWorker& worker;
    TrainMessageKey key;
    Envelope message{};
    Nanoseconds since{0};
    bool await_ready();
    void await_suspend(std::coroutine_handle<> waiting);
    Envelope await_resume();
  };
  struct ExpertsAwaiter {
    PipelineWorker& worker;
    bool await_ready() { return worker.experts_done_; }
    void await_suspend(std::coroutine_handle<> waiting) { worker.experts_waiter_ = waiting; }
    void await_resume() {}
  };
  [[nodiscard]] JobAwaiter job(const char* name, int64_t layer, FunctionRef<void(Workers&)> work) {
    return {*this, name, layer, work};
  }
  [[nodiscard]] MessageAwaiter message(WireKind kind, int64_t micro_batch, int64_t place,
                                       TrainPass pass, RankId source);
  void resume(std::coroutine_handle<> coroutine);

  // ---- the program ----
  Task run_step();
  Task run_op(const ScheduleOp& op);
  Task forward(int32_t phase, int32_t index);
  Task backward(int32_t phase, int32_t index, bool defer);
  Task weights(int32_t phase);
  Task forward_end(int32_t phase, Chunk& chunk, Floats x);
  Task backward_end(int32_t phase, Chunk& chunk, Floats& dx, bool defer);
  Task block_forward(const TrainBlock& b, const MicroBatchRows& rows, int64_t micro_batch,
                     BlockState& s, Floats& x);
  Task block_backward(int32_t phase, const TrainBlock& b, const MicroBatchRows& rows, Chunk& chunk,
                      BlockState& s, Floats& dx, bool defer);
  Task send_rows(int32_t phase, int by, int64_t micro_batch, TrainPass pass, const Floats& x,
                 int64_t n);
  Task await_room(int32_t phase, int32_t index);

  // ---- jobs' parts ----
  void load(Chunk& chunk) const;
  [[nodiscard]] MtpState mtp_rows(const Chunk& chunk, int64_t depth) const;
  [[nodiscard]] Floats decode(const Envelope& message, int64_t rows) const;
  [[nodiscard]] double end_forward(int32_t phase, const TrainNorm& norm, int64_t rows,
                                   std::span<const int32_t> targets, double weight, Floats x,
                                   HeadState& s, Workers& workers) const;
  [[nodiscard]] Floats end_backward(int32_t phase, const TrainNorm& norm, int32_t use, Chunk& chunk,
                                    const MicroBatchRows& rows, HeadState& s,
                                    const Floats& from_mtp, Workers& workers) const;
  void zero_gradients(Workers& workers) const;

  // ---- messages ----
  void post_dispatches(const TrainBlock& b, int64_t micro_batch, TrainPass pass,
                       const ExpertRoute& route, std::vector<BufferRef>& payloads);
  void post_rows(int32_t phase, int by, int64_t micro_batch, TrainPass pass, BufferRef payload);
  void note_finite(bool finite, int64_t micro_batch, int64_t layer);
  void report();
  void fail(std::string text);
  void throw_failure();

  [[nodiscard]] TrainCompute& compute() const { return *context_->compute; }
  [[nodiscard]] const StageWeights& weights_of(int32_t phase) const {
    return *context_->phases[static_cast<size_t>(phase)].weights;
  }
  [[nodiscard]] float* gradients(int32_t phase, int64_t micro_batch) const;
  [[nodiscard]] int64_t hidden() const { return context_->plan.config.hidden_size; }
  [[nodiscard]] const TrainData& data() const {
    return step_.evaluate ? *context_->held_out : *context_->data;
  }
  [[nodiscard]] float balance_scale() const;
  [[nodiscard]] bool is_beyond(int64_t row) const;
  [[nodiscard]] TrainPass forward_pass() const {
    return step_.evaluate ? TrainPass::evaluate : TrainPass::forward;
  }
  [[nodiscard]] Nanoseconds now() const { return context_->rank->clock->now(); }
  void trace(std::string name, const char* track, Nanoseconds since, int64_t layer) const;

  const std::shared_ptr<const TrainContext> context_;
  const std::function<void(uint64_t)> job_done_;

  // ---- of the step ----
  BeginStep step_;
  uint64_t run_ = 0; // counts BeginSteps, equal on all ranks; messages carry it
  int64_t first_row_ = 0, num_micro_batches_ = 0;
  double loss_weight_ = 0; // one over the divisor of §5.7
  double mtp_weight_ = 0;  // λ / D of it
  Program program_;
  std::vector<PhaseRun> runs_;
  StageReport report_;
  std::map<int64_t, std::vector<int64_t>> loads_; // by layer
  Nanoseconds began_{0};
  int64_t busy_before_ = 0;

  std::map<uint64_t, std::coroutine_handle<>> jobs_;
  uint64_t next_ticket_ = 1;
  std::map<TrainMessageKey, Envelope> inbox_;
  TakenMessages taken_;
  std::map<TrainMessageKey, std::pair<std::coroutine_handle<>, MessageAwaiter*>> receivers_;
  bool experts_done_ = false;
  std::coroutine_handle<> experts_waiter_;
  std::mutex failure_mutex_; // a job may write it
  std::string failure_;
  Task task_; // last: its frames refer to the rest
};

} // namespace troupe

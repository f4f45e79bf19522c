#include "actors/attention.hpp"

#include "actors/attention_step.hpp"
#include "actors/batching.hpp"
#include "actors/exceptions.hpp"
#include "actors/stopping.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace troupe {

namespace {

// Steps in flight at most: step ids tell lanes apart, on siblings as on the leader.
constexpr size_t kLanes = 2;
// Rows of logits or hidden states on their way to clients: of one request, of all, and in one
// message where its rows are not longer. Half of what a peer's credit lets out, so that large
// answers never keep a step's messages from leaving.
constexpr int64_t kRowsOfRequest = int64_t{2} << 20;
constexpr int64_t kRowsOnTheWay = int64_t{32} << 20;
constexpr int64_t kRowsOfMessage = int64_t{1} << 20;

bool needs_counts(const SamplingParams& p) {
  return p.repetition_penalty != 1 || p.presence_penalty != 0 || p.frequency_penalty != 0;
}

using Self = Attention::stateful_pointer<AttentionState>;
using Step = AttentionStep;
using Lane = AttentionState::Lane;

void continue_work(Self self);

Lane& lane_of(AttentionState& state, uint64_t step) {
  return state.lanes[step % kLanes % state.lanes.size()];
}

bool leads(const AttentionState& state) { return state.context->me().tp_rank == 0; }

template <class T>
void tell_gateway(const AttentionState& state, const RunRequest& request, T message) {
  state.context->postman->tell(request.reply_to, Route::gateway, std::move(message));
}

void refuse(const AttentionState& state, const RunRequest& request, Errc code, std::string why) {
  RequestDone done;
  done.id = request.id;
  done.finish_reason = code == Errc::cancelled ? "cancelled" : "error";
  done.error_code = static_cast<uint8_t>(code);
  done.error = std::move(why);
  done.prompt_tokens = static_cast<int64_t>(request.spec.prompt.size());
  tell_gateway(state, request, std::move(done));
}

int64_t longest(const AttentionState& state, const RequestSpec& spec) {
  const auto wanted = static_cast<int64_t>(spec.prompt.size()) + spec.max_tokens;
  return std::min(wanted, state.context->limits.max_context);
}

int64_t pages_for(int64_t positions) { return (positions + kPageTokens - 1) / kPageTokens; }

// What is wrong with a request, empty if nothing.
std::pair<Errc, std::string> check(const AttentionState& state, const RequestSpec& spec) {
  const auto& limits = state.context->limits;
  const auto length = static_cast<int64_t>(spec.prompt.size());
  if (length == 0)
    return {Errc::invalid_argument, "prompt: empty, at least one token expected"};
  for (const int32_t id : spec.prompt)
    if (id < 0 || id >= state.context->config.vocab_size)
      return {Errc::invalid_argument,
              fmt::format("prompt: token {} is not in the vocabulary of {} ids", id,
                          state.context->config.vocab_size)};
  if (length > limits.max_context || (length == limits.max_context && spec.max_tokens > 0))
    return {Errc::invalid_argument, fmt::format("prompt: {} tokens do not fit a context of {}",
                                                length, limits.max_context)};
  if (spec.max_tokens < 0)
    return {Errc::invalid_argument,
            fmt::format("max_tokens: {} asked for, at least 0 expected", spec.max_tokens)};
  if (pages_for(longest(state, spec)) > pages_for(limits.kv_tokens))
    return {Errc::out_of_memory,
            fmt::format("prompt and answer need {} positions of KV cache, there are {}",
                        longest(state, spec), limits.kv_tokens)};
  if (!spec.stop.empty() && !state.parts.tokenizer)
    return {Errc::invalid_argument, "stop: the model has no tokenizer to find stop strings with"};
  if (spec.speculate < 0)
    return {Errc::invalid_argument,
            fmt::format("speculate: {} asked for, at least 0 expected", spec.speculate)};
  if (spec.speculate > limits.max_speculate)
    return {Errc::invalid_argument, fmt::format("speculate: {} asked for, at most {} here",
                                                spec.speculate, limits.max_speculate)};
  return {Errc::none, {}};
}

// Gives waiting requests their cache pages, oldest first.
void admit(AttentionState& state) {
  while (!state.queue.empty() &&
         static_cast<int64_t>(state.active.size()) < state.context->limits.batch) {
    const auto& request = state.queue.front();
    const int64_t pages = pages_for(longest(state, request.spec));
    if (pages > static_cast<int64_t>(state.free_pages.size()))
      return;
    auto seq = std::make_unique<Sequence>();
    seq->request = std::move(state.queue.front());
    state.queue.pop_front();
    const auto& spec = seq->request.spec;
    seq->tokens = spec.prompt;
    seq->prompt_length = static_cast<int64_t>(spec.prompt.size());
    seq->pages.assign(state.free_pages.end() - pages, state.free_pages.end());
    state.free_pages.resize(state.free_pages.size() - static_cast<size_t>(pages));
    seq->started = state.context->clock->now();
    if (needs_counts(spec.sampling))
      for (const int32_t id : spec.prompt)
        ++seq->counts.prompt[id];
    if (!spec.stop.empty())
      seq->detokenizer.emplace(state.parts.tokenizer);
    state.active.push_back(std::move(seq));
  }
}

// Ends a request and frees what it held.
void retire(AttentionState& state, Sequence* seq, const std::string& reason,
            const caf::error& error = {}) {
  const auto now = state.context->clock->now();
  const auto seconds = [](Nanoseconds t) { return static_cast<double>(t.count()) * 1e-9; };
  const auto first = seq->first_token.count() > 0 ? seq->first_token : now;
  RequestDone done;
  done.id = seq->request.id;
  done.finish_reason = reason;
  done.error_code = static_cast<uint8_t>(code_of(error));
  done.error = text_of(error);
  done.prompt_tokens = seq->prompt_length;
  done.answer_tokens = static_cast<int64_t>(seq->tokens.size()) - seq->prompt_length;
  done.drafted = seq->drafted;
  done.accepted = seq->accepted;
  done.steps = seq->steps;
  done.prefill_s = seconds(first - seq->started);
  done.decode_s = seconds(now - first);
  tell_gateway(state, seq->request, std::move(done));
  if (state.parts.mtp_cache)
    for (int32_t r = 0; r < state.context->tp(); ++r)
      state.context->postman->tell(state.context->sibling(r), Route::mtp,
                                   ForgetSequence{seq->request.id, state.last_pass});
  state.free_pages.insert(state.free_pages.end(), seq->pages.begin(), seq->pages.end());
  std::erase_if(state.active, [&](const auto& s) { return s.get() == seq; });
}

// Appends an answer token; the reason to stop, if it is one.
std::string append_token(const AttentionState& state, Sequence& seq, int32_t token) {
  const auto& spec = seq.request.spec;
  seq.tokens.push_back(token);
  if (needs_counts(spec.sampling))
    ++seq.counts.answer[token];
  if (seq.first_token.count() == 0)
    seq.first_token = state.context->clock->now();
  const auto& eos = state.parts.eos_ids;
  if (!spec.ignore_eos && std::find(eos.begin(), eos.end(), token) != eos.end())
    return "stop";
  if (seq.detokenizer && meets_stop(seq.tail, seq.detokenizer->push(token), spec.stop))
    return "stop";
  const auto answered = static_cast<int64_t>(seq.tokens.size()) - seq.prompt_length;
  if (answered >= spec.max_tokens ||
      static_cast<int64_t>(seq.tokens.size()) >= state.context->limits.max_context)
    return "length";
  return {};
}

// The rows of a sequence whose logits are wanted.
void want_logits(const Sequence& seq, size_t index, const Step::Mine& mine,
                 const SequencePlan& plan, Step& step) {
  const auto& spec = seq.request.spec;
  TokenCounts counts = seq.counts;
  for (size_t i = 0; i < plan.tokens.size(); ++i) {
    const int32_t position = plan.first_position + static_cast<int32_t>(i);
    const auto known = static_cast<int64_t>(seq.tokens.size());
    if (position >= known && needs_counts(spec.sampling))
      ++counts.answer[plan.tokens[i]]; // a draft that rows from here on see
    Step::LogitRow row;
    row.row = mine.row_begin + static_cast<int64_t>(i);
    row.sequence = index;
    row.position = position;
    row.sample = spec.max_tokens > 0 && position + 1 >= known;
    if (spec.prompt_logprobs && position + 1 < seq.prompt_length)
      row.target = seq.tokens[static_cast<size_t>(position) + 1];
    row.keep = spec.logits && (spec.max_tokens == 0 || row.sample);
    if (!row.sample && row.target < 0 && !row.keep)
      continue;
    if (row.sample)
      row.counts = counts;
    step.wanted.push_back(std::move(row));
  }
}

// The leader's next step for `lane`, or null when there is nothing to do.
std::shared_ptr<Step> plan_step(AttentionState& state, Lane& lane) {
  std::vector<BatchItem> items;
  for (const auto& seq : state.active)
    items.push_back({static_cast<int64_t>(seq->tokens.size()), seq->prompt_length, seq->computed,
                     static_cast<int64_t>(seq->drafts.size()),
                     seq->in_flight || !seq->rows.empty() || !seq->ending.empty()});
  const auto& limits = state.context->limits;
  int64_t rows_in_flight = 0;
  for (const auto& other : state.lanes)
    rows_in_flight +=
        other.step ? other.step->num_rows() : static_cast<int64_t>(other.sequences.size());
  const auto batch = take_micro_batch(plan_batch(items, {limits.batch, limits.prefill_chunk}),
                                      rows_in_flight, state.overlap_rows);
  if (batch.empty())
    return nullptr;
  auto step = std::make_shared<Step>();
  step->plan.id = lane.next_step;
  lane.next_step += kLanes;
  int64_t row = 0;
  for (const auto& rows : batch) {
    Sequence& seq = *state.active[static_cast<size_t>(rows.item)];
    SequencePlan plan;
    plan.request = seq.request.id;
    plan.first_position = static_cast<int32_t>(seq.computed);
    plan.prompt_length = static_cast<int32_t>(seq.prompt_length);
    plan.pages = seq.pages;
    const auto first = seq.tokens.begin() + seq.computed;
    plan.tokens.assign(first, first + (rows.num_rows - rows.num_drafts));
    plan.tokens.insert(plan.tokens.end(), seq.drafts.begin(), seq.drafts.end());
    const Step::Mine mine{&seq, row};
    want_logits(seq, step->mine.size(), mine, plan, *step);
    step->mine.push_back(mine);
    step->sampling.push_back(seq.request.spec.sampling);
    step->wants_hidden.push_back(seq.request.spec.hidden_states);
    step->plan.sequences.push_back(std::move(plan));
    row += rows.num_rows;
    seq.in_flight = true;
    ++seq.steps;
  }
  return step;
}

// Rows, positions and page tables of a plan.
Walk make_walk(const AttentionState& state, const std::shared_ptr<Step>& step) {
  Walk walk;
  walk.id = step->plan.id;
  for (const auto& plan : step->plan.sequences) {
    walk.add_rows(plan.first_position, static_cast<int64_t>(plan.tokens.size()), plan.prompt_length,
                  plan.pages);
    step->tokens.insert(step->tokens.end(), plan.tokens.begin(), plan.tokens.end());
  }
  const auto& layers = state.parts.weights->layers;
  for (size_t l = 0; l < layers.size(); ++l)
    walk.blocks.push_back(
        {&layers[l], static_cast<int32_t>(l), state.parts.cache->layer(static_cast<int64_t>(l))});
  walk.prologue = [step](Workers& workers) { step->prologue(workers); };
  walk.epilogue = [step](Workers& workers) { step->epilogue(workers); };
  if (step->captures())
    walk.tap = [step](size_t block) {
      step->capture(static_cast<int64_t>(block), static_cast<const std::byte*>(step->x.data));
    };
  return walk;
}

// Rows for a request's client, to be sent in messages of moderate size.
void queue_rows(Sequence& seq, const RowsReady& rows) {
  const int64_t row_bytes = rows.num_cols * static_cast<int64_t>(sizeof(float));
  const int64_t at_once = std::max<int64_t>(1, kRowsOfMessage / row_bytes);
  for (int64_t begin = 0; begin < rows.num_rows; begin += at_once) {
    RowsReady part;
    part.id = rows.id;
    part.name = rows.name;
    part.first_row = rows.first_row + begin;
    part.num_rows = std::min(at_once, rows.num_rows - begin);
    part.num_cols = rows.num_cols;
    const auto from = rows.bytes.begin() + begin * row_bytes;
    part.bytes.assign(from, from + part.num_rows * row_bytes);
    seq.rows.push_back(std::move(part));
  }
}

// Sends the rows that may go, those of the oldest request first.
void send_rows(AttentionState& state) {
  int64_t on_the_way = 0;
  for (const auto& seq : state.active)
    on_the_way += seq->unacknowledged;
  for (auto& seq : state.active)
    while (!seq->rows.empty()) {
      const auto bytes = static_cast<int64_t>(seq->rows.front().bytes.size());
      const auto fits = [&](int64_t now, int64_t most) { return now == 0 || now + bytes <= most; };
      if (!fits(seq->unacknowledged, kRowsOfRequest) || !fits(on_the_way, kRowsOnTheWay))
        break;
      seq->unacknowledged += bytes;
      on_the_way += bytes;
      tell_gateway(state, seq->request, std::move(seq->rows.front()));
      seq->rows.pop_front();
    }
}

// A client took rows: there is room for more, or its request is over at last.
void rows_taken(AttentionState& state, const RowsTaken& taken) {
  for (auto& seq : state.active) {
    if (seq->request.id != taken.id)
      continue;
    seq->unacknowledged -= std::clamp<int64_t>(taken.bytes, 0, seq->unacknowledged);
    if (!seq->ending.empty() && seq->rows.empty() && seq->unacknowledged == 0)
      retire(state, seq.get(), std::string{seq->ending});
    break;
  }
  send_rows(state);
}

// What a sequence learned in this step. The reason to stop, if it has one.
std::string settle(AttentionState& state, Step& step, size_t index) {
  auto& mine = step.mine[index];
  Sequence& seq = *mine.sequence;
  const auto& plan = step.plan.sequences[index];
  const auto drafts = std::move(seq.drafts);
  seq.drafts.clear();
  TokensReady news;
  news.id = seq.request.id;
  news.first_index =
      static_cast<int32_t>(static_cast<int64_t>(seq.tokens.size()) - seq.prompt_length);
  RowsReady raw;
  raw.id = seq.request.id;
  raw.name = "logits";
  raw.num_cols = state.context->config.vocab_size;
  raw.first_row = seq.request.spec.max_tokens == 0 ? plan.first_position : news.first_index;
  std::string reason;
  size_t checked = 0;
  for (auto& row : step.wanted) {
    if (row.sequence != index)
      continue;
    if (row.target >= 0)
      news.prompt_logprobs.push_back(row.logprob);
    if (row.sample && reason.empty()) {
      // Row j > 0 counts only if the draft it saw is the token that row j-1 sampled.
      if (checked > 0) {
        if (drafts[checked - 1] != seq.tokens.back())
          break;
        ++seq.accepted;
      }
      ++checked;
      news.tokens.push_back(row.sampled.token);
      news.logprobs.push_back(row.sampled.logprob);
      reason = append_token(state, seq, row.sampled.token);
    } else if (row.sample) {
      continue;
    }
    if (row.keep) {
      raw.bytes.insert(raw.bytes.end(), row.raw.begin(), row.raw.end());
      ++raw.num_rows;
    }
  }
  seq.computed = plan.first_position + static_cast<int64_t>(plan.tokens.size()) -
                 static_cast<int64_t>(drafts.size()) +
                 (checked > 0 ? static_cast<int64_t>(checked) - 1 : 0);
  if (seq.request.spec.max_tokens == 0 && seq.computed >= seq.prompt_length)
    reason = "length";
  news.prompt_done = static_cast<int32_t>(std::min(seq.computed, seq.prompt_length));
  tell_gateway(state, seq.request, std::move(news));
  if (raw.num_rows > 0)
    queue_rows(seq, raw);
  return reason;
}

// Hands the step's confirmed rows to the MTP actors; true when drafts will come.
bool start_drafting(AttentionState& state, const std::shared_ptr<Step>& step) {
  if (!state.parts.mtp_cache)
    return false;
  DraftWork work{step->plan.id, step->hidden, {}};
  if (!leads(state)) {
    state.context->postman->tell(state.context->self, Route::mtp, std::move(work));
    return false;
  }
  DraftPlan pass;
  pass.step = step->plan.id;
  for (size_t i = 0; i < step->mine.size(); ++i) {
    Sequence* seq = step->mine[i].sequence;
    if (seq == nullptr || seq->request.spec.speculate == 0)
      continue;
    const auto& plan = step->plan.sequences[i];
    const auto known = static_cast<int64_t>(seq->tokens.size());
    const int64_t left = seq->prompt_length + seq->request.spec.max_tokens - known;
    const int64_t room = state.context->limits.max_context - known;
    DraftSequence draft;
    draft.request = seq->request.id;
    draft.first_row = static_cast<int32_t>(step->mine[i].row_begin);
    draft.first_position = plan.first_position;
    draft.num_rows = static_cast<int32_t>(seq->computed) - plan.first_position;
    draft.prompt_length = plan.prompt_length;
    draft.pages = plan.pages;
    draft.num_modules = seq->request.spec.speculate;
    if (seq->computed >= seq->prompt_length)
      draft.depth = static_cast<int32_t>(
          std::clamp<int64_t>(std::min(left, room) - 1, 0, seq->request.spec.speculate));
    const auto from = seq->tokens.begin() + plan.first_position + 1;
    const auto count = std::min<int64_t>(known - plan.first_position - 1,
                                         draft.num_rows + state.context->limits.max_speculate);
    draft.next_tokens.assign(from, from + count);
    pass.num_modules = std::max(pass.num_modules, draft.num_modules);
    pass.sequences.push_back(std::move(draft));
    work.sampling.push_back({seq->request.spec.sampling, seq->counts});
  }
  if (pass.sequences.empty() && state.context->tp() == 1)
    return false;
  pass.pass = ++state.last_pass;
  for (int32_t r = 0; r < state.context->tp(); ++r)
    state.context->postman->tell(state.context->sibling(r), Route::mtp, pass);
  state.context->postman->tell(state.context->self, Route::mtp, std::move(work));
  return true;
}

// Sequences that no step and no draft needs any more are free for the next step; those that their
// clients gave up end here.
void release(AttentionState& state, Lane& lane) {
  for (Sequence* seq : std::exchange(lane.sequences, {})) {
    seq->in_flight = false;
    if (seq->cancelled)
      retire(state, seq, "cancelled");
  }
}

void step_ended(Self self, Lane& lane, const caf::error& error) {
  auto& state = self->state;
  const auto step = std::exchange(lane.step, nullptr);
  if (error) {
    // Siblings can't be brought back to a common state from here: the rank says so and the run
    // ends with this cause.
    state.context->postman->tell(state.context->self, Route::supervisor,
                                 PeerLost{state.context->self, error});
    for (auto& mine : step->mine)
      retire(state, mine.sequence, "error", error);
    return;
  }
  for (auto& rows : step->captured)
    for (auto& mine : step->mine)
      if (mine.sequence->request.id == rows.id) {
        queue_rows(*mine.sequence, rows);
        break;
      }
  for (size_t i = 0; i < step->mine.size(); ++i) {
    Sequence* seq = step->mine[i].sequence;
    auto reason = settle(state, *step, i);
    if (seq->cancelled)
      reason = "cancelled";
    if (reason.empty()) {
      lane.sequences.push_back(seq);
      continue;
    }
    step->mine[i].sequence = nullptr;
    seq->in_flight = false;
    if (seq->cancelled || (seq->rows.empty() && seq->unacknowledged == 0))
      retire(state, seq, reason);
    else
      seq->ending = reason; // once its rows are taken
  }
  send_rows(state);
  lane.drafting = start_drafting(state, step);
  if (!lane.drafting)
    release(state, lane);
  continue_work(self);
}

void start_walk(Self self, Lane& lane, std::shared_ptr<Step> step) {
  auto& state = self->state;
  step->context = state.context;
  step->parts = state.parts;
  step->trunk = state.trunk;
  step->x = lane.runner->x();
  step->wants_hidden.resize(step->plan.sequences.size(), false);
  auto walk = make_walk(state, step);
  const auto bytes = static_cast<size_t>(walk.rows.num_rows * state.context->config.hidden_size *
                                         size_of(state.context->arithmetic.activations));
  lane.step = step;
  auto hidden = state.context->fabric->pool().acquire(bytes);
  if (!hidden) {
    step_ended(self, lane, hidden.error());
    return;
  }
  step->hidden = std::move(*hidden);
  if (leads(state))
    for (int32_t r = 1; r < state.context->tp(); ++r)
      state.context->postman->tell(state.context->sibling(r), Route::attention, step->plan);
  lane.runner->start(std::move(walk),
                     [self, &lane](const caf::error& error) { step_ended(self, lane, error); });
}

void continue_lane(Self self, Lane& lane) {
  auto& state = self->state;
  if (lane.step || lane.drafting)
    return;
  if (leads(state)) {
    if (auto step = plan_step(state, lane))
      start_walk(self, lane, std::move(step));
    return;
  }
  if (lane.plans.empty())
    return;
  auto step = std::make_shared<Step>();
  step->plan = std::move(lane.plans.front());
  lane.plans.pop_front();
  start_walk(self, lane, std::move(step));
}

// Starts what can start.
void continue_work(Self self) {
  auto& state = self->state;
  if (leads(state))
    admit(state);
  for (auto& lane : state.lanes)
    continue_lane(self, lane);
}

void take_drafts(Self self, const Drafts& drafts) {
  auto& state = self->state;
  auto& lane = lane_of(state, drafts.step);
  lane.drafting = false;
  for (const auto& [request, tokens] : drafts.tokens)
    for (Sequence* seq : lane.sequences)
      if (seq->request.id == request) {
        seq->drafts = tokens;
        seq->drafted += static_cast<int64_t>(tokens.size());
      }
  release(state, lane);
  continue_work(self);
}

void cancel(AttentionState& state, RequestId id) {
  for (auto it = state.queue.begin(); it != state.queue.end(); ++it)
    if (it->id == id) {
      refuse(state, *it, Errc::cancelled, "cancelled by the client");
      state.queue.erase(it);
      return;
    }
  for (auto& seq : state.active) {
    if (seq->request.id != id)
      continue;
    if (seq->in_flight)
      seq->cancelled = true; // ends with its step
    else
      retire(state, seq.get(), "cancelled");
    return;
  }
}

} // namespace

Attention::behavior_type attention(Self self, const RankContext* context, TrunkParts parts,
                                   std::shared_ptr<Trunk> trunk) {
  end_by_exceptions(self);
  auto& state = self->state;
  state.context = context;
  state.parts = std::move(parts);
  state.trunk = std::move(trunk);
  const bool alone = context->view->members.size() == 1; // no wire, nothing to wait for
  state.overlap_rows = alone ? 0 : context->limits.overlap_rows;
  state.lanes.resize(state.overlap_rows > 0 ? kLanes : 1);
  for (size_t i = 0; i < state.lanes.size(); ++i) {
    state.lanes[i].next_step = kLanes + i;
    state.lanes[i].runner =
        std::make_unique<BlockRunner>(*context, state.trunk, Route::attention, self->address());
  }
  for (int64_t p = state.parts.cache->num_pages(); p > 0; --p)
    state.free_pages.push_back(static_cast<int32_t>(p - 1));
  return {
      [=](Envelope& envelope) {
        lane_of(self->state, envelope.header.step).runner->on_envelope(std::move(envelope));
      },
      [=](const JobDone& done) {
        lane_of(self->state, done.ticket).runner->on_job_done(done.ticket);
      },
      [=](RunRequest& request) {
        auto& s = self->state;
        const auto [code, why] = check(s, request.spec);
        if (code != Errc::none)
          return refuse(s, request, code, why);
        if (static_cast<int64_t>(s.queue.size()) >= s.context->limits.max_queue)
          return refuse(s, request, Errc::overloaded, "too many requests are waiting");
        s.queue.push_back(std::move(request));
        continue_work(self);
      },
      [=](StepPlan& plan) {
        lane_of(self->state, plan.id).plans.push_back(std::move(plan));
        continue_work(self);
      },
      [=](const Drafts& drafts) { take_drafts(self, drafts); },
      [=](const RowsTaken& taken) {
        rows_taken(self->state, taken);
        continue_work(self);
      },
      [=](const CancelRequest& request) {
        cancel(self->state, request.id);
        continue_work(self);
      },
  };
}

} // namespace troupe

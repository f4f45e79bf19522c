#include "actors/mtp.hpp"

#include "actors/exceptions.hpp"

#include <algorithm>
#include <cstring>

namespace troupe {

namespace {

// Walks are numbered so that siblings agree and numbers grow: 64 per pass are more than modules.
constexpr uint64_t kWalksPerPass = 64;

} // namespace

// Drafting for one step.
struct MtpState::Pass {
  // A sequence's rows in the walk of the present module.
  struct Range {
    int64_t begin = 0, end = 0; // positions
    int64_t row = 0;            // first row of the walk
  };

  const RankContext* context = nullptr;
  TrunkParts parts;
  std::shared_ptr<Trunk> trunk;
  DraftPlan plan;
  DraftWork work;
  std::vector<DraftProgress> progress;      // per sequence, taken out of the actor's map
  std::vector<std::vector<int32_t>> drafts; // per sequence
  int32_t module = 0;                       // 0-based
  std::vector<Range> ranges, before;        // of this module and the one before
  std::vector<std::byte> input, embedding, output, output_before; // [rows, hidden] in A
  std::vector<int32_t> tokens;
  std::vector<int32_t> sampled; // per sequence, -1 where none; filled by the job
  MutableRows x;

  [[nodiscard]] size_t row_size() const {
    return static_cast<size_t>(context->config.hidden_size *
                               size_of(context->arithmetic.activations));
  }
  [[nodiscard]] int64_t weights_module() const {
    return std::min<int64_t>(module, static_cast<int64_t>(parts.weights->mtp.size()) - 1);
  }
  // The token at a position after the sequence's first row: known, or drafted.
  [[nodiscard]] int32_t token_at(size_t s, int64_t position) const {
    const auto& q = plan.sequences[s];
    const auto i = static_cast<size_t>(position - q.first_position - 1);
    return i < q.next_tokens.size() ? q.next_tokens[i] : drafts[s][i - q.next_tokens.size()];
  }
  [[nodiscard]] int64_t known(size_t s) const {
    const auto& q = plan.sequences[s];
    return q.first_position + 1 + static_cast<int64_t>(q.next_tokens.size());
  }
  [[nodiscard]] int64_t end_row(size_t s) const {
    return plan.sequences[s].first_position + plan.sequences[s].num_rows;
  }
  // A module that a sequence skipped would not know its rows, so a sequence passes through the same
  // ones every time, whoever shares the pass.
  [[nodiscard]] bool passes(size_t s) const { return module < plan.sequences[s].num_modules; }
  [[nodiscard]] const std::byte* state_before(size_t s, int64_t position) const;
  void plan_module();
  void prologue(Workers& workers);
  void epilogue(Workers& workers);
  void sample_drafts(Workers& workers);
  void keep_progress();
};

// Where module k-1 left its state at a position.
const std::byte* MtpState::Pass::state_before(size_t s, int64_t position) const {
  const auto& q = plan.sequences[s];
  if (module == 0)
    return work.hidden->data() +
           static_cast<size_t>(q.first_row + position - q.first_position) * row_size();
  const auto& range = before[s];
  if (position >= range.begin)
    return output_before.data() +
           static_cast<size_t>(range.row + position - range.begin) * row_size();
  return progress[s].state[static_cast<size_t>(module)].data();
}

// Which rows this module runs, per sequence.
void MtpState::Pass::plan_module() {
  before = std::move(ranges);
  ranges.clear();
  tokens.clear();
  int64_t row = 0;
  for (size_t s = 0; s < plan.sequences.size(); ++s) {
    const auto& q = plan.sequences[s];
    const auto known_now = known(s) + static_cast<int64_t>(drafts[s].size());
    Range range;
    if (passes(s)) {
      range.begin =
          module == 0 ? q.first_position : progress[s].next_row[static_cast<size_t>(module)];
      range.end = std::max(range.begin, std::min(end_row(s), known_now - (module + 1)));
    }
    range.row = row;
    for (int64_t p = range.begin; p < range.end; ++p)
      tokens.push_back(token_at(s, p + module + 1));
    row += range.end - range.begin;
    ranges.push_back(range);
  }
}

void MtpState::Pass::prologue(Workers& workers) {
  const auto n = static_cast<int64_t>(tokens.size());
  const DType a = context->arithmetic.activations;
  const int64_t hidden = context->config.hidden_size;
  input.resize(tokens.size() * row_size());
  embedding.resize(tokens.size() * row_size());
  for (size_t s = 0; s < ranges.size(); ++s)
    for (int64_t p = ranges[s].begin; p < ranges[s].end; ++p)
      std::memcpy(input.data() +
                      static_cast<size_t>(ranges[s].row + p - ranges[s].begin) * row_size(),
                  state_before(s, p), row_size());
  trunk->mtp_embed(weights_module(), tokens, {embedding.data(), a, hidden});
  trunk->mtp_input(weights_module(), n, {embedding.data(), a, hidden}, {input.data(), a, hidden}, x,
                   workers);
}

void MtpState::Pass::epilogue(Workers& workers) {
  const auto n = static_cast<int64_t>(tokens.size());
  const DType a = context->arithmetic.activations;
  const int64_t hidden = context->config.hidden_size;
  output.resize(tokens.size() * row_size());
  trunk->mtp_head_norm(weights_module(), n, {x.data, x.dtype, x.stride}, {output.data(), a, hidden},
                       workers);
  sampled.assign(plan.sequences.size(), -1);
  if (!work.sampling.empty())
    sample_drafts(workers);
}

void MtpState::Pass::sample_drafts(Workers& workers) {
  const DType a = context->arithmetic.activations;
  const int64_t hidden = context->config.hidden_size;
  std::vector<size_t> wanted;
  std::vector<std::byte> rows;
  for (size_t s = 0; s < ranges.size(); ++s) {
    if (plan.sequences[s].depth <= module || ranges[s].end == ranges[s].begin)
      continue;
    const auto last = static_cast<size_t>(ranges[s].row + ranges[s].end - ranges[s].begin - 1);
    rows.insert(rows.end(), output.begin() + static_cast<std::ptrdiff_t>(last * row_size()),
                output.begin() + static_cast<std::ptrdiff_t>((last + 1) * row_size()));
    wanted.push_back(s);
  }
  if (wanted.empty())
    return;
  const auto vocab = static_cast<size_t>(context->config.vocab_size);
  std::vector<float> logits(wanted.size() * vocab);
  trunk->mtp_logits(weights_module(), static_cast<int64_t>(wanted.size()), {rows.data(), a, hidden},
                    logits.data(), workers);
  workers.parallel_for(
      static_cast<int64_t>(wanted.size()), 1, [&](int64_t begin, int64_t end, int) {
        std::vector<float> scratch;
        for (int64_t i = begin; i < end; ++i) {
          const size_t s = wanted[static_cast<size_t>(i)];
          auto counts = work.sampling[s].counts;
          for (const int32_t draft : drafts[s])
            ++counts.answer[draft];
          const auto position =
              static_cast<uint32_t>(known(s) + static_cast<int64_t>(drafts[s].size()));
          sampled[s] = sample({logits.data() + static_cast<size_t>(i) * vocab, vocab},
                              work.sampling[s].params, counts, position, parts.num_ids, scratch)
                           .token;
        }
      });
}

// Remembers which rows of this module are final, and the state the next one will need.
void MtpState::Pass::keep_progress() {
  for (size_t s = 0; s < ranges.size(); ++s) {
    if (!passes(s))
      continue;
    auto& p = progress[s];
    const auto m = static_cast<size_t>(module);
    p.next_row[m] = std::max<int64_t>(0, std::min(end_row(s), known(s) - (module + 1)));
    if (m + 1 >= p.next_row.size())
      continue;
    // The module after this one will start at min(end, known - (module + 2)); where that row lies
    // below our own final ones, its input is final and must outlive this pass.
    const int64_t later = std::max<int64_t>(0, std::min(end_row(s), known(s) - (module + 2)));
    if (later < p.next_row[m] && later >= ranges[s].begin && later < ranges[s].end) {
      const auto row = static_cast<size_t>(ranges[s].row + later - ranges[s].begin);
      const auto* from = output.data() + row * row_size();
      p.state[m + 1].assign(from, from + row_size());
    }
  }
}

namespace {

using Self = Mtp::stateful_pointer<MtpState>;

void run_module(Self self);
void start_next(Self self);

bool leads(const MtpState& state) { return state.context->me().tp_rank == 0; }

void forget(MtpState& state) {
  std::erase_if(state.to_forget, [&](const ForgetSequence& f) {
    if (f.after_pass > state.last_pass)
      return false;
    state.progress.erase(f.request);
    return true;
  });
}

void end_pass(Self self) {
  auto& state = self->state;
  const auto pass = std::move(state.pass);
  state.pass = nullptr;
  for (size_t s = 0; s < pass->progress.size(); ++s)
    state.progress[pass->plan.sequences[s].request] = std::move(pass->progress[s]);
  state.last_pass = pass->plan.pass;
  forget(state);
  if (leads(state)) {
    Drafts drafts;
    drafts.step = pass->work.step;
    for (size_t s = 0; s < pass->drafts.size(); ++s)
      drafts.tokens.emplace_back(pass->plan.sequences[s].request, std::move(pass->drafts[s]));
    state.context->postman->tell(state.context->self, Route::attention, std::move(drafts));
  }
  start_next(self);
}

// Takes the drafts of the module that just ran and goes on to the next.
void next_module(Self self, const std::vector<int32_t>& sampled) {
  auto& pass = *self->state.pass;
  for (size_t s = 0; s < pass.drafts.size() && s < sampled.size(); ++s)
    if (sampled[s] >= 0)
      pass.drafts[s].push_back(sampled[s]);
  ++pass.module;
  if (pass.module >= pass.plan.num_modules)
    return end_pass(self);
  run_module(self);
}

// The walk of one module has ended.
void module_done(Self self, const caf::error& error) {
  auto& state = self->state;
  auto& pass = *state.pass;
  if (error) {
    state.context->postman->tell(state.context->self, Route::supervisor,
                                 PeerLost{state.context->self, error});
    return;
  }
  pass.keep_progress();
  pass.output_before.swap(pass.output);
  if (leads(state)) {
    for (int32_t r = 1; r < state.context->tp(); ++r)
      state.context->postman->tell(state.context->sibling(r), Route::mtp,
                                   DraftTokens{pass.plan.pass, pass.module, pass.sampled});
    return next_module(self, std::vector<int32_t>{pass.sampled});
  }
  const auto drafts = state.leader_drafts.find({pass.plan.pass, pass.module});
  if (drafts == state.leader_drafts.end())
    return; // goes on when they come
  const auto tokens = std::move(drafts->second);
  state.leader_drafts.erase(drafts);
  next_module(self, tokens);
}

void run_module(Self self) {
  auto& state = self->state;
  const auto pass = state.pass;
  pass->plan_module();
  if (pass->tokens.empty()) {
    pass->output.clear();
    pass->sampled.assign(pass->drafts.size(), -1);
    return module_done(self, {});
  }
  Walk walk;
  walk.id = pass->plan.pass * kWalksPerPass + static_cast<uint64_t>(pass->module) + 1;
  for (size_t s = 0; s < pass->ranges.size(); ++s) {
    const auto& range = pass->ranges[s];
    const auto& q = pass->plan.sequences[s];
    walk.add_rows(range.begin, range.end - range.begin, q.prompt_length, q.pages);
  }
  const auto module = pass->weights_module();
  walk.blocks.push_back({&state.parts.weights->mtp[static_cast<size_t>(module)].block,
                         static_cast<int32_t>(state.context->config.num_hidden_layers + module),
                         state.parts.mtp_cache->layer(pass->module)});
  walk.prologue = [pass](Workers& workers) { pass->prologue(workers); };
  walk.epilogue = [pass](Workers& workers) { pass->epilogue(workers); };
  state.runner->start(std::move(walk),
                      [self](const caf::error& error) { module_done(self, error); });
}

void start_pass(Self self, DraftPlan plan, DraftWork work) {
  auto& state = self->state;
  auto pass = std::make_shared<MtpState::Pass>();
  pass->context = state.context;
  pass->parts = state.parts;
  pass->trunk = state.trunk;
  pass->x = state.runner->x();
  const auto depths = static_cast<size_t>(state.context->limits.max_speculate);
  for (const auto& q : plan.sequences) {
    auto& progress = state.progress[q.request];
    progress.next_row.resize(depths, 0);
    progress.state.resize(depths);
    pass->progress.push_back(std::move(progress));
    pass->drafts.emplace_back();
  }
  pass->plan = std::move(plan);
  pass->work = std::move(work);
  state.pass = std::move(pass);
  if (state.pass->plan.sequences.empty() || state.pass->plan.num_modules == 0)
    return end_pass(self);
  run_module(self);
}

// Starts the next pass in order once its hidden states are there.
void start_next(Self self) {
  auto& state = self->state;
  if (state.pass || state.plans.empty())
    return;
  const auto found = state.works.find(state.plans.front().step);
  if (found == state.works.end())
    return;
  auto plan = std::move(state.plans.front());
  state.plans.pop_front();
  auto work = std::move(found->second);
  state.works.erase(found);
  start_pass(self, std::move(plan), std::move(work));
}

} // namespace

Mtp::behavior_type mtp(Self self, const RankContext* context, TrunkParts parts,
                       std::shared_ptr<Trunk> trunk) {
  end_by_exceptions(self);
  auto& state = self->state;
  state.context = context;
  state.parts = std::move(parts);
  state.trunk = std::move(trunk);
  state.runner = std::make_unique<BlockRunner>(*context, state.trunk, Route::mtp, self->address());
  return {
      [=](Envelope& envelope) { self->state.runner->on_envelope(std::move(envelope)); },
      [=](const JobDone& done) { self->state.runner->on_job_done(done.ticket); },
      [=](DraftWork& work) {
        const auto step = work.step;
        self->state.works.emplace(step, std::move(work));
        start_next(self);
      },
      [=](DraftPlan& plan) {
        self->state.plans.push_back(std::move(plan));
        start_next(self);
      },
      [=](DraftTokens& drafts) {
        auto& s = self->state;
        const bool waiting = s.pass && !s.runner->busy() && s.pass->plan.pass == drafts.pass &&
                             s.pass->module == drafts.module;
        if (waiting)
          return next_module(self, drafts.tokens);
        s.leader_drafts[{drafts.pass, drafts.module}] = std::move(drafts.tokens);
      },
      [=](const ForgetSequence& f) {
        auto& s = self->state;
        s.to_forget.push_back(f);
        if (!s.pass)
          forget(s);
      },
  };
}

} // namespace troupe

#include "actors/block_runner.hpp"

#include <caf/actor_cast.hpp>
#include <caf/send.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace troupe {

namespace {

enum class Stage : uint8_t {
  attention,        // a block's first job
  finish_attention, // siblings' partials of o_proj are in
  finish_ffn,       // siblings' partials of a dense FFN are in
  shared,           // dispatches are away
  combine,          // answers (and partials of the shared experts) are in
  gather,           // siblings' combined rows are in
};

// What the last job left for the actor to do.
enum class Need : uint8_t { nothing, partials, dispatch, shared_done, gathered, finished };

// Exchanges between siblings, in `attempt` of the header.
constexpr uint32_t kAttentionPartial = 0, kFfnPartial = 1, kGathered = 2;

struct Answer {
  DispatchTable table;
  BufferRef dispatch; // what was sent
  BufferRef rows;     // what came back
};

} // namespace

void Walk::add_rows(int64_t first, int64_t count, int64_t prompt_length,
                    std::vector<int32_t> sequence_pages) {
  const int32_t* table = pages.emplace_back(std::move(sequence_pages)).data(); // stays where it is
  const int64_t in_prompt = std::clamp<int64_t>(prompt_length - first, 0, count);
  if (in_prompt > 0)
    rows.prompt.push_back({rows.num_rows, in_prompt, static_cast<int32_t>(first), table});
  if (in_prompt < count)
    rows.answer.push_back({rows.num_rows + in_prompt, count - in_prompt,
                           static_cast<int32_t>(first + in_prompt), table});
  for (int64_t p = first; p < first + count; ++p)
    rows.positions.push_back(static_cast<int32_t>(p));
  rows.num_rows += count;
}

// Shared with the jobs in flight, so that memory outlives them whatever happens to the actor.
// While a job runs it owns all of it but the last paragraph of members, which are the actor's:
// messages come in at any time.
struct BlockRunner::State {
  State(const RankContext& c, std::shared_ptr<Trunk> t, Route r)
      : context(c), trunk(std::move(t)), route(r) {
    const auto rows = static_cast<size_t>(c.limits.max_rows());
    const auto hidden = static_cast<size_t>(c.config.hidden_size);
    const auto width = static_cast<size_t>(size_of(c.arithmetic.activations));
    const auto top_k = static_cast<size_t>(std::max<int64_t>(c.config.num_experts_per_tok, 1));
    x_memory.resize(rows * hidden * width);
    u_memory.resize(rows * hidden * width);
    shared_memory.resize(rows * hidden * width);
    topk_idx.resize(rows * top_k);
    topk_weight.resize(rows * top_k);
    if (c.arithmetic.fp8_activations) {
      codes.resize(rows * hidden);
      scales.resize(rows * ((hidden + 127) / 128));
    }
  }

  const RankContext& context;
  std::shared_ptr<Trunk> trunk;
  Route route;

  std::vector<std::byte> x_memory, u_memory, shared_memory;
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> topk_idx;
  std::vector<float> topk_weight;

  bool busy = false;
  uint64_t last_walk = 0; // id of the last one that ended
  Walk walk;
  std::function<void(const caf::error&)> done;
  size_t block = 0;
  Stage stage = Stage::attention;
  Need need = Need::nothing;
  caf::error error;
  BufferRef own_partial;            // F32 [rows, hidden], filled by a job
  std::vector<BufferRef> exchanged; // by tp_rank: siblings' side of the exchange that the job ends
  std::map<RankId, Answer> answers; // by destination; `rows` are the actor's while it collects

  bool job_running = false;
  bool collecting = false; // dispatches are away, `combine` has not started
  uint32_t collected_layer = 0;
  size_t answers_missing = 0;
  caf::error bad_answer;
  Nanoseconds sent_at{0};
  // Siblings' messages, possibly ahead of us by one exchange: (walk, layer, exchange, source).
  std::map<std::tuple<uint64_t, uint32_t, uint32_t, RankId>, BufferRef> from_siblings;

  [[nodiscard]] int tp() const { return context.tp(); }
  [[nodiscard]] int tp_rank() const { return context.me().tp_rank; }
  [[nodiscard]] int64_t num_rows() const { return walk.rows.num_rows; }
  [[nodiscard]] int64_t hidden() const { return context.config.hidden_size; }
  [[nodiscard]] DType a() const { return context.arithmetic.activations; }
  [[nodiscard]] const WalkBlock& now() const { return walk.blocks[block]; }
  [[nodiscard]] MutableRows rows_of(std::vector<std::byte>& memory) const {
    return {memory.data(), a(), hidden()};
  }
  [[nodiscard]] MutableRows x() { return rows_of(x_memory); }
  [[nodiscard]] Rows u() { return {u_memory.data(), a(), hidden()}; }
  [[nodiscard]] QuantizedRows uq() const {
    if (codes.empty())
      return {};
    return {codes.data(), scales.data(), hidden(), (hidden() + 127) / 128};
  }
  // This rank's share of the rows to dispatch and combine.
  [[nodiscard]] int32_t share_begin(int rank) const {
    return static_cast<int32_t>(num_rows() * rank / tp());
  }
  [[nodiscard]] RowFormat format() const {
    return dispatch_format(a(), context.arithmetic.fp8_activations);
  }

  // ---- jobs; run on the compute stream ----
  void run_stage(Workers& workers);
  void walk_on(Workers& workers);
  bool begin_block(Workers& workers);
  bool ffn(Workers& workers);
  void run_gate(Workers& workers);
  void fill_dispatches(Workers& workers);
  void fill_rows(const DispatchTable& table, BufferRef& payload);
  void run_shared(Workers& workers);
  void run_combine(Workers& workers);
  void take_gathered();
  void next_block(Workers& workers);
  float* new_partial();
  std::vector<const float*> partials() const;
  void drop_partials();
  // ---- the actor's ----
  [[nodiscard]] std::optional<uint32_t> exchange_before(Stage next) const;
  [[nodiscard]] bool have_all(uint32_t exchange) const;
  caf::error take_exchange(uint32_t exchange);
  bool fail(const caf::error& why) {
    error = why;
    need = Need::finished;
    return false;
  }
};

// ---- jobs -------------------------------------------------------------------------------------

void BlockRunner::State::run_stage(Workers& workers) {
  need = Need::nothing;
  switch (stage) {
  case Stage::attention:
    walk_on(workers);
    return;
  case Stage::finish_attention:
    trunk->finish_attention(num_rows(), partials(), x(), workers);
    drop_partials();
    if (ffn(workers))
      next_block(workers);
    return;
  case Stage::finish_ffn:
    trunk->finish_attention(num_rows(), partials(), x(), workers);
    drop_partials();
    next_block(workers);
    return;
  case Stage::shared:
    run_shared(workers);
    return;
  case Stage::combine:
    run_combine(workers);
    return;
  case Stage::gather:
    take_gathered();
    next_block(workers);
    return;
  }
}

// Runs blocks from the present one until somebody else is needed.
void BlockRunner::State::walk_on(Workers& workers) {
  if (block == 0 && walk.prologue)
    walk.prologue(workers);
  while (block < walk.blocks.size()) {
    if (!begin_block(workers))
      return;
    ++block;
  }
  if (walk.epilogue)
    walk.epilogue(workers);
  need = Need::finished;
}

// One block as far as it goes alone; true when it is done.
bool BlockRunner::State::begin_block(Workers& workers) {
  if (walk.tap)
    walk.tap(block);
  float* partial = nullptr;
  if (tp() > 1 && (partial = new_partial()) == nullptr)
    return false;
  trunk->attention(*now().weights, now().cache, walk.rows, x(), partial, workers);
  if (tp() > 1) {
    stage = Stage::finish_attention;
    need = Need::partials;
    return false;
  }
  return ffn(workers);
}

bool BlockRunner::State::ffn(Workers& workers) {
  const auto& weights = *now().weights;
  if (weights.moe) {
    run_gate(workers);
    return false;
  }
  const bool cut = tp() > 1 && weights.ffn_is_cut;
  float* partial = nullptr;
  if (cut && (partial = new_partial()) == nullptr)
    return false;
  trunk->dense_ffn(weights, num_rows(), x(), partial, workers);
  if (!cut)
    return true;
  stage = Stage::finish_ffn;
  need = Need::partials;
  return false;
}

void BlockRunner::State::next_block(Workers& workers) {
  ++block;
  stage = Stage::attention;
  walk_on(workers);
}

void BlockRunner::State::run_gate(Workers& workers) {
  Trunk::GateOut out;
  out.u = rows_of(u_memory);
  out.codes = codes.empty() ? nullptr : codes.data();
  out.scales = scales.empty() ? nullptr : scales.data();
  out.topk_idx = topk_idx.data();
  out.topk_weight = topk_weight.data();
  const Rows input{x_memory.data(), a(), hidden()};
  trunk->gate(*now().weights, num_rows(), input, out, workers);
  fill_dispatches(workers);
}

void BlockRunner::State::fill_dispatches(Workers& workers) {
  const auto& config = context.config;
  const auto top_k = static_cast<int32_t>(config.num_experts_per_tok);
  const auto count = static_cast<size_t>(num_rows()) * static_cast<size_t>(top_k);
  const GateChoice choice{std::span{topk_idx}.first(count), std::span{topk_weight}.first(count),
                          top_k, static_cast<int32_t>(config.experts_per_group())};
  auto tables = plan_dispatch(*context.view, context.view->layer(now().layer), context.self, choice,
                              share_begin(tp_rank()), share_begin(tp_rank() + 1));
  if (!tables) {
    fail(tables.error());
    return;
  }
  answers.clear();
  for (auto& table : *tables) {
    const DispatchHead head{static_cast<uint32_t>(table.rows.size()),
                            static_cast<uint32_t>(table.entries.size()),
                            static_cast<uint32_t>(row_bytes(format(), hidden())), 0};
    auto payload = context.fabric->pool().acquire(dispatch_layout(head).total_bytes);
    if (!payload) {
      fail(payload.error());
      return;
    }
    write_table((*payload)->bytes(), table, format(), hidden());
    const auto to = table.destination;
    answers.emplace(to, Answer{std::move(table), std::move(*payload), {}});
  }
  std::vector<Answer*> list;
  for (auto& [to, answer] : answers)
    list.push_back(&answer);
  workers.parallel_for(static_cast<int64_t>(list.size()), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      fill_rows(list[static_cast<size_t>(i)]->table, list[static_cast<size_t>(i)]->dispatch);
  });
  stage = Stage::shared;
  need = Need::dispatch;
}

void BlockRunner::State::fill_rows(const DispatchTable& table, BufferRef& payload) {
  const auto stride = row_bytes(format(), hidden());
  std::byte* to = payload->data() + (payload->size() - table.rows.size() * stride);
  const auto h = static_cast<size_t>(hidden());
  for (const auto& row : table.rows) {
    const auto r = static_cast<size_t>(row.row);
    if (codes.empty()) {
      const auto n = h * static_cast<size_t>(size_of(a()));
      std::memcpy(to, u_memory.data() + r * n, n);
    } else {
      const size_t tiles = (h + 127) / 128;
      std::memcpy(to, codes.data() + r * h, h);
      std::memcpy(to + fp8_scales_offset(hidden()), scales.data() + r * tiles, tiles * 4);
    }
    to += stride;
  }
}

void BlockRunner::State::run_shared(Workers& workers) {
  const auto& weights = *now().weights;
  if (weights.shared.gate.n > 0) {
    const bool cut = tp() > 1 && weights.ffn_is_cut;
    float* partial = nullptr;
    if (cut && (partial = new_partial()) == nullptr)
      return;
    trunk->shared_ffn(weights, num_rows(), u(), uq(), rows_of(shared_memory), partial, workers);
  }
  stage = Stage::combine;
  need = Need::shared_done;
}

void BlockRunner::State::run_combine(Workers& workers) {
  const auto& weights = *now().weights;
  const bool has_shared = weights.shared.gate.n > 0;
  if (has_shared && tp() > 1 && weights.ffn_is_cut) {
    trunk->finish_shared(num_rows(), partials(), rows_of(shared_memory), workers);
    drop_partials();
  }
  const int32_t begin = share_begin(tp_rank()), end = share_begin(tp_rank() + 1);
  const auto stride = answer_row_bytes(a(), hidden());

  // Collect every row's terms, by group and then by top-k place.
  struct Keyed {
    int32_t row, group, place;
    CombineTerm term;
  };
  std::vector<Keyed> keyed;
  for (const auto& [to, answer] : answers) {
    const std::byte* data = answer.rows ? answer.rows->data() : nullptr;
    for (const auto& a_row : answer_rows(answer.table.rows, answer.table.entries)) {
      const auto& entry = answer.table.entries[static_cast<size_t>(a_row.first_entry)];
      keyed.push_back({answer.table.rows[static_cast<size_t>(a_row.row)].row, entry.group,
                       entry.place, CombineTerm{data, entry.weight, entry.group, a_row.complete}});
      data += stride;
    }
  }
  std::sort(keyed.begin(), keyed.end(), [](const Keyed& l, const Keyed& r) {
    return std::tie(l.row, l.group, l.place) < std::tie(r.row, r.group, r.place);
  });
  std::vector<CombineTerm> terms;
  std::vector<int32_t> row_terms{0};
  terms.reserve(keyed.size());
  size_t next = 0;
  for (int32_t row = begin; row < end; ++row) {
    for (; next < keyed.size() && keyed[next].row == row; ++next)
      terms.push_back(keyed[next].term);
    row_terms.push_back(static_cast<int32_t>(terms.size()));
  }
  const auto offset = static_cast<size_t>(begin) * static_cast<size_t>(hidden()) *
                      static_cast<size_t>(size_of(a()));
  CombineArgs args;
  args.num_rows = end - begin;
  args.hidden = hidden();
  args.dtype = a();
  args.terms = terms;
  args.row_terms = row_terms;
  if (has_shared)
    args.shared = Rows{shared_memory.data() + offset, a(), hidden()};
  args.x = MutableRows{x_memory.data() + offset, a(), hidden()};
  combine(args, workers);
  answers.clear();
  if (tp() == 1) {
    next_block(workers);
    return;
  }
  const auto bytes = static_cast<size_t>(end - begin) * static_cast<size_t>(hidden()) *
                     static_cast<size_t>(size_of(a()));
  auto buffer = context.fabric->pool().acquire(bytes);
  if (!buffer) {
    fail(buffer.error());
    return;
  }
  std::memcpy((*buffer)->data(), x_memory.data() + offset, bytes);
  own_partial = std::move(*buffer);
  stage = Stage::gather;
  need = Need::gathered;
}

void BlockRunner::State::take_gathered() {
  const auto row = static_cast<size_t>(hidden()) * static_cast<size_t>(size_of(a()));
  for (int r = 0; r < tp(); ++r) {
    if (r == tp_rank())
      continue;
    const auto& buffer = exchanged[static_cast<size_t>(r)];
    if (buffer)
      std::memcpy(x_memory.data() + static_cast<size_t>(share_begin(r)) * row,
                  std::as_const(*buffer).data(), buffer->size());
  }
  drop_partials();
  own_partial = {};
}

// Memory for this rank's FP32 partial; nullptr (and the walk failed) when the pool has no room.
float* BlockRunner::State::new_partial() {
  const auto bytes =
      static_cast<size_t>(num_rows()) * static_cast<size_t>(hidden()) * sizeof(float);
  auto buffer = context.fabric->pool().acquire(bytes);
  if (!buffer) {
    fail(buffer.error());
    return nullptr;
  }
  own_partial = std::move(*buffer);
  return reinterpret_cast<float*>(own_partial->data());
}

std::vector<const float*> BlockRunner::State::partials() const {
  std::vector<const float*> list;
  for (int r = 0; r < tp(); ++r) {
    const auto& buffer = r == tp_rank() ? own_partial : exchanged[static_cast<size_t>(r)];
    list.push_back(reinterpret_cast<const float*>(std::as_const(*buffer).data()));
  }
  return list;
}

void BlockRunner::State::drop_partials() {
  exchanged.clear();
  own_partial = {};
}

// The exchange whose siblings' side a stage needs, if any.
std::optional<uint32_t> BlockRunner::State::exchange_before(Stage next) const {
  switch (next) {
  case Stage::finish_attention:
    return kAttentionPartial;
  case Stage::finish_ffn:
    return kFfnPartial;
  case Stage::combine:
    if (tp() > 1 && now().weights->ffn_is_cut && now().weights->shared.gate.n > 0)
      return kFfnPartial;
    return std::nullopt;
  case Stage::gather:
    return kGathered;
  case Stage::attention:
  case Stage::shared:
    break;
  }
  return std::nullopt;
}

bool BlockRunner::State::have_all(uint32_t exchange) const {
  for (int r = 0; r < tp(); ++r)
    if (r != tp_rank() && !from_siblings.contains({walk.id, static_cast<uint32_t>(now().layer),
                                                   exchange, context.sibling(r)}))
      return false;
  return true;
}

// Hands the siblings' side to the next job. Errc::malformed when a sibling sent another size.
caf::error BlockRunner::State::take_exchange(uint32_t exchange) {
  exchanged.clear();
  for (int r = 0; r < tp(); ++r) {
    BufferRef theirs;
    if (r != tp_rank()) {
      theirs = std::move(
          from_siblings
              .extract({walk.id, static_cast<uint32_t>(now().layer), exchange, context.sibling(r)})
              .mapped());
      const bool rows = exchange == kGathered;
      const int64_t n = rows ? share_begin(r + 1) - share_begin(r) : num_rows();
      const auto expected = static_cast<size_t>(n * hidden() * size_of(rows ? a() : DType::f32));
      if ((theirs ? theirs->size() : 0) != expected)
        return make_error(Errc::malformed,
                          fmt::format("partial from rank {} has {} bytes, expected {}",
                                      context.sibling(r).value, theirs ? theirs->size() : 0,
                                      expected));
    }
    exchanged.push_back(std::move(theirs));
  }
  return {};
}

// ---- the actor's side -------------------------------------------------------------------------

BlockRunner::BlockRunner(const RankContext& context, std::shared_ptr<Trunk> trunk, Route route,
                         caf::actor_addr self)
    : state_(std::make_shared<State>(context, std::move(trunk), route)), self_(std::move(self)) {}

BlockRunner::~BlockRunner() = default;

bool BlockRunner::busy() const { return state_->busy; }

MutableRows BlockRunner::x() const { return state_->x(); }

void BlockRunner::on_job_done(uint64_t walk) {
  if (state_->job_running && state_->walk.id == walk)
    after_stage_job();
}

void BlockRunner::start(Walk walk, std::function<void(const caf::error&)> done) {
  auto& s = *state_;
  s.busy = true;
  s.walk = std::move(walk);
  s.done = std::move(done);
  s.block = 0;
  s.stage = Stage::attention;
  s.error = {};
  s.bad_answer = {};
  s.collecting = false;
  start_stage_job();
}

void BlockRunner::start_stage_job() {
  auto& s = *state_;
  if (const auto exchange = s.exchange_before(s.stage)) {
    if (auto error = s.take_exchange(*exchange)) {
      finish(error);
      return;
    }
  }
  s.collecting = s.collecting && s.stage != Stage::combine;
  s.job_running = true;
  const char* name = s.stage == Stage::shared ? "shared experts" : "trunk";
  const int64_t layer = s.block < s.walk.blocks.size() ? s.now().layer : -1;
  s.context.stream->start(
      name, [state = state_](Workers& workers) { state->run_stage(workers); },
      [handle = caf::actor_cast<caf::actor>(self_), trace = s.context.trace, name, layer,
       walk = s.walk.id](const JobTiming& timing) {
        if (trace)
          trace->add({name, "compute", timing.started, timing.finished, layer});
        caf::anon_send(handle, JobDone{walk});
      });
}

void BlockRunner::after_stage_job() {
  auto& s = *state_;
  s.job_running = false;
  switch (s.need) {
  case Need::finished:
    finish(s.error);
    return;
  case Need::partials:
    send_partials(s.own_partial,
                  s.stage == Stage::finish_attention ? kAttentionPartial : kFfnPartial);
    break;
  case Need::dispatch:
    send_dispatches();
    start_stage_job(); // the shared experts, while the dispatches are away
    return;
  case Need::shared_done:
    if (s.own_partial)
      send_partials(s.own_partial, kFfnPartial);
    break;
  case Need::gathered:
    send_partials(s.own_partial, kGathered);
    break;
  case Need::nothing:
    break;
  }
  maybe_continue();
}

void BlockRunner::send_partials(const BufferRef& own, uint32_t exchange) {
  auto& s = *state_;
  for (int r = 0; r < s.tp(); ++r) {
    if (r == s.tp_rank())
      continue;
    WireHeader header;
    header.kind = exchange == kGathered ? WireKind::gathered : WireKind::partial;
    header.step = s.walk.id;
    header.layer = static_cast<uint32_t>(s.now().layer);
    header.attempt = exchange;
    s.context.postman->post(s.context.sibling(r), s.route, header, own);
  }
}

void BlockRunner::send_dispatches() {
  auto& s = *state_;
  s.answers_missing = s.answers.size();
  s.collecting = true;
  s.collected_layer = static_cast<uint32_t>(s.now().layer);
  s.sent_at = s.context.clock->now();
  for (auto& [to, answer] : s.answers) {
    WireHeader header;
    header.kind = s.context.view->two_hop ? WireKind::forward : WireKind::dispatch;
    header.step = s.walk.id;
    header.layer = static_cast<uint32_t>(s.now().layer);
    s.context.postman->post(to, s.route, header, answer.dispatch);
  }
}

// The rows of an answer must be as many as its dispatch calls for; a duplicate or a stranger's
// answer is dropped, not added.
void BlockRunner::on_envelope(Envelope envelope) {
  auto& s = *state_;
  const auto& h = envelope.header;
  if (h.kind == WireKind::partial || h.kind == WireKind::gathered) {
    if (h.step <= s.last_walk)
      return; // a duplicate of an exchange that is over
    s.from_siblings.insert_or_assign({h.step, h.layer, h.attempt, h.source},
                                     std::move(envelope.payload));
    maybe_continue();
    return;
  }
  if (h.kind != WireKind::combine || !s.collecting || h.step != s.walk.id ||
      h.layer != s.collected_layer)
    return;
  const auto answer = s.answers.find(h.source);
  if (answer == s.answers.end() || answer->second.rows)
    return;
  const auto expected =
      answer_rows(answer->second.table.rows, answer->second.table.entries).size() *
      answer_row_bytes(s.a(), s.hidden());
  if (!envelope.payload || envelope.payload->size() != expected) {
    if (!s.bad_answer)
      s.bad_answer =
          make_error(Errc::malformed, fmt::format("combine from rank {} has {} bytes, expected {}",
                                                  h.source.value, h.payload_bytes, expected));
  }
  answer->second.rows = std::move(envelope.payload);
  --s.answers_missing;
  if (s.answers_missing == 0 && s.context.trace)
    s.context.trace->add(
        {"dispatch to combine", "wire", s.sent_at, s.context.clock->now(), s.collected_layer});
  maybe_continue();
}

void BlockRunner::maybe_continue() {
  auto& s = *state_;
  if (!s.busy || s.job_running)
    return;
  if (s.bad_answer) {
    finish(s.bad_answer);
    return;
  }
  if (s.stage == Stage::combine && s.answers_missing > 0)
    return;
  const auto exchange = s.exchange_before(s.stage);
  if (!exchange || s.have_all(*exchange))
    start_stage_job();
}

void BlockRunner::finish(const caf::error& error) {
  auto& s = *state_;
  s.busy = false;
  s.last_walk = s.walk.id;
  std::erase_if(s.from_siblings,
                [&](const auto& kept) { return std::get<0>(kept.first) <= s.last_walk; });
  s.answers.clear();
  s.collecting = false;
  s.exchanged.clear();
  s.walk = {};
  const auto done = std::move(s.done);
  s.done = nullptr;
  done(error);
}

} // namespace troupe

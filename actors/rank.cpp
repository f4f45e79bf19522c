#include "actors/rank.hpp"

#include "actors/attention.hpp"
#include "actors/balance_controller.hpp"
#include "actors/expert_shard.hpp"
#include "actors/forwarder.hpp"
#include "actors/gateway.hpp"
#include "actors/mtp.hpp"
#include "actors/optimizer.hpp"
#include "actors/pipeline_stage.hpp"
#include "actors/rank_supervisor.hpp"
#include "actors/train_checkpoint.hpp"
#include "actors/train_experts.hpp"
#include "actors/train_messages.hpp"
#include "actors/trainer.hpp"
#include "kernels/train_fingerprint.hpp"

#include <caf/actor_cast.hpp>
#include <caf/default_attachable.hpp>
#include <caf/io/middleman.hpp>
#include <caf/openssl/manager.hpp>
#include <caf/send.hpp>

#include <fmt/format.h>
#include <xxhash.h>

#include <unistd.h>

#include <algorithm>
#include <fstream>

namespace troupe {

namespace {

// Resident bytes of this process, from /proc.
int64_t resident_bytes() {
  std::ifstream statm{"/proc/self/statm"};
  int64_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

RankLimits resolve(RankLimits limits, const ModelConfig& config, int64_t num_mtp_layers) {
  if (limits.kv_tokens <= 0)
    limits.kv_tokens = 16384;
  limits.kv_tokens = (limits.kv_tokens + kPageTokens - 1) / kPageTokens * kPageTokens;
  limits.max_context = limits.kv_tokens;
  if (config.max_position_embeddings > 0)
    limits.max_context = std::min(limits.max_context, config.max_position_embeddings);
  if (num_mtp_layers == 0)
    limits.max_speculate = 0;
  return limits;
}

// What must be equal on all ranks beside model and arithmetic.
uint64_t settings_digest(const ClusterOptions& o, const RankLimits& l) {
  const auto text =
      fmt::format("{} {} {} {} {} {} {} {} {} {} {} {} {} {}", o.shape.num_ranks, o.shape.joint,
                  o.shape.attention_ranks, o.shape.tp, o.shape.nodes, o.shape.two_hop,
                  o.shape.placement_seed, o.shape.redundant_experts, l.batch, l.prefill_chunk,
                  l.kv_tokens, l.max_context, l.max_speculate, l.overlap_rows);
  return XXH3_64bits(text.data(), text.size());
}

std::string host_name() {
  char name[256] = {};
  if (gethostname(name, sizeof name - 1) != 0)
    return "?";
  return name;
}

} // namespace

caf::expected<Arithmetic> choose_arithmetic(const Checkpoint& checkpoint,
                                            const ClusterOptions& options) {
  const auto* embedding = checkpoint.find("model.embed_tokens.weight");
  const DType stored = embedding ? embedding->dtype : DType::bf16;
  auto arithmetic = default_arithmetic(checkpoint.config(), stored);
  if (options.compute)
    arithmetic.activations = *options.compute;
  if (!options.fp8)
    return arithmetic;
  if (*options.fp8 != "weights" && *options.fp8 != "activations")
    return make_error(
        Errc::invalid_argument,
        fmt::format("fp8: \"{}\" given, expected \"weights\" or \"activations\"", *options.fp8));
  arithmetic.fp8_weights = true;
  arithmetic.fp8_activations = *options.fp8 == "activations";
  if (arithmetic.fp8_activations && arithmetic.activations != DType::bf16)
    return make_error(Errc::unsupported, "fp8: activations need --compute bf16");
  return arithmetic;
}

RankSystemConfig::RankSystemConfig(bool testing, const TlsFiles& tls) {
  add_message_types<caf::id_block::troupe>();
  add_message_types<caf::id_block::troupe_train>();
  set("scheduler.max-threads", 1);
  set("scheduler.policy", testing ? caf::atom("testing") : caf::atom("sharing"));
  if (!testing) {
    load<caf::io::middleman>();
    set("middleman.enable-automatic-connections", false);
  }
  if (!tls.empty()) {
    load<caf::openssl::manager>();
    openssl_certificate = tls.certificate;
    openssl_key = tls.key;
    openssl_cafile = tls.ca;
  }
}

struct Rank::Impl {
  Impl(RankId self, const ClusterOptions& o, std::shared_ptr<const Checkpoint> c,
       const RankEnvironment& e)
      : options(o), environment(e), checkpoint(std::move(c)), postman(*e.system, self) {}

  ClusterOptions options;
  RankEnvironment environment;
  std::shared_ptr<const Checkpoint> checkpoint; // null when training
  std::shared_ptr<const TrainSetup> setup;      // null when serving
  std::shared_ptr<TrainContext> train;          // once started
  Postman postman;
  Trace trace;
  RankContext context;
  View planned;
  int64_t weight_bytes = 0, kv_bytes = 0;
  std::vector<caf::actor> actors; // in order of their start
  caf::actor supervisor;

  [[nodiscard]] int64_t num_mtp_modules() const {
    return context.limits.max_speculate > 0 ? checkpoint->num_mtp_layers() : 0;
  }
  caf::error connect(const View& view);
  caf::error start_experts(const LoadProgress& progress);
  caf::error start_attention(const LoadProgress& progress);
  caf::error start_training(const LoadProgress& progress);
  caf::expected<caf::actor> open_trainer();
  caf::expected<TrunkParts> load_parts(const LoadProgress& progress);
  template <class Handle>
  void adopt(Route route, const Handle& handle) {
    auto actor = caf::actor_cast<caf::actor>(handle);
    if (supervisor) // hears when the actor ends, as if it had asked for that itself
      caf::actor_cast<caf::abstract_actor*>(actor)->attach(
          caf::default_attachable::make_monitor(actor.address(), supervisor.address()));
    postman.set_route(route, actor);
    actors.push_back(std::move(actor));
  }
};

Rank::Rank(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Rank::~Rank() { stop(); }

caf::expected<std::unique_ptr<Rank>> Rank::make(RankId self, const ClusterOptions& options,
                                                std::shared_ptr<const Checkpoint> checkpoint,
                                                const RankEnvironment& environment) {
  auto impl = std::make_unique<Impl>(self, options, std::move(checkpoint), environment);
  auto arithmetic = choose_arithmetic(*impl->checkpoint, options);
  if (!arithmetic)
    return arithmetic.error();
  const auto* backend = find_backend(options.backend);
  if (!backend) {
    std::string names;
    for (const auto& name : available_backends())
      names += (names.empty() ? "" : ", ") + name;
    return make_error(Errc::invalid_argument,
                      fmt::format("backend: \"{}\" is not available here; there are: simd, {}",
                                  options.backend, names));
  }
  auto& c = impl->context;
  c.self = self;
  c.config = impl->checkpoint->config();
  c.arithmetic = *arithmetic;
  c.backend = backend;
  c.limits = resolve(options.limits, c.config, impl->checkpoint->num_mtp_layers());
  c.fabric = environment.fabric;
  c.stream = environment.stream;
  c.clock = environment.clock;
  c.postman = &impl->postman;
  c.trace = options.trace ? &impl->trace : nullptr;
  auto view = first_view(c.config, options.shape, impl->num_mtp_modules());
  if (!view)
    return view.error();
  impl->planned = std::move(*view);
  c.view = std::make_shared<const View>(impl->planned);
  impl->postman.set_fabric(environment.fabric);
  return std::unique_ptr<Rank>{new Rank{std::move(impl)}};
}

// A training run's view: who takes part. Who does what is TrainPlan's.
static View training_view(int32_t num_ranks) {
  View view;
  view.epoch = 1;
  for (int32_t r = 0; r < num_ranks; ++r) {
    Member member;
    member.rank = RankId{r};
    member.incarnation = 1;
    member.node = NodeId{0};
    view.members.push_back(member);
  }
  return view;
}

caf::expected<std::unique_ptr<Rank>> Rank::make_training(RankId self, const ClusterOptions& options,
                                                         std::shared_ptr<const TrainSetup> setup,
                                                         const RankEnvironment& environment) {
  if (auto plan = plan_of(setup->config, setup->model); !plan)
    return plan.error();
  auto impl = std::make_unique<Impl>(self, options, nullptr, environment);
  auto& c = impl->context;
  c.self = self;
  c.config = setup->model;
  c.fabric = environment.fabric;
  c.stream = environment.stream;
  c.clock = environment.clock;
  c.postman = &impl->postman;
  c.trace = options.trace ? &impl->trace : nullptr;
  impl->planned = training_view(setup->config.num_ranks());
  impl->setup = std::move(setup);
  c.view = std::make_shared<const View>(impl->planned);
  impl->postman.set_fabric(environment.fabric);
  return std::unique_ptr<Rank>{new Rank{std::move(impl)}};
}

Postman& Rank::postman() { return impl_->postman; }
const View& Rank::planned_view() const { return impl_->planned; }
Trace& Rank::trace() { return impl_->trace; }
const RankContext& Rank::context() const { return impl_->context; }

JoinRequest Rank::join_request() const {
  const auto& c = impl_->context;
  JoinRequest request;
  request.cluster_token = impl_->options.cluster_token;
  request.version = kVersion;
  request.rank = c.self;
  request.host = host_name();
  request.address = c.fabric->address();
  if (impl_->setup) {
    const auto& config = impl_->setup->config;
    const auto* ops = find_train_ops(config.backend);
    request.model_digest = impl_->setup->digest;
    request.settings_digest = impl_->setup->settings_digest;
    request.arithmetic = fmt::format("training in {}", name_of(config.compute));
    request.backend = ops ? ops->name : config.backend;
    request.fingerprint = ops ? train_fingerprint(*ops) : 0;
    return request;
  }
  request.model_digest = impl_->checkpoint->digest();
  request.settings_digest = settings_digest(impl_->options, c.limits);
  request.arithmetic = to_string(c.arithmetic);
  request.backend = c.backend->name;
  request.fingerprint = arithmetic_fingerprint(*c.backend, c.arithmetic.activations);
  return request;
}

void Rank::supervise(std::function<void(const caf::error&)> on_end) {
  auto handle = impl_->environment.system->spawn(
      rank_supervisor, &impl_->context, [this] { return stats(); }, std::move(on_end));
  impl_->supervisor = caf::actor_cast<caf::actor>(handle);
  impl_->postman.set_route(Route::supervisor, impl_->supervisor);
}

caf::error Rank::Impl::connect(const View& view) {
  for (const auto& m : view.members)
    if (m.rank != context.self)
      if (auto error = context.fabric->connect(m.rank, m.incarnation, m.address))
        return with_context(fmt::format("connecting to rank {}", m.rank.value), error);
  context.fabric->set_epoch(view.epoch);
  return {};
}

caf::error Rank::Impl::start_experts(const LoadProgress& progress) {
  std::vector<ExpertKey> keys;
  std::vector<std::pair<int32_t, int32_t>> slots;
  for (const auto& layer : context.view->placement)
    for (const auto& slot : layer.slots)
      if (slot.rank == context.self) {
        keys.push_back({layer.layer, slot.expert});
        slots.emplace_back(layer.layer, slot.slot.value);
      }
  auto blocks =
      load_experts(*checkpoint, context.arithmetic, keys, context.stream->num_threads(), progress);
  if (!blocks)
    return blocks.error();
  auto held = std::make_shared<ExpertBlocks>();
  for (size_t i = 0; i < slots.size(); ++i) {
    weight_bytes += static_cast<int64_t>((*blocks)[i].bytes().size());
    held->emplace(slots[i], std::move((*blocks)[i]));
  }
  auto& system = *environment.system;
  adopt(Route::expert_shard,
        system.spawn(expert_shard, &context, std::shared_ptr<const ExpertBlocks>{held}));
  if (context.view->two_hop)
    adopt(Route::forwarder, system.spawn(forwarder, &context));
  return {};
}

caf::expected<TrunkParts> Rank::Impl::load_parts(const LoadProgress& progress) {
  const auto& me = context.me();
  TrunkParts parts;
  parts.share.tp_rank = me.tp_rank;
  parts.share.tp = context.tp();
  parts.share.head = me.tp_rank == 0;
  parts.share.num_mtp_layers = num_mtp_modules();
  auto weights = load_trunk(*checkpoint, context.arithmetic, parts.share,
                            context.stream->num_threads(), progress);
  if (!weights)
    return weights.error();
  parts.weights = std::move(*weights);
  const DType a = context.arithmetic.activations;
  const int64_t pages = context.limits.kv_tokens / kPageTokens;
  auto cache = LatentCache::make(context.config, a, context.config.num_hidden_layers, pages);
  if (!cache)
    return cache.error();
  parts.cache = std::move(*cache);
  if (num_mtp_modules() > 0) {
    auto mtp_cache = LatentCache::make(context.config, a, context.limits.max_speculate, pages);
    if (!mtp_cache)
      return mtp_cache.error();
    parts.mtp_cache = std::move(*mtp_cache);
  }
  return parts;
}

caf::error Rank::Impl::start_attention(const LoadProgress& progress) {
  auto parts = load_parts(progress);
  if (!parts)
    return parts.error();
  parts->num_ids = static_cast<int32_t>(context.config.vocab_size);
  for (const int64_t id : context.config.eos_token_ids)
    parts->eos_ids.push_back(static_cast<int32_t>(id));
  auto tokenizer = Tokenizer::load(options.model);
  if (tokenizer) {
    parts->tokenizer = *tokenizer;
    parts->num_ids = std::min(parts->num_ids, parts->tokenizer->num_ids());
    if (const auto eos = parts->tokenizer->eos_token_id())
      parts->eos_ids.push_back(*eos);
  } else if (code_of(tokenizer.error()) != Errc::not_found) {
    return tokenizer.error();
  }
  weight_bytes += parts->weights->bytes;
  kv_bytes = parts->cache->bytes() + (parts->mtp_cache ? parts->mtp_cache->bytes() : 0);
  Trunk::Limits limits;
  limits.max_rows = context.limits.max_rows();
  limits.max_context = context.limits.max_context;
  limits.num_threads = context.stream->num_threads();
  auto trunk = std::make_shared<Trunk>(context.config, context.arithmetic, *context.backend,
                                       parts->weights, parts->share, limits);
  auto& system = *environment.system;
  if (parts->mtp_cache)
    adopt(Route::mtp, system.spawn(mtp, &context, *parts, trunk));
  adopt(Route::attention, system.spawn(attention, &context, *parts, trunk));
  return {};
}

caf::error Rank::Impl::start_training(const LoadProgress& progress) {
  auto made =
      make_train_context(&context, setup->config, setup->model, setup->data, setup->held_out);
  if (!made)
    return made.error();
  train = std::move(*made);
  train->background = environment.background;
  auto state = make_optimizer_state(*train, setup->source, progress);
  if (!state)
    return state.error();
  for (const auto& phase : train->phases)
    weight_bytes += phase.weights->layout().num_values() * int64_t{sizeof(float)};
  auto& system = *environment.system;
  const std::shared_ptr<const TrainContext> shared = train;
  adopt(Route::optimizer, system.spawn(optimizer, shared, *state));
  adopt(Route::expert_shard, system.spawn(train_experts, shared));
  adopt(Route::pipeline_stage, system.spawn(pipeline_stage, shared));
  return {};
}

caf::expected<caf::actor> Rank::Impl::open_trainer() {
  if (!setup->config.out.empty())
    if (auto error = remove_temporary_checkpoints(setup->config.out))
      return error;
  // The controller starts from the biases of all layers, whoever holds them.
  const TrainLayout layout{
      train->plan.config, train->plan.num_mtp_layers,
      [](const TensorSpec& spec) { return spec.role == TensorRole::router_bias; }};
  std::vector<LayerBias> biases;
  for (const auto& tensor : layout.tensors()) {
    std::vector<float> bias(static_cast<size_t>(tensor.size));
    if (auto error = setup->source.master(tensor.spec, bias))
      return error;
    biases.push_back({tensor.spec.layer, std::move(bias)});
  }
  auto& system = *environment.system;
  const auto controller = system.spawn(balance_controller, std::move(biases));
  adopt(Route::balance_controller, controller);
  const std::shared_ptr<const TrainContext> shared = train;
  adopt(Route::trainer, system.spawn(trainer, shared, setup, controller));
  return actors.back();
}

caf::error Rank::start(const Welcome& welcome, const LoadProgress& progress) {
  auto& impl = *impl_;
  impl.context.view = std::make_shared<const View>(welcome.view);
  if (auto error = impl.connect(welcome.view))
    return error;
  if (impl.setup)
    return impl.start_training(progress);
  const auto& me = impl.context.me();
  if (me.hosts_experts)
    if (auto error = impl.start_experts(progress))
      return error;
  if (me.attention_group >= 0)
    if (auto error = impl.start_attention(progress))
      return error;
  return {};
}

caf::expected<caf::actor> Rank::open_gateway() {
  if (impl_->setup)
    return impl_->open_trainer();
  const auto& c = impl_->context;
  ClusterInfo info;
  info.model = impl_->options.model;
  info.arithmetic = to_string(c.arithmetic);
  info.backend = c.backend->name;
  info.model_digest = impl_->checkpoint->digest();
  info.num_ranks = static_cast<int32_t>(c.view->members.size());
  info.num_attention_groups = c.view->num_attention_groups;
  info.tp = c.view->tp;
  info.max_context = c.limits.max_context;
  info.num_mtp_layers = impl_->checkpoint->num_mtp_layers();
  impl_->adopt(Route::gateway, impl_->environment.system->spawn(gateway, &c, std::move(info)));
  return caf::actor{impl_->actors.back()};
}

void Rank::stop() {
  auto& impl = *impl_;
  impl.postman.clear_routes();
  for (auto actor = impl.actors.rbegin(); actor != impl.actors.rend(); ++actor)
    caf::anon_send_exit(*actor, caf::exit_reason::user_shutdown);
  impl.actors.clear();
  if (impl.supervisor)
    caf::anon_send_exit(impl.supervisor, caf::exit_reason::user_shutdown);
  impl.supervisor = nullptr;
}

RankStats Rank::stats() const {
  const auto fabric = impl_->context.fabric->stats();
  RankStats stats;
  stats.rank = impl_->context.self;
  stats.bytes_sent = fabric.bytes_sent;
  stats.bytes_received = fabric.bytes_received;
  stats.messages_sent = fabric.messages_sent;
  stats.messages_received = fabric.messages_received;
  stats.weight_bytes = impl_->weight_bytes;
  stats.kv_bytes = impl_->kv_bytes;
  stats.resident_bytes = resident_bytes();
  return stats;
}

} // namespace troupe

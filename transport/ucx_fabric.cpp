#include "transport/ucx_fabric.hpp"

#include "transport/fabric_base.hpp"
#include "transport/ucx_address.hpp"
#include "transport/ucx_channel.hpp"

#include <fmt/format.h>
#include <ucs/config/global_opts.h>
#include <ucs/debug/debug.h>
#include <ucs/debug/log_def.h>

#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <utility>

namespace troupe {

namespace {

// ── settings ──

bool has_rdma() {
  std::error_code ignored; // absent and unreadable are the same here
  return std::filesystem::exists("/sys/class/infiniband", ignored) &&
         !std::filesystem::is_empty("/sys/class/infiniband", ignored);
}

// Transport settings can only be given through the environment: ucp_config_modify does not know
// them.
void apply_defaults() {
  const bool rdma = has_rdma();
  const auto set = [](const char* name, const char* value) { ::setenv(name, value, 0); };
  // What reports the death of a peer. Shared memory does not.
  set("UCX_TLS", rdma ? "ib,tcp,self" : "tcp,self");
  // UCX over TCP asserts when the acknowledgement of a PUT comes from a peer that has just died, so
  // a rendezvous must do without; it is no slower.
  set("UCX_TCP_PUT_ENABLE", "n");
  // Over TCP a rendezvous saves a copy and costs a handshake between busy threads. Measured on two
  // shared cores (bench_fabric): at 1 MB eager moves 1.7 GB/s, rendezvous 0.8; at 16 MB they are
  // equal, and rendezvous needs no second buffer.
  if (!rdma)
    set("UCX_RNDV_THRESH", "2M");
  // An idle link that is cut is noticed after 4 s, also where nobody watches by heartbeats.
  set("UCX_TCP_KEEPIDLE", "1s");
  set("UCX_TCP_KEEPINTVL", "1s");
  set("UCX_TCP_KEEPCNT", "3");
}

// What happens is told by status, to the one who called or through on_peer_lost; UCX's own log
// would tell it again, on stdout, which is for results. UCX_LOG_LEVEL brings it back.
ucs_log_func_rc_t log_fatal_only(const char*, unsigned, const char*, ucs_log_level_t level,
                                 const ucs_log_component_config_t*, const char* format,
                                 va_list arguments) {
  if (level > UCS_LOG_LEVEL_FATAL)
    return UCS_LOG_FUNC_RC_STOP;
  std::fputs("troupe: UCX: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  return UCS_LOG_FUNC_RC_STOP;
}

// UCX read its global settings when it was loaded, before main: the environment is too late.
void apply_global_defaults() {
  (void)ucs_global_opts_set_value(UCS_GLOBAL_OPTS_WARN_UNUSED_CONFIG, "n"); // exists since 1.8
  if (!std::getenv("UCX_LOG_LEVEL"))
    ucs_log_push_handler(log_fatal_only);
  if (!std::getenv("UCX_HANDLE_ERRORS")) // signals are the program's
    for (const int signal : {SIGILL, SIGSEGV, SIGBUS, SIGFPE})
      ucs_debug_disable_signal(signal);
}

struct ContextCloser {
  void operator()(ucp_context_h context) const { ucp_cleanup(context); }
};
using Context = std::unique_ptr<std::remove_pointer_t<ucp_context_h>, ContextCloser>;

caf::expected<Context> open_context() {
  static std::once_flag once;
  std::call_once(once, [] {
    apply_defaults();
    apply_global_defaults();
  });
  ucp_config_t* config = nullptr;
  auto status = ucp_config_read(nullptr, nullptr, &config);
  ucp_context_h context = nullptr;
  if (status == UCS_OK) {
    ucp_params_t params{};
    params.field_mask = UCP_PARAM_FIELD_FEATURES;
    params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
    status = ucp_init(&params, config, &context);
    ucp_config_release(config);
  }
  if (status != UCS_OK)
    return make_error(Errc::unsupported, fmt::format("UCX does not start: {} ({})",
                                                     ucs_status_string(status), ucx_settings()));
  return Context{context};
}

// ── the fabric ──

class UcxFabric final : public FabricBase {
public:
  explicit UcxFabric(FabricOptions options) : FabricBase(std::move(options)) {
    (void)add_link(self(), this->options().incarnation, "self"); // can't fail: the first
  }
  ~UcxFabric() override {
    stop(false, 0);
    if (std::ranges::any_of(channels_, [](const auto& channel) { return channel->abandoned(); }))
      (void)context_.release();
  }

  caf::error open(const UcxOptions& ucx);
  [[nodiscard]] std::string address() const override { return address_; }
  caf::error start(FabricSink* sink) override;
  caf::error connect(RankId peer, uint32_t incarnation, const std::string& address) override;
  caf::error send(RankId destination, WireHeader header, BufferRef payload) override;
  void stop(bool clean, int64_t flush_ms) override;

private:
  UcxChannel& channel_of(RankId peer) {
    return *channels_[static_cast<size_t>(peer.value) % channels_.size()];
  }

  Context context_;
  std::vector<std::unique_ptr<UcxChannel>> channels_; // closed before the context
  std::string address_;
  std::mutex stop_mutex_;
  std::atomic<bool> running_{false};
  bool stopped_ = false;
};

caf::error UcxFabric::open(const UcxOptions& ucx) {
  if (ucx.channels < 1 || ucx.channels > kMaxChannels)
    return make_error(Errc::invalid_argument, fmt::format("fabric: {} channels, expected 1 to {}",
                                                          ucx.channels, kMaxChannels));
  if (ucx.spin_us < 0)
    return make_error(Errc::invalid_argument, "fabric: spin_us can't be negative");
  auto context = open_context();
  if (!context)
    return context.error();
  context_ = std::move(*context);
  UcxAddress address{self(), options().incarnation, {}};
  for (int c = 0; c < ucx.channels; ++c) {
    auto channel = UcxChannel::make(context_.get(), *this, ucx.spin_us);
    if (!channel)
      return channel.error();
    address.workers.push_back((*channel)->address());
    channels_.push_back(std::move(*channel));
  }
  address_ = encode(address);
  return {};
}

caf::error UcxFabric::start(FabricSink* sink) {
  const std::lock_guard lock{stop_mutex_};
  if (stopped_ || running_)
    return make_error(Errc::internal, "fabric: can be started once");
  set_sink(sink);
  for (auto& channel : channels_)
    channel->start();
  running_ = true;
  return {};
}

caf::error UcxFabric::connect(RankId peer, uint32_t incarnation, const std::string& address) {
  if (!running_)
    return make_error(Errc::cancelled, "fabric: not started, or stopped");
  if (peer == self())
    return {};
  auto decoded = decode_ucx_address(address);
  if (!decoded)
    return make_error(Errc::malformed,
                      fmt::format("fabric: the address of rank {} is not one", peer.value));
  if (decoded->rank != peer || decoded->incarnation != incarnation)
    return make_error(Errc::mismatch,
                      fmt::format("fabric: the address of rank {}, incarnation {}, is that of rank "
                                  "{}, incarnation {}",
                                  peer.value, incarnation, decoded->rank.value,
                                  decoded->incarnation));
  auto added = add_link(peer, incarnation, address);
  if (!added)
    return added.error();
  if (!added->is_new)
    return {};
  // The peer serves us on the channel of our number, as we serve it on the channel of its.
  auto& worker = decoded->workers[static_cast<size_t>(self().value) % decoded->workers.size()];
  return channel_of(peer).connect(added->link, std::move(worker));
}

caf::error UcxFabric::send(RankId destination, WireHeader header, BufferRef payload) {
  if (!running_)
    return make_error(Errc::cancelled, "fabric: not started, or stopped");
  auto outgoing = admit(destination, header, std::move(payload));
  if (!outgoing)
    return outgoing.error();
  channel_of(destination).post(std::move(*outgoing));
  return {};
}

void UcxFabric::stop(bool clean, int64_t flush_ms) {
  const std::lock_guard lock{stop_mutex_};
  stopped_ = true;
  if (!running_.exchange(false))
    return;
  for (auto& channel : channels_)
    channel->begin_stop(clean, flush_ms);
  for (auto& channel : channels_)
    channel->finish_stop();
  for (const auto& link : links())
    leave_connected(*link, Link::State::left);
}

} // namespace

caf::expected<std::unique_ptr<Fabric>> make_ucx_fabric(FabricOptions options, UcxOptions ucx) {
  if (auto error = check(options))
    return error;
  auto fabric = std::make_unique<UcxFabric>(std::move(options));
  if (auto error = fabric->open(ucx))
    return error;
  return std::unique_ptr<Fabric>{std::move(fabric)};
}

std::string ucx_settings() {
  std::string all;
  for (char** variable = ::environ; *variable; ++variable) {
    if (!std::string_view{*variable}.starts_with("UCX_"))
      continue;
    if (!all.empty())
      all += ' ';
    all += *variable;
  }
  return all;
}

} // namespace troupe

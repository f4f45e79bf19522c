#include "transport/ucx_channel.hpp"

#include <fmt/format.h>

#include <algorithm>

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

namespace troupe {

namespace {

using namespace std::chrono_literals;

// Small amounts of credit are returned together; a sender near its bound waits this long at most.
constexpr Nanoseconds kCreditDelay = 20ms;
// How often an arrival looks for room in a full pool.
constexpr Nanoseconds kRetryPeriod = 1ms;
// A peer that hangs while it connects, or never connects back, is waited for no longer than this.
constexpr Nanoseconds kSettleTimeout = 200ms;
// What UCX's side of a handshake takes, generously.
constexpr Nanoseconds kHandshakeTime = 50ms;
// Forced closes complete at once or, when UCX lost track of a request, never.
constexpr Nanoseconds kCloseTimeout = 500ms;
// Events taken before commands and timers get their turn again.
constexpr int kEventsPerStep = 64;

} // namespace

caf::expected<std::unique_ptr<UcxChannel>> UcxChannel::make(ucp_context_h context,
                                                            FabricBase& fabric, int64_t spin_us) {
  std::unique_ptr<UcxChannel> channel{new UcxChannel(fabric, spin_us)};
  if (auto error = channel->open(context))
    return error;
  return channel;
}

UcxChannel::UcxChannel(FabricBase& fabric, int64_t spin_us)
    : fabric_(fabric), spin_(std::chrono::microseconds{spin_us}) {}

caf::error UcxChannel::open(ucp_context_h context) {
  const auto failed = [](const char* what, ucs_status_t status) {
    return make_error(Errc::unsupported,
                      fmt::format("UCX: {}: {}", what, ucs_status_string(status)));
  };
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  // Made on one thread, driven by another, never by two at a time.
  params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  if (const auto status = ucp_worker_create(context, &params, &worker_); status != UCS_OK)
    return failed("no worker", status);
  if (const auto status = ucp_worker_get_efd(worker_, &worker_fd_); status != UCS_OK)
    return failed("no event descriptor", status);
  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                       UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = 0;
  handler.flags = UCP_AM_FLAG_WHOLE_MSG | UCP_AM_FLAG_PERSISTENT_DATA;
  handler.cb = on_active_message;
  handler.arg = this;
  if (const auto status = ucp_worker_set_am_recv_handler(worker_, &handler); status != UCS_OK)
    return failed("no active messages", status);
  ucp_address_t* address = nullptr;
  size_t length = 0;
  if (const auto status = ucp_worker_get_address(worker_, &address, &length); status != UCS_OK)
    return failed("no worker address", status);
  address_.assign(reinterpret_cast<const char*>(address), length);
  ucp_worker_release_address(worker_, address);
  wake_fd_ = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (wake_fd_ < 0)
    return make_error(Errc::io_error, "no event descriptor for the progress thread");
  return {};
}

UcxChannel::~UcxChannel() {
  if (thread_.joinable()) {
    begin_stop(false, 0);
    finish_stop();
  }
  release_all();
  if (wake_fd_ >= 0)
    ::close(wake_fd_);
}

// ── any thread ──

void UcxChannel::start() {
  thread_ = std::thread{[this] { run(); }};
}

void UcxChannel::post(Outgoing message) {
  const auto link = message.link;
  const auto bytes = wire_bytes(message.header);
  if (!push(std::move(message)))
    FabricBase::return_credit(*link, bytes);
}

caf::error UcxChannel::connect(LinkRef link, std::string worker_address) {
  std::promise<caf::error> done;
  auto answer = done.get_future();
  ConnectCommand command{std::move(link), std::move(worker_address), &done};
  if (std::this_thread::get_id() == thread_.get_id())
    execute(command); // from the sink
  else if (!push(std::move(command)))
    return make_error(Errc::cancelled, "fabric: has stopped");
  return answer.get();
}

void UcxChannel::begin_stop(bool clean, int64_t flush_ms) {
  push(StopCommand{clean, std::chrono::milliseconds{std::max<int64_t>(0, flush_ms)}});
}

void UcxChannel::finish_stop() {
  if (thread_.joinable())
    thread_.join();
}

bool UcxChannel::push(Command command) {
  {
    const std::lock_guard lock{queue_mutex_};
    if (closed_)
      return false;
    queue_.push_back(std::move(command));
  }
  // Either the thread sees the command before it sleeps, or we see that it does.
  if (sleeping_.load(std::memory_order_seq_cst) && sleeping_.exchange(false)) {
    const uint64_t one = 1;
    [[maybe_unused]] const auto n = ::write(wake_fd_, &one, sizeof one); // full: it is awake
  }
  return true;
}

// ── the progress thread ──

void UcxChannel::run() {
  last_work_ = last_watch_ = clock_.now();
  while (phase_ != Phase::done) {
    if (step())
      last_work_ = clock_.now();
    else if (clock_.now() - last_work_ >= spin_)
      sleep_until_event();
  }
  {
    const std::lock_guard lock{queue_mutex_};
    closed_ = true;
  }
  take_commands(); // whoever still waits for a connection is answered
  release_all();
}

bool UcxChannel::step() {
  bool worked = take_commands();
  for (int i = 0; i < kEventsPerStep && ucp_worker_progress(worker_) != 0; ++i)
    worked = true;
  run_timers();
  send_answers();
  bury_doomed();
  advance_phase();
  return worked;
}

bool UcxChannel::take_commands() {
  {
    const std::lock_guard lock{queue_mutex_};
    taken_.swap(queue_);
  }
  for (auto& command : taken_)
    std::visit([this](auto& c) { execute(c); }, command);
  const bool worked = !taken_.empty();
  taken_.clear();
  return worked;
}

void UcxChannel::execute(Outgoing& message) {
  auto& peer = peer_of(message.header.destination);
  if (message.header.destination == fabric_.self()) {
    fabric_.count_sent(message.header.payload_bytes);
    message.header.sequence = peer.next_sequence++;
    if (phase_ != Phase::done)
      fabric_.deliver(message.header, std::move(message.payload));
    FabricBase::return_credit(*message.link, wire_bytes(message.header));
    return;
  }
  const bool reachable = peer.link == message.link && peer.endpoint && phase_ == Phase::running &&
                         message.link->state == Link::State::connected;
  if (!reachable) { // lost since `send` let it in: reported by on_peer_lost
    FabricBase::return_credit(*message.link, wire_bytes(message.header));
    return;
  }
  message.header.sequence = message.link->next_sequence++;
  const void* bytes = message.payload ? message.payload->data() : nullptr;
  send(peer, message.header, bytes, std::move(message.payload));
}

void UcxChannel::execute(ConnectCommand& command) {
  if (phase_ != Phase::running) {
    command.done->set_value(make_error(Errc::cancelled, "fabric: is stopping"));
    return;
  }
  auto& peer = peer_of(command.link->peer);
  if (peer.origin.known && !peer.origin.heard &&
      peer.origin.incarnation ==
          command.link->incarnation) { // it was quicker to go than we to come
    FabricBase::leave_connected(*command.link, Link::State::left);
    command.done->set_value(
        make_error(Errc::peer_lost, fmt::format("rank {} has left", peer.rank.value)));
    return;
  }
  close_endpoint(peer); // of an earlier incarnation
  peer.link = command.link;
  peer.awaits_goodbye = false;
  peer.settled = false;
  peer.silence = {};
  credit_due_ = credit_due_ || peer.uncredited > 0; // it sent before we could answer
  auto error = open_endpoint(peer, command.address);
  if (error)
    FabricBase::leave_connected(*peer.link, Link::State::lost);
  else
    send(peer, fabric_.hello_header(peer.rank), fabric_.token().data(), {});
  if (peer.endpoint && peer.met == peer.link->incarnation)
    ask(peer);
  command.done->set_value(std::move(error));
}

void UcxChannel::execute(StopCommand& command) {
  if (phase_ != Phase::running)
    return;
  if (!command.clean) {
    stop_listening();
    return;
  }
  phase_ = Phase::leaving;
  phase_ends_ = clock_.now() + command.flush;
  for (auto& [rank, peer] : peers_)
    if (peer->endpoint && peer->link->state == Link::State::connected)
      say_goodbye(*peer);
}

void UcxChannel::sleep_until_event() {
  sleeping_.store(true, std::memory_order_seq_cst);
  {
    const std::lock_guard lock{queue_mutex_};
    if (!queue_.empty()) {
      sleeping_.store(false);
      return;
    }
  }
  // Busy: events came since the last progress.
  if (ucp_worker_arm(worker_) != UCS_OK) {
    sleeping_.store(false);
    return;
  }
  std::array<pollfd, 2> fds{pollfd{worker_fd_, POLLIN, 0}, pollfd{wake_fd_, POLLIN, 0}};
  const auto timer = next_timer();
  const auto left = std::max(timer - clock_.now(), Nanoseconds{0});
  const timespec timeout{static_cast<time_t>(left / 1s), static_cast<long>((left % 1s).count())};
  ::ppoll(fds.data(), fds.size(), timer == Nanoseconds::max() ? nullptr : &timeout, nullptr);
  sleeping_.store(false);
  uint64_t count = 0;
  if (fds[1].revents != 0) [[maybe_unused]]
    const auto n = ::read(wake_fd_, &count, sizeof count);
}

// ── timers ──

Nanoseconds UcxChannel::next_timer() const {
  auto at = Nanoseconds::max();
  if (const auto period = fabric_.options().heartbeat_period_ms; period > 0)
    at = std::min(at, last_watch_ + std::chrono::milliseconds{period});
  if (credit_due_)
    at = std::min(at, credit_at_);
  if (num_waiting_ > 0)
    at = std::min(at, retry_at_);
  if (phase_ != Phase::running)
    at = std::min(at, phase_ends_);
  return at;
}

void UcxChannel::run_timers() {
  const auto now = clock_.now();
  const auto period = std::chrono::milliseconds{fabric_.options().heartbeat_period_ms};
  if (period > 0ms && now - last_watch_ >= period) {
    // A tick that comes late because this process stood still tells little about others.
    watch(std::min<Nanoseconds>(now - last_watch_, 2 * period));
    last_watch_ = now;
  }
  if (credit_due_ && credit_at_ == Nanoseconds{0})
    credit_at_ = now + kCreditDelay;
  if (credit_due_ && now >= credit_at_) {
    return_credits();
    credit_due_ = false;
    credit_at_ = {};
  }
  if (num_waiting_ > 0 && now >= retry_at_) {
    retry_waiting();
    retry_at_ = now + kRetryPeriod;
  }
}

// ── the end ──

// UCX 1.13 has four traps here, each an assertion that ends a process:
//
// 1. An endpoint ends while its answer to the peer's handshake is still queued. So we wait for the
//    answer to a question that was asked after the peer's hello came: the queue is in order.
// 2. An endpoint is closed, and the peer's handshake for it comes afterwards: a new endpoint would
//    answer, and the peer fails on that. The same wait covers it.
// 3. A worker is destroyed with a rendezvous under way. Closing its endpoint by force ends it.
// 4. Over TCP a flush is a PUT, whose acknowledgement must not come from a peer that has just
// closed.
//    So nothing here flushes: that all arrived is known from the answer to GOODBYE.
//
// Where a rendezvous does not end in time, the worker is abandoned: it lives, undriven, to the end
// of the process.
void UcxChannel::advance_phase() {
  if (phase_ == Phase::running || phase_ == Phase::done)
    return;
  const bool late = clock_.now() >= phase_ends_;
  const auto answered = [](const auto& entry) { return !entry.second->awaits_goodbye; };
  const bool quiet = closes_in_flight_ == 0 && sends_in_flight_ == 0 && fetches_.empty();
  if (phase_ == Phase::leaving) {
    if (late || (sends_in_flight_ == 0 && std::ranges::all_of(peers_, answered)))
      stop_listening();
  } else if (phase_ == Phase::settling) {
    if (late || settled())
      start_closing();
  } else if (quiet || late) {
    abandoned_ = !quiet;
    phase_ = Phase::done;
  }
}

void UcxChannel::stop_listening() {
  phase_ = Phase::settling;
  phase_ends_ = clock_.now() + kSettleTimeout;
  for (auto& [rank, peer] : peers_) {
    if (peer->link) // its requests may fail from here on, which is no loss
      FabricBase::leave_connected(*peer->link, Link::State::left);
    peer->origin.heard = false;
    drop_arrivals(*peer);
  }
}

bool UcxChannel::settled() const {
  const auto now = clock_.now();
  return std::ranges::all_of(peers_, [&](const auto& entry) {
    const auto& peer = *entry.second;
    // Without an endpoint of ours nothing can be asked; UCX answered with one of its own.
    return peer.endpoint ? peer.settled : !peer.met || now - peer.met_at >= kHandshakeTime;
  });
}

void UcxChannel::start_closing() {
  phase_ = Phase::closing;
  phase_ends_ = clock_.now() + kCloseTimeout;
  for (auto& [rank, peer] : peers_)
    close_endpoint(*peer);
}

// Buffers of requests that never completed are given up only after the worker.
void UcxChannel::release_all() {
  if (!worker_)
    return;
  for (auto& [rank, peer] : peers_)
    drop_arrivals(*peer);
  if (!abandoned_)
    ucp_worker_destroy(worker_);
  worker_ = nullptr;
  fetches_.clear();
  free_send_requests_.clear();
  send_requests_.clear();
}

} // namespace troupe

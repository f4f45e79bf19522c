#include "transport/loopback_fabric.hpp"

#include "config/random.hpp"
#include "transport/fabric_base.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>
#include <utility>
#include <variant>

namespace troupe {

namespace {

class LoopbackFabric;

// A message in the hub. The header travels encoded, so that the loopback exercises the codec.
struct Parcel {
  EncodedHeader header;
  WireKind kind;
  BufferRef payload;
  std::string hello_token; // in place of a payload; hellos only
  LinkRef link;            // the sender's, to return the credit to; null for a duplicate
};

// News from the hub: a peer, as that incarnation, is gone.
struct Loss {
  RankId peer;
  uint32_t incarnation = 0;
  caf::error why;
};

using Item = std::variant<Parcel, Loss>;

// Where one endpoint is reached. Outlives the endpoint while anybody still aims at it.
struct Inbox {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Item> items; // threaded: all; simulated: those that came before `start`
  bool started = false;
  bool open = true;      // false once stopped or killed: items vanish
  bool draining = false; // threaded: deliver what is there, then end
  RankId rank;
  uint32_t incarnation = 0;
  LoopbackFabric* fabric = nullptr; // simulated: called directly; guarded by the single thread
};
using InboxRef = std::shared_ptr<Inbox>;

void drop(Item& item) {
  if (auto* parcel = std::get_if<Parcel>(&item); parcel && parcel->link)
    FabricBase::return_credit(*parcel->link,
                              kWireHeaderBytes + (parcel->payload ? parcel->payload->size() : 0));
}

bool is_open(const InboxRef& inbox) {
  if (!inbox)
    return false;
  const std::lock_guard lock{inbox->mutex};
  return inbox->open;
}

void close(Inbox& inbox) {
  std::deque<Item> dropped;
  {
    const std::lock_guard lock{inbox.mutex};
    inbox.open = false;
    dropped.swap(inbox.items);
  }
  inbox.changed.notify_all();
  for (auto& item : dropped)
    drop(item);
}

std::string address_of(RankId rank) { return fmt::format("loopback:{}", rank.value); }

} // namespace

struct LoopbackHub::Impl : std::enable_shared_from_this<LoopbackHub::Impl> {
  // One direction between two ranks, simulated.
  struct Pair {
    LinkPolicy policy;
    KeyedStream draws;
    std::deque<Item> in_order; // scheduled deliveries take from the front
    bool cut = false;
  };

  explicit Impl(int num_ranks) : inboxes(static_cast<size_t>(num_ranks)) {}

  mutable std::mutex mutex; // guards `inboxes`
  std::vector<InboxRef> inboxes;
  DeliveryScheduler* scheduler = nullptr; // null: threaded
  SimulationOptions simulation;
  std::map<std::pair<RankId, RankId>, Pair> pairs;

  [[nodiscard]] bool valid(RankId rank) const {
    return rank.valid() && static_cast<size_t>(rank.value) < inboxes.size();
  }
  [[nodiscard]] InboxRef inbox(RankId rank) const {
    if (!valid(rank))
      return nullptr;
    const std::lock_guard lock{mutex};
    return inboxes[static_cast<size_t>(rank.value)];
  }
  Pair& pair(RankId from, RankId to) {
    const auto stream =
        (uint64_t{static_cast<uint32_t>(from.value)} << 32) | static_cast<uint32_t>(to.value);
    return pairs
        .try_emplace({from, to},
                     Pair{simulation.links, KeyedStream{simulation.seed, stream}, {}, false})
        .first->second;
  }

  void post(const InboxRef& from, const InboxRef& to, Parcel parcel);
  void simulate(const InboxRef& from, const InboxRef& to, Parcel parcel);
  void schedule_in_order(const InboxRef& from, const InboxRef& to, Nanoseconds delay,
                         Parcel parcel);
  void schedule_alone(const InboxRef& from, const InboxRef& to, Nanoseconds delay, Parcel parcel);
  void arrive(const InboxRef& from, const InboxRef& to, Item item);
  void report_loss(RankId of, uint32_t incarnation, const caf::error& why);
  void report_cut(const InboxRef& at, const InboxRef& peer);
};

namespace {

class LoopbackFabric final : public FabricBase {
public:
  LoopbackFabric(FabricOptions options, std::shared_ptr<LoopbackHub::Impl> hub, InboxRef inbox)
      : FabricBase(std::move(options)), hub_(std::move(hub)), inbox_(std::move(inbox)) {
    inbox_->fabric = this;
    (void)add_link(self(), this->options().incarnation, address_of(self())); // can't fail: first
  }
  ~LoopbackFabric() override { stop(false, 0); }

  [[nodiscard]] std::string address() const override { return address_of(self()); }
  caf::error start(FabricSink* sink) override;
  caf::error connect(RankId peer, uint32_t incarnation, const std::string& address) override;
  caf::error send(RankId destination, WireHeader header, BufferRef payload) override;
  void stop(bool clean, int64_t flush_ms) override;

  // On the delivery thread.
  void take(Item item) {
    std::visit([this](auto& x) { receive(x); }, item);
  }

private:
  void run();
  void receive(Parcel& parcel);
  void receive(const Loss& loss);
  // Errors are refusals.
  [[nodiscard]] caf::error receive_checked(const WireHeader& header, Parcel& parcel);
  void say(const LinkRef& link, const WireHeader& header, std::string hello_token = {});

  std::shared_ptr<LoopbackHub::Impl> hub_;
  InboxRef inbox_;
  std::mutex order_; // numbering and handing to the hub are one step
  std::unordered_map<RankId, Origin> origins_;
  std::atomic<bool> stopped_{false};
  std::thread thread_;
};

caf::error LoopbackFabric::start(FabricSink* sink) {
  set_sink(sink);
  std::deque<Item> early;
  {
    const std::lock_guard lock{inbox_->mutex};
    if (std::exchange(inbox_->started, true))
      return make_error(Errc::internal, "loopback fabric: started twice");
    if (hub_->scheduler)
      early.swap(inbox_->items);
  }
  if (!hub_->scheduler)
    thread_ = std::thread{[this] { run(); }};
  for (auto& item : early)
    take(std::move(item));
  return {};
}

void LoopbackFabric::run() {
  std::unique_lock lock{inbox_->mutex};
  while (true) {
    inbox_->changed.wait(
        lock, [&] { return !inbox_->items.empty() || !inbox_->open || inbox_->draining; });
    if (inbox_->items.empty())
      return;
    std::deque<Item> items;
    items.swap(inbox_->items);
    lock.unlock();
    for (auto& item : items)
      take(std::move(item));
    items.clear();
    lock.lock();
  }
}

caf::error LoopbackFabric::connect(RankId peer, uint32_t incarnation, const std::string& address) {
  if (peer == self())
    return {};
  if (address != address_of(peer))
    return make_error(Errc::malformed,
                      fmt::format("loopback fabric: address of rank {} is not \"{}\"", peer.value,
                                  address_of(peer)));
  const auto target = hub_->inbox(peer);
  if (!is_open(target) || target->incarnation != incarnation)
    return make_error(Errc::unreachable, fmt::format("rank {}, incarnation {}, is not there",
                                                     peer.value, incarnation));
  auto added = add_link(peer, incarnation, address);
  if (!added)
    return added.error();
  if (added->is_new)
    say(added->link, hello_header(peer), std::string{token()});
  return {};
}

void LoopbackFabric::say(const LinkRef& link, const WireHeader& header, std::string hello_token) {
  hub_->post(inbox_, hub_->inbox(link->peer),
             Parcel{encode(header), header.kind, {}, std::move(hello_token), nullptr});
}

caf::error LoopbackFabric::send(RankId destination, WireHeader header, BufferRef payload) {
  auto outgoing = admit(destination, header, std::move(payload));
  if (!outgoing)
    return outgoing.error();
  const auto target = hub_->inbox(destination);
  count_sent(outgoing->header.payload_bytes);
  const std::lock_guard lock{order_};
  outgoing->header.sequence = outgoing->link->next_sequence++;
  hub_->post(inbox_, target,
             Parcel{encode(outgoing->header),
                    outgoing->header.kind,
                    std::move(outgoing->payload),
                    {},
                    outgoing->link});
  return {};
}

void LoopbackFabric::receive(Parcel& parcel) {
  auto header = decode_header(parcel.header);
  auto error = header ? receive_checked(*header, parcel) : header.error();
  if (error)
    refuse(error);
  Item item{std::move(parcel)};
  drop(item); // delivered or refused: either way it is not on its way any more
}

caf::error LoopbackFabric::receive_checked(const WireHeader& header, Parcel& parcel) {
  if (auto error = check_cluster(header))
    return error;
  auto& origin = origins_[header.source];
  if (header.kind == WireKind::hello) {
    auto accepted = accept_hello(header, std::as_bytes(std::span{parcel.hello_token}), &origin);
    if (!accepted)
      return accepted.error();
    origin = *accepted;
    return {};
  }
  if (auto error = check_origin(header, &origin))
    return error;
  if (header.kind == WireKind::goodbye) {
    origin.heard = false;
    const auto link = find_link(header.source);
    if (link && link->incarnation == header.incarnation)
      leave_connected(*link, Link::State::left);
    sink().on_peer_left(header.source);
    return {};
  }
  const auto bytes =
      parcel.payload ? std::as_const(*parcel.payload).bytes() : std::span<const std::byte>{};
  if (auto error = check_payload(header, bytes))
    return error;
  deliver(header, parcel.payload);
  return {};
}

void LoopbackFabric::receive(const Loss& loss) {
  auto& origin = origins_[loss.peer];
  if (!origin.known || origin.incarnation == loss.incarnation)
    origin = {loss.incarnation, true, false, 0};
  const auto link = find_link(loss.peer);
  if (link && link->incarnation == loss.incarnation && leave_connected(*link, Link::State::lost))
    sink().on_peer_lost(loss.peer, loss.why);
}

void LoopbackFabric::stop(bool clean, int64_t /*flush_ms: nothing is queued on this side*/) {
  if (stopped_.exchange(true))
    return;
  if (clean && is_open(inbox_)) {
    const std::lock_guard lock{order_};
    for (const auto& link : links())
      if (link->peer != self() && link->state == Link::State::connected) {
        auto header = own_header(WireKind::goodbye, link->peer);
        header.sequence = link->next_sequence++;
        say(link, header);
      }
    const std::lock_guard inbox_lock{inbox_->mutex};
    inbox_->draining = true;
  } else if (is_open(inbox_)) {
    hub_->report_loss(
        self(), options().incarnation,
        make_error(Errc::peer_lost, fmt::format("rank {} broke its connection", self().value)));
    close(*inbox_);
  }
  inbox_->changed.notify_all();
  if (thread_.joinable())
    thread_.join();
  close(*inbox_);
  for (const auto& link : links())
    leave_connected(*link, Link::State::left);
  inbox_->fabric = nullptr;
}

// Delivers on the simulator's thread, unless either end is gone.
void hand_over(const InboxRef& from, const InboxRef& to, Item item) {
  if (!is_open(to) || (from && !from->open && !from->draining)) {
    drop(item);
    return;
  }
  if (to->started)
    to->fabric->take(std::move(item));
  else
    to->items.push_back(std::move(item));
}

} // namespace

// ── the hub ──

void LoopbackHub::Impl::post(const InboxRef& from, const InboxRef& to, Parcel parcel) {
  if (!is_open(from) || !is_open(to)) {
    Item item{std::move(parcel)};
    drop(item);
    return;
  }
  if (scheduler) {
    if (parcel.kind == WireKind::hello)
      hand_over(from, to, std::move(parcel)); // a connection is made or not; there is no half
    else
      simulate(from, to, std::move(parcel));
    return;
  }
  Item item{std::move(parcel)};
  {
    const std::lock_guard lock{to->mutex};
    if (to->open) {
      to->items.push_back(std::move(item));
      to->changed.notify_one();
      return;
    }
  }
  drop(item);
}

void LoopbackHub::Impl::simulate(const InboxRef& from, const InboxRef& to, Parcel parcel) {
  auto& p = pair(from->rank, to->rank);
  const auto chance = [&](uint32_t one_in) { return one_in != 0 && p.draws.below(one_in) == 0; };
  const auto delay = [&] {
    const auto range = p.policy.max_delay - p.policy.min_delay;
    return p.policy.min_delay + Nanoseconds{range.count() <= 0
                                                ? 0
                                                : static_cast<int64_t>(p.draws.below(
                                                      static_cast<uint64_t>(range.count()) + 1))};
  };
  if (parcel.kind == WireKind::goodbye) { // says that nothing follows: it may not overtake
    if (!p.cut)
      schedule_in_order(from, to, std::max(p.policy.min_delay, p.policy.max_delay),
                        std::move(parcel));
    return;
  }
  // Drawn in a fixed number and order, so that one fate does not shift the others.
  const auto first_delay = delay();
  const auto second_delay = delay();
  const bool dropped = chance(p.policy.drop_one_in);
  const bool twice = chance(p.policy.duplicate_one_in);
  if (p.cut || dropped) {
    Item item{std::move(parcel)};
    drop(item);
    return;
  }
  if (twice) {
    auto copy = parcel;
    copy.link = nullptr;
    schedule_alone(from, to, second_delay, std::move(copy));
  }
  if (p.policy.reorder)
    schedule_alone(from, to, first_delay, std::move(parcel));
  else
    schedule_in_order(from, to, first_delay, std::move(parcel));
}

// Whichever of a pair's deliveries fires first takes the oldest message: the order holds without a
// clock.
void LoopbackHub::Impl::schedule_in_order(const InboxRef& from, const InboxRef& to,
                                          Nanoseconds delay, Parcel parcel) {
  pair(from->rank, to->rank).in_order.emplace_back(std::move(parcel));
  scheduler->schedule(delay, [hub = weak_from_this(), from, to] {
    const auto self = hub.lock();
    if (!self)
      return;
    auto& waiting = self->pair(from->rank, to->rank).in_order;
    auto item = std::move(waiting.front());
    waiting.pop_front();
    self->arrive(from, to, std::move(item));
  });
}

void LoopbackHub::Impl::schedule_alone(const InboxRef& from, const InboxRef& to, Nanoseconds delay,
                                       Parcel parcel) {
  scheduler->schedule(
      delay, [hub = weak_from_this(), from, to, item = std::make_shared<Item>(std::move(parcel))] {
        if (const auto self = hub.lock())
          self->arrive(from, to, std::move(*item));
      });
}

void LoopbackHub::Impl::arrive(const InboxRef& from, const InboxRef& to, Item item) {
  if (pair(from->rank, to->rank).cut)
    drop(item);
  else
    hand_over(from, to, std::move(item));
}

void LoopbackHub::Impl::report_loss(RankId of, uint32_t incarnation, const caf::error& why) {
  for (int32_t r = 0; static_cast<size_t>(r) < inboxes.size(); ++r) {
    const auto to = inbox(RankId{r});
    if (RankId{r} == of || !is_open(to))
      continue;
    const Loss loss{of, incarnation, why};
    if (scheduler) {
      scheduler->schedule(simulation.loss_delay, [to, loss] { hand_over(nullptr, to, loss); });
      continue;
    }
    const std::lock_guard lock{to->mutex};
    to->items.push_back(loss);
    to->changed.notify_one();
  }
}

// One side of a cut hears of it, if it still is one when the loss delay is over.
void LoopbackHub::Impl::report_cut(const InboxRef& at, const InboxRef& peer) {
  scheduler->schedule(simulation.loss_delay, [hub = weak_from_this(), at, peer] {
    const auto self = hub.lock();
    if (!self || !self->pair(peer->rank, at->rank).cut)
      return;
    hand_over(
        nullptr, at,
        Loss{peer->rank, peer->incarnation,
             make_error(Errc::peer_lost, fmt::format("rank {} is cut off", peer->rank.value))});
  });
}

LoopbackHub::LoopbackHub(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
LoopbackHub::~LoopbackHub() = default;

std::shared_ptr<LoopbackHub> LoopbackHub::threaded(int num_ranks) {
  return std::shared_ptr<LoopbackHub>{new LoopbackHub(std::make_shared<Impl>(num_ranks))};
}

std::shared_ptr<LoopbackHub> LoopbackHub::simulated(int num_ranks, DeliveryScheduler& scheduler,
                                                    const SimulationOptions& options) {
  auto impl = std::make_shared<Impl>(num_ranks);
  impl->scheduler = &scheduler;
  impl->simulation = options;
  return std::shared_ptr<LoopbackHub>{new LoopbackHub(std::move(impl))};
}

caf::expected<std::unique_ptr<Fabric>> LoopbackHub::endpoint(FabricOptions options) {
  if (auto error = check(options))
    return error;
  if (!impl_->valid(options.self))
    return make_error(Errc::invalid_argument,
                      fmt::format("loopback hub: rank {} of {} ranks", options.self.value,
                                  impl_->inboxes.size()));
  const auto before = impl_->inbox(options.self);
  if (is_open(before) || (before && before->incarnation >= options.incarnation))
    return make_error(Errc::invalid_argument,
                      fmt::format("loopback hub: rank {} has an endpoint of incarnation {}",
                                  options.self.value, before->incarnation));
  auto inbox = std::make_shared<Inbox>();
  inbox->rank = options.self;
  inbox->incarnation = options.incarnation;
  {
    const std::lock_guard lock{impl_->mutex};
    impl_->inboxes[static_cast<size_t>(options.self.value)] = inbox;
  }
  return std::unique_ptr<Fabric>{
      std::make_unique<LoopbackFabric>(std::move(options), impl_, std::move(inbox))};
}

void LoopbackHub::set_link(RankId from, RankId to, const LinkPolicy& policy) {
  impl_->pair(from, to).policy = policy;
}

void LoopbackHub::kill(RankId rank) {
  const auto inbox = impl_->inbox(rank);
  if (!is_open(inbox))
    return;
  close(*inbox);
  impl_->report_loss(rank, inbox->incarnation,
                     make_error(Errc::peer_lost, fmt::format("rank {} was killed", rank.value)));
}

void LoopbackHub::partition(std::span<const RankId> some) {
  const auto inside = [&](RankId r) { return std::ranges::find(some, r) != some.end(); };
  const auto n = static_cast<int32_t>(impl_->inboxes.size());
  for (int32_t a = 0; a < n; ++a)
    for (int32_t b = 0; b < n; ++b) {
      if (inside(RankId{a}) == inside(RankId{b}))
        continue;
      impl_->pair(RankId{a}, RankId{b}).cut = true;
      const auto at = impl_->inbox(RankId{b});
      const auto peer = impl_->inbox(RankId{a});
      if (is_open(at) && peer)
        impl_->report_cut(at, peer);
    }
}

void LoopbackHub::heal() {
  for (auto& [ranks, pair] : impl_->pairs)
    pair.cut = false;
}

} // namespace troupe

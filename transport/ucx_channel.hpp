// One UCX worker with the thread that drives it: the part of a fabric that serves a fixed subset of
// the peers. Nothing in here is shared between channels.
//
//   any thread ── post ──▶ queue ──▶ progress thread ── ucp_am_send ──▶ peer's worker
//   sink ◀── in order ── arrivals ◀── active messages, rendezvous into the pool ◀──┘
//
// Order. UCX may finish a rendezvous, or a message of many fragments, after a later small one. So
// messages are numbered per pair, and an arrival waits until its turn.
//
// Room. An arrival that finds the pool full keeps its UCX descriptor (a rendezvous has then moved
// no bytes yet), and later ones of that peer wait behind it. Nothing is acknowledged, so the
// senders run out of credit. Credit bounds what UCX holds for us meanwhile.
//
// Loss. An error of UCX, silence of a watched peer or a message that breaks the rules dooms the
// peer; the loop, outside any UCX callback, then closes its endpoint by force and drops what came
// from it. UCX completes the requests of a closed endpoint with errors; their buffers live until
// then.
//
// A peer as this side sees it (Link::State):
//
//   connected ──GOODBYE──▶ left
//       └──error, silence──▶ lost
#pragma once

#include "config/clock.hpp"
#include "transport/fabric_base.hpp"

#include <ucp/api/ucp.h>

#include <atomic>
#include <deque>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

namespace troupe {

// Flags of the fabric's own kinds.
inline constexpr uint16_t kPleaseAnswer = 1; // a heartbeat asks for one without
inline constexpr uint16_t kAnswer = 1;       // a goodbye answers one without

class UcxChannel {
public:
  [[nodiscard]] static caf::expected<std::unique_ptr<UcxChannel>>
  make(ucp_context_h context, FabricBase& fabric, int64_t spin_us);
  ~UcxChannel(); // stopped or never started
  UcxChannel(const UcxChannel&) = delete;
  UcxChannel& operator=(const UcxChannel&) = delete;

  [[nodiscard]] const std::string& address() const { return address_; } // of the worker
  // The worker could not be torn down and is left to the end of the process; so must its context.
  [[nodiscard]] bool abandoned() const { return abandoned_; }
  void start();
  // Queues a message; any thread.
  void post(Outgoing message);
  // Opens the endpoint of a new link and says hello; any thread, waits for the progress thread.
  [[nodiscard]] caf::error connect(LinkRef link, std::string worker_address);
  // Two halves, so that several channels leave at the same time.
  void begin_stop(bool clean, int64_t flush_ms);
  void finish_stop();

private:
  // A message that came and was not delivered yet.
  struct Arrival {
    enum class State : uint8_t {
      waiting,  // for room in the pool; `descriptor` is held
      fetching, // a rendezvous is writing into `payload`
      ready,    // for its turn
    };
    State state = State::ready;
    WireHeader header;
    BufferRef payload;
    void* descriptor = nullptr; // of UCX
    bool rendezvous = false;
  };

  struct Peer {
    // Towards the peer.
    LinkRef link; // null until `connect`
    ucp_ep_h endpoint = nullptr;
    bool settled = false;        // UCX's handshakes on the endpoint are over, both ways
    bool awaits_goodbye = false; // we said GOODBYE and it did not answer yet
    // From the peer.
    RankId rank;
    Origin origin;
    std::optional<uint32_t> met; // the incarnation whose hello came last
    Nanoseconds met_at{0};
    uint64_t next_sequence = 0;
    std::map<uint64_t, Arrival> arrivals; // by sequence; none below next_sequence
    std::deque<uint64_t> waiting;         // those that wait for room, in order
    size_t uncredited = 0;                // delivered bytes whose credit is still to be returned
    Nanoseconds silence{0};               // since its last message, while watched
    Nanoseconds gap{0};                   // since when the message in turn is missing
  };

  // What a send needs until UCX is done with it. Owned by the channel, reused.
  struct SendRequest {
    UcxChannel* channel = nullptr;
    EncodedHeader header; // UCX reads it until the send completes
    BufferRef payload;
    LinkRef link;
  };

  struct FetchRequest {
    UcxChannel* channel = nullptr;
    Peer* peer = nullptr;
    uint32_t incarnation = 0;
    uint64_t sequence = 0;
    BufferRef payload;
  };

  struct ConnectCommand {
    LinkRef link;
    std::string address;
    std::promise<caf::error>* done = nullptr;
  };
  struct StopCommand {
    bool clean = false;
    Nanoseconds flush{0};
  };
  using Command = std::variant<Outgoing, ConnectCommand, StopCommand>;

  enum class Phase : uint8_t {
    running,
    leaving,  // GOODBYE is said; until all answered, or time is up
    settling, // nobody is listened to any more; until UCX's handshakes are over, or time is up
    closing,  // endpoints are closed by force; until their requests ended, or time is up
    done,
  };

  UcxChannel(FabricBase& fabric, int64_t spin_us);
  [[nodiscard]] caf::error open(ucp_context_h context);

  // The loop (ucx_channel.cpp).
  void run();
  bool step();
  // False once the thread has ended.
  bool push(Command command);
  bool take_commands();
  void execute(Outgoing& message);
  void execute(ConnectCommand& command);
  void execute(StopCommand& command);
  void sleep_until_event();
  [[nodiscard]] Nanoseconds next_timer() const;
  void run_timers();
  void advance_phase();
  void stop_listening();
  void start_closing();
  [[nodiscard]] bool settled() const;
  void release_all();

  // Towards peers (ucx_channel_send.cpp).
  [[nodiscard]] Peer& peer_of(RankId rank);
  [[nodiscard]] caf::error open_endpoint(Peer& peer, const std::string& address);
  void close_endpoint(Peer& peer);
  void send(Peer& peer, const WireHeader& header, const void* bytes, BufferRef payload);
  void say(RankId rank, WireKind kind, uint16_t flags, uint64_t aux);
  void say_goodbye(Peer& peer);
  void ask(Peer& peer);
  void send_answers();
  void return_credits();
  void watch(Nanoseconds elapsed);
  void watch_neighbours(Nanoseconds elapsed);
  void doom(Peer& peer, uint32_t incarnation, caf::error why);
  void bury(Peer& peer, uint32_t incarnation, const caf::error& why);
  void bury_doomed();
  void recycle(SendRequest* request);
  static void on_sent(void* request, ucs_status_t status, void* user_data);
  static void on_closed(void* request, ucs_status_t status, void* user_data);
  static void on_endpoint_error(void* channel, ucp_ep_h endpoint, ucs_status_t status);

  // From peers (ucx_channel_receive.cpp).
  ucs_status_t receive(std::span<const std::byte> header, void* data, size_t length,
                       uint64_t attributes);
  ucs_status_t receive_ordered(Peer& peer, const WireHeader& header, void* data,
                               uint64_t attributes);
  void note_handshake(const WireHeader& hello);
  void receive_last_words(const WireHeader& header);
  void answer_heartbeat(Peer& peer, const WireHeader& header);
  void receive_hello(const WireHeader& header, std::span<const std::byte> payload);
  void receive_goodbye(Peer& peer);
  enum class Placement : uint8_t { placed, no_room, failed };
  Placement place(Peer& peer, Arrival& arrival);
  void fetch(Peer& peer, Arrival& arrival);
  void deliver_ready(Peer& peer);
  void retry_waiting();
  void drop_arrivals(Peer& peer);
  void fetched(FetchRequest* request, ucs_status_t status);
  static ucs_status_t on_active_message(void* channel, const void* header, size_t header_length,
                                        void* data, size_t length,
                                        const ucp_am_recv_param_t* param);
  static void on_fetched(void* request, ucs_status_t status, size_t length, void* user_data);

  FabricBase& fabric_;
  SteadyClock clock_;
  const Nanoseconds spin_;
  ucp_worker_h worker_ = nullptr;
  int worker_fd_ = -1; // the worker's own
  int wake_fd_ = -1;
  std::string address_;
  std::thread thread_;

  std::mutex queue_mutex_;
  std::vector<Command> queue_;
  bool closed_ = false; // nobody takes from the queue any more
  std::atomic<bool> sleeping_{false};

  // From here on the progress thread's alone.
  std::vector<Command> taken_;
  std::unordered_map<RankId, std::unique_ptr<Peer>> peers_; // never erased
  std::vector<std::pair<ucp_ep_h, ucs_status_t>> failed_endpoints_;
  struct Doomed {
    Peer* peer;
    uint32_t incarnation;
    caf::error why;
  };
  std::vector<Doomed> doomed_;
  std::vector<std::pair<RankId, WireHeader>> answers_;
  std::vector<std::unique_ptr<SendRequest>> send_requests_;
  std::vector<SendRequest*> free_send_requests_;
  std::unordered_map<FetchRequest*, std::unique_ptr<FetchRequest>> fetches_;
  size_t sends_in_flight_ = 0;
  size_t closes_in_flight_ = 0;
  size_t num_waiting_ = 0; // arrivals that wait for room
  bool credit_due_ = false;
  bool abandoned_ = false;
  Nanoseconds last_work_{0};
  Nanoseconds last_watch_{0};
  Nanoseconds credit_at_{0};
  Nanoseconds retry_at_{0};
  Phase phase_ = Phase::running;
  Nanoseconds phase_ends_{0}; // when a phase other than running is given up
};

} // namespace troupe

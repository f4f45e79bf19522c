// Agreement on the next view: single-decree Paxos, one instance per epoch, among the members of
// the view before. Everything here is a pure transition; actors only carry the messages.
//
// A value is a 64-bit digest of the proposed view. An acceptor's record (promise, last vote) lives
// in memory shared with its agent, so that a death certificate can carry it: the dead member's
// answer is then known and can never change.
//
// Quorum (contract, Agreement): a majority of those members for which the proposer holds no
// certificate. A certificate's record is read as the member's answer to *prepare*; it never counts
// toward *accept*, and if it promised more than the ballot at hand, the proposer must choose a
// higher one. A certificate that comes later makes the proposer start over with a higher ballot,
// because the quorum it gathered was one of other members.
#pragma once

#include "config/ids.hpp"

#include <compare>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <vector>

namespace troupe {

// Rounds grow; the proposer's rank makes ballots unique. Round 0 is below every ballot.
struct Ballot {
  uint32_t round = 0;
  int32_t proposer = -1;
  friend constexpr auto operator<=>(const Ballot&, const Ballot&) = default;
};

// What an acceptor has said in one epoch; to be stored before the answer is sent.
struct VoteRecord {
  uint64_t epoch = 0;
  Ballot promised;
  Ballot voted;       // round 0: never
  uint64_t value = 0; // of `voted`
  friend constexpr bool operator==(const VoteRecord&, const VoteRecord&) = default;
};

struct Prepare {
  uint64_t epoch = 0;
  Ballot ballot;
};
struct Promise {
  Ballot ballot;
  bool granted = false;
  VoteRecord record; // the acceptor's after the answer
};
struct Accept {
  uint64_t epoch = 0;
  Ballot ballot;
  uint64_t value = 0;
};
struct Accepted {
  Ballot ballot;
  bool granted = false;
  VoteRecord record;
};

// The acceptor. A request of another epoch than the record's is refused, unless it is of a later
// one, which starts a fresh record.
[[nodiscard]] std::pair<VoteRecord, Promise> answer(VoteRecord record, const Prepare& request);
[[nodiscard]] std::pair<VoteRecord, Accepted> answer(VoteRecord record, const Accept& request);

enum class ProposerPhase : uint8_t {
  preparing, // gathering promises
  accepting, // gathering votes for `value`
  decided,   // `value` is chosen
};

struct Proposer {
  uint64_t epoch = 0;
  RankId self;
  std::set<RankId> members;               // of the view before
  std::map<RankId, VoteRecord> certified; // the dead, with what they last said
  uint64_t own_value = 0;
  ProposerPhase phase = ProposerPhase::preparing;
  Ballot ballot;
  std::map<RankId, VoteRecord> promises;
  std::set<RankId> votes;
  uint64_t value = 0; // from `accepting` on
};

// What the proposer sends after a transition, to every living member; nothing when both are empty.
struct ProposerOutput {
  std::optional<Prepare> prepare;
  std::optional<Accept> accept;
};

[[nodiscard]] std::pair<Proposer, ProposerOutput> propose(uint64_t epoch, RankId self,
                                                          std::set<RankId> members,
                                                          std::map<RankId, VoteRecord> certified,
                                                          uint64_t own_value);
[[nodiscard]] std::pair<Proposer, ProposerOutput> advance(Proposer p, RankId from,
                                                          const Promise& answer);
[[nodiscard]] std::pair<Proposer, ProposerOutput> advance(Proposer p, RankId from,
                                                          const Accepted& answer);
// A member is certified dead, with its record.
[[nodiscard]] std::pair<Proposer, ProposerOutput> certify(Proposer p, RankId dead,
                                                          const VoteRecord& record);
// Tries again with a higher ballot (after a timeout).
[[nodiscard]] std::pair<Proposer, ProposerOutput> retry(Proposer p);

// Members whose answers a quorum needs.
[[nodiscard]] size_t quorum(const Proposer& p);

} // namespace troupe

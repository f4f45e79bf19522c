#include "actors/agreement.hpp"

#include <algorithm>
#include <utility>

namespace troupe {

namespace {

// The record for a request's epoch: a later epoch starts afresh.
VoteRecord record_for(VoteRecord record, uint64_t epoch) {
  if (epoch > record.epoch) {
    record = {};
    record.epoch = epoch;
  }
  return record;
}

bool lives(const Proposer& p, RankId member) {
  return p.members.contains(member) && !p.certified.contains(member);
}

// A ballot above everything known to have been promised.
std::pair<Proposer, ProposerOutput> start(Proposer p) {
  uint32_t round = p.ballot.round;
  for (const auto& [rank, record] : p.certified)
    if (record.epoch == p.epoch)
      round = std::max(round, record.promised.round);
  for (const auto& [rank, record] : p.promises)
    round = std::max(round, record.promised.round);
  p.ballot = {round + 1, p.self.value};
  p.phase = ProposerPhase::preparing;
  p.promises.clear();
  p.votes.clear();
  ProposerOutput out;
  out.prepare = Prepare{p.epoch, p.ballot};
  return {std::move(p), out};
}

// The value of the highest vote among promises and certificates, or the proposer's own.
uint64_t value_to_propose(const Proposer& p) {
  Ballot highest;
  uint64_t value = p.own_value;
  const auto consider = [&](const VoteRecord& record) {
    if (record.epoch == p.epoch && record.voted.round > 0 && record.voted > highest) {
      highest = record.voted;
      value = record.value;
    }
  };
  for (const auto& [rank, record] : p.promises)
    consider(record);
  for (const auto& [rank, record] : p.certified)
    consider(record);
  return value;
}

} // namespace

std::pair<VoteRecord, Promise> answer(VoteRecord record, const Prepare& request) {
  record = record_for(record, request.epoch);
  const bool granted = request.epoch == record.epoch && request.ballot > record.promised;
  if (granted)
    record.promised = request.ballot;
  return {record, {request.ballot, granted, record}};
}

std::pair<VoteRecord, Accepted> answer(VoteRecord record, const Accept& request) {
  record = record_for(record, request.epoch);
  const bool granted = request.epoch == record.epoch && request.ballot >= record.promised;
  if (granted) {
    record.promised = request.ballot;
    record.voted = request.ballot;
    record.value = request.value;
  }
  return {record, {request.ballot, granted, record}};
}

size_t quorum(const Proposer& p) { return (p.members.size() - p.certified.size()) / 2 + 1; }

std::pair<Proposer, ProposerOutput> propose(uint64_t epoch, RankId self, std::set<RankId> members,
                                            std::map<RankId, VoteRecord> certified,
                                            uint64_t own_value) {
  Proposer p;
  p.epoch = epoch;
  p.self = self;
  p.members = std::move(members);
  std::erase_if(certified, [&](const auto& c) { return !p.members.contains(c.first); });
  p.certified = std::move(certified);
  p.own_value = own_value;
  return start(std::move(p));
}

std::pair<Proposer, ProposerOutput> advance(Proposer p, RankId from, const Promise& answer) {
  if (p.phase != ProposerPhase::preparing || answer.ballot != p.ballot || !lives(p, from))
    return {std::move(p), {}};
  if (!answer.granted) {
    // Somebody promised more: remembered, so that the next ballot is above it.
    if (answer.record.epoch == p.epoch)
      p.ballot.round = std::max(p.ballot.round, answer.record.promised.round);
    return start(std::move(p));
  }
  p.promises[from] = answer.record;
  if (p.promises.size() < quorum(p))
    return {std::move(p), {}};
  p.phase = ProposerPhase::accepting;
  p.value = value_to_propose(p);
  ProposerOutput out;
  out.accept = Accept{p.epoch, p.ballot, p.value};
  return {std::move(p), out};
}

std::pair<Proposer, ProposerOutput> advance(Proposer p, RankId from, const Accepted& answer) {
  if (p.phase != ProposerPhase::accepting || answer.ballot != p.ballot || !lives(p, from))
    return {std::move(p), {}};
  if (!answer.granted) {
    if (answer.record.epoch == p.epoch)
      p.ballot.round = std::max(p.ballot.round, answer.record.promised.round);
    return start(std::move(p));
  }
  p.votes.insert(from);
  if (p.votes.size() >= quorum(p))
    p.phase = ProposerPhase::decided;
  return {std::move(p), {}};
}

std::pair<Proposer, ProposerOutput> certify(Proposer p, RankId dead, const VoteRecord& record) {
  if (p.phase == ProposerPhase::decided || !lives(p, dead))
    return {std::move(p), {}};
  p.certified[dead] = record;
  return start(std::move(p));
}

std::pair<Proposer, ProposerOutput> retry(Proposer p) {
  if (p.phase == ProposerPhase::decided)
    return {std::move(p), {}};
  return start(std::move(p));
}

} // namespace troupe

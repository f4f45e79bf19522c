// A search over what can happen to agreement among three members with two proposers: any order and
// loss of messages, and the death of any one member at any time; deepest first, up to a bound of
// distinct states. Longer schedules and larger views are drawn at random.
#include "actors/agreement.hpp"

#include "config/random.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <set>
#include <string>
#include <unordered_set>
#include <vector>

using namespace troupe;

namespace {

constexpr uint64_t kEpoch = 5;

// A message under way: to an acceptor (kind 0, 1) or back to a proposer (kind 2, 3).
struct Mail {
  int kind = 0;
  int proposer = 0; // which of the two
  int member = 0;
  Ballot ballot;
  uint64_t value = 0;
  bool granted = false;
  VoteRecord record;
};

struct World {
  std::vector<VoteRecord> records;
  std::vector<bool> alive;
  std::vector<Proposer> proposers;
  std::vector<Mail> mail;
  std::set<uint64_t> chosen; // values some ballot got a quorum of votes for, as proposers saw it

  [[nodiscard]] std::string key() const;
};

void put(std::string& s, uint64_t v) { s.append(reinterpret_cast<const char*>(&v), sizeof v); }
void put(std::string& s, const Ballot& b) {
  put(s, uint64_t{b.round} << 8 | static_cast<uint8_t>(b.proposer));
}
void put(std::string& s, const VoteRecord& r) {
  put(s, r.promised);
  put(s, r.voted);
  put(s, r.value);
}

std::string World::key() const {
  std::string s;
  for (size_t i = 0; i < records.size(); ++i) {
    put(s, records[i]);
    s += alive[i] ? 'a' : 'd';
  }
  for (const auto& p : proposers) {
    s += static_cast<char>('0' + static_cast<int>(p.phase));
    put(s, p.ballot);
    put(s, p.value);
    for (const auto& [r, record] : p.promises) {
      s += static_cast<char>('A' + r.value);
      put(s, record);
    }
    for (const auto r : p.votes)
      s += static_cast<char>('a' + r.value);
    for (const auto& [r, record] : p.certified) {
      s += static_cast<char>('0' + r.value);
      put(s, record);
    }
  }
  std::vector<std::string> letters;
  for (const auto& m : mail) {
    std::string t;
    t += static_cast<char>(m.kind);
    t += static_cast<char>(m.proposer);
    t += static_cast<char>(m.member);
    t += m.granted ? 'y' : 'n';
    put(t, m.ballot);
    put(t, m.value);
    put(t, m.record);
    letters.push_back(t);
  }
  std::sort(letters.begin(), letters.end());
  for (const auto& l : letters)
    s += l;
  return s;
}

void send(World& w, int proposer, const ProposerOutput& out) {
  for (int m = 0; m < static_cast<int>(w.records.size()); ++m) {
    if (w.proposers[static_cast<size_t>(proposer)].certified.contains(RankId{m}))
      continue;
    if (out.prepare)
      w.mail.push_back({0, proposer, m, out.prepare->ballot, 0, false, {}});
    if (out.accept)
      w.mail.push_back({1, proposer, m, out.accept->ballot, out.accept->value, false, {}});
  }
}

void apply(World& w, int proposer, std::pair<Proposer, ProposerOutput> next) {
  w.proposers[static_cast<size_t>(proposer)] = std::move(next.first);
  const auto& p = w.proposers[static_cast<size_t>(proposer)];
  if (p.phase == ProposerPhase::decided)
    w.chosen.insert(p.value);
  send(w, proposer, next.second);
}

void deliver(World& w, size_t i) {
  const Mail m = w.mail[i];
  w.mail.erase(w.mail.begin() + static_cast<std::ptrdiff_t>(i));
  const auto member = static_cast<size_t>(m.member);
  auto& proposer = w.proposers[static_cast<size_t>(m.proposer)];
  if (m.kind <= 1) {
    if (!w.alive[member])
      return;
    if (m.kind == 0) {
      const auto [record, promise] = answer(w.records[member], Prepare{kEpoch, m.ballot});
      w.records[member] = record;
      w.mail.push_back({2, m.proposer, m.member, m.ballot, 0, promise.granted, record});
    } else {
      const auto [record, accepted] = answer(w.records[member], Accept{kEpoch, m.ballot, m.value});
      w.records[member] = record;
      w.mail.push_back({3, m.proposer, m.member, m.ballot, 0, accepted.granted, record});
    }
    return;
  }
  if (!w.alive[static_cast<size_t>(proposer.self.value)])
    return; // a dead proposer hears nothing
  if (m.kind == 2)
    apply(w, m.proposer,
          advance(proposer, RankId{m.member}, Promise{m.ballot, m.granted, m.record}));
  else
    apply(w, m.proposer,
          advance(proposer, RankId{m.member}, Accepted{m.ballot, m.granted, m.record}));
}

World start(int members) {
  World w;
  w.records.resize(static_cast<size_t>(members));
  w.alive.resize(static_cast<size_t>(members), true);
  std::set<RankId> all;
  for (int m = 0; m < members; ++m)
    all.insert(RankId{m});
  w.proposers.resize(2);
  for (int p = 0; p < 2; ++p)
    apply(w, p, propose(kEpoch, RankId{p}, all, {}, 100 + static_cast<uint64_t>(p)));
  return w;
}

// Ballots beyond this are not explored: retries repeat what lower ones showed.
constexpr uint32_t kMaxRound = 3;

struct Search {
  std::unordered_set<std::string> seen;
  size_t decided = 0;
  size_t limit;
  bool split = false;

  void explore(World root) {
    std::vector<World> todo{std::move(root)};
    while (!todo.empty() && seen.size() < limit) {
      World w = std::move(todo.back());
      todo.pop_back();
      if (!seen.insert(w.key()).second)
        continue;
      if (w.chosen.size() > 1) {
        split = true;
        return;
      }
      decided += w.chosen.size();
      for (size_t i = 0; i < w.mail.size(); ++i) {
        World next = w;
        deliver(next, i);
        const bool deep = std::any_of(next.proposers.begin(), next.proposers.end(),
                                      [](const auto& p) { return p.ballot.round > kMaxRound; });
        if (!deep)
          todo.push_back(std::move(next));
      }
      const auto dead = std::count(w.alive.begin(), w.alive.end(), false);
      for (size_t m = 0; m < w.alive.size(); ++m) {
        if (w.alive[m] && dead == 0) {
          World next = w;
          next.alive[m] = false;
          todo.push_back(std::move(next));
        }
        if (w.alive[m])
          continue;
        for (int p = 0; p < 2; ++p) {
          const auto& proposer = w.proposers[static_cast<size_t>(p)];
          if (proposer.certified.contains(RankId{static_cast<int32_t>(m)}) ||
              !w.alive[static_cast<size_t>(proposer.self.value)])
            continue;
          World next = w;
          apply(next, p, certify(proposer, RankId{static_cast<int32_t>(m)}, w.records[m]));
          if (next.proposers[static_cast<size_t>(p)].ballot.round <= kMaxRound)
            todo.push_back(std::move(next));
        }
      }
    }
  }
};

} // namespace

TEST_CASE("no order, loss or death splits a view of three with two proposers") {
  Search search{{}, 0, 400000, false};
  search.explore(start(3));
  CHECK(!search.split);
  CHECK(search.decided > 0);
  CHECK(search.seen.size() > 100000);
}

TEST_CASE("random schedules with deaths never split views of two to seven, and the living decide") {
  for (uint64_t seed = 1; seed <= 4000; ++seed) {
    CAPTURE(seed);
    KeyedStream random{seed};
    const int members = 2 + static_cast<int>(random.below(6));
    auto w = start(members);
    if (random.below(2) == 0) { // a death before anything was decided
      const auto m = random.below(static_cast<uint64_t>(members));
      w.alive[m] = false;
      for (int p = 0; p < 2; ++p)
        if (w.alive[static_cast<size_t>(p)])
          apply(w, p,
                certify(w.proposers[static_cast<size_t>(p)], RankId{static_cast<int32_t>(m)},
                        w.records[m]));
    }
    for (int i = 0; i < 400; ++i) {
      const auto what = random.below(20);
      const auto p = static_cast<int>(random.below(2));
      const auto m = random.below(static_cast<uint64_t>(members));
      auto& proposer = w.proposers[static_cast<size_t>(p)];
      const bool up = w.alive[static_cast<size_t>(proposer.self.value)];
      if (what == 0 && std::count(w.alive.begin(), w.alive.end(), true) > 1)
        w.alive[m] = false;
      else if (what == 1 && !w.alive[m] && up)
        apply(w, p, certify(proposer, RankId{static_cast<int32_t>(m)}, w.records[m]));
      else if (what == 2 && up)
        apply(w, p, retry(proposer));
      else if (!w.mail.empty())
        deliver(w, random.below(w.mail.size()));
      REQUIRE(w.chosen.size() <= 1);
    }
    // Then one living proposer alone, with all certificates and no further loss, decides.
    for (int p = 0; p < 2; ++p) {
      auto& proposer = w.proposers[static_cast<size_t>(p)];
      if (!w.alive[static_cast<size_t>(proposer.self.value)])
        continue;
      w.mail.clear();
      for (int m = 0; m < members; ++m)
        if (!w.alive[static_cast<size_t>(m)])
          apply(w, p,
                certify(w.proposers[static_cast<size_t>(p)], RankId{m},
                        w.records[static_cast<size_t>(m)]));
      for (int tries = 0;
           tries < 50 && w.proposers[static_cast<size_t>(p)].phase != ProposerPhase::decided;
           ++tries) {
        apply(w, p, retry(w.proposers[static_cast<size_t>(p)]));
        while (!w.mail.empty())
          deliver(w, 0);
      }
      CHECK(w.proposers[static_cast<size_t>(p)].phase == ProposerPhase::decided);
      CHECK(w.chosen.size() == 1);
      break;
    }
  }
}

TEST_CASE("an acceptor keeps its promises, and a later epoch starts afresh") {
  VoteRecord record;
  record.epoch = kEpoch;
  const auto [r1, p1] = answer(record, Prepare{kEpoch, {2, 0}});
  CHECK(p1.granted);
  const auto [r2, p2] = answer(r1, Prepare{kEpoch, {1, 1}});
  CHECK(!p2.granted);
  const auto [r3, a1] = answer(r2, Accept{kEpoch, {1, 1}, 7});
  CHECK(!a1.granted);
  const auto [r4, a2] = answer(r3, Accept{kEpoch, {2, 0}, 8});
  CHECK(a2.granted);
  CHECK(r4.value == 8);
  const auto [r5, p3] = answer(r4, Prepare{kEpoch - 1, {9, 0}});
  CHECK(!p3.granted);
  CHECK(r5 == r4);
  const auto [r6, p4] = answer(r5, Prepare{kEpoch + 1, {1, 0}});
  CHECK(p4.granted);
  CHECK(r6.voted.round == 0);
}

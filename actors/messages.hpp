// Every message of the runtime, so that the whole conversation can be read in one sitting.
//
//   client ──SubmitRequest──▶ gateway ──RunRequest──▶ attention (leader of a group)
//   client ◀─TokensReady, RowsReady, RequestDone── gateway ◀── attention
//   attention ──StepPlan──▶ TP siblings          attention ──DraftWork──▶ MTP ──Drafts──▶ attention
//   attention, MTP ══dispatch══▶ expert shard or forwarder ══combine══▶ attention, MTP, forwarder
//   rank ──JoinRequest──▶ membership ──Welcome──▶ rank ──RankLoading, RankReady──▶ membership
//   anyone ──StopRank──▶ rank supervisor
//
// ══ are envelopes of the fabric (transport/wire.hpp): decisions in a table, bytes behind it.
// ── are CAF messages; between ranks they travel as `control` envelopes, and from clients and
// joining ranks through the control port.
//
// Types above the line "local only" never leave a process: they carry buffers by reference.
#pragma once

#include "actors/view.hpp"
#include "kernels/sampling.hpp"
#include "transport/fabric.hpp"

#include <caf/actor.hpp>
#include <caf/allowed_unsafe_message_type.hpp>
#include <caf/meta/type_name.hpp>
#include <caf/type_id.hpp>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace troupe {

// ---- between client, gateway and attention ------------------------------------------------

// What a client wants. With max_tokens 0 the prompt is only scored.
struct RequestSpec {
  std::vector<int32_t> prompt; // at least one id
  int32_t max_tokens = 0;
  bool ignore_eos = false;
  SamplingParams sampling;
  std::vector<std::string> stop;
  int32_t speculate = 0;        // MTP depth, 0: off
  bool prompt_logprobs = false; // log-probability of prompt ids 1 … T-1
  bool logits = false;        // raw logits: of every prompt row when scoring, else per answer token
  bool hidden_states = false; // hidden.0 … hidden.L of every prompt row
};

// Command from a client at the control port. Answer: RequestId, or an error. News about the
// request then goes to `client`.
struct SubmitRequest {
  std::string cluster_token;
  RequestSpec spec;
  caf::actor client;
};

// Command gateway -> attention. News goes back to the gateway of `reply_to`.
struct RunRequest {
  RequestId id;
  RankId reply_to;
  RequestSpec spec;
};

// News: answer tokens in order, or log-probabilities of prompt ids.
struct TokensReady {
  RequestId id;
  int32_t first_index = 0; // of the answer
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  std::vector<double> prompt_logprobs; // of prompt ids prompt_begin … in order
  int32_t prompt_done = 0;             // prompt positions computed so far
};

// News: rows of logits or hidden states, F32 [num_rows, num_cols]. To be acknowledged with
// RowsTaken, so that a slow client pauses its request instead of filling memory.
struct RowsReady {
  RequestId id;
  std::string name; // "logits", "hidden.3"
  int64_t first_row = 0, num_rows = 0, num_cols = 0;
  std::vector<uint8_t> bytes;
};
struct RowsTaken {
  RequestId id;
  int64_t bytes = 0;
};

// News: the end of a request.
struct RequestDone {
  RequestId id;
  std::string finish_reason; // "stop", "length", "cancelled", "error"
  uint8_t error_code = 0;    // Errc
  std::string error;
  int64_t prompt_tokens = 0, answer_tokens = 0, drafted = 0, accepted = 0, steps = 0;
  double prefill_s = 0, decode_s = 0;
};

struct CancelRequest {
  RequestId id;
};

// Query: what a rank holds and has moved.
struct StatsQuery {
  uint64_t query = 0;
  RankId reply_to;
};
struct RankStats {
  uint64_t query = 0;
  RankId rank;
  uint64_t bytes_sent = 0, bytes_received = 0, messages_sent = 0, messages_received = 0;
  int64_t weight_bytes = 0, kv_bytes = 0, resident_bytes = 0;
};
// Query from a client at the control port. Answer: ClusterStats.
struct GetClusterStats {
  std::string cluster_token;
};
struct ClusterStats {
  std::vector<RankStats> ranks;
};
// Query from a client: what is served. Answer: ClusterInfo.
struct GetClusterInfo {
  std::string cluster_token;
};
struct ClusterInfo {
  std::string model;      // path as the ranks opened it
  std::string arithmetic; // "bf16", …
  std::string backend;
  uint64_t model_digest = 0;
  int32_t num_ranks = 0, num_attention_groups = 0, tp = 1;
  int64_t max_context = 0, num_mtp_layers = 0;
};
// Command from a client: end the cluster cleanly. Answer: unit.
struct StopCluster {
  std::string cluster_token;
};

// ---- joining and leaving --------------------------------------------------------------------

// Command from a rank at the control port of rank 0. Answer: Welcome when all have joined, or an
// error that names what disagrees.
struct JoinRequest {
  std::string cluster_token;
  std::string version; // of Troupe
  RankId rank;
  uint32_t incarnation = 1;
  uint64_t model_digest = 0;
  uint64_t settings_digest = 0; // layout, limits, settings that must agree
  std::string arithmetic, backend;
  uint64_t fingerprint = 0;
  std::string host, address;
};
struct Welcome {
  View view;
};
// News, a few times a second while it gets on: what this rank has loaded so far.
struct RankLoading {
  RankId rank;
  int64_t bytes = 0;
};
// News: this rank has loaded its part, or could not.
struct RankReady {
  RankId rank;
  uint8_t error_code = 0;
  std::string error;
};
// Command to a rank's supervisor: leave cleanly.
struct StopRank {};

// ---- inside an attention group --------------------------------------------------------------

// Rows of one sequence in a step.
struct SequencePlan {
  RequestId request;
  int32_t first_position = 0;
  int32_t prompt_length = 0;   // positions below it take the naive form
  std::vector<int32_t> tokens; // one per row
  std::vector<int32_t> pages;
};
// Command, TP leader -> siblings: run this step. Even and odd ids are the two micro-batches in
// flight; each runs its steps in the order of their ids.
struct StepPlan {
  uint64_t id = 0;
  std::vector<SequencePlan> sequences;
};

// Confirmed rows of one sequence for the MTP modules: rows [first_row, first_row + num_rows) of a
// step's hidden states are positions first_position …; next_tokens[j] is the token at position
// first_position + 1 + j, as far as known (at least num_rows of them).
struct DraftSequence {
  RequestId request;
  int32_t first_row = 0, num_rows = 0, first_position = 0, prompt_length = 0;
  std::vector<int32_t> next_tokens;
  std::vector<int32_t> pages;
  int32_t num_modules = 0; // that this sequence ever passes through: its request's depth
  int32_t depth = 0;       // tokens to draft now; 0: only keep the modules' caches up
};
// Command, TP leader -> MTPs of the group: a pass. Then, between modules, DraftTokens from the
// leader's MTP to its siblings'.
struct DraftPlan {
  uint64_t pass = 0;       // passes run in the order of their numbers
  uint64_t step = 0;       // whose hidden states they read
  int32_t num_modules = 0; // of the deepest sequence
  std::vector<DraftSequence> sequences;
};
struct DraftTokens {
  uint64_t pass = 0;
  int32_t module = 0;
  std::vector<int32_t> tokens; // per sequence of the plan; -1 where none
};
// The request is over: forget its drafting state once pass `after_pass` is over.
struct ForgetSequence {
  RequestId request;
  uint64_t after_pass = 0;
};

// ---- local only -----------------------------------------------------------------------------

// A job of this actor's compute stream has ended.
struct JobDone {
  uint64_t ticket = 0; // the actor's own; a walk's id in attention and MTP
};

// News for the supervisor, from the fabric.
struct PeerLost {
  RankId peer;
  caf::error why;
};
struct PeerLeft {
  RankId peer;
};

// How a sequence's drafts are to be sampled (leader only).
struct DraftSampling {
  SamplingParams params;
  TokenCounts counts;
};
// Command attention -> MTP of the same rank: what the plan that names this step will need. Answer:
// Drafts to the attention actor (leader only).
struct DraftWork {
  uint64_t step = 0;
  BufferRef hidden;                    // [rows of the step, hidden_size] in A, after the final norm
  std::vector<DraftSampling> sampling; // per sequence of the plan; empty on a sibling
};
struct Drafts {
  uint64_t step = 0;
  std::vector<std::pair<RequestId, std::vector<int32_t>>> tokens;
};

// ---- inspection -----------------------------------------------------------------------------

template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, SamplingParams& x) {
  return f(caf::meta::type_name("SamplingParams"), x.temperature, x.top_k, x.top_p, x.min_p,
           x.repetition_penalty, x.presence_penalty, x.frequency_penalty, x.logit_bias, x.seed,
           x.choice);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, RequestSpec& x) {
  return f(caf::meta::type_name("RequestSpec"), x.prompt, x.max_tokens, x.ignore_eos, x.sampling,
           x.stop, x.speculate, x.prompt_logprobs, x.logits, x.hidden_states);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, SubmitRequest& x) {
  return f(caf::meta::type_name("SubmitRequest"), x.cluster_token, x.spec, x.client);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, RunRequest& x) {
  return f(caf::meta::type_name("RunRequest"), x.id, x.reply_to, x.spec);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, TokensReady& x) {
  return f(caf::meta::type_name("TokensReady"), x.id, x.first_index, x.tokens, x.logprobs,
           x.prompt_logprobs, x.prompt_done);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, RowsReady& x) {
  return f(caf::meta::type_name("RowsReady"), x.id, x.name, x.first_row, x.num_rows, x.num_cols,
           x.bytes);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, RowsTaken& x) {
  return f(caf::meta::type_name("RowsTaken"), x.id, x.bytes);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, RequestDone& x) {
  return f(caf::meta::type_name("RequestDone"), x.id, x.finish_reason, x.error_code, x.error,
           x.prompt_tokens, x.answer_tokens, x.drafted, x.accepted, x.steps, x.prefill_s,
           x.decode_s);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, CancelRequest& x) {
  return f(caf::meta::type_name("CancelRequest"), x.id);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, StatsQuery& x) {
  return f(caf::meta::type_name("StatsQuery"), x.query, x.reply_to);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, RankStats& x) {
  return f(caf::meta::type_name("RankStats"), x.query, x.rank, x.bytes_sent, x.bytes_received,
           x.messages_sent, x.messages_received, x.weight_bytes, x.kv_bytes, x.resident_bytes);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, GetClusterStats& x) {
  return f(caf::meta::type_name("GetClusterStats"), x.cluster_token);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, ClusterStats& x) {
  return f(caf::meta::type_name("ClusterStats"), x.ranks);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, GetClusterInfo& x) {
  return f(caf::meta::type_name("GetClusterInfo"), x.cluster_token);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, ClusterInfo& x) {
  return f(caf::meta::type_name("ClusterInfo"), x.model, x.arithmetic, x.backend, x.model_digest,
           x.num_ranks, x.num_attention_groups, x.tp, x.max_context, x.num_mtp_layers);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, StopCluster& x) {
  return f(caf::meta::type_name("StopCluster"), x.cluster_token);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, JoinRequest& x) {
  return f(caf::meta::type_name("JoinRequest"), x.cluster_token, x.version, x.rank, x.incarnation,
           x.model_digest, x.settings_digest, x.arithmetic, x.backend, x.fingerprint, x.host,
           x.address);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, Welcome& x) {
  return f(caf::meta::type_name("Welcome"), x.view);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, RankLoading& x) {
  return f(caf::meta::type_name("RankLoading"), x.rank, x.bytes);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, RankReady& x) {
  return f(caf::meta::type_name("RankReady"), x.rank, x.error_code, x.error);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, StopRank&) {
  return f(caf::meta::type_name("StopRank"));
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, SequencePlan& x) {
  return f(caf::meta::type_name("SequencePlan"), x.request, x.first_position, x.prompt_length,
           x.tokens, x.pages);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, StepPlan& x) {
  return f(caf::meta::type_name("StepPlan"), x.id, x.sequences);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, DraftSequence& x) {
  return f(caf::meta::type_name("DraftSequence"), x.request, x.first_row, x.num_rows,
           x.first_position, x.prompt_length, x.next_tokens, x.pages, x.num_modules, x.depth);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, DraftPlan& x) {
  return f(caf::meta::type_name("DraftPlan"), x.pass, x.step, x.num_modules, x.sequences);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, DraftTokens& x) {
  return f(caf::meta::type_name("DraftTokens"), x.pass, x.module, x.tokens);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, ForgetSequence& x) {
  return f(caf::meta::type_name("ForgetSequence"), x.request, x.after_pass);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, JobDone& x) {
  return f(caf::meta::type_name("JobDone"), x.ticket);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, PeerLost& x) {
  return f(caf::meta::type_name("PeerLost"), x.peer, x.why);
}
template <class Inspector>
typename Inspector::result_type inspect(Inspector& f, PeerLeft& x) {
  return f(caf::meta::type_name("PeerLeft"), x.peer);
}

} // namespace troupe

CAF_BEGIN_TYPE_ID_BLOCK(troupe, caf::first_custom_type_id)
CAF_ADD_TYPE_ID(troupe, (troupe::RequestId))
CAF_ADD_TYPE_ID(troupe, (troupe::RequestSpec))
CAF_ADD_TYPE_ID(troupe, (troupe::SubmitRequest))
CAF_ADD_TYPE_ID(troupe, (troupe::RunRequest))
CAF_ADD_TYPE_ID(troupe, (troupe::TokensReady))
CAF_ADD_TYPE_ID(troupe, (troupe::RowsReady))
CAF_ADD_TYPE_ID(troupe, (troupe::RowsTaken))
CAF_ADD_TYPE_ID(troupe, (troupe::RequestDone))
CAF_ADD_TYPE_ID(troupe, (troupe::CancelRequest))
CAF_ADD_TYPE_ID(troupe, (troupe::StatsQuery))
CAF_ADD_TYPE_ID(troupe, (troupe::RankStats))
CAF_ADD_TYPE_ID(troupe, (troupe::GetClusterStats))
CAF_ADD_TYPE_ID(troupe, (troupe::ClusterStats))
CAF_ADD_TYPE_ID(troupe, (troupe::GetClusterInfo))
CAF_ADD_TYPE_ID(troupe, (troupe::ClusterInfo))
CAF_ADD_TYPE_ID(troupe, (troupe::StopCluster))
CAF_ADD_TYPE_ID(troupe, (troupe::JoinRequest))
CAF_ADD_TYPE_ID(troupe, (troupe::Welcome))
CAF_ADD_TYPE_ID(troupe, (troupe::RankLoading))
CAF_ADD_TYPE_ID(troupe, (troupe::RankReady))
CAF_ADD_TYPE_ID(troupe, (troupe::StopRank))
CAF_ADD_TYPE_ID(troupe, (troupe::StepPlan))
CAF_ADD_TYPE_ID(troupe, (troupe::DraftPlan))
CAF_ADD_TYPE_ID(troupe, (troupe::DraftTokens))
CAF_ADD_TYPE_ID(troupe, (troupe::ForgetSequence))
CAF_ADD_TYPE_ID(troupe, (troupe::JobDone))
CAF_ADD_TYPE_ID(troupe, (troupe::PeerLost))
CAF_ADD_TYPE_ID(troupe, (troupe::PeerLeft))
CAF_END_TYPE_ID_BLOCK(troupe)

CAF_ALLOW_UNSAFE_MESSAGE_TYPE(troupe::Envelope)
CAF_ALLOW_UNSAFE_MESSAGE_TYPE(troupe::DraftWork)
CAF_ALLOW_UNSAFE_MESSAGE_TYPE(troupe::Drafts)

#include "actors/rank_supervisor.hpp"

#include "actors/exceptions.hpp"

#include <fmt/format.h>

#include <utility>

namespace troupe {

namespace {

using Self = RankSupervisor::stateful_pointer<RankSupervisorState>;

void end(Self self, const caf::error& why) {
  if (self->state.on_end)
    std::exchange(self->state.on_end, nullptr)(why);
}

} // namespace

RankSupervisor::behavior_type rank_supervisor(Self self, const RankContext* context,
                                              std::function<RankStats()> stats,
                                              std::function<void(const caf::error&)> on_end) {
  end_by_exceptions(self);
  self->state.context = context;
  self->state.num_ranks = static_cast<int32_t>(context->view->members.size());
  self->state.stats = std::move(stats);
  self->state.on_end = std::move(on_end);
  self->set_down_handler([=](const caf::down_msg& down) {
    // Told to shut down by its rank, which is about to tell the supervisor too.
    const bool told = down.reason == caf::exit_reason::user_shutdown;
    if (!self->state.stopping && down.reason && !told)
      end(self, with_context("an actor of this rank ended", down.reason));
  });
  return {
      [=](const PeerLost& news) {
        if (self->state.stopping)
          return;
        const bool own = news.peer == self->state.context->self;
        end(self, own ? news.why
                      : with_context(fmt::format("rank {} was lost", news.peer.value), news.why));
      },
      [=](const PeerLeft&) {
        // Goodbye is said only when the whole cluster was told to stop; the news overtook our
        // order.
        if (!self->state.stopping)
          end(self, {});
      },
      [=](const StopRank&) {
        self->state.stopping = true;
        end(self, {});
      },
      [=](const StopCluster&) {
        auto& state = self->state;
        state.stopping = true; // first: a peer that has not joined yet can't be told
        for (int32_t r = 0; r < state.num_ranks; ++r)
          if (RankId{r} != state.context->self)
            state.context->postman->tell(RankId{r}, Route::supervisor, StopRank{});
        end(self, {});
      },
      [=](const StatsQuery& query) {
        auto stats = self->state.stats();
        stats.query = query.query;
        stats.rank = self->state.context->self;
        self->state.context->postman->tell(query.reply_to, Route::gateway, std::move(stats));
      },
  };
}

} // namespace troupe

#include "kernels/load_plan.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <new>
#include <sys/mman.h>
#include <thread>
#include <tuple>
#include <unistd.h>

namespace troupe {

namespace {

std::span<const std::byte> bytes_of(const LoadPlan::Piece& piece) {
  return piece.tensor->bytes.subspan(static_cast<size_t>(piece.offset),
                                     static_cast<size_t>(piece.size));
}

// madvise over all pages that `bytes` touch; 0 or errno.
int advise(std::span<const std::byte> bytes, int advice) {
  if (bytes.empty())
    return 0;
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(bytes.data()) / page * page;
  const auto end = reinterpret_cast<uintptr_t>(bytes.data()) + bytes.size();
  return ::madvise(reinterpret_cast<void*>(begin), end - begin, advice) == 0 ? 0 : errno;
}

// Asks the kernel to read `bytes` in the background. From each call it takes no more than the
// device accepts as one request (1280 KiB on common disks) and forgets the rest; smaller windows
// than this cost 1.5× the time on a cold cache.
void ask_for(std::span<const std::byte> bytes) {
  constexpr size_t kWindow = size_t{1} << 20;
  for (; !bytes.empty(); bytes = bytes.subspan(std::min(kWindow, bytes.size())))
    (void)advise(bytes.first(std::min(kWindow, bytes.size())), MADV_WILLNEED); // only a hint
}

} // namespace

void LoadPlan::add(std::vector<Piece> pieces, std::function<caf::error()> work,
                   std::vector<const TensorView*> shared) {
  int64_t bytes = 0;
  for (const auto& piece : pieces)
    bytes += piece.size;
  bytes_ += bytes;
  jobs_.push_back({std::move(pieces), std::move(shared), std::move(work), bytes});
}

class LoadPlan::Runner {
public:
  Runner(LoadPlan& plan, const LoadProgress& progress, int64_t bytes_before, int64_t bytes_total)
      : plan_(plan), progress_(progress), done_(bytes_before), total_(bytes_total) {
    starts_.reserve(plan.jobs_.size());
    int64_t start = 0;
    for (const auto& job : plan.jobs_) {
      starts_.push_back(start);
      start += job.bytes;
    }
  }

  caf::error run(int num_threads) {
    std::vector<std::thread> others;
    const auto useful = std::min<size_t>(static_cast<size_t>(std::max(num_threads, 1)),
                                         std::max<size_t>(plan_.jobs_.size(), 1));
    for (size_t i = 1; i < useful; ++i)
      others.emplace_back([this] { work(); });
    work();
    for (auto& thread : others)
      thread.join();
    return error_;
  }

private:
  void work() {
    for (;;) {
      const size_t i = next_.fetch_add(1);
      if (i >= plan_.jobs_.size() || failed_)
        return;
      if (auto error = run_job(i)) {
        std::lock_guard lock{mutex_};
        if (!failed_)
          error_ = std::move(error);
        failed_ = true;
        return;
      }
    }
  }

  caf::error run_job(size_t i) {
    const auto& job = plan_.jobs_[i];
    fetch_ahead(i);
    if (auto error = map_in(job))
      return error;
    try {
      if (auto error = job.work())
        return error;
    } catch (const std::bad_alloc&) {
      return make_error(Errc::out_of_memory, fmt::format("no room to convert tensor {}",
                                                         job.pieces.front().tensor->name));
    }
    for (const auto& piece : job.pieces)
      plan_.checkpoint_->release(bytes_of(piece));
    std::lock_guard lock{mutex_};
    done_ += job.bytes;
    if (progress_)
      progress_(done_, total_);
    return {};
  }

  // Asks for the bytes of the jobs up to kReadAhead behind job i. If another thread is at it, it
  // does so for both.
  void fetch_ahead(size_t i) {
    std::unique_lock lock{ahead_mutex_, std::try_to_lock};
    if (!lock)
      return;
    ahead_ = std::max(ahead_, i);
    for (; ahead_ < plan_.jobs_.size() && starts_[ahead_] <= starts_[i] + kReadAhead; ++ahead_)
      ask_for(plan_.jobs_[ahead_]);
  }
  static void ask_for(const Job& job) {
    for (const auto& piece : job.pieces)
      troupe::ask_for(bytes_of(piece));
    for (const auto* tensor : job.shared)
      troupe::ask_for(tensor->bytes);
  }

  caf::error map_in(const Job& job) {
    for (const auto& piece : job.pieces)
      if (auto error = map_in(*piece.tensor, bytes_of(piece)))
        return error;
    for (const auto* tensor : job.shared)
      if (auto error = map_in(*tensor, tensor->bytes))
        return error;
    return {};
  }

  // `bytes` of a tensor.
  caf::error map_in([[maybe_unused]] const TensorView& tensor,
                    [[maybe_unused]] std::span<const std::byte> bytes) {
#ifdef MADV_POPULATE_READ
    // Kernels before 5.14 answer EINVAL, and the pages then come in one by one.
    const int code = advise(bytes, MADV_POPULATE_READ);
    if (code == EFAULT || code == EIO || code == EHWPOISON) {
      const auto& files = plan_.checkpoint_->files();
      const auto file = static_cast<size_t>(tensor.file);
      return make_error(Errc::io_error,
                        fmt::format("{}: can't read tensor {}: the file ends early or the disk "
                                    "failed ({})",
                                    file < files.size() ? files[file].string() : "checkpoint",
                                    tensor.name, std::strerror(code)));
    }
#endif
    return {};
  }

  LoadPlan& plan_;
  const LoadProgress& progress_;
  std::vector<int64_t> starts_; // bytes of the jobs before each
  std::atomic<size_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex ahead_mutex_;
  size_t ahead_ = 0; // first job whose bytes have not been asked for
  std::mutex mutex_; // guards what follows
  caf::error error_;
  int64_t done_, total_;
};

caf::error LoadPlan::run(int num_threads, const LoadProgress& progress, int64_t bytes_before,
                         int64_t bytes_total) {
  const auto place = [](const Job& job) {
    const auto& first = job.pieces.front();
    return std::tuple{first.tensor->file, first.tensor->file_offset + first.offset};
  };
  std::stable_sort(jobs_.begin(), jobs_.end(),
                   [&](const Job& a, const Job& b) { return place(a) < place(b); });
  auto error = Runner{*this, progress, bytes_before, bytes_total}.run(num_threads);
  for (const auto& job : jobs_)
    for (const auto* tensor : job.shared)
      checkpoint_->release(tensor->bytes);
  return error;
}

} // namespace troupe

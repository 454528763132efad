#include "communicator.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

namespace sim::hccl {
namespace {

using std::chrono::seconds;

// How long anyone sleeps without looking round: a member that was killed rings no bell.
constexpr std::chrono::milliseconds longest_sleep{100};

// CANN: HCCL_EXEC_TIMEOUT in seconds, 0 for no limit, and a communicator may have a limit of its own.
std::optional<seconds> execution_limit_of(const HcclCommConfig* config) {
  long limit = setting("HCCL_EXEC_TIMEOUT", 1836);
  if (config != nullptr && config->hcclExecTimeOut != HCCL_COMM_EXECTIMEOUT_CONFIG_NOT_SET) {
    limit = config->hcclExecTimeOut;
  }
  if (limit <= 0) return std::nullopt;
  return seconds(limit);
}

std::string name_of(const RootInfo& root, const HcclCommConfig* config) {
  return config != nullptr && config->hcclCommName[0] != '\0' ? config->hcclCommName : root.name;
}

// The handles that the program holds. Tasks keep their communicator alive after it is destroyed. Never freed,
// because streams may still run while the process exits.
struct Communicators {
  std::mutex mutex;
  std::map<HcclComm, std::shared_ptr<Communicator>> by_handle;
};

Communicators& communicators() {
  static auto* all = new Communicators;
  return *all;
}

}  // namespace

Communicator::Communicator(std::string name, std::uint32_t rank, std::uint32_t size,
                           std::unique_ptr<CommunicatorMemory> memory, std::optional<seconds> execution_limit)
    : name(std::move(name)),
      rank(rank),
      size(size),
      execution_limit(execution_limit),
      memory_(std::move(memory)) {}

HcclResult Communicator::join(const RootInfo& root, std::uint32_t size, std::uint32_t rank,
                              const HcclCommConfig* config, std::shared_ptr<Communicator>* joined) {
  if (rank >= size) return HCCL_E_PARA;
  auto memory = CommunicatorMemory::open(root, size);
  if (memory == nullptr) return HCCL_E_TCP_CONNECT;
  int nobody = 0;
  if (!memory->member(rank).pid.compare_exchange_strong(nobody, getpid())) {
    print("communicator " + root.name + ": process " + std::to_string(nobody) + " is its rank " +
          std::to_string(rank) + " already");
    return HCCL_E_PARA;
  }
  auto communicator = std::make_shared<Communicator>(name_of(root, config), rank, size, std::move(memory),
                                                     execution_limit_of(config));
  if (!communicator->wait_for_members(root.pid)) return HCCL_E_TIMEOUT;
  *joined = std::move(communicator);
  return HCCL_SUCCESS;
}

// Real HCCL connects sockets here, with the same effect: nobody returns before all have come.
bool Communicator::wait_for_members(int root_pid) {
  const auto limit = seconds(setting("HCCL_CONNECT_TIMEOUT", 120));
  const auto deadline = Clock::now() + limit;
  memory_->header().joined.fetch_add(1);
  ring_everyone();
  std::optional<Waiting> waiting;
  std::string said;
  for (;;) {
    const std::uint32_t heard = bell().heard();
    if (memory_->header().joined.load() == size) return true;
    const auto missing = missing_members();
    const std::string reason = "joining communicator " + name + " as rank " + std::to_string(rank) + " of " +
                               std::to_string(size) + ": " + ranks_text(missing) + " not here yet";
    if (Clock::now() > deadline && leave_unless_complete()) {
      print(reason + ", given up after " + std::to_string(limit.count()) + " s (HCCL_CONNECT_TIMEOUT)");
      return false;
    }
    if (reason != said) {
      waiting.reset();
      waiting.emplace(reason, partners_to_come(root_pid, static_cast<int>(missing.size())));
      said = reason;
    }
    bell().sleep(heard, longest_sleep);
  }
}

std::vector<std::uint32_t> Communicator::missing_members() const {
  std::vector<std::uint32_t> missing;
  for (std::uint32_t other = 0; other < size; ++other) {
    if (memory_->member(other).pid.load() == 0) missing.push_back(other);
  }
  return missing;
}

// A member that is not here yet is unknown, unless it is the process that made the root info.
Partners Communicator::partners_to_come(int root_pid, int missing) const {
  for (std::uint32_t other = 0; other < size; ++other) {
    if (memory_->member(other).pid.load() == root_pid) return Partners{name, "join", {}, missing};
  }
  return Partners{name, "join", {root_pid}, missing - 1};
}

// The last member to come sees all the others here; nobody may leave after that.
bool Communicator::leave_unless_complete() {
  std::atomic<std::uint32_t>& joined = memory_->header().joined;
  std::uint32_t present = joined.load();
  do {
    if (present == size) return false;
  } while (!joined.compare_exchange_weak(present, present - 1));
  memory_->member(rank).pid.store(0);
  return true;
}

void Communicator::ring_everyone() {
  for (std::uint32_t other = 0; other < size; ++other) ring(other);
}

std::vector<std::uint32_t> Communicator::others() const {
  std::vector<std::uint32_t> ranks;
  for (std::uint32_t other = 0; other < size; ++other) {
    if (other != rank) ranks.push_back(other);
  }
  return ranks;
}

std::vector<int> Communicator::pids(const std::vector<std::uint32_t>& ranks) const {
  std::vector<int> pids;
  for (const std::uint32_t other : ranks) pids.push_back(memory_->member(other).pid.load());
  return pids;
}

void Communicator::fail(const std::string& sentence) {
  Failure& shared = memory_->header().failure;
  if (!shared.claimed.exchange(true)) {
    sentence.copy(shared.sentence, sizeof shared.sentence - 1);
    shared.written.store(true, std::memory_order_release);
  }
  ring_everyone();
}

std::optional<std::string> Communicator::failure() {
  const Failure& shared = memory_->header().failure;
  if (!shared.written.load(std::memory_order_acquire)) return std::nullopt;
  return shared.sentence;
}

HcclResult Communicator::error() {
  if (timed_out_) return HCCL_E_TIMEOUT;
  return failure() ? HCCL_E_INTERNAL : HCCL_SUCCESS;
}

void Communicator::destroy() {
  destroyed_ = true;
  bell().ring();
}

Operation::Operation(Communicator& communicator, const Call& call)
    : communicator(communicator),
      call(call),
      deadline_(communicator.execution_limit
                    ? std::make_optional(Clock::now() + *communicator.execution_limit)
                    : std::nullopt) {}

void Operation::until_unblocked(const std::function<std::optional<Blocked>()>& step) {
  std::optional<Waiting> waiting;
  std::string said;
  for (;;) {
    const std::uint32_t heard = communicator.bell().heard();
    const std::optional<Blocked> blocked = step();
    if (!blocked) return;
    const std::string reason = call.title + ": " + blocked->reason;
    give_up_if_hopeless(reason);
    if (reason != said) {
      waiting.reset();
      waiting.emplace(reason, Partners{communicator.name, call.kind, communicator.pids(blocked->ranks)});
      said = reason;
    }
    std::chrono::nanoseconds limit = longest_sleep;
    if (blocked->until) limit = std::min<std::chrono::nanoseconds>(limit, *blocked->until - Clock::now());
    communicator.bell().sleep(heard, limit);
  }
}

void Operation::fail(const std::string& sentence) {
  communicator.fail(sentence);
  give_up_if_hopeless(sentence);
  throw GivenUp{ACL_ERROR_RT_FFTS_PLUS_EXCEPTION};  // another member was about to say why, and was killed
}

void Operation::give_up_if_hopeless(const std::string& reason) {
  if (shutting_down()) throw GivenUp{ACL_ERROR_RT_FFTS_PLUS_EXCEPTION};
  if (const auto failure = communicator.failure()) {
    print(call.title + ": given up by rank " + std::to_string(communicator.rank) + ": " + *failure);
    throw GivenUp{ACL_ERROR_RT_FFTS_PLUS_EXCEPTION};
  }
  if (communicator.destroyed()) {
    print(reason + "; given up because the communicator is destroyed");
    throw GivenUp{ACL_ERROR_RT_FFTS_PLUS_EXCEPTION};
  }
  if (deadline_ && Clock::now() > *deadline_) {
    print(reason + ", given up after " + std::to_string(communicator.execution_limit->count()) +
          " s (HCCL_EXEC_TIMEOUT)");
    communicator.time_out();
    throw GivenUp{ACL_ERROR_RT_FFTS_PLUS_TIMEOUT};
  }
}

void enqueue_operation(std::shared_ptr<Communicator> communicator, aclrtStream stream, Call call,
                       std::function<void(Operation&)> run) {
  Task task;
  task.name = call.function;
  task.partners = Partners{communicator->name, call.kind, communicator->pids(call.ranks)};
  task.run = [communicator = std::move(communicator), call = std::move(call), run = std::move(run)] {
    try {
      Operation operation(*communicator, call);
      run(operation);
    } catch (const GivenUp& given_up) {
      fail_stream(given_up.error);
    }
  };
  enqueue(stream, std::move(task));
}

std::shared_ptr<Communicator> find_communicator(HcclComm handle) {
  const std::lock_guard lock(communicators().mutex);
  const auto found = communicators().by_handle.find(handle);
  if (found != communicators().by_handle.end()) return found->second;
  print("an HCCL call with a communicator that does not exist, or no longer");
  return nullptr;
}

std::size_t bytes_of(HcclDataType data_type) {
  switch (data_type) {
    case HCCL_DATA_TYPE_INT8:
    case HCCL_DATA_TYPE_UINT8:
    case HCCL_DATA_TYPE_HIF8:
    case HCCL_DATA_TYPE_FP8E4M3:
    case HCCL_DATA_TYPE_FP8E5M2:
    case HCCL_DATA_TYPE_FP8E8M0: return 1;
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_UINT16:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_BFP16: return 2;
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_UINT32:
    case HCCL_DATA_TYPE_FP32: return 4;
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_UINT64:
    case HCCL_DATA_TYPE_FP64: return 8;
    case HCCL_DATA_TYPE_INT128: return 16;
    default: return 0;
  }
}

std::string ranks_text(const std::vector<std::uint32_t>& ranks) {
  std::string text = ranks.size() == 1 ? "rank" : "ranks";
  for (std::size_t i = 0; i < ranks.size(); ++i) text += (i == 0 ? " " : ", ") + std::to_string(ranks[i]);
  return text;
}

}  // namespace sim::hccl

using sim::hccl::Communicator;
using sim::hccl::RootInfo;

extern "C" {

HcclResult HcclGetRootInfo(HcclRootInfo* root_info) {
  const auto root = RootInfo::create();
  if (!root) return HCCL_E_SYSCALL;
  root->write(root_info);
  return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfoConfig(uint32_t size, const HcclRootInfo* root_info, uint32_t rank,
                                      const HcclCommConfig* config, HcclComm* handle) {
  const auto root = RootInfo::read(*root_info);
  if (!root) return HCCL_E_PARA;
  std::shared_ptr<Communicator> communicator;
  const HcclResult result = Communicator::join(*root, size, rank, config, &communicator);
  root->close();
  if (result != HCCL_SUCCESS) return result;
  *handle = communicator.get();
  auto& all = sim::hccl::communicators();
  const std::lock_guard lock(all.mutex);
  all.by_handle[*handle] = std::move(communicator);
  return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo* root_info, uint32_t rank,
                                HcclComm* handle) {
  return HcclCommInitRootInfoConfig(size, root_info, rank, nullptr, handle);
}

// torch_npu calls this only with ROOTINFO_SUBCOMM_ENABLE=1 or a RANK_TABLE_FILE, else it goes by root info.
HcclResult HcclCreateSubCommConfig(HcclComm*, uint32_t, uint32_t*, uint64_t, uint32_t, HcclCommConfig*,
                                   HcclComm*) {
  sim::not_simulated("HcclCreateSubCommConfig");
}

HcclResult HcclCommDestroy(HcclComm handle) {
  const auto communicator = sim::hccl::find_communicator(handle);
  if (communicator == nullptr) return HCCL_E_PARA;
  communicator->destroy();
  auto& all = sim::hccl::communicators();
  const std::lock_guard lock(all.mutex);
  all.by_handle.erase(handle);
  return HCCL_SUCCESS;
}

HcclResult HcclGetCommName(HcclComm handle, char* name) {
  const auto communicator = sim::hccl::find_communicator(handle);
  if (communicator == nullptr) return HCCL_E_PARA;
  std::memset(name, 0, COMM_NAME_MAX_LENGTH);
  communicator->name.copy(name, COMM_NAME_MAX_LENGTH - 1);
  return HCCL_SUCCESS;
}

HcclResult HcclGetCommAsyncError(HcclComm handle, HcclResult* error) {
  const auto communicator = sim::hccl::find_communicator(handle);
  if (communicator == nullptr) return HCCL_E_PARA;
  *error = communicator->error();
  return HCCL_SUCCESS;
}

// All that HcclCommConfigCapability lists; what cannot matter here, as buffer sizes, is taken in silence.
uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_RESERVED; }

// Nothing to do: reductions are always in the order of ranks, and there is no accelerator to choose.
HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }

}  // extern "C"

#include "lanes.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"
#include "memory.h"
#include "report.h"
#include "shadow.h"

namespace simt {

// The variables of CUDA that kernels see as const.
uint3 thread_index asm("threadIdx"), block_index asm("blockIdx"), block_dim asm("blockDim"), grid_dim asm("gridDim");

bool checking = false;
Fiber* running = nullptr;
Shared shared(0);

namespace {

constexpr unsigned kMostLanes = 1024;
constexpr unsigned kNobody = kMostLanes;
constexpr size_t kFreeShared = size_t{48} << 10;

// What lanes wait at: an instruction and its place.
struct Barrier {
  const char* what;
  Site site;

  bool operator==(const Barrier& other) const {
    return site.line() == other.site.line() && site.column() == other.site.column() && equal(what, other.what) &&
           equal(site.file_name(), other.site.file_name());
  }

  static bool equal(const char* a, const char* b) {
    return a == b || std::strcmp(a, b) == 0;
  }

  std::string text() const {
    return std::string(what) + " at " + site.file_name() + ":" + std::to_string(site.line());
  }
};

// Lanes of a warp that wait for each other.
struct Meeting {
  Barrier barrier;
  uint32_t mask, arrived;
};

struct Warp {
  uint32_t lanes;               // Those that exist.
  uint32_t exited, at_barrier;  // Those that cannot come to a meeting.
  uint32_t time = 0;            // Meetings so far.
  std::vector<Meeting> meetings;

  // A meeting at which others wait for the lane `bit`.
  const Meeting* meeting_of(uint32_t bit) const {
    for (const auto& m : meetings) {
      if (m.mask & bit) return &m;
    }
    return nullptr;
  }
};

struct Lane {
  Fiber fiber;
  uint3 index;
  Warp* warp;
  uint64_t value;     // Passed to the meeting at which it waits,
  unsigned source;    // of which it asked for the value of this lane,
  uint64_t received;  // and got it.
  std::array<uint32_t, 32> known{};
};

Stacks stacks(kMostLanes);
std::map<const void*, size_t> allowed_shared;  // Of kernels: dynamic shared memory allowed beyond what all may have.
std::array<Lane, kMostLanes> lanes;
std::array<Warp, kMostLanes / 32> warps;
Fiber host;

uint64_t random_state;

// The launch.
const void* call_begin;
size_t call_bytes;
void (*call_run)(const void*);
unsigned lane_count;
std::string failure;

// The block.
std::vector<unsigned> ready;  // Lanes that wait for nothing.
unsigned me = kNobody;        // The lane that runs.
unsigned exited;
Barrier barrier;
unsigned at_barrier, passed_true, barrier_result;

// A random number less than n, of splitmix64.
uint64_t below(uint64_t n) {
  uint64_t bits = random_state += 0x9e3779b97f4a7c15;
  bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
  bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
  return static_cast<uint64_t>(static_cast<unsigned __int128>(bits ^ bits >> 31) * n >> 64);
}

void make_all_ready() {
  ready.resize(lane_count);
  std::iota(ready.begin(), ready.end(), 0);
}

// Leaves the running fibre for a random lane that is ready; for the host if there is none.
void yield() {
  Fiber& from = me == kNobody ? host : lanes[me].fiber;
  if (ready.empty() && exited < lane_count && failure.empty()) fail("deadlock", "all threads wait for each other");
  if (ready.empty()) {
    me = kNobody;
    running = nullptr;
  } else {
    std::swap(ready[below(ready.size())], ready.back());
    me = ready.back();
    ready.pop_back();
    const Lane& lane = lanes[me];
    thread_index = lane.index;
    running = &lanes[me].fiber;
    moment.warp = me / 32;
    moment.bit = 1u << me % 32;
    moment.time = lane.warp->time;
    moment.known = lane.known.data();
  }
  Fiber& to = running ? *running : host;
  if (&to != &from) Fiber::switch_to(from, to);
  checking = running != nullptr;
}

[[noreturn, gnu::cold, gnu::noinline]] void fail_waiting(const char* kind, const Barrier& here, const char* why,
                                                         const Barrier* other = nullptr) {
  fail(kind, "waits at " + here.text() + why + (other ? other->text() : ""));
}

void exit_lane() {
  checking = false;
  Warp& warp = *lanes[me].warp;
  if (at_barrier > 0) fail("divergent barrier", "exits, while others wait at " + barrier.text());
  if (const Meeting* meeting = warp.meeting_of(moment.bit)) {
    fail("missing lane", "exits, while others wait for it at " + meeting->barrier.text());
  }
  warp.exited |= moment.bit;
  ++exited;
  yield();
}

// What a fibre does: the kernel, for one block after another.
void run_lane() {
  for (;;) {
    checking = true;
    call_run(call_begin);
    exit_lane();
  }
}

// Lets the lanes of a complete meeting go on, each with the value it asked for and the common knowledge of all.
void finish(Warp& warp, const Meeting& meeting) {
  ++warp.time;
  Lane* const members = &lanes[(&warp - warps.data()) * 32];
  std::array<uint32_t, 32> known{};
  uint32_t ballot = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (!(meeting.mask >> i & 1)) continue;
    for (unsigned k = 0; k < 32; ++k) known[k] = std::max(known[k], members[i].known[k]);
    ballot |= (members[i].value != 0) << i;
  }
  for (unsigned i = 0; i < 32; ++i) {
    if (meeting.mask >> i & 1) known[i] = warp.time;
  }
  for (unsigned i = 0; i < 32; ++i) {
    if (!(meeting.mask >> i & 1)) continue;
    Lane& lane = members[i];
    lane.known = known;
    lane.received = lane.source == kEveryLane ? ballot : members[lane.source].value;
    ready.push_back(&lane - lanes.data());
  }
}

void set_up_lanes(const dim3& block) {
  lane_count = block.x * block.y * block.z;
  for (unsigned i = 0; i < lane_count; ++i) {
    lanes[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    lanes[i].warp = &warps[i / 32];
  }
  for (unsigned w = 0; w * 32 < lane_count; ++w) {
    const unsigned left = lane_count - w * 32;
    warps[w].lanes = left < 32 ? (1u << left) - 1 : ~0u;
  }
}

void start_fibers() {
  for (unsigned i = 0; i < kMostLanes; ++i) lanes[i].fiber = Fiber(stacks.at(i), run_lane);
}

void run_block() {
  moment.block_start = ++moment.interval;
  shared.fill();
  exited = at_barrier = passed_true = 0;
  make_all_ready();
  for (auto& warp : warps) {
    warp.exited = warp.at_barrier = 0;
    warp.meetings.clear();
  }
  yield();
}

const bool prepared = [] {
  start_fibers();
  const char* seed = std::getenv("SPADE_SIMT_SEED");
  simt_set_seed(seed ? std::strtoull(seed, nullptr, 0) : 0);
  return true;
}();

}  // namespace

bool in_arguments(uintptr_t address, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(call_begin);
  return address >= begin && address + bytes <= begin + call_bytes;
}

std::string stack_owner(uintptr_t address) {
  return stacks.contains(address) ? thread_name(stacks.index(address)) : "";
}

std::string thread_name(uint32_t number) {
  const uint3& i = lanes[number].index;
  return "thread (" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

// The stacks of all lanes are left as they are, so that nothing on them is destroyed.
void fail(const std::string& kind, const std::string& detail) {
  failure = "simt: " + kind + ": block (" + std::to_string(block_index.x) + "," + std::to_string(block_index.y) + "," +
            std::to_string(block_index.z) + "), " + thread_name(me) + ": " + detail;
  ready.clear();
  yield();
  __builtin_unreachable();
}

unsigned lane() {
  return me % 32;
}

int sync_block(bool value, const char* what, Site site) {
  checking = false;
  Warp& warp = *lanes[me].warp;
  const Barrier here{what, site};
  if (exited > 0) fail_waiting("divergent barrier", here, ", but other threads have exited");
  if (const Meeting* meeting = warp.meeting_of(moment.bit)) {
    fail_waiting("missing lane", here, ", while others wait for it at ", &meeting->barrier);
  }
  if (at_barrier == 0) barrier = here;
  if (barrier != here) fail_waiting("divergent barrier", here, ", while others wait at ", &barrier);
  warp.at_barrier |= moment.bit;
  passed_true += value;
  if (++at_barrier == lane_count) {
    barrier_result = passed_true;
    at_barrier = passed_true = 0;
    ++moment.interval;
    for (auto& w : warps) w.at_barrier = 0;
    make_all_ready();
  }
  yield();
  return barrier_result;
}

uint64_t meet(unsigned mask, uint64_t value, unsigned source, const char* what, Site site) {
  checking = false;
  Lane& lane = lanes[me];
  Warp& warp = *lane.warp;
  const Barrier here{what, site};
  if (!(mask & moment.bit)) fail_waiting("missing lane", here, " with a mask that it is not in");
  if (source < kEveryLane && !(mask >> source & 1)) {
    fail_waiting("missing lane", here, " for the value of a lane that is not in the mask");
  }
  if (mask & ~warp.lanes) fail_waiting("missing lane", here, " for a lane that does not exist");
  if (mask & warp.exited) fail_waiting("missing lane", here, " for a lane that has exited");
  if (mask & warp.at_barrier) fail_waiting("missing lane", here, " for a lane that waits at ", &barrier);
  lane.value = value;
  lane.source = source;
  auto meeting = std::find_if(warp.meetings.begin(), warp.meetings.end(),
                              [&](const Meeting& m) { return m.mask == mask && m.barrier == here; });
  if (meeting == warp.meetings.end()) meeting = warp.meetings.insert(meeting, Meeting{here, mask, 0});
  meeting->arrived |= moment.bit;
  for (const Meeting& other : warp.meetings) {
    if (&other != &*meeting && (other.arrived & mask) && (meeting->arrived & other.mask)) {
      fail_waiting("divergent barrier", here, " for lanes that wait for it, but with another mask or place: at ",
                   &other.barrier);
    }
  }
  if (meeting->arrived == mask) {
    const Meeting complete = *meeting;
    *meeting = warp.meetings.back();
    warp.meetings.pop_back();
    finish(warp, complete);
  }
  yield();
  return lane.received;
}

void allow_shared(const void* kernel, size_t bytes) {
  if (bytes > Shared::kMostDynamic) throw std::runtime_error("simt: invalid value: more shared memory than a GPU has");
  allowed_shared[kernel] = bytes;
}

void launch(const cudaLaunchConfig_t& config, const void* kernel, void (*run)(const void*), const void* call,
            size_t bytes) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, count = uint64_t{block.x} * block.y * block.z;
  if (blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || count == 0 || count > kMostLanes ||
      block.z > 64 || config.dynamicSmemBytes > std::max(kFreeShared, allowed_shared[kernel])) {
    throw std::runtime_error("simt: invalid configuration: kernel " + function_name(kernel));
  }
  call_run = run;
  call_begin = call;
  call_bytes = bytes;
  grid_dim = {grid.x, grid.y, grid.z};
  block_dim = {block.x, block.y, block.z};
  shared = Shared(config.dynamicSmemBytes);
  set_up_lanes(block);
  moment.launch_start = moment.interval + 1;
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  for (uint64_t left = blocks; left > 0; --left) {
    std::swap(order[below(left)], order[left - 1]);
    const uint64_t b = order[left - 1];
    block_index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    run_block();
    if (failure.empty()) continue;
    start_fibers();
    const std::string text = std::exchange(failure, "");
    const size_t detail = text.find(" block (");
    throw std::runtime_error(text.substr(0, detail) + " kernel " + function_name(kernel) + "," + text.substr(detail));
  }
}

}  // namespace simt

void simt_set_seed(uint64_t seed) {
  simt::random_state = seed;
}

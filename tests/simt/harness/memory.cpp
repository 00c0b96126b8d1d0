#include "memory.h"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "lanes.h"
#include "report.h"

namespace simt {
namespace {

struct Buffer {
  Buffer(uintptr_t begin, size_t bytes) : begin(begin), bytes(bytes), shadow(begin, bytes) {}

  bool contains(uintptr_t address) const {
    return address - begin < bytes;
  }

  uintptr_t begin;
  size_t bytes;
  Shadow shadow;
};

std::mutex mutex;  // Of what follows.
std::map<uintptr_t, Buffer> buffers;
std::array<Buffer*, 8> last_used;  // The latest first.

std::optional<Buffer> shared_buffer;  // Of the thread that launched last.

Buffer* find(uintptr_t address) {
  for (size_t i = 0; i < last_used.size() && last_used[i]; ++i) {
    if (!last_used[i]->contains(address)) continue;
    if (i > 0) std::swap(last_used[i], last_used[i - 1]);
    return last_used[i > 0 ? i - 1 : 0];
  }
  const std::lock_guard lock(mutex);
  auto after = buffers.upper_bound(address);
  if (after == buffers.begin() || !(--after)->second.contains(address)) return nullptr;
  std::move_backward(last_used.begin(), last_used.end() - 1, last_used.end());
  return last_used[0] = &after->second;
}

// Where an address is, in words, seen from the nearest buffer.
std::string place(uintptr_t address) {
  if (shared.contains(address)) {
    const bool dynamic = address - shared.dynamic < Shared::kMostDynamic;
    return "at offset " + std::to_string(address - (dynamic ? shared.dynamic : shared.begin)) + " of the " +
           (dynamic ? std::to_string(shared.dynamic_bytes) + " bytes of dynamic shared memory"
                    : "static shared memory");
  }
  if (const std::string owner = stack_owner(address); !owner.empty()) return "on the stack of " + owner;
  if (in_arguments(address, 1)) return "in the kernel's arguments";
  const std::lock_guard lock(mutex);
  if (address < 4096 || buffers.empty()) return "at address " + std::to_string(address);
  const auto distance = [address](const auto& entry) {
    const Buffer& b = entry.second;
    return address < b.begin ? b.begin - address : address - std::min(address, b.begin + b.bytes);
  };
  auto nearest = buffers.lower_bound(address);
  if (nearest == buffers.end() || (nearest != buffers.begin() && distance(*std::prev(nearest)) < distance(*nearest))) {
    --nearest;
  }
  const Buffer& buffer = nearest->second;
  return "at offset " + std::to_string(static_cast<intptr_t>(address - buffer.begin)) + " of a buffer of " +
         std::to_string(buffer.bytes) + " bytes";
}

std::string describe(const Use& use) {
  constexpr const char* kVerbs[] = {"reads ", "writes ", "atomically changes "};
  const std::string source =
      use.caller ? source_line(use.caller) : std::string(use.site.file_name()) + ":" + std::to_string(use.site.line());
  return kVerbs[static_cast<int>(use.access)] + std::to_string(use.bytes) + " bytes " + place(use.address) + ", at " +
         source;
}

[[noreturn]] void fail_bounds(const Use& use) {
  fail(use.access == Access::kRead ? "out of bounds read" : "out of bounds write", describe(use));
}

[[noreturn]] void fail_race(const Use& use, const Race& race, bool is_shared) {
  const Record& earlier = race.record;
  std::string who;
  if (earlier.of_other_block()) {
    who = "another block";
  } else {
    const uint32_t lanes = earlier.warp == moment.warp ? earlier.unordered() : earlier.lanes;
    who = lanes ? thread_name(earlier.warp * 32 + std::countr_zero(lanes)) : "another warp";
    who += " with no barrier between";
  }
  const char* verb = earlier.atomic ? "changed atomically by " : race.written ? "written by " : "read by ";
  fail(is_shared ? "shared race" : "global race", describe(use) + "; " + verb + who);
}

void check_race(const Use& use, Shadow& shadow, bool is_shared) {
  Race race;
  const uint32_t first = is_shared ? moment.block_start : moment.launch_start;
  if (!shadow.note(use.address, use.bytes, use.access, first, race)) [[unlikely]] {
    fail_race(use, race, is_shared);
  }
}

}  // namespace

void check(const Use& use) {
  if (running->owns(use.address)) return;
  if (shared.contains(use.address)) {
    if (!shared.allows(use.address, use.bytes)) fail_bounds(use);
    if (!shared_buffer || shared_buffer->begin != shared.begin) shared_buffer.emplace(shared.begin, shared.bytes);
    check_race(use, shared_buffer->shadow, true);
    return;
  }
  if (use.access == Access::kRead && in_arguments(use.address, use.bytes)) return;
  Buffer* buffer = find(use.address);
  if (!buffer || use.address + use.bytes > buffer->begin + buffer->bytes) fail_bounds(use);
  check_race(use, buffer->shadow, false);
}

void check_atomic(const void* address, size_t bytes, Site site) {
  checking = false;
  const auto begin = reinterpret_cast<uintptr_t>(address);
  if (begin % bytes) fail_misaligned(begin, "atomic");
  check({begin, bytes, Access::kAtomic, nullptr, site});
  checking = true;
}

void fail_misaligned(uintptr_t address, const std::string& what) {
  fail("misaligned access", what + " " + place(address));
}

}  // namespace simt

using namespace simt;

void simt_register(void* begin, size_t bytes) {
  const std::lock_guard lock(mutex);
  const auto address = reinterpret_cast<uintptr_t>(begin);
  buffers.insert_or_assign(address, Buffer(address, bytes));
}

void simt_unregister(void* begin) {
  const std::lock_guard lock(mutex);
  last_used = {};
  buffers.erase(reinterpret_cast<uintptr_t>(begin));
}

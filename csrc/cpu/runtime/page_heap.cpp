#include "page_heap.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <iterator>

namespace spade {

namespace {

size_t page_size() {
  static const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return size;
}

size_t whole_pages(size_t bytes) {
  return (bytes + page_size() - 1) / page_size() * page_size();
}

void* map_pages(size_t size) {
  void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return pages == MAP_FAILED ? nullptr : pages;
}

}  // namespace

bool PageHeap::on_page(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % page_size() == 0;
}

void* PageHeap::allocate(size_t bytes) {
  if (bytes > SIZE_MAX / 2) return nullptr;  // beyond any address space, as negative sizes are
  const size_t size = whole_pages(bytes);
  auto range = best_fit(size);
  if (range == ranges_.end()) range = map(size);
  if (range == ranges_.end()) return nullptr;
  const size_t rest = range->second.size - size;
  if (rest > 0) ranges_.emplace(range->first + size, Range{rest, false});
  range->second = {size, true};
  kept_ -= size;
  used_ += size;
  peak_ = std::max(peak_, used_);
  return range->first;
}

bool PageHeap::free(void* block) {
  auto range = ranges_.find(static_cast<char*>(block));
  if (range == ranges_.end() || !range->second.used) return false;
  range->second.used = false;
  used_ -= range->second.size;
  kept_ += range->second.size;
  auto join = [this](Ranges::iterator first, Ranges::iterator second) {
    if (first->second.used || second->second.used || first->first + first->second.size != second->first) return second;
    first->second.size += second->second.size;
    ranges_.erase(second);
    return first;
  };
  if (range != ranges_.begin()) range = join(std::prev(range), range);
  if (std::next(range) != ranges_.end()) join(range, std::next(range));
  return true;
}

bool PageHeap::unmap_free() {
  const bool any = kept_ > 0;
  cut(kept_);
  return any;
}

PageHeap::Ranges::iterator PageHeap::best_fit(size_t size) {
  auto best = ranges_.end();
  for (auto range = ranges_.begin(); range != ranges_.end(); ++range) {
    if (range->second.used || range->second.size < size) continue;
    if (best == ranges_.end() || range->second.size < best->second.size) best = range;
  }
  return best;
}

// A new free range of exactly this size. With the allowance of a sixteenth, networks that are run again soon ask for
// nothing new, though what is free is not in one piece.
PageHeap::Ranges::iterator PageHeap::map(size_t size) {
  const size_t peak = std::max(peak_, used_ + size), most = peak + peak / 16, then = used_ + kept_ + size;
  if (then > most) cut(whole_pages(then - most));
  void* pages = map_pages(size);
  if (pages == nullptr && unmap_free()) pages = map_pages(size);
  if (pages == nullptr) return ranges_.end();
  const auto range = ranges_.emplace(static_cast<char*>(pages), Range{size, false}).first;
  kept_ += size;
  return range;
}

// Gives free pages back, first those of the smallest ranges, into which the fewest blocks fit.
void PageHeap::cut(size_t size) {
  while (size > 0) {
    auto smallest = ranges_.end();
    for (auto range = ranges_.begin(); range != ranges_.end(); ++range) {
      if (range->second.used) continue;
      if (smallest == ranges_.end() || range->second.size < smallest->second.size) smallest = range;
    }
    const size_t part = std::min(size, smallest->second.size);
    unmap(smallest, part);
    size -= part;
  }
}

void PageHeap::unmap(Ranges::iterator range, size_t size) {
  munmap(range->first + range->second.size - size, size);
  range->second.size -= size;
  kept_ -= size;
  if (range->second.size == 0) ranges_.erase(range);
}

}  // namespace spade

#include "kept_memory.h"

#include <pthread.h>

namespace spade {

// Below, malloc keeps freed memory by itself: glibc asks the system for single blocks from here on.
static constexpr size_t kLarge = 128 << 10;

KeptMemory& KeptMemory::instance() {
  static auto* memory = new KeptMemory;
  return *memory;
}

KeptMemory::KeptMemory() {
  pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); }, [] { instance().leave(); });
}

void KeptMemory::begin() {
  std::lock_guard<std::mutex> guard(mutex_);
  if (sections_++ == 0) heap_.forget_peak();
}

void KeptMemory::end() {
  std::lock_guard<std::mutex> guard(mutex_);
  if (sections_ > 0 && --sections_ == 0) clear();
}

void* KeptMemory::allocate(size_t bytes) {
  if (bytes < kLarge) return nullptr;
  std::lock_guard<std::mutex> guard(mutex_);
  return sections_ > 0 ? heap_.allocate(bytes) : nullptr;
}

bool KeptMemory::free(void* block) {
  if (!PageHeap::on_page(block)) return false;
  std::lock_guard<std::mutex> guard(mutex_);
  const bool found = heap_.free(block);
  if (found && sections_ == 0) clear();
  return found;
}

bool KeptMemory::give_back() {
  std::lock_guard<std::mutex> guard(mutex_);
  return heap_.unmap_free();
}

void KeptMemory::when_empty(void (*call)()) {
  std::lock_guard<std::mutex> guard(mutex_);
  when_empty_ = call;
}

KeptMemory::Bytes KeptMemory::bytes() {
  std::lock_guard<std::mutex> guard(mutex_);
  return {heap_.used(), heap_.kept()};
}

// In the new process after a fork, whose other threads are gone.
void KeptMemory::leave() {
  sections_ = 0;
  clear();
  mutex_.unlock();
}

void KeptMemory::clear() {
  heap_.unmap_free();
  if (heap_.used() == 0) when_empty_();
}

}  // namespace spade

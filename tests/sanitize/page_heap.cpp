// Allocates and frees blocks of random sizes, and checks after each step that no block has lost its values to another
// and that the heap counts what it holds. Exit code 0 and "ok" if all is well.
#include "../../csrc/cpu/runtime/page_heap.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

namespace {

struct Block {
  char* start;
  size_t size;
  char value;
};

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("%s\n", what);
  std::exit(1);
}

}  // namespace

int main() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  std::mt19937 generator(3);
  spade::PageHeap heap;
  std::vector<Block> blocks;
  size_t used = 0, most = 0;
  auto whole = [page](size_t bytes) { return (bytes + page - 1) / page * page; };
  auto drop = [&](size_t index) {
    const Block block = blocks[index];
    expect(block.start[0] == block.value && block.start[block.size - 1] == block.value, "values were lost");
    expect(heap.free(block.start), "a block is not known");
    expect(!heap.free(block.start + 1), "an address within a block is taken for one");
    used -= whole(block.size);
    blocks.erase(blocks.begin() + index);
  };
  for (int step = 0; step < 20000; ++step) {
    if (!blocks.empty() && generator() % 100 < (step / 1000 % 2 ? 60 : 45)) {
      drop(generator() % blocks.size());
    } else {
      const size_t size = 1 + generator() % (generator() % 8 == 0 ? 40 * page : 6 * page);
      auto* start = static_cast<char*>(heap.allocate(size));
      expect(start != nullptr && spade::PageHeap::on_page(start), "no whole pages");
      blocks.push_back({start, size, static_cast<char>(step)});
      std::memset(start, blocks.back().value, size);
      used += whole(size);
      most = std::max(most, used);
    }
    expect(heap.used() == used, "bytes in use are counted wrongly");
    expect(heap.used() + heap.kept() <= most + most / 16, "too much is kept");
    if (step % 5000 == 4999) {
      heap.unmap_free();
      expect(heap.kept() == 0, "something is kept");
      heap.forget_peak();
      most = used;
    }
  }
  while (!blocks.empty()) drop(0);
  expect(heap.allocate(size_t(1) << 60) == nullptr && heap.kept() == 0, "nothing was given back for what does not fit");
  std::puts("ok");
}

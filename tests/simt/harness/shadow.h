// Shadow memory: who last read and wrote each word of a buffer, and whether an access races with that.
//
// Time is counted in intervals and warp times. An interval is the stretch between two barriers of a block; they are
// numbered through all blocks of all launches, so that what is older than a launch need not be cleared. Within an
// interval, each meeting of lanes of a warp (__syncwarp, shuffle, ballot) starts a new time of that warp, and each lane
// knows for each lane of its warp up to which time that lane's accesses happened before (vector clocks). Two accesses
// of one block are in order if they lie in different intervals, or in one warp and the later lane knows of the first
// access. Accesses of different blocks of one launch are never in order.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace simt {

enum class Access { kRead, kWrite, kAtomic };

// When the running lane accesses memory.
struct Moment {
  uint32_t interval = 0, block_start = 0, launch_start = 0;  // Intervals: the present one and the first ones.
  uint32_t time;                                             // Of the warp.
  uint32_t warp;
  uint32_t bit;           // Of the lane in its warp.
  const uint32_t* known;  // By lane of the warp: its accesses at earlier times than this happened before.
};

inline Moment moment;

// Accesses to one word: those of the last interval with any, less those that happened before others of them.
struct Record {
  uint32_t interval = 0;
  uint32_t time;   // Of the latest.
  uint32_t lanes;  // One bit a lane.
  uint8_t warp;
  bool many_warps;    // Others than those of `lanes` too.
  bool other_blocks;  // Another block of this launch has come before.
  bool atomic;        // All of these are atomic.
  bool plain;         // Some of this launch were not.

  bool of_other_block() const {
    return other_blocks || interval < moment.block_start;
  }

  // Lanes of the running lane's warp whose access did not happen before.
  uint32_t unordered() const {
    uint32_t found = 0;
    for (uint32_t rest = lanes & ~moment.bit; rest; rest &= rest - 1) {
      if (time >= moment.known[std::countr_zero(rest)]) found |= rest & -rest;
    }
    return found;
  }

  // Whether it is out of order with an access of the running lane. What is older than interval `first` is forgotten.
  bool races(uint32_t first, Access access) const {
    if (interval < first) return false;
    if (of_other_block()) return plain || access != Access::kAtomic;
    if (interval != moment.interval || (atomic && access == Access::kAtomic)) return false;
    return many_warps || warp != moment.warp || unordered();
  }

  // Whether it is nothing but a plain access of the running lane at this very moment.
  bool repeated() const {
    return interval == moment.interval && lanes == moment.bit && warp == moment.warp && time == moment.time &&
           !many_warps && !atomic;
  }

  void add(uint32_t first, Access access) {
    const bool current = interval == moment.interval, recent = interval >= first;
    if (current && many_warps) return;
    other_blocks = recent && of_other_block();
    atomic = access == Access::kAtomic;
    plain = !atomic || (recent && plain);
    many_warps = current && warp != moment.warp;
    lanes = (current && !many_warps ? unordered() : 0) | moment.bit;
    warp = moment.warp;
    interval = moment.interval;
    time = moment.time;
  }
};

struct Race {
  Record record;
  bool written;  // Else read.
};

class Shadow {
 public:
  Shadow(uintptr_t begin, size_t bytes) : begin_(begin), bytes_(bytes) {}

  // Notes an access inside the buffer by the running lane. Returns false if it races, with what in `race`.
  bool note(uintptr_t address, size_t bytes, Access access, uint32_t first, Race& race) {
    if (const unsigned finest = std::countr_zero(address | bytes); finest < shift_ || !cells_) {
      divide(finest < shift_ ? finest : shift_);
    }
    Cell* cell = &cells_[(address >> shift_) - (begin_ >> shift_)];
    const Cell* end = cell + (bytes >> shift_);
    for (; cell < end; ++cell) {
      if (access == Access::kRead ? cell->reads.repeated() : cell->writes.repeated()) continue;
      if (cell->writes.races(first, access)) {
        race = {cell->writes, true};
        return false;
      }
      if (access == Access::kRead) {
        cell->reads.add(first, access);
        continue;
      }
      if (cell->reads.races(first, access)) {
        race = {cell->reads, false};
        return false;
      }
      cell->writes.add(first, access);
    }
    return true;
  }

 private:
  struct Cell {
    Record reads, writes;
  };
  struct Free {
    void operator()(Cell* cells) const {
      std::free(cells);
    }
  };

  // Makes a cell for every 2^shift bytes. Cells are words until the first access that is smaller.
  void divide(unsigned shift) {
    const uintptr_t base = begin_ >> shift, count = ((begin_ + bytes_ - 1) >> shift) - base + 1;
    std::unique_ptr<Cell[], Free> cells(static_cast<Cell*>(std::calloc(count, sizeof(Cell))));
    for (uintptr_t i = 0; cells_ && i < count; ++i) {
      cells[i] = cells_[((base + i) >> (shift_ - shift)) - (begin_ >> shift_)];
    }
    cells_ = std::move(cells);
    shift_ = shift;
  }

  uintptr_t begin_;
  size_t bytes_;
  unsigned shift_ = 2;
  std::unique_ptr<Cell[], Free> cells_;
};

}  // namespace simt

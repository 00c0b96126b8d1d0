// Sections in which torch's CPU tensors keep the memory of large freed ones.
#pragma once

namespace spade {

// Also replaces torch's own CPU allocator, and no other. It is put back as soon as neither a section nor a block of one
// is left.
void begin_keeping_memory();
bool is_allocator_replaced();

}  // namespace spade

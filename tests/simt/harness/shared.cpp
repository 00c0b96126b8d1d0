#include "shared.h"

#include <link.h>

#include <algorithm>
#include <cstring>

namespace spade::cuda {

alignas(1024) thread_local unsigned char spade_shared[simt::Shared::kMostDynamic];

}  // namespace spade::cuda

namespace simt {

// Called for each library of the process: notes the TLS segment that holds dynamic shared memory.
static int find_segment(dl_phdr_info* library, size_t, void* found) {
  Shared& shared = *static_cast<Shared*>(found);
  const uintptr_t segment = reinterpret_cast<uintptr_t>(library->dlpi_tls_data);
  const auto* end = library->dlpi_phdr + library->dlpi_phnum;
  const auto* header = std::find_if(library->dlpi_phdr, end, [](const auto& h) { return h.p_type == PT_TLS; });
  if (header == end || segment == 0 || shared.dynamic - segment >= header->p_memsz) return 0;
  shared.begin = segment;
  shared.bytes = header->p_memsz;
  return 1;
}

Shared::Shared(size_t dynamic_bytes)
    : dynamic(reinterpret_cast<uintptr_t>(spade::cuda::spade_shared)), dynamic_bytes(dynamic_bytes) {
  dl_iterate_phdr(find_segment, this);
}

void Shared::fill() const {
  const auto fill_bytes = [](uintptr_t from, uintptr_t to) {
    std::memset(reinterpret_cast<void*>(from), 0xff, to - from);
  };
  fill_bytes(begin, dynamic + dynamic_bytes);
  fill_bytes(dynamic + kMostDynamic, begin + bytes);
}

}  // namespace simt

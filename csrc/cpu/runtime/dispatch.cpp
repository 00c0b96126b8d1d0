#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace spade {
namespace generic {
const Kernels& table();
}
#ifdef __x86_64__
namespace avx2 {
const Kernels& table();
}
namespace avx512 {
const Kernels& table();
}
#endif

namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found{&generic::table()};
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&avx2::table());
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
      found.push_back(&avx512::table());
    }
  }
#endif
  return found;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> chosen{supported().back()};
  return chosen;
}

}  // namespace

const Kernels& kernels() {
  return *active().load(std::memory_order_relaxed);
}

bool has_bf16([[maybe_unused]] const Kernels& in_use) {
#ifdef __x86_64__
  return in_use.gram_product_bf16 != nullptr && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const Kernels* k : supported()) names.push_back(k->name);
  return names;
}

void set_simd_level(const std::string& name) {
  for (const Kernels* k : supported()) {
    if (name == k->name) {
      active() = k;
      return;
    }
  }
  std::string known;
  for (const std::string& level : simd_levels()) known += (known.empty() ? "" : ", ") + level;
  throw std::invalid_argument("instruction set '" + name + "' is not available here; available: " + known);
}

}  // namespace spade

// Runs every kernel of every instruction set on awkward sizes in exactly sized heap blocks, for AddressSanitizer and
// UBSan. Exit code 0 and "ok" if nothing was reported and all results are finite.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "../../csrc/cpu/runtime/dispatch.h"

namespace {

std::mt19937 generator(7);

template <class T>
class Block {  // exactly `values` values, 64-byte aligned, so that one value too many is seen
 public:
  explicit Block(int64_t values) : data_(static_cast<T*>(std::aligned_alloc(64, (values * sizeof(T) + 63) / 64 * 64))) {
    std::memset(data_, 0xff, values * sizeof(T));
  }
  ~Block() {
    std::free(data_);
  }
  T* data() {
    return data_;
  }

 private:
  T* data_;
};

template <class T>
std::vector<T> random_values(int64_t n) {
  std::normal_distribution<double> normal;
  std::vector<T> v(n);
  for (T& x : v) x = static_cast<T>(normal(generator));
  return v;
}

// A symmetric positive definite matrix that is its own inverse's stand-in: diagonally dominant.
template <class T>
std::vector<T> positive_definite(int64_t n) {
  std::vector<T> a = random_values<T>(n * n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) a[i * n + j] = a[j * n + i] = a[i * n + j] / (4 * n);
    a[i * n + i] = 1 + std::abs(a[i * n + i]);
  }
  return a;
}

template <class T>
void expect_finite(const std::vector<T>& v, const char* what) {
  for (T x : v) {
    if (!std::isfinite(x)) {
      std::printf("%s: not finite\n", what);
      std::exit(1);
    }
  }
}

template <class T>
void paths(const spade::KernelTable<T>& table, int64_t count, int64_t block, int64_t n, int64_t m) {
  const int64_t columns = count * block;
  const int64_t steps = m > 0 ? count / m * n : count;
  const std::vector<T> hinv = positive_definite<T>(columns);
  const std::vector<T> weight = random_values<T>(columns);
  std::vector<int32_t> order(steps);
  std::vector<T> losses(steps);
  Block<T> workspace(table.obs_path_workspace(count, block));
  table.obs_path(
      {count, block, steps, n, m, hinv.data(), weight.data(), order.data(), losses.data(), workspace.data()});
  expect_finite(losses, "obs_path");
  std::vector<bool> seen(count);
  for (int32_t k : order) {
    if (k < 0 || k >= count || seen[k]) {
      std::printf("obs_path: order is not a permutation\n");
      std::exit(1);
    }
    seen[k] = true;
  }
}

constexpr spade::Parallel kSerial{[](int64_t count, void* context, void (*work)(void*, int64_t)) {
  for (int64_t i = count - 1; i >= 0; --i) work(context, i);
}};

template <class T>
void factors(const spade::KernelTable<T>& table, int64_t columns) {
  const std::vector<T> hessian = positive_definite<T>(columns);
  std::vector<T> factor(columns * columns);
  Block<T> workspace(table.reversed_workspace(columns));
  for (auto kernel : {table.inverse_cholesky, table.reverse_cholesky}) {
    std::fill(factor.begin(), factor.end(), std::nan(""));
    if (kernel({columns, hessian.data(), T(0.1), factor.data(), workspace.data()}, kSerial) != 0) std::exit(1);
    expect_finite(factor, "inverse_cholesky or reverse_cholesky");
  }
}

template <class T>
void solutions(const spade::KernelTable<T>& table, int64_t columns, const std::vector<int64_t>& removed) {
  const std::vector<T> hessian = positive_definite<T>(columns);
  const std::vector<T> weight = random_values<T>(columns);
  std::vector<int32_t> order(columns);
  for (int64_t i = 0; i < columns; ++i) order[i] = static_cast<int32_t>(columns % 7 == 0 ? i : (i * 7 + 3) % columns);
  const int64_t levels = static_cast<int64_t>(removed.size());
  std::vector<std::vector<T>> pruned(levels, std::vector<T>(columns, std::nan("")));
  std::vector<T*> out;
  for (std::vector<T>& one : pruned) out.push_back(one.data());
  Block<T> workspace(table.obs_solution_workspace(columns, levels, removed.data()));
  const bool solved = table.obs_solution({columns, levels, removed.data(), order.data(), hessian.data(), hessian.data(),
                                          weight.data(), out.data(), workspace.data()});
  if (!solved) std::exit(1);
  for (const std::vector<T>& one : pruned) expect_finite(one, "obs_solution");
}

template <class T>
void sweeps(const spade::KernelTable<T>& table, int64_t rows, int64_t columns, int64_t mask_block, int64_t n, int64_t m,
            bool keep_zeros, bool of_inverse) {
  std::vector<T> factor = positive_definite<T>(columns);
  const int64_t stride = table.sparsegpt_stride(rows);
  std::vector<T> weight(columns * stride, T(0));
  for (int64_t c = 0; c < columns; ++c) {
    const std::vector<T> column = random_values<T>(rows);
    std::copy(column.begin(), column.end(), weight.begin() + c * stride);
  }
  std::vector<uint8_t> zeros(columns * rows);
  for (int64_t i = 0; i < columns * rows; i += 5) {
    zeros[i] = 1;
    weight[i / rows * stride + i % rows] = T(0);
  }
  std::vector<int64_t> counts((columns + mask_block - 1) / mask_block);
  for (size_t i = 0; i < counts.size(); ++i) {
    counts[i] = rows * (std::min<int64_t>(columns, (i + 1) * mask_block) - i * mask_block) / 2;
  }
  std::vector<T> losses(rows, T(0));
  std::vector<T> sums(columns * stride, T(0));
  Block<T> workspace(table.sparsegpt_workspace(rows, mask_block));
  const spade::SparseGptTask<T> task = {rows,
                                        columns,
                                        stride,
                                        mask_block,
                                        n,
                                        m,
                                        false,
                                        keep_zeros ? zeros.data() : nullptr,
                                        counts.data(),
                                        factor.data(),
                                        of_inverse ? nullptr : sums.data(),
                                        weight.data(),
                                        losses.data(),
                                        workspace.data()};
  for (int64_t begin = 0; begin < columns;) {
    const int64_t end = table.sparsegpt_panel_end(columns, mask_block, begin);
    table.sparsegpt_panel(task, begin, end);
    const int64_t middle = end + (columns - end) / 3;
    for (auto [first, last] : {std::pair{end, middle}, std::pair{middle, columns}}) {
      if (first == last) continue;
      Block<T> packed(table.sparsegpt_trailing_workspace(last - first));
      table.sparsegpt_trailing(task, begin, end, first, last, packed.data());
    }
    begin = end;
  }
  expect_finite(weight, "sparsegpt");
}

template <class T>
void all(const spade::KernelTable<T>& table) {
  for (int64_t count : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 200}) paths(table, count, 1, 0, 0);
  for (int64_t block : {2, 3, 9, 25, 49, 70}) {
    for (int64_t count : {1, 2, 5, 17}) paths(table, count, block, 0, 0);
  }
  for (int64_t groups : {1, 3, 40}) {
    paths(table, 4 * groups, 1, 2, 4);
    paths(table, 8 * groups, 1, 4, 8);
  }
  for (int64_t columns : {1, 2, 5, 9, 16, 17, 33, 100, 150}) {
    const std::vector<int64_t> removed{0, columns / 3, columns / 2, columns - 1, columns};
    for (int64_t one : removed) solutions<T>(table, columns, {one});
    solutions<T>(table, columns, removed);
    solutions<T>(table, columns, {});
  }
  for (int64_t columns : {1, 2, 11, 12, 13, 31, 33, 95, 96, 97, 200, 300}) factors(table, columns);
  for (int64_t rows : {1, 2, 7, 16, 33}) {
    for (int64_t columns : {1, 3, 9, 17, 130, 260}) {
      for (int64_t mask_block : {1, 2, 9, 140, 300})
        for (bool keep_zeros : {false, true}) {
          sweeps(table, rows, columns, std::min(mask_block, columns), 0, 0, keep_zeros, true);
          if (mask_block == 140 && columns > mask_block) continue;
          sweeps(table, rows, columns, std::min(mask_block, columns), 0, 0, keep_zeros, false);
        }
    }
    for (bool keep_zeros : {false, true}) {
      for (bool of_inverse : {false, true}) sweeps(table, rows, 136, 4, 2, 4, keep_zeros, of_inverse);
    }
  }
}

}  // namespace

int main() {
  for (const std::string& level : spade::simd_levels()) {
    spade::set_simd_level(level);
    all(spade::kernels().f32);
    all(spade::kernels().f64);
  }
  std::printf("ok\n");
  return 0;
}

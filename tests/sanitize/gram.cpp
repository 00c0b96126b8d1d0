// Runs the Gram methods of every instruction set on awkward geometries in exactly sized heap blocks, on three threads,
// for the sanitizers, and compares them with sums over im2col in plain loops. Exit code 0 and "ok" if all is well.
#include "../../csrc/cpu/gram/problem.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/runtime/dispatch.h"

namespace {

using spade::Axis;

struct Layout {
  const char* name;
  bool channels_last;
  int64_t gap;  // values between neighbouring columns, beyond the dense layout
};

template <class T>
struct Batch {
  std::vector<T> values;
  spade::GramSource<T> source;

  Batch(int64_t images, int64_t channels, int64_t height, int64_t width, const Layout& layout,
        std::mt19937& generator) {
    const int64_t column = (layout.channels_last ? channels : 1) + layout.gap;
    const int64_t line = width * column;
    const int64_t channel = layout.channels_last ? 1 : height * line;
    const int64_t image = layout.channels_last ? height * line : channels * channel;
    const int64_t last = (images - 1) * image + (channels - 1) * channel + (height - 1) * line + (width - 1) * column;
    std::normal_distribution<double> normal;
    values.resize(last + 1);
    for (T& value : values) value = static_cast<T>(normal(generator));
    values.shrink_to_fit();
    const int64_t partner = last + 1;  // means nothing where values are not in pairs
    source = {values.data(), image, line, column, channel, partner};
  }

  double at(int64_t image, int64_t channel, int64_t y, int64_t x) const {
    return source.data[image * source.image + channel * source.channel + y * source.line + x * source.column];
  }
};

template <class T>
void check(int64_t samples, int64_t images, int64_t groups, int64_t channels, Axis rows, Axis columns,
           const Layout& layout) {
  std::mt19937 generator(5);
  const Batch<T> batch(samples * images, groups * channels, rows.size, columns.size, layout, generator);
  const int64_t size = rows.kernel * columns.kernel * channels;
  std::vector<T> gram(samples * groups * size * size, T(0));
  spade::add_gram<T>(
      {gram.data(), batch.source, images * batch.source.image, samples, images, groups, channels, rows, columns});
  std::vector<double> truth(gram.size());
  std::vector<double> column(size);
  for (int64_t m = 0; m < samples * groups; ++m) {
    double* matrix = truth.data() + m * size * size;
    for (int64_t p = 0; p < images * rows.outputs() * columns.outputs(); ++p) {
      const int64_t image = m / groups * images + p / (rows.outputs() * columns.outputs());
      const int64_t top = p / columns.outputs() % rows.outputs() * rows.stride - rows.padding;
      const int64_t left = p % columns.outputs() * columns.stride - columns.padding;
      for (int64_t k = 0; k < size; ++k) {
        const int64_t tap = k / channels;
        const int64_t y = top + tap / columns.kernel * rows.dilation;
        const int64_t x = left + tap % columns.kernel * columns.dilation;
        const bool inside = y >= 0 && y < rows.size && x >= 0 && x < columns.size;
        column[k] = inside ? batch.at(image, m % groups * channels + k % channels, y, x) : 0;
      }
      for (int64_t i = 0; i < size; ++i) {
        for (int64_t j = i; j < size; ++j) matrix[i * size + j] += column[i] * column[j];
      }
    }
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = i; j < size; ++j) {
        const double found = gram[(m * size + i) * size + j];
        const double bound = (sizeof(T) == 4 ? 1e-5 : 1e-13) * (1 + matrix[i * size + i] + matrix[j * size + j]);
        if (std::abs(found - matrix[i * size + j]) <= bound) continue;
        std::printf("%s, %zu bytes, groups %ld, channels %ld, entry %ld %ld: %g, expected %g\n", layout.name, sizeof(T),
                    static_cast<long>(groups), static_cast<long>(channels), static_cast<long>(i), static_cast<long>(j),
                    found, matrix[i * size + j]);
        std::exit(1);
      }
    }
  }
}

template <class T>
void all() {
  for (const Layout& layout :
       {Layout{"nchw", false, 0}, {"strided nchw", false, 2}, {"nhwc", true, 0}, {"strided nhwc", true, 3}}) {
    for (int64_t channels : {1, 3, 7, 16, 17, 33, 70}) {
      check<T>(2, 2, 1, channels, {5, 3, 1, 1, 1}, {6, 3, 1, 1, 1}, layout);
      check<T>(1, 3, 1, channels, {1, 1, 1, 0, 1}, {37, 1, 1, 0, 1}, layout);
    }
    check<T>(1, 2, 1, 24, {8, 3, 2, 1, 1}, {7, 3, 2, 1, 2}, layout);
    check<T>(1, 1, 1, 20, {2, 1, 1, 0, 1}, {600, 3, 1, 1, 1}, layout);
    check<T>(1, 1, 1, 400, {2, 1, 1, 0, 1}, {9, 1, 1, 0, 1}, layout);
    check<T>(1, 2, 1, 3, {21, 7, 2, 3, 1}, {20, 7, 2, 3, 1}, layout);
    check<T>(1, 2, 1, 2, {9, 3, 2, 2, 2}, {9, 4, 3, 2, 2}, layout);
    for (int64_t groups : {2, 9, 33, 70}) {
      check<T>(2, 3, groups, 1, {6, 3, 1, 1, 1}, {7, 5, 1, 2, 1}, layout);
      check<T>(1, 2, groups, 1, {7, 3, 2, 1, 1}, {9, 3, 2, 1, 1}, layout);
      for (int64_t channels : {2, 3, 4, 5, 8})
        check<T>(1, 2, groups, channels, {4, 2, 1, 0, 1}, {6, 3, 1, 1, 1}, layout);
    }
    check<T>(1, 1, 20, 1, {2, 1, 1, 0, 1}, {2500, 3, 1, 1, 1}, layout);
  }
}

}  // namespace

int main() {
  for (const std::string& level : spade::simd_levels()) {
    spade::set_simd_level(level);
    all<float>();
    all<double>();
  }
  std::printf("ok\n");
  return 0;
}

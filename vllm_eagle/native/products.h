#pragma once

// Sums of products: a few rows of numbers against runs of numbers that lie side by side, as many as the CPU has registers for.
//
// Float32 numbers anywhere; pairs of bfloat16 numbers where the CPU adds the products of a pair to a float32 in one instruction.

#include "runs.h"

#if defined(__AVX512F__)
constexpr int64_t LANES = 16, MOST_VECTORS = 4;  // float32 numbers of a register, and registers of a row's sums
#elif defined(__AVX__)
constexpr int64_t LANES = 8, MOST_VECTORS = 2;
#else
constexpr int64_t LANES = 4, MOST_VECTORS = 2;
#endif
constexpr int64_t ROWS = 6;  // rows that go together
constexpr int64_t RUN = 16;  // columns that lie side by side, at least
constexpr int64_t PAD = 32;  // columns are padded to a multiple of this

typedef float Floats __attribute__((vector_size(4 * LANES)));

// Numbers by depth and column. 16 columns lie side by side; the same of the next depth lie `deeper` on, the next 16 `across` on.
template <typename Number>
struct Runs {
  const Number* at;
  int64_t deeper, across;
};

inline Floats add_product(Floats sum, float factor, const float* run) {
  Floats numbers;
  std::memcpy(&numbers, run, sizeof numbers);
  return sum + factor * numbers;
}

#ifdef __AVX512BF16__
inline Floats add_product(Floats sum, Pair factor, const Pair* run) {
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(factor), (__m512bh)_mm512_loadu_si512(run));
}
#endif

// out[r][n] = out[r][n] * keep[r] + the sum of rows[r][k] * columns[k][n] over `depth` k, for ROWS r; without `keep` just the sum.
// A row may be the sum of PARTS rows, `next_part` apart.
template <int64_t VECTORS, int64_t PARTS, typename Number>
inline void multiply(const Number* rows, int64_t stride, int64_t next_part, Runs<Number> columns, int64_t depth, float* out,
                     int64_t out_stride, const float* keep) {
  Floats sums[ROWS][VECTORS] = {};
  for (int64_t part = 0; part < PARTS; ++part, rows += next_part) {
    for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 8
      for (int64_t v = 0; v < VECTORS; ++v) {
        const Number* run = columns.at + k * columns.deeper + v * LANES / RUN * columns.across + v * LANES % RUN;
#pragma GCC unroll 8
        for (int64_t r = 0; r < ROWS; ++r) sums[r][v] = add_product(sums[r][v], rows[r * stride + k], run);
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < VECTORS; ++v) {
      float* to = out + r * out_stride + v * LANES;
      if (keep != nullptr) sums[r][v] = add_product(sums[r][v], keep[r], to);
      std::memcpy(to, &sums[r][v], sizeof(Floats));
    }
  }
}

// The same for the first `count` columns, rounded up to PAD.
template <int64_t PARTS, typename Number>
inline void multiply_all(const Number* rows, int64_t stride, int64_t next_part, Runs<Number> columns, int64_t depth, int64_t count,
                         float* out, int64_t out_stride, const float* keep) {
  const auto step = [&]<int64_t VECTORS>(int64_t n) {
    const Runs<Number> from{columns.at + n / RUN * columns.across + n % RUN, columns.deeper, columns.across};
    multiply<VECTORS, PARTS>(rows, stride, next_part, from, depth, out + n, out_stride, keep);
    return n + VECTORS * LANES;
  };
  for (int64_t n = 0; n < count;) {
    const int64_t left = (count - n + LANES - 1) / LANES;
    if (MOST_VECTORS == 2 || left <= 2)
      n = step.template operator()<2>(n);
    else if (left == 3)
      n = step.template operator()<3>(n);
    else
      n = step.template operator()<MOST_VECTORS>(n);
  }
}

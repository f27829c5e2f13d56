#pragma once

// Rows of queries see a tile of keys and values: softmax with a running maximum.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "exp.h"
#include "tile.h"

constexpr float NEVER = -std::numeric_limits<float>::infinity();

// What the query rows of one head of keys have gathered so far.
template <typename Number>
struct Rows {
  int64_t first = 0, asked = 0;  // of all rows of that head
  int64_t count = 0;             // `asked`, rounded up to ROWS; the rest counts for nothing
  int64_t depth = 0, width = 0;
  std::vector<Number> queries;   // [count, depth]
  std::vector<float> sums;       // [count, width]
  std::vector<float> most;       // [count] greatest score
  std::vector<float> weights;    // [count, RUN] sums of exp(score - most)

  void start(int64_t first_row, int64_t rows, int64_t query_depth, int64_t value_width) {
    first = first_row, asked = rows, count = (rows + ROWS - 1) / ROWS * ROWS, depth = query_depth, width = value_width;
    queries.resize(count * depth);
    sums.assign(count * width, 0.0f);
    most.assign(count, NEVER);
    weights.assign(count * RUN, 0.0f);
  }

  float weight(int64_t r) const { return std::accumulate(&weights[r * RUN], &weights[r * RUN] + RUN, 0.0f); }
};

// tanh(x), to about 3e-7 of it. The exponential cancels where x is small: there a series.
[[gnu::always_inline]] inline float tanh_of(float x) {
  const float square = x * x;
  const float series = x * (1.0f - square * (1.0f / 3 - square * (2.0f / 15 - square * (17.0f / 315))));
  const float shrunk = exp_of(-2.0f * std::abs(x));
  const float found = std::copysign((1.0f - shrunk) / (1.0f + shrunk), x);
  return square < 0.04f ? series : found;
}

inline float greater(float a, float b) { return a > b ? a : b; }

// Let ROWS rows see `count` keys: leaves exp(score - most) in place of their scores, and zero from there up to PADDED.
template <int64_t PADDED, typename Number>
inline void weigh(Rows<Number>& rows, int64_t first, float (&scores)[ROWS][TILE], int64_t count, const char* visible,
                  int64_t stride, int64_t group, float scale, float soft_cap, float (&shrink)[ROWS]) {
  float *most = &rows.most[first], before[ROWS];
  for (int64_t r = 0; r < ROWS; ++r) {
    float* score = scores[r];
    if (soft_cap > 0) {
#pragma omp simd
      for (int64_t t = 0; t < PADDED; ++t) score[t] = soft_cap * tanh_of(score[t] * scale / soft_cap);
    } else if (scale != 1.0f) {
#pragma omp simd
      for (int64_t t = 0; t < PADDED; ++t) score[t] *= scale;
    }
    if (visible != nullptr) {
      const char* sees = visible + (rows.first + std::min(first + r, rows.asked - 1)) / group * stride;
#pragma omp simd
      for (int64_t t = 0; t < PADDED; ++t) score[t] = sees[t] ? score[t] : NEVER;
    } else if (count < PADDED) {
      const int32_t end = static_cast<int32_t>(count);
#pragma omp simd
      for (int32_t t = 0; t < PADDED; ++t) score[t] = t < end ? score[t] : NEVER;
    }
    float greatest[PADDED / 2];
#pragma omp simd
    for (int64_t t = 0; t < PADDED / 2; ++t) greatest[t] = greater(score[t], score[t + PADDED / 2]);
#pragma GCC unroll 8
    for (int64_t step = PADDED / 4; step > 0; step /= 2)
      for (int64_t t = 0; t < step; ++t) greatest[t] = greater(greatest[t], greatest[t + step]);
    before[r] = most[r];
    most[r] = std::max(most[r], greatest[0]);
  }
  for (int64_t r = 0; r < ROWS; ++r) shrink[r] = before[r] == most[r] ? 1.0f : exp_of(before[r] - most[r]);
  for (int64_t r = 0; r < ROWS; ++r) {
    float *score = scores[r], *weights = &rows.weights[(first + r) * RUN];
    const float from = most[r] == NEVER ? 0.0f : most[r];
#pragma omp simd
    for (int64_t t = 0; t < PADDED; ++t) score[t] = exp_of(score[t] - from);
#pragma omp simd
    for (int64_t i = 0; i < RUN; ++i) {
      float sum = weights[i] * shrink[r];
#pragma GCC unroll 8
      for (int64_t t = 0; t < PADDED; t += RUN) sum += score[t + i];
      weights[i] = sum;
    }
  }
}

// Add the values by weight.
inline void add_values(const FloatTile& tile, const float (&weights)[ROWS][TILE], float* sums, int64_t width, const float* shrink) {
  multiply_all<1>(weights[0], TILE, 0, tile.values, tile.count, width, sums, width, shrink);
}

#ifdef __AVX512BF16__
// A weight is the sum of two bfloat16 numbers, which leaves 1 / 2^17 of it at most, or rounded to one.
inline void add_values(const PairTile& tile, const float (&weights)[ROWS][TILE], float* sums, int64_t width, const float* shrink) {
  alignas(64) uint16_t parts[2][ROWS][TILE];
  for (int64_t r = 0; r < ROWS; ++r) {
#pragma omp simd
    for (int64_t t = 0; t < TILE; ++t) {
      const uint32_t bits = std::bit_cast<uint32_t>(weights[r][t]);
      const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
      parts[0][r][t] = rounded >> 16;
      const uint32_t rest = std::bit_cast<uint32_t>(weights[r][t] - std::bit_cast<float>(rounded & 0xffff0000u));
      parts[1][r][t] = (rest + 0x8000) >> 16;
    }
  }
  const Pair* pairs = reinterpret_cast<const Pair*>(parts[0][0]);
  if (tile.rounds_weights)
    multiply_all<1>(pairs, TILE / 2, 0, tile.values, (tile.count + 1) / 2, width, sums, width, shrink);
  else
    multiply_all<2>(pairs, TILE / 2, ROWS * TILE / 2, tile.values, (tile.count + 1) / 2, width, sums, width, shrink);
}
#endif

// Let all rows see the tile. `visible`: of the tree's rows by key, `stride` apart; null if every key is visible.
template <typename Tile>
void attend(Rows<typename Tile::Number>& rows, const Tile& tile, const char* visible, int64_t stride, int64_t group, float scale,
            float soft_cap) {
  for (int64_t first = 0; first < rows.count; first += ROWS) {
    alignas(64) float scores[ROWS][TILE];
    float shrink[ROWS];
    multiply_all<1>(&rows.queries[first * rows.depth], rows.depth, 0, tile.keys, rows.depth, tile.count, scores[0], TILE, nullptr);
    const auto weigh_all = [&]<int64_t PADDED>() {
      weigh<PADDED>(rows, first, scores, tile.count, visible, stride, group, scale, soft_cap, shrink);
    };
    if (tile.count <= PAD)
      weigh_all.template operator()<PAD>();
    else if (tile.count <= TILE / 2)
      weigh_all.template operator()<TILE / 2>();
    else
      weigh_all.template operator()<TILE>();
    add_values(tile, scores, &rows.sums[first * rows.width], rows.width, shrink);
  }
}

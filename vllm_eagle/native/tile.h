#pragma once

// Keys and values of some tokens of one head as the products take them: as they lie in the cache, or unpacked beside it.

#include <algorithm>
#include <memory>
#include <vector>

#include "products.h"
#include "runs.h"

constexpr int64_t TILE = 128;  // tokens, at most

// How vLLM's kernels pack the keys and values of a block and head.
enum Packing : int64_t {
  BY_OFFSET = 0,  // in a way that only tables of offsets tell
  BY_ROW = 1,     // keys channel by channel, values token by token
  BY_PAIR = 2,    // keys in pairs of channels for 16 tokens, values in pairs of tokens for 16 channels
};

// Not set to anything: what stands beside the numbers of a tile is computed with, and then left out.
template <typename Number>
std::unique_ptr<Number[]> some(int64_t count) {
  return std::make_unique_for_overwrite<Number[]>(count);
}

// to[k * TILE + t] = rows[t][k]: by way of squares, since rows far apart share places in the cache.
template <typename Number, typename Read>
inline void transpose(Number* to, int64_t tokens, int64_t depth, Read read) {
  for (int64_t t = 0; t < tokens; t += RUN) {
    for (int64_t k = 0; k < depth; k += RUN) {
      Number square[RUN][RUN];
      for (int64_t i = 0; i < std::min(RUN, tokens - t); ++i) read(t + i, k, std::min(RUN, depth - k), square[i]);
      for (int64_t j = 0; j < std::min(RUN, depth - k); ++j)
        for (int64_t i = 0; i < RUN; ++i) to[(k + j) * TILE + t + i] = square[i][j];
    }
  }
}

// Where the tokens of one block and head lie in the cache, and where those of the tree.
template <typename T>
struct Block {
  const T *keys, *values;
  int64_t size, head_dim;
  Packing packing;
  const int *key_offsets, *value_offsets;  // [size, head_dim] each

  // Whether the products may read on from these tokens to the next multiple of PAD.
  bool holds(int64_t start, int64_t tokens) const { return start % RUN == 0 && start + (tokens + PAD - 1) / PAD * PAD <= size; }
};

template <typename T>
struct Own {
  const T *keys, *values;
  int64_t key_stride, value_stride;  // from token to token
  int64_t head_dim;
};

// In float32.
struct FloatTile {
  using Number = float;
  static constexpr int64_t TOGETHER = 1;  // numbers in one Number
  FloatTile(int64_t width, Packing) : width(width), own_keys(some<float>(width * TILE)), own_values(some<float>(TILE * width)) {}

  Runs<float> keys, values;
  int64_t count = 0;

  template <typename T>
  void read(const Block<T>& block, int64_t start, int64_t tokens) {
    use_own(tokens);
    const int64_t dim = block.head_dim;
    if constexpr (std::is_same_v<T, float>) {
      if (block.packing == BY_ROW && block.holds(start, tokens) && dim == width) {  // as they lie
        keys = {block.keys + start, block.size, RUN};
        values = {block.values + start * dim, dim, RUN};
        return;
      }
    }
    if (block.packing == BY_ROW) {
      for (int64_t c = 0; c < dim; ++c) unpack_run(block.keys + c * block.size + start, &own_keys[c * TILE], tokens);
      for (int64_t t = 0; t < tokens; ++t) unpack_run(block.values + (start + t) * dim, &own_values[t * width], dim);
    } else if (block.packing == BY_PAIR && block.holds(start, tokens)) {
      if constexpr (std::is_same_v<T, c10::BFloat16>) read_pairs(block, start, tokens);  // else never so packed
    } else {
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t c = 0; c < dim; ++c) {
          own_keys[c * TILE + t] = static_cast<float>(block.keys[block.key_offsets[(start + t) * dim + c]]);
          own_values[t * width + c] = static_cast<float>(block.values[block.value_offsets[(start + t) * dim + c]]);
        }
      }
    }
  }

  template <typename T>
  void read(const Own<T>& from, int64_t start, int64_t tokens) {
    use_own(tokens);
    transpose(own_keys.get(), tokens, from.head_dim, [&](int64_t t, int64_t c, int64_t channels, float* to) {
      unpack_run(from.keys + (start + t) * from.key_stride + c, to, channels);
    });
    for (int64_t t = 0; t < tokens; ++t)
      unpack_run(from.values + (start + t) * from.value_stride, &own_values[t * width], from.head_dim);
  }

 private:
  template <typename T>
  void read_pairs(const Block<T>& block, int64_t start, int64_t tokens) {
    const int64_t dim = block.head_dim;
    const Pair *key_pairs = reinterpret_cast<const Pair*>(block.keys), *value_pairs = reinterpret_cast<const Pair*>(block.values);
    for (int64_t t = 0; t < tokens; t += RUN) {
      for (int64_t c = 0; c < dim; c += 2) {
        const Pair* run = key_pairs + (start + t) / 2 * dim + c / 2 * RUN;
        part_run(run, &own_keys[c * TILE + t], &own_keys[(c + 1) * TILE + t], RUN);
      }
    }
    for (int64_t c = 0; c < dim; c += RUN) {
      for (int64_t t = 0; t < tokens; t += 2) {
        const Pair* run = value_pairs + c / 2 * block.size + (start + t) / 2 * RUN;
        part_run(run, &own_values[t * width + c], &own_values[(t + 1) * width + c], RUN);
      }
    }
  }

  void use_own(int64_t tokens) {
    count = tokens;
    keys = {own_keys.get(), TILE, RUN};
    values = {own_values.get(), width, RUN};
  }

  int64_t width;                        // channels, rounded up to PAD
  std::unique_ptr<float[]> own_keys;    // [width, TILE]
  std::unique_ptr<float[]> own_values;  // [TILE, width]
};

#ifdef __AVX512BF16__
// In pairs of bfloat16 numbers. Of an odd number of tokens the last pair's second value is zero.
struct PairTile {
  using Number = Pair;
  static constexpr int64_t TOGETHER = 2;
  PairTile(int64_t width, Packing packing)
      : rounds_weights(packing == BY_PAIR), width(width), own_keys(some<Pair>(width / 2 * TILE)),
        own_values(some<Pair>(TILE / 2 * width)), zeros(width) {}

  Runs<Pair> keys, values;
  int64_t count = 0;
  bool rounds_weights;  // to bfloat16: as vLLM's kernel for AMX does, and its others do not

  void read(const Block<c10::BFloat16>& block, int64_t start, int64_t tokens) {
    use_own(tokens);
    const int64_t dim = block.head_dim;
    if (block.packing == BY_ROW) {
      for (int64_t c = 0; c < dim; c += 2) {
        const c10::BFloat16* run = block.keys + c * block.size + start;
        pair_runs(run, run + block.size, &own_keys[c / 2 * TILE], tokens);
      }
      pair_values(block.values + start * dim, dim, dim);
    } else if (block.packing == BY_PAIR && block.holds(start, tokens)) {
      read_pairs(block, start);
    } else {
      const auto pair = [](const c10::BFloat16* numbers, int first, int second) {
        return numbers[first].x | static_cast<Pair>(numbers[second].x) << 16;
      };
      for (int64_t t = 0; t < tokens; ++t) {
        const int *key_at = block.key_offsets + (start + t) * dim, *value_at = block.value_offsets + (start + t) * dim;
        for (int64_t k = 0; k < dim / 2; ++k) own_keys[k * TILE + t] = pair(block.keys, key_at[2 * k], key_at[2 * k + 1]);
        Pair* to = &own_values[t / 2 * width];
        for (int64_t c = 0; c < dim; ++c)
          to[c] = t % 2 ? to[c] | Pair(block.values[value_at[c]].x) << 16 : block.values[value_at[c]].x;
      }
    }
  }

  void read(const Own<c10::BFloat16>& from, int64_t start, int64_t tokens) {
    use_own(tokens);
    transpose(own_keys.get(), tokens, from.head_dim / 2, [&](int64_t t, int64_t k, int64_t pairs, Pair* to) {
      std::memcpy(to, from.keys + (start + t) * from.key_stride + 2 * k, pairs * sizeof(Pair));
    });
    pair_values(from.values + start * from.value_stride, from.value_stride, from.head_dim);
  }

 private:
  void use_own(int64_t tokens) {
    count = tokens;
    keys = {own_keys.get(), TILE, RUN};
    values = {own_values.get(), width, RUN};
  }

  void pair_values(const c10::BFloat16* from, int64_t stride, int64_t dim) {
    for (int64_t t = 0; t < count; t += 2) {
      const c10::BFloat16* first = from + t * stride;
      pair_runs(first, t + 1 < count ? first + stride : zeros.data(), &own_values[t / 2 * width], dim);
    }
  }

  // As they lie, but for a last pair without a second value: what stands there is not of this request.
  void read_pairs(const Block<c10::BFloat16>& block, int64_t start) {
    const int64_t dim = block.head_dim;
    keys = {reinterpret_cast<const Pair*>(block.keys) + start / 2 * dim, RUN, RUN / 2 * dim};
    const Runs<Pair> packed{reinterpret_cast<const Pair*>(block.values) + start / 2 * RUN, RUN, RUN / 2 * block.size};
    if (count % 2 == 0 && dim == width) {
      values = packed;
      return;
    }
    for (int64_t t = 0; t < count; t += 2) {
      for (int64_t c = 0; c < dim; c += RUN) {
        const Pair* run = packed.at + c / RUN * packed.across + t / 2 * RUN;
        for (int64_t i = 0; i < RUN; ++i) own_values[t / 2 * width + c + i] = t + 1 < count ? run[i] : run[i] & 0xffffu;
      }
    }
  }

  int64_t width;                       // channels, rounded up to PAD
  std::unique_ptr<Pair[]> own_keys;    // [width / 2, TILE]
  std::unique_ptr<Pair[]> own_values;  // [TILE / 2, width]
  std::vector<c10::BFloat16> zeros;  // [width]
};
#endif

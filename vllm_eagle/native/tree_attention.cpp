// Attention from tree rows to a context in vLLM's paged CPU cache and to the keys of the tree itself, in float32.
//
// Softmax runs over tiles of 32 keys, with a running maximum (Milakov and Gimelshein 2018; FlashAttention, arXiv 2205.14135). A
// tile is unpacked once and used by all rows of the query heads that share it. Long contexts are cut into parts that threads share;
// parts are merged at the end (flash-decoding).
//
// With a sliding window a row at position p sees positions above p - window. Its position goes by depth: it is the context's length
// plus the keys of its own tree that it sees, less one; where these stand goes by the same count.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "exp.h"

namespace {

constexpr int64_t TILE = 32;  // keys
constexpr int64_t ROWS = 6;   // query rows computed together
constexpr int64_t LANES = 32; // channels of the output computed together
constexpr int64_t PART = 512; // context tokens of a part, at least
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// One tile of keys and values, unpacked. Keys lie channel by channel, so that a row's scores of all keys grow side by side.
struct Tile {
  explicit Tile(int64_t width) : width(width), keys(width * TILE), values(TILE * width) {}
  int64_t width;  // channels, rounded up to LANES; the rest stays zero
  int64_t count = 0;
  std::vector<float> keys;    // [width, TILE]
  std::vector<float> values;  // [TILE, width]
};

// What the query rows of one head of keys have gathered so far.
struct Rows {
  Rows(int64_t count, int64_t width)
      : asked(count), count((count + ROWS - 1) / ROWS * ROWS), width(width), queries(this->count * width),
        sums(this->count * width), most(this->count, NEVER), weights(this->count, 0.0f) {}
  int64_t asked, count, width;  // `count` is `asked`, rounded up to ROWS; the rest counts for nothing
  std::vector<float> queries;  // [count, width], scaled
  std::vector<float> sums;     // [count, width]
  std::vector<float> most;     // [count] greatest score
  std::vector<float> weights;  // [count] sum of exp(score - most)
};

// tanh(x), to about 3e-7 of it. The exponential cancels where x is small: there a series.
inline float tanh_of(float x) {
  const float square = x * x;
  const float series = x * (1.0f - square * (1.0f / 3 - square * (2.0f / 15 - square * (17.0f / 315))));
  const float shrunk = exp_of(-2.0f * std::abs(x));
  const float found = std::copysign((1.0f - shrunk) / (1.0f + shrunk), x);
  return square < 0.04f ? series : found;
}

// Let all rows see the tile. `visible`: of the tree's rows by key, `stride` apart; null if every key is visible.
void attend(Rows& rows, const Tile& tile, const bool* visible, int64_t stride, int64_t group, float soft_cap) {
  const int64_t width = rows.width, count = tile.count;
  for (int64_t first = 0; first < rows.count; first += ROWS) {
    float scores[ROWS][TILE] = {};
    const float* query = &rows.queries[first * width];
    for (int64_t c = 0; c < width; ++c) {
      const float* key = &tile.keys[c * TILE];
      for (int64_t r = 0; r < ROWS; ++r) {
#pragma omp simd
        for (int64_t t = 0; t < TILE; ++t) scores[r][t] += query[r * width + c] * key[t];
      }
    }
    for (int64_t r = 0; r < ROWS; ++r) {
      if (soft_cap > 0) {
#pragma omp simd
        for (int64_t t = 0; t < TILE; ++t) scores[r][t] = soft_cap * tanh_of(scores[r][t] / soft_cap);
      }
      if (visible != nullptr) {
        const bool* sees = visible + std::min(first + r, rows.asked - 1) / group * stride;
        for (int64_t t = 0; t < count; ++t) scores[r][t] = sees[t] ? scores[r][t] : NEVER;
      }
      for (int64_t t = count; t < TILE; ++t) scores[r][t] = NEVER;
      float most = rows.most[first + r];
#pragma omp simd reduction(max : most)
      for (int64_t t = 0; t < TILE; ++t) most = std::max(most, scores[r][t]);
      if (most == NEVER) {
        std::fill(scores[r], scores[r] + TILE, 0.0f);
        continue;
      }
      const float shrink = exp_of(rows.most[first + r] - most);
#pragma omp simd
      for (int64_t t = 0; t < TILE; ++t) scores[r][t] = exp_of(scores[r][t] - most);
      float halves[TILE / 2];  // added in pairs: one after the other they would wait for each other
      for (int64_t t = 0; t < TILE / 2; ++t) halves[t] = scores[r][t] + scores[r][t + TILE / 2];
      for (int64_t step = TILE / 4; step > 0; step /= 2)
        for (int64_t t = 0; t < step; ++t) halves[t] += halves[t + step];
      rows.weights[first + r] = rows.weights[first + r] * shrink + halves[0];
      rows.most[first + r] = most;
      if (shrink != 1.0f) {
        float* sum = &rows.sums[(first + r) * width];
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) sum[c] *= shrink;
      }
    }
    for (int64_t c = 0; c < width; c += LANES) {
      float sums[ROWS][LANES] = {};
      for (int64_t t = 0; t < count; ++t) {
        const float* value = &tile.values[t * width + c];
        for (int64_t r = 0; r < ROWS; ++r) {
#pragma omp simd
          for (int64_t lane = 0; lane < LANES; ++lane) sums[r][lane] += scores[r][t] * value[lane];
        }
      }
      for (int64_t r = 0; r < ROWS; ++r) {
        float* sum = &rows.sums[(first + r) * width + c];
#pragma omp simd
        for (int64_t lane = 0; lane < LANES; ++lane) sum[lane] += sums[r][lane];
      }
    }
  }
}

// Unpack tokens start .. start + count of one block and head. Offsets are null for the packing of vLLM's AVX kernels: keys channel
// by channel, values token by token.
template <typename T>
void unpack(Tile& tile, const T* keys, const T* values, const int* key_offsets, const int* value_offsets, int64_t start,
            int64_t count, int64_t block_size, int64_t head_dim) {
  tile.count = count;
  if (key_offsets == nullptr) {
    for (int64_t c = 0; c < head_dim; ++c)
      for (int64_t t = 0; t < count; ++t) tile.keys[c * TILE + t] = static_cast<float>(keys[c * block_size + start + t]);
  } else {
    for (int64_t t = 0; t < count; ++t)
      for (int64_t c = 0; c < head_dim; ++c)
        tile.keys[c * TILE + t] = static_cast<float>(keys[key_offsets[(start + t) * head_dim + c]]);
  }
  for (int64_t t = 0; t < count; ++t) {
    const int* offsets = value_offsets == nullptr ? nullptr : value_offsets + (start + t) * head_dim;
    const T* row = values + (start + t) * head_dim;
    float* to = &tile.values[t * tile.width];
    if (offsets == nullptr) {
      for (int64_t c = 0; c < head_dim; ++c) to[c] = static_cast<float>(row[c]);
    } else {
      for (int64_t c = 0; c < head_dim; ++c) to[c] = static_cast<float>(values[offsets[c]]);
    }
  }
}

template <typename T>
void run(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& kv_cache,
         const at::Tensor& key_offsets, const at::Tensor& value_offsets, const at::Tensor& block_table,
         const at::Tensor& context_lens, const at::Tensor& first_rows, const at::Tensor& num_rows, const at::Tensor& first_keys,
         const at::Tensor& num_keys, const at::Tensor& visible, double scale, double cap, int64_t window, const at::Tensor& sinks,
         at::Tensor& output) {
  const int64_t num_trees = first_rows.size(0), num_kv_heads = key.size(1), head_dim = query.size(2);
  const int64_t group = query.size(1) / num_kv_heads, block_size = kv_cache.size(2);
  const int64_t width = (head_dim + LANES - 1) / LANES * LANES;
  const T *queries = query.const_data_ptr<T>(), *tree_keys = key.const_data_ptr<T>(), *tree_values = value.const_data_ptr<T>();
  const T* cache = kv_cache.const_data_ptr<T>();
  T* out = output.mutable_data_ptr<T>();
  const int* key_at = key_offsets.numel() ? key_offsets.const_data_ptr<int>() : nullptr;
  const int* value_at = value_offsets.numel() ? value_offsets.const_data_ptr<int>() : nullptr;
  const int* blocks = block_table.const_data_ptr<int>();
  const int64_t *lens = context_lens.const_data_ptr<int64_t>(), *row_starts = first_rows.const_data_ptr<int64_t>();
  const int64_t *row_counts = num_rows.const_data_ptr<int64_t>(), *key_starts = first_keys.const_data_ptr<int64_t>();
  const int64_t* key_counts = num_keys.const_data_ptr<int64_t>();
  const bool* masks = visible.const_data_ptr<bool>();
  const float soft_cap = static_cast<float>(cap);
  const float* sink_of = sinks.numel() ? sinks.const_data_ptr<float>() : nullptr;

  // With a window: per tree what its rows see of its own keys, and per row the first position that it sees.
  std::vector<std::vector<char>> own_masks(window > 0 ? num_trees : 0);
  std::vector<std::vector<int64_t>> lowest(window > 0 ? num_trees : 0);
  std::vector<int64_t> seen_by_all(num_trees, 0);  // from here on every row sees the context
  for (int64_t i = 0; i < num_trees && window > 0; ++i) {
    own_masks[i].resize(row_counts[i] * key_counts[i]);
    for (int64_t r = 0; r < row_counts[i]; ++r) {
      const bool* sees = masks + i * visible.stride(0) + r * visible.stride(1);
      const int64_t depth = std::count(sees, sees + key_counts[i], true) - 1;
      int64_t nth = -1;
      for (int64_t k = 0; k < key_counts[i]; ++k) own_masks[i][r * key_counts[i] + k] = sees[k] && ++nth > depth - window;
      lowest[i].push_back(std::max<int64_t>(0, lens[i] + depth - window + 1));
      seen_by_all[i] = std::max(seen_by_all[i], lowest[i].back());
    }
  }

  // A part is a stretch of one tree's context; the last one also holds the tree's own keys.
  struct Part {
    int64_t tree, start, end;
    bool last, only;
  };
  int64_t total = 0;
  std::vector<int64_t> starts(num_trees, 0);  // what lies before is seen by no row
  for (int64_t i = 0; i < num_trees; ++i) {
    if (window > 0 && row_counts[i] > 0) starts[i] = std::min(lens[i], *std::min_element(lowest[i].begin(), lowest[i].end()));
    total += lens[i] - starts[i];
  }
  const int64_t share = total * num_kv_heads / std::max<int64_t>(1, 2 * at::get_num_threads());
  const int64_t length = std::max(PART, (share + TILE - 1) / TILE * TILE);
  std::vector<Part> parts;
  std::vector<int64_t> first_parts;
  for (int64_t i = 0; i < num_trees; ++i) {
    first_parts.push_back(static_cast<int64_t>(parts.size()));
    if (row_counts[i] == 0) continue;
    const bool only = starts[i] + length >= lens[i];
    for (int64_t start = starts[i]; start == starts[i] || start < lens[i]; start += length)
      parts.push_back({i, start, std::min(start + length, lens[i]), start + length >= lens[i], only});
  }
  first_parts.push_back(static_cast<int64_t>(parts.size()));

  // A sink takes its share of the weights and adds nothing.
  const auto write = [&](int64_t i, int64_t head, int64_t r, const float* sum, float weight, float most) {
    if (sink_of != nullptr) weight += std::exp(sink_of[head * group + r % group] - most);
    T* to = out + (row_starts[i] + r / group) * output.stride(0) + (head * group + r % group) * output.stride(1);
    for (int64_t c = 0; c < head_dim; ++c) to[c] = static_cast<T>(sum[c] / weight);
  };

  std::vector<Rows> gathered(parts.size() * num_kv_heads, Rows(0, width));
  at::parallel_for(0, static_cast<int64_t>(gathered.size()), 1, [&](int64_t begin, int64_t end) {
    Tile tile(width);
    std::vector<char> seen;
    for (int64_t item = begin; item < end; ++item) {
      const Part& part = parts[item / num_kv_heads];
      const int64_t head = item % num_kv_heads, i = part.tree;
      Rows& rows = gathered[item] = Rows(row_counts[i] * group, width);
      for (int64_t r = 0; r < row_counts[i] * group; ++r) {
        const T* from = queries + (row_starts[i] + r / group) * query.stride(0) + (head * group + r % group) * query.stride(1);
        for (int64_t c = 0; c < head_dim; ++c) rows.queries[r * width + c] = static_cast<float>(from[c]) * static_cast<float>(scale);
      }
      for (int64_t at = part.start; at < part.end;) {
        const int64_t within = at % block_size;
        const int64_t count = std::min({TILE, part.end - at, block_size - within});
        const T* block = cache + blocks[i * block_table.stride(0) + at / block_size] * kv_cache.stride(0) + head * kv_cache.stride(1);
        unpack(tile, block, block + block_size * head_dim, key_at, value_at, within, count, block_size, head_dim);
        const bool whole = seen_by_all[i] <= at;
        if (!whole) {
          seen.assign(row_counts[i] * TILE, 0);
          for (int64_t r = 0; r < row_counts[i]; ++r)
            for (int64_t t = 0; t < count; ++t) seen[r * TILE + t] = at + t >= lowest[i][r];
        }
        attend(rows, tile, whole ? nullptr : reinterpret_cast<const bool*>(seen.data()), TILE, group, soft_cap);
        at += count;
      }
      if (!part.last) continue;
      for (int64_t at = 0; at < key_counts[i]; at += TILE) {
        tile.count = std::min(TILE, key_counts[i] - at);
        for (int64_t t = 0; t < tile.count; ++t) {
          const T* k = tree_keys + (key_starts[i] + at + t) * key.stride(0) + head * key.stride(1);
          const T* v = tree_values + (key_starts[i] + at + t) * value.stride(0) + head * value.stride(1);
          for (int64_t c = 0; c < head_dim; ++c) {
            tile.keys[c * TILE + t] = static_cast<float>(k[c]);
            tile.values[t * width + c] = static_cast<float>(v[c]);
          }
        }
        if (window > 0)
          attend(rows, tile, reinterpret_cast<const bool*>(own_masks[i].data()) + at, key_counts[i], group, soft_cap);
        else
          attend(rows, tile, masks + i * visible.stride(0) + at, visible.stride(1), group, soft_cap);
      }
      if (part.only)
        for (int64_t r = 0; r < row_counts[i] * group; ++r) write(i, head, r, &rows.sums[r * width], rows.weights[r], rows.most[r]);
    }
  });

  // Few trees have more than one part; the others are done.
  std::vector<int64_t> cut;
  for (int64_t i = 0; i < num_trees; ++i)
    if (first_parts[i + 1] - first_parts[i] > 1) cut.push_back(i);
  if (cut.empty()) return;
  at::parallel_for(0, static_cast<int64_t>(cut.size()) * num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(width);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = cut[item / num_kv_heads], head = item % num_kv_heads;
      for (int64_t r = 0; r < row_counts[i] * group; ++r) {
        float most = NEVER, weight = 0.0f;
        for (int64_t p = first_parts[i]; p < first_parts[i + 1]; ++p) most = std::max(most, gathered[p * num_kv_heads + head].most[r]);
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int64_t p = first_parts[i]; p < first_parts[i + 1]; ++p) {
          const Rows& rows = gathered[p * num_kv_heads + head];
          const float share = std::exp(rows.most[r] - most);
          weight += share * rows.weights[r];
          for (int64_t c = 0; c < head_dim; ++c) sum[c] += share * rows.sums[r * width + c];
        }
        write(i, head, r, sum.data(), weight, most);
      }
    }
  });
}

void tree_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& kv_cache,
                    const at::Tensor& key_offsets, const at::Tensor& value_offsets, const at::Tensor& block_table,
                    const at::Tensor& context_lens, const at::Tensor& first_rows, const at::Tensor& num_rows,
                    const at::Tensor& first_keys, const at::Tensor& num_keys, const at::Tensor& visible, double scale,
                    double soft_cap, int64_t window, const at::Tensor& sinks, at::Tensor output) {
  TORCH_CHECK(kv_cache.scalar_type() == query.scalar_type(), "the KV cache holds another dtype than the query");
  TORCH_CHECK(query.stride(2) == 1 && key.stride(2) == 1 && value.stride(2) == 1 && output.stride(2) == 1 && visible.stride(2) == 1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "tree_attention", [&] {
    run<scalar_t>(query, key, value, kv_cache, key_offsets, value_offsets, block_table, context_lens, first_rows, num_rows,
                  first_keys, num_keys, visible, scale, soft_cap, window, sinks, output);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_eagle, library) {
  library.def(
      "tree_attention(Tensor query, Tensor key, Tensor value, Tensor kv_cache, Tensor key_offsets, Tensor value_offsets, "
      "Tensor block_table, Tensor context_lens, Tensor first_rows, Tensor num_rows, Tensor first_keys, Tensor num_keys, "
      "Tensor visible, float scale, float soft_cap, int window, Tensor sinks, Tensor(a!) output) -> ()");
}

TORCH_LIBRARY_IMPL(vllm_eagle, CPU, library) { library.impl("tree_attention", &tree_attention); }

// Attention from tree rows to a context in vLLM's paged CPU cache and to the keys of the tree itself.
//
// Softmax runs over tiles of 128 keys, with a running maximum (Milakov and Gimelshein 2018; FlashAttention, arXiv 2205.14135). A
// tile is read once and used by all rows of the query heads that share it. Sums are float32, and so are factors, but for bfloat16
// where the CPU multiplies pairs of it: a product of two is exact in float32. Long contexts are cut into parts that threads share;
// parts are merged at the end (flash-decoding).
//
// With a sliding window a row at position p sees positions above p - window. Its position goes by depth: it is the context's length
// plus the keys of its own tree that it sees, less one; where these stand goes by the same count.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <vector>

#include "attend.h"

namespace {

constexpr int64_t PART = 512;  // context tokens of a part, at least

inline void take_query(const c10::BFloat16* from, Pair* to, int64_t head_dim, float) { std::memcpy(to, from, 2 * head_dim); }

template <typename T>
void take_query(const T* from, float* to, int64_t head_dim, float scale) {
  unpack_run(from, to, head_dim);
#pragma omp simd
  for (int64_t c = 0; c < head_dim; ++c) to[c] *= scale;
}

template <typename T, typename Tile>
void run(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& kv_cache,
         const at::Tensor& key_offsets, const at::Tensor& value_offsets, int64_t packing, const at::Tensor& block_table,
         const at::Tensor& context_lens, const at::Tensor& first_rows, const at::Tensor& num_rows, const at::Tensor& first_keys,
         const at::Tensor& num_keys, const at::Tensor& visible, double scale, double cap, int64_t window,
         const std::optional<at::Tensor>& sinks, at::Tensor& output) {
  const int64_t num_trees = first_rows.size(0), num_kv_heads = key.size(1), head_dim = query.size(2);
  const int64_t group = query.size(1) / num_kv_heads, block_size = kv_cache.size(2);
  const int64_t width = (head_dim + PAD - 1) / PAD * PAD, depth = head_dim / Tile::TOGETHER;
  const float score_scale = Tile::TOGETHER == 1 ? 1.0f : static_cast<float>(scale);  // else the query has it
  const T *queries = query.const_data_ptr<T>(), *tree_keys = key.const_data_ptr<T>(), *tree_values = value.const_data_ptr<T>();
  const T* cache = kv_cache.const_data_ptr<T>();
  T* out = output.mutable_data_ptr<T>();
  const int* key_at = key_offsets.const_data_ptr<int>();
  const int* value_at = value_offsets.const_data_ptr<int>();
  const int* blocks = block_table.const_data_ptr<int>();
  const int64_t *lens = context_lens.const_data_ptr<int64_t>(), *row_starts = first_rows.const_data_ptr<int64_t>();
  const int64_t *row_counts = num_rows.const_data_ptr<int64_t>(), *key_starts = first_keys.const_data_ptr<int64_t>();
  const int64_t* key_counts = num_keys.const_data_ptr<int64_t>();
  const bool* masks = visible.const_data_ptr<bool>();
  const float soft_cap = static_cast<float>(cap);
  const float* sink_of = sinks ? sinks->const_data_ptr<float>() : nullptr;

  // Per tree what its rows see of its own keys, padded to whole tiles. With a window also the first position that a row sees.
  std::vector<std::vector<char>> own_masks(num_trees);
  std::vector<std::vector<int64_t>> lowest(window > 0 ? num_trees : 0);
  std::vector<int64_t> mask_strides(num_trees), seen_by_all(num_trees, 0);  // from here on every row sees the context
  for (int64_t i = 0; i < num_trees; ++i) {
    mask_strides[i] = (key_counts[i] + TILE - 1) / TILE * TILE;
    own_masks[i].resize(row_counts[i] * mask_strides[i]);
    for (int64_t r = 0; r < row_counts[i]; ++r) {
      const bool* sees = masks + i * visible.stride(0) + r * visible.stride(1);
      char* own = &own_masks[i][r * mask_strides[i]];
      std::copy(sees, sees + key_counts[i], own);
      if (window == 0) continue;
      const int64_t depth = std::count(sees, sees + key_counts[i], true) - 1;
      int64_t nth = -1;
      for (int64_t k = 0; k < key_counts[i]; ++k) own[k] = sees[k] && ++nth > depth - window;
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
    if (window > 0 && row_counts[i] > 0)
      starts[i] = std::min(lens[i], *std::min_element(lowest[i].begin(), lowest[i].end())) / TILE * TILE;
    total += lens[i] - starts[i];
  }
  const int64_t threads = at::get_num_threads();
  const int64_t share = std::max(PART, total * num_kv_heads / (2 * threads));
  std::vector<Part> parts;
  std::vector<int64_t> first_parts;
  int64_t most_rows = 0;  // of a tree, in all heads that share keys
  for (int64_t i = 0; i < num_trees; ++i) {
    first_parts.push_back(static_cast<int64_t>(parts.size()));
    if (row_counts[i] == 0) continue;
    most_rows = std::max(most_rows, row_counts[i] * group);
    const int64_t seen = lens[i] - starts[i], cuts = std::max<int64_t>(1, (seen + share - 1) / share);
    const int64_t length = std::max(TILE, (seen + cuts * TILE - 1) / (cuts * TILE) * TILE);
    for (int64_t start = starts[i]; start == starts[i] || start < lens[i]; start += length)
      parts.push_back({i, start, std::min(start + length, lens[i]), start + length >= lens[i], seen <= length});
  }
  first_parts.push_back(static_cast<int64_t>(parts.size()));

  // Where there is less work than threads, or three pieces for two, rows are divided, too, although each piece reads the keys.
  const int64_t pieces = static_cast<int64_t>(parts.size()) * num_kv_heads;
  const int64_t row_blocks = (most_rows + ROWS - 1) / ROWS;
  const int64_t row_cuts = pieces % threads == 0 ? 1 : std::min(row_blocks, (2 * threads + pieces - 1) / pieces);

  // A sink takes its share of the weights and adds nothing.
  const auto write = [&](int64_t i, int64_t head, int64_t r, float* sum, float weight, float most) {
    if (sink_of != nullptr) weight += std::exp(sink_of[head * group + r % group] - most);
    T* to = out + (row_starts[i] + r / group) * output.stride(0) + (head * group + r % group) * output.stride(1);
#pragma omp simd
    for (int64_t c = 0; c < head_dim; ++c) sum[c] /= weight;
    pack_run(sum, to, head_dim);
  };

  std::vector<Rows<typename Tile::Number>> gathered(pieces * row_cuts);  // of parts to be merged
  std::atomic<int64_t> taken = 0;  // they differ in length: each thread takes the next
  at::parallel_for(0, std::min<int64_t>(threads, gathered.size()), 1, [&](int64_t, int64_t) {
    Tile tile(width, Packing(packing));
    Rows<typename Tile::Number> rows;
    std::vector<char> seen;
    for (int64_t item = taken++; item < static_cast<int64_t>(gathered.size()); item = taken++) {
      const Part& part = parts[item / row_cuts / num_kv_heads];
      const int64_t head = item / row_cuts % num_kv_heads, i = part.tree, all = row_counts[i] * group;
      const int64_t most = (all + row_cuts * ROWS - 1) / (row_cuts * ROWS) * ROWS, first = item % row_cuts * most;
      if (first >= all) continue;
      rows.start(first, std::min(most, all - first), depth, width);
      for (int64_t r = 0; r < rows.asked; ++r) {
        const int64_t row = row_starts[i] + (first + r) / group, query_head = head * group + (first + r) % group;
        const T* from = queries + row * query.stride(0) + query_head * query.stride(1);
        take_query(from, &rows.queries[r * depth], head_dim, static_cast<float>(scale));
      }
      for (int64_t at = part.start; at < part.end;) {
        const int64_t within = at % block_size;
        const int64_t count = std::min({TILE, part.end - at, block_size - within});
        const int64_t number = blocks[i * block_table.stride(0) + at / block_size];
        const T* block_keys = cache + number * kv_cache.stride(0) + head * kv_cache.stride(1);
        const T* block_values = block_keys + block_size * head_dim;
        tile.read(Block<T>{block_keys, block_values, block_size, head_dim, Packing(packing), key_at, value_at}, within, count);
        const bool whole = seen_by_all[i] <= at;
        if (!whole) {
          seen.assign(row_counts[i] * TILE, 0);
          for (int64_t r = 0; r < row_counts[i]; ++r)
            for (int64_t t = 0; t < count; ++t) seen[r * TILE + t] = at + t >= lowest[i][r];
        }
        attend(rows, tile, whole ? nullptr : seen.data(), TILE, group, score_scale, soft_cap);
        at += count;
      }
      const Own<T> own{tree_keys + key_starts[i] * key.stride(0) + head * key.stride(1),
                       tree_values + key_starts[i] * value.stride(0) + head * value.stride(1),
                       key.stride(0), value.stride(0), head_dim};
      for (int64_t at = 0; at < key_counts[i] && part.last; at += TILE) {
        tile.read(own, at, std::min(TILE, key_counts[i] - at));
        attend(rows, tile, &own_masks[i][at], mask_strides[i], group, score_scale, soft_cap);
      }
      if (part.only)
        for (int64_t r = 0; r < rows.asked; ++r) write(i, head, first + r, &rows.sums[r * width], rows.weight(r), rows.most[r]);
      else
        std::swap(gathered[item], rows);
    }
  });

  // Few trees have more than one part; the others are done.
  std::vector<int64_t> cut;
  for (int64_t i = 0; i < num_trees; ++i)
    if (first_parts[i + 1] - first_parts[i] > 1) cut.push_back(i);
  if (cut.empty()) return;
  at::parallel_for(0, static_cast<int64_t>(cut.size()) * num_kv_heads * row_cuts, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(width);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t step = row_cuts * num_kv_heads, i = cut[item / step], rest = item % step;
      const auto *from = &gathered[first_parts[i] * step + rest], *to = &gathered[first_parts[i + 1] * step + rest];
      for (int64_t r = 0; r < from->asked; ++r) {
        float most = NEVER, weight = 0.0f;
        for (const auto* rows = from; rows < to; rows += step) most = std::max(most, rows->most[r]);
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (const auto* rows = from; rows < to; rows += step) {
          const float share = std::exp(rows->most[r] - most);
          weight += share * rows->weight(r);
          for (int64_t c = 0; c < head_dim; ++c) sum[c] += share * rows->sums[r * width + c];
        }
        write(i, rest / row_cuts, from->first + r, sum.data(), weight, most);
      }
    }
  });
}

void tree_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& kv_cache,
                    const at::Tensor& key_offsets, const at::Tensor& value_offsets, int64_t packing, const at::Tensor& block_table,
                    const at::Tensor& context_lens, const at::Tensor& first_rows, const at::Tensor& num_rows,
                    const at::Tensor& first_keys, const at::Tensor& num_keys, const at::Tensor& visible, double scale,
                    double soft_cap, int64_t window, const std::optional<at::Tensor>& sinks, at::Tensor output) {
  TORCH_CHECK(kv_cache.scalar_type() == query.scalar_type(), "the KV cache holds another dtype than the query");
  TORCH_CHECK(query.size(2) % 2 == 0, "heads of an odd dimension: ", query.size(2));
  for (const at::Tensor* tensor : {&query, &key, &value, &visible, static_cast<const at::Tensor*>(&output)})
    TORCH_CHECK(tensor->stride(2) == 1, "the last dimension must lie side by side");
  const auto go = [&]<typename T, typename Tile>() {
    run<T, Tile>(query, key, value, kv_cache, key_offsets, value_offsets, packing, block_table, context_lens, first_rows, num_rows,
                 first_keys, num_keys, visible, scale, soft_cap, window, sinks, output);
  };
  switch (query.scalar_type()) {
    case at::kFloat:
      return go.operator()<float, FloatTile>();
    case at::kHalf:
      return go.operator()<c10::Half, FloatTile>();
    case at::kBFloat16:
#ifdef __AVX512BF16__
      return go.operator()<c10::BFloat16, PairTile>();
#else
      return go.operator()<c10::BFloat16, FloatTile>();
#endif
    default:
      TORCH_CHECK(false, "tree_attention: float32, float16 and bfloat16, not ", query.scalar_type());
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_eagle, library) {
  library.def(
      "tree_attention(Tensor query, Tensor key, Tensor value, Tensor kv_cache, Tensor key_offsets, Tensor value_offsets, "
      "int packing, Tensor block_table, Tensor context_lens, Tensor first_rows, Tensor num_rows, Tensor first_keys, "
      "Tensor num_keys, Tensor visible, float scale, float soft_cap, int window, Tensor? sinks, Tensor(a!) output) -> ()");
}

TORCH_LIBRARY_IMPL(vllm_eagle, CPU, library) { library.impl("tree_attention", &tree_attention); }

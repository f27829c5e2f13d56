// Copy keys and values from slots to slots in many layers' caches at once: all of a layer's are read before any is written.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <vector>

namespace {

void move_slots(const std::vector<at::Tensor>& kv_caches, const at::Tensor& key_offsets, const at::Tensor& value_offsets,
                const at::Tensor& sources, const at::Tensor& targets) {
  const int64_t num_moves = sources.size(0), block_size = key_offsets.size(0), head_dim = key_offsets.size(1);
  const int64_t *from = sources.const_data_ptr<int64_t>(), *to = targets.const_data_ptr<int64_t>();
  const int *key_at = key_offsets.const_data_ptr<int>(), *value_at = value_offsets.const_data_ptr<int>();
  at::parallel_for(0, static_cast<int64_t>(kv_caches.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t layer = begin; layer < end; ++layer) {
      const at::Tensor& cache = kv_caches[layer];
      const int64_t num_heads = cache.size(1);
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, cache.scalar_type(), "move_slots", [&] {
        scalar_t* all = cache.mutable_data_ptr<scalar_t>();
        std::vector<scalar_t> read(num_moves * 2 * head_dim);
        for (int64_t head = 0; head < num_heads; ++head) {
          const auto keys_of = [&](int64_t slot) { return all + slot / block_size * cache.stride(0) + head * cache.stride(1); };
          for (int64_t move = 0; move < num_moves; ++move) {
            const scalar_t *keys = keys_of(from[move]), *values = keys + block_size * head_dim;
            const int64_t token = from[move] % block_size * head_dim;
            for (int64_t c = 0; c < head_dim; ++c) {
              read[(2 * move) * head_dim + c] = keys[key_at[token + c]];
              read[(2 * move + 1) * head_dim + c] = values[value_at[token + c]];
            }
          }
          for (int64_t move = 0; move < num_moves; ++move) {
            scalar_t *keys = keys_of(to[move]), *values = keys + block_size * head_dim;
            const int64_t token = to[move] % block_size * head_dim;
            for (int64_t c = 0; c < head_dim; ++c) {
              keys[key_at[token + c]] = read[(2 * move) * head_dim + c];
              values[value_at[token + c]] = read[(2 * move + 1) * head_dim + c];
            }
          }
        }
      });
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_eagle, library) {
  library.def("move_slots(Tensor(a!)[] kv_caches, Tensor key_offsets, Tensor value_offsets, Tensor sources, Tensor targets) -> ()");
}

TORCH_LIBRARY_IMPL(vllm_eagle, CPU, library) { library.impl("move_slots", &move_slots); }

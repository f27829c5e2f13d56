// One level of growth of all draft trees (draft.py): add the children of the rows that ran last to the pool of drafted nodes, then
// choose which of them the head may run next. Equals _Pool.add and then _BestFrontier.hopeful, which say what and why.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();

at::Tensor longer(const at::Tensor& pool, int64_t more) {
  at::Tensor grown = at::empty({pool.size(0), pool.size(1) + more}, pool.options());
  grown.narrow(1, 0, pool.size(1)).copy_(pool);
  return grown;
}

// The budget-th best score of a request, which a node must beat to enter its tree.
float bound_of(const float* scores, int64_t count, int64_t budget) {
  if (budget <= 0) return std::numeric_limits<float>::infinity();
  if (budget > count) return NEVER;
  std::vector<float> sorted(scores, scores + count);
  std::nth_element(sorted.begin(), sorted.begin() + (budget - 1), sorted.end(), std::greater<>());
  return sorted[budget - 1];
}

using Grown = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Grown grow_level(const at::Tensor& confidences, const at::Tensor& tokens, const at::Tensor& row_nodes, const at::Tensor& row_scores,
                 const at::Tensor& pool_scores, const at::Tensor& pool_tokens, const at::Tensor& pool_parents,
                 const at::Tensor& budgets, const at::Tensor& max_depths, const at::Tensor& topks, int64_t depth, int64_t most,
                 double node_floor) {
  const int64_t num_reqs = tokens.size(0), width = tokens.size(1), children = tokens.size(2), newest = width * children;
  const int64_t before = pool_scores.size(1), count = before + newest;
  at::Tensor scores = longer(pool_scores, newest), all_tokens = longer(pool_tokens, newest), parents = longer(pool_parents, newest);
  const at::Tensor from_confidences = confidences.contiguous(), from_tokens = tokens.contiguous();
  const at::Tensor nodes = row_nodes.contiguous(), above = row_scores.contiguous();
  most = std::min(most, newest);
  std::vector<std::vector<int64_t>> chosen(num_reqs);  // places in the newest level, best first
  std::vector<int64_t> hopeful(num_reqs);  // how many of them may be expanded
  for (int64_t request = 0; request < num_reqs; ++request) {
    float* score = scores.mutable_data_ptr<float>() + request * count;
    int64_t* token = all_tokens.mutable_data_ptr<int64_t>() + request * count;
    int64_t* parent = parents.mutable_data_ptr<int64_t>() + request * count;
    const int64_t most_depth = max_depths.const_data_ptr<int64_t>()[request], topk = topks.const_data_ptr<int64_t>()[request];
    for (int64_t place = 0; place < newest; ++place) {
      const int64_t row = request * width + place / children;
      const float sum = above.const_data_ptr<float>()[row] +
                        std::min(from_confidences.const_data_ptr<float>()[request * newest + place], 0.0f);
      const bool allowed = most_depth >= depth && place % children < topk;
      score[before + place] = allowed && !std::isnan(sum) ? sum : NEVER;  // where the head yields NaN, it drafts nothing
      token[before + place] = from_tokens.const_data_ptr<int64_t>()[request * newest + place];
      parent[before + place] = nodes.const_data_ptr<int64_t>()[row];
    }
    const float bound =
        std::max(bound_of(score, count, budgets.const_data_ptr<int64_t>()[request]), static_cast<float>(node_floor));
    std::vector<int64_t>& places = chosen[request];
    places.resize(newest);
    std::iota(places.begin(), places.end(), 0);
    const float* fresh = score + before;
    std::partial_sort(places.begin(), places.begin() + most, places.end(), [fresh](int64_t one, int64_t other) {
      return fresh[one] > fresh[other] || (fresh[one] == fresh[other] && one < other);
    });
    const auto beats = [fresh, bound](int64_t place) { return fresh[place] > bound; };
    if (most_depth > depth) hopeful[request] = std::count_if(places.begin(), places.begin() + most, beats);
  }
  const int64_t next_width = num_reqs ? *std::max_element(hopeful.begin(), hopeful.end()) : 0;
  at::Tensor chosen_places = at::empty({num_reqs, next_width}, tokens.options());
  at::Tensor hopeful_scores = at::full({num_reqs, next_width}, NEVER, scores.options());
  for (int64_t request = 0; request < num_reqs; ++request) {
    for (int64_t rank = 0; rank < next_width; ++rank) {
      const int64_t place = chosen[request][rank];
      chosen_places.mutable_data_ptr<int64_t>()[request * next_width + rank] = place;
      if (rank < hopeful[request])
        hopeful_scores.mutable_data_ptr<float>()[request * next_width + rank] =
            scores.const_data_ptr<float>()[request * count + before + place];
    }
  }
  return {scores, all_tokens, parents, chosen_places, hopeful_scores};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_eagle, library) {
  library.def(
      "grow_level(Tensor confidences, Tensor tokens, Tensor row_nodes, Tensor row_scores, Tensor pool_scores, Tensor pool_tokens, "
      "Tensor pool_parents, Tensor budgets, Tensor max_depths, Tensor topks, int depth, int most, float node_floor) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vllm_eagle, CPU, library) { library.impl("grow_level", &grow_level); }

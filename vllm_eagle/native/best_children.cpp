// The best children of drafted nodes and how sure the head is of each: top-k and log-softmax of a row of logits in one go.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "exp.h"

namespace {

constexpr int64_t CHUNK = 64;  // tokens that are passed over together if none of them is among the best
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// The num_children greatest of `scores` [count, a multiple of CHUNK], greatest first, and where they are; returns log(sum(exp)).
float best_of(const std::vector<float>& scores, int64_t num_children, float* best, int64_t* token) {
  const int64_t count = static_cast<int64_t>(scores.size());
  std::fill(best, best + num_children, NEVER);
  std::fill(token, token + num_children, 0);
  for (int64_t start = 0; start < count; start += CHUNK) {
    float most = NEVER;
#pragma omp simd reduction(max : most)
    for (int64_t t = 0; t < CHUNK; ++t) most = std::max(most, scores[start + t]);
    if (!(most > best[num_children - 1])) continue;
    for (int64_t t = start; t < start + CHUNK; ++t) {
      if (!(scores[t] > best[num_children - 1])) continue;
      int64_t place = num_children - 1;
      for (; place > 0 && scores[t] > best[place - 1]; --place) {
        best[place] = best[place - 1];
        token[place] = token[place - 1];
      }
      best[place] = scores[t];
      token[place] = t;
    }
  }
  const float most = best[0];
  float sum = 0.0f;  // NaN if any score is
#pragma omp simd reduction(+ : sum)
  for (int64_t t = 0; t < count; ++t) sum += exp_of(scores[t] - most);
  return most + std::log(sum);
}

template <typename T>
void run(const at::Tensor& logits, const float* factors, const float* noise, int64_t num_children, float* values, int64_t* tokens) {
  const int64_t width = logits.size(1), vocab_size = logits.size(2);
  const T* all = logits.const_data_ptr<T>();
  at::parallel_for(0, logits.size(0) * width, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scores((vocab_size + CHUNK - 1) / CHUNK * CHUNK, NEVER);
    for (int64_t row = begin; row < end; ++row) {
      const T* from = all + row * vocab_size;
      const float factor = factors[row / width];
      for (int64_t t = 0; t < vocab_size; ++t) scores[t] = static_cast<float>(from[t]) * factor;
      if (noise != nullptr) {
        const float* add = noise + row / width * vocab_size;
        for (int64_t t = 0; t < vocab_size; ++t) scores[t] += add[t];
      }
      float* best = values + row * num_children;
      const float log_sum = best_of(scores, num_children, best, tokens + row * num_children);
      for (int64_t k = 0; k < num_children; ++k) best[k] -= log_sum;
    }
  });
}

// values = log_softmax(logits * factor + noise) of the num_children best tokens of each row, best first, and the tokens.
std::tuple<at::Tensor, at::Tensor> best_children(const at::Tensor& logits, const at::Tensor& factors,
                                                 const std::optional<at::Tensor>& noise, int64_t num_children) {
  num_children = std::min(num_children, logits.size(2));
  const at::Tensor rows = logits.contiguous();
  at::Tensor values = at::empty({logits.size(0), logits.size(1), num_children}, logits.options().dtype(at::kFloat));
  at::Tensor tokens = at::empty_like(values, values.options().dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, rows.scalar_type(), "best_children", [&] {
    run<scalar_t>(rows, factors.const_data_ptr<float>(), noise ? noise->const_data_ptr<float>() : nullptr, num_children,
                  values.mutable_data_ptr<float>(), tokens.mutable_data_ptr<int64_t>());
  });
  return {values, tokens};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_eagle, library) {
  library.def("best_children(Tensor logits, Tensor factors, Tensor? noise, int num_children) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vllm_eagle, CPU, library) { library.impl("best_children", &best_children); }

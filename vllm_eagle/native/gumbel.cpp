// The noise of vLLM's CPU sampler, of many tokens at once. What it is and what it is for: vllm_eagle/algorithm/noise.py.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <bit>
#include <cstdint>
#include <optional>

namespace {

constexpr int64_t CHUNK = 4096;  // tokens that one thread takes at a time

// SplitMix64's increment and mixing (Steele, Lea and Flood 2014).
constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15;

inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// log(x) of a normal x > 0, within 1e-10 of its size. Loops over this one become vector instructions, over std::log they do not.
// With x = 2^power * (1 + f), 1 + f in [0.7, 1.4], and s = f / (2 + f): log(1 + f) = 2 (s + s^3 / 3 + s^5 / 5 + ...).
inline double log_of(double x) {
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  const uint64_t above = bits - 0x3FE6A09E667F3BCD;  // counted from the root of one half
  const double power = static_cast<double>(static_cast<int64_t>(above) >> 52);
  const double f = std::bit_cast<double>(bits - (above & 0xFFF0000000000000)) - 1.0;
  const double s = f / (2.0 + f), z = s * s;
  double sum = 1.0 / 15;
  for (const double next : {1.0 / 13, 1.0 / 11, 1.0 / 9, 1.0 / 7, 1.0 / 5, 1.0 / 3, 1.0}) sum = sum * z + next;
  return 2.0 * s * sum + power * 0.69314718055994530942;
}

// [num_rows, tokens] float32: noise of the tokens, all of a vocabulary or those named, in rows with these seeds.
at::Tensor gumbel(const at::Tensor& seeds, const std::optional<at::Tensor>& token_ids, int64_t vocab_size) {
  const at::Tensor rows = seeds.contiguous();
  const std::optional<at::Tensor> chosen = token_ids ? std::optional(token_ids->contiguous()) : std::nullopt;
  const int64_t count = chosen ? chosen->numel() : vocab_size;
  const int64_t chunks = (count + CHUNK - 1) / CHUNK;
  at::Tensor noise = at::empty({rows.numel(), count}, rows.options().dtype(at::kFloat));
  const int64_t* seed = rows.const_data_ptr<int64_t>();
  const int64_t* ids = chosen ? chosen->const_data_ptr<int64_t>() : nullptr;
  float* out = noise.mutable_data_ptr<float>();
  at::parallel_for(0, rows.numel() * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t row = part / chunks, start = part % chunks * CHUNK, stop = std::min(count, start + CHUNK);
      const uint64_t key = mix(static_cast<uint64_t>(seed[row]));
      float* to = out + row * count;
#pragma omp simd
      for (int64_t t = start; t < stop; ++t) {
        const uint64_t token = static_cast<uint64_t>(ids == nullptr ? t : ids[t]) + 1;
        const double uniform = (static_cast<double>(mix(key + token * GAMMA) >> 11) + 0.5) * 0x1p-53;
        to[t] = static_cast<float>(-log_of(-log_of(uniform)));
      }
    }
  });
  return noise;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vllm_eagle, library) { library.def("gumbel(Tensor seeds, Tensor? token_ids, int vocab_size) -> Tensor"); }

TORCH_LIBRARY_IMPL(vllm_eagle, CPU, library) { library.impl("gumbel", &gumbel); }

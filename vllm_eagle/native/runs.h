#pragma once

// Runs of numbers from one type to another.

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

using Pair = uint32_t;  // two bfloat16 numbers, the first in the lower half

inline void unpack_run(const float* from, float* to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }

inline void unpack_run(const c10::BFloat16* from, float* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = std::bit_cast<float>(static_cast<uint32_t>(from[i].x) << 16);
}

inline void unpack_run(const c10::Half* from, float* to, int64_t count) {
  int64_t i = 0;
#ifdef __AVX512F__
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
#endif
#ifdef __F16C__
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

template <typename T>
void pack_run(const float* from, T* to, int64_t count) {
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (std::is_same_v<T, c10::Half>)
    for (; i + 8 <= count; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; ++i) to[i] = static_cast<T>(from[i]);
}

// first[i] and second[i] as one pair.
inline void pair_runs(const c10::BFloat16* first, const c10::BFloat16* second, Pair* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = first[i].x | static_cast<Pair>(second[i].x) << 16;
}

// The two halves of pairs.
inline void part_run(const Pair* from, float* first, float* second, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    first[i] = std::bit_cast<float>(from[i] << 16);
    second[i] = std::bit_cast<float>(from[i] & 0xffff0000u);
  }
}

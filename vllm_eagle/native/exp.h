#pragma once

#include <bit>

// exp(x) of x <= 0, within two units of the last place; 0 below -87. The compiler turns loops over this one, but not over
// std::exp, into vector instructions. Polynomial: Cephes, expf.
[[gnu::always_inline]] inline float exp_of(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // rounds to an integer
  const float power = shifted - 12582912.0f;
  const float rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = sum * rest + next;
  sum = sum * rest * rest + rest + 1.0f;
  const float found = sum * std::bit_cast<float>((static_cast<int>(power) + 127) << 23);
  return x < -87.0f ? 0.0f : found;
}

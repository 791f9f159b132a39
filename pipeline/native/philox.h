// Counter-based random numbers, bit for bit those of pipeline/rng.py.
//
// Source: Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>

namespace regatta {

struct Words {
  uint32_t word[4];
};

// The four words at address (a, b, c, slot) of the stream that belongs to `seed`.
inline Words philox(uint64_t seed, uint32_t a, uint32_t b, uint32_t c, uint32_t slot) {
  uint32_t x0 = a, x1 = b, x2 = c, x3 = slot;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = UINT64_C(0xD2511F53) * x0;
    const uint64_t product1 = UINT64_C(0xCD9E8D57) * x2;
    x0 = static_cast<uint32_t>(product1 >> 32) ^ x1 ^ key0;
    x1 = static_cast<uint32_t>(product1);
    x2 = static_cast<uint32_t>(product0 >> 32) ^ x3 ^ key1;
    x3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{x0, x1, x2, x3}};
}

inline double uniform(uint32_t word) { return static_cast<double>(word) * 0x1p-32; }

}  // namespace regatta

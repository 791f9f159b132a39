// Huffman decoding of the blocks of a baseline scan, up to two coefficients a table lookup.
//
// The chain from one code to the next is what limits the speed: shift, load, shift. So a lookup takes as many bits as
// one or two whole coefficients need (code and value bits together), its entry holds the finished values, and all else
// happens beside that chain. What a lookup cannot serve goes one symbol at a time.
//
// Source: ITU-T T.81, annexes C and F.2.2; the refill is variant 4 of F. Giesen, "Reading bits in far too many ways".
#pragma once

#include <cstdint>
#include <cstring>

#include "jpeg_header.h"

namespace regatta {

#define REGATTA_INLINE inline __attribute__((always_inline))

constexpr int kAcBits = 12;  // of a lookup for AC coefficients
constexpr int kDcBits = 9;

inline uint64_t load_big_endian(const uint8_t* from) {
  uint64_t value;
  std::memcpy(&value, from, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  value = __builtin_bswap64(value);
#endif
  return value;
}

// Bits of data without stuffing, which is followed by enough readable bytes for one unit.
struct BitReader {
  const uint8_t* next = nullptr;  // first byte of which not all bits count as loaded
  uint64_t bits = 0;              // the coming bits from the top down
  unsigned count = 0;             // how many of them are accounted for

  REGATTA_INLINE void refill() {  // to at least 56 bits
    bits |= load_big_endian(next) >> count;
    next += (63 - count) >> 3;
    count |= 56;
  }
  REGATTA_INLINE void drop(unsigned number) {
    bits <<= number;
    count -= number;
  }
  // The `size` bits in front as a T.81 F.2.2.1 value, size 0..15.
  REGATTA_INLINE int32_t value(unsigned size) const {
    const int32_t raw = static_cast<int32_t>((bits >> 1) >> (63 - size));
    // Without a leading one bit it stands for a negative number.
    return static_cast<int64_t>(bits) < 0 || size == 0 ? raw : raw - (1 << size) + 1;
  }
};

// Code lengths and symbols: by lookup for codes of up to `kBits` bits, by comparison for longer ones.
template <int kBits>
struct CodeTable {
  uint16_t entry[1 << kBits];  // length << 8 | symbol; 0 for longer codes and for what is no code
  uint32_t limit[17];          // the first 16-bit prefix above the codes of up to n bits
  int32_t offset[17];          // what to add to a code of n bits for the place of its symbol
  uint8_t symbols[256];

  // False where the counts form no prefix code.
  bool build(const HuffmanCodes& codes) {
    std::memset(entry, 0, sizeof entry);
    std::memcpy(symbols, codes.symbols, 256);
    int32_t code = 0, place = 0;
    for (int length = 1; length <= 16; ++length, code <<= 1) {
      const int32_t count = codes.counts[length - 1];
      if (code + count > 1 << length) return false;
      offset[length] = place - code;
      for (int32_t i = 0; i < count; ++i, ++code, ++place) {
        if (length > kBits) continue;
        const uint16_t filled = static_cast<uint16_t>(length << 8 | symbols[place]);
        uint16_t* at = entry + (code << (kBits - length));
        for (int32_t copy = 0; copy < 1 << (kBits - length); ++copy) at[copy] = filled;
      }
      limit[length] = static_cast<uint32_t>(code) << (16 - length);
    }
    return true;
  }

  // length << 8 | symbol of the code in front, 0 where there is none.
  REGATTA_INLINE uint32_t find(uint64_t bits) const {
    const uint32_t found = entry[bits >> (64 - kBits)];
    return found ? found : find_long(bits);
  }

  uint32_t find_long(uint64_t bits) const {
    const uint32_t prefix = static_cast<uint32_t>(bits >> 48);
    for (int length = kBits + 1; length <= 16; ++length)
      if (prefix < limit[length])
        return static_cast<uint32_t>(length) << 8 |
               symbols[static_cast<int32_t>(prefix >> (16 - length)) + offset[length]];
    return 0;
  }
};

// What a lookup of AC coefficients finds, packed into 64 bits: bits to drop, steps through the block, the steps to the
// one coefficient and to the other, their values. A lone coefficient is followed by a zero, which is where it belongs.
struct AcEntry {
  static constexpr unsigned kEnds = 64;     // among the steps: the block ends here
  static constexpr unsigned kSingle = 128;  // among the steps: needs decoding symbol by symbol

  static uint64_t pack(unsigned drop, unsigned steps, unsigned first, int32_t first_value, unsigned second,
                       int32_t second_value) {
    return drop | steps << 8 | first << 16 | static_cast<uint64_t>(second) << 24 |
           static_cast<uint64_t>(static_cast<uint16_t>(first_value)) << 32 |
           static_cast<uint64_t>(static_cast<uint16_t>(second_value)) << 48;
  }
};

constexpr uint8_t kEndOfBlock = 0x00, kSixteenZeros = 0xF0;

struct AcTable {
  CodeTable<kAcBits> codes;
  uint64_t entry[1 << kAcBits];

  bool build(const HuffmanCodes& given) {
    if (!codes.build(given)) return false;
    for (uint32_t at = 0; at < 1u << kAcBits; ++at) entry[at] = describe(at);
    return true;
  }

 private:
  // A coefficient that `available` bits in front of `bits` hold whole: how many bits it takes, 0 where it does not fit.
  unsigned coefficient(uint64_t bits, unsigned available, unsigned& run, int32_t& value) const {
    const uint32_t found = codes.entry[bits >> (64 - kAcBits)];
    const unsigned length = found >> 8, size = found & 15;
    if (found == 0 || size == 0 || length + size > available) return 0;
    run = (found >> 4) & 15;
    BitReader rest;
    rest.bits = bits << length;
    value = rest.value(size);
    return length + size;
  }

  // Bits of an end-of-block code in front, 0 where there is none within `available` bits.
  unsigned end_of_block(uint64_t bits, unsigned available) const {
    const uint32_t found = codes.entry[bits >> (64 - kAcBits)];
    return found && (found & 0xFF) == kEndOfBlock && found >> 8 <= available ? found >> 8 : 0;
  }

  uint64_t describe(uint32_t at) const {
    const uint64_t bits = static_cast<uint64_t>(at) << (64 - kAcBits);
    if (const unsigned end = end_of_block(bits, kAcBits)) return AcEntry::pack(end, AcEntry::kEnds, 0, 0, 0, 0);
    unsigned run = 0, second_run = 0;
    int32_t value = 0, second_value = 0;
    const unsigned used = coefficient(bits, kAcBits, run, value);
    if (used == 0) return AcEntry::pack(0, AcEntry::kSingle, 0, 0, 0, 0);
    const unsigned left = kAcBits - used;
    if (const unsigned end = end_of_block(bits << used, left))
      return AcEntry::pack(used + end, AcEntry::kEnds + run + 1, run, value, run + 1, 0);
    if (const unsigned more = coefficient(bits << used, left, second_run, second_value))
      return AcEntry::pack(used + more, run + second_run + 2, run, value, run + 1 + second_run, second_value);
    return AcEntry::pack(used, run + 1, run, value, run + 1, 0);
  }
};

using DcTable = CodeTable<kDcBits>;

// The difference of a DC coefficient to the one before; false for a code that does not exist.
REGATTA_INLINE bool decode_dc(BitReader& reader, const DcTable& table, int32_t& difference) {
  reader.refill();
  const uint32_t found = table.find(reader.bits);
  if (found == 0) return false;
  reader.drop(found >> 8);
  const unsigned size = found & 15;
  difference = reader.value(size);
  reader.drop(size);
  return true;
}

// One symbol of AC coefficients; false for what no encoder writes. `steps` becomes 64 where the block ends.
template <typename Order>
inline bool decode_single(BitReader& reader, const AcTable& table, const Order& order, int16_t* block, unsigned& k) {
  reader.refill();
  const uint32_t found = table.codes.find(reader.bits);
  if (found == 0) return false;
  reader.drop(found >> 8);
  const unsigned symbol = found & 0xFF, run = symbol >> 4, size = symbol & 15;
  if (symbol == kEndOfBlock) {
    k = 64;
    return true;
  }
  if (size == 0 && symbol != kSixteenZeros) return false;
  k += run + 1;
  if (k > 64) return false;
  if (size) block[order[k - 1]] = static_cast<int16_t>(reader.value(size));
  reader.drop(size);
  return true;
}

// The AC coefficients of a block into `block`, whose AC part must be zero; `order` maps their number to their place.
// Returns the number of the last coefficient that was coded, at least 0; negative for damage.
template <typename Order>
REGATTA_INLINE int decode_ac(BitReader& reader, const AcTable& table, const Order& order, int16_t* block) {
  unsigned k = 1;
  for (;;) {
    reader.refill();
    uint64_t entry;
    unsigned after;
    for (int turn = 0; turn < 56 / kAcBits; ++turn) {
      entry = table.entry[reader.bits >> (64 - kAcBits)];
      after = k + ((entry >> 8) & 0xFF);
      if (after >= 64) goto edge;
      block[order[k + ((entry >> 16) & 0xFF)]] = static_cast<int16_t>(entry >> 32);
      block[order[k + ((entry >> 24) & 0xFF)]] = static_cast<int16_t>(entry >> 48);
      reader.drop(entry & 63);
      k = after;
    }
    continue;
  edge:
    if (after >= 64 + k && after < 128) {  // the block ends, and before its last place
      block[order[k + ((entry >> 16) & 0xFF)]] = static_cast<int16_t>(entry >> 32);
      reader.drop(entry & 63);
      return static_cast<int>(after) - 64 - 1;
    }
    const unsigned before = k;
    if (!decode_single(reader, table, order, block, k)) return -1;
    if (k == 64) return 63;  // an upper bound will do
    (void)before;
  }
}

}  // namespace regatta

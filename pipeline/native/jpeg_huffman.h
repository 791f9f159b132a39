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
#include "targets.h"

namespace regatta {

constexpr int kAcBits = 10;  // of a lookup for AC coefficients
constexpr int kDcBits = 9;
constexpr int kTurns = 3;                       // lookups from one refill to the next
constexpr unsigned kMostDropped = 56 / kTurns;  // bits of a lookup

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
};

// The number that the last bits of `raw` stand for, as many as `ones` has (T.81 F.2.2.1): without a leading one bit it
// is negative. Written for a conditional move: the sign is a coin toss, which no processor predicts.
REGATTA_INLINE int32_t signed_value(uint64_t raw, uint32_t ones) {
  const int32_t value = static_cast<int32_t>(raw) & static_cast<int32_t>(ones);
  const int32_t negative = value - static_cast<int32_t>(ones);
  return 2 * value < static_cast<int32_t>(ones) ? negative : value;
}
REGATTA_INLINE uint64_t rotate_left(uint64_t bits, unsigned number) {
  return bits << (number & 63) | bits >> (-number & 63);
}

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

// What a lookup of AC coefficients finds. A lone coefficient is followed by a zero, which is where it belongs. In
// bytes, because a load each is cheaper than shifting them out of a word.
struct AcEntry {
  static constexpr unsigned kEnds = 64;     // among the steps: the block ends here
  static constexpr unsigned kSingle = 128;  // among the steps: needs decoding symbol by symbol

  uint8_t drop;        // bits that are used up
  uint8_t steps;       // through the block
  uint8_t first;       // steps to the first coefficient
  uint8_t second;      // and to the second
  uint16_t ones;       // as many ones as the first one's value has bits
  uint8_t first_bits;  // bits of the first one, code and value
  int8_t second_value;
};
static_assert(sizeof(AcEntry) == 8);

constexpr uint8_t kEndOfBlock = 0x00, kSixteenZeros = 0xF0;

struct AcTable {
  CodeTable<kAcBits> codes;
  AcEntry entry[1 << kAcBits];

  bool build(const HuffmanCodes& given) {
    if (!codes.build(given)) return false;
    for (uint32_t at = 0; at < 1u << kAcBits; ++at) entry[at] = describe(at);
    return true;
  }

 private:
  AcEntry describe(uint32_t at) const {
    const uint32_t found = codes.entry[at];
    const unsigned bits = (found >> 8) + (found & 15), size = found & 15;
    AcEntry entry{};
    if (found && (found & 0xFF) == kEndOfBlock) {
      entry.drop = static_cast<uint8_t>(bits);
      entry.steps = AcEntry::kEnds;
      return entry;
    }
    if (size == 0 || bits > kMostDropped) {
      entry.steps = AcEntry::kSingle;
      return entry;
    }
    entry.drop = entry.first_bits = static_cast<uint8_t>(bits);
    entry.first = (found >> 4) & 15;
    entry.steps = entry.second = entry.first + 1;
    entry.ones = static_cast<uint16_t>((1 << size) - 1);
    if (bits < kAcBits) add_second(entry, (at << bits) & ((1 << kAcBits) - 1));
    return entry;
  }

  // What follows a coefficient, where the lookup's bits hold all of it.
  void add_second(AcEntry& entry, uint32_t rest) const {
    const uint32_t found = codes.entry[rest];
    const unsigned code = found >> 8, size = found & 15, used = entry.drop + code + size;
    if (found == 0 || used > kAcBits) return;
    if ((found & 0xFF) == kEndOfBlock) {
      entry.steps += AcEntry::kEnds;
    } else if (size > 0) {
      entry.second += (found >> 4) & 15;
      entry.steps = entry.second + 1;
      entry.second_value = static_cast<int8_t>(signed_value(rest >> (kAcBits - code - size), (1u << size) - 1));
    } else {
      return;
    }
    entry.drop = static_cast<uint8_t>(used);
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
  difference = signed_value(rotate_left(reader.bits, size), (1u << size) - 1);
  reader.drop(size);
  return true;
}

// One symbol of AC coefficients; false for what no encoder writes. `steps` becomes 64 where the block ends.
inline bool decode_single(BitReader& reader, const AcTable& table, const uint8_t* order, int16_t* block, unsigned& k) {
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
  if (size) block[order[k - 1]] = static_cast<int16_t>(signed_value(rotate_left(reader.bits, size), (1u << size) - 1));
  reader.drop(size);
  return true;
}

REGATTA_INLINE int16_t first_value(const BitReader& reader, const AcEntry& entry) {
  return static_cast<int16_t>(signed_value(rotate_left(reader.bits, entry.first_bits), entry.ones));
}

// The AC coefficients of a block into `block`, whose AC part must be zero; `order` maps their number to their place.
// False for damage.
REGATTA_INLINE bool decode_ac(BitReader& reader, const AcTable& table, const uint8_t* order, int16_t* block) {
  unsigned k = 1;
  for (;;) {
    reader.refill();
    const AcEntry* entry;
    unsigned after;
    for (int turn = 0; turn < kTurns; ++turn) {
      entry = &table.entry[reader.bits >> (64 - kAcBits)];
      after = k + entry->steps;
      if (after >= 64) goto edge;
      block[order[k + entry->first]] = first_value(reader, *entry);
      block[order[k + entry->second]] = entry->second_value;
      reader.drop(entry->drop);
      k = after;
    }
    continue;
  edge:
    if (after >= 64 + k && after < 128) {  // the block ends, and before its last place
      block[order[k + entry->first]] = first_value(reader, *entry);
      reader.drop(entry->drop);
      return true;
    }
    if (!decode_single(reader, table, order, block, k)) return false;
    if (k == 64) return true;
  }
}

}  // namespace regatta

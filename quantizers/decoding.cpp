// Packed codes to weights, for CPUs: what ``lines.dequantize`` makes of ``packed.unpack_bits``, bit
// for bit, in one pass.  See native_decoding.py.

#include <cstdint>
#include <cstring>

namespace {

typedef float floats __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));

struct Rows {
  const uint8_t* codes;  // [rows, bytes]: b-bit codes LSB-first, every row from a byte
  const float* scale;    // [rows, groups]
  const uint8_t* zeros;  // zero points of b bits, LSB-first in one stream, or null
  int64_t first;         // the number of the first one
  const float* levels;   // [2^b] in place of c - zero, or null
  float* out;            // [rows, cols]
  int64_t rows, cols, bytes, groups;
  int64_t size;  // columns of a group, a multiple of 8
  float middle;  // the zero point where none are given
};

// The eight codes in `BITS` bytes.
template <int BITS>
inline ints unpack(const uint8_t* from, int64_t left) {
  uint64_t word = 0;
  if (left >= 8)
    std::memcpy(&word, from, 8);
  else
    std::memcpy(&word, from, left);
  words both = {};
  constexpr uint32_t mask = (1u << BITS) - 1;
  if constexpr (BITS <= 4) {
    both += static_cast<uint32_t>(word);
    both >>= words{0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS};
  } else {
    const uint32_t low = word, high = word >> (4 * BITS);
    both = words{low, low, low, low, high, high, high, high};
    both >>= words{0, BITS, 2 * BITS, 3 * BITS, 0, BITS, 2 * BITS, 3 * BITS};
  }
  return __builtin_convertvector(both & mask, ints);
}

// Code `index` of a stream.
template <int BITS>
inline float code_at(const uint8_t* stream, int64_t index) {
  const int64_t bit = index * BITS, byte = bit / 8;
  const int shift = bit % 8;
  uint32_t word = stream[byte];
  if (shift + BITS > 8) word |= static_cast<uint32_t>(stream[byte + 1]) << 8;
  return static_cast<float>((word >> shift) & ((1u << BITS) - 1));
}

template <int BITS>
void decode(const Rows& p) {
  for (int64_t r = 0; r < p.rows; r++) {
    const uint8_t* codes = p.codes + r * p.bytes;
    float* out = p.out + r * p.cols;
    for (int64_t g = 0; g < p.groups; g++) {
      const float scale = p.scale[r * p.groups + g];
      const float zero =
          p.zeros ? code_at<BITS>(p.zeros, p.first + r * p.groups + g) : p.middle;
      const int64_t start = g * p.size;
      const int64_t end = start + p.size < p.cols ? start + p.size : p.cols;
      for (int64_t c = start; c < end; c += 8) {
        const int64_t at = c / 8 * BITS;
        const ints found = unpack<BITS>(codes + at, p.bytes - at);
        floats value;
        if (p.levels)
          for (int i = 0; i < 8; i++) value[i] = p.levels[found[i]];
        else
          value = __builtin_convertvector(found, floats) - zero;
        value *= scale;
        if (end - c >= 8)
          std::memcpy(out + c, &value, sizeof value);
        else
          std::memcpy(out + c, &value, 4 * (end - c));
      }
    }
  }
}

}  // namespace

extern "C" {

int bitplan_abi() { return 2; }

void bitplan_decode(const uint8_t* codes, const float* scale, const uint8_t* zeros, int64_t first,
                    const float* levels, float* out, int64_t rows, int64_t cols, int64_t bytes,
                    int64_t groups, int64_t size, float middle, int32_t bits) {
  const Rows p = {codes, scale, zeros, first, levels, out,
                  rows,  cols,  bytes, groups, size,  middle};
  switch (bits) {
    case 1: return decode<1>(p);
    case 2: return decode<2>(p);
    case 3: return decode<3>(p);
    case 4: return decode<4>(p);
    case 5: return decode<5>(p);
    case 6: return decode<6>(p);
    case 7: return decode<7>(p);
    case 8: return decode<8>(p);
  }
}
}

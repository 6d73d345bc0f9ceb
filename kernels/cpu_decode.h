// Packed codes and 16-bit floats as registers of float32; part of cpu.cpp.
//
// A block is 64 codes of one row, 8 * b bytes, LSB first. A decoder turns it into 64 floats
// BASE + code * UNIT, with BASE and UNIT of struct Code, or what a table has for the code.

#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#include <immintrin.h>
#define BITPLAN_VBMI 1
#elif defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#define BITPLAN_AVX2 1
#endif

namespace {

#ifdef BITPLAN_VBMI
constexpr int LANES = 16;  // floats in a register
#else
constexpr int LANES = 8;
#endif
constexpr int64_t BLOCK = 64;
constexpr int PARTS = BLOCK / LANES;
constexpr int BF16 = 16, FP16 = 17;  // "bits" of plain 16-bit weights
constexpr int TABLE = 18;  // and of 4-bit codes that index a table
enum Type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

typedef float vec __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));

struct Weight {
  const uint8_t* codes;  // [rows, row_bytes], or 16-bit floats [rows, cols]
  const uint16_t* scale; // float16 [rows, groups], or [1, 1]
  const uint8_t* zero;   // b-bit codes, one per scale, LSB first; null if symmetric
  int64_t rows, cols, row_bytes;
  int64_t groups;        // scales per row
  int32_t log_group;     // column k has scale k >> log_group; at least 5
  int32_t bits;
  int32_t per_tensor;
  const float* levels;   // 16 values that the codes of a TABLE stand for
};

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline float bfloat16(uint16_t half) { return from_bits(uint32_t(half) << 16); }

inline float float16(uint16_t half) {  // by a multiplication, so subnormals come out right
  const uint32_t magnitude = half & 0x7fff, sign = uint32_t(half & 0x8000) << 16;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude << 13));
  return from_bits(sign | (magnitude << 13)) * 0x1p112f;
}

inline vec float16s(const uint16_t* halves) {
#if defined(BITPLAN_VBMI)
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)halves));
#elif defined(BITPLAN_AVX2)
  return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)halves));
#else
  vec values;
  for (int i = 0; i < LANES; i++) values[i] = float16(halves[i]);
  return values;
#endif
}

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return uint16_t(bits >> 16) | 0x40;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t to_float16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;
  if (bits < 0x38800000) {  // subnormal: let an addition round
    float shifted = from_bits(bits) + 0.5f;
    memcpy(&bits, &shifted, 4);
    return sign | uint16_t(bits - 0x3f000000);
  }
  return sign | uint16_t((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13);
}

template <int BITS>
struct Code {
#ifdef BITPLAN_VBMI
  // A code of at most 7 bits becomes the high mantissa bits of a float in [0.5, 1).
  static constexpr bool MANTISSA = BITS < 8;
#else
  static constexpr bool MANTISSA = false;
#endif
  static constexpr float BASE = MANTISSA ? 0.5f : 0.0f;
  static constexpr float UNIT = MANTISSA ? 0.5f / (1 << (BITS & 7)) : 1.0f;
};

#ifdef BITPLAN_VBMI

constexpr int64_t WHOLE = 1024;  // bytes left in a row, for all blocks but its last

inline __mmask16 first_of(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1 << count) - 1);
}

template <int BITS>
struct Decoder {
  __m512i gather, shifts, spread[4];

  explicit Decoder(const Weight&) {
    alignas(64) uint8_t bytes[64];
    // Codes 8i ... 8i + 7 fill the b bytes from b * i on: put them into 64-bit lane i.
    for (int i = 0; i < 64; i++) bytes[i] = uint8_t((i / 8) * BITS + (i % 8 < BITS ? i % 8 : 0));
    gather = _mm512_load_si512(bytes);
    // Then byte j of a lane takes the bits from b * j on, shifted up to end at bit 6.
    for (int i = 0; i < 64; i++) bytes[i] = uint8_t(((i % 8) * BITS - (7 - BITS)) & 63);
    shifts = _mm512_load_si512(bytes);
    for (int q = 0; q < 4; q++) {  // byte 2 of float i is code 16 q + i
      for (int i = 0; i < 64; i++) bytes[i] = uint8_t(16 * q + i / 4);
      spread[q] = _mm512_load_si512(bytes);
    }
  }

  inline void operator()(const uint8_t* p, int64_t left, vec f[PARTS]) const {
    if constexpr (BITS == 8) {
      for (int q = 0; q < 4; q++) {
        const __mmask16 there = first_of(left - 16 * q);
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, p + 16 * q));
        f[q] = (vec)_mm512_cvtepi32_ps(wide);
      }
    } else {
      constexpr uint64_t whole = (uint64_t(1) << (8 * (BITS & 7))) - 1;
      const __mmask64 there = left >= 8 * BITS ? whole : (uint64_t(1) << left) - 1;
      __m512i codes = _mm512_permutexvar_epi8(gather, _mm512_maskz_loadu_epi8(there, p));
      codes = _mm512_multishift_epi64_epi8(shifts, codes);
      codes = _mm512_and_si512(codes, _mm512_set1_epi8(((1 << BITS) - 1) << (7 - (BITS & 7))));
      const __m512i half = _mm512_set1_epi32(0x3f000000);
      for (int q = 0; q < 4; q++)
        f[q] = (vec)_mm512_mask_permutexvar_epi8(half, 0x4444444444444444, spread[q], codes);
    }
  }
};

#else

constexpr int64_t WHOLE = 0;  // words are read across blocks, so their true number is needed

template <int BITS>
struct Decoder {
  explicit Decoder(const Weight&) {}

  inline void operator()(const uint8_t* p, int64_t left, vec f[PARTS]) const {
    uint8_t copy[8 * BITS + 8];
    if (left < 8 * BITS + 8) {  // words are read whole: not beyond the end
      memset(copy, 0, sizeof copy);
      memcpy(copy, p, size_t(left < 8 * BITS ? left : 8 * BITS));
      p = copy;
    }
#ifdef BITPLAN_AVX2
    // Dword j gets the bytes that code j is in, then the code moves down to bit 0.
    alignas(32) static constexpr auto tables = [] {
      struct { uint8_t bytes[32]; uint32_t shifts[8]; } t = {};
      for (int j = 0; j < 8; j++) {
        for (int k = 0; k < 4; k++) t.bytes[4 * j + k] = uint8_t((j * BITS / 8 + k) & 7);
        t.shifts[j] = j * BITS % 8;
      }
      return t;
    }();
    const __m256i bytes = _mm256_load_si256((const __m256i*)tables.bytes);
    const __m256i shifts = _mm256_load_si256((const __m256i*)tables.shifts);
    const __m256i mask = _mm256_set1_epi32((1 << BITS) - 1);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      int64_t word;
      memcpy(&word, p + i * BITS, 8);
      const __m256i codes = _mm256_srlv_epi32(
          _mm256_shuffle_epi8(_mm256_set1_epi64x(word), bytes), shifts);
      f[i] = (vec)_mm256_cvtepi32_ps(_mm256_and_si256(codes, mask));
    }
#else
    constexpr uvec shifts = {0, BITS, 2 * BITS, 3 * BITS, 0, BITS, 2 * BITS, 3 * BITS};
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      uint64_t word;
      memcpy(&word, p + i * BITS, 8);
      const uint32_t low = uint32_t(word), high = uint32_t(word >> (4 * BITS));
      uvec codes = {low, low, low, low, high, high, high, high};
      codes = (codes >> shifts) & ((1u << BITS) - 1);
      f[i] = __builtin_convertvector((ivec)codes, vec);
    }
#endif
  }
};

#endif

// 16-bit floats; a short last block is copied and filled up with zeros first.
struct Halves {
  uint16_t copy[BLOCK];
  const uint16_t* at;

  Halves(const uint8_t* p, int64_t left) : at((const uint16_t*)p) {
    if (left >= 2 * BLOCK) return;
    memset(copy, 0, sizeof copy);
    memcpy(copy, p, size_t(left));
    at = copy;
  }
};

template <>
struct Decoder<BF16> {
  explicit Decoder(const Weight&) {}

  inline void operator()(const uint8_t* p, int64_t left, vec f[PARTS]) const {
    const Halves from(p, left);
#pragma GCC unroll 8
    for (int i = 0; i < PARTS; i++) {
      typedef uint16_t half __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
      const half values = *(const half*)(from.at + LANES * i);
      f[i] = (vec)(__builtin_convertvector(values, uvec) << 16);
    }
  }
};

template <>
struct Decoder<FP16> {
  explicit Decoder(const Weight&) {}

  inline void operator()(const uint8_t* p, int64_t left, vec f[PARTS]) const {
    const Halves from(p, left);
#pragma GCC unroll 8
    for (int i = 0; i < PARTS; i++) f[i] = float16s(from.at + LANES * i);
  }
};

template <>
struct Decoder<TABLE> {
  Decoder<4> codes;
  float levels[16];

  explicit Decoder(const Weight& w) : codes(w) { memcpy(levels, w.levels, sizeof levels); }

  inline void operator()(const uint8_t* p, int64_t left, vec f[PARTS]) const {
    codes(p, left, f);
#pragma GCC unroll 8
    for (int i = 0; i < PARTS; i++) {
#ifdef BITPLAN_VBMI
      const __m512i code = _mm512_srli_epi32((__m512i)f[i], 19);  // the high bits of the mantissa
      f[i] = (vec)_mm512_permutexvar_ps(code, _mm512_loadu_ps(levels));
#else
      const ivec code = __builtin_convertvector(f[i], ivec);
      for (int lane = 0; lane < LANES; lane++) f[i][lane] = levels[code[lane]];
#endif
    }
  }
};

template <> struct Code<BF16> { static constexpr float BASE = 0, UNIT = 1; };
template <> struct Code<FP16> { static constexpr float BASE = 0, UNIT = 1; };
template <> struct Code<TABLE> { static constexpr float BASE = 0, UNIT = 1; };

}  // namespace

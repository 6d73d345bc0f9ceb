// What the loops of rounding.cpp work on: problems, lines, and rows in vectors.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int LANES = 16, WIDEST = 4, COLUMNS = 4, BLOCK = 64;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

#define INLINE inline __attribute__((always_inline))

// What a code stands for: scale * (c - zero) + offset, or scale * level[c] + offset.
struct Lines {
  float* scale;         // [rows, groups]
  float* zero;          // [rows, groups]
  const float* offset;  // [rows, groups], or null
  const float* levels;  // ascending [count], or null; of pairs, points [4^b, 2]
  const float* borders;  // half-way between them [count - 1]
  const uint8_t* names;  // codes of the ascending levels [count]
  int64_t groups;
  int64_t size;  // columns of a group
  int32_t most;  // the largest code
  int32_t fit;   // 0: scales and zeros are given; 1: fitted group by group; 2: scales alone
  int32_t pairs;  // whether the codes of two columns together stand for a point
};

// Points that two columns can take, or one without a neighbour.
inline int32_t point_count(const Lines& l, bool alone) {
  return alone ? l.most + 1 : (l.most + 1) * (l.most + 1);
}

struct Problem {
  const float* matrix;   // [parts, cols, cols]: what is multiplied by errors, see each function
  const int64_t* order;  // [parts, cols]: columns in the order in which they are rounded
  const float* pivots;   // [parts, cols], in that order
  int64_t parts, rows, cols;  // rows of a part
};

// Ratios at which grids are clipped.
struct Search {
  const float* ratios;
  int32_t ratio_count, refinements;
};

INLINE vec splat(float value) { return vec{} + value; }
INLINE vec least(vec a, vec b) { return a < b ? a : b; }
INLINE vec most(vec a, vec b) { return a > b ? a : b; }

// To the nearest whole number, ties to even, of values below 2^22.
INLINE vec whole(vec x) {
  const float magic = 12582912.0f;
  return (x + magic) - magic;
}

// To the nearest float16, as a float32.
INLINE vec half(vec x) {
  x = least(most(x, splat(-65504.0f)), splat(65504.0f));
  ints bits;
  std::memcpy(&bits, &x, sizeof x);
  bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF;
  vec rounded;
  std::memcpy(&rounded, &bits, sizeof x);
  const vec tiny = (x + 0.75f) - 0.75f;  // multiples of 2^-24
  const vec size = x < 0.0f ? -x : x;
  return size < 6.103515625e-05f ? tiny : rounded;
}

INLINE vec inverse(vec scale) { return scale == 0.0f ? vec{} : 1.0f / scale; }

// sums[n][v] += sum over i of factors[n * stride + i] * values[i][v], in the order of i.
template <int V, int N>
INLINE void accumulate(vec (&sums)[N][V], const float* factors, int64_t stride, const vec* values,
                       int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++)
    for (int n = 0; n < N; n++) {
      const float factor = factors[n * stride + i];
      for (int v = 0; v < V; v++) sums[n][v] += factor * values[i * V + v];
    }
}

// Rows [first, first + 16 V) of one part, fewer at its end.
struct Rows {
  int64_t part, first, count;
};

template <typename T>
INLINE void gather(float* out, int64_t width, const T* from, int64_t stride, Rows rows,
                   int64_t cols, const int64_t* order) {
  for (int64_t r = 0; r < rows.count; r++)
    for (int64_t k = 0; k < cols; k++)
      out[k * width + r] = from[(rows.first + r) * stride + (order ? order[k] : k)];
}

template <int V>
struct Buffer {
  std::vector<vec> memory;
  explicit Buffer(int64_t count) : memory(count * V) {}
  vec* at(int64_t i) { return memory.data() + i * V; }
  float* floats() { return reinterpret_cast<float*>(memory.data()); }
};

}  // namespace

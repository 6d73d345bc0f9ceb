// Linear layers on packed weights, for CPUs: codes are unpacked into registers and multiplied
// there. Reads the tensors as they are stored (quantizers/format.py), so no second layout exists.
//
// Blocks of 64 codes c become floats f = BASE + c * UNIT (cpu_decode.h); scales and zero points are
// applied once per block and once per group:
//   y = sum_g s_g sum_i (c_i - z_g) x_i
//     = sum_g s_g / UNIT (sum_i f_i x_i - (BASE + z_g UNIT) sum_i x_i)
// All sums are float32, whatever the activations are; see fixed_product() for integer ones.

#include "cpu_decode.h"

namespace {

// One row's scale / UNIT, and scale / UNIT * (BASE + zero * UNIT), LANES groups at a time.
struct Grid {
  vec* scale;
  vec* shift;
};

inline int64_t vecs(const Weight& w) { return (w.groups + LANES - 1) / LANES; }

template <int BITS, typename Value = Code<BITS>>
inline __attribute__((always_inline)) void row_grid(const Weight& w, int64_t row, Grid grid) {
  if (BITS == BF16 || BITS == FP16) {
    *grid.scale = vec{1};
    *grid.shift = vec{};
    return;
  }
  constexpr float BASE = Value::BASE, UNIT = Value::UNIT;
  const float middle = BITS == TABLE ? 0 : BITS == 1 ? 0.5f : float(1 << (BITS - 1));
  const int64_t first = w.per_tensor ? 0 : row * w.groups;
  for (int64_t v = 0; v < vecs(w); v++) {
    const int64_t left = w.groups - LANES * v, count = left < LANES ? left : LANES;
    const uint16_t* halves = w.scale + first + LANES * v;
    const int64_t bit = (first + LANES * v) * BITS;
    vec scale = {}, codes = vec{} + middle;
#ifdef BITPLAN_VBMI
    scale = (vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_of(count), halves));
    if (w.zero) {  // as Decoder, from any bit on: lane i takes b + 1 bytes
      const int64_t bytes = (bit + count * BITS + 7) / 8 - bit / 8;
      const __m128i packed = _mm_maskz_loadu_epi8(first_of(bytes), w.zero + bit / 8);
      __m128i lanes = packed;
      if (BITS < 8) {
        const __m128i high =
            _mm_maskz_loadu_epi8(first_of(bytes - BITS), w.zero + bit / 8 + BITS);
        const char b = BITS, o = char(bit % 8);
        const __m128i shifts = _mm_add_epi8(
            _mm_set1_epi8(o), _mm_setr_epi8(0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b, 0, b,
                                            2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b));
        lanes = _mm_multishift_epi64_epi8(shifts, _mm_unpacklo_epi64(packed, high));
        lanes = _mm_and_si128(lanes, _mm_set1_epi8(char((1 << BITS) - 1)));
      }
      codes = (vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(lanes));
    }
#else
    if (count == LANES)
      scale = float16s(halves);
    else
      for (int64_t g = 0; g < count; g++) scale[g] = float16(halves[g]);
    if (w.zero)
      for (int64_t g = 0, at = bit; g < count; g++, at += BITS) {
        uint32_t word = w.zero[at / 8];
        if (at % 8 + BITS > 8) word |= uint32_t(w.zero[at / 8 + 1]) << 8;
        codes[g] = float((word >> (at % 8)) & ((1u << BITS) - 1));
      }
#endif
    grid.scale[v] = scale * (1 / UNIT);
    grid.shift[v] = grid.scale[v] * (codes * UNIT + BASE);
  }
}

inline float sum(vec v) {
#ifdef BITPLAN_VBMI
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < LANES / 2; i++) total += v[i] + v[i + LANES / 2];
  return total;
#endif
}

#ifdef BITPLAN_VBMI

// One row of activations in fixed point, for integer products: block b is
// x = step[b] * (2^14 high + 2^7 middle + low) with digits within +-64, which is 21 bits of the
// largest value in the block; digits are [blocks, 3, 64].  to_fixed() also replaces x by what it
// became, so that sums of it belong to the same numbers; what is not finite becomes NaN there.
struct Fixed {
  const int8_t* digits;
  const float* step;
};

void to_fixed(float* x, int64_t blocks, int8_t* digits, float* step) {
  for (int64_t b = 0; b < blocks; b++, x += BLOCK, digits += 3 * BLOCK) {
    __m512 largest = _mm512_setzero_ps();
    for (int q = 0; q < 4; q++)
      largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + 16 * q)));
    const float most = _mm512_reduce_max_ps(largest);
    step[b] = most * 0x1p-20f;
    const __m512 inverse = _mm512_set1_ps(most > 0 ? 0x1p20f / most : 0);
    const __m512i half = _mm512_set1_epi32(64), seven = _mm512_set1_epi32(127);
    for (int q = 0; q < 4; q++) {
      const __m512 before = _mm512_loadu_ps(x + 16 * q);
      __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(before, inverse));
      _mm512_storeu_ps(x + 16 * q, _mm512_fmadd_ps(_mm512_cvtepi32_ps(value),
                                                   _mm512_set1_ps(step[b]),
                                                   _mm512_sub_ps(before, before)));
      for (int d = 2; d > 0; d--) {
        const __m512i digit = _mm512_sub_epi32(
            _mm512_and_si512(_mm512_add_epi32(value, half), seven), half);
        _mm_storeu_si128((__m128i*)(digits + d * BLOCK + 16 * q), _mm512_cvtepi32_epi8(digit));
        value = _mm512_srai_epi32(_mm512_sub_epi32(value, digit), 7);
      }
      _mm_storeu_si128((__m128i*)(digits + 16 * q), _mm512_cvtepi32_epi8(value));
    }
  }
}

struct Plain {  // codes as they are
  static constexpr float BASE = 0, UNIT = 1;
};

// As `product` for one row of activations, in integers, with half of the instructions.
template <int BITS, bool HALVES>
void fixed_product(const Weight& w, Fixed x, const vec* sums, float* y, const float* bias,
                   int64_t begin, int64_t end, Grid grid) {
  alignas(64) uint8_t bytes[64];
  for (int i = 0; i < 64; i++) bytes[i] = uint8_t((i / 8) * BITS + (i % 8 < BITS ? i % 8 : 0));
  const __m512i gather = _mm512_load_si512(bytes);
  for (int i = 0; i < 64; i++) bytes[i] = uint8_t((i % 8) * BITS & 63);
  const __m512i shifts = _mm512_load_si512(bytes);
  const __m512i mask = _mm512_set1_epi8(char((1 << BITS) - 1));
  const int64_t blocks = (w.cols + BLOCK - 1) / BLOCK, groups = vecs(w);
  const int shift = w.log_group - 6;

  const float* const scale = (const float*)grid.scale;
  constexpr uint64_t whole = BITS == 8 ? ~uint64_t(0) : (uint64_t(1) << (8 * BITS % 64)) - 1;
  const int64_t left = w.row_bytes - (blocks - 1) * 8 * BITS;
  const uint64_t rest = left == 8 * BITS ? whole : (uint64_t(1) << left) - 1;
  for (int64_t row = begin; row < end; row++) {
    const uint8_t* p = w.codes + row * w.row_bytes;
    row_grid<BITS, Plain>(w, row, grid);
    vec total = {};
    for (int64_t v = 0; v < groups; v++) total -= grid.shift[v] * sums[v];
    const auto add = [&](int64_t b, uint64_t there) __attribute__((always_inline)) {
      __m512i codes = _mm512_maskz_loadu_epi8(there, p);
      p += 8 * BITS;
      if (BITS < 8) {
        codes = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(gather, codes));
        codes = _mm512_and_si512(codes, mask);
      }
      const __m512i* digits = (const __m512i*)x.digits + 3 * b;
      __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, digits[0]);
      dot = _mm512_dpbusd_epi32(_mm512_slli_epi32(dot, 7), codes, digits[1]);
      dot = _mm512_dpbusd_epi32(_mm512_slli_epi32(dot, 7), codes, digits[2]);
      const vec sum = (vec)_mm512_cvtepi32_ps(dot) * x.step[b];
      if (HALVES)  // the first 32 codes are in the first eight lanes
        total += sum * (vec)_mm512_mask_blend_ps(0xff00, _mm512_set1_ps(scale[2 * b]),
                                                 _mm512_set1_ps(scale[2 * b + 1]));
      else
        total += sum * scale[b >> shift];
    };
    for (int64_t b = 0; b < blocks - 1; b++) add(b, whole);
    add(blocks - 1, rest);
    y[row] = sum(total) + (bias ? bias[row] : 0);
  }
}

#endif

// Activations as float32 [m, stride], zero behind the last column, and their sums per group
// [m, LANES * vecs], zero behind the last group.
struct Inputs {
  const float* x;
  const vec* sums;
  int64_t stride;  // no multiple of 4 KiB: rows must not compete for the same lines of the cache
};

template <int BITS>
constexpr int64_t block_bytes() {
  return BITS == TABLE ? 4 * 8 : BITS >= BF16 ? 2 * BLOCK : 8 * BITS;
}

// M rows of activations times rows [begin, end) of the weight; y is float32 [M, rows].
template <int BITS, int M, bool HALVES>
void product(const Weight& w, Inputs in, float* y, const float* bias, int64_t begin, int64_t end,
             Grid grid) {
  const Decoder<BITS> decode(w);
  const int64_t blocks = (w.cols + BLOCK - 1) / BLOCK;
  const float* const scale = (const float*)grid.scale;
  const int shift = w.log_group - 6;  // block b is in group b >> shift
  for (int64_t row = begin; row < end; row++) {
    const uint8_t* p = w.codes + row * w.row_bytes;
    row_grid<BITS>(w, row, grid);
    vec total[M];
    for (int i = 0; i < M; i++) {
      total[i] = vec{};
      for (int64_t v = 0; v < vecs(w); v++) total[i] -= grid.shift[v] * in.sums[i * vecs(w) + v];
    }
    const uint8_t* const stop = p + w.row_bytes;
    const auto add = [&](int64_t b, int64_t left) __attribute__((always_inline)) {
      vec f[PARTS];
      decode(p, left, f);
      p += block_bytes<BITS>();
      for (int i = 0; i < M; i++) {
        const vec* x = (const vec*)(in.x + i * in.stride + b * BLOCK);
        vec dot[1 + HALVES] = {};
#pragma GCC unroll 8
        for (int q = 0; q < PARTS; q++) dot[HALVES ? 2 * q / PARTS : 0] += f[q] * x[q];
        for (int h = 0; h <= HALVES; h++)
          total[i] += dot[h] * scale[HALVES ? 2 * b + h : b >> shift];
      }
    };
    for (int64_t b = 0; b < blocks - 1; b++) add(b, WHOLE ? WHOLE : stop - p);
    add(blocks - 1, stop - p);
    for (int i = 0; i < M; i++) y[i * w.rows + row] = sum(total[i]) + (bias ? bias[row] : 0);
  }
}

template <int BITS, int M>
void product_of(const Weight& w, Inputs in, float* y, const float* bias, int64_t begin,
                int64_t end, Grid grid) {
  if (w.log_group == 5)
    product<BITS, M, true>(w, in, y, bias, begin, end, grid);
  else
    product<BITS, M, false>(w, in, y, bias, begin, end, grid);
}

template <int BITS>
void products(const Weight& w, Inputs in, int64_t m, float* y, const float* bias, int64_t begin,
              int64_t end, Grid grid) {
  for (int64_t i = 0, step; i < m; i += step) {
    const Inputs from = {in.x + i * in.stride, in.sums + i * vecs(w), in.stride};
    float* to = y + i * w.rows;
    step = m - i >= 8 ? 8 : m - i >= 4 ? 4 : m - i >= 2 ? 2 : 1;
    if (step == 8) product_of<BITS, 8>(w, from, to, bias, begin, end, grid);
    if (step == 4) product_of<BITS, 4>(w, from, to, bias, begin, end, grid);
    if (step == 2) product_of<BITS, 2>(w, from, to, bias, begin, end, grid);
    if (step == 1) product_of<BITS, 1>(w, from, to, bias, begin, end, grid);
  }
}

// Rows [begin, end) of the weight, or those with these indices, as float32 [count, cols].
template <int BITS>
void unpack(const Weight& w, const int64_t* indices, float* out, int64_t begin, int64_t end,
            Grid grid) {
  const Decoder<BITS> decode(w);
  const float* const scale = (const float*)grid.scale;
  const float* const shift = (const float*)grid.shift;
  for (int64_t n = begin; n < end; n++, out += w.cols) {
    const int64_t row = indices ? indices[n] : n;
    const uint8_t* p = w.codes + row * w.row_bytes;
    const uint8_t* const stop = p + w.row_bytes;
    row_grid<BITS>(w, row, grid);
    for (int64_t k = 0; k < w.cols; k += BLOCK, p += block_bytes<BITS>()) {
      vec f[PARTS];
      decode(p, stop - p, f);
      for (int q = 0; q < PARTS && k + q * LANES < w.cols; q++) {
        const int64_t at = k + q * LANES, g = at >> w.log_group, left = w.cols - at;
        const vec values = f[q] * scale[g] - shift[g];
        memcpy(out + at, &values, sizeof(float) * size_t(left < LANES ? left : LANES));
      }
    }
  }
}

template <typename Call>
void by_bits(int bits, Call call) {
  switch (bits) {
#define BITPLAN_CASE(B) \
  case B: return call.template operator()<B>();
    BITPLAN_CASE(1) BITPLAN_CASE(2) BITPLAN_CASE(3) BITPLAN_CASE(4)
    BITPLAN_CASE(5) BITPLAN_CASE(6) BITPLAN_CASE(7) BITPLAN_CASE(8)
    BITPLAN_CASE(BF16) BITPLAN_CASE(FP16) BITPLAN_CASE(TABLE)
#undef BITPLAN_CASE
  }
}

// Memory for one call, in pieces aligned to a vec.
struct Scratch {
  char* memory;
  size_t used = 0;
  explicit Scratch(int64_t vectors)
      : memory((char*)aligned_alloc(sizeof(vec), sizeof(vec) * size_t(vectors))) {}
  ~Scratch() { free(memory); }
  vec* take(int64_t vectors) {
    vec* piece = (vec*)(memory + used);
    used += sizeof(vec) * size_t(vectors);
    return piece;
  }
};

void read_row(const void* x, int type, int64_t row, int64_t cols, float* out) {
  if (type == FLOAT32) {
    memcpy(out, (const float*)x + row * cols, sizeof(float) * size_t(cols));
  } else {
    const uint16_t* halves = (const uint16_t*)x + row * cols;
    if (type == BFLOAT16)
      for (int64_t i = 0; i < cols; i++) out[i] = bfloat16(halves[i]);
    else
      for (int64_t i = 0; i < cols; i++) out[i] = float16(halves[i]);
  }
}

// Split [0, count) over threads; call(part, begin, end).
template <typename Call>
void in_parallel(int64_t count, int threads, Call call) {
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int part = 0; part < threads; part++)
    call(part, count * part / threads, count * (part + 1) / threads);
}

}  // namespace

extern "C" {

// y [m, rows] = x [m, cols] * W^T + bias; x and y are of `type`, bias is float32 or null.
void bitplan_linear(const Weight* weight, const void* x, int type, int64_t m, const float* bias,
                    void* y, int threads) {
  const Weight& w = *weight;
  const int64_t padded = (w.cols + BLOCK - 1) / BLOCK * BLOCK, stride = padded + LANES;
  const int64_t narrow = type == FLOAT32 ? 0 : (m * w.rows + LANES - 1) / LANES;
  const int64_t fixed = padded / BLOCK * 4;  // at least what to_fixed() fills
  Scratch scratch(m * (stride / LANES + vecs(w)) + 2 * threads * vecs(w) + narrow + fixed + 1);
  float* const inputs = (float*)scratch.take(m * stride / LANES);
  vec* const sums = scratch.take(m * vecs(w));
  memset(sums, 0, sizeof(vec) * size_t(m * vecs(w)));
#ifdef BITPLAN_VBMI
  const bool one = m == 1 && w.bits <= 8;
  const int64_t blocks = padded / BLOCK;
  int8_t* const digits = (int8_t*)scratch.take(3 * blocks);
  float* const steps = (float*)scratch.take((blocks + LANES - 1) / LANES);
#endif
  for (int64_t i = 0; i < m; i++) {
    float* const row = inputs + i * stride;
    read_row(x, type, i, w.cols, row);
    memset(row + w.cols, 0, sizeof(float) * size_t(padded - w.cols));
#ifdef BITPLAN_VBMI
    if (one) to_fixed(row, blocks, digits, steps);
#endif
    for (int64_t k = 0; k < w.cols; k += LANES)
      ((float*)(sums + i * vecs(w)))[k >> w.log_group] += sum(*(const vec*)(row + k));
  }
  vec* const grids = scratch.take(2 * threads * vecs(w));
  float* const out = narrow ? (float*)scratch.take(narrow) : (float*)y;
  in_parallel(w.rows, threads, [&](int part, int64_t begin, int64_t end) {
    vec* const own = grids + 2 * part * vecs(w);
    by_bits(w.bits, [&]<int BITS>() {
#ifdef BITPLAN_VBMI
      if constexpr (BITS <= 8)
        if (one) {
          const auto call = w.log_group == 5 ? fixed_product<BITS, true> : fixed_product<BITS, false>;
          return call(w, {digits, steps}, sums, out, bias, begin, end, {own, own + vecs(w)});
        }
#endif
      products<BITS>(w, {inputs, sums, stride}, m, out, bias, begin, end, {own, own + vecs(w)});
    });
  });
  if (type == BFLOAT16)
    for (int64_t i = 0; i < m * w.rows; i++) ((uint16_t*)y)[i] = to_bfloat16(out[i]);
  if (type == FLOAT16)
    for (int64_t i = 0; i < m * w.rows; i++) ((uint16_t*)y)[i] = to_float16(out[i]);
}

// Rows first ... first + count - 1 of W, or those with these indices, as float32 [count, cols].
void bitplan_unpack(const Weight* weight, const int64_t* indices, int64_t first, int64_t count,
                    float* out, int threads) {
  const Weight& w = *weight;
  Scratch scratch(2 * threads * vecs(w));
  vec* const grids = scratch.take(2 * threads * vecs(w));
  in_parallel(count, threads, [&](int part, int64_t begin, int64_t end) {
    vec* const own = grids + 2 * part * vecs(w);
    by_bits(w.bits, [&]<int BITS>() {
      unpack<BITS>(w, indices, out + begin * w.cols, indices ? begin : first + begin,
                   indices ? end : first + end, {own, own + vecs(w)});
    });
  });
}

// Changes whenever the arguments do, so that a library of another version is not called.
int bitplan_abi() { return 2; }
}

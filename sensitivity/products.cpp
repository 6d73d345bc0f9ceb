// Products of per-sample gradients with the rendering errors of all formats, for CPUs, in one pass
// over both: see native_products.py.

#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 8, SAMPLES = 6, FORMATS = 2;
constexpr int64_t CHUNK = 2048;  // weights at a time: those of all samples stay in the cache
typedef float vec __attribute__((vector_size(4 * LANES)));

inline vec load(const float* from, int64_t left) {
  vec value = {};
  if (left >= LANES)
    std::memcpy(&value, from, sizeof value);
  else
    std::memcpy(&value, from, 4 * left);
  return value;
}

// sums[s * formats + f] += sum over i of g[s * stride + i] e[f * stride + i], or of their squares.
template <int S, int F, bool SQUARED>
inline void tile(const float* g, const float* e, int64_t stride, int64_t count, int64_t formats,
                 double* sums) {
  vec total[S][F] = {};
  for (int64_t i = 0; i < count; i += LANES) {
    vec error[F];
    for (int f = 0; f < F; f++) {
      error[f] = load(e + f * stride + i, count - i);
      if (SQUARED) error[f] *= error[f];
    }
    for (int s = 0; s < S; s++) {
      vec gradient = load(g + s * stride + i, count - i);
      if (SQUARED) gradient *= gradient;
      for (int f = 0; f < F; f++) total[s][f] += gradient * error[f];
    }
  }
  for (int s = 0; s < S; s++)
    for (int f = 0; f < F; f++) {
      double sum = 0;
      for (int lane = 0; lane < LANES; lane++) sum += total[s][f][lane];
      sums[s * formats + f] += sum;
    }
}

template <bool SQUARED>
void add(const float* g, const float* e, int64_t samples, int64_t formats, int64_t size,
         int64_t start, int64_t count, double* sums) {
  for (int64_t s = 0; s < samples;) {
    const bool many = s + SAMPLES <= samples;
    for (int64_t f = 0; f < formats;) {
      const float *from = g + s * size + start, *to = e + f * size + start;
      double* at = sums + s * formats + f;
      const bool two = f + FORMATS <= formats;
      if (many && two)
        tile<SAMPLES, FORMATS, SQUARED>(from, to, size, count, formats, at);
      else if (many)
        tile<SAMPLES, 1, SQUARED>(from, to, size, count, formats, at);
      else if (two)
        tile<1, FORMATS, SQUARED>(from, to, size, count, formats, at);
      else
        tile<1, 1, SQUARED>(from, to, size, count, formats, at);
      f += two ? FORMATS : 1;
    }
    s += many ? SAMPLES : 1;
  }
}

}  // namespace

extern "C" {

int bitplan_abi() { return 1; }

// g: [samples, size], e: [formats, size], sums and squares: [samples, formats], set to zero.
void bitplan_products(const float* g, const float* e, int64_t samples, int64_t formats,
                      int64_t size, double* sums, double* squares) {
  for (int64_t start = 0; start < size; start += CHUNK) {
    const int64_t count = size - start < CHUNK ? size - start : CHUNK;
    add<false>(g, e, samples, formats, size, start, count, sums);
    add<true>(g, e, samples, formats, size, start, count, squares);
  }
}
}

// Trellis codes of columns under a quadratic tr(E H E^T), for CPUs: see trellis.py, which says what is
// computed, and native_trellis.py, which calls this.
//
// A column of a tile of rows is one walk through the trellis, which the algorithm of Viterbi finds
// with the least squared error; columns come one after the other, each to make up for the errors of
// those before it.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int STATE_BITS = 12, STATES = 1 << STATE_BITS, LANES = 16;
constexpr float NEVER = 1e30f;
constexpr float LEAST = 0.03f;  // as in trellis.py
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

struct Problem {
  const float* feedback;  // [cols, cols]: row k holds what errors of columns before k do to it; null
  const float* matrix;    // H [cols, cols]
  const float* weight;    // [rows, cols]
  const float* scale;     // [rows]
  const float* counts;    // [rows]: what an error in a row costs
  const float* table;     // [4096]: what a state stands for
  uint8_t* codes;         // [rows, cols]
  int64_t rows, cols, tile;
  int32_t start;   // the state before the first row of a tile
  int32_t passes;  // over all columns once they have codes
  int32_t given;   // whether they have them already
};

inline vec load(const float* from) {
  vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline vec least(vec a, vec b) { return a < b ? a : b; }

// Every lane repeated K times: the part-th vector of those.
template <int K>
inline vec repeated(vec value, int part) {
  ints at = {};
  for (int lane = 0; lane < LANES; lane++) at[lane] = (part * LANES + lane) / K;
#if defined(__clang__)
  vec found;
  for (int lane = 0; lane < LANES; lane++) found[lane] = value[at[lane]];
  return found;
#else
  return __builtin_shuffle(value, at);
#endif
}

// The walk nearest to targets [count] whose squared errors weigh `counts`; its codes and values.
template <int B>
struct Walk {
  static constexpr int K = 1 << B, PREFIXES = STATES >> B;
  std::vector<float> cost, before;
  std::vector<uint8_t> from;

  explicit Walk(int64_t longest) : cost(STATES), before(PREFIXES), from(longest * PREFIXES) {}

  void find(const float* target, const float* counts, int64_t count, const float* table,
            int start, uint8_t* codes, float* values) {
    for (float& c : cost) c = NEVER;
    cost[start] = 0;
    for (int64_t i = 0; i < count; i++) {
      uint8_t* back = from.data() + i * PREFIXES;
      vec lowest = vec{} + NEVER;
      for (int j = 0; j < PREFIXES; j += LANES) {
        vec best = vec{} + 2 * NEVER;
        for (int k = 0; k < K; k++) {  // the low bits of a cost say where it comes from
          const vec c = load(cost.data() + k * PREFIXES + j);
          const ints tagged = ((ints)c & ~(K - 1)) | k;
          best = least(best, (vec)tagged);
        }
        lowest = least(lowest, best);
        std::memcpy(before.data() + j, &best, sizeof best);
        typedef uint8_t bytes __attribute__((vector_size(LANES)));
        const bytes tags = __builtin_convertvector((ints)best & (K - 1), bytes);
        std::memcpy(back + j, &tags, sizeof tags);
      }
      float base = lowest[0];
      for (int lane = 1; lane < LANES; lane++) base = lowest[lane] < base ? lowest[lane] : base;
      const float t = target[i], weight = counts[i];
      for (int j = 0; j < PREFIXES; j += LANES) {
        const vec best = load(before.data() + j) - base;
#pragma GCC unroll 16
        for (int part = 0; part < K; part++) {
          const int at = j * K + part * LANES;
          const vec off = t - load(table + at);
          const vec total = repeated<K>(best, part) + weight * off * off;
          std::memcpy(cost.data() + at, &total, sizeof total);
        }
      }
    }
    int state = 0;
    for (int s = 1; s < STATES; s++)
      if (cost[s] < cost[state]) state = s;
    for (int64_t i = count - 1; i >= 0; i--) {
      codes[i] = uint8_t(state & (K - 1));
      values[i] = table[state];
      const int prefix = state >> B;
      state = from[i * PREFIXES + prefix] * PREFIXES + prefix;
    }
  }
};

// Rows [first, first + count); errors are kept as [block of 64 rows, column, row].
constexpr int BLOCK = 4 * LANES;

// sums[row] += sum over columns of factors[column] * errors[.., column, row]
void multiply(const float* factors, int64_t columns, const float* errors, int64_t cols,
              int64_t blocks, float* sums) {
  for (int64_t b = 0; b < blocks; b++) {
    vec sum[4] = {};
    const float* e = errors + b * cols * BLOCK;
    for (int64_t i = 0; i < columns; i++)
      for (int v = 0; v < 4; v++) sum[v] += factors[i] * load(e + i * BLOCK + v * LANES);
    std::memcpy(sums + b * BLOCK, sum, sizeof sum);
  }
}

template <int B>
void tile(const Problem& p, int64_t first, int64_t count) {
  const int64_t cols = p.cols, blocks = (count + BLOCK - 1) / BLOCK;
  std::vector<float> errors(blocks * cols * BLOCK), sums(blocks * BLOCK);
  std::vector<float> target(count), counts(count), values(count);
  std::vector<uint8_t> codes(count);
  Walk<B> walk(count);
  double mean = 0;
  for (int64_t r = 0; r < count; r++) {
    const float s = p.scale[first + r];
    counts[r] = p.counts[first + r] * s * s;
    mean += counts[r] / count;
  }
  for (int64_t r = 0; r < count; r++) {
    const float share = mean > 0 ? float(counts[r] / mean) : 0;
    counts[r] = p.scale[first + r] == 0 ? 0 : share > LEAST ? share : LEAST;
  }
  auto error = [&](int64_t r, int64_t k) -> float& {
    return errors[(r / BLOCK * cols + k) * BLOCK + r % BLOCK];
  };
  if (p.given)
    for (int64_t k = 0; k < cols; k++) {
      int state = p.start;
      for (int64_t r = 0; r < count; r++) {
        const int64_t at = (first + r) * cols + k;
        state = (state << B | p.codes[at]) & (STATES - 1);
        error(r, k) = p.weight[at] - p.scale[first + r] * p.table[state];
      }
    }
  for (int32_t pass = p.given ? 1 : 0; pass <= p.passes; pass++)
    for (int64_t k = 0; k < cols; k++) {
      const float* factors = pass ? p.matrix + k * cols : p.feedback ? p.feedback + k * cols : nullptr;
      if (factors) multiply(factors, pass ? cols : k, errors.data(), cols, blocks, sums.data());
      const float pull = pass ? 1 / factors[k] : 1;
      for (int64_t r = 0; r < count; r++) {
        const int64_t at = (first + r) * cols + k;
        const float s = p.scale[first + r], w = p.weight[at];
        const float now = pass ? w - error(r, k) : w;
        target[r] = s == 0 ? 0 : (now + pull * sums[r]) / s;
      }
      walk.find(target.data(), counts.data(), count, p.table, p.start, codes.data(),
                values.data());
      for (int64_t r = 0; r < count; r++) {
        const int64_t at = (first + r) * cols + k;
        p.codes[at] = codes[r];
        error(r, k) = p.weight[at] - p.scale[first + r] * values[r];
      }
    }
}

template <int B>
void tiles(const Problem& p, int threads) {
  const int64_t count = (p.rows + p.tile - 1) / p.tile;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t i = 0; i < count; i++) {
    const int64_t first = i * p.tile, left = p.rows - first;
    tile<B>(p, first, left < p.tile ? left : p.tile);
  }
}

}  // namespace

extern "C" {

void bitplan_trellis(const Problem* p, int bits, int threads) {
  if (bits == 2) tiles<2>(*p, threads);
  if (bits == 3) tiles<3>(*p, threads);
  if (bits == 4) tiles<4>(*p, threads);
}

int bitplan_abi() { return 1; }
}

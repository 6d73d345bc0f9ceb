// The inner loops of rounding under a quadratic tr(E H E^T), for CPUs: see rounding.py, which says
// what is computed, and native_rounding.py, which calls this.
//
// Rows do not depend on each other.  A tile of rows is laid out so that every vector holds one
// column of 16 of them: each row sees the same operations in the same order whatever else is in its
// tile, so that results depend neither on the number of threads nor on which rows come together.

#include "rounding_types.h"

namespace {

// ---------------------------------------------------------------- fitting the grid of a group

struct Fit {
  vec scale, zero, error;
};

// The best scale and zero point of 16 rows for `count` columns x[k * V], whose squared errors
// weigh `weights`.
template <int V>
struct Fitting {
  const vec* x;
  const float* weights;
  int64_t count;
  float top;
  Fit best;

  INLINE vec code(vec position) const {
    return whole(least(most(position, vec{}), splat(top)));
  }

  INLINE void offer(vec scale, vec zero) {
    scale = half(scale);
    const vec inv = inverse(scale);
    vec sum = {};
    for (int64_t k = 0; k < count; k++) {
      const vec position = x[k * V] * inv + zero;
      const vec off = position - code(position);
      const vec weighted = off * weights[k];
      sum += weighted * off;
    }
    sum = sum * scale;
    sum = sum * scale;
    const ints better = (sum < best.error) & (scale != 0.0f);
    best.error = better ? sum : best.error;
    best.scale = better ? scale : best.scale;
    best.zero = better ? zero : best.zero;
  }

  INLINE void refit() {
    const vec inv = inverse(best.scale), zero = best.zero;
    vec norm = {}, product = {};
    for (int64_t k = 0; k < count; k++) {
      const vec position = x[k * V] * inv + zero;
      const vec step = code(position) - zero;
      const vec weighted = step * weights[k];
      norm += weighted * step;
      product += weighted * x[k * V];
    }
    offer(norm > 0.0f ? product / norm : best.scale, zero);
  }

  INLINE vec up(vec zero) const { return least(zero + 1.0f, splat(top)); }
  INLINE vec down(vec zero) const { return most(zero - 1.0f, vec{}); }

  INLINE Fit search(const Search& how, bool symmetric, vec middle) {
    vec low = {}, high = {};
    for (int64_t k = 0; k < count; k++) {
      low = least(low, x[k * V]);
      high = most(high, x[k * V]);
    }
    best = {vec{}, middle, splat(std::numeric_limits<float>::infinity())};
    if (symmetric) {
      const vec largest = high > -low ? high : low;
      const vec starts[2] = {largest / -middle, largest / (top - middle)};
      for (const vec& start : starts)
        for (int32_t i = 0; i < how.ratio_count; i++) offer(start * how.ratios[i], middle);
    } else {
      const vec width = high - low;
      const vec position = width == 0.0f ? vec{} : -low / width * top;
      const vec start = width / top, zero = whole(position);
      for (int32_t i = 0; i < how.ratio_count; i++) {
        const vec scale = start * how.ratios[i];
        offer(scale, zero);
        offer(scale, up(zero));
        offer(scale, down(zero));
      }
    }
    for (int32_t i = 0; i < how.refinements; i++) {
      if (!symmetric) {
        const vec scale = best.scale, zero = best.zero;
        offer(scale, up(zero));
        offer(scale, down(zero));
      }
      refit();
    }
    return best;
  }
};

// ---------------------------------------------------------------- rounding with feedback

// matrix: the feedback, transposed: row k holds what errors of columns before k do to column k.
template <int V>
void sweep_tile(const Problem& p, const Lines& l, const Search& how, const float* weight,
                uint8_t* codes, Rows rows) {
  const int64_t cols = p.cols, width = V * LANES, groups = l.groups;
  const float* back = p.matrix + rows.part * cols * cols;
  const int64_t* order = p.order + rows.part * cols;
  const float* pivots = p.pivots + rows.part * cols;
  Buffer<V> w(cols), error(cols), code(cols), scale(groups), zero(groups), offset(groups);
  gather(w.floats(), width, weight, cols, rows, cols, order);
  if (!l.fit) gather(scale.floats(), width, l.scale, groups, rows, groups, nullptr);
  if (l.fit != 1) gather(zero.floats(), width, l.zero, groups, rows, groups, nullptr);
  if (l.offset) gather(offset.floats(), width, l.offset, groups, rows, groups, nullptr);
  const int64_t longest = l.fit ? (l.size < cols ? l.size : cols) : BLOCK;
  Buffer<V> target(longest), expected(longest), made_up(longest);
  for (int64_t start = 0, end; start < cols; start = end) {
    const int64_t group = order[start] / l.size;
    for (end = start + 1; end < cols && end - start < longest; end++)
      if (l.fit && order[end] / l.size != group) break;
    int64_t k = start;
    for (; k + COLUMNS <= end; k += COLUMNS) {
      vec sums[COLUMNS][V];
      std::memcpy(sums, w.at(k), sizeof sums);
      accumulate<V, COLUMNS>(sums, back + k * cols, cols, error.at(0), 0, start);
      std::memcpy(target.at(k - start), sums, sizeof sums);
    }
    for (; k < end; k++) {
      vec sums[1][V];
      std::memcpy(sums, w.at(k), sizeof sums);
      accumulate<V, 1>(sums, back + k * cols, cols, error.at(0), 0, start);
      std::memcpy(target.at(k - start), sums, sizeof sums);
    }
    if (l.fit) {
      for (int64_t i = 0; i < end - start; i++) {  // what these columns best were, not rounded
        vec sums[1][V];
        for (int v = 0; v < V; v++) sums[0][v] = target.at(i)[v] - w.at(start + i)[v];
        accumulate<V, 1>(sums, back + (start + i) * cols + start, cols, made_up.at(0), 0, i);
        for (int v = 0; v < V; v++) {
          made_up.at(i)[v] = -sums[0][v];
          expected.at(i)[v] = w.at(start + i)[v] + sums[0][v];
        }
      }
      for (int v = 0; v < V; v++) {
        Fitting<V> fitting{expected.at(0) + v, pivots + start, end - start, float(l.most), {}};
        const Fit fit = fitting.search(how, l.fit == 2, zero.at(group)[v]);
        scale.at(group)[v] = fit.scale;
        zero.at(group)[v] = fit.zero;
      }
    }
    for (k = start; l.pairs && k < end; k += 2) {  // both columns at once
      const bool alone = k + 1 == cols;
      const int64_t n = alone ? 1 : 2;
      vec sums[2][V] = {};
      std::memcpy(sums, target.at(k - start), n * sizeof sums[0]);
      for (int64_t i = 0; i < n; i++)
        accumulate<V, 1>(reinterpret_cast<vec(&)[1][V]>(sums[i]), back + (k + i) * cols, cols,
                         error.at(0), start, k);
      const float onward = alone ? 0 : back[(k + 1) * cols + k];
      const float first = pivots[k], second = alone ? 0 : pivots[k + 1];
      const int64_t g = order[k] / l.size;
      const int32_t count = point_count(l, alone);
      for (int v = 0; v < V; v++) {
        const vec s = scale.at(g)[v], w0 = w.at(k)[v];
        vec best = splat(std::numeric_limits<float>::infinity()), number = {}, x = {}, y = {};
        for (int32_t i = 0; i < count; i++) {
          const vec px = s * l.levels[2 * i], py = s * l.levels[2 * i + 1];
          const vec off = sums[0][v] - px;
          const vec next = sums[1][v] + onward * (w0 - px) - py;
          const vec cost = first * off * off + second * next * next;
          const ints better = cost < best;
          best = better ? cost : best;
          number = better ? splat(float(i)) : number;
          x = better ? px : x;
          y = better ? py : y;
        }
        code.at(k)[v] = number;
        error.at(k)[v] = w0 - x;
        if (!alone) error.at(k + 1)[v] = w.at(k + 1)[v] - y;
      }
    }
    for (k = start; !l.pairs && k < end; k++) {
      vec sums[1][V];
      std::memcpy(sums, target.at(k - start), sizeof sums);
      accumulate<V, 1>(sums, back + k * cols, cols, error.at(0), start, k);
      const int64_t g = order[k] / l.size;
      for (int v = 0; v < V; v++) {
        const vec s = scale.at(g)[v];
        const vec position = (sums[0][v] - offset.at(g)[v]) * inverse(s);
        vec c, level;
        if (l.levels) {
          c = vec{};
          level = splat(l.levels[0]);
          for (int32_t i = 0; i < l.most; i++) {
            const ints above = position >= splat(l.borders[i]);
            c = above ? splat(float(i + 1)) : c;
            level = above ? splat(l.levels[i + 1]) : level;
          }
        } else {
          c = whole(least(most(position + zero.at(g)[v], vec{}), splat(float(l.most))));
          level = c - zero.at(g)[v];
        }
        code.at(k)[v] = c;
        const vec product = level * s;
        error.at(k)[v] = w.at(k)[v] - (product + offset.at(g)[v]);
      }
    }
  }
  for (int64_t r = 0; r < rows.count; r++) {
    uint8_t* out = codes + (rows.first + r) * cols;
    for (int64_t k = 0; l.pairs && k < cols; k += 2) {
      const int c = int(code.floats()[k * width + r]);
      out[order[k]] = uint8_t(c % (l.most + 1));
      if (k + 1 < cols) out[order[k + 1]] = uint8_t(c / (l.most + 1));
    }
    for (int64_t k = 0; !l.pairs && k < cols; k++) {
      const int c = int(code.floats()[k * width + r]);
      out[order[k]] = l.levels ? l.names[c] : uint8_t(c);
    }
    if (l.fit)
      for (int64_t g = 0; g < groups; g++) {
        l.scale[(rows.first + r) * groups + g] = scale.floats()[g * width + r];
        l.zero[(rows.first + r) * groups + g] = zero.floats()[g * width + r];
      }
  }
}

// ---------------------------------------------------------------- slopes and normal equations

// matrix: H.  slope = E H.
template <int V>
void slope_tile(const Problem& p, const float* error, float* slope, Rows rows) {
  const int64_t cols = p.cols, width = V * LANES;
  const float* h = p.matrix + rows.part * cols * cols;
  Buffer<V> e(cols), out(COLUMNS);
  gather(e.floats(), width, error, cols, rows, cols, nullptr);
  for (int64_t k = 0, n; k < cols; k += n) {
    n = cols - k < COLUMNS ? 1 : COLUMNS;
    if (n == COLUMNS) {
      vec sums[COLUMNS][V] = {};
      accumulate<V, COLUMNS>(sums, h + k * cols, cols, e.at(0), 0, cols);
      std::memcpy(out.at(0), sums, sizeof sums);
    } else {
      vec sums[1][V] = {};
      accumulate<V, 1>(sums, h + k * cols, cols, e.at(0), 0, cols);
      std::memcpy(out.at(0), sums, sizeof sums);
    }
    for (int64_t r = 0; r < rows.count; r++)
      for (int64_t i = 0; i < n; i++)
        slope[(rows.first + r) * cols + k + i] = out.floats()[i * width + r];
  }
}

// matrix: H.  With B the columns of `basis` split into spans: normal = B H B^T [rows, spans, spans].
template <int V>
void normal_tile(const Problem& p, int64_t spans, int64_t size, const float* basis, float* normal,
                 Rows rows) {
  const int64_t cols = p.cols, width = V * LANES;
  const float* h = p.matrix + rows.part * cols * cols;
  Buffer<V> b(cols), out(spans * spans);
  gather(b.floats(), width, basis, cols, rows, cols, nullptr);
  for (int64_t g = 0; g < spans; g++) {
    const int64_t from = g * size, to = from + size < cols ? from + size : cols;
    int64_t k = from;
    for (; k + COLUMNS <= cols; k += COLUMNS) {
      vec sums[COLUMNS][V] = {};
      accumulate<V, COLUMNS>(sums, h + k * cols, cols, b.at(0), from, to);
      for (int n = 0; n < COLUMNS; n++)
        for (int v = 0; v < V; v++)
          out.at(g * spans + (k + n) / size)[v] += sums[n][v] * b.at(k + n)[v];
    }
    for (; k < cols; k++) {
      vec sums[1][V] = {};
      accumulate<V, 1>(sums, h + k * cols, cols, b.at(0), from, to);
      for (int v = 0; v < V; v++) out.at(g * spans + k / size)[v] += sums[0][v] * b.at(k)[v];
    }
  }
  for (int64_t r = 0; r < rows.count; r++) {
    float* to = normal + (rows.first + r) * spans * spans;
    for (int64_t g = 0; g < spans; g++)
      for (int64_t k = g; k < spans; k++)
        to[g * spans + k] = to[k * spans + g] = out.floats()[(g * spans + k) * width + r];
  }
}

// ---------------------------------------------------------------- coordinate descent

// How far a code's level may move, in units of the scale, before another level is nearer.
struct Room {
  float down[256], up[256];
  int32_t ranks[256];  // of a code's level among the ascending ones
};

Room room_of(const Lines& l) {
  Room room = {};
  const float infinity = std::numeric_limits<float>::infinity();
  for (int32_t i = l.most; i >= 0; i--) {
    const int code = l.levels ? l.names[i] : i;
    room.ranks[code] = i;
    room.down[code] = i == 0 ? -infinity : l.levels ? l.borders[i - 1] - l.levels[i] : -0.5f;
    room.up[code] = i == l.most ? infinity : l.levels ? l.borders[i] - l.levels[i] : 0.5f;
  }
  return room;
}

// Whether any of LANES codes is not the best, all others as they are.
INLINE bool any_moves(const uint8_t* codes, const float* slope, const float* pull, float inverse,
                      const Room& room, bool integers, float top) {
  int32_t moves = 0;
  if (integers)
    for (int i = 0; i < LANES; i++) {
      const float from = codes[i], move = slope[i] * pull[i] * inverse;
      moves |= ((move > 0.5f) & (from < top)) | ((move < -0.5f) & (from > 0));
    }
  else
    for (int i = 0; i < LANES; i++) {
      const float move = slope[i] * pull[i] * inverse;
      moves |= (move > room.up[codes[i]]) | (move < room.down[codes[i]]);
    }
  return moves != 0;
}

// matrix: H.  Moves the codes of two columns to the best point while all others stay.
void descend_pairs(const Problem& p, const Lines& l, int64_t row, int32_t sweeps, uint8_t* codes,
                   float* slope) {
  const int64_t cols = p.cols;
  const float* h = p.matrix + row / p.rows * cols * cols;
  codes += row * cols;
  slope += row * cols;
  std::vector<float> xs(point_count(l, false)), ys(xs.size()), costs(xs.size());
  for (size_t i = 0; i < xs.size(); i++) xs[i] = l.levels[2 * i], ys[i] = l.levels[2 * i + 1];
  for (int32_t sweep = 0; sweep < sweeps; sweep++) {
    int64_t changes = 0;
    for (int64_t k = 0; k < cols; k += 2) {
      const bool alone = k + 1 == cols;
      const float s = l.scale[row * l.groups + k / l.size];
      if (s == 0) continue;
      const float* other = h + (alone ? k : k + 1) * cols;
      const float h00 = s * h[k * cols + k], h01 = alone ? 0 : s * other[k];
      const float h11 = alone ? 0 : s * other[k + 1];
      const float s0 = 2 * slope[k], s1 = alone ? 0 : 2 * slope[k + 1];
      const int32_t now = codes[k] + (alone ? 0 : (l.most + 1) * codes[k + 1]);
      const float x = xs[now], y = ys[now];
      const int32_t count = point_count(l, alone);
      for (int32_t i = 0; i < count; i++) {
        const float dx = xs[i] - x, dy = ys[i] - y;
        costs[i] = dx * (h00 * dx + 2 * h01 * dy - s0) + dy * (h11 * dy - s1);
      }
      int32_t best = now;
      for (int32_t i = 0; i < count; i++)
        if (costs[i] < costs[best]) best = i;
      if (best == now) continue;
      const float dx = s * (xs[best] - x), dy = alone ? 0 : s * (ys[best] - y);
      for (int64_t i = 0; i < cols; i++) slope[i] -= dx * h[k * cols + i] + dy * other[i];
      codes[k] = uint8_t(best % (l.most + 1));
      if (!alone) codes[k + 1] = uint8_t(best / (l.most + 1));
      changes++;
    }
    if (!changes) break;
  }
}

// matrix: H; pivots: 1 / diag H [parts, cols].  Moves every code of a row to the best value while
// all others stay.
void descend_row(const Problem& p, const Lines& l, int64_t row, int32_t sweeps, uint8_t* codes,
                 float* slope, const Room& room) {
  const int64_t cols = p.cols, part = row / p.rows;
  const float* h = p.matrix + part * cols * cols;
  const float* pull = p.pivots + part * cols;
  codes += row * cols;
  slope += row * cols;
  const float* scales = l.scale + row * l.groups;
  const float top = float(l.most);
  for (int32_t sweep = 0; sweep < sweeps; sweep++) {
    int64_t changes = 0;
    for (int64_t k = 0; k < cols; k++) {
      const int64_t g = k / l.size;
      const float s = scales[g];
      if (s == 0) continue;
      const float inverse = 1 / s;
      if (k % LANES == 0 && k + LANES <= cols && (k + LANES - 1) / l.size == g &&
          !any_moves(codes + k, slope + k, pull + k, inverse, room, !l.levels, top)) {
        k += LANES - 1;
        continue;
      }
      const float move = slope[k] * pull[k] * inverse;  // in units of the scale
      if (!(move > room.up[codes[k]] || move < room.down[codes[k]])) continue;
      float from, to;
      uint8_t code;
      if (l.levels) {
        int32_t best = room.ranks[codes[k]];
        from = l.levels[best];
        while (best < l.most && from + move > l.borders[best]) best++;
        while (best > 0 && from + move < l.borders[best - 1]) best--;
        to = l.levels[best];
        code = l.names[best];
      } else {
        from = codes[k];
        const float position = from + move;
        to = __builtin_rintf(position < 0 ? 0 : position > top ? top : position);
        code = uint8_t(to);
      }
      if (to == from) continue;
      const float change = (to - from) * s;
      const float* column = h + k * cols;
      for (int64_t i = 0; i < cols; i++) slope[i] -= change * column[i];
      codes[k] = code;
      changes++;
    }
    if (!changes) break;
  }
}

template <typename Work4, typename Work1>
void tiles(const Problem& p, int threads, Work4 wide, Work1 narrow) {
  constexpr int64_t STEP = WIDEST * LANES;
  const int64_t per_part = (p.rows + STEP - 1) / STEP, count = p.parts * per_part;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int64_t tile = 0; tile < count; tile++) {
    const int64_t part = tile / per_part, first = tile % per_part * STEP;
    int64_t left = p.rows - first < STEP ? p.rows - first : STEP;
    int64_t at = part * p.rows + first;
    if (left > 2 * LANES) {
      wide(Rows{part, at, left});
      continue;
    }
    for (; left > 0; left -= LANES, at += LANES)
      narrow(Rows{part, at, left < LANES ? left : LANES});
  }
}

}  // namespace

extern "C" {

void bitplan_sweep(const Problem* p, const Lines* l, const Search* how, const float* weight,
                   uint8_t* codes, int threads) {
  tiles(
      *p, threads, [&](Rows rows) { sweep_tile<WIDEST>(*p, *l, *how, weight, codes, rows); },
      [&](Rows rows) { sweep_tile<1>(*p, *l, *how, weight, codes, rows); });
}

void bitplan_slope(const Problem* p, const float* error, float* slope, int threads) {
  tiles(
      *p, threads, [&](Rows rows) { slope_tile<WIDEST>(*p, error, slope, rows); },
      [&](Rows rows) { slope_tile<1>(*p, error, slope, rows); });
}

void bitplan_normal(const Problem* p, int64_t spans, int64_t size, const float* basis,
                    float* normal, int threads) {
  tiles(
      *p, threads, [&](Rows rows) { normal_tile<WIDEST>(*p, spans, size, basis, normal, rows); },
      [&](Rows rows) { normal_tile<1>(*p, spans, size, basis, normal, rows); });
}

void bitplan_descend(const Problem* p, const Lines* l, int sweeps, uint8_t* codes, float* slope,
                     int threads) {
  const Room room = l->pairs ? Room{} : room_of(*l);
  const int64_t count = p->parts * p->rows;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16) if (threads > 1)
  for (int64_t row = 0; row < count; row++) {
    if (l->pairs)
      descend_pairs(*p, *l, row, sweeps, codes, slope);
    else
      descend_row(*p, *l, row, sweeps, codes, slope, room);
  }
}

int bitplan_abi() { return 2; }
}

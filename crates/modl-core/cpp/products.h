// Products of f32 matrices on processors with AVX-512, one thread each: what a linear layer and its
// gradients are made of. Each number of a result is one sum, whose order depends on the shapes alone.
//
// A tile of the result, 12 rows by two vectors, stays in registers while one row of the second matrix
// after the other is multiplied into it. That matrix is read from memory in its order or fetched ahead
// of its use, since weights are often met for the first time in a step.

#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "processor.h"

namespace products {

#define INLINE FOR_AVX512 inline __attribute__((always_inline))

constexpr int64_t kLanes = 16;
// A tile of a result.
constexpr int64_t kRows = 12;
constexpr int64_t kPanel = 2 * kLanes;
// What is taken at once of a and b in c = a b: so much of them stays in the second cache.
constexpr int64_t kBlockRows = 8 * kRows;
constexpr int64_t kBlockSum = 256;
constexpr int64_t kBlockColumns = 256;
// What is packed at once of x.
constexpr int64_t kTokens = 256;
constexpr int64_t kWidth = 1024;
// A result with so many numbers is no more in the second cache from when its memory was used last.
constexpr int64_t kNear = 1 << 17;
// Up to so many tokens, x is not packed.
constexpr int64_t kFew = 24;

// Room of a thread's own, from where a cache line begins; it stays for the next product.
template <int64_t N>
float* room() {
  struct Free {
    void operator()(float* p) const { _mm_free(p); }
  };
  thread_local const std::unique_ptr<float, Free> own(
      static_cast<float*>(_mm_malloc(N * sizeof(float), 64)));
  if (!own) throw std::bad_alloc();
  return own.get();
}

// The first `n` lanes.
INLINE __mmask16 lanes(int64_t n) {
  return static_cast<__mmask16>(n >= kLanes ? 0xffff : (1u << std::max<int64_t>(n, 0)) - 1);
}

// Where the `i`th of so many parts of `n` begins.
inline int64_t part(int64_t n, int64_t i, int64_t parts) { return n * i / parts; }

// How many of this size it takes.
inline int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Asks for the cache lines of these numbers.
INLINE void fetch(const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) _mm_prefetch(from + i, _MM_HINT_T1);
}

// c = Σ_k a[k] b[k]ᵀ for M rows and N vectors: a[k][m] is at a[k·k_apart + m·m_apart], and b[k] at
// b + k·b_apart. Lanes of the last vector that `last` does not have are not read.
template <int M, int N, bool masked>
INLINE void sums(
    const float* a,
    int64_t m_apart,
    int64_t k_apart,
    const float* b,
    int64_t b_apart,
    int64_t k,
    __mmask16 last,
    __m512 (&c)[M][N]) {
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) c[m][n] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < k; ++i, a += k_apart, b += b_apart) {
    __m512 row[N];
    for (int n = 0; n < N; ++n) {
      const float* from = b + kLanes * n;
      row[n] = masked && n == N - 1 ? _mm512_maskz_loadu_ps(last, from) : _mm512_loadu_ps(from);
    }
    for (int m = 0; m < M; ++m) {
      const __m512 one = _mm512_set1_ps(a[m * m_apart]);
      for (int n = 0; n < N; ++n) c[m][n] = _mm512_fmadd_ps(one, row[n], c[m][n]);
    }
  }
}

// f(m) for the M that equals `m`, a number from 1 to kRows, known when this is compiled.
#define FOR_ROWS(m, CALL) \
  switch (m) {            \
    case 1: CALL(1);      \
    case 2: CALL(2);      \
    case 3: CALL(3);      \
    case 4: CALL(4);      \
    case 5: CALL(5);      \
    case 6: CALL(6);      \
    case 7: CALL(7);      \
    case 8: CALL(8);      \
    case 9: CALL(9);      \
    case 10: CALL(10);    \
    case 11: CALL(11);    \
    default: CALL(12);    \
  }

// ---- c = a b ----

// What becomes of a tile: it is c, it is added to c, or it is c and goes past the caches, which is for what is
// written once and not soon read, and whose vectors are aligned.
enum class To { kPut, kAdd, kStream };

// A tile of a packed a, for a c whose rows are `c_apart`.
template <int M, int N, bool masked>
FOR_AVX512 __attribute__((noinline)) void tile(
    const float* a,
    const float* b,
    int64_t b_apart,
    int64_t k,
    __mmask16 last,
    float* c,
    int64_t c_apart,
    To how) {
  __m512 own[M][N];
  sums<M, N, masked>(a, 1, M, b, b_apart, k, last, own);
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      float* to = c + m * c_apart + kLanes * n;
      const __mmask16 mask = masked && n == N - 1 ? last : 0xffff;
      if (how == To::kStream && !masked) {
        _mm512_stream_ps(to, own[m][n]);
        continue;
      }
      const __m512 before = how == To::kAdd ? _mm512_maskz_loadu_ps(mask, to) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(own[m][n], before));
    }
  }
}

template <int N, bool masked>
FOR_AVX512 inline void tile_of(
    int64_t rows,
    const float* a,
    const float* b,
    int64_t b_apart,
    int64_t k,
    __mmask16 last,
    float* c,
    int64_t c_apart,
    To how) {
#define CALL(M) return tile<M, N, masked>(a, b, b_apart, k, last, c, c_apart, how)
  FOR_ROWS(rows, CALL)
#undef CALL
}

// Four by four numbers, turned.
INLINE void turn4(const float* from, int64_t from_apart, float* to, int64_t to_apart) {
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_apart);
  __m128 c = _mm_loadu_ps(from + 2 * from_apart), d = _mm_loadu_ps(from + 3 * from_apart);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + to_apart, b);
  _mm_storeu_ps(to + 2 * to_apart, c);
  _mm_storeu_ps(to + 3 * to_apart, d);
}

// A matrix as its numbers lie: of row i and column j it is at + i·rows_apart + j·columns_apart.
struct Matrix {
  const float* at;
  int64_t rows_apart;
  int64_t columns_apart;

  Matrix from(int64_t row, int64_t column) const {
    return {at + row * rows_apart + column * columns_apart, rows_apart, columns_apart};
  }
};

// `rows` rows, column by column. Either rows or columns lie without gaps.
FOR_AVX512 inline void pack_rows(const Matrix& a, int64_t rows, int64_t columns, float* to) {
  if (a.rows_apart == 1) {
    const __mmask16 mask = lanes(rows);
    for (int64_t j = 0; j < columns; ++j) {
      const __m512 column = _mm512_maskz_loadu_ps(mask, a.at + j * a.columns_apart);
      _mm512_mask_storeu_ps(to + j * rows, mask, column);
    }
    return;
  }
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t j = 0; j < whole_columns; j += 4) {
    for (int64_t i = 0; i < whole_rows; i += 4) {
      turn4(a.at + i * a.rows_apart + j, a.rows_apart, to + j * rows + i, rows);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) {
      to[j * rows + i] = a.at[i * a.rows_apart + j];
    }
  }
}

// c = a b for a `[m, k]`, b `[k, n]` and c `[m, n]`; rows of b and c are so far apart. With `stream`, c may go
// past the caches.
FOR_AVX512 inline void product(
    int64_t m,
    int64_t n,
    int64_t k,
    const Matrix& a,
    const float* b,
    int64_t b_apart,
    float* c,
    int64_t c_apart,
    bool stream) {
  stream &= k <= kBlockSum && reinterpret_cast<uintptr_t>(c) % 64 == 0 && c_apart % kLanes == 0;
  const bool far = !stream && m * c_apart >= kNear;
  float* packed = room<kBlockRows * kBlockSum>();
  const auto fetch_rows = [&](int64_t from, int64_t to, int64_t n0, int64_t width) FOR_AVX512 {
    for (int64_t i = from; i < to; ++i) fetch(b + i * b_apart + n0, width);
  };
  for (int64_t n0 = 0; n0 < n; n0 += kBlockColumns) {
    const int64_t width = std::min(kBlockColumns, n - n0), panels = pieces(width, kPanel);
    fetch_rows(0, std::min(kBlockSum, k), n0, width);
    for (int64_t k0 = 0; k0 < k; k0 += kBlockSum) {
      const int64_t depth = std::min(kBlockSum, k - k0), behind = std::min(kBlockSum, k - k0 - depth);
      for (int64_t m0 = 0; m0 < m; m0 += kBlockRows) {
        const int64_t height = std::min(kBlockRows, m - m0), tiles = pieces(height, kRows);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t i = part(height, t, tiles), rows = part(height, t + 1, tiles) - i;
          pack_rows(a.from(m0 + i, k0), rows, depth, packed + i * depth);
        }
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t j = n0 + p * kPanel, left = std::min(kPanel, n0 + width - j);
          const float* panel = b + k0 * b_apart + j;
          for (int64_t t = 0; t < tiles; ++t) {
            const int64_t i = part(height, t, tiles), rows = part(height, t + 1, tiles) - i;
            const float* own = packed + i * depth;
            float* to = c + (m0 + i) * c_apart + j;
            for (int64_t r = 0; r < rows && far; ++r) {
              __builtin_prefetch(to + r * c_apart, 1);
              __builtin_prefetch(to + r * c_apart + kLanes, 1);
            }
            if (m0 == 0) {
              const int64_t step = p * tiles + t, steps = panels * tiles;
              const int64_t next = k0 + depth + part(behind, step, steps);
              fetch_rows(next, k0 + depth + part(behind, step + 1, steps), n0, width);
            }
            const To how = k0 > 0 ? To::kAdd : stream ? To::kStream : To::kPut;
            if (left == kPanel) {
              tile_of<2, false>(rows, own, panel, b_apart, depth, 0, to, c_apart, how);
            } else if (left > kLanes) {
              const __mmask16 last = lanes(left - kLanes);
              tile_of<2, true>(rows, own, panel, b_apart, depth, last, to, c_apart, how);
            } else {
              tile_of<1, true>(rows, own, panel, b_apart, depth, lanes(left), to, c_apart, how);
            }
          }
        }
      }
    }
  }
  if (stream) _mm_sfence();
}

// ---- y = x wᵀ + b ----

// A tile of w xᵀ, rows of w by tokens of a packed x, turned: in a y whose rows are `y_apart`, with the
// bias, or onto it where there is none.
template <int M, int N>
FOR_AVX512 __attribute__((noinline)) void turned_tile(
    const float* w,
    int64_t w_apart,
    const float* x,
    int64_t k,
    int64_t tokens,
    const float* bias,
    float* y,
    int64_t y_apart,
    bool onto) {
  __m512 own[M][N];
  sums<M, N, false>(w, w_apart, 1, x, kPanel, k, 0, own);
  alignas(64) float all[M][kLanes * N];
  for (int m = 0; m < M; ++m) {
    const __m512 b = bias ? _mm512_set1_ps(bias[m]) : _mm512_setzero_ps();
    for (int n = 0; n < N; ++n) _mm512_store_ps(&all[m][kLanes * n], _mm512_add_ps(own[m][n], b));
  }
  constexpr int whole_rows = M / 4 * 4;
  const int64_t whole_tokens = onto ? 0 : tokens / 4 * 4;
  for (int64_t t = 0; t < whole_tokens; t += 4) {
    for (int m = 0; m < whole_rows; m += 4) {
      turn4(&all[m][t], kLanes * N, y + t * y_apart + m, y_apart);
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    float* to = y + t * y_apart;
    for (int m = t < whole_tokens ? whole_rows : 0; m < M; ++m) to[m] = all[m][t] + (onto ? to[m] : 0);
  }
}

template <int N>
FOR_AVX512 inline void turned_tile_of(
    int64_t rows,
    const float* w,
    int64_t w_apart,
    const float* x,
    int64_t k,
    int64_t tokens,
    const float* bias,
    float* y,
    int64_t y_apart,
    bool onto) {
#define CALL(M) return turned_tile<M, N>(w, w_apart, x, k, tokens, bias, y, y_apart, onto)
  FOR_ROWS(rows, CALL)
#undef CALL
}

// 16 vectors of 16, turned.
INLINE void turn16(__m512 (&v)[16]) {
  __m512 u[16];
  for (int i = 0; i < 16; i += 2) {
    u[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    u[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(u[i + j]), b = _mm512_castps_pd(u[i + j + 2]);
      v[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      v[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = i; j < 16; j += 8) {
      u[j] = _mm512_shuffle_f32x4(v[j], v[j + 4], 0x88);
      u[j + 4] = _mm512_shuffle_f32x4(v[j], v[j + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_f32x4(u[i], u[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(u[i], u[i + 8], 0xdd);
  }
}

// x `[tokens, k]`, whose rows are `apart`, in panels `[k, 32]` with zeros behind the last token.
FOR_AVX512 inline void pack_tokens(
    const float* x, int64_t apart, int64_t tokens, int64_t k, float* to) {
  for (int64_t t = 0; t < tokens; t += kLanes) {
    float* panel = to + t / kPanel * kPanel * k + t % kPanel;
    for (int64_t j = 0; j < k; j += kLanes) {
      const __mmask16 mask = lanes(k - j);
      __m512 v[16];
      for (int64_t i = 0; i < kLanes; ++i) {
        const bool there = t + i < tokens;
        v[i] = _mm512_maskz_loadu_ps(there ? mask : 0, x + (there ? t + i : t) * apart + j);
      }
      turn16(v);
      const int64_t width = std::min(kLanes, k - j);
      for (int64_t i = 0; i < kLanes; ++i) {
        if (i < width) _mm512_storeu_ps(panel + (j + i) * kPanel, v[i]);
      }
    }
  }
}

// 16 numbers of each of N tokens, times 16 columns of w, onto their sums.
template <int N>
INLINE void add_columns(const float* x, int64_t apart, const __m512 (&w)[16], int64_t columns, float* sums) {
  __m512 own[N];
  for (int t = 0; t < N; ++t) own[t] = _mm512_load_ps(sums + t * kLanes);
  const auto add = [&](int64_t i) FOR_AVX512 {
    for (int t = 0; t < N; ++t) own[t] = _mm512_fmadd_ps(_mm512_set1_ps(x[t * apart + i]), w[i], own[t]);
  };
  if (columns == kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) add(i);
  } else {
    for (int64_t i = 0; i < columns; ++i) add(i);
  }
  for (int t = 0; t < N; ++t) _mm512_store_ps(sums + t * kLanes, own[t]);
}

// The same for few tokens, which are not worth being packed: 16 rows of w at a time are turned instead. Each
// sum has the order that it has among many tokens.
FOR_AVX512 inline void few_tokens(
    int64_t tokens,
    int64_t n,
    int64_t k,
    const float* x,
    const float* w,
    const float* bias,
    float* y,
    int64_t y_apart) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t rows = std::min(kLanes, n - j);
    const __mmask16 there = lanes(rows);
    for (int64_t k0 = 0; k0 < k; k0 += kWidth) {
      const int64_t end = std::min(k, k0 + kWidth);
      alignas(64) float sums[kFew * kLanes] = {};
      for (int64_t c = k0; c < end; c += kLanes) {
        const int64_t columns = std::min(kLanes, end - c);
        const __mmask16 mask = lanes(columns);
        __m512 v[16];
        for (int64_t i = 0; i < kLanes; ++i) {
          v[i] = _mm512_maskz_loadu_ps(i < rows ? mask : 0, w + (j + (i < rows ? i : 0)) * k + c);
        }
        turn16(v);
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4) add_columns<4>(x + t * k + c, k, v, columns, sums + t * kLanes);
        for (; t < tokens; ++t) add_columns<1>(x + t * k + c, k, v, columns, sums + t * kLanes);
      }
      const __m512 before = bias && k0 == 0 ? _mm512_maskz_loadu_ps(there, bias + j) : _mm512_setzero_ps();
      for (int64_t t = 0; t < tokens; ++t) {
        float* to = y + t * y_apart + j;
        __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + t * kLanes), before);
        if (k0 > 0) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(there, to));
        _mm512_mask_storeu_ps(to, there, sum);
      }
    }
  }
}

// y = x wᵀ + b for x `[tokens, k]`, w `[n, k]` and y, whose rows are `y_apart`; `bias` may be null.
FOR_AVX512 inline void linear(
    int64_t tokens,
    int64_t n,
    int64_t k,
    const float* x,
    const float* w,
    const float* bias,
    float* y,
    int64_t y_apart) {
  if (tokens <= kFew) return few_tokens(tokens, n, k, x, w, bias, y, y_apart);
  float* packed = room<kTokens * kWidth>();
  const int64_t tiles = pieces(n, kRows);
  for (int64_t t0 = 0; t0 < tokens; t0 += kTokens) {
    const int64_t height = std::min(kTokens, tokens - t0), panels = pieces(height, kPanel);
    for (int64_t k0 = 0; k0 < k; k0 += kWidth) {
      const int64_t width = std::min(kWidth, k - k0);
      const bool onto = k0 > 0;
      pack_tokens(x + t0 * k + k0, k, height, width, packed);
      for (int64_t r = 0; r < tiles; ++r) {
        const int64_t i = part(n, r, tiles), rows = part(n, r + 1, tiles) - i;
        const int64_t behind = part(n, std::min(r + 2, tiles), tiles) - i - rows;
        const float *own = w + i * k + k0, *of_bias = bias && !onto ? bias + i : nullptr;
        for (int64_t p = 0; p < panels; ++p) {
          // The next rows of w are fetched meanwhile.
          for (int64_t l = part(behind, p, panels); l < part(behind, p + 1, panels); ++l) {
            fetch(own + (rows + l) * k, width);
          }
          const int64_t left = std::min(kPanel, height - p * kPanel);
          const float* panel = packed + p * kPanel * width;
          float* to = y + (t0 + p * kPanel) * y_apart + i;
          if (left > kLanes) {
            turned_tile_of<2>(rows, own, k, panel, width, left, of_bias, to, y_apart, onto);
          } else {
            turned_tile_of<1>(rows, own, k, panel, width, left, of_bias, to, y_apart, onto);
          }
        }
      }
    }
  }
}

// The sums of the columns of x `[rows, n]`.
FOR_AVX512 inline void column_sums(const float* x, int64_t rows, int64_t n, float* to) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const __mmask16 mask = lanes(n - j);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < rows; ++i) {
      sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, x + i * n + j));
    }
    _mm512_mask_storeu_ps(to + j, mask, sum);
  }
}

// 0 for what is below 0 in x; NaN stays.
FOR_AVX512 inline void relu(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const __mmask16 there = lanes(n - i);
    const __m512 v = _mm512_maskz_loadu_ps(there, x + i);
    const __mmask16 below = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ);
    _mm512_mask_storeu_ps(x + i, there & below, _mm512_setzero_ps());
  }
}

// dy where y, what relu gave, is not 0, and 0 elsewhere.
FOR_AVX512 inline void through_relu(const float* dy, const float* y, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const __mmask16 there = lanes(n - i);
    const __m512 v = _mm512_maskz_loadu_ps(there, y + i);
    const __mmask16 shut = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LE_OQ);
    _mm512_mask_storeu_ps(to + i, there, _mm512_maskz_loadu_ps(there & ~shut, dy + i));
  }
}

// Σ x², in f64.
FOR_AVX512 inline double square_sum(const float* x, int64_t n) {
  __m512d sums[4] = {};
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    for (int64_t j = 0; j < 2; ++j) {
      const int64_t at = i + j * kLanes;
      const __m512 v = _mm512_maskz_loadu_ps(lanes(n - at), x + at);
      const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
      const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
      sums[2 * j] = _mm512_fmadd_pd(low, low, sums[2 * j]);
      sums[2 * j + 1] = _mm512_fmadd_pd(high, high, sums[2 * j + 1]);
    }
  }
  const __m512d all = _mm512_add_pd(_mm512_add_pd(sums[0], sums[1]), _mm512_add_pd(sums[2], sums[3]));
  return _mm512_reduce_add_pd(all);
}

#undef FOR_ROWS
#undef INLINE

}  // namespace products

#endif

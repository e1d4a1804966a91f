// Products of f32 and bf16 matrices on processors with AVX-512, one thread each: what a linear layer and its
// gradients are made of. Each number of a result is one sum in f32, whose order depends on the shapes alone.
//
// A tile of the result, 12 rows by two vectors, stays in registers while one row of the second matrix
// after the other is multiplied into it. That matrix is read from memory in its order or fetched ahead
// of its use, since weights are often met for the first time in a step.
//
// Numbers are taken in words of 32 bits: one of f32, or two of bf16 that are neighbours in a sum.

#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include <c10/util/BFloat16.h>

#include "processor.h"

namespace products {

#define INLINE FOR_AVX512 inline __attribute__((always_inline))

constexpr int64_t kLanes = 16;
// A tile of a result.
constexpr int64_t kRows = 12;
constexpr int64_t kPanel = 2 * kLanes;
// What is taken at once in c = a b: at least so many rows of a, and so many words of a and b, for which the second
// cache has room.
constexpr int64_t kBlockRows = 8 * kRows;
constexpr int64_t kWordsOfA = 1 << 15;
constexpr int64_t kWordsOfB = 1 << 13;
// What is packed at once of x, in tokens and words.
constexpr int64_t kTokens = 256;
constexpr int64_t kWidth = 4096;
constexpr int64_t kWordsOfX = 1 << 17;
// A result with so many numbers is no more in the second cache from when its memory was used last.
constexpr int64_t kNear = 1 << 17;
// Up to so many tokens, x is not packed.
constexpr int64_t kFew = 12;
// The processor does not fetch rows so short ahead by itself, where few tokens meet them.
constexpr int64_t kNarrowRows = 768;
// Rows that are multiples of so many words apart lie in the same lines of the first cache; with so many panels of
// tokens it is worth packing them.
constexpr int64_t kSameLines = 1024;
constexpr int64_t kWorthPacking = 4;

// What is multiplied: how many of a word, and how much of a sum is taken at once in c = a b.
struct F32 {
  using Number = float;
  static constexpr int64_t kInWord = 1;
  static constexpr int64_t kBlockSum = 256;

  INLINE static __m512 add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
};

struct Bf16 {
  using Number = uint16_t;
  static constexpr int64_t kInWord = 2;
  // In words; a result of bf16 cannot be added to.
  static constexpr int64_t kBlockSum = 1024;

  INLINE static __m512 add(__m512 a, __m512 b, __m512 c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
};

// Room of a thread's own for words, from where a cache line begins; it stays for the next product.
template <int64_t N, int which>
float* room() {
  struct Free {
    void operator()(float* p) const { _mm_free(p); }
  };
  thread_local const std::unique_ptr<float, Free> own(
      static_cast<float*>(_mm_malloc(N * sizeof(float), 64)));
  if (!own) throw std::bad_alloc();
  return own.get();
}

// 16 numbers, those of the mask, as f32 and back.
INLINE __m512 load(__mmask16 mask, const float* from) { return _mm512_maskz_loadu_ps(mask, from); }

INLINE __m512 load(__mmask16 mask, const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

INLINE void store(float* to, __mmask16 mask, __m512 v) { _mm512_mask_storeu_ps(to, mask, v); }

INLINE void store(uint16_t* to, __mmask16 mask, __m512 v) {
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(v));
}

inline float wide(float v) { return v; }

inline float wide(uint16_t v) { return c10::detail::f32_from_bits(v); }

// Four numbers.
INLINE void store4(float* to, __m128 v) { _mm_storeu_ps(to, v); }

INLINE void store4(uint16_t* to, __m128 v) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), (__m128i)_mm_cvtneps_pbh(v));
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

// What is fetched meanwhile, some of it in each step of a sum: asked for at once it would stop the products
// until it has come.
struct Ahead {
  const char* row;
  int64_t apart;   // from a row to the next, in bytes as all here
  int32_t width;   // of a row
  int32_t step;    // so much in each step
  int32_t at = 0;  // in the row

  // `rows` rows of `width` numbers, which may be none, in so many steps.
  template <typename Number>
  Ahead(const Number* from, int64_t apart, int64_t rows, int64_t width, int64_t steps)
      : row(reinterpret_cast<const char*>(from)),
        apart(apart * sizeof(Number)),
        width(std::max<int64_t>(width, 1) * sizeof(Number)),
        step(pieces(rows * width * sizeof(Number), steps)) {}

  INLINE void next() {
    _mm_prefetch(row + at, _MM_HINT_T0);
    at += step;
    const bool through = at >= width;
    row += through ? apart : 0;
    at -= through ? width : 0;
  }
};

// c = Σ_k a[k] b[k]ᵀ for M rows and N vectors: a[k][m] is at a[k·k_apart + m·m_apart], and b[k] at
// b + k·b_apart. Lanes of the last vector that `last` does not have are not read.
template <typename Kind, int M, int N, bool masked>
INLINE void sums(
    const float* a,
    int64_t m_apart,
    int64_t k_apart,
    const float* b,
    int64_t b_apart,
    int64_t k,
    __mmask16 last,
    Ahead& fetched,
    __m512 (&c)[M][N]) {
  Ahead ahead = fetched;  // in registers
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) c[m][n] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < k; ++i, a += k_apart, b += b_apart) {
    ahead.next();
    __m512 row[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      const float* from = b + kLanes * n;
      row[n] = masked && n == N - 1 ? _mm512_maskz_loadu_ps(last, from) : _mm512_loadu_ps(from);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const __m512 one = _mm512_set1_ps(a[m * m_apart]);
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) c[m][n] = Kind::add(one, row[n], c[m][n]);
    }
  }
  fetched = ahead;
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

INLINE void stream(float* to, __m512 a, __m512 b) {
  _mm512_stream_ps(to, a);
  _mm512_stream_ps(to + kLanes, b);
}

INLINE void stream(uint16_t* to, __m512 a, __m512 b) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

// A tile of a packed a, for a c whose rows are `c_apart`.
template <typename Kind, int M, int N, bool masked, typename Out>
FOR_AVX512 __attribute__((noinline)) void tile(
    const float* a,
    const float* b,
    int64_t b_apart,
    int64_t k,
    __mmask16 last,
    Out* c,
    int64_t c_apart,
    To how,
    Ahead& ahead) {
  __m512 own[M][N];
  sums<Kind, M, N, masked && Kind::kInWord == 1>(a, 1, M, b, b_apart, k, last, ahead, own);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    if (how == To::kStream && !masked) {
      stream(c + m * c_apart, own[m][0], own[m][N - 1]);
      continue;
    }
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      Out* to = c + m * c_apart + kLanes * n;
      const __mmask16 mask = masked && n == N - 1 ? last : 0xffff;
      const __m512 before = how == To::kAdd ? load(mask, to) : _mm512_setzero_ps();
      store(to, mask, _mm512_add_ps(own[m][n], before));
    }
  }
}

template <typename Kind, int N, bool masked, typename Out>
FOR_AVX512 inline void tile_of(
    int64_t rows,
    const float* a,
    const float* b,
    int64_t b_apart,
    int64_t k,
    __mmask16 last,
    Out* c,
    int64_t c_apart,
    To how,
    Ahead& ahead) {
#define CALL(M) return tile<Kind, M, N, masked>(a, b, b_apart, k, last, c, c_apart, how, ahead)
  FOR_ROWS(rows, CALL)
#undef CALL
}

// Four by four numbers, turned; `onto` what is there, which then is of f32.
template <typename Out>
INLINE void turn4(const float* from, int64_t from_apart, Out* to, int64_t to_apart, bool onto = false) {
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_apart);
  __m128 c = _mm_loadu_ps(from + 2 * from_apart), d = _mm_loadu_ps(from + 3 * from_apart);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  const auto put = [onto](Out* to, __m128 v) FOR_AVX512 {
    if constexpr (std::is_same_v<Out, float>) v = onto ? _mm_add_ps(v, _mm_loadu_ps(to)) : v;
    store4(to, v);
  };
  put(to, a);
  put(to + to_apart, b);
  put(to + 2 * to_apart, c);
  put(to + 3 * to_apart, d);
}

// A matrix as its numbers lie: of row i and column j it is at + i·rows_apart + j·columns_apart.
template <typename Number>
struct Matrix {
  const Number* at;
  int64_t rows_apart;
  int64_t columns_apart;

  Matrix from(int64_t row, int64_t column) const {
    return {at + row * rows_apart + column * columns_apart, rows_apart, columns_apart};
  }
};

// `rows` rows of words that lie without gaps, column by column.
FOR_AVX512 inline void pack_rows(const float* a, int64_t apart, int64_t rows, int64_t columns, float* to) {
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t j = 0; j < whole_columns; j += 4) {
    for (int64_t i = 0; i < whole_rows; i += 4) {
      turn4(a + i * apart + j, apart, to + j * rows + i, rows);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) {
      to[j * rows + i] = a[i * apart + j];
    }
  }
}

// `rows` rows, up to 16, of `columns` columns, column by column. Either rows or columns lie without gaps.
FOR_AVX512 inline void pack_a(const Matrix<float>& a, int64_t rows, int64_t columns, float* to) {
  if (a.rows_apart != 1) return pack_rows(a.at, a.rows_apart, rows, columns, to);
  const __mmask16 mask = lanes(rows);
  for (int64_t j = 0; j < columns; ++j) {
    store(to + j * rows, mask, load(mask, a.at + j * a.columns_apart));
  }
}

// The same in words. Where rows lie without gaps, `columns` is even.
FOR_AVX512 inline void pack_a(const Matrix<uint16_t>& a, int64_t rows, int64_t columns, float* to) {
  if (a.rows_apart != 1) {
    return pack_rows(reinterpret_cast<const float*>(a.at), a.rows_apart / 2, rows, columns / 2, to);
  }
  const __mmask16 mask = lanes(rows);
  for (int64_t j = 0; j < columns; j += 2) {
    const uint16_t* from = a.at + j * a.columns_apart;
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    const __mmask16 there = j + 1 < columns ? mask : 0;
    const uint16_t* next = from + (there ? a.columns_apart : 0);
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, next));
    const __m512i both = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    _mm512_mask_storeu_epi32(to + j / 2 * rows, mask, both);
  }
}

// A block of b as it is multiplied, in panels: where its rows begin, and how far they and panels are apart.
struct Panels {
  const float* at;
  int64_t rows_apart;
  int64_t apart;
};

// As it lies, fetched where it is the `first`.
FOR_AVX512 inline Panels panels_of(const float* b, int64_t apart, int64_t k, int64_t columns, bool first) {
  for (int64_t i = 0; i < k && first; ++i) fetch(b + i * apart, columns);
  return {b, apart, kPanel};
}

// Two rows after the other as words, with zeros behind the last row and column.
FOR_AVX512 inline Panels panels_of(const uint16_t* b, int64_t apart, int64_t k, int64_t columns, bool) {
  constexpr int64_t kSoon = 16;
  float* packed = room<std::max(Bf16::kBlockSum * kPanel, kWordsOfB), 1>();
  const int64_t of_panel = pieces(k, 2) * kPanel;
  alignas(64) static const uint16_t order[kPanel] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(order), second = _mm512_add_epi16(first, _mm512_set1_epi16(kLanes));
  for (int64_t i = 0; i < k; i += 2) {
    for (int64_t j = 0; j < columns; j += kPanel) {
      const int64_t left = columns - j;
      const __mmask32 there = left >= kPanel ? ~0u : (1u << left) - 1, below = i + 1 < k ? there : 0;
      const uint16_t* from = b + i * apart + j;
      _mm_prefetch(from + kSoon * apart, _MM_HINT_T0);
      _mm_prefetch(from + (kSoon + 1) * apart, _MM_HINT_T0);
      const __m512i low = _mm512_maskz_loadu_epi16(there, from);
      const __m512i high = _mm512_maskz_loadu_epi16(below, from + (below ? apart : 0));
      float* to = packed + j / kPanel * of_panel + i / 2 * kPanel;
      _mm512_store_si512(to, _mm512_permutex2var_epi16(low, first, high));
      _mm512_store_si512(to + kLanes, _mm512_permutex2var_epi16(low, second, high));
    }
  }
  return {packed, kPanel, of_panel};
}

// c = a b for a `[m, k]`, b `[k, n]` and c `[m, n]`; rows of b and c are so far apart. With `stream`, c may go
// past the caches. Where k is more than is taken at once, c is of f32.
template <typename Kind, typename Out>
FOR_AVX512 inline void product(
    int64_t m,
    int64_t n,
    int64_t k,
    const Matrix<typename Kind::Number>& a,
    const typename Kind::Number* b,
    int64_t b_apart,
    Out* c,
    int64_t c_apart,
    bool stream) {
  constexpr int64_t kLine = 64 / sizeof(Out), kAtOnce = Kind::kBlockSum * Kind::kInWord;
  stream &= k <= kAtOnce && reinterpret_cast<uintptr_t>(c) % 64 == 0 && c_apart % kLine == 0;
  const bool far = !stream && m * c_apart >= kNear;
  float* packed = room<std::max(kBlockRows * Kind::kBlockSum, kWordsOfA), 0>();
  for (int64_t k0 = 0; k0 < k; k0 += kAtOnce) {
    const int64_t depth = std::min(kAtOnce, k - k0), words = pieces(depth, Kind::kInWord);
    const To how = k0 > 0 ? To::kAdd : stream ? To::kStream : To::kPut;
    const int64_t rows_at_once = std::max(kBlockRows, kWordsOfA / words);
    const int64_t columns_at_once = std::max(kPanel, kWordsOfB / words / kPanel * kPanel);
    for (int64_t m0 = 0; m0 < m; m0 += rows_at_once) {
      const int64_t height = std::min(rows_at_once, m - m0), tiles = pieces(height, kRows);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t i = part(height, t, tiles), rows = part(height, t + 1, tiles) - i;
        pack_a(a.from(m0 + i, k0), rows, depth, packed + i * words);
      }
      for (int64_t n0 = 0; n0 < n; n0 += columns_at_once) {
        const int64_t width = std::min(columns_at_once, n - n0), count = pieces(width, kPanel);
        const auto* own_b = b + k0 * b_apart + n0;
        const Panels panels = panels_of(own_b, b_apart, depth, width, k0 + m0 + n0 == 0);
        const int64_t behind = std::min(columns_at_once, n - n0 - width);
        Ahead ahead(own_b + width, b_apart, depth, behind, tiles * count * words);
        const auto compute = [&](int64_t t, int64_t p) FOR_AVX512 {
          const int64_t j = p * kPanel, left = width - j;
          const int64_t i = part(height, t, tiles), rows = part(height, t + 1, tiles) - i;
          const float *of_a = packed + i * words, *of_b = panels.at + p * panels.apart;
          Out* to = c + (m0 + i) * c_apart + n0 + j;
          for (int64_t r = 0; r < rows && far; ++r) {
            for (int64_t l = 0; l < kPanel; l += kLine) __builtin_prefetch(to + r * c_apart + l, 1);
          }
          if (left >= kPanel) {
            tile_of<Kind, 2, false>(rows, of_a, of_b, panels.rows_apart, words, 0, to, c_apart, how, ahead);
          } else if (left > kLanes) {
            const __mmask16 last = lanes(left - kLanes);
            tile_of<Kind, 2, true>(rows, of_a, of_b, panels.rows_apart, words, last, to, c_apart, how, ahead);
          } else {
            const __mmask16 last = lanes(left);
            tile_of<Kind, 1, true>(rows, of_a, of_b, panels.rows_apart, words, last, to, c_apart, how, ahead);
          }
        };
        for (int64_t p = 0; p < count; ++p) {
          for (int64_t t = 0; t < tiles; ++t) compute(t, p);
        }
      }
    }
  }
  if (stream) _mm_sfence();
}

// ---- y = x wᵀ + b ----

// A tile of w xᵀ, rows of w by tokens of a packed x, turned: in a y whose rows are `y_apart`, with the
// bias, or onto it where there is none.
template <typename Kind, int M, int N, typename Out>
FOR_AVX512 __attribute__((noinline)) void turned_tile(
    const float* w,
    int64_t w_apart,
    int64_t k_apart,
    const float* x,
    int64_t k,
    int64_t tokens,
    const Out* bias,
    Out* y,
    int64_t y_apart,
    bool onto,
    Ahead& ahead) {
  __m512 own[M][N];
  sums<Kind, M, N, false>(w, w_apart, k_apart, x, kPanel, k, 0, ahead, own);
  alignas(64) float all[M][kLanes * N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const __m512 b = bias ? _mm512_set1_ps(wide(bias[m])) : _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) _mm512_store_ps(&all[m][kLanes * n], _mm512_add_ps(own[m][n], b));
  }
  constexpr int whole_rows = M / 4 * 4;
  const int64_t whole_tokens = tokens / 4 * 4;
  for (int64_t t = 0; t < whole_tokens; t += 4) {
    for (int m = 0; m < whole_rows; m += 4) {
      turn4(&all[m][t], kLanes * N, y + t * y_apart + m, y_apart, onto);
    }
  }
  for (int64_t t = 0; t < tokens; ++t) {
    Out* to = y + t * y_apart;
    for (int m = t < whole_tokens ? whole_rows : 0; m < M; ++m) {
      store(to + m, 1, _mm512_set1_ps(all[m][t] + (onto ? wide(to[m]) : 0)));
    }
  }
}

template <typename Kind, int N, typename Out>
FOR_AVX512 inline void turned_tile_of(
    int64_t rows,
    const float* w,
    int64_t w_apart,
    int64_t k_apart,
    const float* x,
    int64_t k,
    int64_t tokens,
    const Out* bias,
    Out* y,
    int64_t y_apart,
    bool onto,
    Ahead& ahead) {
#define CALL(M) return turned_tile<Kind, M, N>(w, w_apart, k_apart, x, k, tokens, bias, y, y_apart, onto, ahead)
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
template <typename Kind, int N>
INLINE void add_columns(const float* x, int64_t apart, const __m512 (&w)[16], int64_t columns, float* sums) {
  __m512 own[N];
  for (int t = 0; t < N; ++t) own[t] = _mm512_load_ps(sums + t * kLanes);
  const auto add = [&](int64_t i) FOR_AVX512 {
    for (int t = 0; t < N; ++t) own[t] = Kind::add(_mm512_set1_ps(x[t * apart + i]), w[i], own[t]);
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
template <typename Kind, typename Out>
FOR_AVX512 inline void few_tokens(
    int64_t tokens,
    int64_t n,
    int64_t k,
    const float* x,
    const float* w,
    const Out* bias,
    Out* y,
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
          if (k <= kNarrowRows) _mm_prefetch(w + (j + kLanes + i) * k + c, _MM_HINT_T0);
          v[i] = _mm512_maskz_loadu_ps(i < rows ? mask : 0, w + (j + (i < rows ? i : 0)) * k + c);
        }
        turn16(v);
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4) add_columns<Kind, 4>(x + t * k + c, k, v, columns, sums + t * kLanes);
        for (; t < tokens; ++t) add_columns<Kind, 1>(x + t * k + c, k, v, columns, sums + t * kLanes);
      }
      const __m512 before = bias && k0 == 0 ? load(there, bias + j) : _mm512_setzero_ps();
      for (int64_t t = 0; t < tokens; ++t) {
        Out* to = y + t * y_apart + j;
        __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + t * kLanes), before);
        if (k0 > 0) sum = _mm512_add_ps(sum, load(there, to));
        store(to, there, sum);
      }
    }
  }
}

// y = x wᵀ + b for x `[tokens, k]`, w `[n, k]`, both in words, and y, whose rows are `y_apart`; `bias` may be
// null. Where k is more than kWidth, y is of f32.
template <typename Kind, typename Out>
FOR_AVX512 inline void linear(
    int64_t tokens,
    int64_t n,
    int64_t k,
    const float* x,
    const float* w,
    const Out* bias,
    Out* y,
    int64_t y_apart) {
  if (tokens <= kFew) return few_tokens<Kind>(tokens, n, k, x, w, bias, y, y_apart);
  float* packed = room<kWordsOfX, 0>();
  const int64_t at_once = std::clamp(kWordsOfX / std::min(k, kWidth) / kPanel * kPanel, kPanel, kTokens);
  const int64_t tiles = pieces(n, kRows);
  for (int64_t t0 = 0; t0 < tokens; t0 += at_once) {
    const int64_t height = std::min(at_once, tokens - t0), panels = pieces(height, kPanel);
    for (int64_t k0 = 0; k0 < k; k0 += kWidth) {
      const int64_t width = std::min(kWidth, k - k0);
      const bool onto = k0 > 0;
      pack_tokens(x + t0 * k + k0, k, height, width, packed);
      float* packed_w = k % kSameLines == 0 && panels >= kWorthPacking ? room<kRows * kWidth, 1>() : nullptr;
      for (int64_t r = 0; r < tiles; ++r) {
        const int64_t i = part(n, r, tiles), rows = part(n, r + 1, tiles) - i;
        const float* own = w + i * k + k0;
        const int64_t behind = part(n, std::min(r + 2, tiles), tiles) - i - rows;
        Ahead ahead(own + rows * k, k, behind, width, width * panels);
        const Out* of_bias = bias && !onto ? bias + i : nullptr;
        if (packed_w) pack_rows(own, k, rows, width, packed_w);
        const float* of_w = packed_w ? packed_w : own;
        const int64_t w_apart = packed_w ? 1 : k, k_apart = packed_w ? rows : 1;
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t left = std::min(kPanel, height - p * kPanel);
          const float* panel = packed + p * kPanel * width;
          Out* to = y + (t0 + p * kPanel) * y_apart + i;
          if (left > kLanes) {
            turned_tile_of<Kind, 2>(rows, of_w, w_apart, k_apart, panel, width, left, of_bias, to, y_apart, onto, ahead);
          } else {
            turned_tile_of<Kind, 1>(rows, of_w, w_apart, k_apart, panel, width, left, of_bias, to, y_apart, onto, ahead);
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

// Products of a thin matrix with rows that lie apart: what a BLAS can do only after a gather, and
// does at a tenth of the machine's speed, since it has few columns or a short sum.
//
// n rows are given by their addresses, thin matrices are `[n, r]`, factors `[r, columns]`. All is computed
// in T, float or double, in vectors of W bytes; rows are of X, which is T, or bf16 where T is float. Each
// result is a sum in one fixed order, whatever is computed beside it. Loops over a tile are unrolled by
// pragmas, without which compilers leave its vectors in memory.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include <c10/util/BFloat16.h>

#include "processor.h"

namespace thin {

#define INLINE inline __attribute__((always_inline))

template <typename T, int W>
struct Vector {
  typedef T Type __attribute__((vector_size(W)));
};
template <typename T, int W>
using Of = typename Vector<T, W>::Type;

// Elements of a vector, and columns of a panel: two vectors.
template <typename T, int W>
constexpr int64_t lanes = W / sizeof(T);
template <typename T, int W>
constexpr int64_t panel = 2 * lanes<T, W>;

// The widest vector, and what columns of thin matrices are rounded up to.
constexpr int kWidest = 64;
template <typename T>
constexpr int64_t widest_panel = panel<T, kWidest>;

// Elements with no values yet, from where a vector begins.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : all(new T[n + lanes<T, kWidest>]) {
    void* at = all.get();
    size_t space = (n + lanes<T, kWidest>) * sizeof(T);
    first = static_cast<T*>(std::align(kWidest, n * sizeof(T), at, space));
  }
  T* data() const { return first; }

 private:
  std::unique_ptr<T[]> all;
  T* first;
};

// The bits of a number of bf16: the upper half of a float's.
using Bf16 = uint16_t;

template <typename T, int W, typename X>
INLINE Of<T, W> load(const X* from) {
  Of<X, W / sizeof(T) * sizeof(X)> v;
  std::memcpy(&v, from, sizeof v);
  if constexpr (std::is_same_v<T, X>) {
    return v;
  } else {
    return (Of<T, W>)(__builtin_convertvector(v, Of<uint32_t, W>) << 16);
  }
}

template <typename T, typename X>
INLINE T load_one(X from) {
  if constexpr (std::is_same_v<T, X>) {
    return from;
  } else {
    return c10::detail::f32_from_bits(from);
  }
}

// Rounded to the nearest, of two to the even one; what is no number stays none.
template <typename T, int W, typename X>
INLINE void store(X* to, Of<T, W> v) {
  if constexpr (std::is_same_v<T, X>) {
    std::memcpy(to, &v, sizeof v);
  } else {
    const auto bits = (Of<uint32_t, W>)v, none = (Of<uint32_t, W>)(v != v);
    const auto rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const auto all = __builtin_convertvector((rounded & ~none) | (none & 0x7fc0), Of<X, W / 2>);
    std::memcpy(to, &all, sizeof all);
  }
}

// The first `n` elements, and zeros.
template <typename T, int W, typename X>
INLINE Of<T, W> load_some(const X* from, int64_t n) {
  X all[lanes<T, W>] = {};
  for (int64_t i = 0; i < std::min(n, lanes<T, W>); ++i) all[i] = from[i];
  return load<T, W>(all);
}

template <typename T, int W, typename X>
INLINE void store_some(X* to, Of<T, W> v, int64_t n) {
  X all[lanes<T, W>];
  store<T, W>(all, v);
  for (int64_t i = 0; i < std::min(n, lanes<T, W>); ++i) to[i] = all[i];
}

// Two vectors side by side become, or are added to, the first `width` of what is there.
template <typename T, int W, bool whole, typename X>
INLINE void put(X* to, Of<T, W> left, Of<T, W> right, int64_t width, bool onto) {
  constexpr int64_t half = lanes<T, W>;
  if (whole || width >= 2 * half) {
    store<T, W>(to, onto ? left + load<T, W>(to) : left);
    store<T, W>(to + half, onto ? right + load<T, W>(to + half) : right);
    return;
  }
  store_some<T, W>(to, onto ? left + load_some<T, W>(to, width) : left, width);
  if (width > half) {
    const int64_t rest = width - half;
    store_some<T, W>(to + half, onto ? right + load_some<T, W>(to + half, rest) : right, rest);
  }
}

template <typename T, int W>
INLINE T sum(Of<T, W> v) {
  if constexpr (lanes<T, W> == 2) {
    return v[0] + v[1];
  } else {
    Of<T, W / 2> halves[2];
    std::memcpy(halves, &v, sizeof v);
    return sum<T, W / 2>(halves[0] + halves[1]);
  }
}

// Lanes of a and b, counted through both.
#if defined(__clang__)
#define MIXED(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIXED(...) __builtin_shuffle(a, b, decltype(a < b){__VA_ARGS__})
#endif

// One half of each group of lanes in a, and then in b.
template <typename T, int W, int Group, int Half, int... I>
INLINE Of<T, W> halves(Of<T, W> a, Of<T, W> b, std::integer_sequence<int, I...>) {
  constexpr int size = Group / 2;
  return MIXED((I / size * Group + Half * size + I % size)...);
}

// Within each half of a vector a and b, element by element in turns: the first half of that, or the second.
template <typename T, int W, int Half, int... I>
INLINE Of<T, W> interleaved(Of<T, W> a, Of<T, W> b, std::integer_sequence<int, I...>) {
  constexpr int n = lanes<T, W>, size = n / 2;
  return MIXED((I % 2 * n + I / size * size + Half * size / 2 + I % size / 2)...);
}
#undef MIXED

// What `sum` gives for each of N vectors, in N ⁄ lanes of them: two become one whose groups, each of
// which holds one sum, are half as large.
template <typename T, int W, int N, int Group = lanes<T, W>>
INLINE void sums(const Of<T, W>* v, T* to) {
  if constexpr (Group == 1) {
    std::memcpy(to, v, N * sizeof *v);
  } else {
    const std::make_integer_sequence<int, lanes<T, W>> places;
    Of<T, W> folded[N / 2];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      folded[i] = halves<T, W, Group, 0>(v[2 * i], v[2 * i + 1], places) +
                  halves<T, W, Group, 1>(v[2 * i], v[2 * i + 1], places);
    }
    sums<T, W, N / 2, Group / 2>(folded, to);
  }
}

// d[m][n] += x[m] · f[n] for M rows x and N rows f; a row of d has `r` elements.
template <typename T, int W, int M, int N, typename X>
INLINE void dot_tile(
    const X* const* x, const T* f, int64_t stride, int64_t first, int64_t last, T* d, int64_t r) {
  Of<T, W> parts[M * N] = {};
  int64_t c = first;
  for (; c + lanes<T, W> <= last; c += lanes<T, W>) {
    Of<T, W> fs[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) fs[n] = load<T, W>(f + n * stride + c);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const auto xs = load<T, W>(x[m] + c);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) parts[m * N + n] += xs * fs[n];
    }
  }
  T all[M * N];
  if constexpr (M * N % lanes<T, W> == 0) {
    sums<T, W, M * N>(parts, all);
  } else {
    for (int i = 0; i < M * N; ++i) all[i] = sum<T, W>(parts[i]);
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      T rest = all[m * N + n];
      for (int64_t i = c; i < last; ++i) rest += load_one<T>(x[m][i]) * f[n * stride + i];
      d[m * r + n] += rest;
    }
  }
}

template <typename T, int W, int M, typename X>
INLINE void dot_rows(
    const X* const* x, const T* f, int64_t r, int64_t columns, int64_t first, int64_t last, T* d) {
  constexpr int N = W == kWidest ? 4 : 2;  // There are twice as many registers.
  int64_t n = 0;
  for (; n + N <= r; n += N) dot_tile<T, W, M, N>(x, f + n * columns, columns, first, last, d + n, r);
  for (; n < r; ++n) dot_tile<T, W, M, 1>(x, f + n * columns, columns, first, last, d + n, r);
}

// d = x fᵀ.
template <typename T, int W, typename X>
INLINE void dots(const X* const* x, int64_t n, const T* f, int64_t r, int64_t columns, T* d) {
  constexpr int64_t at_once = 512;  // Columns of four rows that stay close.
  std::fill(d, d + n * r, T(0));
  for (int64_t first = 0; first < columns; first += at_once) {
    const int64_t last = std::min(first + at_once, columns);
    int64_t m = 0;
    for (; m + 4 <= n; m += 4) dot_rows<T, W, 4>(x + m, f, r, columns, first, last, d + m * r);
    for (; m < n; ++m) dot_rows<T, W, 1>(x + m, f, r, columns, first, last, d + m * r);
  }
}

// y[m] += Σ_k w[m][k] f[k] on one panel of a packed f; `width` of its columns are there. The rows
// behind, as far as there are, are fetched: they are apart, and no processor foresees them.
template <typename T, int W, int M, typename X>
INLINE void add_tile(
    X* const* y, int64_t rest, int64_t column, int64_t width, const T* w, int64_t r, const T* f) {
  constexpr int64_t half = lanes<T, W>;
  Of<T, W> sums[M][2] = {};
  for (int m = M; m < std::min<int64_t>(2 * M, rest); ++m) {
    __builtin_prefetch(y[m] + column, 1);
    __builtin_prefetch(y[m] + column + half, 1);
  }
  for (int64_t k = 0; k < r; ++k) {
    const auto left = load<T, W>(f + k * 2 * half), right = load<T, W>(f + k * 2 * half + half);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const T s = w[m * r + k];
      sums[m][0] += left * s;
      sums[m][1] += right * s;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) put<T, W, false>(y[m] + column, sums[m][0], sums[m][1], width, true);
}

// y += w f on the columns from `first`, of which f is packed.
template <typename T, int W, typename X>
INLINE void add(
    X* const* y, int64_t n, const T* w, int64_t r, const T* f, int64_t first, int64_t width) {
  int64_t m = 0;
  for (; m + 4 <= n; m += 4) {
    for (int64_t c = 0; c < width; c += panel<T, W>) {
      add_tile<T, W, 4>(y + m, n - m, first + c, width - c, w + m * r, r, f + c * r);
    }
  }
  for (; m < n; ++m) {
    for (int64_t c = 0; c < width; c += panel<T, W>) {
      add_tile<T, W, 1>(y + m, n - m, first + c, width - c, w + m * r, r, f + c * r);
    }
  }
}

// c[m] = Σ_t w[t][m] x[t] on one panel, or += that, for M of r columns of w.
template <typename T, int W, int M, bool whole, typename X>
INLINE void outer_tile(
    const X* const* x,
    int64_t n,
    int64_t column,
    int64_t width,
    const T* w,
    int64_t r,
    T* c,
    int64_t stride,
    bool onto) {
  constexpr int64_t half = lanes<T, W>;
  Of<T, W> sums[M][2] = {};
  for (int64_t t = 0; t < n; ++t) {
    const X* from = x[t] + column;
    __builtin_prefetch(from + 2 * half);  // The next panel, likewise.
    if (W == kWidest) __builtin_prefetch(from + 3 * half);
    const auto left = whole ? load<T, W>(from) : load_some<T, W>(from, width);
    const auto right =
        whole ? load<T, W>(from + half) : load_some<T, W>(from + half, width - half);
    for (int m = 0; m < M; ++m) {
      const T s = w[t * r + m];
      sums[m][0] += left * s;
      sums[m][1] += right * s;
    }
  }
  for (int m = 0; m < M; ++m) put<T, W, whole>(c + m * stride, sums[m][0], sums[m][1], width, onto);
}

template <typename T, int W, bool whole, typename X>
INLINE void outer_panel(
    const X* const* x,
    int64_t n,
    int64_t column,
    int64_t width,
    const T* w,
    int64_t r,
    T* c,
    int64_t stride,
    bool onto) {
  constexpr int M = W == kWidest ? 8 : 4;
  int64_t m = 0;
  for (; m + M <= r; m += M) {
    outer_tile<T, W, M, whole>(x, n, column, width, w + m, r, c + m * stride, stride, onto);
  }
  for (; m < r; ++m) {
    outer_tile<T, W, 1, whole>(x, n, column, width, w + m, r, c + m * stride, stride, onto);
  }
}

// c = wᵀ x, or c += that, on the columns of x from `first`; a row of c is `stride` behind the last one.
template <typename T, int W, typename X>
INLINE void outer(
    const X* const* x,
    int64_t n,
    const T* w,
    int64_t r,
    int64_t first,
    int64_t width,
    T* c,
    int64_t stride,
    bool onto) {
  for (int64_t p = 0; p < width; p += panel<T, W>) {
    if (width - p >= panel<T, W>) {
      outer_panel<T, W, true>(x, n, first + p, panel<T, W>, w, r, c + p, stride, onto);
    } else {
      outer_panel<T, W, false>(x, n, first + p, width - p, w, r, c + p, stride, onto);
    }
  }
}

// to[c][r] = from[r][c] in a square of a vector's size: its quarters change places, and then each is
// turned within halves of vectors, which is cheap.
template <typename T>
INLINE void turn_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int n = lanes<T, 32>, half = n / 2;
  const std::make_integer_sequence<int, n> places;
  Of<T, 32> v[n], u[n];
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) v[i] = load<T, 32>(from + i * from_stride);
#pragma GCC unroll 4
  for (int i = 0; i < half; ++i) {
    u[i] = halves<T, 32, n, 0>(v[i], v[i + half], places);
    u[i + half] = halves<T, 32, n, 1>(v[i], v[i + half], places);
  }
#pragma GCC unroll 2
  for (int times = 1; times < half; times *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) v[i] = u[i];
#pragma GCC unroll 2
    for (int q = 0; q < n; q += half) {
#pragma GCC unroll 2
      for (int i = q; i < q + half / 2; ++i) {
        u[2 * i - q] = interleaved<T, 32, 0>(v[i], v[i + half / 2], places);
        u[2 * i - q + 1] = interleaved<T, 32, 1>(v[i], v[i + half / 2], places);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) store<T, 32>(to + i * to_stride, u[i]);
}

// to[c][r] = from[r][c]: squares, and one by one what is left.
template <typename T, int W>
INLINE void turn(
    const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  constexpr int64_t n = lanes<T, 32>;
  const int64_t whole_rows = rows / n * n, whole_columns = columns / n * n;
  for (int64_t r = 0; r < whole_rows; r += n) {
    for (int64_t c = 0; c < whole_columns; c += n) {
      turn_square(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r) {
      to[c * to_stride + r] = from[r * from_stride + c];
    }
  }
}

// The columns from `first` of f panel by panel, with zeros behind the last one: of f `[r, columns]`,
// or of one that lies turned, as `[columns, r]`.
template <typename T, int W>
INLINE void pack(
    const T* f, bool turned, int64_t r, int64_t columns, int64_t first, int64_t width, T* to) {
  constexpr int64_t size = panel<T, W>;
  for (int64_t p = 0; p < width; p += size, to += r * size) {
    const int64_t there = std::min(size, width - p);
    if (there < size) std::fill_n(to, r * size, T(0));
    if (turned) {
      turn<T, W>(f + (first + p) * r, r, there, r, to, size);
      continue;
    }
    for (int64_t k = 0; k < r; ++k) {
      const T* from = f + k * columns + first + p;
      if (there < size) {
        std::copy_n(from, there, to + k * size);
        continue;
      }
      const auto left = load<T, W>(from), right = load<T, W>(from + size / 2);
      std::memcpy(to + k * size, &left, sizeof left);
      std::memcpy(to + k * size + size / 2, &right, sizeof right);
    }
  }
}

// All of them, each compiled for processors with AVX-512, for those with AVX2 and for those without,
// chosen where it runs.
#if defined(__x86_64__)
#define VARIANTS(T, NAME, ARGUMENTS, CALL)        \
  FOR_AVX512 inline void NAME##_avx512 ARGUMENTS { \
    NAME<T, 64> CALL;                             \
  }                                               \
  FOR_AVX2 inline void NAME##_avx2 ARGUMENTS {    \
    NAME<T, 32> CALL;                             \
  }                                               \
  inline void NAME##_here ARGUMENTS {             \
    if (has_avx512()) return NAME##_avx512 CALL;  \
    if (has_avx2()) return NAME##_avx2 CALL;      \
    NAME<T, 32> CALL;                             \
  }
#else
#define VARIANTS(T, NAME, ARGUMENTS, CALL) \
  inline void NAME##_here ARGUMENTS {      \
    NAME<T, 32> CALL;                      \
  }
#endif

#define PRODUCTS(T, X)                                                                           \
  VARIANTS(                                                                                      \
      T,                                                                                         \
      dots,                                                                                      \
      (const X* const* x, int64_t n, const T* f, int64_t r, int64_t columns, T* d),              \
      (x, n, f, r, columns, d))                                                                  \
  VARIANTS(                                                                                      \
      T,                                                                                         \
      add,                                                                                       \
      (X* const* y, int64_t n, const T* w, int64_t r, const T* f, int64_t first, int64_t width), \
      (y, n, w, r, f, first, width))                                                             \
  VARIANTS(                                                                                      \
      T,                                                                                         \
      outer,                                                                                     \
      (const X* const* x,                                                                        \
       int64_t n,                                                                                \
       const T* w,                                                                               \
       int64_t r,                                                                                \
       int64_t first,                                                                            \
       int64_t width,                                                                            \
       T* c,                                                                                     \
       int64_t stride,                                                                           \
       bool onto),                                                                               \
      (x, n, w, r, first, width, c, stride, onto))

#define OF_FACTORS(T)                                                                                \
  VARIANTS(                                                                                          \
      T,                                                                                             \
      turn,                                                                                          \
      (const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride), \
      (from, from_stride, rows, columns, to, to_stride))                                             \
  VARIANTS(                                                                                          \
      T,                                                                                             \
      pack,                                                                                          \
      (const T* f, bool turned, int64_t r, int64_t columns, int64_t first, int64_t width, T* to),    \
      (f, turned, r, columns, first, width, to))

PRODUCTS(float, float)
PRODUCTS(float, Bf16)
PRODUCTS(double, double)
OF_FACTORS(float)
OF_FACTORS(double)

#undef OF_FACTORS
#undef PRODUCTS
#undef VARIANTS
#undef INLINE

}  // namespace thin

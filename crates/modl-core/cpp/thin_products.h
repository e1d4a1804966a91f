// Products of a thin matrix with rows that lie apart: what a BLAS can do only after a gather, and
// does at a tenth of the machine's speed, since it has few columns or a short sum.
//
// n rows are given by their addresses, thin matrices are `[n, r]`, factors `[r, columns]`; T is
// float or double. Each result is a sum in one fixed order, whatever is computed beside it.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace thin {

#define INLINE inline __attribute__((always_inline))

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float Type __attribute__((vector_size(32)));
};
template <>
struct Vector<double> {
  typedef double Type __attribute__((vector_size(32)));
};

// Elements of a vector, and columns of a panel: two vectors.
template <typename T>
constexpr int64_t lanes = 32 / sizeof(T);
template <typename T>
constexpr int64_t panel = 2 * lanes<T>;

template <typename T>
INLINE typename Vector<T>::Type load(const T* from) {
  typename Vector<T>::Type v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// The first `n` elements, and zeros.
template <typename T>
INLINE typename Vector<T>::Type load_some(const T* from, int64_t n) {
  T all[lanes<T>] = {};
  for (int64_t i = 0; i < std::min(n, lanes<T>); ++i) all[i] = from[i];
  return load(all);
}

template <typename T>
INLINE void add_to(T* to, typename Vector<T>::Type v) {
  v += load(to);
  std::memcpy(to, &v, sizeof v);
}

template <typename T>
INLINE void add_some(T* to, typename Vector<T>::Type v, int64_t n) {
  for (int64_t i = 0; i < std::min(n, lanes<T>); ++i) to[i] += v[i];
}

template <typename T>
INLINE T sum(typename Vector<T>::Type v) {
  T s = 0;
  for (int64_t i = 0; i < lanes<T> / 2; ++i) s += v[i] + v[i + lanes<T> / 2];
  return s;
}

// d[m][n] += x[m] · f[n] for M rows x and N rows f; a row of d has `r` elements.
template <typename T, int M, int N>
INLINE void dot_tile(
    const T* const* x, const T* f, int64_t stride, int64_t first, int64_t last, T* d, int64_t r) {
  typename Vector<T>::Type sums[M][N] = {};
  int64_t c = first;
  for (; c + lanes<T> <= last; c += lanes<T>) {
    typename Vector<T>::Type fs[N];
    for (int n = 0; n < N; ++n) fs[n] = load(f + n * stride + c);
    for (int m = 0; m < M; ++m) {
      const auto xs = load(x[m] + c);
      for (int n = 0; n < N; ++n) sums[m][n] += xs * fs[n];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      T rest = sum<T>(sums[m][n]);
      for (int64_t i = c; i < last; ++i) rest += x[m][i] * f[n * stride + i];
      d[m * r + n] += rest;
    }
  }
}

template <typename T, int M>
INLINE void dot_rows(
    const T* const* x, const T* f, int64_t r, int64_t columns, int64_t first, int64_t last, T* d) {
  int64_t n = 0;
  for (; n + 2 <= r; n += 2) dot_tile<T, M, 2>(x, f + n * columns, columns, first, last, d + n, r);
  if (n < r) dot_tile<T, M, 1>(x, f + n * columns, columns, first, last, d + n, r);
}

// d = x fᵀ.
template <typename T>
INLINE void dots(const T* const* x, int64_t n, const T* f, int64_t r, int64_t columns, T* d) {
  constexpr int64_t at_once = 512;  // Columns of four rows that stay close.
  std::fill(d, d + n * r, T(0));
  for (int64_t first = 0; first < columns; first += at_once) {
    const int64_t last = std::min(first + at_once, columns);
    int64_t m = 0;
    for (; m + 4 <= n; m += 4) dot_rows<T, 4>(x + m, f, r, columns, first, last, d + m * r);
    for (; m < n; ++m) dot_rows<T, 1>(x + m, f, r, columns, first, last, d + m * r);
  }
}

// y[m] += Σ_k w[m][k] f[k] on one panel of a packed f; `width` of its columns are there.
template <typename T, int M>
INLINE void add_tile(T* const* y, int64_t column, int64_t width, const T* w, int64_t r, const T* f) {
  typename Vector<T>::Type sums[M][2] = {};
  for (int64_t k = 0; k < r; ++k) {
    const auto left = load(f + k * panel<T>), right = load(f + k * panel<T> + lanes<T>);
    for (int m = 0; m < M; ++m) {
      const T s = w[m * r + k];
      sums[m][0] += left * s;
      sums[m][1] += right * s;
    }
  }
  for (int m = 0; m < M; ++m) {
    T* to = y[m] + column;
    if (width >= panel<T>) {
      add_to(to, sums[m][0]);
      add_to(to + lanes<T>, sums[m][1]);
    } else {
      add_some(to, sums[m][0], width);
      if (width > lanes<T>) add_some(to + lanes<T>, sums[m][1], width - lanes<T>);
    }
  }
}

// y += w f on the columns from `first`, of which f is packed.
template <typename T>
INLINE void add(
    T* const* y, int64_t n, const T* w, int64_t r, const T* f, int64_t first, int64_t width) {
  int64_t m = 0;
  for (; m + 4 <= n; m += 4) {
    for (int64_t c = 0; c < width; c += panel<T>) {
      add_tile<T, 4>(y + m, first + c, width - c, w + m * r, r, f + c * r);
    }
  }
  for (; m < n; ++m) {
    for (int64_t c = 0; c < width; c += panel<T>) {
      add_tile<T, 1>(y + m, first + c, width - c, w + m * r, r, f + c * r);
    }
  }
}

// c[m] += Σ_t w[t][m] x[t] on one panel, for M of r columns of w.
template <typename T, int M, bool whole>
INLINE void outer_tile(
    const T* const* x,
    int64_t n,
    int64_t column,
    int64_t width,
    const T* w,
    int64_t r,
    T* c,
    int64_t stride) {
  typename Vector<T>::Type sums[M][2] = {};
  for (int64_t t = 0; t < n; ++t) {
    const T* from = x[t] + column;
    __builtin_prefetch(from + panel<T>);  // Rows are apart, and no processor foresees the next panel.
    const auto left = whole ? load(from) : load_some(from, width);
    const auto right =
        whole ? load(from + lanes<T>) : load_some(from + lanes<T>, width - lanes<T>);
    for (int m = 0; m < M; ++m) {
      const T s = w[t * r + m];
      sums[m][0] += left * s;
      sums[m][1] += right * s;
    }
  }
  for (int m = 0; m < M; ++m) {
    T* to = c + m * stride;
    if (whole) {
      add_to(to, sums[m][0]);
      add_to(to + lanes<T>, sums[m][1]);
    } else {
      add_some(to, sums[m][0], width);
      if (width > lanes<T>) add_some(to + lanes<T>, sums[m][1], width - lanes<T>);
    }
  }
}

template <typename T, bool whole>
INLINE void outer_panel(
    const T* const* x,
    int64_t n,
    int64_t column,
    int64_t width,
    const T* w,
    int64_t r,
    T* c,
    int64_t stride) {
  int64_t m = 0;
  for (; m + 4 <= r; m += 4) {
    outer_tile<T, 4, whole>(x, n, column, width, w + m, r, c + m * stride, stride);
  }
  for (; m < r; ++m) {
    outer_tile<T, 1, whole>(x, n, column, width, w + m, r, c + m * stride, stride);
  }
}

// c += wᵀ x on the columns of x from `first`; a row of c is `stride` behind the last one.
template <typename T>
INLINE void outer(
    const T* const* x,
    int64_t n,
    const T* w,
    int64_t r,
    int64_t first,
    int64_t width,
    T* c,
    int64_t stride) {
  for (int64_t p = 0; p < width; p += panel<T>) {
    if (width - p >= panel<T>) {
      outer_panel<T, true>(x, n, first + p, panel<T>, w, r, c + p, stride);
    } else {
      outer_panel<T, false>(x, n, first + p, width - p, w, r, c + p, stride);
    }
  }
}

// The columns from `first` of f `[r, columns]`, whose elements are so far apart, panel by panel, with
// zeros behind the last one.
template <typename T>
void pack(
    const T* f,
    int64_t row_stride,
    int64_t column_stride,
    int64_t r,
    int64_t first,
    int64_t width,
    T* to) {
  for (int64_t p = 0; p < width; p += panel<T>) {
    const int64_t there = std::min(panel<T>, width - p);
    for (int64_t k = 0; k < r; ++k) {
      const T* from = f + k * row_stride + (first + p) * column_stride;
      for (int64_t c = 0; c < there; ++c) to[c] = from[c * column_stride];
      for (int64_t c = there; c < panel<T>; ++c) to[c] = T(0);
      to += panel<T>;
    }
  }
}

// f `[columns, r]` as `[r, columns]`.
template <typename T>
void turn(const T* f, int64_t r, int64_t columns, T* to) {
  constexpr int64_t at_once = 16;
  for (int64_t first = 0; first < columns; first += at_once) {
    const int64_t last = std::min(first + at_once, columns);
    for (int64_t k = 0; k < r; ++k) {
      for (int64_t c = first; c < last; ++c) to[k * columns + c] = f[c * r + k];
    }
  }
}

// The three products, each compiled for processors with AVX2 and for those without, since what is
// compiled here runs elsewhere.
#if defined(__x86_64__)
#define FOR_AVX2 __attribute__((target("avx2,fma")))

inline bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}
#endif

#if defined(__x86_64__)
#define VARIANTS(NAME, ARGUMENTS, CALL)   \
  FOR_AVX2 inline void NAME##_avx2 ARGUMENTS { \
    NAME CALL;                            \
  }                                       \
  inline void NAME##_here ARGUMENTS {     \
    if (has_avx2()) return NAME##_avx2 CALL; \
    NAME CALL;                            \
  }
#else
#define VARIANTS(NAME, ARGUMENTS, CALL) \
  inline void NAME##_here ARGUMENTS {   \
    NAME CALL;                          \
  }
#endif

#define PRODUCTS(T)                                                                       \
  VARIANTS(                                                                               \
      dots,                                                                               \
      (const T* const* x, int64_t n, const T* f, int64_t r, int64_t columns, T* d),       \
      (x, n, f, r, columns, d))                                                           \
  VARIANTS(                                                                               \
      add,                                                                                \
      (T* const* y, int64_t n, const T* w, int64_t r, const T* f, int64_t first, int64_t width), \
      (y, n, w, r, f, first, width))                                                      \
  VARIANTS(                                                                               \
      outer,                                                                              \
      (const T* const* x,                                                                 \
       int64_t n,                                                                         \
       const T* w,                                                                        \
       int64_t r,                                                                         \
       int64_t first,                                                                     \
       int64_t width,                                                                     \
       T* c,                                                                              \
       int64_t stride),                                                                   \
      (x, n, w, r, first, width, c, stride))

PRODUCTS(float)
PRODUCTS(double)

#undef PRODUCTS
#undef VARIANTS
#undef INLINE

}  // namespace thin

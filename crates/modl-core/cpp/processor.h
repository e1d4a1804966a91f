// What the processor has, since what is compiled here runs elsewhere.

#pragma once

#if defined(__x86_64__)

#define FOR_AVX2 __attribute__((target("avx2,fma")))
// Products of bf16 are called only where has_bf16() says so.
#define FOR_AVX512 __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma,prfchw")))

inline bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}

inline bool has_avx512() {
  static const bool has = has_avx2() && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw");
  return has;
}

inline bool has_bf16() {
  static const bool has = has_avx512() && __builtin_cpu_supports("avx512bf16");
  return has;
}

#endif

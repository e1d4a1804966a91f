// What a step of training does to whole lists of tensors or in one pass over memory, where libtorch's C
// interface has no such function; see src/steps.rs.

#include <cmath>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/ops/_fused_adamw.h>

#include "products.h"
#include "told.h"

namespace {

at::Tensor& tensor(void* of) { return *static_cast<at::Tensor*>(of); }

// Whether nobody else has its memory. A view, as a transposed gradient is, keeps what it is a view of.
bool alone(const at::Tensor& own) {
  if (!own.is_view()) {
    return own.use_count() == 1 && own.storage().use_count() == 1;
  }
  return own.use_count() == 1 && own._base().use_count() == 1 && own.storage().use_count() == 2;
}

// The sum of its squares: on the processor by an inner product, several times as fast as a norm.
double squares_of(const at::Tensor& own) {
  const bool there = own.device().is_cpu() && own.is_non_overlapping_and_dense();
#if defined(__x86_64__)
  if (there && own.scalar_type() == at::kFloat && has_avx512()) {
    return products::square_sum(own.const_data_ptr<float>(), own.numel());
  }
#endif
  if (there && (own.scalar_type() == at::kFloat || own.scalar_type() == at::kDouble)) {
    const at::Tensor flat = own.as_strided({own.numel()}, {1});
    return flat.dot(flat).item<double>();
  }
  const double norm = own.norm().item<double>();
  return norm * norm;
}

}  // namespace

extern "C" {

// The 2-norm of all tensors together: their sums of squares, put together in f64.
char* modl_norm(void* const* tensors, size_t n, double* norm) {
  return told([&] {
    double squares = 0;
    for (size_t i = 0; i < n; ++i) {
      squares += squares_of(tensor(tensors[i]));
    }
    *norm = std::sqrt(squares);
  });
}

// tensor *= factor, in its memory where nobody else has it.
char* modl_scale(void* of, double factor) {
  return told([&] {
    at::Tensor& own = tensor(of);
    if (alone(own)) {
      own.mul_(factor);
    } else {
      own = own.mul(factor);
    }
  });
}

// a += factor * b.
char* modl_add_scaled(void* a, void* b, double factor) {
  return told([&] { tensor(a).add_(tensor(b), factor); });
}

// A step of AdamW; all of one shape, kind and place.
char* modl_adamw(void* theta, void* grad, void* mean, void* square, double step, double lr,
                 double beta1, double beta2, double decay, double eps) {
  return told([&] {
    at::Tensor& own = tensor(theta);
    // The kernel goes through memory, whatever the strides.
    const at::Tensor dense = own.contiguous();
    const at::Tensor steps = at::full({}, step, own.options().dtype(at::kFloat));
    at::_fused_adamw_({dense}, {tensor(grad).contiguous()}, {tensor(mean)}, {tensor(square)}, {}, {steps}, lr,
                      beta1, beta2, decay, eps, /*amsgrad=*/false, /*maximize=*/false);
    if (!dense.is_same(own)) {
      own.copy_(dense);
    }
  });
}

}  // extern "C"

// What a step of training does to whole lists of tensors or in one pass over memory, where libtorch's C
// interface has no such function; see src/steps.rs.

#include <cmath>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>

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

}  // namespace

extern "C" {

// The 2-norm of all tensors together, those of each put together in f64.
char* modl_norm(void* const* tensors, size_t n, double* norm) {
  return told([&] {
    std::vector<at::Tensor> all;
    all.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      all.push_back(tensor(tensors[i]));
    }
    double squares = 0;
    for (const at::Tensor& own : at::_foreach_norm(all, 2)) {
      const double one = own.item<double>();
      squares += one * one;
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

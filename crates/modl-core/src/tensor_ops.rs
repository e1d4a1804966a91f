//! The operations of [`Tensor`]: PyTorch's names and meanings, each fallible.

use crate::tensor::op_error;
use crate::{Device, Kind, Result, Tensor};

/// Operations on one tensor without arguments.
macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident = $f:ident;)*) => {
        impl Tensor { $(
            $(#[$doc])*
            pub fn $name(&self) -> Result<Tensor> {
                self.0.$f().map(Tensor).map_err(|e| op_error(stringify!($name), &[&self.0], e))
            }
        )* }
    };
}

/// Element-wise operations on two tensors, broadcast as PyTorch does.
macro_rules! binary {
    ($($(#[$doc:meta])* $name:ident = $f:ident;)*) => {
        impl Tensor { $(
            $(#[$doc])*
            pub fn $name(&self, other: &Tensor) -> Result<Tensor> {
                self.0
                    .$f(&other.0)
                    .map(Tensor)
                    .map_err(|e| op_error(stringify!($name), &[&self.0, &other.0], e))
            }
        )* }
    };
}

/// Operations on one tensor with plain arguments.
macro_rules! with_args {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $ty:ty),*) = |$t:ident| $call:expr;)*) => {
        impl Tensor { $(
            $(#[$doc])*
            pub fn $name(&self, $($arg: $ty),*) -> Result<Tensor> {
                let $t = &self.0;
                $call.map(Tensor).map_err(|e| op_error(stringify!($name), &[&self.0], e))
            }
        )* }
    };
}

unary! {
    /// The largest element, a scalar.
    largest = f_max;
    /// −x.
    neg = f_neg;
    /// |x|.
    abs = f_abs;
    /// Sign: −1, 0 or 1.
    sign = f_sign;
    /// eˣ.
    exp = f_exp;
    /// ln x.
    log = f_log;
    /// √x.
    sqrt = f_sqrt;
    /// cos x.
    cos = f_cos;
    /// sin x.
    sin = f_sin;
    /// x².
    square = f_square;
    /// max(x, 0).
    relu = f_relu;
    /// x·σ(x), also called swish.
    silu = f_silu;
    /// tanh x.
    tanh = f_tanh;
    /// arctan x.
    atan = f_atan;
    /// 1 ⁄ (1 + e⁻ˣ).
    sigmoid = f_sigmoid;
    /// ln(1 + eˣ).
    softplus = f_softplus;
    /// Whether each element is neither NaN nor infinite.
    is_finite = f_isfinite;
    /// The same elements, contiguous in memory.
    contiguous = f_contiguous;
    /// The same data outside the graph.
    detach = f_detach;
    /// Zeros of the same shape and kind.
    zeros_like = f_zeros_like;
    /// Ones of the same shape and kind.
    ones_like = f_ones_like;
    /// Whether all elements are true, `[]`.
    all = f_all;
    /// √Σx², `[]`.
    norm = f_norm;
}

binary! {
    /// Where self equals other.
    equal = f_eq_tensor;
    /// Where self is greater than other.
    greater = f_gt_tensor;
    /// Where one of them or both are true.
    logical_or = f_logical_or;
    /// self + other.
    add = f_add;
    /// self − other.
    sub = f_sub;
    /// self · other, element by element.
    mul = f_mul;
    /// self ⁄ other.
    div = f_div;
    /// The larger of two, element by element.
    maximum = f_maximum;
    /// Matrix product over the last two dimensions, the others broadcast.
    matmul = f_matmul;
    /// `[b, n, k] @ [b, k, m]`.
    bmm = f_bmm;
}

with_args! {
    /// GELU with the error function, as BERT has it.
    gelu() = |t| t.f_gelu("none");
    /// GELU by tanh, as GPT-2 has it.
    gelu_tanh() = |t| t.f_gelu("tanh");
    /// self + c.
    add_scalar(c: f64) = |t| t.f_add_scalar(c);
    /// self + by; whole numbers stay whole.
    shift(by: i64) = |t| t.f_add_scalar(by);
    /// c · self.
    mul_scalar(c: f64) = |t| t.f_mul_scalar(c);
    /// selfᶜ.
    pow(c: f64) = |t| t.f_pow_tensor_scalar(c);
    /// Limits each element to [lo, hi].
    clamp(lo: f64, hi: f64) = |t| t.f_clamp(lo, hi);
    /// softmax along `dim`.
    softmax(dim: i64) = |t| t.f_softmax(dim, None::<Kind>);
    /// ln softmax along `dim`.
    log_softmax(dim: i64) = |t| t.f_log_softmax(dim, None::<Kind>);
    /// ln Σ eˣ along `dim`, which disappears.
    logsumexp(dim: i64) = |t| t.f_logsumexp([dim].as_slice(), false);
    /// Sum of all elements, `[]`.
    sum() = |t| t.f_sum(None::<Kind>);
    /// Mean of all elements, `[]`.
    mean() = |t| t.f_mean(None::<Kind>);
    /// Sums along `dims`, kept with length 1 if `keep`.
    sum_dims(dims: &[i64], keep: bool) = |t| t.f_sum_dim_intlist(dims, keep, None::<Kind>);
    /// Means along `dims`, kept with length 1 if `keep`.
    mean_dims(dims: &[i64], keep: bool) = |t| t.f_mean_dim(dims, keep, None::<Kind>);
    /// Index of the largest element along `dim`.
    argmax(dim: i64) = |t| t.f_argmax(dim, false);
    /// The indices that sort self along `dim`; of equal elements the one that comes first stays
    /// first.
    argsort(dim: i64, descending: bool) = |t| t.f_argsort_stable(true, dim, descending);
    /// Running sums along `dim`.
    cumsum(dim: i64) = |t| t.f_cumsum(dim, None::<Kind>);
    /// Two dimensions exchanged.
    transpose(a: i64, b: i64) = |t| t.f_transpose(a, b);
    /// Dimensions in another order.
    permute(dims: &[i64]) = |t| t.f_permute(dims);
    /// The same elements in another shape; −1 is worked out.
    reshape(shape: &[i64]) = |t| t.f_reshape(shape);
    /// A dimension of length 1 put in.
    unsqueeze(dim: i64) = |t| t.f_unsqueeze(dim);
    /// A dimension of length 1 taken out.
    squeeze(dim: i64) = |t| t.f_squeeze_dim(dim);
    /// Broadcast without copying; −1 keeps a length.
    expand(shape: &[i64]) = |t| t.f_expand(shape, false);
    /// `length` entries from `start` along `dim`.
    narrow(dim: i64, start: i64, length: i64) = |t| t.f_narrow(dim, start, length);
    /// One entry along `dim`, which disappears.
    select(dim: i64, index: i64) = |t| t.f_select(dim, index);
    /// Each element `n` times in a row along `dim`.
    repeat_interleave(n: i64, dim: i64) = |t| t.f_repeat_interleave_self_int(n, dim, None::<i64>);
    /// Zero-padding `[before, after]` for the last dimension, then the one before it, …
    pad(by: &[i64]) = |t| t.f_constant_pad_nd(by);
    /// Converted to another kind; itself where the kind is right already.
    to_kind(kind: Kind) = |t| if t.kind() == kind { Ok(t.shallow_clone()) } else { t.f_to_kind(kind) };
    /// Moved to a device; itself where it is there already.
    to_device(device: Device) = |t| if t.device() == device { Ok(t.shallow_clone()) } else { t.f_to_device(device) };
    /// self = c, element by element.
    eq_scalar(c: f64) = |t| t.f_eq(c);
    /// self > c, element by element.
    gt_scalar(c: f64) = |t| t.f_gt(c);
    /// self ≥ c, element by element.
    ge_scalar(c: f64) = |t| t.f_ge(c);
    /// self < c, element by element.
    lt_scalar(c: f64) = |t| t.f_lt(c);
    /// Index sets as 0/1 rows of length `classes`.
    one_hot(classes: i64) = |t| t.f_one_hot(classes);
}

impl Tensor {
    /// The last two dimensions exchanged: Wᵀ.
    pub fn t(&self) -> Result<Tensor> {
        self.transpose(-2, -1)
    }

    /// self + a @ b for matrices.
    pub fn addmm(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        Self::op("addmm", &[self, a, b], |t| t[0].f_addmm(t[1], t[2]))
    }

    /// beta·self + alpha·(a @ b) for stacks of matrices; self broadcasts.
    pub fn baddbmm(&self, a: &Tensor, b: &Tensor, beta: f64, alpha: f64) -> Result<Tensor> {
        Self::op("baddbmm", &[self, a, b], |t| t[0].f_baddbmm(t[1], t[2], beta, alpha))
    }

    /// self + a·b, element by element.
    pub fn addcmul(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        Self::op("addcmul", &[self, a, b], |t| t[0].f_addcmul(t[1], t[2]))
    }

    /// (x − mean) ⁄ √(var + eps) · weight + bias over the last dimension.
    pub fn layer_norm(&self, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
        Self::op("layer_norm", &[self, weight, bias], |t| {
            let last = [t[1].size().last().copied().unwrap_or(0)];
            t[0].f_layer_norm(last.as_slice(), Some(t[1]), Some(t[2]), eps, false)
        })
    }

    /// Rows of self `[rows, dim]` by `ids` of any shape → `[ids…, dim]`.
    pub fn embedding(&self, ids: &Tensor) -> Result<Tensor> {
        Self::op("embedding", &[self, ids], |t| {
            tch::Tensor::f_embedding(t[0], t[1], -1, false, false)
        })
    }

    /// softmax(q kᵀ·scale + mask) v by libtorch's fused kernel; q, k, v `[batch, heads, seq, dim]`.
    pub fn attention(
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        mask: Option<&Tensor>,
        scale: f64,
    ) -> Result<Tensor> {
        Self::op("attention", &[query, key, value], |t| {
            let mask = mask.map(|m| &m.0);
            tch::Tensor::f_scaled_dot_product_attention(
                t[0], t[1], t[2], mask, 0.0, false, scale, false,
            )
        })
    }

    /// Rows (entries along `dim`) by `index` `[n]` i64.
    pub fn index_select(&self, dim: i64, index: &Tensor) -> Result<Tensor> {
        Self::op("index_select", &[self, index], |t| t[0].f_index_select(dim, t[1]))
    }

    /// self with the rows of `source` added at `index` along `dim`.
    pub fn index_add(&self, dim: i64, index: &Tensor, source: &Tensor) -> Result<Tensor> {
        Self::op("index_add", &[self, index, source], |t| t[0].f_index_add(dim, t[1], t[2]))
    }

    /// self with the rows at `index` along `dim` replaced by those of `source`.
    pub fn index_copy(&self, dim: i64, index: &Tensor, source: &Tensor) -> Result<Tensor> {
        Self::op("index_copy", &[self, index, source], |t| t[0].f_index_copy(dim, t[1], t[2]))
    }

    /// Elements by `index` along `dim`, which has self's number of dimensions.
    pub fn gather(&self, dim: i64, index: &Tensor) -> Result<Tensor> {
        Self::op("gather", &[self, index], |t| t[0].f_gather(dim, t[1], false))
    }

    /// self with `source` added at `index` along `dim`.
    pub fn scatter_add(&self, dim: i64, index: &Tensor, source: &Tensor) -> Result<Tensor> {
        Self::op("scatter_add", &[self, index, source], |t| t[0].f_scatter_add(dim, t[1], t[2]))
    }

    /// self where `mask` is false, `value` where it is true.
    pub fn masked_fill(&self, mask: &Tensor, value: f64) -> Result<Tensor> {
        Self::op("masked_fill", &[self, mask], |t| t[0].f_masked_fill(t[1], value))
    }

    /// self where `condition` is true, `other` where it is false.
    pub fn where_else(&self, condition: &Tensor, other: &Tensor) -> Result<Tensor> {
        Self::op("where", &[self, condition, other], |t| t[0].f_where_self(t[1], t[2]))
    }

    /// Largest `k` along `dim`, sorted: values and indices.
    pub fn topk(&self, k: i64, dim: i64) -> Result<(Tensor, Tensor)> {
        self.pair("topk", self.0.f_topk(k, dim, true, true))
    }

    /// Sorted along `dim`: values and the indices that they came from.
    pub fn sort(&self, dim: i64, descending: bool) -> Result<(Tensor, Tensor)> {
        self.pair("sort", self.0.f_sort(dim, descending))
    }

    /// Largest along `dim`: values and indices.
    pub fn max_dim(&self, dim: i64) -> Result<(Tensor, Tensor)> {
        self.pair("max_dim", self.0.f_max_dim(dim, false))
    }

    fn pair(
        &self,
        op: &'static str,
        result: Result<(tch::Tensor, tch::Tensor), tch::TchError>,
    ) -> Result<(Tensor, Tensor)> {
        result.map(|(a, b)| (Tensor(a), Tensor(b))).map_err(|e| op_error(op, &[&self.0], e))
    }

    /// Joined along `dim`.
    pub fn cat(tensors: &[Tensor], dim: i64) -> Result<Tensor> {
        let all: Vec<&Tensor> = tensors.iter().collect();
        Self::op("cat", &all, |t| tch::Tensor::f_cat(t, dim))
    }

    /// Joined along a new dimension.
    pub fn stack(tensors: &[Tensor], dim: i64) -> Result<Tensor> {
        let all: Vec<&Tensor> = tensors.iter().collect();
        Self::op("stack", &all, |t| tch::Tensor::f_stack(t, dim))
    }

    /// Einstein summation, for instance `"bi,oi->bo"`.
    pub fn einsum(equation: &str, tensors: &[&Tensor]) -> Result<Tensor> {
        Self::op("einsum", tensors, |t| tch::Tensor::f_einsum(equation, t, None::<i64>))
    }

    /// −Σ target log-likelihood ⁄ n: self are logits `[n, classes]`, target `[n]` i64.
    pub fn cross_entropy(&self, target: &Tensor) -> Result<Tensor> {
        Self::op("cross_entropy", &[self, target], |t| {
            t[0].f_cross_entropy_loss(t[1], None::<tch::Tensor>, tch::Reduction::Mean, -100, 0.0)
        })
    }

    /// −log-likelihood of the target of each row, `[n]`: self are log-likelihoods `[n, classes]`,
    /// target `[n]` i64.
    pub fn nll(&self, target: &Tensor) -> Result<Tensor> {
        Self::op("nll", &[self, target], |t| {
            // No class is passed over.
            t[0].f_nll_loss(t[1], None::<tch::Tensor>, tch::Reduction::None, i64::MIN)
        })
    }

    /// Mean of (self − target)².
    pub fn mse(&self, target: &Tensor) -> Result<Tensor> {
        Self::op("mse", &[self, target], |t| t[0].f_mse_loss(t[1], tch::Reduction::Mean))
    }

    /// X with self X = `right`: self `[n, n]`, right `[n, k]` → `[n, k]`.
    ///
    /// # Errors
    /// Where self is singular.
    pub fn solve(&self, right: &Tensor) -> Result<Tensor> {
        Self::op("solve", &[self, right], |t| tch::Tensor::f_linalg_solve(t[0], t[1], true))
    }

    /// self `[m, n]` = Q R with orthonormal columns of Q `[m, k]` and a triangle R `[k, n]`.
    pub fn qr(&self) -> Result<(Tensor, Tensor)> {
        self.pair("qr", tch::Tensor::f_linalg_qr(&self.0, "reduced"))
    }

    /// Singular values: self `[m, n]` = U diag(S) Vᵀ with U `[m, k]`, S `[k]`, Vᵀ `[k, n]`.
    pub fn svd(&self) -> Result<(Tensor, Tensor, Tensor)> {
        // `linalg_svd` of the bindings passes a driver, which only CUDA accepts.
        let (u, s, v) = self.0.f_svd(true, true).map_err(|e| op_error("svd", &[&self.0], e))?;
        Ok((Tensor(u), Tensor(s), Tensor(v).t()?))
    }

    /// A symmetric self `[n, n]` = V diag(λ) Vᵀ, as λ `[n]` from the largest on, and V `[n, n]`. Only
    /// the lower half of self is read.
    pub fn symmetric_eigen(&self) -> Result<(Tensor, Tensor)> {
        let all = self.0.f_linalg_eigh("L").and_then(|(l, v)| Ok((l.f_flip([0])?, v.f_flip([1])?)));
        self.pair("symmetric_eigen", all)
    }

    /// self ⁄ √(mean of squares over the last dimension + eps) · weight, where the mean is taken in
    /// f32 at least.
    pub fn rms_norm(&self, weight: &Tensor, eps: f64) -> Result<Tensor> {
        let wide = if self.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let x = self.to_kind(wide)?;
        let mean = x.square()?.mean_dims(&[-1], true)?;
        let scale = mean.add_scalar(eps)?.sqrt()?;
        x.div(&scale)?.to_kind(self.kind())?.mul(weight)
    }

    /// Convolution of self `[batch, in, height, width]` with `weight`
    /// `[out, in ⁄ groups, kernel, kernel]`.
    pub fn conv2d(
        &self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        stride: &[i64],
        padding: &[i64],
        groups: i64,
    ) -> Result<Tensor> {
        Tensor::op("conv2d", &[self, weight], |t| {
            t[0].f_conv2d(t[1], bias.map(|b| &b.0), stride, padding, [1, 1].as_slice(), groups)
        })
    }

    /// Means of self `[batch, seq, dim]` over the positions where `mask` `[batch, seq]` is 1 →
    /// `[batch, dim]`; a row without any gives zeros.
    pub fn masked_mean(&self, mask: &Tensor) -> Result<Tensor> {
        let sum = mask.to_kind(self.kind())?.unsqueeze(1)?.matmul(self)?.squeeze(1)?;
        // Counted in f32 at least: bf16 cannot tell 300 from 301.
        let wide = if self.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let count = mask.to_kind(wide)?.sum_dims(&[1], true)?.clamp(1.0, f64::INFINITY)?;
        sum.to_kind(wide)?.div(&count)?.to_kind(self.kind())
    }
}

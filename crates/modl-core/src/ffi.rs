//! The one place with `unsafe`: memory maps, tensors filled in place, a setting of malloc's, and what
//! the files of `cpp` offer.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_void};
use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::tensor::op_error;
use crate::{AdamWStep, Device, Error, Kind, Result, Tensor};

/// Maps a file for reading.
pub(crate) fn map_file(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|e| Error::file(path, format!("cannot be opened: {e}")))?;
    // SAFETY: the map is private and read-only. Another process that truncates the file while it
    // is mapped could still raise SIGBUS; modl itself replaces files by rename, never in place.
    unsafe { Mmap::map(&file) }.map_err(|e| Error::file(path, format!("cannot be mapped: {e}")))
}

/// A new tensor on the CPU that `fill` writes, in row-major order. `T` is the element type of
/// `kind`.
///
/// # Errors
/// Where the sizes of `T` and `kind` differ, or there is no memory.
pub(crate) fn filled<T: tch::kind::Element>(
    shape: &[i64],
    kind: Kind,
    fill: impl FnOnce(&mut [T]),
) -> Result<Tensor> {
    // By size, since tch's `Element` takes `half::bf16` for f16.
    if size_of::<T>() != kind.elt_size_in_bytes() {
        let problem = format!("{} bytes for an element of {kind:?}", size_of::<T>());
        return Err(Error::invalid("filled", problem));
    }
    let t = tch::Tensor::f_zeros(0, (kind, Device::Cpu))
        .and_then(|empty| empty.f_new_empty(shape, (kind, Device::Cpu)));
    let t = t.map_err(|e| op_error("filled", &[], e))?;
    let n = t.numel();
    if n > 0 {
        // SAFETY: the tensor is new, contiguous and on the CPU, nobody else has it, and its `n`
        // elements are `T`s; every bit pattern is a valid number.
        fill(unsafe { std::slice::from_raw_parts_mut(t.data_ptr().cast::<T>(), n) });
    }
    Ok(Tensor(t))
}

/// Sets glibc's thresholds for giving memory back; whether it took both.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn keep_freed(mapped_from: i32, trimmed_from: i32) -> bool {
    // SAFETY: mallopt takes two integers and locks malloc's state itself.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, mapped_from) == 1
            && libc::mallopt(libc::M_TRIM_THRESHOLD, trimmed_from) == 1
    }
}

/// Other allocators are left as they are.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn keep_freed(_mapped_from: i32, _trimmed_from: i32) -> bool {
    false
}

unsafe extern "C" {
    fn modl_grad_enabled() -> bool;
    fn modl_on_threads(
        n: usize,
        task: extern "C" fn(*mut c_void, usize),
        data: *mut c_void,
    ) -> *mut c_char;
    fn modl_join(
        y: *mut c_void,
        x: *mut c_void,
        n: usize,
        xs: *const *mut c_void,
        ys: *const *mut c_void,
        first_rows: *const i64,
        params: *const *mut c_void,
        own: *const *mut c_void,
        first_params: *const usize,
    ) -> *mut c_char;
    fn modl_grouped_low_rank(
        y: *mut c_void,
        x: *mut c_void,
        alpha: *mut c_void,
        k: i64,
        slots: *const i64,
        first: *const i64,
        modules: usize,
        factors: *const *mut c_void,
        scales: *const f64,
        result: *mut *mut c_void,
    ) -> *mut c_char;
    fn modl_linear(
        x: *mut c_void,
        w: *mut c_void,
        bias: *mut c_void,
        relu: bool,
        result: *mut *mut c_void,
    ) -> *mut c_char;
    fn modl_cross_entropy(
        x: *mut c_void,
        classes: *const i64,
        result: *mut *mut c_void,
    ) -> *mut c_char;
    fn modl_norm(tensors: *const *mut c_void, n: usize, norm: *mut f64) -> *mut c_char;
    fn modl_scale(of: *mut c_void, factor: f64) -> *mut c_char;
    fn modl_add_scaled(a: *mut c_void, b: *mut c_void, factor: f64) -> *mut c_char;
    fn modl_adamw(
        theta: *mut c_void,
        grad: *mut c_void,
        mean: *mut c_void,
        square: *mut c_void,
        step: f64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        decay: f64,
        eps: f64,
    ) -> *mut c_char;
}

/// What a function of `cpp` says, which frees the text.
fn said(name: &'static str, text: *mut c_char) -> Result<()> {
    said_of(name, &[], text)
}

/// [`said`], of tensors that the error tells of.
fn said_of(name: &'static str, of: &[&Tensor], text: *mut c_char) -> Result<()> {
    if text.is_null() {
        return Ok(());
    }
    // SAFETY: the text ends with 0, was made by malloc for us, and nobody else has it.
    let message = unsafe {
        let message = CStr::from_ptr(text).to_string_lossy().into_owned();
        libc::free(text.cast());
        message
    };
    let of: Vec<&tch::Tensor> = of.iter().map(|t| &t.0).collect();
    Err(op_error(name, &of, tch::TchError::Torch(message)))
}

/// C++'s view of a tensor.
fn at(t: &Tensor) -> *mut c_void {
    t.0.as_ptr().cast_mut().cast()
}

/// Whether operations on this thread are recorded for gradients.
pub(crate) fn grad_enabled() -> bool {
    // SAFETY: reads a flag of this thread.
    unsafe { modl_grad_enabled() }
}

/// `task(0)`, …, `task(n − 1)` on libtorch's threads. A task must not panic.
pub(crate) fn on_threads(n: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
    extern "C" fn call(data: *mut c_void, i: usize) {
        // SAFETY: `data` is the reference below, which outlives the call that uses it.
        let task = unsafe { &*data.cast::<&(dyn Fn(usize) + Sync)>() };
        task(i);
    }
    let mut task = task;
    let data = std::ptr::from_mut(&mut task).cast();
    // SAFETY: the call returns when all tasks are done, and tasks may be run by several threads.
    said("on_threads", unsafe { modl_on_threads(n, call, data) })
}

/// Branches that were computed, in the order of their rows.
pub(crate) struct Joined {
    /// What each had of x, a leaf.
    pub(crate) xs: Vec<Tensor>,
    /// What each gave.
    pub(crate) ys: Vec<Tensor>,
    /// The number of rows of each.
    pub(crate) rows: Vec<i64>,
    /// The parameters of each, where gradients go to.
    pub(crate) params: Vec<Vec<Tensor>>,
    /// The leaves that stood for them.
    pub(crate) owns: Vec<Vec<Tensor>>,
}

/// Gives y, made of what the branches gave for x, their gradients.
pub(crate) fn join(y: &Tensor, x: &Tensor, of: &Joined) -> Result<()> {
    let all = |ts: &[Tensor]| ts.iter().map(at).collect::<Vec<_>>();
    let flat = |ts: &[Vec<Tensor>]| ts.iter().flatten().map(at).collect::<Vec<_>>();
    let sizes = |ts: &[Vec<Tensor>]| ts.iter().map(Vec::len).collect::<Vec<_>>();
    let n = of.rows.len();
    if [of.xs.len(), of.ys.len(), of.params.len()] != [n; 3] || sizes(&of.params) != sizes(&of.owns)
    {
        return Err(Error::invalid("side_by_side", "branches are incomplete"));
    }
    let (xs, ys) = (all(&of.xs), all(&of.ys));
    let (params, owns) = (flat(&of.params), flat(&of.owns));
    let (mut first_rows, mut first_params) = (vec![0], vec![0]);
    let (mut row, mut param) = (0, 0);
    for (rows, params) in of.rows.iter().zip(&of.params) {
        row += rows;
        param += params.len();
        first_rows.push(row);
        first_params.push(param);
    }
    // SAFETY: all are tensors that live until the call is over, and the lists are as long as it was
    // checked above; C++ keeps its own references to what it needs.
    said("side_by_side", unsafe {
        modl_join(
            at(y),
            at(x),
            n,
            xs.as_ptr(),
            ys.as_ptr(),
            first_rows.as_ptr(),
            params.as_ptr(),
            owns.as_ptr(),
            first_params.as_ptr(),
        )
    })
}

/// Low-rank modules on slots: place `s` of `slots` is choice `s mod k` of token `s ⁄ k`.
pub(crate) struct Slots<'a> {
    pub(crate) k: i64,
    /// Sorted by module, and those of each in their order.
    pub(crate) slots: &'a [i64],
    /// Where those of each module start, and their number.
    pub(crate) first: Vec<i64>,
    /// A `[rank, in]` of each module.
    pub(crate) downs: Vec<Tensor>,
    /// B `[out, rank]`.
    pub(crate) ups: Vec<Tensor>,
    pub(crate) scales: Vec<f64>,
}

/// What [`grouped_low_rank`] computes in where x is of that kind, if it does.
pub(crate) fn of_sums(kind: Kind) -> Option<Kind> {
    match kind {
        Kind::Float | Kind::BFloat16 => Some(Kind::Float),
        Kind::Double => Some(Kind::Double),
        _ => None,
    }
}

/// y `[…, out]` + Σ α·scale·B A x for x `[tokens, in]` and α `[tokens · k]`; in y's memory where
/// nobody else has it. α is of the kind of x, or f32 where that is bf16, and factors of either.
pub(crate) fn grouped_low_rank(
    y: Tensor,
    x: &Tensor,
    alpha: &Tensor,
    of: &Slots,
) -> Result<Tensor> {
    let kind = x.kind();
    let computed = of_sums(kind);
    let (tokens, width, out) = (x.len_of(0), x.len_of(-1), y.len_of(-1));
    let whole = |t: &Tensor, size: &[i64]| {
        t.device() == Device::Cpu && t.0.is_contiguous() && t.size() == size
    };
    let good = computed == Some(alpha.kind())
        && y.device() == Device::Cpu
        && y.kind() == kind
        && y.numel() as i64 == tokens * out
        && whole(x, &[tokens, width])
        && whole(alpha, &[tokens * of.k])
        && of.k > 0
        && [of.ups.len(), of.scales.len(), of.first.len().wrapping_sub(1)] == [of.downs.len(); 3]
        && of.first.first() == Some(&0)
        && of.first.last() == Some(&(of.slots.len() as i64))
        && of.first.is_sorted()
        && of.first.windows(2).all(|w| match w {
            [from, to] => of.slots.get(*from as usize..*to as usize).is_some_and(|s| s.is_sorted()),
            _ => false,
        })
        && of.slots.iter().all(|s| (0..tokens * of.k).contains(s));
    if !good {
        return Err(Error::invalid("low-rank modules", format!("do not fit {x:?} and {y:?}")));
    }
    for (a, b) in of.downs.iter().zip(&of.ups) {
        let rank = a.len_of(0);
        let kinds = [a, b].map(Tensor::kind);
        let known = kinds.iter().all(|k| *k == kind || Some(*k) == computed);
        if !known || !whole(a, &[rank, width]) || !whole(b, &[out, rank]) {
            let problem = format!("A {a:?} and B {b:?} do not fit {x:?} and {y:?}");
            return Err(Error::invalid("low-rank modules", problem));
        }
    }
    let factors: Vec<*mut c_void> = of.downs.iter().chain(&of.ups).map(at).collect();
    let mut result: *mut c_void = std::ptr::null_mut();
    // SAFETY: all are tensors that live until the call is over, of the shapes, kind and layout that
    // C++ counts on; it keeps its own references to what it needs, and writes `result` where it
    // says nothing. It writes y's memory only where nobody else has it, and y goes with this call.
    unsafe {
        said(
            "grouped_low_rank",
            modl_grouped_low_rank(
                at(&y),
                at(x),
                at(alpha),
                of.k,
                of.slots.as_ptr(),
                of.first.as_ptr(),
                of.downs.len(),
                factors.as_ptr(),
                of.scales.as_ptr(),
                &mut result,
            ),
        )?;
        Ok(Tensor(tch::Tensor::from_ptr(result.cast())))
    }
}

/// x wᵀ + bias by the products of `products.h`, or with `relu` max(0, that); nothing where they are not for
/// such tensors or this processor.
pub(crate) fn linear(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    relu: bool,
) -> Result<Option<Tensor>> {
    let mut result: *mut c_void = std::ptr::null_mut();
    let b = bias.map_or(std::ptr::null_mut(), at);
    // SAFETY: all are tensors that live until the call is over; C++ looks at their shapes, kinds and
    // layout itself, keeps its own references, and writes `result` where it says nothing.
    unsafe {
        said_of("linear", &[x, w], modl_linear(at(x), at(w), b, relu, &mut result))?;
        Ok((!result.is_null()).then(|| Tensor(tch::Tensor::from_ptr(result.cast()))))
    }
}

/// See [`Tensor::cross_entropy_of_rows`], which has looked at kind, place, layout and classes.
pub(crate) fn cross_entropy(x: &Tensor, classes: &[i64]) -> Result<Tensor> {
    let mut result: *mut c_void = std::ptr::null_mut();
    // SAFETY: x lives until the call is over, is as C++ counts on, and has a row for each of the classes; C++
    // keeps its own references, and writes `result` where it says nothing.
    unsafe {
        said_of("cross_entropy", &[x], modl_cross_entropy(at(x), classes.as_ptr(), &mut result))?;
        Ok(Tensor(tch::Tensor::from_ptr(result.cast())))
    }
}

/// See [`Tensor::norm_of_all`].
pub(crate) fn norm(tensors: &[&Tensor]) -> Result<f64> {
    // Libtorch refuses an empty list.
    if tensors.is_empty() {
        return Ok(0.0);
    }
    let all: Vec<*mut c_void> = tensors.iter().map(|t| at(t)).collect();
    let mut norm = 0.0;
    // SAFETY: the tensors live until the call is over, which reads them and writes `norm`.
    said_of("norm", tensors, unsafe { modl_norm(all.as_ptr(), all.len(), &mut norm) })?;
    Ok(norm)
}

/// See [`Tensor::scale`].
pub(crate) fn scale(t: &mut Tensor, c: f64) -> Result<()> {
    // SAFETY: the tensor lives until the call is over, and nobody else refers to this handle.
    said("scale", unsafe { modl_scale(at(t), c) })
}

/// See [`Tensor::add_scaled_in_place`].
pub(crate) fn add_scaled(a: &mut Tensor, b: &Tensor, c: f64) -> Result<()> {
    // SAFETY: both live until the call is over.
    said_of("add_scaled_in_place", &[a, b], unsafe { modl_add_scaled(at(a), at(b), c) })
}

/// See [`Tensor::adamw_in_place`], which has looked at shapes, kinds, places and strides.
pub(crate) fn adamw(
    theta: &mut Tensor,
    grad: &Tensor,
    mean: &mut Tensor,
    square: &mut Tensor,
    by: AdamWStep,
) -> Result<()> {
    let AdamWStep { step, lr, betas: (beta1, beta2), weight_decay, eps } = by;
    let step = step as f64;
    let (m, v) = (at(mean), at(square));
    // SAFETY: all live until the call is over, have as many numbers as θ, and m and v are contiguous; the
    // kernel goes through memory in a row, for which C++ makes θ and g contiguous.
    let told =
        unsafe { modl_adamw(at(theta), at(grad), m, v, step, lr, beta1, beta2, weight_decay, eps) };
    said_of("adamw", &[theta, grad], told)
}

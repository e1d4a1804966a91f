//! Factors 1 + Δ and shifts β of channels, for all rows the same or generated from each row's task
//! vector z: Δ = Δ₀ + Gz, β = β₀ + Hz. All parameters start at 0.

use modl_core::{Context, Error, Init, Result, Scope, SiteKind, Tensor, Tensors};

const DELTA: &str = "delta";
const SHIFT: &str = "shift";
const DELTA_HEAD: &str = "delta_head";
const SHIFT_HEAD: &str = "shift_head";

/// Δ and β at one site.
#[derive(Debug, Clone)]
pub(crate) struct Modulation {
    phi: Tensors,
    /// The dimension of the channels in what is modulated.
    channels: i64,
}

impl Modulation {
    /// For `width` channels of what a site of that kind gives; with heads for a task vector where
    /// that has columns, and with a shift where `shifts`.
    ///
    /// # Errors
    /// Where the number of columns, called `what` in errors, is negative.
    pub(crate) fn new(
        what: &str,
        width: i64,
        kind: SiteKind,
        task_vector: i64,
        shifts: bool,
        scope: &mut Scope,
    ) -> Result<Self> {
        if task_vector < 0 {
            return Err(Error::invalid(what, format!("is {task_vector}, wants 0 or more columns")));
        }
        let images = [SiteKind::Conv, SiteKind::BatchNorm, SiteKind::ConvBlock];
        let channels = if images.contains(&kind) { 1 } else { -1 };
        let mut phi = Tensors::new();
        let all = [(DELTA, DELTA_HEAD), (SHIFT, SHIFT_HEAD)];
        for (constant, head) in all.into_iter().take(if shifts { 2 } else { 1 }) {
            phi.set(constant, scope.param(constant, &[width], Init::Zeros)?);
            if task_vector > 0 {
                phi.set(head, scope.param(head, &[width, task_vector], Init::Zeros)?);
            }
        }
        Ok(Modulation { phi, channels })
    }

    /// Whether rows have Δ and β of their own.
    pub(crate) fn by_row(&self) -> bool {
        self.phi.get(DELTA_HEAD).is_some()
    }

    /// Δ, and β where there is one, in the shape to meet `like`.
    pub(crate) fn at(&self, like: &Tensor, cx: &Context) -> Result<(Tensor, Option<Tensor>)> {
        let delta = self.part(DELTA, DELTA_HEAD, like, cx)?;
        let shift = self.phi.get(SHIFT).map(|_| self.part(SHIFT, SHIFT_HEAD, like, cx));
        Ok((delta, shift.transpose()?))
    }

    fn part(&self, constant: &str, head: &str, like: &Tensor, cx: &Context) -> Result<Tensor> {
        let c = self.phi.need(constant)?.to_kind(like.kind())?;
        let mut shape = vec![1; like.dim()];
        let at = if self.channels < 0 { like.dim().saturating_sub(1) } else { 1 };
        if let Some(n) = shape.get_mut(at) {
            *n = c.len_of(0);
        }
        let Some(head) = self.phi.get(head) else { return c.reshape(&shape) };
        let z = cx.feature("task_vector")?.to_kind(like.kind())?;
        let rows = z.linear(&head.to_kind(like.kind())?, Some(&c))?;
        if let Some(n) = shape.first_mut() {
            *n = rows.len_of(0);
        }
        rows.reshape(&shape)
    }

    /// Δ and β, `[width]`, of all rows.
    pub(crate) fn constants(&self) -> Result<(&Tensor, Option<&Tensor>)> {
        Ok((self.phi.need(DELTA)?, self.phi.get(SHIFT)))
    }

    pub(crate) fn phi(&self) -> Tensors {
        self.phi.clone()
    }

    pub(crate) fn with_phi(&self, phi: &Tensors) -> Result<Self> {
        let phi = self.phi.map(|name, _| Ok(phi.need(name)?.clone()))?;
        Ok(Modulation { phi, channels: self.channels })
    }
}

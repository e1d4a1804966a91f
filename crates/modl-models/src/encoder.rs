//! What encoders share: hidden states under a mask, which modules may have made longer, through a
//! stack of layers in which every token sees every other.

use modl_core::{Error, HostFn, Result, ResultExt, Signal, Tensor, Tensors};

use crate::mask::additive;
use crate::place::{Pass, Place};

impl Place {
    /// The first hidden states `[batch, seq, hidden]` and the mask `[batch, seq]` from the modules
    /// that stand at a `tokens` site and from f. Errors are about `path`.
    pub(crate) fn masked_tokens(
        &self,
        path: &str,
        x: &Signal,
        pass: Pass,
        f: &HostFn,
    ) -> Result<(Tensor, Tensor)> {
        let y = self.run(x, pass, f)?;
        let mask = y.with.need("mask").at(path)?.clone();
        let (hidden, covered) = (y.x.size(), mask.size());
        if hidden.len() != 3 || hidden.get(..2) != Some(covered.as_slice()) {
            let problem = format!("modules made hidden states {hidden:?} with a mask {covered:?}");
            return Err(Error::invalid(path, problem));
        }
        Ok((y.x, mask))
    }

    /// A layer `inner` at a block site: x `[batch, seq, hidden]` under `mask` `[batch, seq]`, which
    /// is `hidden_keys` as it is added to scores.
    pub(crate) fn masked_block(
        &self,
        x: &Tensor,
        mask: &Tensor,
        hidden_keys: Option<&Tensor>,
        pass: Pass,
        inner: impl Fn(&Tensor, Option<&Tensor>, Pass) -> Result<Tensor>,
    ) -> Result<Tensor> {
        if !self.modular(pass) {
            return inner(x, hidden_keys, pass);
        }
        // Modules may send some of the rows only, so that the mask is read from the signal.
        let host: &HostFn = &|_, s, cx| {
            let hidden_keys = additive(s.with.need("mask")?)?;
            Ok(s.replace(inner(&s.x, hidden_keys.as_ref(), pass.of(cx))?))
        };
        let with = Tensors::new().with("mask", mask.clone());
        Ok(self.run(&Signal { x: x.clone(), with }, pass, host)?.x)
    }
}

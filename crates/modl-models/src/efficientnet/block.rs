//! The inverted bottleneck of MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381): wider, one
//! filter for each channel, narrower, and x added where its shape is kept.

use modl_core::{HostFn, Result, ResultExt, Signal, SiteKind, Tensor};

use super::config::Stage;
use crate::place::{Pass, Place, Surveyor};

/// A convolution without a bias and the normalisation behind it.
#[derive(Debug)]
pub(super) struct ConvNorm {
    conv: Place,
    norm: Place,
    stride: i64,
    groups: i64,
    eps: f64,
}

impl ConvNorm {
    /// `names` are those of the two sites, and `widths` the numbers of channels.
    pub(super) fn new(
        to: &mut Surveyor,
        names: [&str; 2],
        widths: [i64; 2],
        stride: i64,
        groups: i64,
        eps: f64,
    ) -> Self {
        let [conv, norm] = names;
        let [input, output] = widths;
        let conv = to.place(conv, SiteKind::Conv, input, output);
        let norm = to.place(norm, SiteKind::BatchNorm, output, output);
        ConvNorm { conv, norm, stride, groups, eps }
    }

    pub(super) fn forward(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        let x = self.conv.same_conv(x, self.stride, self.groups, pass)?;
        self.norm.batch_norm(&x, self.eps, pass)
    }

    /// With ReLU6 behind.
    pub(super) fn active(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        self.forward(x, pass)?.clamp(0.0, 6.0)
    }
}

/// A block.
#[derive(Debug)]
pub(super) struct Block {
    whole: Place,
    expand: Option<ConvNorm>,
    depthwise: ConvNorm,
    project: ConvNorm,
    keeps: bool,
}

impl Block {
    pub(super) fn new(
        to: &mut Surveyor,
        path: &str,
        (input, stride, stage): (i64, i64, Stage),
        eps: f64,
    ) -> Self {
        let (inner, output) = (input * stage.expand, stage.output);
        let whole = to.place(path, SiteKind::ConvBlock, input, output);
        let mut part = |conv: &str, norm: &str, widths: [i64; 2], stride: i64, groups: i64| {
            let names = [format!("{path}.{conv}"), format!("{path}.{norm}")];
            ConvNorm::new(to, [&names[0], &names[1]], widths, stride, groups, eps)
        };
        let expand = (stage.expand > 1).then(|| part("_expand_conv", "_bn0", [input, inner], 1, 1));
        let depthwise = part("_depthwise_conv", "_bn1", [inner, inner], stride, inner);
        let project = part("_project_conv", "_bn2", [inner, output], 1, 1);
        Block { whole, expand, depthwise, project, keeps: stride == 1 && input == output }
    }

    pub(super) fn forward(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        if !self.whole.modular(pass) {
            return self.compute(x, pass).at(&self.whole.site.path);
        }
        let host: &HostFn = &|_, s, cx| Ok(s.replace(self.compute(&s.x, pass.of(cx))?));
        Ok(self.whole.run(&Signal::from(x.clone()), pass, host)?.x)
    }

    fn compute(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        let wide = self.expand.as_ref().map(|part| part.active(x, pass)).transpose()?;
        let y = self.depthwise.active(wide.as_ref().unwrap_or(x), pass)?;
        let y = self.project.forward(&y, pass)?;
        if self.keeps { y.add(x) } else { Ok(y) }
    }
}

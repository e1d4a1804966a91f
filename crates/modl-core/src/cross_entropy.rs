//! The cross entropy of rows, −ln softmax(x)ᵧ = ln Σ꜀ exp x꜀ − xᵧ.
//!
//! Libtorch takes an operation for each step of it, which for few classes is felt: a twelfth of what a step
//! takes in which a small network learns. Up to [`FEW`] classes it is one pass each way here, with the
//! sum in f64.

use crate::{Device, Error, Kind, Result, Tensor, ffi};

/// From more classes on libtorch's vectors are worth their calls.
const FEW: i64 = 64;

impl Tensor {
    /// −ln of the softmax probability of each row's class: self are logits `[n, classes]`, target `[n]` whole
    /// numbers of any kind → `[n]`.
    ///
    /// # Errors
    /// Where a target is no class, or the shapes do not fit.
    pub fn cross_entropy_of_rows(&self, target: &Tensor) -> Result<Tensor> {
        let size = self.size();
        let fast = matches!(size[..], [n, classes] if n > 0 && (1..=FEW).contains(&classes))
            && self.kind() == Kind::Float
            && self.device() == Device::Cpu
            && self.0.is_contiguous()
            && target.size() == size[..1];
        if !fast {
            return self.log_softmax(-1)?.nll(&target.to_kind(Kind::Int64)?);
        }
        let classes = match target.kind() {
            Kind::Float => target.to_vec::<f32>()?.into_iter().map(|c| c as i64).collect(),
            _ => target.to_kind(Kind::Int64)?.to_vec::<i64>()?,
        };
        let width = self.len_of(-1);
        if let Some(none) = classes.iter().find(|c| !(0..width).contains(*c)) {
            return Err(Error::invalid("target", format!("{none} is none of {width} classes")));
        }
        ffi::cross_entropy(self, &classes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Init, Seed};

    fn random(shape: &[i64], name: &str, kind: Kind) -> Tensor {
        let drawn = Init::Normal(3.0).tensor(shape, Seed(2).child(name), Kind::Double, Device::Cpu);
        drawn.unwrap().to_kind(kind).unwrap()
    }

    fn gradient(loss: &Tensor, of: &Tensor, again: bool) -> Tensor {
        loss.gradients(&[of], again).unwrap().remove(0).unwrap()
    }

    /// Against libtorch's operations in f64, with the gradient and the gradient of that.
    #[test]
    fn it_is_that_of_f64() {
        let (n, width) = (7, 10);
        let targets: Vec<f32> = (0..n).map(|i| (i * 3 % width) as f32).collect();
        let targets = Tensor::from_slice(&targets, &[n], Device::Cpu).unwrap();
        let run = |kind: Kind| {
            let x = random(&[n, width], "x", kind);
            x.set_requires_grad(true).unwrap();
            let losses = x.cross_entropy_of_rows(&targets).unwrap();
            let g = random(&[n], "g", kind);
            let loss = losses.mul(&g).unwrap().sum().unwrap();
            let plain = gradient(&loss, &x, false);
            let losses = x.cross_entropy_of_rows(&targets).unwrap();
            let first = gradient(&losses.mul(&g).unwrap().sum().unwrap(), &x, true);
            let along = first.mul(&random(&[n, width], "h", kind)).unwrap().sum().unwrap();
            [losses.detach().unwrap(), plain, first.detach().unwrap(), gradient(&along, &x, false)]
        };
        let exact = run(Kind::Double);
        for (found, exact) in run(Kind::Float).iter().zip(&exact) {
            assert!(found.all_close(exact, 1e-5, 1e-5).unwrap(), "{found:?}");
        }
        assert!(exact[3].abs().unwrap().sum().unwrap().item().unwrap() > 1e-3);
    }

    #[test]
    fn large_and_broken_logits_are_what_they_are() {
        let x =
            Tensor::from_slice(&[1e30f32, 0.0, f32::NAN, 0.0, 88.0, -88.0], &[3, 2], Device::Cpu);
        let target = Tensor::from_slice(&[0i64, 1, 1], &[3], Device::Cpu).unwrap();
        let x = x.unwrap();
        let losses = x.cross_entropy_of_rows(&target).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(losses[0], 0.0);
        assert!(losses[1].is_nan());
        assert_eq!(losses[2], 176.0);
        let none = Tensor::from_slice(&[0i64, 2, 1], &[3], Device::Cpu).unwrap();
        assert!(x.cross_entropy_of_rows(&none).unwrap_err().to_string().contains("2 is none of 2"));
    }
}

//! Clipping by the global norm (Pascanu et al. 2013, arXiv 1211.5063): g ← g · min(1, c ⁄ ‖g‖).

use modl_core::{Result, Tensor, no_grad};

/// Scales all gradients by one factor so that their common norm is at most `max`, and gives back
/// the norm before. Without `max`, or without any gradient, nothing is scaled.
///
/// A gradient that somebody else has, too, is replaced, and not changed for them.
pub fn clip_grad_norm(grads: &mut [Option<Tensor>], max: Option<f64>) -> Result<f64> {
    no_grad(|| {
        let all: Vec<&Tensor> = grads.iter().flatten().collect();
        let norm = Tensor::norm_of_all(&all)?;
        if let Some(max) = max
            && norm > max
            && norm.is_finite()
        {
            grads.iter_mut().flatten().try_for_each(|grad| grad.scale(max / norm))?;
        }
        Ok(norm)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use modl_core::Device;

    fn t(v: &[f32]) -> Option<Tensor> {
        Some(Tensor::from_slice(v, &[v.len() as i64], Device::Cpu).unwrap())
    }

    #[test]
    fn the_common_norm_is_clipped_and_the_direction_kept() {
        let mut grads = vec![t(&[3.0, 0.0]), None, t(&[4.0])];
        assert_eq!(clip_grad_norm(&mut grads, Some(10.0)).unwrap(), 5.0);
        assert_eq!(grads[0].as_ref().unwrap().to_vec::<f64>().unwrap(), [3.0, 0.0]);
        assert_eq!(clip_grad_norm(&mut grads, Some(1.0)).unwrap(), 5.0);
        let now = clip_grad_norm(&mut grads, None).unwrap();
        assert!((now - 1.0).abs() < 1e-6 && grads[1].is_none());
    }

    #[test]
    fn gradients_that_share_storage_are_scaled_once() {
        let g = t(&[3.0, 4.0]);
        let mut grads = vec![g.clone(), g];
        clip_grad_norm(&mut grads, Some(1.0)).unwrap();
        assert!((clip_grad_norm(&mut grads, None).unwrap() - 1.0).abs() < 1e-6);
    }

    #[test]
    fn none_at_all_is_no_norm() {
        assert_eq!(clip_grad_norm(&mut [], Some(1.0)).unwrap(), 0.0);
        assert_eq!(clip_grad_norm(&mut [None], Some(1.0)).unwrap(), 0.0);
    }
}

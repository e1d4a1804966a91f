//! From the bytes of images to `pixel_values`: (scale · byte − mean) ⁄ std for each channel, as
//! `preprocessor_config.json` says it.

use std::path::Path;

use modl_core::{Device, Error, Result, Tensor};
use serde::Deserialize;

use crate::folder::read_json;

const FILE: &str = "preprocessor_config.json";

/// How bytes become `pixel_values`, with the defaults of transformers' `ViTImageProcessor`.
///
/// Images are not resized: they have to come in the size that the backbone sees.
///
/// ```
/// # use modl_core::Device;
/// # use modl_models::Pixels;
/// let white = [255u8; 3 * 224 * 224];
/// let values = Pixels::default().values(&[&white], [224, 224], Device::Cpu)?; // [1, 3, 224, 224]
/// # let _ = values;
/// # Ok::<(), modl_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Pixels {
    /// Whether bytes are multiplied by `rescale_factor`.
    pub do_rescale: bool,
    /// What a byte is multiplied by; 1 ⁄ 255.
    pub rescale_factor: f64,
    /// Whether mean and standard deviation are taken out.
    pub do_normalize: bool,
    /// The mean of each of red, green and blue; ½.
    pub image_mean: [f64; 3],
    /// The standard deviation of each; ½.
    pub image_std: [f64; 3],
}

impl Default for Pixels {
    fn default() -> Self {
        Pixels {
            do_rescale: true,
            rescale_factor: 1.0 / 255.0,
            do_normalize: true,
            image_mean: [0.5; 3],
            image_std: [0.5; 3],
        }
    }
}

impl Pixels {
    /// Reads `preprocessor_config.json` of a model's folder; the defaults where there is none.
    ///
    /// # Errors
    /// Where the file is broken, or a standard deviation is not positive.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let path = dir.as_ref().join(FILE);
        if !path.exists() {
            return Ok(Self::default());
        }
        let all = read_json(&path)?;
        let all: Self = Self::deserialize(&all).map_err(|e| Error::file(&path, e.to_string()))?;
        if !all.image_std.iter().all(|s| s.is_finite() && *s > 0.0) {
            let problem = format!("`image_std` is {:?}, wants positive numbers", all.image_std);
            return Err(Error::file(&path, problem));
        }
        Ok(all)
    }

    /// `pixel_values` `[batch, 3, height, width]` in f32 of images whose bytes are red, green and
    /// blue of one pixel after the other, row by row.
    ///
    /// # Errors
    /// Where an image has not 3 · height · width bytes.
    pub fn values(
        &self,
        images: &[&[u8]],
        [height, width]: [usize; 2],
        device: Device,
    ) -> Result<Tensor> {
        let wanted = height.checked_mul(width).and_then(|n| n.checked_mul(3));
        let scale = if self.do_rescale { self.rescale_factor } else { 1.0 };
        let (mean, std) = match self.do_normalize {
            true => (self.image_mean, self.image_std),
            false => ([0.0; 3], [1.0; 3]),
        };
        let mut values = Vec::with_capacity(images.iter().map(|i| i.len()).sum());
        for (n, bytes) in images.iter().enumerate() {
            if wanted != Some(bytes.len()) {
                let problem = format!(
                    "has {} bytes, not 3 for each of {height} × {width} pixels",
                    bytes.len()
                );
                return Err(Error::invalid(format!("image {n}"), problem));
            }
            for (channel, (mean, std)) in mean.iter().zip(std).enumerate() {
                let own = bytes.iter().skip(channel).step_by(3);
                values.extend(own.map(|b| ((f64::from(*b) * scale - mean) / std) as f32));
            }
        }
        let shape = [images.len() as i64, 3, height as i64, width as i64];
        Tensor::from_slice(&values, &shape, device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_stand_one_after_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let said = r#"{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 2], "size": 224}"#;
        std::fs::write(dir.path().join(FILE), said).unwrap();
        let pixels = Pixels::open(dir.path()).unwrap();
        // Two pixels below each other, of two images.
        let (one, two) = ([0, 51, 102, 153, 204, 255], [255, 0, 0, 0, 0, 0]);
        let values = pixels.values(&[&one, &two], [2, 1], Device::Cpu).unwrap();
        assert_eq!(values.size(), [2, 3, 2, 1]);
        let wanted = [-0.2, 1.0, 0.0, 2.4, 0.05, 0.35, 1.8, -0.2, -0.8, -0.8, -0.15, -0.15];
        for (found, wanted) in values.to_vec::<f64>().unwrap().iter().zip(wanted) {
            assert!((found - wanted).abs() < 1e-6, "{found}, not {wanted}");
        }
        let raw = Pixels { do_rescale: false, do_normalize: false, ..pixels };
        let values = raw.values(&[&one], [1, 2], Device::Cpu).unwrap();
        assert_eq!(values.to_vec::<f64>().unwrap(), [0.0, 153.0, 51.0, 204.0, 102.0, 255.0]);
    }

    #[test]
    fn images_of_another_size_and_broken_files_are_refused() {
        let e = Pixels::default().values(&[&[1, 2, 3], &[1, 2]], [1, 1], Device::Cpu).unwrap_err();
        assert!(e.to_string().contains("image 1: has 2 bytes"), "{e}");
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Pixels::open(dir.path()).unwrap(), Pixels::default());
        for said in [r#"{"image_std": [1, 0, 1]}"#, r#"{"image_mean": [1]}"#, "{"] {
            std::fs::write(dir.path().join(FILE), said).unwrap();
            let e = Pixels::open(dir.path()).unwrap_err().to_string();
            assert!(e.contains(FILE), "{e}");
        }
    }
}

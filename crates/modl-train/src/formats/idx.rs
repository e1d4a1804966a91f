//! IDX, the files of MNIST: two bytes 0, one for the type, one for the number of dimensions, the
//! dimensions as 32 bits each, the highest first, then the numbers.
//!
//! Images are bytes `[images, height, width]`, their labels bytes `[images]`. Files are called
//! `…images-idx3-ubyte` and `…labels-idx1-ubyte`, with `.gz` where they are packed.

use std::path::{Path, PathBuf};

use modl_core::{Error, Kind, Result, Tensor};

use super::{Line, Table, bytes};

/// The input that a network reads images from.
const INPUT: &str = "pixel_values";
const IMAGES: &str = "images-idx3-ubyte";
const LABELS: &str = "labels-idx1-ubyte";
const BYTES: u8 = 8;

pub(super) fn read(path: &Path) -> Result<Table> {
    let (images, labels) = files(path, "train")?;
    let (shape, values) = open(&images, 2)?;
    let labels = read_labels(&labels)?;
    let n = shape.first().copied().unwrap_or(0);
    if labels.len() as i64 != n {
        let problem = format!("has {n} images, but there are {} labels", labels.len());
        return Err(Error::file(&images, problem));
    }
    let rows = Tensor::from_bytes(&values, &shape, Kind::Uint8)?;
    let line = |(i, label): (usize, u8)| Line {
        number: i + 1,
        id: i.to_string(),
        label: label.to_string(),
        text: String::new(),
    };
    Ok(Table {
        path: images,
        form: "the number is that of the image".into(),
        lines: labels.into_iter().enumerate().map(line).collect(),
        numbers: Some((INPUT, rows)),
    })
}

pub(super) fn labels(path: &Path) -> Result<Vec<String>> {
    let labels = read_labels(&files(path, "train")?.1)?;
    Ok(labels.into_iter().map(|label| label.to_string()).collect())
}

/// The images that a folder has for a test, where it has some.
pub(crate) fn held_out_images(path: &Path) -> Option<PathBuf> {
    path.is_dir().then(|| there(path, "t10k", IMAGES)).flatten()
}

/// The file of images and that of their labels.
fn files(path: &Path, part: &str) -> Result<(PathBuf, PathBuf)> {
    if path.is_dir() {
        let need = |kind: &str| {
            let missing = || Error::file(path, format!("has no {part}-{kind}, also not as .gz"));
            there(path, part, kind).ok_or_else(missing)
        };
        return Ok((need(IMAGES)?, need(LABELS)?));
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if !name.contains(IMAGES) {
        let problem = format!("is neither a folder nor a file called …{IMAGES}");
        return Err(Error::file(path, problem));
    }
    // Packed or not, whatever the images are.
    let labels = name.replace(IMAGES, LABELS);
    let plain = labels.trim_end_matches(".gz");
    let names = [labels.as_str(), plain, &format!("{plain}.gz")].map(|n| path.with_file_name(n));
    let labels = names.iter().find(|file| file.is_file()).or(names.first());
    Ok((path.to_owned(), labels.cloned().unwrap_or_default()))
}

fn there(folder: &Path, part: &str, kind: &str) -> Option<PathBuf> {
    let names = [format!("{part}-{kind}"), format!("{part}-{kind}.gz")];
    names.into_iter().map(|name| folder.join(name)).find(|file| file.is_file())
}

fn read_labels(path: &Path) -> Result<Vec<u8>> {
    let (shape, values) = open(path, 1)?;
    match shape.as_slice() {
        [_] => Ok(values),
        _ => Err(Error::file(path, format!("has labels of shape {shape:?}, not one for an image"))),
    }
}

/// The shape and the bytes of a file with `dims` dimensions at least.
fn open(path: &Path, dims: usize) -> Result<(Vec<i64>, Vec<u8>)> {
    let wrong = |problem: String| Error::file(path, problem);
    let mut all = bytes(path)?;
    let &[0, 0, kind, count, ..] = all.as_slice() else {
        return Err(wrong("does not begin as an IDX file".into()));
    };
    if kind != BYTES {
        return Err(wrong(format!("has numbers of the type {kind}; {BYTES}, bytes, is read")));
    }
    let start = 4 + 4 * usize::from(count);
    let sizes = all.get(4..start).ok_or_else(|| wrong("ends within its header".into()))?;
    let shape: Vec<i64> = sizes
        .chunks_exact(4)
        .map(|size| size.iter().fold(0, |n, byte| n << 8 | i64::from(*byte)))
        .collect();
    if shape.len() < dims {
        return Err(wrong(format!("has the shape {shape:?}; {dims} dimensions are wanted")));
    }
    let wanted = shape.iter().try_fold(1i64, |n, size| n.checked_mul(*size));
    let values = all.split_off(start);
    if wanted != Some(values.len() as i64) || values.is_empty() {
        return Err(wrong(format!("has {} bytes for the shape {shape:?}", values.len())));
    }
    Ok((shape, values))
}

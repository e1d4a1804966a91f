//! IDX, the files of MNIST: two bytes 0, one for the type, one for the number of dimensions, the
//! dimensions as 32 bits each, the highest first, then the numbers.
//!
//! Images are bytes `[images, height, width]`, their labels bytes `[images]`. Files are called
//! `…images-idx3-ubyte` and `…labels-idx1-ubyte`, with `.gz` where they are packed.

use std::path::{Path, PathBuf};

use modl_core::{Error, Result};

use super::packed::Unpacked;
use super::{Dense, Form, Line, Take};
use crate::stored_rows::Numbers;

/// The input that a network reads images from.
const INPUT: &str = "pixel_values";
const IMAGES: &str = "images-idx3-ubyte";
const LABELS: &str = "labels-idx1-ubyte";
const BYTES: u8 = 8;

pub(super) fn read(path: &Path, take: &mut Take) -> Result<()> {
    let (images, labels) = files(path, "train")?;
    let Opened { mut file, shape } = open(&images, 2)?;
    let labels = read_labels(&labels)?;
    let n = shape.first().copied().unwrap_or(0);
    let row = shape.get(1..).unwrap_or_default();
    let width = row.iter().try_fold(1i64, |n, size| n.checked_mul(*size)).unwrap_or(i64::MAX);
    if labels.len() as i64 != n {
        let found = file.rest()?;
        if width.checked_mul(n) != Some(found as i64) {
            return Err(other_size(&images, found, &shape));
        }
        let problem = format!("has {n} images, but there are {} labels", labels.len());
        return Err(Error::file(&images, problem));
    }
    let form = Form::new(&images, "the number is that of the image");
    let (mut values, mut found) = (Vec::new(), 0);
    for (i, label) in labels.iter().enumerate() {
        file.next(width as u64, &mut values)?;
        found += values.len() as u64;
        if values.len() as i64 != width || width == 0 {
            return Err(other_size(&images, found + file.rest()?, &shape));
        }
        let (id, label) = (i.to_string(), label.to_string());
        let line = Line { number: i + 1, id, label, text: String::new() };
        let numbers = Numbers::Bytes(&values);
        take(&form, line, Some(Dense { input: INPUT, shape: row, numbers }))?;
    }
    match file.rest()? {
        0 => Ok(()),
        more => Err(other_size(&images, found + more, &shape)),
    }
}

/// The label of each image.
pub(super) fn labels(path: &Path) -> Result<Vec<u8>> {
    read_labels(&files(path, "train")?.1)
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
    let Opened { mut file, shape } = open(path, 1)?;
    let &[n] = shape.as_slice() else {
        let problem = format!("has labels of shape {shape:?}, not one for an image");
        return Err(Error::file(path, problem));
    };
    let mut values = Vec::new();
    file.next(u64::MAX, &mut values)?;
    match values.len() as i64 == n && n > 0 {
        true => Ok(values),
        false => Err(other_size(path, values.len() as u64, &shape)),
    }
}

fn other_size(path: &Path, bytes: u64, shape: &[i64]) -> Error {
    Error::file(path, format!("has {bytes} bytes for the shape {shape:?}"))
}

/// A file behind its header.
struct Opened {
    file: Unpacked,
    shape: Vec<i64>,
}

/// Opens a file with `dims` dimensions at least.
fn open(path: &Path, dims: usize) -> Result<Opened> {
    let wrong = |problem: String| Error::file(path, problem);
    let (mut file, mut header) = (Unpacked::open(path)?, Vec::new());
    file.next(4, &mut header)?;
    let &[0, 0, kind, count] = header.as_slice() else {
        return Err(wrong("does not begin as an IDX file".into()));
    };
    if kind != BYTES {
        return Err(wrong(format!("has numbers of the type {kind}; {BYTES}, bytes, is read")));
    }
    file.next(4 * u64::from(count), &mut header)?;
    if header.len() != 4 * usize::from(count) {
        return Err(wrong("ends within its header".into()));
    }
    let shape: Vec<i64> = header
        .chunks_exact(4)
        .map(|size| size.iter().fold(0, |n, byte| n << 8 | i64::from(*byte)))
        .collect();
    if shape.len() < dims {
        return Err(wrong(format!("has the shape {shape:?}; {dims} dimensions are wanted")));
    }
    Ok(Opened { file, shape })
}

//! Drawn digits: 16 × 16 numbers, a font of 5 × 7 at twice its size, moved and with noise; and eight
//! ways to look at them, each a task.

use anyhow::Result;
use modl_core::{Device, Seed, Tensor};

use super::fit::{below, noise};

pub(super) const SIDE: usize = 16;
pub(super) const CLASSES: i64 = 10;
/// How many ways to look at a digit there are.
pub(super) const VIEWS: usize = 8;

/// The rows of each digit, five bits each.
const FONT: [[u8; 7]; 10] = [
    [0x0e, 0x11, 0x13, 0x15, 0x19, 0x11, 0x0e],
    [0x04, 0x0c, 0x04, 0x04, 0x04, 0x04, 0x0e],
    [0x0e, 0x11, 0x01, 0x02, 0x04, 0x08, 0x1f],
    [0x1f, 0x02, 0x04, 0x02, 0x01, 0x11, 0x0e],
    [0x02, 0x06, 0x0a, 0x12, 0x1f, 0x02, 0x02],
    [0x1f, 0x10, 0x1e, 0x01, 0x01, 0x11, 0x0e],
    [0x06, 0x08, 0x10, 0x1e, 0x11, 0x11, 0x0e],
    [0x1f, 0x01, 0x02, 0x04, 0x08, 0x08, 0x08],
    [0x0e, 0x11, 0x11, 0x0e, 0x11, 0x11, 0x0e],
    [0x0e, 0x11, 0x11, 0x0f, 0x01, 0x02, 0x0c],
];

/// How hard digits are to read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hand {
    /// By how many numbers a digit is moved at most, to each side.
    pub(super) shift: usize,
    /// The standard deviation of what is added to each number.
    pub(super) noise: f64,
}

/// `n` digits as `view` shows them, `[n, 256]`, and which they are, `[n]`.
pub(super) fn glyphs(n: usize, view: usize, hand: Hand, seed: Seed) -> Result<(Tensor, Tensor)> {
    let classes = below(CLASSES as usize, n, seed.child("class"))?;
    let across = below(2 * hand.shift + 1, n, seed.child("across"))?;
    // There is room for one row above and below.
    let room = hand.shift.min(1);
    let down = below(2 * room + 1, n, seed.child("down"))?;
    let places = places(view);
    let mut pixels = vec![0f32; n * SIDE * SIDE];
    let images = pixels.chunks_mut(SIDE * SIDE);
    for (((image, class), dx), dy) in images.zip(&classes).zip(&across).zip(&down) {
        let (left, top) = (3 + dx - hand.shift, 1 + dy - room);
        for (row, bits) in FONT.get(*class).into_iter().flatten().enumerate() {
            for column in (0..5).filter(|c| bits >> (4 - c) & 1 == 1) {
                for (y, x) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    let at = (top + 2 * row + y) * SIDE + left + 2 * column + x;
                    if let Some(pixel) = places.get(at).and_then(|p| image.get_mut(*p)) {
                        *pixel = 1.0;
                    }
                }
            }
        }
    }
    let shape = [n as i64, (SIDE * SIDE) as i64];
    let clean = Tensor::from_slice(&pixels, &shape, Device::Cpu)?;
    let clean = if view == INVERTED { clean.neg()?.add_scalar(1.0)? } else { clean };
    let classes: Vec<i64> = classes.iter().map(|c| *c as i64).collect();
    let classes = Tensor::from_slice(&classes, &[n as i64], Device::Cpu)?;
    Ok((clean.add(&noise(hand.noise, &shape, seed.child("noise"))?)?, classes))
}

const INVERTED: usize = 6;

/// Where each place of a digit goes: as it is, turned by 90, 180 and 270 degrees, mirrored,
/// transposed, inverted (where they stay), and exchanged by lot.
fn places(view: usize) -> Vec<usize> {
    let last = SIDE - 1;
    let mut all: Vec<usize> = (0..SIDE * SIDE).collect();
    if view == 7 {
        // The same lot for all seeds: it is the task.
        all.sort_by_key(|p| Seed(7).nth(*p as u64).0);
        return all;
    }
    let to = |p: usize| {
        let (y, x) = (p / SIDE, p % SIDE);
        let (y, x) = match view {
            1 => (x, last - y),
            2 => (last - y, last - x),
            3 => (last - x, y),
            4 => (y, last - x),
            5 => (x, y),
            _ => (y, x),
        };
        y * SIDE + x
    };
    all.into_iter().map(to).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_show_the_same_digit_and_each_place_once() {
        let clean = Hand { shift: 0, noise: 0.0 };
        let image =
            |view| -> Vec<f32> { glyphs(20, view, clean, Seed(1)).unwrap().0.to_vec().unwrap() };
        let plain = image(0);
        for view in 0..VIEWS {
            let mut sorted = places(view);
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..SIDE * SIDE), "{view}");
            let ink = |x: &[f32]| x.iter().sum::<f32>();
            for (a, b) in plain.chunks(256).zip(image(view).chunks(256)) {
                let b = if view == INVERTED { 256.0 - ink(b) } else { ink(b) };
                assert_eq!(ink(a), b, "{view}");
            }
        }
        // A quarter turn four times over, of the place of a corner.
        let turn = places(1);
        assert_eq!([0, 15, 255, 240].map(|p| turn[p]), [15, 255, 240, 0]);
        let moved = Hand { shift: 2, noise: 0.0 };
        let (x, y) = glyphs(50, 0, moved, Seed(2)).unwrap();
        assert_eq!((x.size(), y.size()), (vec![50, 256], vec![50]));
        let ink: Vec<f32> = x.sum_dims(&[1], false).unwrap().to_vec().unwrap();
        let digits: Vec<i64> = y.to_vec().unwrap();
        for (ink, digit) in ink.iter().zip(digits) {
            let bits: u32 = FONT[digit as usize].iter().map(|r| r.count_ones()).sum();
            assert_eq!(*ink, 4.0 * bits as f32, "no part of a digit falls off");
        }
    }
}

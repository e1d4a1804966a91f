//! The permutations of libtorch's CPU generator, `torch.randperm(n, generator=…)`, without it.
//!
//! Methods whose positions or projections are drawn once and not saved depend on it: PEFT's
//! FourierFT files hold a seed. The generator is the Mersenne Twister MT19937 (Matsumoto and
//! Nishimura 1998); the permutation is drawn by Fisher and Yates' swaps from the front, so that the
//! first entries need the first swaps only.

use modl_core::{Error, Result};

/// The first `count` entries of the permutation of 0, …, n − 1.
///
/// # Errors
/// Where n is so large that libtorch draws it otherwise, or `count` is larger than n.
pub(super) fn permutation(n: i64, count: i64, seed: u64) -> Result<Vec<i64>> {
    let size = u32::try_from(n).ok().filter(|n| *n < u32::MAX / 20);
    let (Some(size), true) = (size, (0..=n).contains(&count)) else {
        return Err(Error::invalid(
            "permutation",
            format!("{count} of {n} numbers: wants at most as many as there are, below 2³² ⁄ 20"),
        ));
    };
    let mut twister = Twister::new(seed as u32);
    let mut all: Vec<u32> = (0..size).collect();
    for (i, left) in (0..count as usize).zip((1..=size).rev()) {
        all.swap(i, i + (twister.draw() % left) as usize);
    }
    all.truncate(count as usize);
    Ok(all.into_iter().map(i64::from).collect())
}

const WORDS: usize = 624;

/// MT19937.
struct Twister {
    state: [u32; WORDS],
    next: usize,
}

impl Twister {
    fn new(seed: u32) -> Self {
        let (mut state, mut last) = ([0; WORDS], seed);
        for (i, word) in state.iter_mut().enumerate() {
            if i > 0 {
                last = (last ^ (last >> 30)).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
            }
            *word = last;
        }
        Twister { state, next: WORDS }
    }

    fn draw(&mut self) -> u32 {
        if self.next == WORDS {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9D2C_5680;
        y ^= (y << 15) & 0xEFC6_0000;
        y ^ (y >> 18)
    }

    fn twist(&mut self) {
        for i in 0..WORDS {
            let high = self.state[i] & 0x8000_0000;
            let y = high | (self.state[(i + 1) % WORDS] & 0x7FFF_FFFF);
            let odd = if y & 1 == 1 { 0x9908_B0DF } else { 0 };
            self.state[i] = self.state[(i + 397) % WORDS] ^ (y >> 1) ^ odd;
        }
        self.next = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_what_pytorch_draws() {
        // torch.randperm(n, generator=torch.Generator().manual_seed(777)) of PyTorch 2.13.
        let of = |n, count| permutation(n, count, 777).unwrap();
        assert_eq!(of(10, 10), [5, 9, 0, 3, 1, 7, 4, 8, 6, 2]);
        assert_eq!(of(1024, 10), [103, 249, 319, 701, 999, 360, 217, 998, 735, 263]);
        assert_eq!(of(5000, 10), [735, 967, 1425, 259, 2703, 1807, 3079, 1824, 4999, 3273]);
    }

    #[test]
    fn it_is_a_permutation_also_beyond_one_block_of_the_twister() {
        let mut all = permutation(2000, 2000, 1 << 40).unwrap();
        assert_ne!(all, permutation(2000, 2000, 5).unwrap());
        all.sort_unstable();
        assert_eq!(all, (0..2000).collect::<Vec<i64>>());
        assert!(permutation(3, 4, 1).is_err() && permutation(1 << 30, 1, 1).is_err());
    }
}

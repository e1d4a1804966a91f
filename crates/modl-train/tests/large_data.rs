//! Data sets of hundreds of megabytes do not stand in memory.
//!
//! ```text
//! cargo test -p modl-train --test large_data -- --ignored --nocapture --exact large_texts
//! ```
//!
//! says how much memory the process has needed at most, and how long reading and batches took; one test at
//! a time, since the peak is that of the process.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use std::io::{BufWriter, Write};
use std::time::Instant;

use modl_core::{Device, Result, Seed};
use modl_train::{Batches, Cursor, Recipe};
use toy::methods;

/// Megabytes that the process has had at most.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

/// A token for each word.
fn words(text: &str) -> Result<Vec<i64>> {
    let word = |w: &str| w.bytes().fold(7, |n, b| (n * 31 + i64::from(b)) % 30_000);
    Ok(text.split(' ').map(word).collect())
}

/// Writes `rows` lines, reads them by a recipe, and makes 2,000 batches of 32: the megabytes that it took
/// beside what the process had before, and beside the file's own.
fn measure(format: &str, rows: usize, header: &str, line: impl Fn(usize) -> String) -> (u64, u64) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("rows");
    let mut file = BufWriter::new(std::fs::File::create(&path).unwrap());
    file.write_all(header.as_bytes()).unwrap();
    for i in 0..rows {
        file.write_all(line(i).as_bytes()).unwrap();
    }
    file.flush().unwrap();
    let size = std::fs::metadata(&path).unwrap().len() / (1 << 20);
    let text = format!(
        "[backbone]\npath = \"toy\"\n[data]\nformat = \"{format}\"\ntasks = {{ t = \"rows\" }}\n\
         test = 0.1\n[head]\ntype = \"regression\"\n[[phases]]\nname = \"fit\"\nstrategy = \"joint\"\n"
    );
    let recipe = Recipe::parse(&text, dir.path().join("recipe.toml"), &methods()).unwrap();
    drop(modl_core::Tensor::from_slice(&[1.0f32], &[1], Device::Cpu).unwrap());
    let (before, clock) = (peak(), Instant::now());
    let (train, test) = recipe.load_data(&words, 0).unwrap();
    let read = clock.elapsed().as_secs_f64();
    assert_eq!(train.len() + test.len(), rows);
    let clock = Instant::now();
    let mut batches = Batches::new(&train, 32, Seed(1), Device::Cpu, Cursor::default()).unwrap();
    for _ in 0..2000 {
        batches.advance().unwrap();
    }
    let each = clock.elapsed().as_secs_f64() / 2000.0;
    let clock = Instant::now();
    let print = train.fingerprint().unwrap();
    let took = peak() - before;
    println!(
        "{format}: {rows} rows, {size} MB: {took} MB more at most, read in {read:.1} s, a batch in \
         {:.0} µs, fingerprint {print} in {:.1} s",
        each * 1e6,
        clock.elapsed().as_secs_f64()
    );
    (took, size)
}

#[test]
#[ignore = "writes 400 MB"]
fn large_texts() {
    let line = |i: usize| {
        let word = |k: usize| Seed(i as u64).nth(k as u64).0 % 99_999;
        let text: Vec<String> = (0..170).map(|k| word(k).to_string()).collect();
        format!("{{\"id\": \"{i}\", \"score\": {}, \"text\": \"{}\"}}\n", i % 5, text.join(" "))
    };
    let (took, size) = measure("jsonl", 400_000, "", line);
    assert!(size > 380 && took < 260, "{took} MB for a file of {size}");
}

#[test]
#[ignore = "writes 400 MB"]
fn large_rows() {
    let line = |i: usize| {
        let number = |k: usize| Seed(i as u64).nth(k as u64).0 % 999_999;
        let row: Vec<String> = (0..512).map(|k| format!("0.{}", number(k))).collect();
        format!("{},{}\n", i % 5, row.join(","))
    };
    let columns: Vec<String> = (0..512).map(|k| format!("p{k}")).collect();
    let header = format!("score,{}\n", columns.join(","));
    let (took, size) = measure("csv", 100_000, &header, line);
    assert!(size > 380 && took < 200, "{took} MB for a file of {size}");
}

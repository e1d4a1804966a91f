//! multilingual-e5 in one file of 4-bit weights (E5S1): a tiny file written here, and the real
//! multilingual-e5-small against transformers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};

use modl_core::checkpoint::Checkpoint;
use modl_core::{Context, Device, Layers, Tensor, Tensors, no_grad};
use modl_models::{LoadOptions, Tokenizer, mean_pool, open};

const TEXTS: [&str; 4] = [
    "query: The cat sleeps on the sofa.",
    "query: Die Katze schläft auf dem Sofa.",
    "query: El gato duerme en el sofá.",
    "query: 猫がソファで寝ている。",
];

fn asset(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets").join(name)
}

fn golden(name: &str) -> Tensor {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/real_e5/golden.safetensors");
    Checkpoint::open(path).unwrap().tensor(name, Device::Cpu).unwrap()
}

#[test]
#[ignore = "needs: cargo xtask assets multilingual-e5-small multilingual-e5-small-tokenizer"]
fn sentences_in_four_languages_are_transformers() {
    let file = asset("multilingual-e5-small/e5-small-q4.bin");
    let tokenizer = asset("multilingual-e5-small-tokenizer");
    if !file.exists() || !tokenizer.exists() {
        // Optional assets, which the run of all tests does not fetch.
        eprintln!(
            "skipped: `cargo xtask assets multilingual-e5-small multilingual-e5-small-tokenizer` \
             fetches the model"
        );
        return;
    }
    let batch = Tokenizer::open(tokenizer).unwrap().encode(&TEXTS, 64).unwrap();
    assert!(batch.ids.bit_equal(&golden("input_ids")).unwrap());
    let model = open(file, &LoadOptions::default()).unwrap();
    let none = Layers::none(model.sites().len());
    let outputs = no_grad(|| model.forward(&batch.inputs(), &none, &Context::eval())).unwrap();
    let hidden = outputs.need("last_hidden_state").unwrap();
    let mask = batch.mask.to_kind(hidden.kind()).unwrap().unsqueeze(-1).unwrap();
    let (real, wanted) =
        (hidden.mul(&mask).unwrap(), golden("last_hidden_state").mul(&mask).unwrap());
    let apart = real.max_abs_diff(&wanted).unwrap();
    eprintln!("last_hidden_state: {apart:.1e} apart");
    assert!(real.all_close(&wanted, 1e-5, 1e-5).unwrap(), "{apart}");
    let pooled = mean_pool(hidden, &batch.mask).unwrap();
    let length = pooled.square().unwrap().sum_dims(&[1], true).unwrap().sqrt().unwrap();
    let found = pooled.div(&length).unwrap();
    assert!(found.all_close(&golden("embedding"), 1e-5, 1e-5).unwrap());
}

const WIDTH: usize = 32;

/// A tensor of a tiny file: its name there and here, its rows, and whether it is a matrix.
type Entry = (String, String, usize, bool);

fn entries() -> Vec<Entry> {
    let mut all: Vec<Entry> = Vec::new();
    let mut add = |there: &str, here: &str, rows: usize, matrix: bool| {
        all.push((there.to_owned(), here.to_owned(), rows, matrix));
    };
    add("emb.word", "embeddings.word_embeddings.weight", 6, true);
    add("emb.pos", "embeddings.position_embeddings.weight", 7, false);
    add("emb.type", "embeddings.token_type_embeddings.weight", 2, false);
    add("emb.ln.w", "embeddings.LayerNorm.weight", 1, false);
    add("emb.ln.b", "embeddings.LayerNorm.bias", 1, false);
    for (there, here, rows) in [
        ("q", "attention.self.query", WIDTH),
        ("k", "attention.self.key", WIDTH),
        ("v", "attention.self.value", WIDTH),
        ("ao", "attention.output.dense", WIDTH),
        ("aln", "attention.output.LayerNorm", 1),
        ("fi", "intermediate.dense", WIDTH),
        ("fo", "output.dense", WIDTH),
        ("oln", "output.LayerNorm", 1),
    ] {
        let here = format!("encoder.layer.0.{here}");
        add(&format!("l0.{there}.w"), &format!("{here}.weight"), rows, rows > 1);
        add(&format!("l0.{there}.b"), &format!("{here}.bias"), 1, false);
    }
    all
}

/// The bytes of a tensor, and its numbers.
fn content(i: usize, rows: usize, matrix: bool) -> (Vec<u8>, Vec<f32>) {
    let (mut bytes, mut numbers) = (Vec::new(), Vec::new());
    for row in 0..rows {
        let byte = |j: usize| ((i * 37 + row * 11 + j * 59) % 256) as u8;
        if matrix {
            // A power of two, which f16 has exactly: 2⁻⁶ is 0x2400.
            bytes.extend(0x2400u16.to_le_bytes());
            bytes.extend((0..16).map(byte));
            let low = (0..16).map(|j| byte(j) % 16);
            let all = low.chain((0..16).map(|j| byte(j) / 16));
            numbers.extend(all.map(|q| (f32::from(q) - 8.0) / 64.0));
        } else {
            let plain = (0..WIDTH).map(|j| f32::from(byte(j)) / 100.0 - 1.0);
            numbers.extend(plain.clone());
            bytes.extend(plain.flat_map(f32::to_le_bytes));
        }
    }
    (bytes, numbers)
}

fn tiny() -> Vec<u8> {
    let mut table = Vec::new();
    let mut data = Vec::new();
    let all = entries();
    // Mark, version, sizes; two pieces of three bytes, a normaliser of four; the table.
    let head = 4 + 4 + 28 + 8 + 20 + 8 + 12 + 8 + 3 + 8 + 4 + 4;
    let start = head + all.iter().map(|(name, ..)| 2 + name.len() + 21).sum::<usize>();
    for (i, (name, _, rows, matrix)) in all.iter().enumerate() {
        let (bytes, numbers) = content(i, *rows, *matrix);
        table.extend((name.len() as u16).to_le_bytes());
        table.extend(name.as_bytes());
        table.push(u8::from(*matrix));
        table.extend((numbers.len() as u32).to_le_bytes());
        table.extend(((start + data.len()) as u64).to_le_bytes());
        table.extend((bytes.len() as u64).to_le_bytes());
        data.extend(bytes);
    }
    let width = WIDTH as u32;
    let mut file = b"E5S1".to_vec();
    let words =
        |file: &mut Vec<u8>, all: &[u32]| all.iter().for_each(|n| file.extend(n.to_le_bytes()));
    words(&mut file, &[1, width, 1, 2, width, 6, 7, 2]);
    words(&mut file, &[1e-12f32.to_bits(), 32, 2, 0, 1, 1, 0, 3, 0]);
    words(&mut file, &[0, 1, 3, 0, 0]);
    file.extend(b"abc");
    words(&mut file, &[1, 4]);
    file.extend(b"norm");
    words(&mut file, &[all.len() as u32]);
    assert_eq!(file.len(), head);
    [file, table, data].concat()
}

#[test]
fn a_tiny_file_is_read_number_by_number() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("e5.bin");
    std::fs::write(&path, tiny()).unwrap();
    let model = open(&path, &LoadOptions::default()).unwrap();
    for (i, (_, name, rows, matrix)) in entries().into_iter().enumerate() {
        let found = model.params().get(&name).unwrap();
        let (_, wanted) = content(i, rows, matrix);
        assert_eq!(found.to_vec::<f32>().unwrap(), wanted, "{name}");
    }
    assert_eq!(model.config()["layer_norm_eps"], 1e-12);
    let ids = Tensor::from_slice(&[0i64, 4, 5, 2], &[1, 4], Device::Cpu).unwrap();
    let inputs = Tensors::new().with("input_ids", ids);
    let none = Layers::none(model.sites().len());
    let outputs = no_grad(|| model.forward(&inputs, &none, &Context::eval())).unwrap();
    assert_eq!(outputs.need("last_hidden_state").unwrap().size(), [1, 4, 32]);
}

#[test]
fn broken_files_are_refused_without_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("e5.bin");
    let whole = tiny();
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        open(&path, &LoadOptions::default()).map(drop).map_err(|e| e.to_string())
    };
    for cut in 4..whole.len() {
        let e = read(&whole[..cut]).unwrap_err();
        assert!(e.contains("is not a whole E5S1 file"), "{e}");
    }
    // All that is in front of the numbers themselves.
    let end = whole.len()
        - entries().iter().enumerate().map(|(i, e)| content(i, e.2, e.3).0.len()).sum::<usize>();
    let refused = (4..end).filter(|at| {
        let mut bytes = whole.clone();
        bytes[*at] = !bytes[*at];
        read(&bytes).is_err()
    });
    // Versions, ids of pieces and their texts do not matter.
    assert!(refused.count() > 500);
}

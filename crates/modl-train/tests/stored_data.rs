//! Data that stand in a file (`in_memory = 0`) are the data that stand in memory: batches, fingerprints,
//! what is learned, and what a stopped run goes on to.
#![allow(clippy::unwrap_used, clippy::panic)]

mod toy;

use std::collections::BTreeMap;
use std::path::Path;

use modl_core::{Device, Modular, Result, Seed, Tensor};
use modl_train::{Batches, Cursor, Dataset, Objective, Recipe, run};
use toy::{StopAfter, backbone, head, methods};

const MORE: &str = "[[phases]]\nname = \"fit\"\nstrategy = \"joint\"\nsteps = 12\nbatch_size = 5\n\
                    checkpoint_every = 3\nlr = 0.01\n\
                    train = [\"heads.*\", \"base.*\"]\n";

/// A token of the toy for each letter.
fn letters(text: &str) -> Result<Vec<i64>> {
    Ok(text.bytes().map(|b| i64::from(b % 16)).collect())
}

fn recipe(at: &Path, data: &str) -> Recipe {
    let text = format!("{data}\n{MORE}");
    Recipe::parse(&text, at.join("recipe.toml"), &methods()).unwrap()
}

/// Files of texts, numbers, tensors and packed images with the tables that read them.
fn files(at: &Path) -> Vec<(&'static str, &'static str)> {
    let lines = |n: usize, f: &dyn Fn(usize) -> String| (0..n).map(f).collect::<String>();
    let text = |i: usize| {
        let words: String =
            "some words of another length each ".chars().cycle().take(3 + i * 7 % 20).collect();
        format!("{i}\t{}\t{}\n", i % 4, words)
    };
    std::fs::write(at.join("a.tsv"), lines(90, &text)).unwrap();
    std::fs::write(at.join("b.tsv"), lines(40, &|i| text(i + 1))).unwrap();
    let number = |i: usize| format!("{},{}.5,{i},-{i}e-3,7\n", i % 3, i % 5);
    let header = "score,a,b,c,d\n".to_owned();
    std::fs::write(at.join("a.csv"), header.clone() + &lines(60, &number)).unwrap();
    std::fs::write(at.join("b.csv"), header + &lines(30, &|i| number(i + 7))).unwrap();
    let json = |i: usize| format!("{{\"class\": {}, \"input\": [{i}, 0.1, {i}e-2, 1]}}\n", i % 3);
    std::fs::write(at.join("a.jsonl"), lines(70, &json)).unwrap();
    let bytes: Vec<u8> = (0..80 * 4u32).map(|i| (i * 37 % 256) as u8).collect();
    let scores: Vec<f32> = (0..80u8).map(|i| f32::from(i % 5)).collect();
    let tensors = [
        ("pixel_values", Tensor::from_slice(&bytes, &[80, 2, 2], Device::Cpu).unwrap()),
        ("score", Tensor::from_slice(&scores, &[80], Device::Cpu).unwrap()),
    ];
    let named = tensors.iter().map(|(n, t)| (*n, t));
    modl_core::checkpoint::save(at.join("a.safetensors"), named, Default::default()).unwrap();
    std::fs::create_dir_all(at.join("images")).unwrap();
    let idx = |start: &[u8], rest: &[u8]| {
        let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut to, &[start, rest].concat()).unwrap();
        to.finish().unwrap()
    };
    let images = idx(&[0, 0, 8, 3, 0, 0, 0, 80, 0, 0, 0, 2, 0, 0, 0, 2], &bytes);
    std::fs::write(at.join("images/train-images-idx3-ubyte.gz"), images).unwrap();
    let classes: Vec<u8> = (0..80).map(|i| i % 3).collect();
    let labels = idx(&[0, 0, 8, 1, 0, 0, 0, 80], &classes);
    std::fs::write(at.join("images/train-labels-idx1-ubyte.gz"), labels).unwrap();
    vec![
        (
            "[head]\ntype = \"regression\"\n[backbone]\npath = \"toy\"\n[data]\n\
             tasks = { a = \"a.tsv\", b = \"b.tsv\" }\ntest = 0.3",
            "texts",
        ),
        (
            "[head]\ntype = \"regression\"\n[backbone]\nfresh = { type = \"mlp\", inputs = 4, hidden = [6] }\n\
         [data]\nformat = \"csv\"\ntasks = { a = \"a.csv\", b = \"b.csv\" }\ntest = 0.3\nnormalize = [0.5, 2.0]",
            "csv",
        ),
        (
            "[head]\ntype = \"classification\"\n[backbone]\nfresh = { type = \"mlp\", inputs = 4, hidden = [6] }\n\
             [data]\nformat = \"jsonl\"\ntasks = { a = \"a.jsonl\" }\ntest = 0.3\nlimit = 50",
            "jsonl",
        ),
        (
            "[head]\ntype = \"regression\"\n[backbone]\nfresh = { type = \"mlp\", inputs = 4, hidden = [6] }\n\
             [data]\nformat = \"safetensors\"\ntasks = { a = \"a.safetensors\" }\ntest = 0.3\nlimit = 60",
            "tensors",
        ),
        (
            "[head]\ntype = \"classification\"\n[backbone]\nfresh = { type = \"mlp\", inputs = 4, hidden = [6] }\n\
             [data]\nformat = \"idx\"\ntasks = { a = \"images\" }\ntest = 0.3\n\
             stream = { type = \"permuted\", tasks = 2 }",
            "images",
        ),
    ]
}

fn batches(data: &Dataset) -> Vec<String> {
    let mut all = Batches::new(data, 7, Seed(3), Device::Cpu, Cursor::default()).unwrap();
    let one = |batch: modl_train::Batch| {
        let bytes: BTreeMap<String, Vec<u8>> =
            batch.inputs.iter().map(|(n, t)| (n.to_owned(), t.to_bytes().unwrap())).collect();
        format!("{:?} {:?} {bytes:?}", batch.ids, batch.targets.to_vec::<f32>().unwrap())
    };
    (0..all.per_epoch() + 2).map(|_| one(all.advance().unwrap())).collect()
}

fn trained(recipe: &Recipe, data: &Dataset, out: &Path, stop: Option<usize>) -> Option<Vec<u8>> {
    let (mut model, objective) = match recipe.fresh_backbone(&methods()).unwrap() {
        Some(fresh) => {
            let model = Modular::from_box(fresh, Seed(1)).unwrap();
            let objective = recipe.objective(&model).unwrap();
            (model, objective)
        }
        None => {
            (Modular::new(backbone(), Seed(1)).unwrap(), Box::new(head()) as Box<dyn Objective>)
        }
    };
    let mut sink = StopAfter(stop.unwrap_or(usize::MAX));
    let done = run(recipe, &methods(), &mut model, &*objective, data, out, &mut sink);
    assert_eq!(done.is_err(), stop.is_some(), "{:?}", done.err());
    stop.is_none().then(|| std::fs::read(out.join("phases/1-fit/params.safetensors")).unwrap())
}

#[test]
fn in_a_file_data_are_what_they_are_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    for (data, name) in files(at) {
        let (whole, stored) = (recipe(at, data), recipe(at, &format!("{data}\nin_memory = 0")));
        let (a, b) =
            (whole.load_data(&letters, 0).unwrap(), stored.load_data(&letters, 0).unwrap());
        for (a, b) in [(&a.0, &b.0), (&a.1, &b.1)] {
            assert_eq!(a.examples(), b.examples(), "{name}");
            assert_eq!(batches(a), batches(b), "{name}");
            assert_eq!(a.fingerprint().unwrap(), b.fingerprint().unwrap(), "{name}");
        }
        // Joined, in either order, and with themselves.
        for (x, y, both) in [(&b.0, &a.1, "file"), (&a.0, &b.1, "memory"), (&b.1, &b.0, "same")] {
            let (own, other) = (
                x.and(y).unwrap(),
                match both {
                    "same" => a.1.and(&a.0).unwrap(),
                    _ => a.0.and(&a.1).unwrap(),
                },
            );
            assert_eq!(batches(&own), batches(&other), "{name} {both}");
        }
        let out = |n: &str| at.join(format!("{name}-{n}"));
        let straight = trained(&whole, &a.0, &out("whole"), None);
        assert_eq!(trained(&stored, &b.0, &out("stored"), None), straight, "{name}");
        // Stopped with the data in memory, and gone on with where they stand in a file.
        trained(&whole, &a.0, &out("stopped"), Some(2));
        assert_eq!(trained(&stored, &b.0, &out("stopped"), None), straight, "{name}");
    }
}

/// What version 0 noted of two files before they were read line by line: runs of then go on.
#[test]
fn fingerprints_are_what_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let rows = "score,a,b\n1,0.5,0.25\n2,1.5,-2\n3,0,7\n4,1e-3,1\n5,3,3\n";
    std::fs::write(at.join("n.csv"), rows).unwrap();
    let texts =
        "1\t0.5\tgood film\n2\t-1\tbad news very\n3\t2\tnot\n4\t3\tfilm film\n5\t1\tvery good\n";
    std::fs::write(at.join("t.tsv"), texts).unwrap();
    let words = |text: &str| -> Result<Vec<i64>> {
        let all = ["good", "bad", "film", "news", "very", "not"];
        let id = |w: &str| 3 + all.iter().position(|a| *a == w).unwrap() as i64;
        Ok(text.split(' ').map(id).collect())
    };
    for memory in ["", "in_memory = 0\n"] {
        let print = |data: &str| {
            let head =
                "[head]\ntype = \"regression\"\n[backbone]\npath = \"toy\"\n[data]\ntest = 0.4\n";
            let data = recipe(at, &format!("{head}{memory}{data}")).load_data(&words, 0);
            data.unwrap().0.fingerprint().unwrap()
        };
        let numbers = "format = \"csv\"\ntasks = { t = \"n.csv\" }\nnormalize = [0.5, 2.0]";
        assert_eq!(print(numbers), "b84c9e8eeebb");
        assert_eq!(print("tasks = { t = \"t.tsv\" }"), "94cf388eb92d");
    }
}

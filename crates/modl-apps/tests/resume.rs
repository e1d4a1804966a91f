//! Runs that are stopped: by a kill, by a second run, by a disk that is full.

#![allow(clippy::unwrap_used, clippy::panic)]

mod bench;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bench::{Bench, RECIPE, modl, refuse, succeed, text};
use modl_core::Seed;

/// Three kinds of training: each module alone and then the router; everything at once in parts of a
/// batch; classes with a router that learns from what its choices led to.
fn recipes(b: &Bench) -> [String; 3] {
    let phases = RECIPE.find("[[phases]]").unwrap();
    let with = |name: &str, from: &str, to: &str, phase: &str| {
        let head = RECIPE[..phases].replace(from, to);
        fs::write(b.path(name), head + phase).unwrap();
        b.arg(name)
    };
    let joint = "[[phases]]\nname = \"all\"\nstrategy = \"joint\"\nsteps = 40\nlr = 1e-2\n\
                 batch_size = 8\nsplit_by_length = true\ncheckpoint_every = 3\n\
                 schedule = { type = \"cosine\", warmup = 0.1 }\n";
    let classes = "[[phases]]\nname = \"all\"\nstrategy = \"joint\"\nsteps = 40\nlr = 1e-2\n\
                   batch_size = 8\ncheckpoint_every = 3\noptimizer = { type = \"lion\" }\n";
    fs::write(b.path("tasks.toml"), RECIPE.replace("epochs = 2", "epochs = 1")).unwrap();
    let reinforce = "type = \"classification\"\n[loss_weights]\n";
    let classified = with("classes.toml", "type = \"regression\"", reinforce, classes);
    let learns = fs::read_to_string(b.path("classes.toml")).unwrap();
    let router = "type = \"soft\"\nscope = \"global\"\ninit_std = 0.1";
    assert!(learns.contains(router));
    let learns = learns.replace(router, "type = \"reinforce\"\nscope = \"global\"");
    fs::write(b.path("classes.toml"), learns).unwrap();
    [b.arg("tasks.toml"), with("joint.toml", "", "", joint), classified]
}

/// All files of a run but its log, with what is in them; a state's file by what it holds.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap().flatten() {
            let path = entry.path();
            match path.is_dir() {
                true => folders.push(path),
                false => {
                    let name = path.strip_prefix(folder).unwrap().to_owned();
                    found.insert(name, fs::read(&path).unwrap());
                }
            }
        }
    }
    found.remove(Path::new("events.jsonl"));
    found
}

fn start(recipe: &str, out: &Path, resume: bool) -> Child {
    let mut train = modl();
    train.args(["train", recipe, "--out"]).arg(out).args(resume.then_some("--resume"));
    train.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits until a run has begun; whether it then still goes on.
fn has_begun(run: &mut Child, folder: &Path) -> bool {
    while run.try_wait().unwrap().is_none() {
        if folder.join("recipe.json").exists() {
            return true;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    false
}

/// Twenty kills at random moments over three recipes: a run that goes on leaves the files of one that
/// was left alone, to the byte.
#[test]
fn a_run_that_was_killed_at_any_moment_goes_on_to_the_same_bytes() {
    let b = Bench::new();
    let (mut killed, mut kept) = (0, 0);
    for (n, recipe) in recipes(&b).iter().enumerate() {
        let alone = b.path("alone");
        let mut run = start(recipe, &alone, false);
        assert!(has_begun(&mut run, &alone), "{recipe}");
        let begun = Instant::now();
        assert!(run.wait().unwrap().success(), "{recipe}");
        let taken = begun.elapsed();
        let expected = contents(&alone);
        let adapter = |p: &PathBuf| p.ends_with("modules/a/adapter_model.safetensors");
        assert!(expected.keys().any(adapter), "{:?}", expected.keys());
        let out = b.path("out");
        for round in 0..[6, 7, 7][n] {
            let mut run = start(recipe, &out, false);
            has_begun(&mut run, &out);
            // Uniform over the time that the work took.
            let draw = Seed(n as u64).child("kill").nth(round).0;
            let share = (draw >> 11) as f64 / (1u64 << 53) as f64;
            std::thread::sleep(taken.mul_f64(share));
            killed += usize::from(run.try_wait().unwrap().is_none());
            run.kill().unwrap();
            run.wait().unwrap();
            kept += contents(&out).keys().filter(|p| p.ends_with("state.json")).count();
            assert!(start(recipe, &out, true).wait().unwrap().success(), "{recipe} {round}");
            let found = contents(&out);
            let names = |all: &BTreeMap<PathBuf, Vec<u8>>| all.keys().cloned().collect::<Vec<_>>();
            assert_eq!(names(&found), names(&expected), "{recipe} {round}");
            for (name, bytes) in &expected {
                assert!(found[name] == *bytes, "{recipe} {round}: {}", name.display());
            }
            fs::remove_dir_all(&out).unwrap();
        }
        fs::remove_dir_all(alone).unwrap();
    }
    assert!(killed > 10 && kept > 10, "killed {killed}, states kept {kept}");
}

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
    let joint = "[[phases]]\nname = \"all\"\nstrategy = \"joint\"\nsteps = 24\nlr = 1e-2\n\
                 batch_size = 8\nsplit_by_length = true\ncheckpoint_every = 3\n\
                 schedule = { type = \"cosine\", warmup = 0.1 }\n";
    let classes = "[[phases]]\nname = \"all\"\nstrategy = \"joint\"\nsteps = 24\nlr = 1e-2\n\
                   batch_size = 8\ncheckpoint_every = 3\noptimizer = { type = \"lion\" }\n";
    fs::write(
        b.path("tasks.toml"),
        RECIPE.replace("epochs = 2", "steps = 8").replace("epochs = 1", "steps = 8"),
    )
    .unwrap();
    let reinforce = "type = \"classification\"\n[loss_weights]\n";
    let classified = with("classes.toml", "type = \"regression\"", reinforce, classes);
    let learns = fs::read_to_string(b.path("classes.toml")).unwrap();
    let router = "type = \"soft\"\nscope = \"global\"\ninit_std = 0.1";
    assert!(learns.contains(router));
    let learns = learns.replace(router, "type = \"reinforce\"\nscope = \"global\"");
    fs::write(b.path("classes.toml"), learns).unwrap();
    [b.arg("tasks.toml"), with("joint.toml", "", "", joint), classified]
}

/// All files of a run, with what is in them, but for those that say when and how long.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap().flatten() {
            let path = entry.path();
            match path.is_dir() {
                true if path.ends_with("tensorboard") => {}
                true => folders.push(path),
                false => {
                    let name = path.strip_prefix(folder).unwrap().to_owned();
                    found.insert(name, fs::read(&path).unwrap());
                }
            }
        }
    }
    for timed in ["events.jsonl", "report.html"] {
        found.remove(Path::new(timed));
    }
    found
}

fn start(recipe: &str, out: &Path, resume: bool) -> Child {
    let mut train = modl();
    train.args(["train", recipe, "--out"]).arg(out).args(resume.then_some("--resume"));
    train.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// The length of a run's log.
fn log(folder: &Path) -> u64 {
    fs::metadata(folder.join("events.jsonl")).map_or(0, |m| m.len())
}

/// Waits until a run trains, which is some time after its program has begun: until its log is longer
/// than it was. Whether it then still goes on.
fn has_begun(run: &mut Child, folder: &Path, log_before: u64) -> bool {
    while run.try_wait().unwrap().is_none() {
        if log(folder) > log_before {
            return true;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    false
}

/// Twenty kills at random moments over three recipes, several of them in one run: it leaves the files
/// of one that was left alone, to the byte.
#[test]
fn a_run_that_was_killed_at_any_moment_goes_on_to_the_same_bytes() {
    let b = Bench::new();
    let (mut kills, mut kept) = (0, 0);
    for (n, recipe) in recipes(&b).iter().enumerate() {
        let (alone, out) = (b.path("alone"), b.path("out"));
        let mut run = start(recipe, &alone, false);
        assert!(has_begun(&mut run, &alone, 0), "{recipe}");
        let begun = Instant::now();
        assert!(run.wait().unwrap().success(), "{recipe}");
        let taken = begun.elapsed();
        let expected = contents(&alone);
        let adapter = |p: &PathBuf| p.ends_with("modules/a/adapter_model.safetensors");
        assert!(expected.keys().any(adapter), "{:?}", expected.keys());
        let is_whole = |round: u64| {
            let found = contents(&out);
            let names = |all: &BTreeMap<PathBuf, Vec<u8>>| all.keys().cloned().collect::<Vec<_>>();
            assert_eq!(names(&found), names(&expected), "{recipe} {round}");
            for (name, bytes) in &expected {
                assert!(found[name] == *bytes, "{recipe} {round}: {}", name.display());
            }
        };
        let (mut round, wanted) = (0, kills + [6, 7, 7][n]);
        while kills < wanted {
            let before = log(&out);
            let mut run = start(recipe, &out, true);
            if has_begun(&mut run, &out, before) {
                // Uniform over half of the time that the work took: a run is killed about twice.
                let draw = Seed(n as u64).child("kill").nth(round).0;
                let share = (draw >> 11) as f64 / (1u64 << 53) as f64;
                std::thread::sleep(taken.mul_f64(share / 2.0));
            }
            round += 1;
            run.kill().unwrap();
            if run.wait().unwrap().success() {
                // It has ended before it was killed.
                is_whole(round);
                fs::remove_dir_all(&out).unwrap();
            } else {
                kills += 1;
                kept += contents(&out).keys().filter(|p| p.ends_with("state.json")).count();
            }
        }
        assert!(start(recipe, &out, true).wait().unwrap().success(), "{recipe} {round}");
        is_whole(round);
        for folder in [alone, out] {
            fs::remove_dir_all(folder).unwrap();
        }
    }
    assert!(kills == 20 && kept > 10, "killed {kills}, states kept {kept}");
}

/// The system refuses a file beyond a size, as a full disk does.
#[cfg(unix)]
#[test]
fn a_disk_that_is_full_leaves_the_last_state_whole() {
    let b = Bench::new();
    // States of more than 64 kB, all else below 32.
    let wide =
        RECIPE.replace("r = 2", "r = 32").replace("checkpoint_every = 2", "checkpoint_every = 1");
    let quiet = "\nlog_every = 0\nlog_routing_every = 0";
    fs::write(b.path("wide.toml"), wide.replace("\nlr = 1e-2", &format!("{quiet}\nlr = 1e-2")))
        .unwrap();
    let (recipe, alone, out) = (b.arg("wide.toml"), b.path("alone"), b.path("out"));
    succeed(&["train", &recipe, "--out", &b.arg("alone")]);
    let mut run = start(&recipe, &out, false);
    let state = b.path("out/phases/1-fit/a/state.json");
    while !state.exists() {
        assert!(run.try_wait().unwrap().is_none(), "it has ended before it was seen");
        std::thread::sleep(Duration::from_millis(1));
    }
    run.kill().unwrap();
    run.wait().unwrap();
    let before = contents(&b.path("out/phases"));
    let full = Command::new("sh")
        // The signal would end the program.
        .args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$0\" \"$@\""])
        .arg(modl().get_program())
        .args(["--threads", "1", "train", &recipe, "--resume", "--out", &b.arg("out")])
        .output()
        .unwrap();
    let error = text(&full.stderr);
    assert_eq!(full.status.code(), Some(1), "{error}");
    for part in ["the state of step", "is not saved", "make room", "phases/1-fit/a"] {
        assert!(error.contains(part), "lacks `{part}`: {error}");
    }
    let left = |name: &PathBuf| !name.to_string_lossy().ends_with(".tmp");
    let mut before = before;
    before.retain(|name, _| left(name));
    assert!(contents(&b.path("out/phases")) == before, "the state of before is not whole");
    succeed(&["train", &recipe, "--resume", "--out", &b.arg("out")]);
    assert!(contents(&out) == contents(&alone));
}

#[cfg(unix)]
#[test]
fn two_runs_into_one_folder_do_not_meet() {
    let b = Bench::new();
    let (recipe, out) = (b.arg("recipe.toml"), b.path("run"));
    let mut first = start(&recipe, &out, false);
    assert!(has_begun(&mut first, &out, 0));
    // Stopped, so that it is still there when the others look.
    let signal = |name: &str| {
        let pid = first.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    };
    signal("-STOP");
    let again = ["train", &recipe, "--out", &b.arg("run"), "--resume"];
    refuse(&again, &["run: is being written by another run", "wait until it has ended"]);
    refuse(&again[..4], &["holds a run already", "--resume"]);
    signal("-CONT");
    assert!(first.wait().unwrap().success());
    let finished = contents(&out);
    // One that is finished stays as it is.
    succeed(&again);
    assert!(contents(&out) == finished);
}

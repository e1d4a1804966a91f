//! `modl merge` as a user runs it: files, folders, plans, refusals, and what is left after a kill.

#![allow(clippy::unwrap_used, clippy::panic)]

mod modl;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use modl_core::checkpoint::{self, Checkpoint};
use modl_core::{Device, Init, Kind, Seed, Tensor};

use modl::{modl, refuse, succeed};

const MODELS: &str = "../modl-aggregate/tests/fixtures/mergekit/models";

fn model(name: &str) -> String {
    format!("{MODELS}/{name}")
}

/// All files of a folder and what is in them.
fn contents(dir: &Path) -> HashMap<String, Vec<u8>> {
    let files = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    files
        .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&p).unwrap()))
        .collect()
}

#[test]
fn a_method_and_folders_are_what_a_file_is() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let yaml = "merge_method: ties\nbase_model: base\nmodels:\n\
                - model: ft0\n  parameters: {weight: 0.5, density: 0.4}\n\
                - model: ft1\n  parameters: {weight: 0.3, density: 0.4}\n";
    // Paths start beside the file where the working folder has no such model.
    for name in ["base", "ft0", "ft1"] {
        fs::create_dir(dir.path().join(name)).unwrap();
        for file in ["config.json", "model.safetensors"] {
            let from = Path::new(MODELS).join(name).join(file);
            fs::copy(from, dir.path().join(name).join(file)).unwrap();
        }
    }
    fs::write(dir.path().join("ties.yml"), yaml).unwrap();
    succeed(&["merge", &at("ties.yml"), "--out", &at("a")]);
    let (base, one, two) = (model("base"), model("ft0"), model("ft1"));
    let args = ["merge", "--method", "ties", &base, &one, &two];
    let more = ["--weight", "0.5,0.3", "--density", "0.4", "--out", &at("b")];
    succeed(&[&args[..], &more[..]].concat());
    let (a, b) = (contents(&dir.path().join("a")), contents(&dir.path().join("b")));
    assert_eq!(a["model.safetensors"], b["model.safetensors"]);
    assert!(a.contains_key("config.json") && a.contains_key("mergekit_config.yml"));
}

fn absolute(name: &str) -> String {
    fs::canonicalize(MODELS)
        .unwrap()
        .join(name)
        .display()
        .to_string()
        .trim_end_matches('/')
        .to_owned()
}

#[test]
fn a_plan_writes_nothing_and_says_what_it_costs() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("m").display().to_string();
    let (base, one) = (model("base"), model("ft0"));
    let text = succeed(&["merge", "--method", "dare_ties", &base, &one, "--out", &out, "--plan"]);
    for part in [
        "model.layers.*.mlp.up_proj.weight",
        "density",
        "reads 157 kB",
        "writes 78 kB",
        "of memory",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("m").display().to_string();
    let (base, one) = (model("base"), model("ft0"));
    let merge = |more: &[&str], part: &str| {
        refuse(&[&["merge", "--out", &out], more].concat(), part);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{more:?}");
    };
    merge(&["--method", "tise", &base, &one], "did you mean `ties`");
    merge(&["--method", "slerp", &base, &one], "`slerp` needs it");
    merge(&["--method", "linear", &base, "nowhere"], "is not there");
    merge(&["--method", "ties", &base, &one, "--weight", "1,2"], "2 values for 1 models");
    merge(&["--method", "ties", &base, &one, "--set", "lamda=1"], "lamda");
    merge(&["--method", "linear", &base, &one, "--density", "0.5"], "has no such setting");
    merge(&[&base, &one], "need a --method");
}

#[test]
fn numbers_that_are_not_finite_are_named_or_let_through() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    for (name, value) in [("a", 1.0), ("b", f32::NAN)] {
        let mut values = vec![0.5f32; 100];
        values[42] = value;
        let t = Tensor::from_slice(&values, &[10, 10], Device::Cpu).unwrap();
        checkpoint::save(
            dir.path().join(name).join("model.safetensors"),
            [("w", &t)],
            HashMap::new(),
        )
        .unwrap();
    }
    let args = ["merge", "--method", "linear", &at("a"), &at("b"), "--out", &at("m")];
    refuse(&args, "number 42 is NaN");
    assert!(!dir.path().join("m").exists());
    fs::remove_dir_all(dir.path().join("m.merging")).unwrap();
    succeed(&[&args[..], &["--allow-nan"]].concat());
}

#[test]
fn a_later_document_names_the_result_of_an_earlier_one() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let yaml = format!(
        "name: first\nmerge_method: linear\nmodels:\n\
         - model: {0}/ft0\n  parameters: {{weight: 1}}\n- model: {0}/ft1\n  parameters: {{weight: 1}}\n\
         ---\nmerge_method: linear\nmodels:\n\
         - model: first\n  parameters: {{weight: 2}}\n- model: {0}/ft2\n  parameters: {{weight: 1}}\n",
        absolute("")
    );
    fs::write(dir.path().join("two.yml"), yaml).unwrap();
    succeed(&["merge", &at("two.yml"), "--out", &at("m")]);
    assert!(!dir.path().join("m.parts").exists());
    // ((a + b) / 2 · 2 + c) / 3 is the mean of all.
    let read = |path: PathBuf| {
        let file = Checkpoint::open(path.join("model.safetensors")).unwrap();
        file.tensor("lm_head.weight", Device::Cpu).unwrap().to_vec::<f64>().unwrap()
    };
    let all: Vec<Vec<f64>> =
        (0..3).map(|i| read(Path::new(&model(&format!("ft{i}"))).into())).collect();
    for (n, x) in read(dir.path().join("m")).iter().enumerate() {
        let mean = all.iter().map(|v| v[n]).sum::<f64>() / 3.0;
        assert!((x - mean).abs() < 1e-6);
    }
}

/// A file of tensors whose numbers are nowhere on the disk.
#[cfg(unix)]
fn hollow(folder: &Path, bytes: u64) {
    let side = ((bytes / 4) as f64).sqrt() as u64;
    let header = format!(
        "{{\"w\":{{\"dtype\":\"F32\",\"shape\":[{side},{side}],\"data_offsets\":[0,{}]}}}}",
        4 * side * side
    );
    fs::create_dir(folder).unwrap();
    let path = folder.join("model.safetensors");
    let start = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    fs::write(&path, &start).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(start.len() as u64 + 4 * side * side).unwrap();
}

#[cfg(unix)]
#[test]
fn a_disk_that_is_too_small_is_told_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let free = fs4::available_space(dir.path()).unwrap();
    for name in ["a", "b"] {
        hollow(&dir.path().join(name), 2 * free);
    }
    let args = ["merge", "--method", "linear", &at("a"), &at("b"), "--out", &at("m")];
    refuse(&args, "make room");
    assert!(!dir.path().join("m.merging").exists() && !dir.path().join("m").exists());
}

/// The system refuses a file beyond a size, as a full disk does: what is finished stays, and the same
/// command goes on from there.
#[cfg(unix)]
#[test]
fn a_disk_that_refuses_in_the_middle_costs_only_the_file_that_did_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    for (n, name) in ["a", "b"].into_iter().enumerate() {
        let side = |t: u64| if t == 2 { 1448 } else { 500 };
        let tensors: Vec<(String, Tensor)> = (0..3)
            .map(|t| {
                let (shape, seed) = ([side(t), side(t)], Seed(n as u64).nth(t));
                let values = Init::Normal(0.1).tensor(&shape, seed, Kind::Float, Device::Cpu);
                (format!("layers.{t}.weight"), values.unwrap())
            })
            .collect();
        let named = tensors.iter().map(|(n, t)| (n.as_str(), t));
        checkpoint::save(dir.path().join(name).join("model.safetensors"), named, HashMap::new())
            .unwrap();
    }
    let (a, b) = (at("a"), at("b"));
    let args = |out: &str| {
        let fixed =
            ["merge", "--method", "linear", "--max-shard-size", "1MB", &a, &b, "--out", out];
        fixed.map(str::to_owned)
    };
    let run = |out: &str| {
        succeed(&args(&at(out)).iter().map(String::as_str).collect::<Vec<_>>());
    };
    run("whole");
    let program = modl(&[]);
    let out = std::process::Command::new("sh")
        // Between 1 and 8 MB, whether a block is 512 bytes or 1 kB. The signal would end the program.
        .args(["-c", "trap '' XFSZ; ulimit -f 4096; exec \"$0\" --threads 1 \"$@\""])
        .arg(program.get_program())
        .args(args(&at("out")))
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{error}");
    assert!(error.contains("model-00003-of-00003") && error.contains("make room"), "{error}");
    assert!(!dir.path().join("out").exists());
    let kept = |n: usize| {
        let path = dir.path().join(format!("out.merging/model-0000{n}-of-00003.safetensors"));
        fs::metadata(path).and_then(|m| m.modified()).ok()
    };
    let before = [kept(1), kept(2), kept(3)];
    assert!(before[0].is_some() && before[1].is_some() && before[2].is_none());
    run("out");
    assert_eq!(contents(&dir.path().join("out")), contents(&dir.path().join("whole")));
    let first = fs::metadata(dir.path().join("out/model-00001-of-00003.safetensors")).unwrap();
    assert_eq!(first.modified().ok(), before[0], "it was kept and not made again");
}

#[cfg(unix)]
#[test]
fn two_merges_into_one_folder_do_not_meet() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    for name in ["a", "b"] {
        hollow(&dir.path().join(name), 400_000_000);
    }
    let (a, b, out) = (at("a"), at("b"), at("m"));
    let args = ["merge", "--method", "linear", &a, &b, "--out", &out];
    let mut first = modl(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !dir.path().join("m.merging/model.tmp").exists() {
        assert!(first.try_wait().unwrap().is_none(), "it has ended before it was seen");
        std::thread::sleep(Duration::from_millis(2));
    }
    // Stopped, so that it is still there when the other looks.
    let signal = |name: &str| {
        let pid = first.id().to_string();
        assert!(std::process::Command::new("kill").args([name, &pid]).status().unwrap().success());
    };
    signal("-STOP");
    refuse(&args, "another merge");
    signal("-CONT");
    assert!(first.wait().unwrap().success());
    let mut files: Vec<String> = contents(&dir.path().join("m")).into_keys().collect();
    files.sort();
    assert_eq!(files, ["mergekit_config.yml", "model.safetensors"]);
    refuse(&args, "is there already");
}

/// Waits until a merge has begun, which is some time after its program has; whether it then still
/// goes on.
fn has_begun(merge: &mut Child, folder: &Path) -> bool {
    while merge.try_wait().unwrap().is_none() {
        if folder.exists() {
            return true;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    false
}

/// Twenty kills at random moments of a merge, each followed by the same command: the bytes are those
/// of a merge that was left alone, and the result's name never stands for a part of it.
#[cfg(unix)]
#[test]
fn a_merge_that_is_killed_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    for (n, name) in ["base", "a", "b"].into_iter().enumerate() {
        let tensors: Vec<(String, Tensor)> = (0..8)
            .map(|t| {
                let seed = Seed(n as u64).nth(t);
                let values = Init::Normal(0.1).tensor(&[512, 512], seed, Kind::Float, Device::Cpu);
                (format!("layers.{t}.weight"), values.unwrap())
            })
            .collect();
        let path = dir.path().join(name).join("model.safetensors");
        let named = tensors.iter().map(|(n, t)| (n.as_str(), t));
        checkpoint::save(path, named, HashMap::new()).unwrap();
    }
    let (base, a, b) = (at("base"), at("a"), at("b"));
    let args = |out: &str| -> Vec<String> {
        let fixed =
            ["merge", "--method", "dare_ties", "--density", "0.4", "--max-shard-size", "1MB"];
        let inputs = [base.as_str(), &a, &b, "--out", out];
        fixed.into_iter().chain(inputs).map(str::to_owned).collect()
    };
    let start = |out: &str| {
        let command = args(out);
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        modl(&command).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let mut alone = start(&at("whole"));
    assert!(has_begun(&mut alone, &dir.path().join("whole.merging")));
    let begun = Instant::now();
    assert!(alone.wait().unwrap().success());
    let taken = begun.elapsed();
    let expected = contents(&dir.path().join("whole"));
    assert!(expected.len() > 8, "one file for each tensor, an index and more");
    let out = dir.path().join("out");
    let (mut killed, mut kept) = (0, 0);
    for round in 0..20 {
        let _ = fs::remove_dir_all(&out);
        let _ = fs::remove_dir_all(dir.path().join("out.merging"));
        let mut child = start(&at("out"));
        has_begun(&mut child, &dir.path().join("out.merging"));
        // Uniform over the time that the work took.
        let share = (Seed(20).nth(round).0 >> 11) as f64 / (1u64 << 53) as f64;
        std::thread::sleep(taken.mul_f64(share));
        killed += usize::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        if out.exists() {
            assert_eq!(contents(&out), expected, "it had ended before");
            continue;
        }
        let files = fs::read_dir(dir.path().join("out.merging"));
        let finished = |e: &fs::DirEntry| e.path().extension().is_some_and(|e| e == "safetensors");
        kept += files.map_or(0, |f| f.flatten().filter(finished).count());
        assert!(start(&at("out")).wait().unwrap().success());
        assert_eq!(contents(&out), expected, "killed in round {round}");
        assert!(!dir.path().join("out.merging").exists());
    }
    assert!(killed > 0 && kept > 0, "killed {killed}, files kept {kept}");
}

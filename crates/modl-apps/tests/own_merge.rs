//! A program with a merge method that modl does not have, as a crate of one's own makes it: the commands
//! list it, plan it and merge with it. Started with `OWN_MERGE` set this file is that program; otherwise
//! it starts itself and looks at what comes out.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::Path;
use std::process::{Command, ExitCode};

use modl_aggregate::merge::{Blend, Chunk, Group, MergeMethod, Setting, Settings, Spec};
use modl_core::checkpoint::Checkpoint;
use modl_core::{Device, Result};

const MODELS: &str = "../modl-aggregate/tests/fixtures/mergekit/models";

/// The median of each number, times a factor.
#[derive(Debug)]
struct Median;

const SETTINGS: &[Setting] =
    &[Setting::number_or("factor", 1.0, "what the median is multiplied by")];

impl MergeMethod for Median {
    fn spec(&self) -> Spec {
        Spec::new("median", "Median of each number", "a test").settings(SETTINGS)
    }

    fn prepare<'a>(&self, group: &'a Group, settings: &Settings) -> Result<Blend<'a>> {
        let factor = settings.number("factor")? as f32;
        Ok(Box::new(move |chunk: &Chunk, out: &mut [f32]| {
            for (n, o) in out.iter_mut().enumerate() {
                let mut all: Vec<f32> = (0..group.inputs.len()).map(|i| chunk.of(i)[n]).collect();
                all.sort_by(f32::total_cmp);
                *o = factor * all[all.len() / 2];
            }
        }))
    }
}

fn main() -> ExitCode {
    if std::env::var_os("OWN_MERGE").is_some() {
        let methods = modl_apps::builtin().and_then(modl_train::Methods::new);
        return modl_apps::main_with_methods(methods.and_then(|m| m.with_merge(Median)));
    }
    every_command_knows_the_method();
    a_name_that_is_taken_is_refused();
    // As the harness says it that is not here.
    println!("test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
    ExitCode::SUCCESS
}

fn program(args: &[&str]) -> (bool, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let out = command.env("OWN_MERGE", "1").args(["--threads", "1"]).args(args).output().unwrap();
    let said = [out.stdout, out.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
    (out.status.success(), said)
}

fn every_command_knows_the_method() {
    let (_, listed) = program(&["list", "merges"]);
    let line = listed.lines().find(|l| l.contains(" median "));
    assert!(line.is_some_and(|l| l.contains("Median of each number")), "{listed}");
    assert!(listed.contains(" ties "), "modl's own are there: {listed}");

    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("m").display().to_string();
    let models: Vec<String> = (0..3).map(|i| format!("{MODELS}/ft{i}")).collect();
    let mut args = vec!["merge", "--method", "median", "--set", "factor=2", "--out", &out];
    args.extend(models.iter().map(String::as_str));
    let (planned, text) = program(&[&args[..], &["--plan"]].concat());
    assert!(planned && text.contains("factor 2") && text.contains("median of 3 models"), "{text}");
    let (merged, text) = program(&args);
    assert!(merged, "{text}");
    let read = |folder: &Path| {
        let file = Checkpoint::open(folder.join("model.safetensors")).unwrap();
        file.tensor("model.norm.weight", Device::Cpu).unwrap().to_vec::<f64>().unwrap()
    };
    let all: Vec<Vec<f64>> = models.iter().map(|m| read(Path::new(m))).collect();
    for (n, found) in read(Path::new(&out)).into_iter().enumerate() {
        let mut three: Vec<f64> = all.iter().map(|v| v[n]).collect();
        three.sort_by(f64::total_cmp);
        assert!((found - 2.0 * three[1]).abs() <= 1e-6, "{found} {three:?}");
    }
    let (done, text) = program(&["merge", "--method", "meidan", &models[0], "--out", "x"]);
    assert!(!done && text.contains("did you mean `median`"), "{text}");
}

fn a_name_that_is_taken_is_refused() {
    let methods = modl_apps::builtin().and_then(modl_train::Methods::new).unwrap();
    let methods = methods.with_merge(Median).unwrap();
    let error = methods.with_merge(Median).unwrap_err().to_string();
    assert!(error.contains("median"), "{error}");
}

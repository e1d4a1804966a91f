//! Packages of Debian, downloaded by apt without being installed.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// `apt-get download`, to which the package is still to be said; it saves the file where it runs.
///
/// # Errors
/// Where there is no apt.
pub fn download() -> Result<Command> {
    let there = Command::new("apt-get").arg("--version").stdout(Stdio::null()).status();
    if !there.is_ok_and(|status| status.success()) {
        bail!("this asset is a package of Debian, and there is no apt-get on this machine");
    }
    let mut command = Command::new("apt-get");
    command.args(["download", "--quiet"]);
    Ok(command)
}

/// One file of a `.deb`, by its path without the leading `./`.
pub fn file(package: &Path, wanted: &str) -> Result<Vec<u8>> {
    let name = package.display().to_string();
    let mut child = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdout(Stdio::piped())
        .spawn()
        .context("dpkg-deb cannot be run")?;
    let stream = child.stdout.take().context("dpkg-deb says nothing")?;
    let mut found = None;
    for entry in tar::Archive::new(stream).entries().with_context(|| name.clone())? {
        let mut entry = entry.with_context(|| name.clone())?;
        let path = entry.path().with_context(|| name.clone())?;
        if path.strip_prefix("./").unwrap_or(&path) == Path::new(wanted) {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).with_context(|| name.clone())?;
            found = Some(bytes);
        }
    }
    child.wait()?;
    found.with_context(|| format!("{name} holds no {wanted}"))
}

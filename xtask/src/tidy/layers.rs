//! Which crate may depend on which.

use std::path::Path;

use serde_json::Value;

use super::Offence;

/// The modl crates that a package's normal dependencies may name; `None` allows all.
fn allowed(package: &str) -> Option<&'static [&'static str]> {
    match package {
        "modl-core" | "xtask" => Some(&[]),
        "modl-models" | "modl-compute" | "modl-route" | "modl-aggregate" => Some(&["modl-core"]),
        "modl-train" => Some(&["modl-core", "modl-compute", "modl-route", "modl-aggregate"]),
        _ => None,
    }
}

/// Checks the dependencies that cargo tells of.
pub fn check(metadata: &Value, root: &Path) -> Vec<Offence> {
    let mut offences = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(allowed) = allowed(name) else { continue };
        let manifest = Path::new(package["manifest_path"].as_str().unwrap_or_default());
        let shown = manifest.strip_prefix(root).unwrap_or(manifest).display().to_string();
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let other = dependency["name"].as_str().unwrap_or_default();
            // The tests of a crate may use any other; xtask's may not, as they run before setup.
            let counts = dependency["kind"].is_null() || name == "xtask";
            let layered = other.starts_with("modl-") || (name == "xtask" && other == "tch");
            if counts && layered && !allowed.contains(&other) {
                let message = match allowed {
                    [] => format!("{name} may depend on no modl crate, but names {other}"),
                    _ => {
                        format!("{name} may depend on {} alone, not on {other}", allowed.join(", "))
                    }
                };
                offences.push(Offence::new(&shown, 1, message));
            }
        }
    }
    offences
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn offences(package: &str, dependency: &str, kind: Value) -> usize {
        let metadata = json!({"packages": [{
            "name": package,
            "manifest_path": "/r/crates/x/Cargo.toml",
            "dependencies": [{"name": dependency, "kind": kind}],
        }]});
        check(&metadata, Path::new("/r")).len()
    }

    #[test]
    fn layers_are_kept() {
        assert_eq!(offences("modl-route", "modl-core", Value::Null), 0);
        assert_eq!(offences("modl-route", "modl-compute", Value::Null), 1);
        assert_eq!(offences("modl-route", "modl-compute", json!("dev")), 0);
        assert_eq!(offences("modl-train", "modl-models", Value::Null), 1);
        assert_eq!(offences("modl-apps", "modl-models", Value::Null), 0);
        assert_eq!(offences("modl-core", "tch", Value::Null), 0);
        assert_eq!(offences("xtask", "tch", json!("dev")), 1);
    }
}

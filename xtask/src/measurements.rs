//! What criterion measured, read from the files that it leaves.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

/// One benchmark's result, in nanoseconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measurement {
    /// Its full name.
    pub name: String,
    /// The median.
    pub median: f64,
    /// The median distance from the median.
    pub spread: f64,
}

impl Measurement {
    /// Its row in a table.
    pub fn row(&self) -> Vec<String> {
        let percent = 100.0 * self.spread / self.median;
        vec![
            self.name.clone(),
            time(self.median),
            format!("± {} ({percent:.0} %)", time(self.spread)),
        ]
    }
}

/// All results below criterion's folder that were written after `start`.
pub fn since(home: &Path, start: SystemTime) -> Result<Vec<Measurement>> {
    let mut found = Vec::new();
    collect(home, start, &mut found)?;
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn collect(dir: &Path, start: SystemTime, found: &mut Vec<Measurement>) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    for entry in entries {
        let path = entry?.path();
        if !path.is_dir() {
            continue;
        }
        let estimates = path.join("estimates.json");
        let new = path.ends_with("new") && estimates.exists();
        if new && fs::metadata(&estimates)?.modified()? >= start {
            found.push(read(&path)?);
        }
        collect(&path, start, found)?;
    }
    Ok(())
}

fn read(new: &Path) -> Result<Measurement> {
    let json = |name: &str| -> Result<Value> {
        let path = new.join(name);
        let text = fs::read_to_string(&path)
            .with_context(|| format!("{} cannot be read", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))
    };
    let estimates = json("estimates.json")?;
    let number = |field: &str| {
        estimates[field]["point_estimate"].as_f64().with_context(|| {
            format!("{} has no {field}: another criterion?", new.join("estimates.json").display())
        })
    };
    let name = json("benchmark.json")?["full_id"].as_str().unwrap_or("unnamed").to_owned();
    Ok(Measurement { name, median: number("median")?, spread: number("median_abs_dev")? })
}

fn time(nanoseconds: f64) -> String {
    let (value, unit) = match nanoseconds {
        ns if ns < 1e3 => (ns, "ns"),
        ns if ns < 1e6 => (ns / 1e3, "µs"),
        ns if ns < 1e9 => (ns / 1e6, "ms"),
        ns => (ns / 1e9, "s"),
    };
    format!("{value:.3} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn new_results_are_read_and_old_ones_are_not() {
        let home = tempfile::tempdir().unwrap();
        let new = home.path().join("group/name/new");
        fs::create_dir_all(&new).unwrap();
        let estimates = r#"{"median": {"point_estimate": 1500.0},
                            "median_abs_dev": {"point_estimate": 30.0}}"#;
        fs::write(new.join("estimates.json"), estimates).unwrap();
        fs::write(new.join("benchmark.json"), r#"{"full_id": "group/name"}"#).unwrap();
        let found = since(home.path(), SystemTime::UNIX_EPOCH).unwrap();
        let row = found.iter().map(Measurement::row).next().unwrap();
        assert_eq!(row, ["group/name", "1.500 µs", "± 30.000 ns (2 %)"]);
        let later = SystemTime::now() + Duration::from_secs(60);
        assert!(since(home.path(), later).unwrap().is_empty());
    }
}

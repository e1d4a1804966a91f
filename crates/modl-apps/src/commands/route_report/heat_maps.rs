//! Heat maps of layer × module, for all tasks and for each, and of task × module.

use anyhow::Result;

use super::numbers::{SiteNumbers, SplitNumbers};
use super::words;
use crate::report::heat_map;

/// Tasks that get a map of their own; where there are more, there is one of task × module only.
const TASKS: usize = 12;

/// A drawing, and what is said below it.
pub(super) struct Map {
    pub(super) file: String,
    pub(super) svg: String,
    pub(super) caption: String,
}

/// The maps of a split. Sites with the same modules share a map.
pub(super) fn of(split: &SplitNumbers) -> Result<Vec<Map>> {
    let mut banks: Vec<Vec<&SiteNumbers>> = Vec::new();
    for site in &split.sites {
        let same = |bank: &&mut Vec<&SiteNumbers>| bank.iter().any(|s| s.modules == site.modules);
        match banks.iter_mut().find(same) {
            Some(bank) => bank.push(site),
            None => banks.push(vec![site]),
        }
    }
    let mut maps = Vec::new();
    for (n, bank) in banks.iter().enumerate() {
        let name = |kind: &str, task: &str| {
            let part =
                |text: &str| if text.is_empty() { String::new() } else { format!("-{text}") };
            let number = if n == 0 { String::new() } else { format!("bank{}", n + 1) };
            format!("{kind}-{}{}{}.svg", plain(&split.name), part(&number), part(&plain(task)))
        };
        maps.extend(of_bank(split, bank, name)?);
    }
    Ok(maps)
}

fn of_bank(
    split: &SplitNumbers,
    bank: &[&SiteNumbers],
    name: impl Fn(&str, &str) -> String,
) -> Result<Vec<Map>> {
    let Some(first) = bank.first() else { return Ok(Vec::new()) };
    let modules = &first.modules;
    let sites: Vec<String> = bank.iter().map(|s| words::site(s)).collect();
    let mut tasks: Vec<&String> = bank.iter().flat_map(|s| s.tasks.keys()).collect();
    tasks.sort_unstable();
    tasks.dedup();
    let which = words::split(&split.name);
    let all: Vec<Vec<f64>> = bank.iter().map(|s| s.shares.clone()).collect();
    let title = format!("{which}: sites and modules");
    let mut maps = vec![Map {
        file: name("use", ""),
        svg: heat_map(&title, &sites, modules, &all)?,
        caption: "Rows: sites. Columns: modules. All tasks.".into(),
    }];
    if tasks.len() < 2 {
        return Ok(maps);
    }
    let share = |site: &SiteNumbers, task: &str| match site.tasks.get(task) {
        Some(t) => t.shares.clone(),
        None => vec![0.0; modules.len()],
    };
    let over_sites = |task: &&String| -> Vec<f64> {
        let mut mean = vec![0.0; modules.len()];
        let n: usize = bank.iter().map(|s| s.paths.len()).sum();
        for site in bank {
            let weight = site.paths.len() as f64 / n.max(1) as f64;
            mean.iter_mut().zip(share(site, task)).for_each(|(m, s)| *m += weight * s);
        }
        mean
    };
    let by_task: Vec<Vec<f64>> = tasks.iter().map(over_sites).collect();
    let names: Vec<String> = tasks.iter().map(|t| t.to_string()).collect();
    maps.push(Map {
        file: name("tasks", ""),
        svg: heat_map(&format!("{which}: tasks and modules"), &names, modules, &by_task)?,
        caption: "Rows: tasks. Columns: modules. The mean over sites.".into(),
    });
    if bank.len() > 1 && tasks.len() <= TASKS {
        for (i, task) in tasks.iter().enumerate() {
            let values: Vec<Vec<f64>> = bank.iter().map(|site| share(site, task)).collect();
            let title = format!("{which}, task {task}: sites and modules");
            maps.push(Map {
                // The number keeps tasks apart whose names differ in other characters only.
                file: name("use", &format!("{}-{task}", i + 1)),
                svg: heat_map(&title, &sites, modules, &values)?,
                caption: format!("Rows: sites. Columns: modules. Task {task}."),
            });
        }
    }
    Ok(maps)
}

/// A name that every file system takes.
pub(super) fn plain(name: &str) -> String {
    let keep = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    name.chars().take(40).map(keep).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn file_names_are_plain() {
        assert_eq!(super::plain("a/b ../ü.x"), "a_b______x");
    }
}

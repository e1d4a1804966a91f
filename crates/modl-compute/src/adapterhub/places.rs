//! Where an adapter stands, in AdapterHub's terms: parts of a layer, and layers that are left out.

use std::collections::BTreeSet;

use modl_core::{Error, Names, Result, Site, SiteKind, Targets};

/// Where one method of an adapter stands.
#[derive(Debug)]
pub(super) struct Standing {
    /// The adapter's name in the file.
    pub(super) name: String,
    /// What the paths of the backbone start with: `bert.`, or nothing.
    pub(super) model: String,
    /// Its sites.
    pub(super) sites: Vec<Site>,
    /// The backbone's.
    pub(super) all: Vec<Site>,
}

impl Standing {
    pub(super) fn new(name: &str, sites: Vec<Site>, all: &[Site]) -> Self {
        let embeddings = all.iter().find(|s| s.kind == SiteKind::Tokens);
        let model = embeddings.and_then(|s| s.path.strip_suffix(EMBEDDINGS)).unwrap_or_default();
        Standing { name: name.to_owned(), model: model.to_owned(), sites, all: all.to_vec() }
    }

    /// Parts of a layer, and layers that are left out.
    pub(super) fn places(&self) -> Result<Places> {
        Places::new(&self.sites, &self.all)
    }
}

/// What BERT and its kin call their embeddings.
pub(super) const EMBEDDINGS: &str = "embeddings";

/// The sites of an adapter in a backbone.
#[derive(Debug)]
pub(super) struct Places {
    /// The ends of the sites' paths behind the layer's number, each once: `output`.
    pub(super) ends: BTreeSet<String>,
    /// The layers without any.
    pub(super) leave_out: Vec<i64>,
}

/// The layer's number and what follows it.
pub(super) fn split(path: &str) -> Option<(i64, &str)> {
    let mut rest = path;
    while let Some((part, tail)) = rest.split_once('.') {
        if let Ok(n) = part.parse() {
            return Some((n, tail));
        }
        rest = tail;
    }
    None
}

impl Places {
    /// What `sites` are among `all`.
    ///
    /// # Errors
    /// Where AdapterHub cannot say it: one layer has other parts than another, or a site is in no
    /// layer.
    pub(super) fn new(sites: &[Site], all: &[Site]) -> Result<Self> {
        let numbered = |s: &Site| split(&s.path).map(|(n, end)| (n, end.to_owned()));
        let layers: BTreeSet<i64> =
            all.iter().filter_map(|s| numbered(s).map(|(n, _)| n)).collect();
        let own: BTreeSet<(i64, String)> = sites.iter().filter_map(numbered).collect();
        let used: BTreeSet<i64> = own.iter().map(|(n, _)| *n).collect();
        let ends: BTreeSet<String> = own.iter().map(|(_, end)| end.clone()).collect();
        if own.len() != sites.len() || own.len() != used.len() * ends.len() {
            return Err(Error::unsupported(
                "sites that differ from layer to layer in an AdapterHub folder",
                "save the module with Modular::save_module instead",
            ));
        }
        Ok(Places { ends, leave_out: layers.difference(&used).copied().collect() })
    }

    /// The sites that end so, in all layers but some.
    pub(super) fn targets(ends: &[&str], leave_out: &[i64]) -> Targets {
        let ends: Vec<String> = ends.iter().map(|e| regex::escape(e)).collect();
        let numbers: Vec<String> = leave_out.iter().map(i64::to_string).collect();
        let exclude = format!(r"([^.]*\.)*({})\..*", numbers.join("|"));
        Targets {
            exclude: (!numbers.is_empty()).then_some(Names::Pattern(exclude)),
            ..Targets::pattern(format!(r"([^.]*\.)*\d+\.({})", ends.join("|")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use modl_core::SiteKind;

    fn sites(paths: &[&str]) -> Vec<Site> {
        let site = |(index, path): (usize, &&str)| Site {
            path: path.to_string(),
            kind: SiteKind::Sublayer,
            input: 4,
            output: 4,
            index,
        };
        paths.iter().enumerate().map(site).collect()
    }

    #[test]
    fn sites_are_parts_and_layers_and_back() {
        let all = sites(&[
            "e.layer.0.output",
            "e.layer.0.att.output",
            "e.layer.1.output",
            "e.layer.2.output",
        ]);
        let own = [all[0].clone(), all[3].clone()];
        let places = Places::new(&own, &all).unwrap();
        assert_eq!(places.leave_out, [1]);
        let ends: Vec<&str> = places.ends.iter().map(String::as_str).collect();
        let found = Places::targets(&ends, &places.leave_out);
        let found: Vec<usize> = found.select(&all).unwrap().iter().map(|s| s.index).collect();
        assert_eq!(found, [0, 3]);
        assert!(Places::new(&all[..3], &all).is_err(), "layer 1 has no `att.output`");
    }
}

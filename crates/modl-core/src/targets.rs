//! Which sites a module attaches to, by PEFT's rules.

use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::{Error, Result, Site, SiteKind};

/// What transformers calls the output layer of a language model.
const OUTPUT_LAYER: &str = "lm_head";

/// Names of sites: a list, or one pattern.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Names {
    /// A site fits if its path is one of the names, or ends with a dot and one of them.
    List(Vec<String>),
    /// A regular expression that the whole path has to fit; or all sites of a kind:
    /// `all-linear`, `all-conv`, `all-embedding`, `all-norm`, `all-batch-norm`, `all-tokens`,
    /// `all-attention`, `all-router`, `all-experts`, `all-sublayer`, `all-block`, `all-conv-block`,
    /// or several of them with `|` between. As in PEFT, the layer that makes logits of the last
    /// hidden states (`lm_head`) is not among all linear ones.
    Pattern(String),
    /// The sites of each of several targets.
    Any(Vec<Targets>),
}

/// Which sites a module attaches to.
///
/// ```
/// # use modl_core::Targets;
/// let attention = Targets::names(["query", "value"]);
/// let upper = Targets { layers: Some(vec![4, 5]), ..attention };
/// # let _ = upper;
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Targets {
    /// The sites that fit.
    pub names: Names,
    /// Those among them that are left out all the same.
    pub exclude: Option<Names>,
    /// Only these layers: a layer's number is the first number in the path that stands alone.
    pub layers: Option<Vec<i64>>,
    /// The names of the lists of layers in which `layers` counts, for instance `layer`; any where
    /// it is empty.
    pub layers_pattern: Vec<String>,
}

impl Targets {
    /// Sites by name or end of name.
    pub fn names<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Self::new(Names::List(names.into_iter().map(Into::into).collect()))
    }

    /// Sites whose whole path fits a regular expression.
    pub fn pattern(pattern: impl Into<String>) -> Self {
        Self::new(Names::Pattern(pattern.into()))
    }

    /// The sites of each of several targets.
    pub fn any(targets: impl IntoIterator<Item = Targets>) -> Self {
        Self::new(Names::Any(targets.into_iter().collect()))
    }

    /// Sites that fit, without further conditions.
    pub fn new(names: Names) -> Self {
        Targets { names, exclude: None, layers: None, layers_pattern: Vec::new() }
    }

    /// Whether these targets take `site`, whatever other sites there are.
    ///
    /// # Errors
    /// Where a pattern is not a regular expression.
    pub fn take(&self, site: &Site) -> Result<bool> {
        Ok(self.filter(std::slice::from_ref(site))?.len() == 1)
    }

    /// The sites among `sites` that fit, in order.
    ///
    /// # Errors
    /// Where nothing fits, or a name of the list fits no site: with the nearest name.
    pub fn select<'a>(&self, sites: &'a [Site]) -> Result<Vec<&'a Site>> {
        let found = self.filter(sites)?;
        if let Names::List(names) = &self.names {
            // PEFT is silent as long as one name of several fits.
            for name in names {
                if !sites.iter().any(|s| ends_with(&s.path, name)) {
                    return Err(Error::unknown("target module", name, last_names(sites)));
                }
            }
        }
        if let Names::Any(parts) = &self.names {
            for part in parts {
                part.select(sites)?;
            }
        }
        if found.is_empty() {
            let all = last_names(sites).join(", ");
            return Err(Error::invalid(
                "target modules",
                format!("no site fits {self:?}; the backbone has sites named {all}"),
            ));
        }
        Ok(found)
    }

    fn filter<'a>(&self, sites: &'a [Site]) -> Result<Vec<&'a Site>> {
        let fits = self.test()?;
        Ok(sites.iter().filter(|s| fits(s)).collect())
    }

    fn test(&self) -> Result<Fits<'_>> {
        if self.layers.is_some() && !matches!(self.names, Names::List(_)) {
            return Err(Error::invalid(
                "layers_to_transform",
                "cannot be used with a pattern; put the layers into the pattern",
            ));
        }
        let wanted = Matcher::new(&self.names)?;
        let unwanted = self.exclude.as_ref().map(Matcher::new).transpose()?;
        let layers = self.layers.as_ref().map(|l| LayerFilter::new(l, &self.layers_pattern));
        let layers = layers.transpose()?;
        Ok(Box::new(move |s: &Site| {
            wanted.fits(s)
                && !unwanted.as_ref().is_some_and(|m| m.fits(s))
                && layers.as_ref().is_none_or(|l| l.fits(&s.path))
        }))
    }
}

/// The different ends of the paths: `query`, `key`, …
fn last_names(sites: &[Site]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for s in sites {
        let last = s.path.rsplit('.').find(|p| p.parse::<u64>().is_err()).unwrap_or(&s.path);
        if !names.iter().any(|n| n == last) {
            names.push(last.to_owned());
        }
    }
    names
}

fn ends_with(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

/// Whether a site fits.
type Fits<'a> = Box<dyn Fn(&Site) -> bool + 'a>;

enum Matcher<'a> {
    List(&'a [String]),
    Kinds(Vec<SiteKind>),
    Pattern(Box<Regex>),
    Any(Vec<Fits<'a>>),
}

impl<'a> Matcher<'a> {
    fn new(names: &'a Names) -> Result<Self> {
        Ok(match names {
            Names::List(list) => Matcher::List(list),
            Names::Pattern(p) => match kinds(p) {
                Some(kinds) => Matcher::Kinds(kinds),
                None => Matcher::Pattern(Box::new(regex(&format!("^(?:{p})$"), p)?)),
            },
            Names::Any(parts) => {
                Matcher::Any(parts.iter().map(Targets::test).collect::<Result<_>>()?)
            }
        })
    }

    fn fits(&self, site: &Site) -> bool {
        match self {
            Matcher::List(names) => names.iter().any(|n| ends_with(&site.path, n)),
            Matcher::Kinds(kinds) => {
                kinds.contains(&site.kind) && !ends_with(&site.path, OUTPUT_LAYER)
            }
            Matcher::Pattern(p) => p.is_match(&site.path),
            Matcher::Any(parts) => parts.iter().any(|fits| fits(site)),
        }
    }
}

/// The kinds of `all-linear`, or of several with `|` between them.
fn kinds(pattern: &str) -> Option<Vec<SiteKind>> {
    pattern.split('|').map(|p| p.strip_prefix("all-").and_then(SiteKind::named)).collect()
}

fn regex(pattern: &str, as_given: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|e| Error::invalid(format!("pattern `{as_given}`"), e.to_string()))
}

/// PEFT's `layers_to_transform`.
struct LayerFilter<'a> {
    layers: &'a [i64],
    patterns: Vec<Regex>,
}

impl<'a> LayerFilter<'a> {
    fn new(layers: &'a [i64], patterns: &[String]) -> Result<Self> {
        let any = [r"[^.]*".to_owned()];
        let names = if patterns.is_empty() { &any[..] } else { patterns };
        // PEFT's expression is lazy: the first number wins, so that `layers.1.experts.0` is 1.
        let make = |n: &String| regex(&format!(r"^.*?\.{n}\.(\d+)\."), n);
        Ok(LayerFilter { layers, patterns: names.iter().map(make).collect::<Result<_>>()? })
    }

    fn fits(&self, path: &str) -> bool {
        let number =
            self.patterns.iter().find_map(|p| p.captures(path)?.get(1)?.as_str().parse().ok());
        number.is_some_and(|n: i64| self.layers.contains(&n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sites() -> Vec<Site> {
        let paths = [
            "embeddings.word_embeddings",
            "encoder.layer.0.attention.self.query",
            "encoder.layer.0.attention.output.dense",
            "encoder.layer.0.output.dense",
            "encoder.layer.1.attention.self.query",
        ];
        let site = |(index, path): (usize, &&str)| Site {
            path: path.to_string(),
            kind: if index == 0 { SiteKind::Embedding } else { SiteKind::Linear },
            input: 4,
            output: 4,
            index,
        };
        paths.iter().enumerate().map(site).collect()
    }

    fn chosen(t: &Targets) -> Vec<usize> {
        t.select(&sites()).unwrap().iter().map(|s| s.index).collect()
    }

    #[test]
    fn names_fit_whole_ends_of_paths() {
        assert_eq!(chosen(&Targets::names(["query"])), [1, 4]);
        assert_eq!(chosen(&Targets::names(["output.dense"])), [2, 3]);
        assert_eq!(chosen(&Targets::pattern(r".*layer\.0.*dense")), [2, 3]);
        assert!(
            Targets::pattern("layer.0").select(&sites()).is_err(),
            "a pattern fits the whole path"
        );
        assert_eq!(chosen(&Targets::pattern("all-linear")), [1, 2, 3, 4]);
    }

    #[test]
    fn layers_and_exclusions_narrow() {
        let query = Targets::names(["query"]);
        assert_eq!(chosen(&Targets { layers: Some(vec![1]), ..query.clone() }), [4]);
        let exclude = Some(Names::List(vec!["layer.1.attention.self.query".into()]));
        assert_eq!(chosen(&Targets { exclude, ..query }), [1]);
    }

    #[test]
    fn any_of_several_targets_and_none_of_them_in_vain() {
        let query = Targets { layers: Some(vec![1]), ..Targets::names(["query"]) };
        let both = Targets::any([query, Targets::pattern("all-embedding")]);
        assert_eq!(chosen(&both), [0, 4]);
        let text = serde_json::to_string(&both).unwrap();
        assert_eq!(serde_json::from_str::<Targets>(&text).unwrap(), both);
        let vain = Targets::any([Targets::names(["query"]), Targets::pattern("all-conv")]);
        assert!(vain.select(&sites()).is_err());
        let exclude = Some(Names::Any(vec![Targets::pattern(".*query")]));
        assert_eq!(chosen(&Targets { exclude, ..Targets::pattern("all-linear") }), [2, 3]);
    }

    #[test]
    fn one_typo_among_good_names_is_an_error_with_the_nearest() {
        let e = Targets::names(["query", "densee"]).select(&sites()).unwrap_err();
        let Error::Unknown { nearest, .. } = &e else { panic!("{e}") };
        assert_eq!(nearest.as_deref(), Some("dense"));
    }
}

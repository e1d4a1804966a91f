//! Neural module networks: each example has a tree that says which modules compute it, and the trees
//! of a batch are computed together.
//!
//! Trees are written as the layouts of the paper: `measure(and(find[red], find[circle]))`. All nodes of
//! the same height, module and number of parts, from all trees, are one call, so a batch takes as
//! many calls as there are different ones, and not as many as there are nodes. A module that stands
//! at several nodes has its gradients added up.
//!
//! Andreas, Rohrbach, Darrell, Klein 2016, *Neural Module Networks*, arXiv 1511.02799; survey §5.3.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use modl_core::{Error, Result, Tensor};
use serde::{Deserialize, Serialize};

/// A module and the trees that it takes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tree {
    /// The module.
    pub module: String,
    /// What it takes, in order; a leaf takes the example alone.
    pub parts: Vec<Tree>,
}

/// The deepest tree that is read: each level is a call within a call.
const DEEPEST: usize = 256;

impl Tree {
    /// A module that takes nothing but the example.
    pub fn leaf(module: impl Into<String>) -> Self {
        Tree { module: module.into(), parts: Vec::new() }
    }

    /// A module that takes these.
    pub fn of(module: impl Into<String>, parts: impl IntoIterator<Item = Tree>) -> Self {
        Tree { module: module.into(), parts: parts.into_iter().collect() }
    }

    fn read(text: &str, from: &mut usize, depth: usize) -> Result<Tree> {
        let wrong = |at: usize, problem: &str| {
            Error::invalid(format!("tree `{text}`"), format!("{problem} at character {at}"))
        };
        if depth > DEEPEST {
            return Err(wrong(*from, &format!("is deeper than {DEEPEST}")));
        }
        let rest = text.get(*from..).unwrap_or_default();
        let length = rest.find(['(', ')', ',']).unwrap_or(rest.len());
        let module = rest.get(..length).unwrap_or_default().trim();
        if module.is_empty() {
            return Err(wrong(*from, "a module is missing"));
        }
        *from += length;
        let mut tree = Tree::leaf(module);
        if !text.get(*from..).unwrap_or_default().starts_with('(') {
            return Ok(tree);
        }
        loop {
            *from += 1; // past `(` or `,`
            tree.parts.push(Tree::read(text, from, depth + 1)?);
            match text.get(*from..).and_then(|t| t.chars().next()) {
                Some(',') => {}
                Some(')') => break,
                _ => return Err(wrong(*from, "`)` is missing")),
            }
        }
        *from += 1;
        // Blanks after the bracket.
        let rest = text.get(*from..).unwrap_or_default();
        *from += rest.len() - rest.trim_start().len();
        Ok(tree)
    }
}

impl FromStr for Tree {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut from = 0;
        let tree = Tree::read(text, &mut from, 0)?;
        match text.get(from..) {
            Some("") => Ok(tree),
            rest => {
                let problem = format!("goes on after its end: `{}`", rest.unwrap_or_default());
                Err(Error::invalid(format!("tree `{text}`"), problem))
            }
        }
    }
}

impl TryFrom<String> for Tree {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Tree> for String {
    fn from(tree: Tree) -> String {
        tree.to_string()
    }
}

impl fmt::Display for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.module)?;
        for (i, part) in self.parts.iter().enumerate() {
            write!(f, "{}{part}", if i == 0 { "(" } else { ", " })?;
        }
        f.write_str(if self.parts.is_empty() { "" } else { ")" })
    }
}

/// A node of one of the trees.
struct Flat<'a> {
    tree: usize,
    module: &'a str,
    parts: Vec<usize>,
    height: usize,
}

/// The values at the roots, `[trees, …]`, in the order of the trees.
///
/// `call` computes one module for n nodes at once: their examples by the trees' numbers, and for each
/// part what the n nodes take, `[n, …]`; it gives `[n, …]`, row by row.
///
/// # Errors
/// Where there is no tree, a call gives other than n rows, values that meet differ in shape, and what
/// `call` gives.
pub fn run_trees(
    trees: &[Tree],
    mut call: impl FnMut(&str, &[usize], &[Tensor]) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut nodes: Vec<Flat> = Vec::new();
    let roots: Vec<usize> =
        trees.iter().enumerate().map(|(i, tree)| flatten(i, tree, &mut nodes)).collect();
    if roots.is_empty() {
        return Err(Error::invalid("trees", "there are none"));
    }
    let mut groups: BTreeMap<(usize, &str, usize), Vec<usize>> = BTreeMap::new();
    for (i, node) in nodes.iter().enumerate() {
        groups.entry((node.height, node.module, node.parts.len())).or_default().push(i);
    }
    // Of each node the call that computed it and its row there.
    let mut at = vec![(0, 0); nodes.len()];
    let mut values: Vec<Tensor> = Vec::with_capacity(groups.len());
    for ((_, module, arity), members) in groups {
        let examples: Vec<usize> =
            members.iter().filter_map(|i| Some(nodes.get(*i)?.tree)).collect();
        let mut parts = Vec::with_capacity(arity);
        for p in 0..arity {
            let wanted: Vec<(usize, usize)> = members
                .iter()
                .filter_map(|i| at.get(*nodes.get(*i)?.parts.get(p)?).copied())
                .collect();
            parts.push(gather(&values, &wanted)?);
        }
        let value = call(module, &examples, &parts)?;
        if value.dim() == 0 || value.len_of(0) != members.len() as i64 {
            let problem = format!("gives {value:?} for {} nodes", members.len());
            return Err(Error::invalid(format!("module `{module}` of trees"), problem));
        }
        for (row, i) in members.iter().enumerate() {
            if let Some(place) = at.get_mut(*i) {
                *place = (values.len(), row);
            }
        }
        values.push(value);
    }
    let wanted: Vec<(usize, usize)> = roots.iter().filter_map(|i| at.get(*i).copied()).collect();
    gather(&values, &wanted)
}

/// The number of a tree's root among `nodes`.
fn flatten<'a>(tree: usize, root: &'a Tree, nodes: &mut Vec<Flat<'a>>) -> usize {
    let parts: Vec<usize> = root.parts.iter().map(|part| flatten(tree, part, nodes)).collect();
    let below = parts.iter().filter_map(|i| nodes.get(*i)).map(|n| n.height + 1);
    let height = below.max().unwrap_or(0);
    nodes.push(Flat { tree, module: &root.module, parts, height });
    nodes.len() - 1
}

/// One batch of rows of several tensors, each with the tensor's number and its row there.
fn gather(values: &[Tensor], wanted: &[(usize, usize)]) -> Result<Tensor> {
    let mut from: Vec<usize> = wanted.iter().map(|(value, _)| *value).collect();
    from.sort_unstable();
    from.dedup();
    let mut starts = BTreeMap::new();
    let (mut all, mut start) = (Vec::with_capacity(from.len()), 0);
    for i in from {
        let Some(value) = values.get(i) else { continue };
        starts.insert(i, start);
        start += value.len_of(0);
        all.push(value.clone());
    }
    let shapes = |t: &Tensor| t.size().get(1..).map(<[i64]>::to_vec);
    if let Some(pair) = all.windows(2).find(|pair| shapes(&pair[0]) != shapes(&pair[1])) {
        let (a, b) = (pair[0].size(), pair[1].size());
        let problem = format!("are {a:?} and {b:?} where trees of a batch want one shape");
        return Err(Error::invalid("values of trees", problem));
    }
    let index: Vec<i64> =
        wanted.iter().filter_map(|(i, row)| Some(starts.get(i)? + *row as i64)).collect();
    let one = all.len() == 1;
    let all = if one { all.swap_remove(0) } else { Tensor::cat(&all, 0)? };
    let index = Tensor::from_slice(&index, &[index.len() as i64], all.device())?;
    all.index_select(0, &index)
}

//! What a router claims of itself.

/// What a router claims, and [`check_router`](super::check_router) puts to the test.
#[derive(Debug, Clone)]
pub struct RouterClaims {
    /// Each α sums to 1.
    pub sums_to_one: bool,
    /// At most so many modules are active for a row or token.
    pub at_most: Option<usize>,
    /// Gradients reach the router's own parameters.
    pub learns: bool,
    /// α of a row depends on the other rows of the batch.
    pub looks_at_batch: bool,
    /// In training choices are drawn: other seeds give other α.
    pub draws: bool,
    /// α of a token depends on later tokens.
    pub looks_ahead: bool,
    /// The names of tasks that it knows, for routers that are told the task.
    pub tasks: Vec<String>,
    /// The features that it reads: name, shape of one row.
    pub features: Vec<(String, Vec<i64>)>,
    /// The kind of label by which `tasks` are given. Default: `task`.
    pub label: &'static str,
    /// The number of ids of tokens that it knows, for routers that read them.
    pub vocabulary: Option<u64>,
}

impl RouterClaims {
    /// A learned distribution over all modules.
    pub fn soft() -> Self {
        RouterClaims {
            sums_to_one: true,
            at_most: None,
            learns: true,
            looks_at_batch: false,
            draws: false,
            looks_ahead: false,
            tasks: Vec::new(),
            features: Vec::new(),
            label: "task",
            vocabulary: None,
        }
    }

    /// A learned choice of `k` modules.
    pub fn top_k(k: usize) -> Self {
        RouterClaims { at_most: Some(k), ..Self::soft() }
    }

    /// A choice without parameters.
    pub fn fixed() -> Self {
        RouterClaims { learns: false, ..Self::soft() }
    }
}

//! Errors as values: what was wrong, where, and what to do about it.

use std::fmt;
use std::path::{Path, PathBuf};

/// What every fallible function of modl returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something was refused. Match on the variant; print it for a person.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// libtorch refused an operation.
    #[error("{op} on {shapes}: {message}")]
    Op {
        /// Name of the operation, for instance `matmul`.
        op: &'static str,
        /// Shapes and kinds of its operands, for instance `f32[2, 3], f32[4, 5]`.
        shapes: String,
        /// The first line of libtorch's message.
        message: String,
    },
    /// An error at a named place: a site, a parameter, a module.
    #[error("at `{path}`: {cause}")]
    At {
        /// The place.
        path: String,
        /// What went wrong there. It is part of the message, and so no `source` of it.
        cause: Box<Error>,
    },
    /// A value that a caller or a file gave does not fit.
    #[error("{what}: {problem}")]
    Invalid {
        /// What does not fit, for instance `lora.r`.
        what: String,
        /// Why, and what would.
        problem: String,
    },
    /// A name that nobody knows.
    #[error("unknown {kind} `{name}`{}; known: {}", hint(.nearest), .known.join(", "))]
    Unknown {
        /// The kind of thing that was named, for instance `router`.
        kind: String,
        /// The name as given.
        name: String,
        /// The known name that is most like it.
        nearest: Option<String>,
        /// All known names.
        known: Vec<String>,
    },
    /// Tensors in a file against the parameters that they are meant for.
    #[error("{0}")]
    Mismatch(Box<Mismatch>),
    /// A name that is taken already.
    #[error("{kind} `{name}` exists already; choose another name or remove the first")]
    Duplicate {
        /// The kind of thing, for instance `parameter`.
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// Something valid that modl does not do.
    #[error("not supported: {what}; {advice}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// What to do instead.
        advice: String,
    },
    /// A file could not be read or written.
    #[error("{}: {problem}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        problem: String,
    },
}

fn hint(nearest: &Option<String>) -> String {
    nearest.as_ref().map(|n| format!("; did you mean `{n}`?")).unwrap_or_default()
}

impl Error {
    /// A value that does not fit.
    pub fn invalid(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Error::Invalid { what: what.into(), problem: problem.into() }
    }

    /// Something that is not supported, and what to do instead.
    pub fn unsupported(what: impl Into<String>, advice: impl Into<String>) -> Self {
        Error::Unsupported { what: what.into(), advice: advice.into() }
    }

    /// A file that could not be read or written.
    pub fn file(path: impl AsRef<Path>, problem: impl fmt::Display) -> Self {
        Error::File { path: path.as_ref().to_owned(), problem: problem.to_string() }
    }

    /// A name that is not among `known`; the nearest one is worked out.
    pub fn unknown<S: AsRef<str>>(
        kind: impl Into<String>,
        name: &str,
        known: impl IntoIterator<Item = S>,
    ) -> Self {
        let known: Vec<String> = known.into_iter().map(|s| s.as_ref().to_owned()).collect();
        let nearest = crate::nearest(name, known.iter().map(String::as_str)).map(str::to_owned);
        Error::Unknown { kind: kind.into(), name: name.to_owned(), nearest, known }
    }

    /// The error without the places around it.
    pub fn root(&self) -> &Error {
        match self {
            Error::At { cause, .. } => cause.root(),
            other => other,
        }
    }
}

/// Adds the place to an error.
pub trait ResultExt<T> {
    /// Says where an error arose: a site, a parameter, a module.
    fn at(self, path: impl AsRef<str>) -> Result<T>;
}

impl<T> ResultExt<T> for Result<T> {
    fn at(self, path: impl AsRef<str>) -> Result<T> {
        self.map_err(|e| Error::At { path: path.as_ref().to_owned(), cause: Box::new(e) })
    }
}

/// All that does not fit between named tensors and the parameters that they are meant for.
#[derive(Debug, Default, Clone)]
pub struct Mismatch {
    /// Where the tensors came from.
    pub source: String,
    /// Wanted and not there, each with the unexpected name most like it.
    pub missing: Vec<(String, Option<String>)>,
    /// There and not wanted, each with the wanted name most like it.
    pub unexpected: Vec<(String, Option<String>)>,
    /// Name, wanted shape, found shape.
    pub misshapen: Vec<(String, Vec<i64>, Vec<i64>)>,
}

impl Mismatch {
    /// Whether everything fits.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.misshapen.is_empty()
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} missing, {} unexpected, {} of another shape; nothing was loaded",
            self.source,
            self.missing.len(),
            self.unexpected.len(),
            self.misshapen.len()
        )?;
        let mut list = |what: &str, names: &[(String, Option<String>)]| -> fmt::Result {
            for (name, near) in names {
                write!(f, "\n  {what} {name}")?;
                if let Some(near) = near {
                    write!(f, "  (nearest: {near})")?;
                }
            }
            Ok(())
        };
        list("missing   ", &self.missing)?;
        list("unexpected", &self.unexpected)?;
        for (name, wanted, found) in &self.misshapen {
            write!(f, "\n  shape      {name}: wanted {wanted:?}, found {found:?}")?;
        }
        Ok(())
    }
}

impl From<Mismatch> for Error {
    fn from(m: Mismatch) -> Self {
        Error::Mismatch(Box::new(m))
    }
}

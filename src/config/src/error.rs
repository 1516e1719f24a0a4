//! What can be wrong with a configuration, each with the file, line and key an operator has to look at.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// Where in the cloud-config something stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub file: Arc<PathBuf>,
    /// Counted from 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// Why no configuration could be made. There is no default to fall back to: a typo must never choose a weaker mode
/// (protocols/kcrypt.md §10.2).
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {}: {source}; make it readable or take it away", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },

    #[error("{}: {what}; the limit is {limit}", path.display())]
    TooMuch { path: PathBuf, what: &'static str, limit: usize },

    #[error("{}:{line}:{column}: not valid YAML: {message}", path.display())]
    Syntax { path: PathBuf, line: usize, column: usize, message: String },

    #[error("{place}: {key}: expected {expected}, found {found}")]
    WrongType { place: Place, key: String, expected: &'static str, found: &'static str },

    #[error("{place}: unknown key {key}{}", hint(nearest.as_deref()))]
    UnknownKey { place: Place, key: String, nearest: Option<String> },

    #[error("{place}: {key} is written twice in one mapping; keep one")]
    Duplicate { place: Place, key: String },

    #[error(
        "{place}: {key} stands in a second YAML document, which Kairos never reads; move it above the `---`"
    )]
    SecondDocument { place: Place, key: String },

    #[error("{place}: {key}: {why}")]
    Invalid { place: Place, key: String, why: String },

    #[error(
        "{first_key} at {first} and {second_key} at {second} mean the same thing and say something different; keep one"
    )]
    Conflict { first_key: String, first: Place, second_key: String, second: Place },

    #[error(
        "{key} is {known} at {first} and {found} at {second}, and these do not merge; write it one way"
    )]
    Merge { key: String, first: Place, known: &'static str, second: Place, found: &'static str },

    #[error(
        "{place}: config_url: {url}: {why}. Without it no key server is configured, and that none is meant is not for this program to guess: make the document reachable, or write kcrypt.challenger.challenger_server into a local file or on the kernel command line (\"\" for none)"
    )]
    NotFetched { place: Place, url: String, why: String },

    #[error(
        "the configuration is not complete, and nothing is made from a part of it: config_url: {document}. Make it reachable, or take config_url out"
    )]
    Incomplete { document: String },

    #[error(
        "{}: {limit} bytes or more, which Kairos does not read, and line {line} holds settings of {key}; move them to a file of their own",
        path.display()
    )]
    TooLarge { path: PathBuf, line: usize, key: &'static str, limit: usize },

    #[error("{place}: {key} needs {missing} as well")]
    Missing { place: Place, key: String, missing: &'static str },
}

fn hint(nearest: Option<&str>) -> String {
    nearest.map_or_else(String::new, |known| format!("; did you mean {known}?"))
}

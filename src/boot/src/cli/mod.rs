//! The command line of `kcrypt-discovery-challenger`. What there is stands once, in [`table`]: the parser goes by it, `--help`
//! shows it, and the man pages and shell completions are made from it (`tests/docs`).

pub mod table;
mod usage;

use std::ffi::{OsStr, OsString};
use std::time::Duration;

use lexopt::prelude::{Long, Short, Value};

use crate::BootError;

pub use usage::usage;

/// The program's name.
pub const NAME: &str = "kcrypt-discovery-challenger";

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Pubhash,
    Unlock,
    Encrypt,
    Rekey,
    Get,
    Info,
    CheckNv,
    ReadNv,
    Cleanup,
    Doctor,
    DiscoveryPassword,
}

/// A verb, or the program without one.
#[derive(Debug)]
pub struct Verb {
    pub command: Command,
    /// Empty for the program without a verb.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// What the line leaves open; empty if nothing. Paragraphs are separated by an empty line.
    pub detail: &'static str,
    pub operand: Option<Operand>,
    pub flags: &'static [&'static Flag],
}

/// What stands behind a verb without a dash.
#[derive(Debug)]
pub struct Operand {
    pub name: &'static str,
    pub help: &'static str,
    pub number: Number,
}

/// How many operands a verb takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    One,
    Any,
}

/// An option.
#[derive(Debug, PartialEq, Eq)]
pub struct Flag {
    pub long: &'static str,
    pub short: Option<char>,
    /// What its value is called; `None`: it takes none.
    pub value: Option<&'static str>,
    pub repeated: bool,
    pub help: &'static str,
}

/// A command line that has been read.
#[derive(Debug)]
pub struct Invocation {
    pub verb: &'static Verb,
    pub operands: Vec<String>,
    given: Vec<(&'static Flag, OsString)>,
}

impl Invocation {
    /// Reads a command line.
    ///
    /// An unknown verb is an error, as with Kairos' second generation; the first printed the pubhash for it, and whoever
    /// mistyped `cleanup` or `get` took that for the answer.
    ///
    /// # Errors
    /// [`BootError::Usage`].
    pub fn parse(mut parser: lexopt::Parser) -> Result<Self, BootError> {
        let mut invocation =
            Self { verb: &table::PUBHASH, operands: Vec::new(), given: Vec::new() };
        while let Some(argument) = parser.next().map_err(refused)? {
            match argument {
                Value(text) => invocation.take_word(text)?,
                Long(name) => {
                    let flag = invocation.known(|flag| flag.long == name);
                    let flag = flag.ok_or_else(|| invocation.unknown(&format!("--{name}")))?;
                    invocation.take(flag, &mut parser)?;
                }
                Short(letter) => {
                    let flag = invocation.known(|flag| flag.short == Some(letter));
                    let flag = flag.ok_or_else(|| invocation.unknown(&format!("-{letter}")))?;
                    invocation.take(flag, &mut parser)?;
                }
            }
        }
        invocation.complete()
    }

    /// Whether the option was given.
    #[must_use]
    pub fn has(&self, flag: &Flag) -> bool {
        self.values(flag).next().is_some()
    }

    /// The values of an option that may be repeated.
    pub fn values<'a>(&'a self, flag: &'a Flag) -> impl Iterator<Item = &'a OsStr> {
        self.given
            .iter()
            .filter(move |(given, _)| *given == flag)
            .map(|(_, value)| value.as_os_str())
    }

    /// The value of an option that is given once at most.
    #[must_use]
    pub fn value<'a>(&'a self, flag: &'a Flag) -> Option<&'a OsStr> {
        self.values(flag).next()
    }

    /// The values as text.
    ///
    /// # Errors
    /// [`BootError::Usage`] when one is not UTF-8.
    pub fn texts(&self, flag: &Flag) -> Result<Vec<String>, BootError> {
        let wrong = || BootError::Usage(format!("--{}: its value is not UTF-8", flag.long));
        self.values(flag).map(|value| value.to_str().map(str::to_owned).ok_or_else(wrong)).collect()
    }

    /// The value as text.
    ///
    /// # Errors
    /// As [`Invocation::texts`].
    pub fn text(&self, flag: &Flag) -> Result<Option<String>, BootError> {
        Ok(self.texts(flag)?.into_iter().next())
    }

    fn known(&self, is: impl Fn(&Flag) -> bool) -> Option<&'static Flag> {
        let all = table::GLOBAL.iter().chain(self.verb.flags);
        all.copied().find(|flag| is(flag))
    }

    fn take(&mut self, flag: &'static Flag, parser: &mut lexopt::Parser) -> Result<(), BootError> {
        if !flag.repeated && flag.value.is_some() && self.has(flag) {
            return Err(BootError::Usage(format!("--{} was given twice", flag.long)));
        }
        let value =
            if flag.value.is_some() { parser.value().map_err(refused)? } else { OsString::new() };
        self.given.push((flag, value));
        Ok(())
    }

    fn take_word(&mut self, text: OsString) -> Result<(), BootError> {
        let text = text
            .into_string()
            .map_err(|text| BootError::Usage(format!("{} is not UTF-8", text.to_string_lossy())))?;
        if self.verb.command == Command::Pubhash {
            let verb = table::VERBS.iter().copied().find(|verb| verb.name == text);
            self.verb = verb.ok_or_else(|| no_such(&text))?;
            return Ok(());
        }
        let room = self
            .verb
            .operand
            .as_ref()
            .is_some_and(|operand| operand.number == Number::Any || self.operands.is_empty());
        if !room {
            return Err(self.unknown(&text));
        }
        self.operands.push(text);
        Ok(())
    }

    fn complete(self) -> Result<Self, BootError> {
        // What stood before the verb may be none of its own.
        if let Some((stray, _)) =
            self.given.iter().find(|(given, _)| self.known(|flag| flag == *given).is_none())
        {
            return Err(self.unknown(&format!("--{}", stray.long)));
        }
        let wanted = self.verb.operand.as_ref().filter(|operand| operand.number == Number::One);
        if let Some(operand) = wanted
            && self.operands.is_empty()
            && !self.has(&table::HELP)
        {
            return Err(BootError::Usage(format!("{} needs {}", self.verb.name, operand.name)));
        }
        Ok(self)
    }

    fn unknown(&self, what: &str) -> BootError {
        let name = if self.verb.name.is_empty() { "without a command" } else { self.verb.name };
        let owners: Vec<_> = table::VERBS
            .iter()
            .filter(|verb| verb.flags.iter().any(|flag| what.strip_prefix("--") == Some(flag.long)))
            .map(|verb| verb.name)
            .collect();
        let hint = if owners.is_empty() {
            String::new()
        } else {
            format!("; it goes with {}, and stands behind it", owners.join(", "))
        };
        BootError::Usage(format!(
            "{what} is unknown {}{name}{hint}",
            if self.verb.name.is_empty() { "" } else { "to " }
        ))
    }
}

fn no_such(text: &str) -> BootError {
    let names: Vec<_> = table::VERBS.iter().map(|verb| verb.name).collect();
    BootError::Usage(format!("no such command: {text}. There are {}", names.join(", ")))
}

fn refused(error: lexopt::Error) -> BootError {
    BootError::Usage(error.to_string())
}

/// Reads a handle or index as cloud-config has it (`protocols/kcrypt.md` §9.2).
///
/// # Errors
/// [`BootError::Usage`] when it is no number, or not in `range`.
pub fn handle(
    flag: &Flag,
    text: &str,
    range: std::ops::RangeInclusive<u32>,
) -> Result<u32, BootError> {
    let number = latchkey_config::number(text);
    number.filter(|number| range.contains(number)).ok_or_else(|| {
        BootError::Usage(format!(
            "--{} {text}: a number from 0x{:08x} to 0x{:08x} is wanted",
            flag.long,
            range.start(),
            range.end()
        ))
    })
}

/// The value of an option in whole seconds, a day at most.
///
/// # Errors
/// [`BootError::Usage`].
pub fn seconds(flag: &Flag, text: &str) -> Result<Duration, BootError> {
    let seconds = text.parse().ok().filter(|seconds| *seconds <= 86_400);
    seconds.map(Duration::from_secs).ok_or_else(|| {
        BootError::Usage(format!("--{} {text}: not a number of seconds up to 86400", flag.long))
    })
}

/// Reads a list of PCRs: `0,7,11`.
///
/// # Errors
/// [`BootError::Usage`].
pub fn pcrs(text: &str) -> Result<Vec<u8>, BootError> {
    let parse = |number: &str| number.trim().parse().ok().filter(|pcr: &u8| *pcr < 24);
    let mut pcrs = text.split(',').map(parse).collect::<Option<Vec<_>>>().ok_or_else(|| {
        BootError::Usage(format!(
            "--{} {text}: numbers from 0 to 23 with commas between them are wanted, as in 0,7,11",
            table::PCRS.long
        ))
    })?;
    pcrs.sort_unstable();
    pcrs.dedup();
    Ok(pcrs)
}

#[cfg(test)]
mod tests;

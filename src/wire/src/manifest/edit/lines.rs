//! A YAML document as lines: where a field of a block mapping begins and ends.

use std::ops::Range;

use zeroize::Zeroizing;

use super::{changes::Change, read};

/// A document as lines.
pub(super) struct Lines<'a> {
    lines: Vec<&'a str>,
}

impl<'a> Lines<'a> {
    pub(super) fn of(text: &'a str) -> Self {
        Self { lines: text.split_inclusive('\n').collect() }
    }

    /// The byte at which a line starts.
    pub(super) fn start(&self, line: usize) -> usize {
        self.lines.iter().take(line).map(|line| line.len()).sum()
    }

    fn all(&self) -> Range<usize> {
        0..self.lines.len()
    }

    /// Blanks before a line's text, or `None` for a line without any; the dash of the item that begins there is a blank.
    fn indent(&self, line: usize, item: Option<usize>) -> Option<usize> {
        let line_text = self.lines.get(line)?;
        let text = line_text.trim_start_matches(' ');
        let text = match text.strip_prefix('-') {
            Some(rest) if item == Some(line) => rest.trim_start_matches(' '),
            _ => text,
        };
        let indent = line_text.len() - text.len();
        let filler = text.trim_end().is_empty()
            || text.starts_with('#')
            || indent == 0 && text.starts_with(['%', '-']) && read::is_filler(text);
        (!filler).then_some(indent)
    }

    /// The lines of the value under `key` in the block mapping that has `range` and `indent`: the key's line to the last
    /// line that is further in (or, of a list, as far in).
    fn field(
        &self,
        range: &Range<usize>,
        item: Option<usize>,
        indent: usize,
        key: &str,
    ) -> Option<Range<usize>> {
        let first = range.clone().find(|&line| {
            self.indent(line, item) == Some(indent) && self.has_key(line, item, key)
        })?;
        let mut end = first + 1;
        for line in first + 1..range.end {
            let Some(here) = self.indent(line, None) else { continue };
            let dash = self.lines.get(line).is_some_and(|text| text.trim_start().starts_with('-'));
            if here < indent || (here == indent && !dash) {
                break;
            }
            end = line + 1;
        }
        Some(first..end)
    }

    fn has_key(&self, line: usize, item: Option<usize>, key: &str) -> bool {
        let text = self.lines.get(line).map(|text| text.trim_start()).unwrap_or_default();
        let text = if item == Some(line) {
            text.strip_prefix('-').unwrap_or(text).trim_start()
        } else {
            text
        };
        after_key(text, key).is_some()
    }

    /// The lines inside the block mapping under `key`, and how far in they are.
    fn inside(
        &self,
        range: &Range<usize>,
        item: Option<usize>,
        indent: usize,
        key: &str,
    ) -> Option<(Range<usize>, usize)> {
        let field = self.field(range, item, indent, key)?;
        let value = after_key(self.lines.get(field.start)?.trim_start(), key)?.trim();
        let inside = field.start + 1..field.end;
        let deeper = inside.clone().find_map(|line| self.indent(line, None))?;
        ((value.is_empty() || value.starts_with('#')) && deeper > indent)
            .then_some((inside, deeper))
    }

    /// The items of a List: their lines, and how far in their fields are.
    pub(super) fn items(&self) -> Vec<(Range<usize>, usize)> {
        let Some(list) = self.field(&self.all(), None, 0, "items") else { return Vec::new() };
        let body = list.start + 1..list.end;
        let Some(dash) = body.clone().find_map(|line| self.indent(line, None)) else {
            return Vec::new();
        };
        let starts: Vec<usize> = body
            .clone()
            .filter(|&line| {
                self.indent(line, None) == Some(dash)
                    && self.lines.get(line).is_some_and(|text| text.trim_start().starts_with("- "))
            })
            .collect();
        let ends = starts.iter().skip(1).copied().chain([body.end]);
        starts
            .iter()
            .zip(ends)
            .map(|(&start, end)| (start..end, self.indent(start, Some(start)).unwrap_or(dash + 2)))
            .collect()
    }
}

/// What follows `key:` on a line that begins so; the key may be quoted.
fn after_key<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let rest = ["\"", "'", ""].iter().find_map(|quote| {
        text.strip_prefix(quote)?.strip_prefix(key)?.strip_prefix(quote)?.strip_prefix(':')
    })?;
    (rest.is_empty() || rest.starts_with([' ', '\n', '\r', '\t'])).then_some(rest)
}

/// The document with these changes; `None` if it is not written line by line where they belong.
pub(super) fn exchange_lines(
    document: &str,
    item: Option<usize>,
    changes: &[Change],
) -> Option<Zeroizing<String>> {
    let mut text = Zeroizing::new(document.to_owned());
    for change in changes {
        text = exchange(&text, item, change)?;
    }
    Some(text)
}

fn exchange(text: &str, item: Option<usize>, change: &Change) -> Option<Zeroizing<String>> {
    let lines = Lines::of(text);
    let (mut range, mut indent) = match item {
        None => (lines.all(), 0),
        Some(item) => lines.items().get(item).cloned()?,
    };
    let mut dash = item.map(|_| range.start);
    for key in change.path {
        (range, indent) = lines.inside(&range, dash, indent, key)?;
        dash = None;
    }
    let found = lines.field(&range, dash, indent, &change.key);
    let (place, indent) = if change.appends {
        let list = found?;
        let first = list.start + 1..list.end;
        let dash = first.clone().find_map(|line| lines.indent(line, None))?;
        lines
            .lines
            .get(first.clone().find(|&line| lines.indent(line, None).is_some())?)?
            .trim_start()
            .strip_prefix('-')?;
        (list.end..list.end, dash)
    } else {
        (found.unwrap_or(range.end..range.end), indent)
    };
    let newline = if text.contains("\r\n") { "\r\n" } else { "\n" };
    let written: String =
        change.yaml.lines().map(|line| format!("{:indent$}{line}{newline}", "")).collect();
    let mut out = Zeroizing::new(String::with_capacity(text.len() + written.len() + newline.len()));
    out.push_str(text.get(..lines.start(place.start))?);
    if !out.ends_with('\n') {
        out.push_str(newline);
    }
    out.push_str(&written);
    out.push_str(text.get(lines.start(place.end)..)?);
    Some(out)
}

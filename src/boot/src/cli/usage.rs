//! `--help`, as text for an 80-column console.

use super::table::{self, ABOUT, EXIT_CODES, GLOBAL, VERBS};
use super::{Flag, NAME, Number, Verb};

const WIDTH: usize = 80;

/// The help of a verb, or of the program.
#[must_use]
pub fn usage(verb: &Verb) -> String {
    if verb.name.is_empty() { program() } else { of(verb) }
}

fn program() -> String {
    let mut text = format!("{ABOUT}.\n\nUsage: {NAME} [OPTIONS] [COMMAND]\n\nCommands:\n");
    let verbs = std::iter::once(("(none)", table::PUBHASH.about))
        .chain(VERBS.iter().map(|verb| (verb.name, verb.about)));
    columns(&mut text, &verbs.map(|(name, about)| (name.into(), about)).collect::<Vec<_>>());
    text.push_str("\nOptions:\n");
    columns(&mut text, &rows(&GLOBAL));
    text.push_str("\nExit codes:\n");
    let codes = EXIT_CODES.map(|(code, meaning)| (format!("{code:3}"), meaning));
    columns(&mut text, &codes);
    text
}

fn of(verb: &Verb) -> String {
    let operand = verb.operand.as_ref().map_or_else(String::new, |operand| match operand.number {
        Number::One => format!(" {}", operand.name),
        Number::Any => format!(" [{}]...", operand.name),
    });
    let mut text = String::new();
    wrap(&mut text, &capitalized(verb.about), "", 0);
    text.push_str(&format!("\nUsage: {NAME} {} [OPTIONS]{operand}\n", verb.name));
    for paragraph in verb.detail.split("\n\n").filter(|paragraph| !paragraph.is_empty()) {
        text.push('\n');
        wrap(&mut text, paragraph, "", 0);
    }
    if let Some(operand) = &verb.operand {
        text.push_str("\nArguments:\n");
        columns(&mut text, &[(operand.name.into(), operand.help)]);
    }
    text.push_str("\nOptions:\n");
    let all: Vec<_> = verb.flags.iter().chain(&GLOBAL).copied().collect();
    columns(&mut text, &rows(&all));
    text
}

fn rows(flags: &[&'static Flag]) -> Vec<(String, &'static str)> {
    flags.iter().map(|flag| (signature(flag), flag.help)).collect()
}

fn signature(flag: &Flag) -> String {
    let short = flag.short.map_or_else(String::new, |short| format!("-{short}, "));
    let value = flag.value.map_or_else(String::new, |value| format!(" {value}"));
    format!("{short}--{}{value}", flag.long)
}

/// Two columns: names, and what they are about.
fn columns(text: &mut String, rows: &[(String, &str)]) {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, about) in rows {
        wrap(text, about, &format!("  {name:width$}  "), width + 4);
    }
}

/// Breaks `words` into lines; the first begins with `first`, the others with `indent` blanks.
fn wrap(text: &mut String, words: &str, first: &str, indent: usize) {
    let mut line = first.to_owned();
    let mut begun = false;
    for word in words.split_whitespace() {
        if begun && line.len() + 1 + word.len() > WIDTH {
            text.push_str(&line);
            text.push('\n');
            line = " ".repeat(indent);
            begun = false;
        }
        if begun {
            line.push(' ');
        }
        line.push_str(word);
        begun = true;
    }
    text.push_str(&line);
    text.push('\n');
}

fn capitalized(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(|letter| letter.to_ascii_uppercase());
    first.into_iter().chain(letters).chain(['.']).collect()
}

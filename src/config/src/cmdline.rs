//! The kernel command line: its words, and what they say about the system that was booted (protocols/kcrypt.md §6.6).

/// Where the running kernel's is.
pub const CMDLINE: &str = "/proc/cmdline";

/// Labels of an installed system's images, wherever in a word they stand; `kairos.ram` runs the installed one from memory.
const INSTALLED: [&str; 5] =
    ["COS_ACTIVE", "COS_PASSIVE", "COS_RECOVERY", "COS_SYSTEM", "kairos.ram"];
/// Words that only a system booted from a medium or the network has.
const LIVE_WORDS: [&str; 6] =
    ["netboot", "cdroot", "boot=live", "rd.live.image", "install-mode", "install-mode-interactive"];

/// Whether this is an installer or another system that runs from a medium or the network: the measurements of its boot
/// are not those of the system that will be installed.
#[must_use]
pub fn is_live(text: &str) -> bool {
    if INSTALLED.iter().any(|label| text.contains(label)) {
        return false;
    }
    words(text).iter().any(|word| {
        LIVE_WORDS.contains(&word.as_str())
            || word.contains("live:LABEL")
            || word.contains("live:CDLABEL")
            || word.starts_with("root=live:")
    })
}

/// The words of a command line, without their quotes.
///
/// As the kernel reads it (`next_arg` in lib/cmdline.c) a double quote anywhere in a word keeps white space together. As a
/// shell would, a single quote at the start of a value does so too, and a backslash takes the next quote, backslash or
/// white space as it is. A quote that is never closed is a character as any other: it must not swallow what follows.
#[must_use]
pub fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (word, after) = next_word(rest);
        words.push(word);
        rest = after.trim_start();
    }
    words
}

fn next_word(text: &str) -> (String, &str) {
    let mut word = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next().filter(|first| !first.is_whitespace()) {
        let after = rest.get(first.len_utf8()..).unwrap_or_default();
        let opens_value = word.is_empty() || word.ends_with('=');
        let quoted = match first {
            '"' => closed_by(after, '"'),
            '\'' if opens_value => closed_by(after, '\''),
            '\\' => escaped(after),
            _ => None,
        };
        rest = match quoted {
            Some((inside, after)) => {
                word.push_str(&inside);
                after
            }
            None => {
                word.push(first);
                after
            }
        };
    }
    (word, rest)
}

/// What stands before the quote that closes, and what after it.
fn closed_by(text: &str, quote: char) -> Option<(String, &str)> {
    let mut inside = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let after = rest.get(first.len_utf8()..).unwrap_or_default();
        if first == quote {
            return Some((inside, after));
        }
        rest = match escaped(after) {
            Some((character, after)) if first == '\\' && quote == '"' => {
                inside.push_str(&character);
                after
            }
            _ => {
                inside.push(first);
                after
            }
        };
    }
    None
}

/// The character after a backslash, if it is one that a backslash is for.
fn escaped(text: &str) -> Option<(String, &str)> {
    let first = text.chars().next()?;
    let special = first.is_whitespace() || matches!(first, '"' | '\'' | '\\');
    special.then(|| (first.to_string(), text.get(first.len_utf8()..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_as_the_kernel_and_a_shell_read_them() {
        for (text, expected) in [
            ("", &[][..]),
            (" \n", &[]),
            ("quiet  ro\n", &["quiet", "ro"]),
            ("8250.nr_uarts=1 3 /x http://y:1", &["8250.nr_uarts=1", "3", "/x", "http://y:1"]),
            (r#"dyndbg="file a.c +p" x"#, &["dyndbg=file a.c +p", "x"]),
            (r#""dyndbg=file a.c +p" x"#, &["dyndbg=file a.c +p", "x"]),
            (r"a='b c' d", &["a=b c", "d"]),
            (r"'a=b c' d", &["a=b c", "d"]),
            (r"a=don't b=c d=won't", &["a=don't", "b=c", "d=won't"]),
            (r#"a="b c=d"#, &["a=\"b", "c=d"]),
            (r"a='b c=d", &["a='b", "c=d"]),
            (r"a=b\ c d", &["a=b c", "d"]),
            (r#"a="b \" c" d"#, &["a=b \" c", "d"]),
            (r"a=C:\dir\file b", &[r"a=C:\dir\file", "b"]),
            (r"a=\\ b\", &[r"a=\", r"b\"]),
            (r#"a="" b=''"#, &["a=", "b="]),
            ("ä=ö\u{a0}ü", &["ä=ö", "ü"]),
        ] {
            assert_eq!(words(text), expected, "{text}");
        }
    }

    #[test]
    fn a_live_system_is_told_from_an_installed_one() {
        for (text, live) in [
            ("root=live:LABEL=COS_LIVE rd.live.dir=/", true),
            ("root=live:CDLABEL=COS_LIVE rd.live.image", true),
            ("root=live:http://10.0.0.1/x.squashfs netboot", true),
            ("console=tty1 netboot", true),
            ("cdroot", true),
            ("rd.immucore.uki install-mode", true),
            ("root=LABEL=COS_ACTIVE cos-img/filename=/cOS/active.img", false),
            ("root=LABEL=COS_ACTIVE netboot", false),
            ("root=live:LABEL=COS_RECOVERY rd.live.dir=/", false),
            ("root=LABEL=COS_SYSTEM rd.live.squashimg=recovery.squashfs", false),
            ("root=live:LABEL=COS_LIVE kairos.ram", false),
            ("rd.immucore.uki", false),
            ("hostname=netbooter quiet", false),
            ("", false),
        ] {
            assert_eq!(is_live(text), live, "{text}");
        }
    }
}

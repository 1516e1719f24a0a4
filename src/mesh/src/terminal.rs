//! Texts of others on a terminal. A member's name, an address, a reason: whoever may write to the registry chooses them, and must
//! not move the cursor, rename the window or turn the line around.

use std::borrow::Cow;

/// The text with each character escaped that is not printed but obeyed: control characters (C0, DEL, C1), line and paragraph
/// separators, and those that change the direction of writing (Unicode's Bidi_Control). All else stays as it is, a
/// backslash as well.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_obeyed) {
        return text.into();
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if is_obeyed(character) {
            escaped.extend(character.escape_default());
        } else {
            escaped.push(character);
        }
    }
    escaped.into()
}

fn is_obeyed(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_escaped_and_nothing_else() {
        for (text, shown) in [
            ("node-A", "node-A"),
            ("Grüße, 節点 \\n 🦀", "Grüße, 節点 \\n 🦀"),
            ("\u{1b}[2J\u{7}", "\\u{1b}[2J\\u{7}"),
            ("a\nPeer: b\r\t", "a\\nPeer: b\\r\\t"),
            ("\u{9b}31m\u{7f}", "\\u{9b}31m\\u{7f}"),
            ("\u{202e}resu\u{2066}\u{2028}", "\\u{202e}resu\\u{2066}\\u{2028}"),
        ] {
            assert_eq!(printable(text), shown);
        }
    }
}

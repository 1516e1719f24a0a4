//! A recovery key as a QR code (ISO/IEC 18004), two modules to a character, for a terminal and a telephone before it.

use qrcodegen::{QrCode, QrCodeEcc};
use zeroize::Zeroizing;

/// Light modules around a code: ISO/IEC 18004 §5.3.8.
const QUIET: i32 = 4;
/// Bright white on black, whatever the terminal's own colours are: a code of swapped colours is not read by all.
const COLOURS: &str = "\x1b[40;37;1m";
const NO_COLOURS: &str = "\x1b[0m";

/// The code of `text`, byte mode, lowest error correction, as `systemd-cryptenroll` shows it; with a line feed after each line.
/// `None` for a text that is too long for any code.
#[must_use]
pub fn qr_code(text: &str) -> Option<Zeroizing<String>> {
    let code = QrCode::encode_binary(text.as_bytes(), QrCodeEcc::Low).ok()?;
    let end = code.size() + QUIET;
    let light = |x: i32, y: i32| y < end && !code.get_module(x, y);
    let (line, lines) =
        (usize::try_from(end + QUIET).ok()?, usize::try_from(end + QUIET).ok()? / 2 + 1);
    // Its final size at once: growing would leave pieces of the key in freed memory. A block has 3 bytes.
    let room = lines * (3 * line + COLOURS.len() + NO_COLOURS.len() + 1);
    let mut shown = Zeroizing::new(String::with_capacity(room));
    for y in (-QUIET..end).step_by(2) {
        shown.push_str(COLOURS);
        for x in -QUIET..end {
            shown.push(match (light(x, y), light(x, y + 1)) {
                (true, true) => '█',
                (true, false) => '▀',
                (false, true) => '▄',
                (false, false) => ' ',
            });
        }
        shown.push_str(NO_COLOURS);
        shown.push('\n');
    }
    Some(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_camera_reads_the_key_off_the_terminal() {
        let key = super::super::recovery_key().unwrap();
        let shown = qr_code(&key).unwrap();
        assert!(shown.len() <= shown.capacity());
        let rows: Vec<Vec<char>> = shown
            .lines()
            .map(|line| {
                let line = line.strip_prefix(COLOURS).unwrap().strip_suffix(NO_COLOURS).unwrap();
                line.chars().collect()
            })
            .collect();
        let width = rows[0].len();
        assert!(rows.iter().all(|row| row.len() == width) && width <= 80 && rows.len() <= 24);
        // What a camera sees of it: dark is what is not a block.
        let dark = |x: usize, y: usize| match (rows.get(y / 2).map_or('█', |row| row[x]), y % 2) {
            ('█', _) | ('▀', 0) | ('▄', 1) => false,
            ('▀' | '▄' | ' ', _) => true,
            (other, _) => panic!("{other:?}"),
        };
        assert!((0..width).all(|n| !dark(n, 0) && !dark(0, n)), "no quiet zone");
        let scale = 4;
        let side = width * scale;
        let pixel = |at: usize| if dark(at % side / scale, at / side / scale) { 0 } else { 255 };
        let picture: Vec<u8> = (0..side * side).map(pixel).collect();
        let mut reader = quircs::Quirc::default();
        let read = reader.identify(side, side, &picture).next().unwrap().unwrap();
        assert_eq!(read.decode().unwrap().payload, key.as_bytes());
    }

    #[test]
    fn a_text_that_no_code_holds_has_none() {
        assert!(qr_code(&"x".repeat(3000)).is_none());
    }
}

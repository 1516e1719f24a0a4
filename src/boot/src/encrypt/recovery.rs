//! The recovery key: 256 random bits, written as `systemd-cryptenroll --recovery-key` writes them (systemd
//! src/shared/recovery-key.c): modhex, in 8 groups of 8 with dashes, so that it can be typed on any keyboard layout.

use zeroize::Zeroizing;

use super::EncryptError;

/// Yubico's modhex: hexadecimal digits by letters that are at the same place on all Latin keyboards.
const MODHEX: &[u8; 16] = b"cbdefghijklnrtuv";
const BYTES: usize = 32;
const GROUP: usize = 8;

/// A new recovery key, 71 characters. This text is the passphrase, dashes and all; show it once, store it nowhere.
///
/// # Errors
/// The kernel has no random numbers.
pub fn recovery_key() -> Result<Zeroizing<String>, EncryptError> {
    let mut random = Zeroizing::new([0; BYTES]);
    getrandom::fill(random.as_mut_slice()).map_err(EncryptError::Random)?;
    Ok(format(&random))
}

fn format(bytes: &[u8; BYTES]) -> Zeroizing<String> {
    // Its final size at once: growing would leave pieces of the key in freed memory.
    let mut text = Zeroizing::new(String::with_capacity(2 * BYTES + 2 * BYTES / GROUP - 1));
    for (index, byte) in bytes.iter().enumerate() {
        if index > 0 && index % (GROUP / 2) == 0 {
            text.push('-');
        }
        for nibble in [byte >> 4, byte & 15] {
            text.push(MODHEX.get(usize::from(nibble)).copied().map_or('-', char::from));
        }
    }
    text
}

/// A recovery key as somebody typed it (capitals, blanks, dashes missing or elsewhere), as it was made; `None` for what cannot
/// be one, which then is to be tried as the passphrase that it is.
#[must_use]
pub fn normalize_recovery_key(typed: &str) -> Option<Zeroizing<String>> {
    let mut bytes = Zeroizing::new([0_u8; BYTES]);
    let mut nibbles = 0_usize;
    for character in typed.chars().filter(|c| *c != '-' && !c.is_whitespace()) {
        let letter = u8::try_from(character.to_ascii_lowercase()).ok()?;
        let value = u8::try_from(MODHEX.iter().position(|known| *known == letter)?).ok()?;
        let byte = bytes.get_mut(nibbles / 2)?;
        *byte = *byte << 4 | value;
        nibbles = nibbles.checked_add(1)?;
    }
    (nibbles == 2 * BYTES).then(|| format(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_as_systemd_writes_it() {
        let bytes = std::array::from_fn(|i| u8::try_from(i * 8 + 1).unwrap_or(0));
        let text = format(&bytes);
        assert_eq!(
            text.as_str(),
            "cbckbbbk-dbdkebek-fbfkgbgk-hbhkibik-jbjkkbkk-lblknbnk-rbrktbtk-ubukvbvk"
        );
        assert_eq!(text.capacity(), text.len());
    }

    #[test]
    fn two_are_not_the_same() {
        let (one, two) = (recovery_key().unwrap(), recovery_key().unwrap());
        assert_eq!(one.len(), 71);
        assert_ne!(one, two);
    }

    #[test]
    fn it_may_be_typed_with_capitals_and_without_dashes() {
        let key = recovery_key().unwrap();
        for typed in [
            key.to_string(),
            key.to_uppercase(),
            key.replace('-', ""),
            key.replace('-', " "),
            format!("  {}\n", key.replace('-', "--")),
        ] {
            assert_eq!(normalize_recovery_key(&typed).as_ref(), Some(&key), "{typed}");
        }
        let short = key.get(..70).unwrap();
        for typed in [
            "",
            "secret",
            short,
            &format!("{}c", key.as_str()),
            &key.replace('-', "a"),
            &key.replace('-', "é"),
        ] {
            assert_eq!(normalize_recovery_key(typed), None, "{typed}");
        }
    }
}

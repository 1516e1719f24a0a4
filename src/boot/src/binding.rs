//! Which of the volumes with a label is this machine's (`anchors/unlock.md` §0.1 no. 11).
//!
//! Labels and UUIDs are anybody's to write, and Kairos' are the same on every machine. What cannot be copied to another volume
//! is the mark in our token: this TPM's HMAC over UUID and label. A volume with it is this machine's, one with another mark is
//! not, and one without any is believed as long as nothing contradicts it.

use serde_json::Value;

use crate::BootError;
use crate::disk::{Volume, plain_label};
use crate::token;

/// What a volume's token says of where it was enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// On this machine.
    Enrolled,
    /// Nowhere: made by Kairos, or by a release of ours that left no mark.
    Unmarked,
    /// On another machine, or with another UUID or label.
    Foreign,
}

/// Asks the TPM for the mark of a UUID and label.
pub type Mark<'m> = dyn FnMut(&str, &str) -> Result<[u8; 32], BootError> + 'm;

/// The volume of `candidates`, all LUKS2 and labelled `label`, that is this machine's. The TPM is asked only
/// where there is a mark to compare with.
///
/// # Errors
/// [`BootError::Impostor`] or [`BootError::Ambiguous`] where none is; what `mark` failed with.
pub fn choose(
    label: &str,
    candidates: &[Volume],
    mark: &mut Mark<'_>,
) -> Result<Volume, BootError> {
    let standings: Vec<_> = candidates
        .iter()
        .map(|volume| Ok((volume, standing(volume, label, mark)?)))
        .collect::<Result<_, BootError>>()?;
    decide(label, &standings)
}

fn standing(volume: &Volume, label: &str, mark: &mut Mark<'_>) -> Result<Standing, BootError> {
    let token: Option<Value> = volume.token();
    let Some(mac) = token.as_ref().and_then(token::mac) else { return Ok(Standing::Unmarked) };
    let wanted = mark(&volume.luks_uuid(), plain_label(label))?;
    // Anybody with the disk reads the mark: there is no secret to leak by the time it takes.
    Ok(if mac == Some(wanted) { Standing::Enrolled } else { Standing::Foreign })
}

fn decide(label: &str, standings: &[(&Volume, Standing)]) -> Result<Volume, BootError> {
    let with = |wanted| -> Vec<&Volume> {
        let all = standings.iter().filter(|(_, standing)| *standing == wanted);
        all.map(|(volume, _)| *volume).collect()
    };
    match (with(Standing::Enrolled).as_slice(), standings) {
        ([enrolled], _) => {
            for (other, _) in standings.iter().filter(|(volume, _)| volume != enrolled) {
                log::warn!(
                    "{other} is labelled {label} as well and was not enrolled on this machine: an impostor. It is left closed; {enrolled} is the one that was"
                );
            }
            Ok((*enrolled).clone())
        }
        ([], [(only, Standing::Unmarked)]) => Ok((*only).clone()),
        ([], [(only, Standing::Foreign)]) => Err(BootError::Impostor {
            label: label.to_owned(),
            device: only.device.clone(),
            uuid: only.luks_uuid(),
        }),
        _ => Err(ambiguous(label, standings.iter().map(|(volume, _)| *volume))),
    }
}

/// Several volumes with one label, and nothing that says which is the right one.
pub fn ambiguous<'v>(label: &str, volumes: impl Iterator<Item = &'v Volume>) -> BootError {
    let names: Vec<_> = volumes.map(ToString::to_string).collect();
    BootError::Ambiguous { label: label.to_owned(), count: names.len(), devices: names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Content;

    fn volume(device: &str) -> Volume {
        let content = Content::Luks2 { label: "X".into(), uuid: format!("uuid-of-{device}") };
        Volume { device: device.into(), content }
    }

    #[test]
    fn the_enrolled_one_is_taken_and_nothing_is_guessed() {
        use Standing::{Enrolled, Foreign, Unmarked};
        let cases: [(&[Standing], Result<usize, u8>); 11] = [
            (&[Unmarked], Ok(0)),
            (&[Enrolled], Ok(0)),
            (&[Foreign], Err(41)),
            (&[Foreign, Enrolled], Ok(1)),
            (&[Enrolled, Unmarked], Ok(0)),
            (&[Unmarked, Foreign, Enrolled], Ok(2)),
            // A copy of the disk: both have the mark.
            (&[Enrolled, Enrolled], Err(41)),
            (&[Unmarked, Unmarked], Err(41)),
            (&[Unmarked, Foreign], Err(41)),
            (&[Foreign, Foreign], Err(41)),
            (&[Enrolled, Enrolled, Foreign], Err(41)),
        ];
        for (standings, expected) in cases {
            let volumes: Vec<_> =
                (0..standings.len()).map(|n| volume(&format!("/dev/sd{n}"))).collect();
            let pairs: Vec<_> = volumes.iter().zip(standings.iter().copied()).collect();
            match (decide("X", &pairs), expected) {
                (Ok(chosen), Ok(expected)) => assert_eq!(chosen, volumes[expected]),
                (Err(error), Err(code)) => {
                    assert_eq!(error.exit_code(), code);
                    // Every device is named, for the person who has to take one out.
                    for volume in &volumes {
                        let name = volume.device.display().to_string();
                        assert!(error.to_string().contains(&name), "{error}");
                    }
                }
                (got, expected) => panic!("{standings:?}: {got:?} instead of {expected:?}"),
            }
        }
    }
}

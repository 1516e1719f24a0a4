//! Every target on its seeds, on all that libFuzzer ever found (`fuzz/regressions/TARGET`), and on a few thousand mutations
//! of both that are the same each time. The search itself is `make fuzz`.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "helpers of tests fail as tests do"
)]

use std::fs;
use std::path::Path;

use latchkey_fuzz_targets::{TARGETS, run, seeds};

const MUTATIONS: u32 = 3_000;

/// What was found once, each kept under the name libFuzzer gave it or a better one.
fn regressions(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../regressions").join(target);
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// xorshift64*: the same numbers on every machine.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(number).unwrap() % limit.max(1)
    }
}

const SPECIAL: &[u8] = b"\0\x01\x7f\x80\xff \n\r\t\"'\\{}[]:,.-=&*!<>/#%@;0123456789";

/// Bytes changed, put in, taken out, repeated, cut, or brought from another input.
fn mutated(input: &[u8], other: &[u8], dice: &mut Dice) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=dice.below(4) {
        let at = dice.below(bytes.len() + 1);
        let until = at + dice.below((bytes.len() - at).min(32) + 1);
        match dice.below(6) {
            0 if at < bytes.len() => bytes[at] = SPECIAL[dice.below(SPECIAL.len())],
            1 => bytes.insert(at, SPECIAL[dice.below(SPECIAL.len())]),
            2 => drop(bytes.drain(at..until)),
            3 => {
                let copy = bytes[at..until].to_vec();
                bytes.splice(at..at, copy);
            }
            4 => bytes.truncate(at),
            _ => {
                let from = dice.below(other.len() + 1);
                let to = from + dice.below((other.len() - from).min(64) + 1);
                bytes.splice(at..at, other[from..to].iter().copied());
            }
        }
    }
    bytes
}

fn replay(target: &str) {
    let inputs: Vec<_> = seeds::of(target).into_iter().chain(regressions(target)).collect();
    run(target, b"");
    for input in &inputs {
        run(target, input);
        let cut = input.len().min(2_000);
        for end in (0..cut).step_by(1 + cut / 300) {
            run(target, &input[..end]);
        }
    }
    let mut dice = Dice(0x6c61_7463_686b_6579);
    for _ in 0..MUTATIONS {
        let (one, other) = (dice.below(inputs.len()), dice.below(inputs.len()));
        let input = mutated(&inputs[one], &inputs[other], &mut dice);
        // What fails is shown as libFuzzer's artifacts are, to be kept as a regression.
        let shown = input.escape_ascii().to_string();
        let result = std::panic::catch_unwind(|| run(target, &input));
        assert!(result.is_ok(), "{target} fails on b\"{shown}\"");
    }
}

#[test]
fn targets_of_libfuzzer_are_the_targets_here() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz_targets");
    let mut files: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    files.sort();
    let mut names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    names.sort_unstable();
    assert_eq!(files, names);
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../regressions")).unwrap()
    {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(names.contains(&name.as_str()), "regressions of an unknown target {name}");
    }
}

macro_rules! replays {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            replay(stringify!($name));
        }
    )*};
}

replays! { v1_token v1_message v2_message plugin_event tpm_structure ek cloud_config cmdline manifest disk luks_token identity timeline dns mdns http member ikto }

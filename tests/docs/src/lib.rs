//! Man pages and shell completions of all three programs, made from what the programs parse by. They are kept in `man/` and
//! `completions/`; a test fails when they are not as made here, and `cargo run -p latchkey-docs` makes them again.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, Command, ValueHint};
use clap_complete::Shell;
use clap_mangen::Man;
use kcrypt_discovery_challenger::cli::table::{
    ABOUT, EXIT_CODES, GLOBAL, HELP, PUBHASH, VERBS, VERSION,
};
use kcrypt_discovery_challenger::cli::{Flag, NAME, Number, Verb};

/// System administration.
const SECTION: &str = "8";

/// What goes with every verb is told after what is the verb's own.
const LAST: usize = 900;

/// The repository's root.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The folders that hold nothing but what is made here.
pub const FOLDERS: [&str; 2] = ["man", "completions"];

/// Every file below [`root`] that is made here.
///
/// # Errors
/// None that can happen: it is all written to memory.
pub fn files() -> io::Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for mut program in [boot_program(), latchkey_mesh::cli::command(), latchkey_kms::command()] {
        let name = program.get_name().to_owned();
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut program.clone(), &name, &mut script);
            let file = match shell {
                Shell::Zsh => format!("_{name}"),
                Shell::Fish => format!("{name}.fish"),
                _ => name.clone(),
            };
            files.insert(Path::new("completions").join(shell.to_string()).join(file), script);
        }
        program = program.disable_help_subcommand(true);
        program.build();
        pages(&program, &mut files)?;
    }
    Ok(files)
}

/// A page for the command, and for each below it.
fn pages(command: &Command, files: &mut BTreeMap<PathBuf, Vec<u8>>) -> io::Result<()> {
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        pages(below, files)?;
    }
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let man = Man::new(command.clone())
        .title(&name)
        .section(SECTION)
        .manual("Latchkey")
        .source(format!("Latchkey {}", env!("CARGO_PKG_VERSION")));
    let mut page = Vec::new();
    man.render(&mut page)?;
    files.insert(Path::new("man").join(format!("{name}.{SECTION}")), page);
    Ok(())
}

/// The boot program's own definition, as clap has it. The program itself does without clap, which is too large for an initramfs.
fn boot_program() -> Command {
    let codes = EXIT_CODES.map(|(code, meaning)| format!("{code:4}  {meaning}\n")).concat();
    Command::new(NAME)
        .version(env!("CARGO_PKG_VERSION"))
        .about(ABOUT)
        .long_about(format!("{ABOUT}.\n\nWithout a command: {}. {}", PUBHASH.about, PUBHASH.detail))
        .after_help(format!("Exit codes:\n{codes}"))
        .args(arguments(&GLOBAL).map(|argument| argument.global(true).display_order(LAST)))
        .args(arguments(PUBHASH.flags))
        .subcommands(VERBS.map(verb))
}

fn verb(verb: &'static Verb) -> Command {
    let command = Command::new(verb.name)
        .about(verb.about)
        .long_about(format!("{}\n\n{}", verb.about, verb.detail).trim().to_owned())
        .after_help(format!("Exit codes: see {NAME}({SECTION})."))
        .args(arguments(verb.flags));
    match &verb.operand {
        None => command,
        Some(operand) => {
            let argument = Arg::new(operand.name).help(operand.help);
            command.arg(match operand.number {
                Number::One => argument.required(true),
                Number::Any => argument.num_args(0..),
            })
        }
    }
}

/// Help and version are clap's own affair.
fn arguments(flags: &'static [&'static Flag]) -> impl Iterator<Item = Arg> {
    flags.iter().filter(|flag| ***flag != HELP && ***flag != VERSION).map(|flag| argument(flag))
}

fn argument(flag: &'static Flag) -> Arg {
    let argument = Arg::new(flag.long).long(flag.long).help(flag.help);
    let argument = match flag.short {
        Some(short) => argument.short(short),
        None => argument,
    };
    match flag.value {
        None => argument.action(ArgAction::SetTrue),
        Some(value) => argument
            .value_name(value)
            .value_hint(hint(value))
            .action(if flag.repeated { ArgAction::Append } else { ArgAction::Set }),
    }
}

fn hint(value: &str) -> ValueHint {
    match value {
        "DIR" => ValueHint::DirPath,
        "FILE" | "PATH" | "DEVICE" => ValueHint::FilePath,
        "URL" => ValueHint::Url,
        _ => ValueHint::Other,
    }
}

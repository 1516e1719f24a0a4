use super::*;

fn parse(arguments: &[&str]) -> Result<Invocation, String> {
    let parser = lexopt::Parser::from_args(arguments.iter().copied());
    Invocation::parse(parser).map_err(|error| error.to_string())
}

#[test]
fn without_a_verb_it_is_the_pubhash() {
    for arguments in [&[][..], &["--debug"], &["--tpm-device", "/dev/tpm1"]] {
        assert_eq!(parse(arguments).unwrap().verb.command, Command::Pubhash, "{arguments:?}");
    }
}

#[test]
fn options_for_all_stand_anywhere_those_of_a_verb_behind_it() {
    let read = parse(&["--config", "a", "info", "--json", "--config=b", "--pcrs", "1"]).unwrap();
    assert_eq!(read.verb.command, Command::Info);
    assert!(read.has(&table::JSON) && !read.has(&table::DEBUG));
    assert_eq!(read.values(&table::CONFIG).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(read.text(&table::PCRS).unwrap().as_deref(), Some("1"));
    let device = parse(&["--tpm-device", "x", "info"]).unwrap();
    assert_eq!(device.text(&table::TPM_DEVICE).unwrap().as_deref(), Some("x"));
    let labels = parse(&["encrypt", "COS_OEM", "--new", "COS_PERSISTENT"]).unwrap();
    assert_eq!(labels.operands, ["COS_OEM", "COS_PERSISTENT"]);
}

#[test]
fn what_is_not_in_the_table_is_refused_and_says_where_it_belongs() {
    for (arguments, words) in [
        (&["cleanp"][..], "no such command: cleanp. There are unlock, "),
        (&["--json", "info"], "--json is unknown without a command; it goes with doctor, info"),
        (&["info", "--new"], "--new is unknown to info; it goes with encrypt"),
        (&["--tpm-device", "x", "unlock"], "--tpm-device is unknown to unlock; it goes with "),
        (&["info", "more"], "more is unknown to info"),
        (&["unlock", "-x"], "-x is unknown to unlock"),
        (&["info", "--pcrs"], "missing argument"),
        (&["info", "--json=yes"], "unexpected argument"),
        (&["info", "--pcrs=1", "--pcrs=2"], "--pcrs was given twice"),
    ] {
        let error = parse(arguments).unwrap_err();
        assert!(error.contains(words), "{arguments:?}: {error}");
    }
}

#[test]
fn names_are_unique_and_texts_have_the_form_that_help_and_man_pages_want() {
    let mut names: Vec<_> = table::VERBS.iter().map(|verb| verb.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), table::VERBS.len());
    for verb in table::VERBS.iter().copied().chain([&table::PUBHASH]) {
        assert!(!verb.about.ends_with('.') && verb.about.len() <= 100, "{}", verb.about);
        assert!(verb.detail.is_empty() || verb.detail.ends_with('.'), "{}", verb.detail);
        let mut longs: Vec<_> =
            verb.flags.iter().chain(&table::GLOBAL).map(|flag| flag.long).collect();
        let number = longs.len();
        longs.sort_unstable();
        longs.dedup();
        assert_eq!(longs.len(), number, "{}", verb.name);
        assert!(verb.flags.iter().all(|flag| !flag.help.ends_with('.')), "{}", verb.name);
    }
}

#[test]
fn help_names_everything_and_fits_a_console() {
    let program = usage(&table::PUBHASH);
    for verb in table::VERBS {
        assert!(program.contains(&format!("\n  {}", verb.name)), "{}", verb.name);
        let text = usage(verb);
        for flag in verb.flags {
            assert!(text.contains(&format!("--{}", flag.long)), "{}: {}", verb.name, flag.long);
        }
        assert!(text.lines().all(|line| line.len() <= 80), "{text}");
    }
    assert!(program.lines().all(|line| line.len() <= 80), "{program}");
}

#[test]
fn handles_are_read_with_any_base() {
    let read = |text| handle(&table::NV_INDEX, text, 0x0100_0000..=0x01ff_ffff);
    for text in ["0x1500000", "0X150_0000", "22020096", "0124000000", "0o124000000"] {
        assert_eq!(read(text).unwrap(), 0x0150_0000, "{text}");
    }
    for text in ["", "0x", "1500000", "0x81000008", "0x11500000000", "-1", "index"] {
        assert!(read(text).is_err(), "{text}");
    }
}

#[test]
fn pcrs_are_a_list_of_numbers_below_24() {
    assert_eq!(pcrs("0,7,11").unwrap(), [0, 7, 11]);
    assert_eq!(pcrs("11, 0,0").unwrap(), [0, 11]);
    for text in ["", "24", "0,,1", "x", "-1"] {
        assert!(pcrs(text).is_err(), "{text}");
    }
}

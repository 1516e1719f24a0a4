//! Verbs, options and exit codes.

use super::{Command, Flag, Number, Operand, Verb};

/// What the program is for.
pub const ABOUT: &str = "Unlock LUKS2 volumes by the TPM, or by a key server that asks the TPM";

/// The program without a verb.
pub const PUBHASH: Verb = Verb {
    command: Command::Pubhash,
    name: "",
    about: "print the TPM's pubhash, without a newline",
    detail: "The pubhash is the machine's name for a key server (`TPMHash` of its SealedVolume): SHA-256 of the TPM's endorsement \
             key. A command that there is not is an error, as in Kairos' second generation, where its first printed the pubhash.",
    operand: None,
    flags: &[&TPM_DEVICE],
};

/// Everything the program does by a verb, in the order in which it is shown.
pub const VERBS: [&Verb; 10] =
    [&UNLOCK, &ENCRYPT, &REKEY, &DOCTOR, &GET, &INFO, &CHECKNV, &READNV, &CLEANUP, &DISCOVERY];

/// Options that go with every verb and may stand before it.
pub const GLOBAL: [&Flag; 4] = [&DEBUG, &CONFIG, &HELP, &VERSION];

const UNLOCK: Verb = Verb {
    command: Command::Unlock,
    name: "unlock",
    about: "open the configured volumes; what the initramfs calls",
    detail: "Opens what install.encrypted_partitions names, or COS_PERSISTENT. The console takes the recovery passphrase from the \
             beginning; whichever comes first opens the volume. Nothing is ever created. What happened, and why not, is kept in \
             /run/latchkey/timeline.json for `latchkey status --boot`.",
    operand: None,
    flags: &[],
};

const ENCRYPT: Verb = Verb {
    command: Command::Encrypt,
    name: "encrypt",
    about: "encrypt partitions in place, keeping what is on them; what an installer calls",
    detail: "The power may go at any moment: run again, it goes on from there.",
    operand: Some(Operand {
        name: "LABEL",
        help: "file system label of a partition; without one, install.encrypted_partitions",
        number: Number::Any,
    }),
    flags: &[&DEVICE, &RECOVERY_KEY, &NEW, &DRY_RUN],
};

const REKEY: Verb = Verb {
    command: Command::Rekey,
    name: "rekey",
    about: "change the machine's key of a volume; the old one stays until the new one has opened it",
    detail: "Without a key server, the passphrase in the TPM and the keyslots of all configured volumes are changed, as one \
             passphrase opens them all. The power may go at any moment: run again, it comes to its end.\n\nWith a key server it \
             is an operator who changes the Secret, or forgets it so that a new one is made. Do that while `rekey --wait` waits \
             for it; or before, and give another key of the volume by --key-stdin: the passphrase from before, or the recovery key. \
             With that key it also goes on where the TPM was replaced.",
    operand: Some(Operand { name: "LABEL", help: "label of the volume", number: Number::One }),
    flags: &[&DEVICE, &KEY_STDIN, &WAIT],
};

const GET: Verb = Verb {
    command: Command::Get,
    name: "get",
    about: "print the passphrase of a volume, without a newline",
    detail: "Asks as a boot does: the TPM alone where there is no key server, else the servers, first answer wins. Needs one of \
             the three names of the partition. What is given here takes precedence over the configuration; with \
             --challenger-server there need be none.",
    operand: None,
    flags: &[
        &PARTITION_LABEL,
        &PARTITION_NAME,
        &PARTITION_UUID,
        &ATTEMPTS,
        &CHALLENGER_SERVER,
        &MDNS,
        &CERTIFICATE,
        &TPM_DEVICE,
    ],
};

const INFO: Verb = Verb {
    command: Command::Info,
    name: "info",
    about: "show the TPM: maker, pubhash, EK certificate, handles, lockout, PCRs",
    detail: "Changes nothing in the TPM. The pubhash is worked out both ways that kcrypt knows, from the EK certificate and from \
             the default template; where they differ, other programs may name this machine differently.",
    operand: None,
    flags: &[&PCRS, &NV_INDEX, &TPM_DEVICE, &JSON],
};

const CHECKNV: Verb = Verb {
    command: Command::CheckNv,
    name: "checknv",
    about: "check that the TPM holds a passphrase of offline mode and releases it",
    detail: "Prints what it found, never the passphrase. Exit code 0: it is there and can be decrypted; 31: there is none.",
    operand: None,
    flags: &[&NV_INDEX, &TPM_DEVICE],
};

const READNV: Verb = Verb {
    command: Command::ReadNv,
    name: "readnv",
    about: "print the passphrase of offline mode, without a newline",
    detail: "The passphrase that `unlock` uses where there is no key server. It never leaves the TPM's bus in clear.",
    operand: None,
    flags: &[&NV_INDEX, &TPM_DEVICE],
};

const CLEANUP: Verb = Verb {
    command: Command::Cleanup,
    name: "cleanup",
    about: "remove the passphrase of offline mode from the TPM: volumes that it opens stay closed for good",
    detail: "Lists what it would remove and which LUKS volumes are there, then asks: only `yes` goes on. What is not as kcrypt \
             makes it is refused.",
    operand: None,
    flags: &[&NV_INDEX, &TPM_DEVICE, &KEYS, &FORCE, &SURE],
};

const DOCTOR: Verb = Verb {
    command: Command::Doctor,
    name: "doctor",
    about: "check everything an unlock needs, and say what is wrong and what to do",
    detail: "One line for each check: ok, warn (it works, though not as it could) or FAIL (it keeps volumes closed). Looks at the \
             configuration, the clock, the TPM, the network, the key servers, each volume and the initramfs; works in the initramfs' \
             shell and in the running system.\n\nNothing is made or enrolled: a key server is asked for a WebSocket and nothing is said \
             on it. The exit code is that of the first failure.",
    operand: None,
    flags: &[&UNLOCK_TEST, &TPM_DEVICE, &JSON],
};

const DISCOVERY: Verb = Verb {
    command: Command::DiscoveryPassword,
    name: "discovery.password",
    about: "kcrypt's plugin: an event on stdin, the answer on stdout",
    detail: "What immucore and kairos-agent call. The exit code is 0 also where the answer is an error. A partition that is LUKS \
             already gets the passphrase it has; only for one that is not yet, a passphrase is made.",
    operand: None,
    flags: &[],
};

const fn switch(long: &'static str, help: &'static str) -> Flag {
    Flag { long, short: None, value: None, repeated: false, help }
}

const fn option(long: &'static str, value: &'static str, help: &'static str) -> Flag {
    Flag { long, short: None, value: Some(value), repeated: false, help }
}

const fn list(long: &'static str, value: &'static str, help: &'static str) -> Flag {
    Flag { long, short: None, value: Some(value), repeated: true, help }
}

pub const HELP: Flag =
    Flag { short: Some('h'), ..switch("help", "print help; behind a command, that command's") };
pub const VERSION: Flag = Flag { short: Some('V'), ..switch("version", "print the version") };
pub const DEBUG: Flag = switch("debug", "say every step");
pub const CONFIG: Flag = list(
    "config",
    "DIR",
    "read cloud-config from DIR instead of where Kairos has it (/oem, /run/cos/oem, ...); may be repeated",
);
pub const TPM_DEVICE: Flag = option(
    "tpm-device",
    "DEVICE",
    "the TPM: device, unix socket or TCTI string, instead of what is configured or found",
);

pub const DEVICE: Flag =
    option("device", "PATH", "the partition, instead of the one that has the label");
pub const RECOVERY_KEY: Flag = switch(
    "recovery-key",
    "make a recovery key as well, and print it this once, on a terminal with a QR code",
);
pub const NEW: Flag = switch("new", "drop what is on the partition and make a new file system");

pub const DRY_RUN: Flag =
    switch("dry-run", "say what would be done with each partition, and change nothing");

pub const KEY_STDIN: Flag =
    switch("key-stdin", "read another key of the volume from stdin, or ask for it on a terminal");
pub const WAIT: Flag = option(
    "wait",
    "SECONDS",
    "wait so long for the key server to release another passphrase (default 0)",
);

pub const PARTITION_LABEL: Flag = option("partition-label", "LABEL", "the volume's label");
pub const PARTITION_NAME: Flag =
    option("partition-name", "NAME", "its kernel name (sda3), for a server that goes by it");
pub const PARTITION_UUID: Flag = option("partition-uuid", "UUID", "its partition UUID, likewise");
pub const ATTEMPTS: Flag = option(
    "attempts",
    "N",
    "give up after so many attempts at a server; in any case at the configured deadline (default: at that alone)",
);
pub const CHALLENGER_SERVER: Flag =
    list("challenger-server", "URL", "key server, instead of the configured ones; may be repeated");
pub const MDNS: Flag = switch("mdns", "find the server's .local name by multicast DNS");
pub const CERTIFICATE: Flag = option(
    "certificate",
    "FILE",
    "PEM certificates to trust beside the system's: a file, or the PEM text itself",
);

pub const PCRS: Flag =
    option("pcrs", "LIST", "show these PCRs of the SHA-256 bank (default 0,7,11)");
pub const JSON: Flag = switch("json", "as JSON");
pub const UNLOCK_TEST: Flag = switch(
    "unlock-test",
    "also get each volume's passphrase as a boot does, and try it; nothing is mapped",
);
pub const NV_INDEX: Flag = option(
    "nv-index",
    "INDEX",
    "NV index of the sealed passphrase (default: as configured, or 0x1500000)",
);
pub const KEYS: Flag = switch(
    "keys",
    "also the key that sealed it (c_index), and with --force EK and SRK; all are made again when needed",
);
pub const FORCE: Flag =
    switch("force", "also what other programs may use, or what is not as kcrypt makes it");
pub const SURE: Flag = switch("i-know-what-i-am-doing", "do not ask");

/// What each exit code says.
pub const EXIT_CODES: [(u8, &str); 17] = [
    (0, "done"),
    (1, "usage, or the system refused something"),
    (10, "configuration: the message names file, line and key"),
    (11, "no TPM"),
    (12, "TPM error"),
    (13, "TPM in dictionary-attack lockout"),
    (14, "TPM owner or endorsement password set"),
    (20, "no network"),
    (21, "key server unreachable, or the deadline passed"),
    (22, "the server does not speak kcrypt's protocol"),
    (30, "refused: quarantined, or unknown to the server"),
    (31, "there is no passphrase for this volume yet"),
    (40, "no such volume"),
    (41, "not encrypted, or two volumes with one label"),
    (42, "the passphrase does not open the volume"),
    (43, "cryptsetup or the kernel failed"),
    (50, "the mesh identity could not be made"),
];

//! The program `latchkey-kms`: all of it is in the library.

fn main() -> std::process::ExitCode {
    latchkey_kms::main()
}

#![no_main]
latchkey_fuzz::target!("tpm_structure");

#![no_main]
latchkey_fuzz::target!("luks_token");

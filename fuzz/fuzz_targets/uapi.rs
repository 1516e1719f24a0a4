#![no_main]
latchkey_fuzz::target!("uapi");

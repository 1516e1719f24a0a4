#![no_main]
latchkey_fuzz::target!("ikto");

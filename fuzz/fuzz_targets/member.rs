#![no_main]
latchkey_fuzz::target!("member");

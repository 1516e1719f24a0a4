#![no_main]
latchkey_fuzz::target!("v2_message");

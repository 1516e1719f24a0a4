#![no_main]
latchkey_fuzz::target!("v1_message");

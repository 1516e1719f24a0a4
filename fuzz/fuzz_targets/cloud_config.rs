#![no_main]
latchkey_fuzz::target!("cloud_config");

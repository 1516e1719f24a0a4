#![no_main]
latchkey_fuzz::target!("plugin_event");

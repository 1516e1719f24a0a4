//! The program of the initramfs.

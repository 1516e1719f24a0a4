//! Cloud-config and kernel command line: where they are found, how they merge, what they mean.

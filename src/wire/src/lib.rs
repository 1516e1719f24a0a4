//! The formats both ends share: bytes in, types out, and back.

//! Everything that talks to a TPM 2.0.

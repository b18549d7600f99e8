//! NBD export.

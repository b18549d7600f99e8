//! The `blockferry` command. See `docs/architecture.md`.

fn main() {}

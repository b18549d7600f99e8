//! The `blockferry` command. Everything is in the library; see `blockferry::cli`.

use std::process::ExitCode;

/// Counts heap allocations, so that `--stats` can say how many an I/O took.
#[global_allocator]
static ALLOCATOR: blockferry_ring::alloc::CountingAllocator = blockferry_ring::alloc::CountingAllocator;

fn main() -> ExitCode {
    blockferry::cli::main()
}

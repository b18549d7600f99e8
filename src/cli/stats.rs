//! `--stats`: what a run was really made of.

use blockferry_ring::Ring;
use serde_json::{Value, json};

use super::Global;
use super::print::{self, say};

/// Prints the counters if they were asked for.
pub fn print(global: &Global, ring: &Ring) {
    if !global.stats {
        return;
    }
    if global.json {
        print::event(&json!({"event": "stats", "stats": to_json(ring)}));
        return;
    }
    let s = ring.stats().snapshot();
    let arena = ring.arena();
    say!("reactor");
    say!("  operations                {:>12}", s.operations);
    say!("  fixed reads and writes    {:>12}  ({:.2} %)", s.transfers_fixed, s.fixed_share() * 100.0);
    say!("  plain reads and writes    {:>12}", s.transfers_plain);
    say!("  enters                    {:>12}  ({:.1} per 1,000 operations)", s.enters, s.enters_per_1000());
    say!("  batch, mean / largest     {:>12.1} / {}", s.batch_mean(), s.batch_max);
    say!("  completions a turn, most  {:>12}", s.completions_a_turn_max);
    say!(
        "  heap allocations          {:>12}  ({:.3} an operation)",
        s.heap_allocations,
        s.allocations_an_operation()
    );
    say!("  bytes read / written      {:>12} / {}", s.bytes_read, s.bytes_written);
    say!("  short transfers, retries  {:>12} / {}", s.short_transfers, s.retries);
    say!("  offloaded calls           {:>12}", s.offloaded);
    say!("  operations of libraries   {:>12}", s.external);
    say!("  turns, tasks              {:>12} / {}", s.turns, s.tasks);
    say!(
        "  arena MiB: mapped / registered / most in use  {} / {} / {:.1}",
        arena.bytes() >> 20,
        arena.bytes_fixed() >> 20,
        arena.bytes_used_max() as f64 / f64::from(1 << 20)
    );
}

/// The counters as JSON.
pub fn to_json(ring: &Ring) -> Value {
    let s = ring.stats().snapshot();
    let arena = ring.arena();
    json!({
        "operations": s.operations,
        "transfers-fixed": s.transfers_fixed,
        "transfers-plain": s.transfers_plain,
        "fixed-share": s.fixed_share(),
        "enters": s.enters,
        "enters-per-1000-operations": s.enters_per_1000(),
        "batch-mean": s.batch_mean(),
        "batch-max": s.batch_max,
        "completions-a-turn-max": s.completions_a_turn_max,
        "heap-allocations": s.heap_allocations,
        "heap-allocations-an-operation": s.allocations_an_operation(),
        "bytes-read": s.bytes_read,
        "bytes-written": s.bytes_written,
        "short-transfers": s.short_transfers,
        "retries": s.retries,
        "offloaded": s.offloaded,
        "external": s.external,
        "turns": s.turns,
        "tasks": s.tasks,
        "backstops": s.backstops,
        "arena-bytes": arena.bytes(),
        "arena-bytes-registered": arena.bytes_fixed(),
        "arena-bytes-used-max": arena.bytes_used_max(),
        "ring": ring.describe(),
    })
}

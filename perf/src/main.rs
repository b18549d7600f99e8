//! Head-to-head measurements.
fn main() {
    println!("{}", blockferry_ring::NAME);
}

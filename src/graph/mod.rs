//! See docs/architecture.md.

/// Nodes, roots and drain.
pub mod node;

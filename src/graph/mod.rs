//! The graph: nodes and roots, and what stands between guests and drivers.

/// Layers of one disk, and which of them holds what.
pub mod chain;
/// Which parts of a disk still differ.
pub mod dirty;
/// What a user has heard of losses.
pub mod heard;
/// Nodes, roots and drain.
pub mod node;
/// A job's target.
pub mod peer;
/// Who may touch which part of a disk now.
/// The filter by which a job knows what its guests change.
pub mod tracker;

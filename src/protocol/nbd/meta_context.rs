//! Metadata contexts: what `BlockStatus` can be asked about, and how queries find them.
//!
//! `base:allocation` is the protocol's own. The two `qemu:` contexts are those of QEMU's interoperability document;
//! an export offers them only if its owner says so. A query is a full name, or, in a list, a prefix that ends where
//! the namespace says that a wildcard may end.

use super::constants::STRING_BYTES_MAX;

/// Something that an export can tell about each of its ranges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetaContext {
    /// `base:allocation`: hole, zero.
    BaseAllocation,
    /// `qemu:allocation-depth`: which image of the chain holds the data.
    AllocationDepth,
    /// `qemu:dirty-bitmap:NAME`: whether the bitmap marks the range.
    DirtyBitmap(String),
}

const BASE_ALLOCATION: &str = "base:allocation";
const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

impl MetaContext {
    /// The name on the wire.
    pub fn name(&self) -> String {
        match self {
            Self::BaseAllocation => BASE_ALLOCATION.to_owned(),
            Self::AllocationDepth => ALLOCATION_DEPTH.to_owned(),
            Self::DirtyBitmap(bitmap) => format!("{DIRTY_BITMAP}{bitmap}"),
        }
    }

    /// The context with that name on the wire, if it is one that this implementation can speak of.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            BASE_ALLOCATION => Some(Self::BaseAllocation),
            ALLOCATION_DEPTH => Some(Self::AllocationDepth),
            _ => match name.strip_prefix(DIRTY_BITMAP) {
                Some(bitmap) if !bitmap.is_empty() && name.len() <= STRING_BYTES_MAX => {
                    Some(Self::DirtyBitmap(bitmap.to_owned()))
                }
                _ => None,
            },
        }
    }

    /// Whether `query` asks for this context when contexts are selected.
    pub(super) fn is_selected_by(&self, query: &str) -> bool {
        self.name() == query
    }

    /// Whether `query` asks for this context when contexts are listed, where wildcards count.
    pub(super) fn is_listed_by(&self, query: &str) -> bool {
        let wildcard = matches!(query, "base:" | "qemu:" | DIRTY_BITMAP);
        self.is_selected_by(query) || (wildcard && self.name().starts_with(query))
    }
}

/// Whether a query has the form that the protocol demands: a namespace, a colon, anything.
pub(super) fn is_query(query: &str) -> bool {
    query.find(':').is_some_and(|colon| colon > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_the_round_trip() {
        for context in [
            MetaContext::BaseAllocation,
            MetaContext::AllocationDepth,
            MetaContext::DirtyBitmap("b:0".into()),
        ] {
            assert_eq!(MetaContext::from_name(&context.name()), Some(context.clone()));
            assert!(is_query(&context.name()) && context.is_selected_by(&context.name()));
        }
        for name in ["base:", "qemu:", "qemu:dirty-bitmap:", "base:allocations", "x-thing:y", ""] {
            assert_eq!(MetaContext::from_name(name), None, "{name}");
        }
    }

    #[test]
    fn wildcards_list_but_do_not_select() {
        let bitmap = MetaContext::DirtyBitmap("b0".into());
        assert!(MetaContext::BaseAllocation.is_listed_by("base:"));
        assert!(!MetaContext::BaseAllocation.is_selected_by("base:"));
        assert!(!MetaContext::BaseAllocation.is_listed_by("qemu:"));
        assert!(bitmap.is_listed_by("qemu:") && bitmap.is_listed_by("qemu:dirty-bitmap:"));
        assert!(!bitmap.is_selected_by("qemu:dirty-bitmap:") && !bitmap.is_listed_by("qemu:dirty-bitmap:b"));
        assert!(!is_query("base") && !is_query(":x") && is_query("x-any:"));
    }
}

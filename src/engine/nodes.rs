//! The nodes of an engine: found by name, and shared where two images lie over one.
//!
//! Two overlays of one base read it through one node, with one file and one set of tables, and whoever wants to write it
//! is told of both. What counts as one is what was opened in one way: the same file, format and cache, under the same rule
//! of what its names may lead to.

use std::cell::RefCell;
use std::rc::{Rc, Weak};

use super::open::{Format, ImageOptions};
use crate::block::Node;
use crate::format::qcow2::Gate;
use crate::protocol::open::Cache;

/// How something below others was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Way {
    file: (u64, u64),
    format: Format,
    cache: Cache,
    lock: bool,
    gate: Gate,
    probe_backing: bool,
}

impl Way {
    /// `None`: nobody can tell which file it is.
    pub(super) fn of(file: &Node, format: Format, options: &ImageOptions) -> Option<Way> {
        let ImageOptions { cache, lock, gate, probe_backing, .. } = options;
        let (cache, lock, probe_backing) = (*cache, *lock, *probe_backing);
        Some(Way { file: file.identity()?, format, cache, lock, gate: gate.clone(), probe_backing })
    }
}

#[derive(Debug, Default)]
struct Lists {
    opened: RefCell<Vec<Weak<Node>>>,
    below: RefCell<Vec<(Way, Weak<Node>)>>,
}

/// The nodes of an engine; clones are the same lists. They keep nothing open.
#[derive(Clone, Debug, Default)]
pub struct Nodes(Rc<Lists>);

impl Nodes {
    /// What an image that is opened so names below it is shared with others of these.
    pub(super) fn with(&self, options: &ImageOptions) -> ImageOptions {
        ImageOptions { nodes: self.clone(), ..options.clone() }
    }

    /// One that was opened by itself.
    pub(super) fn add(&self, node: &Rc<Node>) {
        let mut opened = self.0.opened.borrow_mut();
        opened.retain(|old| old.strong_count() > 0);
        opened.push(Rc::downgrade(node));
    }

    /// What lies below others and was opened in this way.
    pub(super) fn below(&self, way: &Way) -> Option<Rc<Node>> {
        self.0.below.borrow().iter().filter(|(it, _)| it == way).find_map(|(_, node)| node.upgrade())
    }

    /// Something that lies below others.
    pub(super) fn add_below(&self, way: Way, node: &Rc<Node>) {
        let mut below = self.0.below.borrow_mut();
        below.retain(|(_, old)| old.strong_count() > 0);
        below.push((way, Rc::downgrade(node)));
    }

    /// All that are open, each once: those that were opened by themselves in the order of their opening, each followed by
    /// what it is built on.
    pub fn all(&self) -> Vec<Rc<Node>> {
        let mut found: Vec<Rc<Node>> = Vec::new();
        let mut due: Vec<_> = self.0.opened.borrow().iter().rev().filter_map(Weak::upgrade).collect();
        while let Some(node) = due.pop() {
            if found.iter().any(|other| Rc::ptr_eq(other, &node)) {
                continue;
            }
            due.extend(node.children().iter().rev().map(|child| child.node()));
            found.push(node);
        }
        found
    }

    /// The one that is called so: by the name that it was given, or the one that was made for it ([`Node::unique_name`]).
    pub fn find(&self, name: &str) -> Option<Rc<Node>> {
        let all = self.all();
        all.iter()
            .find(|node| node.name() == name)
            .or(all.iter().find(|node| node.unique_name() == name))
            .cloned()
    }
}

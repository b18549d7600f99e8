//! Edges of the graph: who uses a node, in which role, with which permissions.
//!
//! A [`Child`] is one use of a node. Clients, jobs and embedders have one ([`Node::attach`]), and so has whatever is built on
//! a node: an image on its file, a layer on its backing file. As long as there is one, the locks that it needs are held,
//! down to the files at the bottom; dropping it gives them back. It can be switched to another node while its user is
//! quiesced: then the locks of the new one are taken before those of the old one are given back, and a refusal changes
//! nothing.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use blockferry_ring::Errno;

use super::node::Node;
use super::{BlockError, IoResult, Operation, Permission, Permissions, Role};

/// One use of a node; dropping it ends the use.
pub struct Child {
    node: RefCell<Rc<Node>>,
    /// What is built on the node, where something is.
    user: Option<Rc<str>>,
    role: Cell<Role>,
    /// What an inner use has said that it needs.
    given: Cell<Permissions>,
    /// Jobs that write below what is built on the node, and see to it that it shows the same all the while.
    lenient: Cell<u32>,
    /// It moves with those who pivot.
    follows: bool,
    /// The disk whose chain a job works on: whatever it does to this node, it sees to it that that disk shows the same.
    disk: Weak<Node>,
}

impl std::fmt::Debug for Child {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Child")
            .field("node", &self.node.borrow().name())
            .field("user", &self.who())
            .field("role", &self.role.get())
            .finish_non_exhaustive()
    }
}

impl Child {
    fn register(node: &Rc<Node>, child: Child) -> Rc<Child> {
        let child = Rc::new(child);
        node.edges().borrow_mut().push(Rc::downgrade(&child));
        child
    }

    /// An image called `user` is built on `node`. It needs nothing of it yet ([`Child::set_permissions`]).
    pub fn inner(node: &Rc<Node>, role: Role, user: impl Into<Rc<str>>) -> Rc<Child> {
        debug_assert!(role.is_inner());
        Child::register(
            node,
            Child {
                node: RefCell::new(node.clone()),
                user: Some(user.into()),
                role: Cell::new(role),
                given: Cell::new(Permissions::NONE),
                lenient: Cell::new(0),
                follows: false,
                disk: Weak::new(),
            },
        )
    }

    pub(super) fn attach(
        node: &Rc<Node>,
        role: Role,
        follows: bool,
        disk: Weak<Node>,
    ) -> Result<Rc<Child>, BlockError> {
        let child = Child {
            node: RefCell::new(node.clone()),
            user: None,
            role: Cell::new(role),
            given: Cell::new(Permissions::NONE),
            lenient: Cell::new(0),
            follows,
            disk,
        };
        node.check(&child)?;
        let child = Child::register(node, child);
        node.apply_permissions()?;
        Ok(child)
    }

    /// The node that is used.
    pub fn node(&self) -> Rc<Node> {
        self.node.borrow().clone()
    }

    /// In which role.
    pub fn role(&self) -> Role {
        self.role.get()
    }

    /// Whether it moves with those who pivot.
    pub(super) fn follows(&self) -> bool {
        self.follows
    }

    /// Who it is, for people.
    pub(super) fn who(&self) -> String {
        match (&self.user, self.role.get()) {
            (Some(user), Role::Backing) => format!("the image '{user}', as its backing file"),
            (Some(user), Role::DataFile) => format!("the image '{user}', as its data file"),
            (Some(user), Role::File) => format!("the image '{user}', as its file"),
            (Some(user), _) => format!("the disk '{user}'"),
            (None, role) => role.to_string(),
        }
    }

    /// What it takes and shares.
    pub(super) fn permissions(&self) -> Permissions {
        if self.role.get().is_inner() { self.given.get() } else { self.role.get().permissions() }
    }

    /// Whether this is a job's use that does no harm to the other one, which lies in the chain that the job works on.
    fn keeps_whole(&self, other: &Child) -> bool {
        let Some(disk) = self.disk.upgrade().filter(|_| other.role.get() == Role::Backing) else {
            return false;
        };
        let below = |node: &Rc<Node>| node.driver().as_layer().and_then(|layer| layer.backing());
        disk.chain().iter().filter_map(below).any(|child| std::ptr::eq(&*child, other))
    }

    /// Whether both may use one node at the same time.
    pub(super) fn agrees_with(&self, other: &Child) -> bool {
        let (role, others) = (self.role.get(), other.role.get());
        if !role.is_inner() && !others.is_inner() {
            return role.agrees_with(others);
        }
        let is_promise = |role, other| role == Role::PromisedTarget && other != Role::Backing;
        self.lenient.get() + other.lenient.get() > 0
            || self.keeps_whole(other)
            || other.keeps_whole(self)
            || is_promise(role, others)
            || is_promise(others, role)
            || self.permissions().agree_with(other.permissions())
    }

    /// What stands between the two.
    pub(super) fn conflict_with(&self, other: &Child, node: &Node) -> BlockError {
        let (name, role, others) = (node.name(), self.role.get(), other.role.get());
        let hint = match (others.job(), others) {
            (Some(job), _) if !role.is_inner() => {
                format!("Node '{name}' is busy: block device is in use by block job: {job}")
            }
            (None, Role::Reader | Role::Guest) if !role.is_inner() => {
                format!("Node '{name}' is in use by a client and cannot be the target of a job")
            }
            _ => {
                let denied = |one: &Child, other: &Child| {
                    let (one, other) = (one.permissions(), other.permissions());
                    Permission::ALL.into_iter().find(|it| one.uses(*it) && !other.shares(*it))
                };
                let what = denied(self, other).or_else(|| denied(other, self));
                let what = what.map_or(String::new(), |what| format!(" ('{}' is not shared)", what.name()));
                format!(
                    "Node '{name}' is in use by {}, which does not go with {}{what}",
                    other.who(),
                    self.who()
                )
            }
        };
        BlockError::new(Operation::Lock, node.driver().name(), Errno::EBUSY).hint(hint)
    }

    /// What is built on the node needs this of it from now on. On an error nothing has changed.
    pub fn set_permissions(&self, permissions: Permissions) -> IoResult {
        let node = self.node();
        let old = self.given.replace(permissions);
        if old == permissions {
            return Ok(());
        }
        node.check(self).and_then(|()| node.apply_permissions()).inspect_err(|_| self.given.set(old))
    }

    /// Uses another node from now on. Its user is quiesced, or goes on with what it has in its hands.
    pub fn switch_to(self: &Rc<Child>, node: &Rc<Node>) -> IoResult {
        let old = self.node();
        if Rc::ptr_eq(&old, node) {
            return Ok(());
        }
        node.check(self)?;
        node.edges().borrow_mut().push(Rc::downgrade(self));
        if let Err(error) = node.apply_permissions() {
            node.forget(self);
            return Err(error);
        }
        self.node.replace(node.clone());
        old.forget(self);
        old.give_back();
        Ok(())
    }

    /// What is built on the node agrees with whoever writes it, until what this gives is dropped: a job writes below, and
    /// sees to it that it shows the same all the while.
    pub fn lenient(self: &Rc<Child>) -> Lenient {
        self.lenient.set(self.lenient.get() + 1);
        Lenient(self.clone())
    }

    pub(super) fn set_node(&self, node: &Rc<Node>) {
        self.node.replace(node.clone());
    }

    pub(super) fn set_role(&self, role: Role) -> Role {
        self.role.replace(role)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let node = self.node();
        // One that was refused has nothing to give back.
        if node.forget(self) {
            node.give_back();
        }
    }
}

/// A use that agrees with whoever writes.
#[derive(Debug)]
pub struct Lenient(Rc<Child>);

impl Drop for Lenient {
    fn drop(&mut self) {
        self.0.lenient.set(self.0.lenient.get() - 1);
    }
}

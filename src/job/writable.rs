//! A layer that a job writes: its right to do so, and what it uses meanwhile, given back when the job is over.

use std::cell::RefCell;
use std::rc::Rc;

use blockferry_ring::Ring;

use crate::block::BlockError;
use crate::graph::node::{Child, Lenient, Node};

/// What ends with the right to write, in this order.
#[derive(Debug)]
struct Held {
    _uses: Vec<Rc<Child>>,
    _lenient: Option<Lenient>,
}

/// A layer that may be written, and uses of it and of others that end with that.
#[derive(Debug)]
pub(super) struct Writable {
    ring: Ring,
    node: Rc<Node>,
    held: RefCell<Option<Held>>,
}

impl Writable {
    /// Makes `node` writable. `uses` hold what that needs; `lenient` is the layer above whom that does not harm.
    pub(super) async fn hold(
        ring: &Ring,
        node: &Rc<Node>,
        uses: Vec<Rc<Child>>,
        lenient: Option<Lenient>,
    ) -> Result<Writable, BlockError> {
        node.hold_writable().await?;
        let held = RefCell::new(Some(Held { _uses: uses, _lenient: lenient }));
        Ok(Writable { ring: ring.clone(), node: node.clone(), held })
    }

    /// The layer.
    pub(super) fn node(&self) -> &Rc<Node> {
        &self.node
    }

    /// Grows it to `len` bytes, if it is shorter. It lies in the chain of `front`: what is below it must not change while
    /// the new part shows what that hides.
    pub(super) async fn grow(&self, front: &Rc<Node>, len: u64) -> Result<(), BlockError> {
        let _alone = front.relinking().await;
        let driver = self.node.driver();
        if driver.len() < len { driver.set_len(len).await } else { Ok(()) }
    }

    /// Gives everything back, once.
    pub(super) async fn release(&self) {
        let held = self.held.borrow_mut().take();
        if held.is_some() {
            self.node.release_writable().await;
        }
    }

    /// Somebody else has the right to write from now on; only the uses end.
    pub(super) fn hand_over(&self) {
        self.node.stay_writable();
    }
}

impl Drop for Writable {
    /// Of a job that was given up while requests of it were stuck.
    fn drop(&mut self) {
        if let Some(held) = self.held.borrow_mut().take() {
            let node = self.node.clone();
            self.ring.spawn(async move {
                node.release_writable().await;
                drop(held);
            });
        }
    }
}

//! Pins: how a place in a file is kept from being used again while somebody still looks at it.
//!
//! A request that has found out where its bytes are holds a [`Pin`] until it has read them. What is freed
//! meanwhile belongs to an epoch, and may be used again once every pin of that epoch and of older ones is
//! gone. Pins that are taken later cannot have seen what was freed before.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

/// Epochs of one image.
#[derive(Debug, Default)]
pub struct Epochs {
    /// Pins by epoch, the oldest first; the last is the present one.
    counts: RefCell<VecDeque<u32>>,
    /// The number of the oldest.
    first: Cell<u64>,
}

/// Keeps what it has seen from being used again.
#[derive(Debug)]
pub struct Pin {
    epochs: Rc<Epochs>,
    epoch: u64,
}

impl Epochs {
    fn present(&self) -> u64 {
        let mut counts = self.counts.borrow_mut();
        if counts.is_empty() {
            counts.push_back(0);
        }
        self.first.get() + counts.len() as u64 - 1
    }

    /// A pin in the present epoch.
    pub fn enter(self: &Rc<Epochs>) -> Pin {
        let epoch = self.present();
        if let Some(count) = self.counts.borrow_mut().back_mut() {
            *count += 1;
        }
        Pin { epochs: self.clone(), epoch }
    }

    /// Ends the present epoch and gives its number.
    pub fn close(&self) -> u64 {
        let epoch = self.present();
        self.counts.borrow_mut().push_back(0);
        self.forget();
        epoch
    }

    /// Nobody of this epoch, or of an older one, is left.
    pub fn is_past(&self, epoch: u64) -> bool {
        self.forget();
        epoch < self.first.get()
    }

    fn forget(&self) {
        let mut counts = self.counts.borrow_mut();
        while counts.len() > 1 && counts.front() == Some(&0) {
            counts.pop_front();
            self.first.set(self.first.get() + 1);
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let index = self.epoch - self.epochs.first.get();
        if let Some(count) = self.epochs.counts.borrow_mut().get_mut(index as usize) {
            *count -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_past_when_all_older_pins_are_gone() {
        let epochs = Rc::new(Epochs::default());
        let first = epochs.enter();
        let e0 = epochs.close();
        let second = epochs.enter();
        let e1 = epochs.close();
        let third = epochs.enter();
        assert!(!epochs.is_past(e0) && !epochs.is_past(e1));
        drop(second);
        assert!(!epochs.is_past(e0) && !epochs.is_past(e1), "an older pin is still there");
        drop(first);
        assert!(epochs.is_past(e0) && epochs.is_past(e1));
        let e2 = epochs.close();
        assert!(!epochs.is_past(e2));
        drop(third);
        assert!(epochs.is_past(e2));
        let e3 = epochs.close();
        assert!(epochs.is_past(e3));
    }
}

//! A link in the simulated world between a client and a server. On its first connection it does harm once, at a given
//! byte of what the server sends; later connections are left alone. And it can hold what is on its way, on the connections
//! that there are, and let it go later.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry_ring::sync::{Either, Notify, either};
use blockferry_ring::{File, Ring, SocketAddress};

/// The harm, and the byte at which it is done.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Harm {
    /// Nothing comes any more.
    Stall(u64),
    /// Both ends are cut.
    Cut(u64),
    /// Some bits are turned over.
    Flip(u64, u8),
    /// Rubbish comes instead of the rest.
    Rubbish(u64),
}

impl Harm {
    fn at(self) -> u64 {
        match self {
            Harm::Stall(at) | Harm::Cut(at) | Harm::Flip(at, _) | Harm::Rubbish(at) => at,
        }
    }
}

struct Inner {
    ring: Ring,
    server: SocketAddress,
    /// Taken by the first connection.
    harm: Cell<Option<Harm>>,
    streams: RefCell<Vec<File>>,
    closed: Cell<bool>,
    /// Connections so far, and how many of the first of them are held.
    count: Cell<u32>,
    held: Cell<u32>,
    over: Notify,
}

pub struct Link(Rc<Inner>);

impl Link {
    pub fn new(ring: &Ring, near: &str, far: &str, harm: Harm) -> Link {
        let (listener, _) = ring.listen(&SocketAddress::Unix(near.into())).unwrap();
        let inner = Rc::new(Inner {
            ring: ring.clone(),
            server: SocketAddress::Unix(far.into()),
            harm: Cell::new(Some(harm)),
            streams: RefCell::default(),
            closed: Cell::new(false),
            count: Cell::new(0),
            held: Cell::new(0),
            over: ring.notify(),
        });
        let link = inner.clone();
        ring.spawn(async move {
            loop {
                let over = link.over.until(|| link.closed.get().then_some(()));
                let Either::Second(Ok(near)) = either(over, link.ring.accept(&listener)).await else {
                    return;
                };
                let Ok(far) = link.ring.connect(&link.server) else { continue };
                link.streams.borrow_mut().extend([near.clone(), far.clone()]);
                let harm = link.harm.take();
                let number = link.count.get();
                link.count.set(number + 1);
                let (one, other) = (link.clone(), link.clone());
                let (a, b) = (near.clone(), far.clone());
                link.ring.spawn(async move { one.pump(number, &a, &b, None).await });
                link.ring.spawn(async move { other.pump(number, &far, &near, harm).await });
            }
        });
        Link(inner)
    }

    /// Nothing gets through on the connections that there are; new ones are well.
    pub fn hold(&self) {
        self.0.held.set(self.0.count.get());
    }

    /// Nothing gets through, on those to come neither.
    pub fn hold_all(&self) {
        self.0.held.set(u32::MAX);
    }

    /// What was held goes on.
    pub fn release(&self) {
        self.0.held.set(0);
        self.0.over.notify();
    }

    pub fn close(&self) {
        self.0.closed.set(true);
        self.0.over.notify();
        self.0.streams.borrow().iter().for_each(|stream| self.0.ring.shutdown_stream(stream));
        self.0.streams.borrow_mut().clear();
    }
}

impl Inner {
    async fn pump(&self, number: u32, from: &File, to: &File, harm: Option<Harm>) {
        let mut passed = 0u64;
        loop {
            let (mut buf, received) = self.ring.recv(from, self.ring.alloc(16 << 10).await).await;
            let count = match received {
                Ok(count) if count > 0 => count as usize,
                _ => break,
            };
            buf.truncate(count);
            let goes_on = || (self.closed.get() || number >= self.held.get()).then_some(());
            self.over.until(goes_on).await;
            let end = passed + count as u64;
            let hit = harm.filter(|harm| harm.at() < end);
            // From the place of the harm on.
            let at = hit.map_or(count, |harm| harm.at().saturating_sub(passed) as usize);
            let mut silent = false;
            match hit {
                None => {}
                Some(Harm::Stall(_)) => silent = true,
                Some(Harm::Cut(_)) => {
                    buf.truncate(at.max(1));
                    if at > 0 {
                        let _ = self.ring.send(to, buf.freeze()).await;
                    }
                    break;
                }
                Some(Harm::Flip(place, bits)) if place >= passed => buf.as_mut_slice()[at] ^= bits,
                Some(Harm::Flip(..)) => {}
                Some(Harm::Rubbish(_)) => {
                    let rubbish = buf.as_mut_slice()[at..].iter_mut().enumerate();
                    rubbish.for_each(|(i, byte)| *byte = (i as u8).wrapping_mul(0x9d) ^ 0x5a);
                }
            }
            if silent && at == 0 {
                passed = end;
                continue;
            }
            if silent {
                buf.truncate(at);
            }
            passed = end;
            if self.ring.send(to, buf.freeze()).await.is_err() {
                break;
            }
        }
        self.ring.shutdown_stream(to);
        self.ring.shutdown_stream(from);
    }
}

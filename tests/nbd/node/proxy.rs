//! A link between a client and a server that can be cut, closed and led elsewhere.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

#[derive(Default)]
struct State {
    /// Both ends of every connection.
    streams: Mutex<Vec<UnixStream>>,
    server: Mutex<PathBuf>,
    refuses: AtomicBool,
    over: AtomicBool,
    /// Bytes that may pass before the next cut; 0: no cuts.
    left: AtomicI64,
    cuts: AtomicUsize,
}

/// Bytes between cuts, in turn. Some are more than the largest request.
const LOTS: [i64; 7] = [4 << 20, 60_000, 3 << 20, 1_500_000, 1000, 6 << 20, 300];

pub struct Proxy {
    state: Arc<State>,
    folder: tempfile::TempDir,
    acceptor: Option<JoinHandle<()>>,
}

impl State {
    fn cut(&self) {
        let streams = std::mem::take(&mut *self.streams.lock().unwrap());
        // Either end may have gone already.
        streams.iter().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    }

    /// Bytes have passed.
    fn passed(&self, bytes: usize) {
        if self.left.load(Ordering::SeqCst) == 0 {
            return;
        }
        if self.left.fetch_sub(bytes as i64, Ordering::SeqCst) <= bytes as i64 {
            let cuts = self.cuts.fetch_add(1, Ordering::SeqCst) + 1;
            self.left.store(LOTS[cuts % LOTS.len()], Ordering::SeqCst);
            self.cut();
        }
    }
}

fn pump(state: &State, mut from: UnixStream, mut to: UnixStream) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(n) = from.read(&mut bytes) {
        if n == 0 || to.write_all(&bytes[..n]).is_err() {
            break;
        }
        state.passed(n);
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

impl Proxy {
    pub fn new(server: &Path) -> Proxy {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("link")).unwrap();
        let state = Arc::new(State { server: Mutex::new(server.to_owned()), ..State::default() });
        let shared = state.clone();
        let acceptor = std::thread::spawn(move || {
            while let Ok((near, _)) = listener.accept() {
                if shared.over.load(Ordering::SeqCst) {
                    return;
                }
                if shared.refuses.load(Ordering::SeqCst) {
                    continue;
                }
                let server = shared.server.lock().unwrap().clone();
                let Ok(far) = UnixStream::connect(server) else { continue };
                let ends = [near.try_clone().unwrap(), far.try_clone().unwrap()];
                shared.streams.lock().unwrap().extend(ends);
                let (a, b) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                let (one, other) = (shared.clone(), shared.clone());
                std::thread::spawn(move || pump(&one, near, far));
                std::thread::spawn(move || pump(&other, b, a));
            }
        });
        Proxy { state, folder, acceptor: Some(acceptor) }
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.folder.path().join("link").display())
    }

    /// Cuts all connections.
    pub fn cut(&self) {
        self.state.cut();
    }

    /// New connections end at once.
    pub fn refuse(&self) {
        self.state.refuses.store(true, Ordering::SeqCst);
    }

    /// New connections are let through again.
    pub fn allow(&self) {
        self.state.refuses.store(false, Ordering::SeqCst);
    }

    /// New connections lead to another server.
    pub fn lead_to(&self, server: &Path) {
        *self.state.server.lock().unwrap() = server.to_owned();
    }

    /// From now on cuts all connections whenever some bytes have passed, sometimes few and sometimes many.
    pub fn cut_often(&self) {
        self.state.left.store(LOTS[0], Ordering::SeqCst);
    }

    /// How often that happened.
    pub fn cuts(&self) -> usize {
        self.state.cuts.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.over.store(true, Ordering::SeqCst);
        // The acceptor looks up when somebody comes.
        let _ = UnixStream::connect(self.folder.path().join("link"));
        self.state.cut();
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

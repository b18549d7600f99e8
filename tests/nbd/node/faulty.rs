//! An NBD server of few words with faults that no real one has on demand: it says that it shuts down, refuses for the moment
//! or for good, hangs up at options, fails block status, has very large blocks, or loses what it has not flushed and comes
//! back, as another disk if need be. Its disk is memory that its successors on the same socket keep.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

const OPTION: u64 = 0x0003_e889_0455_65a9;
pub const ESHUTDOWN: u32 = 108;

/// What it does wrong.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// `GO` is refused with these, one a connection, before it is taken.
    pub refusals: VecDeque<u32>,
    /// It hangs up when it is asked for one of these options.
    pub hangs_up_at: Vec<u32>,
    /// The smallest, preferred and largest block.
    pub blocks: Option<[u32; 3]>,
    /// From this request on (counted over all connections) the answer is ESHUTDOWN, so many times.
    pub shutdown: Option<(u64, u64)>,
    /// Block status fails with this.
    pub status_errno: u32,
    /// Instead of answering these writes (counted over all connections) its machine goes down with what was not flushed.
    pub lapses: Vec<u64>,
    /// Size and flags of what is there after that.
    pub then: Option<(u64, u16)>,
}

/// There are flags; flush, FUA, trim, zeroes.
pub const FLAGS: u16 = 109;
pub const READ_ONLY: u16 = 2;

struct State {
    faults: Faults,
    disk: Vec<u8>,
    /// What of it was flushed.
    durable: Vec<u8>,
    flags: u16,
    connections: u64,
    requests: u64,
    writes: u64,
    /// Lengths of reads and writes.
    longest: u32,
    status_asked: u64,
}

pub struct Faulty {
    state: Arc<Mutex<State>>,
    folder: tempfile::TempDir,
}

impl Faulty {
    pub fn new(disk: Vec<u8>, faults: Faults) -> Faulty {
        let folder = tempfile::tempdir().unwrap();
        let state = State {
            faults,
            durable: disk.clone(),
            disk,
            flags: FLAGS,
            connections: 0,
            requests: 0,
            writes: 0,
            longest: 0,
            status_asked: 0,
        };
        let state = Arc::new(Mutex::new(state));
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        let shared = state.clone();
        // It ends with the test.
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let shared = shared.clone();
                std::thread::spawn(move || drop(talk(stream, &shared)));
            }
        });
        Faulty { state, folder }
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub fn uri(&self) -> String {
        uri(&self.socket())
    }

    pub fn connections(&self) -> u64 {
        self.state.lock().unwrap().connections
    }

    /// The longest read or write, and how often it was asked for block status.
    pub fn asked(&self) -> (u32, u64) {
        let state = self.state.lock().unwrap();
        (state.longest, state.status_asked)
    }

    pub fn disk(&self) -> Vec<u8> {
        self.state.lock().unwrap().disk.clone()
    }

    pub fn durable(&self) -> Vec<u8> {
        self.state.lock().unwrap().durable.clone()
    }
}

impl State {
    /// Whether this request is its end.
    fn goes_down(&mut self, kind: u64) -> bool {
        self.writes += u64::from(kind == 1);
        let goes_down = kind == 1 && self.faults.lapses.contains(&self.writes);
        if goes_down {
            self.disk = self.durable.clone();
            if let Some((size, flags)) = self.faults.then {
                self.disk.resize(size as usize, 0);
                self.flags = flags;
            }
        }
        goes_down
    }
}

pub fn uri(socket: &Path) -> String {
    format!("nbd+unix:///disk?socket={}", socket.display())
}

fn take<const N: usize>(stream: &mut UnixStream) -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn reply(stream: &mut UnixStream, option: u32, kind: u32, data: &[u8]) -> std::io::Result<()> {
    let mut out = OPTION.to_be_bytes().to_vec();
    for word in [option, kind, data.len() as u32] {
        out.extend(word.to_be_bytes());
    }
    out.extend(data);
    stream.write_all(&out)
}

/// Whether replies are structured; `None` when there is no session.
fn shake_hands(stream: &mut UnixStream, state: &Mutex<State>) -> std::io::Result<Option<bool>> {
    stream.write_all(b"NBDMAGICIHAVEOPT\x00\x03")?;
    let flags = number(&take::<4>(stream)?);
    let mut structured = false;
    let (faults, size, export_flags) = {
        let mut state = state.lock().unwrap();
        state.connections += 1;
        (state.faults.clone(), state.disk.len() as u64, state.flags)
    };
    loop {
        let head: [u8; 16] = take(stream)?;
        let (option, length) = (number(&head[8..12]) as u32, number(&head[12..]) as usize);
        stream.read_exact(&mut vec![0; length])?;
        if faults.hangs_up_at.contains(&option) {
            return Ok(None);
        }
        let export = [&size.to_be_bytes()[..], &export_flags.to_be_bytes()].concat();
        match option {
            1 => {
                stream.write_all(&export)?;
                stream.write_all(&vec![0; if flags & 2 == 0 { 124 } else { 0 }])?;
                return Ok(Some(structured));
            }
            2 => return Ok(None),
            7 => {
                let refusal = state.lock().unwrap().faults.refusals.pop_front();
                if let Some(refusal) = refusal {
                    reply(stream, 7, 0x8000_0000 | refusal, b"not here")?;
                    continue;
                }
                reply(stream, 7, 3, &[&[0, 0], &export[..]].concat())?;
                if let Some(blocks) = faults.blocks {
                    let blocks: Vec<u8> = blocks.iter().flat_map(|block| block.to_be_bytes()).collect();
                    reply(stream, 7, 3, &[&[0, 3], &blocks[..]].concat())?;
                }
                reply(stream, 7, 1, &[])?;
                return Ok(Some(structured));
            }
            8 => {
                structured = true;
                reply(stream, 8, 1, &[])?;
            }
            10 => {
                reply(stream, 10, 4, b"\x00\x00\x00\x01base:allocation")?;
                reply(stream, 10, 1, &[])?;
            }
            other => reply(stream, other, 0x8000_0001, &[])?,
        }
    }
}

fn talk(mut stream: UnixStream, state: &Mutex<State>) -> std::io::Result<()> {
    let Some(structured) = shake_hands(&mut stream, state)? else { return stream.shutdown(Shutdown::Both) };
    loop {
        let head: [u8; 28] = take(&mut stream)?;
        let (kind, cookie) = (number(&head[6..8]), &head[8..16]);
        let (offset, length) = (number(&head[16..24]), number(&head[24..]) as u32);
        let mut data = vec![0; if kind == 1 { length as usize } else { 0 }];
        stream.read_exact(&mut data)?;
        if kind == 2 {
            return Ok(());
        }
        let (errno, chunk, payload) = {
            let mut state = state.lock().unwrap();
            state.requests += 1;
            if state.goes_down(kind) {
                return stream.shutdown(Shutdown::Both);
            }
            let (range, least) = (offset as usize..offset as usize + length as usize, state.faults.blocks);
            let goes = state
                .faults
                .shutdown
                .is_some_and(|(at, times)| state.requests >= at && state.requests < at.saturating_add(times));
            let misfits =
                least.is_some_and(|[least, ..]| offset % u64::from(least) != 0 || length % least != 0);
            if goes {
                (ESHUTDOWN, 0, Vec::new())
            } else if misfits && kind != 3 {
                (22, 0, Vec::new())
            } else if kind <= 1 {
                state.longest = state.longest.max(length);
                if kind == 1 {
                    state.disk[range.clone()].copy_from_slice(&data);
                    if head[5] & 1 != 0 {
                        state.durable[range].copy_from_slice(&data);
                    }
                    (0, 0, Vec::new())
                } else {
                    (0, 1, [&offset.to_be_bytes()[..], &state.disk[range]].concat())
                }
            } else if kind == 6 {
                state.disk[range].fill(0);
                (0, 0, Vec::new())
            } else if kind == 3 {
                state.durable = state.disk.clone();
                (0, 0, Vec::new())
            } else if kind == 7 {
                state.status_asked += 1;
                let extent = [1u32, length, 0].map(u32::to_be_bytes).concat();
                (state.faults.status_errno, 5, extent)
            } else {
                (0, 0, Vec::new())
            }
        };
        let mut out = Vec::new();
        if structured {
            let (chunk, payload) = match errno {
                0 => (chunk, payload),
                errno => (0x8001u16, [&errno.to_be_bytes()[..], &[0, 0]].concat()),
            };
            out.extend(0x668e_33efu32.to_be_bytes());
            out.extend(1u16.to_be_bytes());
            out.extend(chunk.to_be_bytes());
            out.extend(cookie);
            out.extend((payload.len() as u32).to_be_bytes());
            out.extend(payload);
        } else {
            out.extend(0x6744_6698u32.to_be_bytes());
            out.extend(errno.to_be_bytes());
            out.extend(cookie);
            out.extend(payload.get(8..).filter(|_| kind == 0 && errno == 0).unwrap_or_default());
        }
        stream.write_all(&out)?;
        if errno == ESHUTDOWN {
            return stream.shutdown(Shutdown::Both);
        }
    }
}

//! A client that writes every byte itself, so that it can be as impolite as it likes. Nothing of the codec is used.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const WRITE_ZEROES: u16 = 6;
pub const BLOCK_STATUS: u16 = 7;
pub const FLAG_NO_HOLE: u16 = 1 << 1;
pub const FLAG_DF: u16 = 1 << 2;
pub const FLAG_REQ_ONE: u16 = 1 << 3;
pub const FLAG_FAST_ZERO: u16 = 1 << 4;

pub struct Raw {
    pub stream: UnixStream,
    /// Bytes of the export.
    pub size: u64,
}

/// What a reply said.
#[derive(Debug, Default)]
pub struct Reply {
    /// 0 is success.
    pub error: u32,
    /// (offset, bytes) of each data chunk, in the order in which they came.
    pub data: Vec<(u64, Vec<u8>)>,
    /// (length, flags) of each extent.
    pub extents: Vec<(u32, u32)>,
}

impl Reply {
    /// The data chunks in the order of their offsets.
    pub fn bytes(mut self) -> Vec<u8> {
        self.data.sort();
        self.data.into_iter().flat_map(|(_, bytes)| bytes).collect()
    }
}

fn take<const N: usize>(stream: &mut UnixStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).expect("the server answers");
    bytes
}

fn u32_of(stream: &mut UnixStream) -> u32 {
    u32::from_be_bytes(take(stream))
}

fn u64_of(stream: &mut UnixStream) -> u64 {
    u64::from_be_bytes(take(stream))
}

impl Raw {
    fn greet(mut stream: UnixStream) -> UnixStream {
        assert_eq!(&take::<16>(&mut stream), b"NBDMAGICIHAVEOPT");
        assert_eq!(take::<2>(&mut stream), [0, 3]);
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream
    }

    fn option(stream: &mut UnixStream, code: u32, data: &[u8]) {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(code.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        stream.write_all(&bytes).unwrap();
    }

    /// The type and payload of one option reply.
    fn option_reply(stream: &mut UnixStream) -> (u32, Vec<u8>) {
        assert_eq!(u64_of(stream), 0x0003_e889_0455_65a9);
        let _option = u32_of(stream);
        let kind = u32_of(stream);
        let mut payload = vec![0; u32_of(stream) as usize];
        stream.read_exact(&mut payload).unwrap();
        (kind, payload)
    }

    /// Without structured replies, by the option of old.
    pub fn simple(stream: UnixStream, export: &str) -> Raw {
        let mut stream = Raw::greet(stream);
        Raw::option(&mut stream, 1, export.as_bytes());
        let size = u64_of(&mut stream);
        let _flags: [u8; 2] = take(&mut stream);
        Raw { stream, size }
    }

    /// Sends all that is needed to enter transmission, and reads nothing of the answer.
    pub fn ask(stream: UnixStream, export: &str) -> UnixStream {
        let mut stream = Raw::greet(stream);
        Raw::option(&mut stream, 8, &[]);
        assert_eq!(Raw::option_reply(&mut stream).0, 1);
        let name = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes()].concat();
        let query = "base:allocation";
        let queries =
            [&1u32.to_be_bytes()[..], &(query.len() as u32).to_be_bytes(), query.as_bytes()].concat();
        Raw::option(&mut stream, 10, &[&name[..], &queries].concat());
        assert_eq!(Raw::option_reply(&mut stream).0, 4);
        assert_eq!(Raw::option_reply(&mut stream).0, 1);
        Raw::option(&mut stream, 7, &[&name[..], &[0, 0]].concat());
        stream
    }

    /// Reads the answer to [`Raw::ask`].
    pub fn answered(mut stream: UnixStream) -> Raw {
        let mut size = None;
        loop {
            match Raw::option_reply(&mut stream) {
                (3, info) if info[..2] == [0, 0] => {
                    size = Some(u64::from_be_bytes(info[2..10].try_into().unwrap()));
                }
                (3, _) => {}
                (1, _) => return Raw { stream, size: size.expect("the size is told") },
                (kind, text) => panic!("reply {kind:#x}: {}", String::from_utf8_lossy(&text)),
            }
        }
    }

    /// With structured replies and `base:allocation`.
    pub fn structured(stream: UnixStream, export: &str) -> Raw {
        Raw::answered(Raw::ask(stream, export))
    }

    pub fn header(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes
    }

    pub fn send(&mut self, flags: u16, command: u16, cookie: u64, offset: u64, length: u32) {
        self.stream.write_all(&Raw::header(flags, command, cookie, offset, length)).unwrap();
    }

    /// Reads one simple reply; `data` is what a read asked for.
    pub fn simple_reply(&mut self, data: usize) -> (u64, u32, Vec<u8>) {
        assert_eq!(u32_of(&mut self.stream), 0x6744_6698);
        let error = u32_of(&mut self.stream);
        let cookie = u64_of(&mut self.stream);
        let mut bytes = vec![0; if error == 0 { data } else { 0 }];
        self.stream.read_exact(&mut bytes).unwrap();
        (cookie, error, bytes)
    }

    /// Reads one whole reply of a structured session in which one request is in flight.
    pub fn reply(&mut self, cookie: u64) -> Reply {
        let mut reply = Reply::default();
        loop {
            let magic = u32_of(&mut self.stream);
            if magic == 0x6744_6698 {
                reply.error = u32_of(&mut self.stream);
                assert_eq!(u64_of(&mut self.stream), cookie);
                return reply;
            }
            assert_eq!(magic, 0x668e_33ef);
            let [_, flags, kind_high, kind_low] = take(&mut self.stream);
            assert_eq!(u64_of(&mut self.stream), cookie);
            let mut payload = vec![0; u32_of(&mut self.stream) as usize];
            self.stream.read_exact(&mut payload).unwrap();
            let word = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
            match (kind_high, kind_low) {
                (0, 0) => {}
                (0, 1) => {
                    let offset = u64::from_be_bytes(payload[..8].try_into().unwrap());
                    reply.data.push((offset, payload[8..].to_vec()));
                }
                (0, 5) => {
                    let extents = (4..payload.len()).step_by(8);
                    reply.extents.extend(extents.map(|at| (word(at), word(at + 4))));
                }
                (0x80, _) => reply.error = word(0),
                other => panic!("chunk {other:?}"),
            }
            if flags & 1 == 1 {
                return reply;
            }
        }
    }

    /// Reads one reply to a read, whichever comes; gives its cookie.
    pub fn any_reply(&mut self) -> u64 {
        let mut head = [0; 20];
        self.stream.read_exact(&mut head).unwrap();
        assert_eq!(head[..8], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1], "the last data chunk");
        let mut payload = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
        self.stream.read_exact(&mut payload).unwrap();
        u64::from_be_bytes(head[8..16].try_into().unwrap())
    }

    /// One request and its reply.
    pub fn call(&mut self, flags: u16, command: u16, offset: u64, length: u32) -> Reply {
        self.send(flags, command, 77, offset, length);
        self.reply(77)
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Reply {
        self.send(0, WRITE, 78, offset, bytes.len() as u32);
        self.stream.write_all(bytes).unwrap();
        self.reply(78)
    }

    /// Whether the server has hung up.
    pub fn is_over(&mut self) -> bool {
        let mut rest = Vec::new();
        // A reset ends it as well as an end does.
        self.stream.read_to_end(&mut rest).map_or(true, |n| n == 0)
    }
}

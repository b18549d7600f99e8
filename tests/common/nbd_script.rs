//! What a hostile client sends: a handshake and one request of each kind, as bytes, to be cut anywhere. Nothing of the
//! codec is used.

/// Where it writes; whoever checks what it wrote keeps away from there.
pub const AREA: u64 = 4 << 20;

/// All that a hostile client may send, and where requests begin in it.
#[derive(Debug)]
pub struct Script {
    pub bytes: Vec<u8>,
    pub handshake_bytes: usize,
    pub marks: Vec<usize>,
}

impl Script {
    pub fn new() -> Script {
        let mut bytes = 3u32.to_be_bytes().to_vec();
        let mut option = |code: u32, data: &[u8]| {
            bytes.extend(b"IHAVEOPT");
            bytes.extend(code.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
        };
        let name = [&4u32.to_be_bytes()[..], b"disk"].concat();
        let query = [&1u32.to_be_bytes()[..], &15u32.to_be_bytes(), b"base:allocation"].concat();
        // An option that nobody knows, structured replies, the list, a context, and the choice.
        option(0x7777, b"rubbish");
        option(8, b"");
        option(3, b"");
        option(10, &[&name[..], &query].concat());
        option(7, &[&name[..], &[0, 0]].concat());
        let mut script = Script { handshake_bytes: bytes.len(), bytes, marks: Vec::new() };
        const READ: u16 = 0;
        const WRITE: u16 = 1;
        script.request(READ, 0, 4096);
        script.request(WRITE, 4097, 600);
        script.request(READ, 0, 200_000);
        // Write zeroes, with and without haste; cache; trim; flush; block status; nonsense.
        script.request(6 | 1 << 12, 8192, 70_000);
        script.request(6, 1, 3);
        script.request(5, 0, 65_536);
        script.request(4, 65_536, 65_536);
        script.request(3, 0, 0);
        script.request(7, 0, 1 << 20);
        script.request(99, 0, 0);
        script.request(WRITE, 0, 70_000);
        script.request(READ, 0, 3 << 20);
        script.request(WRITE, 512, 5000);
        script.request(2, 0, 0);
        script
    }

    /// `command` has its flags in the upper four bits, by the number of the flag.
    pub fn request(&mut self, command: u16, offset: u64, length: u32) {
        self.marks.push(self.bytes.len());
        let flags = if command >> 12 == 1 { 1u16 << 4 } else { 0 };
        self.bytes.extend(0x2560_9513u32.to_be_bytes());
        self.bytes.extend(flags.to_be_bytes());
        self.bytes.extend((command & 0xfff).to_be_bytes());
        self.bytes.extend((self.marks.len() as u64).to_be_bytes());
        self.bytes.extend((AREA + offset).to_be_bytes());
        self.bytes.extend(length.to_be_bytes());
        if command == 1 {
            self.bytes.resize(self.bytes.len() + length as usize, 0xee);
        }
    }

    /// Every byte of the handshake and of the headers, and the neighbourhood of the payloads' ends.
    pub fn cuts(&self) -> Vec<usize> {
        let near = |at: usize| self.marks.iter().any(|mark| at + 4 > *mark && at < mark + 34);
        let within = |at: &usize| *at < self.handshake_bytes || near(*at) || at.is_multiple_of(4999);
        (0..=self.bytes.len()).filter(within).collect()
    }
}

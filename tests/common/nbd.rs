//! A small NBD client for tests: one connection, one request at a time, blocking, nothing but `std`.
//!
//! It shares no code with the server that it talks to, so a misreading of the protocol cannot hide on both
//! sides. It speaks fixed newstyle, `NBD_OPT_GO` and simple replies.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::PATIENCE;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;

const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_WRITE_ZEROES: u16 = 6;

/// A connection to an export.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    cookie: u64,
    /// Bytes of the export.
    pub len: u64,
    /// Transmission flags as the server sent them.
    pub flags: u16,
}

fn strange(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, what)
}

impl Client {
    /// Opens the export of that name at a Unix socket.
    pub fn connect(socket: &Path, export: &str) -> Result<Client> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut client = Client { stream, cookie: 0, len: 0, flags: 0 };
        let mut greeting = [0; 18];
        client.stream.read_exact(&mut greeting)?;
        if &greeting[..8] != b"NBDMAGIC" || greeting[8..16] != OPTION_MAGIC.to_be_bytes() {
            return Err(strange("no NBD greeting"));
        }
        // Fixed newstyle, no zeroes: what the server offers is what is taken.
        client.stream.write_all(&(u32::from(greeting[17]) & 3).to_be_bytes())?;
        let mut option = Vec::new();
        option.extend(OPTION_MAGIC.to_be_bytes());
        option.extend(OPT_GO.to_be_bytes());
        option.extend((export.len() as u32 + 6).to_be_bytes());
        option.extend((export.len() as u32).to_be_bytes());
        option.extend(export.as_bytes());
        option.extend(0u16.to_be_bytes());
        client.stream.write_all(&option)?;
        while client.option_reply()? {}
        Ok(client)
    }

    /// Takes one reply to the option; false when it was the last.
    fn option_reply(&mut self) -> Result<bool> {
        if self.u64()? != OPTION_REPLY_MAGIC || self.u32()? != OPT_GO {
            return Err(strange("no reply to the option"));
        }
        let (kind, len) = (self.u32()?, self.u32()?);
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data)?;
        match kind {
            REP_ACK => return Ok(false),
            REP_INFO if data.len() == 12 && data[..2] == INFO_EXPORT.to_be_bytes() => {
                self.len = u64::from_be_bytes(data[2..10].try_into().map_err(|_| strange("no size"))?);
                self.flags = u16::from_be_bytes([data[10], data[11]]);
            }
            REP_INFO => {}
            _ => return Err(strange(&format!("the export is refused: {kind:#x}"))),
        }
        Ok(true)
    }

    fn u32(&mut self) -> Result<u32> {
        let mut bytes = [0; 4];
        self.stream.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.stream.read_exact(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }

    fn send(&mut self, command: u16, offset: u64, len: u32, payload: &[u8]) -> Result<()> {
        self.cookie += 1;
        let mut request = Vec::with_capacity(28 + payload.len());
        request.extend(REQUEST_MAGIC.to_be_bytes());
        request.extend(0u16.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(self.cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        request.extend(payload);
        self.stream.write_all(&request)
    }

    fn answer(&mut self) -> Result<()> {
        let (magic, error, cookie) = (self.u32()?, self.u32()?, self.u64()?);
        if magic != REPLY_MAGIC || cookie != self.cookie {
            return Err(strange("no reply to the request"));
        }
        match error {
            0 => Ok(()),
            error => Err(Error::from_raw_os_error(error as i32)),
        }
    }

    /// Reads into `bytes`.
    pub fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.send(CMD_READ, offset, bytes.len() as u32, &[])?;
        self.answer()?;
        self.stream.read_exact(bytes)
    }

    /// Writes; it is acknowledged when this returns.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.send(CMD_WRITE, offset, bytes.len() as u32, bytes)?;
        self.answer()
    }

    /// Makes a range zero; it is acknowledged when this returns.
    pub fn write_zeroes(&mut self, offset: u64, len: u32) -> Result<()> {
        self.send(CMD_WRITE_ZEROES, offset, len, &[])?;
        self.answer()
    }

    /// Makes durable what was acknowledged.
    pub fn flush(&mut self) -> Result<()> {
        self.send(CMD_FLUSH, 0, 0, &[])?;
        self.answer()
    }

    /// Says farewell.
    pub fn disconnect(mut self) -> Result<()> {
        self.send(CMD_DISC, 0, 0, &[])
    }
}

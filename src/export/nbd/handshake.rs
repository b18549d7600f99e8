//! The handshake of one connection: the codec's machine between a stream and a list of exports.

use blockferry_ring::{Errno, File, Ring};

use crate::base::limits;
use crate::protocol::nbd::{
    ExportDirectory, Negotiated, ProtocolError, ServerHandshake, ServerPolicy, ServerProgress,
};

/// A client has chosen its export and waits for the answer.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) negotiated: Box<Negotiated>,
    /// The answer, to be sent when the export's door is open.
    pub(super) answer: Vec<u8>,
    /// What the client has sent beyond its choice.
    pub(super) early: Vec<u8>,
}

/// Why a handshake ended without a choice.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeEnd {
    #[error("the client ended it")]
    Aborted,
    #[error("the client vanished")]
    Vanished,
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    #[error("the connection failed: {0}")]
    Stream(Errno),
}

/// Talks with a client until it has chosen an export.
pub(super) async fn negotiate(
    ring: &Ring,
    stream: &File,
    policy: ServerPolicy,
    exports: &dyn ExportDirectory,
) -> Result<Chosen, HandshakeEnd> {
    let mut machine = ServerHandshake::new(policy);
    let (mut input, mut out) = (Vec::new(), Vec::new());
    loop {
        let step = match machine.advance(&input, exports, &mut out) {
            Ok(step) => step,
            Err(error) => {
                // Some errors are told before the connection ends.
                send(ring, stream, &out).await.map_err(HandshakeEnd::Stream)?;
                return Err(error.into());
            }
        };
        input.drain(..step.consumed);
        if let ServerProgress::Ready(negotiated) = step.progress {
            return Ok(Chosen { negotiated, answer: out, early: input });
        }
        send(ring, stream, &out).await.map_err(HandshakeEnd::Stream)?;
        out.clear();
        match step.progress {
            ServerProgress::Abort => return Err(HandshakeEnd::Aborted),
            // What is kept is bounded by the machine's policy: a longer option is never waited for.
            ServerProgress::NeedInput => {
                let buf = ring.alloc(limits::NBD_RECV_BYTES_MIN).await;
                match ring.recv(stream, buf).await {
                    (_, Ok(0)) => return Err(HandshakeEnd::Vanished),
                    (buf, Ok(received)) => input.extend_from_slice(&buf.as_slice()[..received as usize]),
                    (_, Err(errno)) => return Err(HandshakeEnd::Stream(errno)),
                }
            }
            ServerProgress::Again | ServerProgress::Ready(_) => {}
        }
    }
}

/// Sends all of `bytes`.
pub(super) async fn send(ring: &Ring, stream: &File, bytes: &[u8]) -> Result<(), Errno> {
    for part in bytes.chunks(limits::NBD_RECV_BYTES_MAX) {
        let mut buf = ring.alloc(part.len()).await;
        buf.copy_from(0, part);
        ring.send(stream, buf.freeze()).await?;
    }
    Ok(())
}

//! From the name of an export to a connection on which requests can be sent: look-up, connect, handshake.
//!
//! A server that accepts a connection and then says nothing must not hold anybody up for ever, so all of it has one
//! deadline. Names are looked up on the offload pool, because the system's resolver blocks; addresses need no look-up,
//! so a simulated world, which has addresses only, never gets there.

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::rc::Rc;

use blockferry_ring::sync::{Either, either};
use blockferry_ring::{Buf, Errno, File, Nanos, Ring, SocketAddress};

use super::client_error::{LostReason, NbdClientError};
use super::handshake_client::{ClientGoal, ClientHandshake, ClientNegotiated, ClientProgress, ListedExport};
use super::kept::{HANDSHAKE_BYTES, Kept, SPEECH_BYTES};
use super::uri::{NbdAddress, NbdUri};
use super::wire::ExportListing;

/// A stream whose handshake is over.
pub(super) struct Dialled {
    pub(super) stream: File,
    pub(super) end: HandshakeEnd,
    /// Bytes that came behind the handshake.
    pub(super) rest: Vec<u8>,
}

pub(super) enum HandshakeEnd {
    Ready(Box<ClientNegotiated>),
    Listed(Vec<ExportListing>),
    Described(Vec<ListedExport>),
}

/// Connects and goes through the handshake, within `deadline` (a span).
pub(super) async fn dial(
    ring: &Ring,
    uri: &NbdUri,
    goal: ClientGoal,
    deadline: Nanos,
    kept: &Kept,
) -> Result<Dialled, NbdClientError> {
    let name: Rc<str> = uri.to_string().into();
    let there = RefCell::new(None);
    let work = async {
        let stream = connect(ring, uri, &name).await?;
        *there.borrow_mut() = Some(stream.clone());
        let (end, rest) = shake_hands(ring, &stream, &name, goal, kept).await?;
        Ok(Dialled { stream, end, rest })
    };
    let mut work = std::pin::pin!(work);
    match either(work.as_mut(), ring.sleep(deadline)).await {
        Either::First(result) => result,
        Either::Second(()) => {
            let stream = there.borrow().clone();
            if let Some(stream) = stream {
                // It ends by itself now, and gives back the memory that is kept for the next attempt.
                ring.shutdown_stream(&stream);
                let _ = work.await;
            }
            Err(NbdClientError::Lost { uri: name.clone(), reason: LostReason::TimedOut })
        }
    }
}

async fn connect(ring: &Ring, uri: &NbdUri, name: &Rc<str>) -> Result<File, NbdClientError> {
    let mut errno = Errno::EADDRNOTAVAIL;
    for address in addresses(ring, uri, name).await? {
        match ring.dial(&address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => errno = error,
        }
    }
    Err(NbdClientError::Connect { uri: name.clone(), errno })
}

/// The addresses to try, in order.
async fn addresses(ring: &Ring, uri: &NbdUri, name: &Rc<str>) -> Result<Vec<SocketAddress>, NbdClientError> {
    let (host, port) = match &uri.address {
        NbdAddress::Unix { path } => return Ok(vec![SocketAddress::Unix(path.clone())]),
        NbdAddress::Tcp { host, port } => (host.clone(), *port),
    };
    if port == 0 {
        let reason = "port 0 is for servers, which take a free one; say the port that was taken".into();
        return Err(NbdClientError::Resolve { uri: name.clone(), reason, is_final: true });
    }
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddress::Tcp(SocketAddr::new(address, port))]);
    }
    let look_up = move || (host.as_str(), port).to_socket_addrs().map(Iterator::collect::<Vec<_>>);
    let failed = |reason: String| NbdClientError::Resolve { uri: name.clone(), reason, is_final: false };
    match ring.offload(look_up).await {
        Ok(Ok(found)) => Ok(found.into_iter().map(SocketAddress::Tcp).collect()),
        Ok(Err(error)) => Err(failed(error.to_string())),
        Err(errno) => Err(failed(errno.to_string())),
    }
}

async fn shake_hands(
    ring: &Ring,
    stream: &File,
    name: &Rc<str>,
    goal: ClientGoal,
    kept: &Kept,
) -> Result<(HandshakeEnd, Vec<u8>), NbdClientError> {
    let mut buf = Some(kept.take(ring, HANDSHAKE_BYTES).await);
    let result = converse(ring, stream, name, goal, kept, &mut buf).await;
    buf.into_iter().for_each(|buf| kept.give(buf));
    result
}

async fn converse(
    ring: &Ring,
    stream: &File,
    name: &Rc<str>,
    goal: ClientGoal,
    kept: &Kept,
    memory: &mut Option<Buf>,
) -> Result<(HandshakeEnd, Vec<u8>), NbdClientError> {
    let lost = |reason| NbdClientError::Lost { uri: name.clone(), reason };
    let mut machine = ClientHandshake::new(goal);
    let (mut input, mut out) = (Vec::new(), Vec::new());
    loop {
        let mut need_input = false;
        let step = machine.advance(&input, &mut out);
        // What is to be said is said even if it is a farewell.
        let sent = send_all(ring, stream, &mut out, kept).await;
        sent.map_err(|errno| lost(hung_up(LostReason::Transport(errno), &machine)))?;
        let step = step.map_err(|reason| NbdClientError::Handshake { uri: name.clone(), reason })?;
        input.drain(..step.consumed);
        match step.progress {
            ClientProgress::NeedInput => need_input = true,
            ClientProgress::Again => {}
            ClientProgress::Ready(negotiated) => return Ok((HandshakeEnd::Ready(negotiated), input)),
            ClientProgress::Listed(listed) => return Ok((HandshakeEnd::Listed(listed), input)),
            ClientProgress::Described(listed) => return Ok((HandshakeEnd::Described(listed), input)),
        }
        if need_input {
            let Some(buf) = memory.take() else { return Err(lost(LostReason::ClosedHere)) };
            let (buf, received) = receive(ring, stream, buf, &mut input).await;
            *memory = Some(buf);
            received.map_err(|reason| lost(hung_up(reason, &machine)))?;
        }
    }
}

/// A connection that ends while an option is open says something about the option.
fn hung_up(reason: LostReason, machine: &ClientHandshake) -> LostReason {
    let is_closed = matches!(
        reason,
        LostReason::ClosedByServer | LostReason::Transport(Errno::ECONNRESET | Errno::EPIPE)
    );
    match machine.unanswered() {
        Some(option) if is_closed => LostReason::HungUp { option },
        _ => reason,
    }
}

async fn send_all(ring: &Ring, stream: &File, out: &mut Vec<u8>, kept: &Kept) -> Result<(), Errno> {
    for piece in out.chunks(SPEECH_BYTES) {
        let mut buf = kept.take(ring, SPEECH_BYTES).await;
        buf.copy_from(0, piece);
        let shared = buf.freeze();
        let sent = ring.send(stream, shared.slice(0, piece.len())).await;
        shared.try_thaw().into_iter().for_each(|buf| kept.give(buf));
        sent?;
    }
    out.clear();
    Ok(())
}

/// Receives some bytes behind `input`.
async fn receive(ring: &Ring, stream: &File, buf: Buf, input: &mut Vec<u8>) -> (Buf, Result<(), LostReason>) {
    let (buf, received) = ring.recv(stream, buf).await;
    let result = match received {
        Ok(0) => Err(LostReason::ClosedByServer),
        Ok(bytes) => {
            input.extend_from_slice(&buf.as_slice()[..bytes as usize]);
            Ok(())
        }
        Err(errno) => Err(LostReason::Transport(errno)),
    };
    (buf, result)
}

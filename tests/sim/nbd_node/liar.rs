//! A server that says that its disk is one hole, and has data everywhere.

use std::path::Path;
use std::rc::Rc;

use blockferry::base::planted::{Bug, plant};
use blockferry::block::{
    BlockError, Capabilities, Driver, Extent, IoFuture, IoResult, Limits, Permissions, WriteFlags, ZeroFlags,
};
use blockferry::export::nbd::{Export, NbdServer, ServerConfig};
use blockferry::graph::node::{Node, Root};
use blockferry::job::compare::Comparer;
use blockferry::job::convert::{self, ConvertOptions};
use blockferry::job::grounds::Grounds;
use blockferry::job::mirror::verify::Verifier;
use blockferry::job::mirror::{self, MirrorOptions};
use blockferry::job::runner::Ending;
use blockferry::protocol::nbd::NbdNode;
use blockferry::protocol::open::{OpenOptions, open};
use blockferry_ring::sim::FileModel;
use blockferry_ring::{Buf, Ring, SharedBuf};

use super::{SOCKET, address, in_world_of, options};

const LEN: u64 = 4 << 20;
/// Enough for who compares and for the server, which lives in the same memory here.
const ARENA_BYTES: usize = 32 << 20;

#[derive(Debug)]
struct Liar(Ring, Rc<dyn Driver>);

impl Driver for Liar {
    fn kind(&self) -> &'static str {
        "liar"
    }

    fn name(&self) -> &str {
        self.1.name()
    }

    fn len(&self) -> u64 {
        self.1.len()
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn limits(&self) -> Limits {
        self.1.limits()
    }

    fn capabilities(&self) -> Capabilities {
        self.1.capabilities()
    }

    fn read(&self, offset: u64, buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        self.1.read(offset, buf)
    }

    fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoFuture<'_, IoResult> {
        self.1.write(offset, buf, flags)
    }

    fn flush(&self) -> IoFuture<'_, IoResult> {
        self.1.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> IoFuture<'_, IoResult> {
        self.1.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'_, IoResult> {
        self.1.write_zeroes(offset, len, flags)
    }

    fn block_status(&self, _offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        self.0.boxed(async move { Ok(Extent::hole(len)) })
    }

    fn set_permissions(&self, permissions: Permissions) -> IoResult {
        self.1.set_permissions(permissions)
    }

    fn set_len(&self, len: u64) -> IoFuture<'_, IoResult> {
        self.1.set_len(len)
    }
}

/// What a verified copy of the liar's disk found: whether a difference, and on what grounds.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    mismatch: Option<u64>,
    completed: bool,
    grounds: Grounds,
}

/// Copies from the liar, once by a mirror and once by a conversion, and compares; `bug` is planted.
fn copies(seed: u64, trust: bool, bug: Option<Bug>) -> [Found; 3] {
    plant(bug);
    let (found, _) = in_world_of(ARENA_BYTES, seed, move |ring, world| async move {
        world.write_raw("/disk", 0, &vec![7; LEN as usize]);
        let disk = open(&ring, Path::new("/disk"), &OpenOptions::default()).unwrap();
        let server = NbdServer::new(&ring, ServerConfig::default());
        let root = Root::new(&Node::new(&ring, "liar", Rc::new(Liar(ring.clone(), disk))), false).unwrap();
        let export = Export { root, description: String::new(), writable: true, default: true };
        server.add_export("disk", export).unwrap();
        server.listen(&address(SOCKET)).unwrap();
        let source = Node::new(&ring, "remote", NbdNode::open(&ring, options(SOCKET), false).await.unwrap());
        let target = |name: &str| {
            world.add_file(name, FileModel::regular(LEN));
            Node::new(&ring, name, open(&ring, Path::new(name), &OpenOptions::default()).unwrap())
        };
        let to = target("/mirror");
        let verifier = Verifier::new(&ring, source.driver(), to.driver()).unwrap();
        if trust {
            verifier.trust_holes();
        }
        let how = MirrorOptions { verifier: Some(verifier.clone()), ..MirrorOptions::new("mirror") };
        let job = mirror::start(&ring, &source, &to, how).await.unwrap();
        job.until_ready().await;
        job.cancel(false).unwrap();
        let completed = job.until_over().await == Ending::Completed;
        let report = verifier.report();
        let mirrored = Found { mismatch: report.mismatch, completed, grounds: report.grounds };

        let to = target("/converted");
        let how = ConvertOptions { verify: true, trust_holes: trust, ..ConvertOptions::new("convert") };
        let (job, tally) = convert::start(&ring, &source, &to, how).await.unwrap();
        let completed = job.until_over().await == Ending::Completed;
        let converted = Found { mismatch: tally.mismatch.get(), completed, grounds: tally.compared.get() };

        let comparer = Comparer::new(&ring, source.driver(), to.driver()).trusting(trust);
        let mismatch = comparer.run().await.unwrap();
        let compared = Found { mismatch, completed: mismatch.is_none(), grounds: comparer.grounds() };
        drop((job, verifier, comparer, to, source));
        server.stop().await;
        [mirrored, converted, compared]
    });
    plant(None);
    found
}

#[test]
fn a_server_that_lies_of_holes_is_found_by_verifying() {
    let unfound = Found {
        mismatch: None,
        completed: true,
        grounds: Grounds { bytes_on_trust: LEN, ..Grounds::default() },
    };
    for seed in 0..3 {
        for found in copies(seed, false, None) {
            assert_eq!((found.mismatch, found.completed), (Some(0), false), "seed {seed}: {found:?}");
            assert_eq!(found.grounds.bytes_on_trust, 0, "seed {seed}: {found:?}");
        }
        // Whoever trusts it is told how much was not read.
        for found in copies(seed, true, None) {
            assert_eq!(found, unfound, "seed {seed}");
        }
        // And without doubts nothing would be found.
        for found in copies(seed, false, Some(Bug::VerifyBelievesClaims)) {
            assert_eq!(found, unfound, "seed {seed}, with the bug");
        }
    }
}

//! Scratch: serve a file or nothing.
use blockferry::block::*;
use blockferry::export::nbd::*;
use blockferry::graph::node::*;
use blockferry_ring::*;
use std::rc::Rc;

#[global_allocator]
static A: blockferry_ring::alloc::CountingAllocator = blockferry_ring::alloc::CountingAllocator;

#[derive(Debug)]
struct D {
    ring: Ring,
    file: Option<File>,
    len: u64,
    align: u32,
}
impl Driver for D {
    fn kind(&self) -> &'static str {
        "x"
    }
    fn name(&self) -> &str {
        "x"
    }
    fn len(&self) -> u64 {
        self.len
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn limits(&self) -> Limits {
        Limits { mem_align: self.align, request_align: self.align, ..Limits::default() }
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }
    fn read(&self, offset: u64, buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        self.ring.boxed(async move {
            match &self.file {
                None => (buf, Ok(())),
                Some(f) => {
                    let (b, r) = self.ring.read(f, offset, buf).await;
                    (b, r.map(drop).map_err(|e| BlockError::new(Operation::Read, "x", e)))
                }
            }
        })
    }
    fn write(&self, offset: u64, buf: SharedBuf, _: WriteFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            match &self.file {
                None => Ok(()),
                Some(f) => self
                    .ring
                    .write(f, offset, buf, false)
                    .await
                    .map(drop)
                    .map_err(|e| BlockError::new(Operation::Write, "x", e)),
            }
        })
    }
    fn flush(&self) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async { Ok(()) })
    }
    fn discard(&self, _: u64, _: u64) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async { Ok(()) })
    }
    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async { Ok(()) })
    }
    fn block_status(&self, _: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        self.ring.boxed(async move { Ok(Extent::data(len)) })
    }
    fn resolve(&self, offset: u64, _: u64) -> Resolved {
        match &self.file {
            Some(f) => Resolved::File { file: f.clone(), offset },
            None => Resolved::Ask,
        }
    }
    fn set_permissions(&self, _: Permissions) -> IoResult {
        Ok(())
    }
    fn set_len(&self, _: u64) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async { Ok(()) })
    }
}
fn main() {
    let args: Vec<String> = std::env::args().collect();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let ring = Ring::new(&Config::default()).unwrap();
    let d = if args[2] == "null" {
        D { ring: ring.clone(), file: None, len: 1 << 30, align: 1 }
    } else {
        let file = ring
            .open(
                std::path::Path::new(&args[2]),
                &OpenHow { write: true, direct: true, ..OpenHow::default() },
            )
            .unwrap();
        let info = ring.info(&file).unwrap();
        D { ring: ring.clone(), file: Some(file), len: info.len, align: info.mem_align }
    };
    let node = Node::new(&ring, "n", Rc::new(d));
    let server = NbdServer::new(&ring, ServerConfig::default());
    server
        .add_export(
            "",
            Export {
                root: Root::new(&node, false).unwrap(),
                description: String::new(),
                writable: true,
                default: true,
            },
        )
        .unwrap();
    server.listen(&SocketAddress::Unix(args[1].clone().into())).unwrap();
    let mut clients = 0;
    loop {
        let _ = ring.turn_blocking();
        let now = server.clients();
        if now == 0 && clients > 0 {
            let s = ring.stats().snapshot();
            eprintln!(
                "{:?} alloc/op {:.3} pool misses {}",
                ring.stats(),
                s.allocations_an_operation(),
                ring.pool().misses()
            );
        }
        clients = now;
    }
}

//! Random reads and writes of 4 KiB through a qcow2 node that each program opens itself, with L2 tables that fit in its
//! memory and with ones that do not.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::Fallible;
use crate::disks::{Content, Loop, Mount, make_file, sync};
use crate::node::Load;
use crate::result::Role;
use crate::rounds::{Contender, Context, interleave};

const GIB: u64 = 1 << 30;
/// How many operations a run makes at depth 32, where tables are cached.
const OPERATIONS: u64 = 200_000;

fn qemu_img(line: &str) -> Fallible<()> {
    let output = Command::new("qemu-img").args(line.split_whitespace()).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("qemu-img {line}: {}", String::from_utf8_lossy(&output.stderr).trim()).into())
}

/// What programs do on one image, at one depth, reading or writing.
fn lines(disk_bytes: u64, operations: u64, depth: u32, write: bool) -> Vec<(&'static str, Role, String)> {
    // A stride that is odd in pages and not far from the size, or from what qemu-img takes: each lies elsewhere.
    let step = ((disk_bytes - 1_048_576) / 4096 * 4096 + 4096).min(274_489 * 4096);
    let (reads, flag) = if write { (0, "-w") } else { (100, "") };
    let peer = |aio: &str| {
        format!(
            "qemu-img bench -f qcow2 {flag} -t none -i {aio} -c {operations} -d {depth} -s 4096 -S {step} DEV"
        )
    };
    let way = if write { "randwrite" } else { "randread" };
    vec![
        (
            "blockferry bench",
            Role::Ours,
            format!(
                "blockferry --json --stats bench --quiet --overwrite -f qcow2 -d {depth} -p {reads} -n {operations} DEV"
            ),
        ),
        ("qemu-img bench, io_uring", Role::Peer, peer("io_uring")),
        ("qemu-img bench, native", Role::Peer, peer("native")),
        (
            "fio on the raw file, io_uring with registered files and buffers",
            Role::Limit,
            format!(
                "fio --name=c --ioengine=io_uring --fixedbufs --registerfiles --rw={way} --bs=4k --iodepth={depth} \
                 --direct=1 --norandommap --randrepeat=0 --output-format=json --number_ios={operations} --size=100% \
                 --io_size={} --filename=DEV.raw",
                operations * 4096
            ),
        ),
    ]
}

/// Makes an image and a raw file beside it, for the limit.
fn make(path: &Path, bytes: u64, cached: bool) -> Fallible<()> {
    let raw = path.with_extension("img.raw");
    let (image, raw_name) = (path.display(), raw.display());
    if cached {
        make_file(&raw, bytes)?;
        Content::Random(1).fill(&raw, bytes)?;
        qemu_img(&format!("convert -f raw -O qcow2 -W {raw_name} {image}"))?;
    } else {
        qemu_img(&format!("create -q -f qcow2 -o cluster_size=4k,preallocation=metadata {image} {bytes}"))?;
        make_file(&raw, bytes)?;
    }
    sync(path)
}

/// Runs the scenario.
pub fn run(cx: &mut Context, scenario: &str) -> Fallible<()> {
    let (cached_bytes, wide_bytes) = if cx.quick { (GIB / 4, 20 * GIB) } else { (4 * GIB, 64 * GIB) };
    // Writes to the wide image fill holes: of each contender in each round, at most.
    let room = 2 * cached_bytes + 6 * GIB;
    let tmpfs = Mount::tmpfs(&cx.folder.join("tmpfs"), room)?;
    let device = Loop::new(&tmpfs.path().join("disk.xfs"), 3 * wide_bytes + room)?;
    let xfs = Mount::xfs(device.path(), &cx.folder.join("xfs"))?;
    for cached in [true, false] {
        let path = xfs.path().join(if cached { "cached.img" } else { "wide.img" });
        let bytes = if cached { cached_bytes } else { wide_bytes };
        make(&path, bytes, cached)?;
        for write in [false, true] {
            for depth in [1, 32] {
                let scale = if depth == 1 { 4 } else { 1 } * if cached { 1 } else { 4 };
                let operations = OPERATIONS / scale / if cx.quick { 20 } else { 1 };
                let load = Load {
                    disk: &path,
                    folder: &cx.folder,
                    blockferry: &cx.blockferry,
                    operations,
                    count: cx.counted,
                };
                let entries: Vec<Contender<'_>> = lines(bytes, operations, depth, write)
                    .into_iter()
                    .map(|(name, role, command)| load.contender(name, role, command))
                    .collect();
                let limits =
                    (cx.rounds.unwrap_or(if cx.quick { 2 } else { 5 }), cx.seconds_max, cx.only.as_slice());
                let case = format!(
                    "{} 4 KiB, depth {depth}, L2 {}",
                    if write { "write" } else { "read" },
                    if cached { "cached" } else { "not cached" }
                );
                interleave(&mut cx.sink, limits, (scenario, &case), entries)?;
            }
        }
    }
    Ok(())
}

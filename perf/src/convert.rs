//! Converting between raw and qcow2, alone and over chains: ours, `qemu-img convert`, jobs of qemu-storage-daemon, and
//! the bare loop on the same bytes.

use std::cell::RefCell;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use blockferry_ring::rng::Rng;
use serde_json::{Value, json};

use crate::copy::{Task, a_gib, words};
use crate::disks::{Loop, Mount, drop_cache, make_file, sync};
use crate::result::Role;
use crate::rounds::{Contender, Context, interleave};
use crate::{Fallible, stop};

const CLUSTER: u64 = 64 << 10;
const GIB: u64 = 1 << 30;
/// Layers of the longest chain.
const DEPTH: usize = 4;

/// One row of contenders.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub name: &'static str,
    /// Layers of the source; 0: raw.
    depth: usize,
    to: &'static str,
}

/// All of them.
pub const CASES: [Case; 5] = [
    Case { name: "raw to qcow2", depth: 0, to: "qcow2" },
    Case { name: "qcow2 to raw, depth 1", depth: 1, to: "raw" },
    Case { name: "qcow2 to raw, depth 4", depth: DEPTH, to: "raw" },
    Case { name: "qcow2 to qcow2, depth 1", depth: 1, to: "qcow2" },
    Case { name: "qcow2 to qcow2, depth 4", depth: DEPTH, to: "qcow2" },
];

/// Images on a filesystem of their own; fields are dropped in this order.
struct Lab {
    xfs: Mount,
    _device: Loop,
    _tmpfs: Mount,
    /// Bytes of data that one layer shows, and all four.
    data_bytes: [u64; 2],
}

/// Runs a program that has to succeed.
pub fn tool(program: &str, line: &str) -> Fallible<()> {
    let output = Command::new(program).args(line.split_whitespace()).stdin(Stdio::null()).output()?;
    if !output.status.success() {
        return Err(format!("{program} {line}: {}", String::from_utf8_lossy(&output.stderr).trim()).into());
    }
    Ok(())
}

/// Writes whole clusters, in this order, by QEMU.
pub fn write_clusters(image: &Path, clusters: &[u64], value: u8) -> Fallible<()> {
    let mut child = Command::new("qemu-io")
        .args(["-f", "qcow2", "-t", "writeback"])
        .arg(image)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    let mut script = String::new();
    for cluster in clusters {
        script += &format!("write -q -P {value} {} {CLUSTER}\n", cluster * CLUSTER);
    }
    script += "quit\n";
    child.stdin.take().ok_or("no way to talk to qemu-io")?.write_all(script.as_bytes())?;
    if child.wait()?.success() { Ok(()) } else { Err("qemu-io failed".into()) }
}

impl Lab {
    fn new(folder: &Path, bytes: u64) -> Fallible<Lab> {
        // The chain, its contents in raw files, and a target that a contender may fill.
        let room = 5 * bytes + GIB;
        let tmpfs = Mount::tmpfs(&folder.join("tmpfs"), room + GIB / 4)?;
        let device = Loop::new(&tmpfs.path().join("disk.xfs"), room)?;
        let xfs = Mount::xfs(device.path(), &folder.join("xfs"))?;
        let mut lab = Lab { xfs, _device: device, _tmpfs: tmpfs, data_bytes: [0, 0] };
        let all = bytes / CLUSTER;
        let mut shown = std::collections::BTreeSet::new();
        for layer in 1..=DEPTH {
            stop::check()?;
            let mut order: Vec<u64> = (0..all).collect();
            Rng::new(layer as u64).shuffle(&mut order);
            order.truncate(all as usize / 4);
            let image = lab.layer(layer);
            let below = match layer {
                1 => String::new(),
                _ => format!("-b layer{} -F qcow2", layer - 1),
            };
            tool("qemu-img", &format!("create -q -f qcow2 {below} {} {bytes}", image.display()))?;
            write_clusters(&image, &order, layer as u8)?;
            shown.extend(order);
            lab.data_bytes[usize::from(layer > 1)] = shown.len() as u64 * CLUSTER;
        }
        for (layer, name) in [(1, "flat1"), (DEPTH, "flat4")] {
            let (from, to) = (lab.layer(layer), lab.path(name));
            tool("qemu-img", &format!("convert -f qcow2 -O raw {} {}", from.display(), to.display()))?;
            sync(&to)?;
        }
        Ok(lab)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.xfs.path().join(name)
    }

    fn layer(&self, number: usize) -> PathBuf {
        self.path(&format!("layer{number}"))
    }

    /// What a case reads.
    fn source(&self, case: &Case) -> PathBuf {
        if case.depth == 0 { self.path("flat1") } else { self.layer(case.depth) }
    }

    /// The same bytes in a raw file.
    fn flat(&self, case: &Case) -> PathBuf {
        self.path(if case.depth == DEPTH { "flat4" } else { "flat1" })
    }

    fn target(&self) -> PathBuf {
        self.path("target")
    }

    /// No target, and nothing of the sources in memory.
    fn prepare(&self, case: &Case) -> Fallible<()> {
        match std::fs::remove_file(self.target()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        for layer in 1..=case.depth {
            drop_cache(&self.layer(layer))?;
        }
        drop_cache(&self.flat(case))
    }

    fn verify(&self, format: &str, case: &Case) -> Fallible<()> {
        let (target, flat) = (self.target(), self.flat(case));
        if format == "qcow2" {
            tool("qemu-img", &format!("check -q -f qcow2 {}", target.display()))?;
        }
        let line = format!("compare -q -f {format} -F raw {} {}", target.display(), flat.display());
        tool("qemu-img", &line)
    }
}

/// How somebody converts.
#[derive(Clone, Debug)]
enum How {
    Tool {
        line: Vec<String>,
        durable: bool,
        ours: bool,
    },
    /// A job of qemu-storage-daemon with these arguments.
    Job(Value),
    /// The bare loop, from raw to raw.
    Bare(Vec<String>),
}

fn contenders(cx: &Context, case: &Case) -> Vec<(String, Role, How)> {
    let from = if case.depth == 0 { "raw" } else { "qcow2" };
    let formats = format!("-f {from} -O {}", case.to);
    let ours = |options: &str| {
        let mut line = vec![cx.blockferry.clone()];
        line.extend(words(&format!("--json --stats convert --quiet {formats} {options} SRC DST")));
        How::Tool { line, durable: true, ours: true }
    };
    let peer = |options: &str, durable| {
        let line = words(&format!("qemu-img convert {formats} {options} SRC DST"));
        How::Tool { line, durable, ours: false }
    };
    let bare = |options: &str| {
        let mut line = vec![cx.perf.clone()];
        line.extend(words(&format!("bare-copy {options} --sparse SRC DST")));
        How::Bare(line)
    };
    let tuned = json!({"granularity": 1 << 20, "buf-size": 64 << 20});
    let all = [
        ("blockferry convert, blocks are not shared", Role::Ours, ours("--reflink=never")),
        ("blockferry convert", Role::Ours, ours("")),
        ("qemu-img convert", Role::Buffered, peer("", false)),
        ("qemu-img convert, none", Role::Peer, peer("-t none -T none", true)),
        ("qemu-img convert, none, -m 16 -W", Role::Peer, peer("-t none -T none -m 16 -W", true)),
        ("QSD mirror", Role::Peer, How::Job(json!({}))),
        ("QSD mirror, granularity=1M buf-size=64M", Role::Peer, How::Job(tuned)),
        ("bare ring, 16 × 256 KiB", Role::Limit, bare("--depth 16 --block 256KiB")),
        ("bare ring, 16 × 1 MiB", Role::Limit, bare("--depth 16 --block 1MiB")),
    ];
    all.map(|(name, role, how)| (name.to_owned(), role, how)).to_vec()
}

/// How qemu-storage-daemon opens an image, with its chain.
fn node(name: &str, format: &str, path: &Path) -> Value {
    let file = json!({
        "driver": "file", "filename": path.display().to_string(), "aio": "io_uring",
        "cache": {"direct": true, "no-flush": false}, "discard": "unmap",
    });
    json!({"driver": format, "node-name": name, "file": file, "discard": "unmap"})
}

/// The layers of a source, each over the one below.
fn chain(lab: &Lab, depth: usize) -> Value {
    let mut all = Value::Null;
    for layer in 1..=depth {
        let name = if layer == depth { "src".to_owned() } else { format!("layer{layer}") };
        let mut this = node(&name, "qcow2", &lab.layer(layer));
        if layer > 1 {
            this["backing"] = all;
        }
        all = this;
    }
    all
}

fn shown(how: &How) -> String {
    match how {
        How::Tool { line, durable, .. } => {
            let mut line = line.clone();
            line[0] =
                Path::new(&line[0]).file_name().map_or_else(String::new, |n| n.to_string_lossy().into());
            format!("{}{}", line.join(" "), if *durable { "" } else { ", then fsync of DST" })
        }
        How::Job(arguments) => {
            format!("qemu-storage-daemon; blockdev-mirror sync=full {arguments}, until BLOCK_JOB_READY")
        }
        How::Bare(line) => format!("blockferry-perf {}", line[1..].join(" ")),
    }
}

/// Runs the scenario.
pub fn run(cx: &mut Context, scenario: &str) -> Fallible<()> {
    let bytes = if cx.quick { GIB / 8 } else { 2 * GIB };
    let lab = RefCell::new(Lab::new(&cx.folder, bytes)?);
    let (folder, is_counted) = (cx.folder.clone(), cx.counted);
    let wanted: Vec<&Case> = CASES.iter().filter(|case| cx.wants(case.name)).collect();
    for case in wanted {
        let entries = contenders(cx, case).into_iter().map(|(name, role, how)| {
            let (lab, folder) = (&lab, &folder);
            Contender {
                name,
                role,
                command: shown(&how),
                run: Box::new(move |warm_up| {
                    let lab = lab.borrow();
                    lab.prepare(case)?;
                    let (source, target, flat) = (lab.source(case), lab.target(), lab.flat(case));
                    let count = warm_up && is_counted;
                    let from = if let How::Bare(_) = how { &flat } else { &source };
                    let task = Task { source: from, target: &target, before: &[], folder, count };
                    let mut format = case.to;
                    let mut values = match &how {
                        How::Tool { line, durable, ours } => task.tool(line, *durable, *ours)?,
                        How::Bare(line) => {
                            format = "raw";
                            make_file(&target, bytes)?;
                            task.tool(line, true, false)?
                        }
                        How::Job(arguments) => {
                            tool(
                                "qemu-img",
                                &format!("create -q -f {} {} {bytes}", case.to, target.display()),
                            )?;
                            let source = match case.depth {
                                0 => node("src", "raw", &source),
                                depth => chain(&lab, depth),
                            };
                            task.job([source, node("dst", case.to, &target)], arguments)?
                        }
                    };
                    a_gib(&mut values, lab.data_bytes[usize::from(case.depth == DEPTH)]);
                    if warm_up {
                        lab.verify(format, case)?;
                    }
                    Ok(values)
                }),
            }
        });
        let limits = (cx.rounds_or(8), cx.seconds_max, cx.only.as_slice());
        let entries: Vec<Contender<'_>> = entries.collect();
        interleave(&mut cx.sink, limits, (scenario, case.name), entries)?;
    }
    Ok(())
}

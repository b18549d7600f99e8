//! The catalogue: what can be measured, and what is hoped for.

use crate::Fallible;
use crate::copy::{Media, Setup};
use crate::disks::Content;
use crate::result::Role;
use crate::rounds::Context;

/// Which of two values is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    Less,
    More,
}

/// Something that ours is to reach.
#[derive(Clone, Copy, Debug)]
pub struct Goal {
    /// Only in this case of the scenario; [`EVERY_CASE`] for each, empty where there are none.
    pub case: &'static str,
    /// What is compared.
    pub metric: &'static str,
    pub better: Better,
    /// With the best of whom.
    pub against: Role,
    /// Only contenders whose names contain this.
    pub among: &'static str,
    /// Ours over the other (where less is better) is at most this, or at least (where more is better).
    pub ratio: f64,
    /// The goal in words.
    pub words: &'static str,
}

/// Instead of a case: a goal in each.
pub const EVERY_CASE: &str = "*";

/// What is run.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Copy(Setup),
    Remote(crate::remote::Work),
    Nbd,
    Node,
    Convert,
    Merge,
    MergeLive,
    Qcow2Node,
    Live(crate::live::Place),
    Gluster,
}

/// One scenario.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    pub name: &'static str,
    pub title: &'static str,
    /// What happens, and what to make of it.
    pub what: &'static str,
    pub kind: Kind,
    /// The figure of the chart.
    pub chart: &'static str,
    pub goals: &'static [Goal],
}

const GIB: u64 = 1 << 30;

const fn goal(
    metric: &'static str,
    better: Better,
    against: Role,
    among: &'static str,
    ratio: f64,
    words: &'static str,
) -> Goal {
    Goal { case: "", metric, better, against, among, ratio, words }
}

const fn in_case(case: &'static str, goal: Goal) -> Goal {
    Goal { case, ..goal }
}

use Better::{Less, More};

/// All of them.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "copy-loop",
        title: "Copy, loop devices on tmpfs, 4 GiB",
        what: "A truly asynchronous device without a disk behind it: what the process itself costs. The kernel's own \
               copying is in the machine's busy time, not in the process's.",
        kind: Kind::Copy(Setup {
            media: Media::LoopOnTmpfs,
            content: Content::Random(1),
            bytes: 4 * GIB,
            pinned: false,
            rounds: 10,
            fast_only: false,
        }),
        chart: "cpu-secs-a-gib",
        goals: &[
            goal(
                "cpu-secs-a-gib",
                Less,
                Role::Peer,
                "mirror",
                0.5,
                "CPU at most 0.5 of the best mirror peer",
            ),
            goal(
                "wall-secs",
                Less,
                Role::Limit,
                "",
                1.0 / 0.9,
                "at least 0.9 times as fast as the best bare ring",
            ),
        ],
    },
    Scenario {
        name: "copy-zram",
        title: "Copy, zram devices, 3 GiB of random data, one CPU",
        what: "Everything, the device's work included, on one CPU: the steadiest comparison there is (2 % from run to \
               run). zram serves requests synchronously, through io_uring's workers.",
        kind: Kind::Copy(Setup {
            media: Media::Zram,
            content: Content::Random(1),
            bytes: 3 * GIB,
            pinned: true,
            rounds: 10,
            fast_only: true,
        }),
        chart: "wall-secs",
        goals: &[goal(
            "wall-secs",
            Less,
            Role::Peer,
            "mirror",
            1.0 / 1.15,
            "1.15 times as fast as the best mirror peer",
        )],
    },
    Scenario {
        name: "copy-zram-free",
        title: "Copy, zram devices, 3 GiB of random data, all CPUs",
        what: "The same without the pin. Here it counts who uses a second CPU, and the scheduler's placing of workers makes \
               it unsteady (peers vary by a quarter).",
        kind: Kind::Copy(Setup {
            media: Media::Zram,
            content: Content::Random(1),
            bytes: 3 * GIB,
            pinned: false,
            rounds: 8,
            fast_only: true,
        }),
        chart: "wall-secs",
        goals: &[goal(
            "wall-secs",
            Less,
            Role::Peer,
            "mirror",
            1.0,
            "at least as fast as the best mirror peer",
        )],
    },
    Scenario {
        name: "copy-same",
        title: "Copy, zram devices, 32 GiB of same-filled pages, one CPU",
        what: "Each page is eight bytes repeated, which costs zram next to nothing: what is left is the software.",
        kind: Kind::Copy(Setup {
            media: Media::Zram,
            content: Content::SameFilled(1),
            bytes: 32 * GIB,
            pinned: true,
            rounds: 6,
            fast_only: true,
        }),
        chart: "wall-secs",
        goals: &[goal(
            "wall-secs",
            Less,
            Role::Peer,
            "mirror",
            1.0 / 1.6,
            "1.6 times as fast as the best mirror peer",
        )],
    },
    Scenario {
        name: "copy-disk",
        title: "Copy, files on this machine's disk, 4 GiB",
        what: "The disk is the wall here, and a moving target: wall time is shown and never judged, CPU time is.",
        kind: Kind::Copy(Setup {
            media: Media::Files,
            content: Content::Random(1),
            bytes: 4 * GIB,
            pinned: false,
            rounds: 4,
            fast_only: false,
        }),
        chart: "cpu-secs-a-gib",
        goals: &[goal(
            "cpu-secs-a-gib",
            Less,
            Role::Peer,
            "",
            0.5,
            "CPU at most 0.5 of the best peer with O_DIRECT",
        )],
    },
    Scenario {
        name: "copy-sparse",
        title: "Copy, sparse file of 16 GiB with a tenth of data",
        what: "Files on two XFS on loop devices on tmpfs, one MiB of data in ten. The target is a new sparse file each \
               time. Figures are a GiB of data.",
        kind: Kind::Copy(Setup {
            media: Media::FreshXfsFiles,
            content: Content::Tenth(1),
            bytes: 16 * GIB,
            pinned: false,
            rounds: 10,
            fast_only: false,
        }),
        chart: "wall-secs",
        goals: &[
            goal("wall-secs", Less, Role::Peer, "", 1.0, "at least as fast as the best peer with O_DIRECT"),
            goal(
                "cpu-secs-a-gib",
                Less,
                Role::Peer,
                "",
                0.7,
                "CPU at most 0.7 of the best peer with O_DIRECT",
            ),
        ],
    },
    Scenario {
        name: "nbd",
        title: "NBD server on a Unix socket, loop device on tmpfs, 4 GiB",
        what: "One client at a time, for each server started anew. CPU is the server's, an I/O.",
        kind: Kind::Nbd,
        chart: "iops",
        goals: &[
            in_case(
                "read 4 KiB, depth 16",
                goal("iops", More, Role::Peer, "", 1.3, "1.3 times the best peer with O_DIRECT"),
            ),
            in_case(
                "read 4 KiB, depth 64",
                goal("iops", More, Role::Peer, "", 1.6, "1.6 times the best peer with O_DIRECT"),
            ),
            in_case(
                "write 4 KiB, depth 16",
                goal("iops", More, Role::Peer, "", 1.3, "1.3 times the best peer with O_DIRECT"),
            ),
            in_case(
                "write 4 KiB, depth 64",
                goal("iops", More, Role::Peer, "", 1.6, "1.6 times the best peer with O_DIRECT"),
            ),
            in_case(
                "read 4 KiB, depth 16",
                goal("cpu-us-an-io", Less, Role::Peer, "", 0.7, "CPU an I/O at most 0.7"),
            ),
            in_case(
                "read 4 KiB, depth 64",
                goal("cpu-us-an-io", Less, Role::Peer, "", 0.7, "CPU an I/O at most 0.7"),
            ),
        ],
    },
    Scenario {
        name: "remote-mirror",
        title: "Mirror to and from an NBD server, 1 GiB",
        what: "nbdkit with its delay filter is the server, so that every request takes so long; it works on 16 requests of a \
               connection at a time. The local disk is a file on XFS on a loop device on tmpfs. With every other 64 KiB, \
               the mirror is one of the uppermost layer of a qcow2 image, or of a disk with holes. QEMU's jobs are timed \
               without their start and connecting, ours with both.",
        kind: Kind::Remote(crate::remote::Work::Mirror),
        chart: "wall-secs",
        goals: &[
            in_case(
                EVERY_CASE,
                goal("wall-secs", Less, Role::Peer, "", 1.0, "at least as fast as the best peer"),
            ),
            in_case(
                "to, unix, 5 ms, every other 64 KiB",
                goal(
                    "wall-secs",
                    Less,
                    Role::Peer,
                    "QSD mirror",
                    0.25,
                    "4 times as fast as qemu-storage-daemon",
                ),
            ),
            in_case(
                "to, TCP, 5 ms, every other 64 KiB",
                goal(
                    "wall-secs",
                    Less,
                    Role::Peer,
                    "QSD mirror",
                    0.25,
                    "4 times as fast as qemu-storage-daemon",
                ),
            ),
        ],
    },
    Scenario {
        name: "remote-convert",
        title: "Convert to and from an NBD server, 1 GiB",
        what: "The same servers and disks, at rest. nbdcopy goes through the page cache for the local file, the others past \
               it; holes are dealt with as each tool does by itself.",
        kind: Kind::Remote(crate::remote::Work::Convert),
        chart: "wall-secs",
        goals: &[in_case(
            EVERY_CASE,
            goal("wall-secs", Less, Role::Peer, "", 1.0, "at least as fast as the best peer"),
        )],
    },
    Scenario {
        name: "node",
        title: "Random reads of 4 KiB through a raw node, depth 32, loop device on tmpfs",
        what: "No server between: each program opens the device itself. qemu-img bench reads at a fixed stride, the \
               others at random.",
        kind: Kind::Node,
        chart: "iops",
        goals: &[
            goal("iops", More, Role::Peer, "qemu", 1.25, "1.25 times qemu-img bench"),
            goal("cpu-us-an-io", Less, Role::Peer, "qemu", 0.6, "CPU an I/O at most 0.6"),
        ],
    },
    Scenario {
        name: "convert",
        title: "Convert, files of 2 GiB on XFS on a loop device on tmpfs",
        what: "Each layer of a chain holds a quarter of the disk, in clusters of 64 KiB at random places and in random order. \
               The target is new each time. Figures are a GiB of data. The bare ring copies the same bytes from one raw file \
               to another.",
        kind: Kind::Convert,
        chart: "wall-secs",
        goals: &[
            goal("wall-secs", Less, Role::Peer, "", 1.0, "at least as fast as the best peer with O_DIRECT"),
            in_case(
                "qcow2 to qcow2, depth 4",
                goal("wall-secs", Less, Role::Peer, "", 1.0 / 1.5, "1.5 times as fast at depth 4"),
            ),
            in_case(
                "qcow2 to qcow2, depth 4",
                goal("cpu-secs-a-gib", Less, Role::Peer, "", 1.0 / 3.0, "a third of the CPU at depth 4"),
            ),
            in_case(
                "qcow2 to raw, depth 4",
                goal("wall-secs", Less, Role::Peer, "", 1.0 / 1.5, "1.5 times as fast at depth 4"),
            ),
            in_case(
                "qcow2 to raw, depth 4",
                goal("cpu-secs-a-gib", Less, Role::Peer, "", 1.0 / 3.0, "a third of the CPU at depth 4"),
            ),
        ],
    },
    Scenario {
        name: "merge",
        title: "Commit and stream, live jobs on 2 GiB, files on XFS on a loop device on tmpfs",
        what: "A full base with a quarter of it in random clusters of 64 KiB over it. A commit moves that quarter, a stream \
               the other three. Wall and CPU are those of the job, as the daemon's are; `qemu-img` is measured whole. To \
               the base, requests take longer in some cases: by a `delay` node for ours, by nbdkit's filter for the \
               daemon.",
        kind: Kind::Merge,
        chart: "wall-secs",
        goals: &[
            in_case(
                "intermediate commit",
                goal("wall-secs", Less, Role::Peer, "QSD", 0.25, "4 times as fast as the daemon's"),
            ),
            in_case(
                "active commit",
                goal("wall-secs", Less, Role::Peer, "QSD", 1.0 / 1.2, "1.2 times as fast"),
            ),
            in_case(
                "stream",
                goal("wall-secs", Less, Role::Peer, "QSD", 0.5, "2 times as fast as the daemon's"),
            ),
            in_case(
                "stream",
                goal("wall-secs", Less, Role::Peer, "rebase", 1.0 / 1.5, "1.5 times `qemu-img rebase`"),
            ),
            in_case(
                "intermediate commit, 5 ms to the base",
                goal("wall-secs", Less, Role::Peer, "QSD", 0.2, "5 times as fast at 5 ms"),
            ),
            in_case(
                "stream, 5 ms to the base",
                goal("wall-secs", Less, Role::Peer, "QSD", 0.2, "5 times as fast at 5 ms"),
            ),
            goal("cpu-secs-a-gib", Less, Role::Peer, "", 1.0, "less CPU a GiB everywhere"),
        ],
    },
    Scenario {
        name: "merge-live",
        title: "A client beside commit and stream, files of 2 GiB on XFS on a loop device on tmpfs",
        what: "One client writes 4 KiB at random over NBD to the active layer while the layers below it are merged: how long \
               its writes take until the job is done (an active commit: ready), and how long that takes.",
        kind: Kind::MergeLive,
        chart: "p99-ms",
        goals: &[],
    },
    Scenario {
        name: "qcow2-node",
        title: "Random reads and writes of 4 KiB through a qcow2 node, on XFS on a loop device on tmpfs",
        what: "No server between: each program opens the image itself. Cached: 4 GiB in clusters of 64 KiB, full of data. Not \
               cached: 64 GiB in clusters of 4 KiB, whose L2 tables take four times the memory that either program keeps for \
               them (32 MiB); data clusters are holes at first. qemu-img bench goes at a fixed stride, the others at random.",
        kind: Kind::Qcow2Node,
        chart: "iops",
        goals: &[goal("iops", More, Role::Peer, "qemu", 1.0, "at least as fast as qemu-img bench")],
    },
    Scenario {
        name: "gluster",
        title: "GlusterFS, one brick on tmpfs, in a network namespace, 1 GiB",
        what: "Large requests in order and small ones at random through the same client library, and through a FUSE mount, \
               which the kernel reads ahead for and writes behind. Bricks and clients share this machine's processors.",
        kind: Kind::Gluster,
        chart: "iops",
        goals: &[],
    },
    Scenario {
        name: "live-loop",
        title: "A client beside a mirror, loop devices on tmpfs, 4 GiB",
        what: "One client writes 4 KiB at random over NBD while the disk that it writes to is mirrored: how long its \
               writes take until the job is ready, and how long that takes.",
        kind: Kind::Live(crate::live::Place::LoopOnTmpfs),
        chart: "p99-ms",
        goals: &[],
    },
    Scenario {
        name: "live-disk",
        title: "A client beside a mirror, files on this machine's disk, 2 GiB",
        what: "The same on files of the disk, where the order in which requests reach it matters too.",
        kind: Kind::Live(crate::live::Place::Disk),
        chart: "p99-ms",
        goals: &[],
    },
];

/// The scenario of a name.
pub fn find(name: &str) -> Option<&'static Scenario> {
    SCENARIOS.iter().find(|scenario| scenario.name == name)
}

impl Scenario {
    /// Runs it.
    pub fn run(&self, cx: &mut Context) -> Fallible<()> {
        match &self.kind {
            Kind::Copy(setup) => crate::copy::run(cx, self.name, setup),
            Kind::Remote(work) => crate::remote::run(cx, self.name, *work),
            Kind::Nbd => crate::nbd::run(cx, self.name),
            Kind::Node => crate::node::run(cx, self.name),
            Kind::Convert => crate::convert::run(cx, self.name),
            Kind::Merge => crate::merge::run(cx, self.name),
            Kind::MergeLive => crate::merge_live::run(cx, self.name),
            Kind::Qcow2Node => crate::qcow2::run(cx, self.name),
            Kind::Live(place) => crate::live::run(cx, self.name, *place),
            Kind::Gluster => crate::gluster::run(cx, self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_goals_name_cases_that_are_run() {
        for (i, scenario) in SCENARIOS.iter().enumerate() {
            assert!(SCENARIOS[..i].iter().all(|other| other.name != scenario.name));
            let remote: Vec<String> = crate::remote::Case::all().map(|case| case.name()).collect();
            for goal in scenario.goals.iter().filter(|goal| !["", EVERY_CASE].contains(&goal.case)) {
                let is_run = match scenario.kind {
                    Kind::Remote(_) => remote.iter().any(|name| name == goal.case),
                    Kind::Convert => crate::convert::CASES.iter().any(|case| case.name == goal.case),
                    Kind::Merge => crate::merge::cases().iter().any(|(_, _, name)| name == goal.case),
                    _ => crate::nbd::CASES.iter().any(|case| case.name == goal.case),
                };
                assert!(is_run, "{}", goal.case);
            }
        }
        assert!(find("copy-loop").is_some() && find("else").is_none());
    }
}
